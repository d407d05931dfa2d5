"""The bytes of a file are those of docs/FORMAT.md: a reader and a writer made from that page alone
agree with the core, and the page's tables agree with the code."""

import base64
import hashlib
import io
import math
import os
import re
import struct
import subprocess
import sys
from collections import OrderedDict, namedtuple
from pathlib import Path

import numpy as np
import pytest
import reader
import torch
from hypothesis import given
from hypothesis import strategies as st
from same import PLAIN_DTYPES, assert_same, filled, raw, small_state
from torch import nn

import fastsd
from fastsd import _core

HERE = Path(__file__).parent
PAGE = (HERE.parent / "docs" / "FORMAT.md").read_text()
CODE = (HERE.parent / "csrc" / "format.h").read_text()
GOLDEN = HERE / "golden"

REQUIRES_GRAD, PARAMETER, CONJ, NEG = 1, 2, 4, 8
CHECKSUM, NO_DATA = 1, 2


# ---- A second writer ----

Given = namedtuple("Given", "name dtype shape stride data flags", defaults=[0])


def write(tensors, sections=(), *, flags=0, version=(1, 0), devices=(b"cpu",)):
    """A file in which each tensor has a storage of its own.

    `dtype` is a name, `name` and `devices` are bytes; `sections` are those other than the tables:
    (kind, flags, bytes).
    """
    numbers = {name: number for number, (name, _) in reader.DTYPES.items()}
    records, dims, names = b"", b"", b""
    for i, t in enumerate(tensors):
        places = len(names), len(dims) // 8, 0
        rank = len(t.shape)
        rest = numbers.get(t.dtype, t.dtype), t.flags, rank, 0
        records += struct.pack("<QQQIIIHHII", *places, len(t.name), i, i, *rest)
        dims += struct.pack(f"<{2 * rank}q", *t.shape, *t.stride)
        names += t.name
    parts = {
        1: (0, bytes(32 * len(tensors))),
        2: (0, records),
        3: (0, dims),
        4: (0, names),
        5: (0, b"".join(name.ljust(32, b"\0") for name in devices)),
        **{kind: (bits, content) for kind, bits, content in sections},
    }
    table, content = b"", b""
    first = 48 + 24 * len(parts)
    places = {}
    for kind, (bits, part) in sorted(parts.items()):
        places[kind] = first + len(content)
        table += struct.pack("<IIQQ", kind, bits, places[kind], len(part))
        content += part + bytes(-len(part) % 8)
    header_bytes = math.ceil((first + len(content)) / 4096) * 4096
    file = bytearray(bytes(48) + table + content).ljust(header_bytes, b"\0")
    for i, t in enumerate(tensors):
        offset = math.ceil(len(file) / 256) * 256
        storage = offset, len(t.data), reader.crc32c(t.data), 0, CHECKSUM, 0
        struct.pack_into("<QQIHHQ", file, places[1] + 32 * i, *storage)
        if t.data:
            file += bytes(offset - len(file)) + t.data
    preamble = b"\x8fFSD\r\n\x1a\n", *version, 0, header_bytes, len(file), flags, len(parts), 0
    struct.pack_into("<8sHHIQQIIQ", file, 0, *preamble)
    return seal(file)


def seal(file):
    """The file with the checksum that its header should have."""
    file = bytearray(file)
    header_bytes = int.from_bytes(file[16:24], "little")
    file[12:16] = bytes(4)
    if header_bytes <= len(file):
        file[12:16] = reader.crc32c(file[:header_bytes]).to_bytes(4, "little")
    return bytes(file)


# ---- From what the second reader says to objects ----


def saved(obj, **options):
    file = io.BytesIO()
    fastsd.save(obj, file, **options)
    return file.getvalue()


def rebuild(file):
    """The object in a file, made by torch and numpy from what the second reader has found."""
    tensors = rebuild_tensors(file)
    if 6 in file.sections:
        return _Tree(tensors).rebuild(file.tree)
    by_name = {t.name: value for t, value in zip(file.tensors, tensors, strict=True)}
    if 7 in file.sections:
        by_name = OrderedDict(by_name)
        by_name._metadata = OrderedDict(_Tree(()).rebuild(file.state))
    return OrderedDict(by_name) if file.flags & 1 and 7 not in file.sections else by_name


def rebuild_tensors(file):
    storages, tensors = {}, []
    for number, t in enumerate(file.tensors):
        if t.same_as != number:
            tensors.append(tensors[t.same_as])
            continue
        dtype = getattr(torch, t.dtype)
        stored = file.storages[t.storage]
        if stored.flags & NO_DATA:
            tensor = torch.empty_strided(t.shape, t.stride, dtype=dtype, device="meta")
        else:
            if t.storage not in storages:
                content = torch.tensor(list(stored.data), dtype=torch.uint8)
                storages[t.storage] = content.untyped_storage()
            tensor = torch.empty(0, dtype=dtype)
            tensor.set_(storages[t.storage], t.start, t.shape, t.stride)
        if t.flags & CONJ:
            tensor = tensor.conj()
        if t.flags & NEG:
            tensor = torch._neg_view(tensor)
        if t.flags & PARAMETER:
            tensor = nn.Parameter(tensor, bool(t.flags & REQUIRES_GRAD))
        tensors.append(tensor.requires_grad_() if t.flags & REQUIRES_GRAD else tensor)
    return tensors


class _Tree:
    def __init__(self, tensors):
        self.tensors = tensors
        self.known = {}

    def rebuild(self, value):
        """A value of the tree; what was one object stays one."""
        if isinstance(value, (list, tuple, dict, set, frozenset, bytearray)):
            if id(value) not in self.known:
                self.known[id(value)] = value, self.make(value)
            return self.known[id(value)][1]
        return self.make(value)

    def make(self, value):
        if isinstance(value, reader.Node):
            return getattr(self, "make_" + value.kind)(value.value)
        if isinstance(value, dict):
            pairs = [(self.rebuild(k), self.rebuild(v)) for k, v in value.items()]
            return type(value)(pairs)
        if isinstance(value, (list, tuple, set, frozenset)):
            return type(value)(map(self.rebuild, value))
        return value

    def make_tensor(self, number):
        return self.tensors[number]

    def make_ndarray(self, node):
        array = self.tensors[node[0]].numpy()
        if len(node) == 1:
            return array
        return np.frombuffer(array.tobytes(), numpy_dtype(node[1])).reshape(node[2])

    def make_numpy(self, node):
        return np.frombuffer(base64.b64decode(node[1]), numpy_dtype(node[0]))[0]

    def make_Size(self, sizes):
        return torch.Size(sizes)

    def make_return_type(self, node):
        return getattr(torch.return_types, node[0])(map(self.rebuild, node[1]))

    def make_dtype(self, name):
        return getattr(torch, name)

    make_layout = make_memory_format = make_dtype

    def make_device(self, name):
        return torch.device(name)

    def make_attributes(self, node):
        value = self.rebuild(node[0])
        for name, attribute in node[1].items():
            setattr(value, name, self.rebuild(attribute))
        return value


def numpy_dtype(description):
    if isinstance(description, str):
        return np.dtype(description)
    return np.dtype([(name, numpy_dtype(d), *map(tuple, s)) for name, d, *s in description])


def check(obj, **options):
    """Both readers find in a file what was saved in it."""
    written = saved(obj, **options)
    file = reader.read(written)
    assert_same(rebuild(file), obj)
    loaded = fastsd.load(io.BytesIO(written), map_location=None)
    assert_same(loaded, obj)
    check_layout(written, file)
    return file


def check_layout(written, file):
    """What the page says of a file's places beyond what a reader must reject."""
    kinds = list(file.sections)
    assert kinds[:5] == [1, 2, 3, 4, 5]
    assert kinds == sorted(kinds)
    assert struct.unpack_from("<HH", written, 8) == (1, 0)
    assert struct.unpack_from("<QQ", written, 16) == (file.header, len(written))
    used = 48 + 24 * len(kinds) + sum(-(-len(part) // 8) * 8 for part in file.sections.values())
    assert file.header == -(-used // 4096) * 4096
    assert not any(written[used : file.header])
    for storage in file.storages:
        assert storage.offset % 256 == 0
        assert storage.crc32c == _core.crc32c(storage.data)
        assert bool(storage.flags & NO_DATA) == (file.devices[storage.device] == "meta")
    stored = [s for s in file.storages if s.data]
    ends = [file.header] + [s.offset + s.bytes for s in stored]
    for end, storage in zip(ends, stored, strict=False):
        assert storage.offset - end < 256
        assert not any(written[end : storage.offset])
    assert ends[-1] == len(written)


# ---- What the core writes, the second reader reads ----


def test_the_second_reader_is_short():
    """So that the format stays one that can be read by a page of code."""
    lines = (HERE / "reader.py").read_text().splitlines()
    assert len(lines) < 100
    assert max(map(len, lines)) <= 100


def test_checksums_agree_with_the_second_ones():
    assert reader.crc32c(b"123456789") == _core.crc32c(b"123456789") == 0xE3069283
    data = np.random.default_rng(0).bytes(5000)
    for begin, end in [(0, 0), (0, 1), (1, 4), (3, 11), (5, 300), (0, 4096), (7, 5000)]:
        assert reader.crc32c(data[begin:end]) == _core.crc32c(data[begin:end])


NAN = struct.unpack(">d", b"\xff\xf8\0\0\0\0\x12\x34")[0]
REPEATED = [1, "two"]
TIED = torch.arange(6.0)


def with_metadata(state, **metadata):
    usual = {"": {"version": 1}, "a.b": {}, "$c": {"x": [True]}}
    state._metadata = OrderedDict(metadata or usual)
    return state


def with_attributes(value, **attributes):
    vars(value).update(attributes)
    return value


OBJECTS = {
    "state": dict(small_state()),
    "ordered": small_state(),
    "module": nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).state_dict(),
    "state metadata": with_metadata(OrderedDict(w=torch.ones(2))),
    "state metadata like a kind": with_metadata(OrderedDict(w=torch.ones(2)), **{"$x": {}}),
    "nothing": {},
    "nothing, ordered": OrderedDict(),
    "nothing, with metadata": with_metadata(OrderedDict()),
    "odd names": {"": torch.ones(1), "a/b\\\0\n": torch.ones(1), "ключ🔑": torch.ones(1)},
    "a name like a kind": {"$tensor": torch.ones(1)},
    "a lone surrogate": {"\ud800": torch.ones(1)},
    "a long name": {"n" * 65536: torch.ones(1)},
    "a scalar": {"x": torch.tensor(5, dtype=torch.int16)},
    "rank 64": {"x": torch.ones([1] * 63 + [2])},
    "sizes of zero": {"x": torch.empty(0), "y": torch.empty(3, 0, 5), "z": torch.empty(0)},
    "zero between": {"x": torch.ones(1), "y": torch.empty(0), "z": torch.ones(1)},
    "zero at the end": {"x": torch.ones(1), "y": torch.empty(0)},
    "strides": {"x": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1)},
    "gaps": {"x": torch.arange(20.0)[::3], "y": torch.arange(40).reshape(4, 10)[1:3, 2:5]},
    "expanded": {"x": torch.tensor([1.0, 2.0]).expand(5, 2)},
    "tied": {"x": TIED, "y": TIED, "z": TIED.view(2, 3)},
    "overlapping": {"x": TIED[:4], "y": TIED[2:], "z": TIED[1:3].view(torch.int32)},
    "apart": {"x": TIED[:3], "y": TIED[3:]},
    "flags": {
        "parameter": nn.Parameter(torch.ones(2)),
        "frozen": nn.Parameter(torch.ones(2), requires_grad=False),
        "grad": torch.ones(2, requires_grad=True),
        "conj": torch.tensor([1 + 2j]).conj(),
        "neg": torch.tensor([1 + 2j]).conj().imag,
        "both": torch._neg_view(torch.tensor([1 + 2j])).conj(),
    },
    "a parameter twice": dict.fromkeys("xy", nn.Parameter(torch.ones(2))),
    "meta": {"m": torch.empty(2**40, 3, device="meta"), "x": torch.ones(3)},
    "only meta": {"m": torch.empty(3, device="meta", dtype=torch.int8)},
    "a tensor": torch.arange(3),
    "None": None,
    "plain": {
        "none": None,
        "bools": [True, False],
        "ints": [0, -1, 2**53 - 1, -(2**53) + 1, 2**53, -(2**53), 2**64, -(10**50)],
        "floats": [0.0, -0.0, 0.1, 5e-324, 1e308, 2.0**53, math.inf, -math.inf, NAN],
        "complex": [1j, complex(-0.0, math.inf), complex(NAN, 1)],
        "texts": ["", "ключ🔑", "\0\n\x7f\u2028", '"\\', "\ud800x", "$tensor"],
        "bytes": [b"", bytes(range(256)), bytearray(b"\0\xff")],
        "sequences": [[], (), [[1], (2, (3,))], torch.Size([]), torch.Size([2, 0, 2**40])],
        "sets": [set(), frozenset(), {1, "a", (2, b"b")}, frozenset([torch.Size([1])])],
        "dicts": [{}, {"a": {"b": 1}}, {"$a": 1}, {"$a": 1, "b": 2}, {1: 2, (3,): 4, None: 5}],
        "ordered": [OrderedDict(), OrderedDict(b=1, a=2), OrderedDict({"$a": 1, 2: 3})],
        "torch": [torch.float8_e5m2, torch.device("cuda:3"), torch.sparse_coo, torch.channels_last],
    },
    "numpy": {
        "scalars": [np.float32(1.5), np.int64(-3), np.bool_(True), np.str_("é"), np.void(b"ab")],
        "times": [np.datetime64("2026-11-22T01:02:03"), np.timedelta64(-5, "D")],
        "arrays": [np.arange(6).reshape(2, 3), np.array(1.5), np.zeros((0, 3), np.uint8)],
        "strided": np.arange(12.0).reshape(3, 4)[:, ::2],
        "others": [np.arange(3, dtype=">i4"), np.array([["ab", "c"]]), np.array([b"x"])],
        "fields": np.array([(1, [2.5, 3.5])], [("n", "<i2"), ("v", "<f8", (2,))]),
    },
    "named tuples": [torch.ones(2, 2).max(0), torch.ones(2, 2).sort()],
    "repeated": [REPEATED, {"again": REPEATED}, (REPEATED,)],
    "repeated tensors": [TIED, [TIED], {"x": TIED.view(3, 2)}],
    "attributes": [
        with_attributes(torch.ones(1), note="x", more=[torch.zeros(2)]),
        with_attributes(OrderedDict(a=1), note={"$x": 1}),
    ],
    "a checkpoint": {
        "model": nn.Linear(2, 2).state_dict(),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 3,
    },
}


@pytest.mark.parametrize("name", OBJECTS)
def test_both_readers_find_what_was_saved(name):
    check(OBJECTS[name])


def test_every_plain_kind_is_tested_here():
    kinds = set()
    for obj in OBJECTS.values():
        kinds |= set(re.findall(rb'\{"(\$\w+)":', reader.read(saved(obj)).sections.get(6, b"")))
    described = set(re.findall(r'`\{"(\$\w+)":', PAGE))
    assert {kind.decode() for kind in kinds} - {"$a", "$x"} == described


@pytest.mark.parametrize("dtype", PLAIN_DTYPES, ids=str)
def test_every_dtype(dtype):
    file = check({"x": filled((3, 2), dtype), "y": filled((0,), dtype), "z": filled((), dtype)})
    assert {"torch." + t.dtype for t in file.tensors} == {str(dtype)}


def test_the_tables_say_what_they_should():
    """A few facts, so that both readers and the writer cannot be wrong in the same way."""
    tensor = torch.arange(12, dtype=torch.int16).reshape(3, 4)
    views = {"whole": tensor, "part": tensor[1:, 1:3], "again": tensor}
    file = check({**views, "other": nn.Parameter(torch.ones(5))})
    assert file.header == 4096
    assert file.devices == ["cpu"]
    assert [t[:-1] for t in file.tensors] == [
        ("whole", "int16", (3, 4), (4, 1), 0, 0, 0),
        ("part", "int16", (2, 2), (4, 1), 5, 0, 1),
        ("again", "int16", (3, 4), (4, 1), 0, 0, 0),
        ("other", "float32", (5,), (1,), 0, REQUIRES_GRAD | PARAMETER, 3),
    ]
    assert [t.storage for t in file.tensors] == [0, 0, 0, 1]
    assert [s[:2] for s in file.storages] == [(4096, 24), (4352, 20)]
    assert file.storages[0].data == raw(tensor)
    assert list(file.sections) == [1, 2, 3, 4, 5]
    assert file.sections[4] == b"wholepartagainother"


def test_metadata():
    for metadata in ({"a": "b", "": "é\0🔑", "$tensor": "0"}, {"$tensor": "0"}):
        file = check({"x": torch.ones(1)}, metadata=metadata)
        assert file.metadata == metadata
        assert list(file.metadata) == list(metadata)
    assert 8 not in check({}, metadata={}).sections


def test_without_checksums():
    obj = {"x": torch.ones(3), "y": torch.empty(0), "m": torch.empty(3, device="meta")}
    file = reader.read(saved(obj, checksum=False))
    assert_same(rebuild(file), obj)
    assert [s.crc32c for s in file.storages] == [0, 0, 0]
    assert not any(s.flags & CHECKSUM for s in file.storages)


def test_a_header_of_several_pages():
    state = {f"layer.{i}.weight": torch.full((i % 5,), i) for i in range(300)}
    file = check(state, metadata={"notes": "x" * 20000})
    assert file.header > 40000


texts = st.text(st.characters(exclude_categories=()), max_size=6)
shapes = st.lists(st.integers(0, 4), max_size=3)
tensors = st.builds(filled, shapes, st.sampled_from(PLAIN_DTYPES), st.integers(0, 5))
views = st.builds(
    lambda base, bounds: base.flatten()[slice(*sorted(bounds))],
    st.just(filled((16,), torch.int32)),
    st.tuples(st.integers(0, 16), st.integers(0, 16)),
)


@given(st.dictionaries(texts, tensors | views, max_size=6), st.booleans())
def test_any_dictionary(state, is_ordered):
    check(OrderedDict(state) if is_ordered else state)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.complex_numbers(),
    texts,
    st.binary(max_size=6),
    tensors,
)


@given(
    st.recursive(
        scalars,
        lambda trees: st.one_of(
            st.lists(trees, max_size=3),
            st.lists(trees, max_size=3).map(tuple),
            st.dictionaries(texts, trees, max_size=3),
            st.dictionaries(st.integers() | texts, trees, max_size=3).map(OrderedDict),
            trees.map(lambda tree: [tree, (tree,)]),
        ),
        max_leaves=10,
    )
)
def test_any_tree(tree):
    check(tree)


# ---- What the second writer writes, the core reads ----

FLOATS = Given(b"a", "float32", (2, 3), (3, 1), struct.pack("<6f", *range(6)))
BYTES = Given(b"\xc3\xa9", "uint8", (4,), (1,), b"\x01\x02\x03\x04")
WANTED = {"a": torch.arange(6.0).reshape(2, 3), "é": torch.tensor([1, 2, 3, 4], dtype=torch.uint8)}


def load_bytes(file, **options):
    found = fastsd.load(io.BytesIO(file), verify="checksums", **options)
    assert_same(rebuild(reader.read(file)), found)
    return found


def test_both_writers_write_the_same_bytes():
    assert write([FLOATS, BYTES]) == saved(WANTED)
    assert write([FLOATS, BYTES], flags=1) == saved(OrderedDict(WANTED))
    assert write([]) == saved({})
    metadata = (8, 0, b'{"k":"v"}')
    assert write([FLOATS], [metadata]) == saved({"a": WANTED["a"]}, metadata={"k": "v"})
    tree = (6, 0, b'[{"$tensor":0},1.5,null]')
    assert write([FLOATS._replace(name=b"0")], [tree]) == saved([WANTED["a"], 1.5, None])


def test_a_file_from_the_page_alone_is_read():
    assert_same(load_bytes(write([FLOATS, BYTES])), WANTED)
    assert_same(load_bytes(write([FLOATS, BYTES], flags=1)), OrderedDict(WANTED))
    assert_same(load_bytes(write([])), {})
    assert_same(load_bytes(write([], devices=())), {})


def test_state_metadata_is_the_attribute_of_an_ordered_dict():
    """Whether or not flag 0 says so too: "with state_metadata an OrderedDict"."""
    wanted = OrderedDict(WANTED)
    wanted._metadata = OrderedDict([("", {"version": 1}), ("a", {"n": (1, 2)})])
    text = b'{"":{"version":1},"a":{"n":{"$tuple":[1,2]}}}'
    for flags in (1, 0):
        assert_same(load_bytes(write([FLOATS, BYTES], [(7, 0, text)], flags=flags)), wanted)


TREES = {
    '{"$tuple": [ 1 , -0.5e1, {"a": {"b": []}} ]}': (1, -5.0, {"a": {"b": []}}),
    ' [{"$int": "0x20000000000001"}, {"$int": "-0xFF"}] \r\n\t': [2**53 + 1, -255],
    '{"$float": "7ff0000000000000"}': math.inf,
    '{"$complex": ["3FF0000000000000", "bff0000000000000"]}': 1 - 1j,
    '[{"$bytes": ""}, {"$bytes": "/+8="}]': [b"", b"\xff\xef"],
    '{"$OrderedDict": {"a": 1, "$b": 2}}': OrderedDict([("a", 1), ("$b", 2)]),
    '{"$OrderedDict": [["a", 1]]}': OrderedDict(a=1),
    '{"$dict": [[{"$tuple": [1]}, 2], ["$tensor", 3]]}': {(1,): 2, "$tensor": 3},
    '{"$tensor": 1, "b": 2}': {"$tensor": 1, "b": 2},
    '{"a": {"$set": []}}': {"a": set()},
    '{"$frozenset": [1, "b"]}': frozenset([1, "b"]),
    '[{"$dtype": "int8"}, {"$layout": "strided"}]': [torch.int8, torch.strided],
    '{"$memory_format": "channels_last"}': torch.channels_last,
    '{"$device": "cuda:1"}': torch.device("cuda:1"),
    '{"$Size": [2, 3]}': torch.Size([2, 3]),
    '{"$numpy": ["<i2", "AQI="]}': np.int16(513),
    r'"\ud83d\udd11 \u0041 \ud800 \/"': "🔑 A \ud800 /",
    '"\u2028 é 🔑"': "\u2028 é 🔑",
    "9007199254740991": 2**53 - 1,
    "-0": 0,
    "1E2": 100.0,
}


@pytest.mark.parametrize("text", TREES)
def test_a_tree_from_the_page_alone_is_read(text):
    assert_same(load_bytes(write([], [(6, 0, text.encode())])), TREES[text])


def test_escaped_names_are_names_too():
    r"""JSON has many texts for one value: \u0024 is a dollar."""
    text = rb'{"\u0024tuple":[{"\u0024tensor":0},{"\u0024int":"0x1"}]}'
    assert_same(load_bytes(write([FLOATS], [(6, 0, text)])), (WANTED["a"], 1))


def test_tensors_in_trees_from_the_page_alone():
    text = b"""{"x": {"$tensor": 1}, "y": [{"$ndarray": [0]}, {"$ndarray": [1, "<u2", [2, 1]]}],
    "z": {"$def": [7, [{"$tensor": 0}]]}, "again": {"$ref": 7},
    "note": {"$attributes": [{"$tensor": 1}, {"n": 1}]}}"""
    found = load_bytes(write([FLOATS, BYTES], [(6, 0, text)]))
    assert found["x"] is found["note"]
    assert found["z"] is found["again"]
    assert found["x"].n == 1
    assert_same(found["y"][0], WANTED["a"].numpy())
    assert_same(found["y"][1], np.array([[0x201], [0x403]], "<u2"))


def test_a_newer_minor_version_is_accepted():
    for minor in (1, 65535):
        assert_same(load_bytes(write([FLOATS, BYTES], version=(1, minor))), WANTED)


def test_optional_flags_are_ignored():
    for bit in range(1, 16):
        assert_same(load_bytes(write([FLOATS, BYTES], flags=1 << bit)), WANTED)


@pytest.mark.parametrize("kind", [10, 11, 1000, 2**32 - 1])
@pytest.mark.parametrize("content", [b"", b"\xff", bytes(8), b"new" * 3000])
def test_optional_sections_are_ignored(kind, content):
    file = write([FLOATS, BYTES], [(8, 0, b'{"k":"v"}'), (kind, 0, content)])
    assert_same(load_bytes(file), WANTED)
    assert fastsd.open(io.BytesIO(file)).metadata == {"k": "v"}


def test_64_sections_are_accepted():
    sections = [(100 + i, 0, b"x" * i) for i in range(59)]
    assert_same(load_bytes(write([FLOATS, BYTES], sections)), WANTED)


def test_known_sections_may_be_marked_as_required():
    file = write([FLOATS, BYTES], [(8, 1, b'{"k":"v"}')])
    assert_same(load_bytes(file), WANTED)


def test_absent_tables_are_empty_ones():
    for kinds in ([], [5], [1, 2, 3, 4, 5], [1, 3]):
        table, first = b"", 48 + 24 * len(kinds)
        content = b""
        for kind in kinds:
            part = b"cpu".ljust(32, b"\0") if kind == 5 else b""
            table += struct.pack("<IIQQ", kind, 0, first + len(content), len(part))
            content += part
        preamble = b"\x8fFSD\r\n\x1a\n", 1, 0, 0, 4096, 4096, 0, len(kinds), 0
        file = struct.pack("<8sHHIQQIIQ", *preamble) + table + content
        assert_same(load_bytes(seal(file.ljust(4096, b"\0"))), {})


def test_sizes_at_the_limits_are_accepted():
    last = 2**63 - 1
    ones = (1,) * 64
    for shape, stride in [
        ((last,), (0,)),
        ((1,), (last,)),
        (ones, (last,) * 64),
        ((2**31, 2**31), (0, 0)),
        ((last, 0), (0, 1)),
    ]:
        data = b"" if 0 in shape else b"\x07"
        found = load_bytes_only(write([Given(b"x", "uint8", shape, stride, data)]))["x"]
        assert (found.shape, found.stride()) == (shape, stride)


def load_bytes_only(file):
    reader.read(file)
    return fastsd.load(io.BytesIO(file))


# ---- The page and the code ----


def constant(name):
    value = re.search(rf"\b{name} =\s*([^;]+);", CODE).group(1)
    value = re.sub(r"std::uint64_t\{1\}", "1", value)
    value = re.sub(r"\b(\d\w*?)U\b", r"\1", value)
    return eval(value, {}, {"kTensorCountMax": 2**24})  # of our own source: 1 << 30 and the like


def rows(heading):
    """The cells of the first table after a heading."""
    text = PAGE.split(heading, 1)[1]
    table = re.search(r"(?:^\|.*\n)+", text, re.M).group(0).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_the_dtypes_of_the_page_are_those_of_the_code():
    described = []
    for row in rows("Dtypes have torch's names"):
        cells = [cell for cell in row if cell]
        for number, text, size in zip(cells[::3], cells[1::3], cells[2::3], strict=True):
            names = re.sub(r" \(.*\)", "", text)
            if span := re.fullmatch(r"(u?int)1 to \w*int7", names):
                names = ", ".join(f"{span.group(1)}{i}" for i in range(1, 8))
            numbers = [int(n) for n in number.split(" - ")]
            for i, name in enumerate(names.split(", ")):
                described.append((numbers[0] + i, name, int(size)))
            assert described[-1][0] == numbers[-1]
    assert tuple(sorted(described)) == _core.DTYPES
    assert [(n, *rest) for n, rest in reader.DTYPES.items()] == list(_core.DTYPES)


def test_the_dtypes_are_those_of_torch():
    for _, name, size in _core.DTYPES:
        if hasattr(torch, name):
            assert getattr(torch, name).itemsize == size
    known = {name for _, name, _ in _core.DTYPES}
    assert {str(dtype).removeprefix("torch.") for dtype in PLAIN_DTYPES} <= known


def test_the_magic_of_the_page_is_that_of_the_code():
    magic = bytes.fromhex(re.search(r"magic \| `([0-9A-F ]+)`", PAGE).group(1))
    code = re.search(r"kMagic\[8\] = \{(.*?)\}", CODE).group(1)
    assert bytes(ord(b[1]) if b[0] == "'" else int(b, 16) for b in code.split(", ")) == magic
    assert saved({})[:8] == magic == b"\x8fFSD\r\n\x1a\n"


def test_the_version_of_the_page_is_that_of_the_code():
    major, minor = map(int, re.search(r"^Version (\d+)\.(\d+),", PAGE, re.M).groups())
    assert (constant("kVersionMajor"), constant("kVersionMinor")) == (major, minor)
    assert re.search(rf"^- {major}\.{minor}, ", PAGE.split("## History")[1], re.M)
    assert struct.unpack_from("<HH", saved({}), 8) == (major, minor)
    assert [row[3] for row in rows("## The preamble")][1:3] == [str(major), str(minor)]


LIMITS = {
    "kHeaderAlignBytes": r"header_bytes \| size of the header: a positive multiple of (\d+),",
    "kHeaderBytesMax": r"multiple of 4096, at most (2\^\d+)",
    "kStorageAlignBytes": r"of the first byte, a multiple of (\d+)",
    "kSectionAlignBytes": r"`align\(offset \+ bytes, (\d+)\)`",
    "kSectionCountMax": r"section_count \| at most (\d+)",
    "kTensorCountMax": r"There are at most (2\^\d+) tensors",
    "kStorageCountMax": r"viewed by at least one tensor\. There are at most (2\^\d+)",
    "kNameBytesMax": r"name_bytes \| at most (\d+)",
    "kRankMax": r"number of dimensions, at most (\d+)",
    "kDeviceCountMax": r"There are at most (\d+)\.\n\n### JSON",
    "kDeviceNameBytes": r"Names of (\d+) bytes each",
    "kVersionMajor": r"a `version_major` other than (\d+)",
}


@pytest.mark.parametrize("name", LIMITS)
def test_the_limits_of_the_page_are_those_of_the_code(name):
    described = re.search(LIMITS[name], PAGE).group(1)
    base, _, power = described.partition("^")
    assert constant(name) == int(base) ** int(power or 1)


@pytest.mark.parametrize(
    ("heading", "record"),
    [
        ("## The preamble", "Preamble"),
        ("Directly after the preamble", "SectionRecord"),
        ("### 1. Storages", "StorageRecord"),
        ("### 2. Tensors", "TensorRecord"),
    ],
)
def test_the_records_of_the_page_are_those_of_the_code(heading, record):
    described, end = [], 0
    for offset, size, name, _ in rows(heading):
        assert int(offset) == end
        end += int(size)
        described.append((name, int(size)))
    body = re.search(rf"struct {record} \{{(.*?)\n\}};", CODE, re.S).group(1)
    body = re.sub(r"//.*", "", body)
    fields = re.findall(r"(std::uint(\d+)_t|unsigned char)\s+(\w+)(?:\[(\d+)\])?;", body)
    assert [(name, int(count or int(bits) // 8)) for _, bits, name, count in fields] == described
    assert int(re.search(rf"sizeof\({record}\) == (\d+)", CODE).group(1)) == end


def test_the_sections_of_the_page_are_those_of_the_code():
    described = [(int(kind), name) for kind, name, _ in rows("of the section, without padding |")]
    body = re.search(r"enum class Section.*?\{(.*?)\n\};", CODE, re.S).group(1)
    in_code = [(int(n), name) for name, n in re.findall(r"k(\w+) = (\d+)", body)]
    assert [(n, name.replace("_", "")) for n, name in described] == [
        (n, name.lower()) for n, name in in_code
    ]
    sizes = dict(re.findall(r"\| (\d) \| \w+ \| (?:records|names) of (\d+) bytes \|", PAGE))
    assert sizes == {"1": "32", "2": "48", "5": "32"}


def test_the_flags_of_the_page_are_those_of_the_code():
    flags = {
        "requires_grad": constant("kTensorRequiresGrad"),
        "parameter": constant("kTensorIsParameter"),
        "conj": constant("kTensorIsConj"),
        "neg": constant("kTensorIsNeg"),
        "array": constant("kTensorIsArray"),
    }
    described = rows("A reader for which object identity means nothing may ignore it.")
    assert {name: 1 << int(bit) for bit, name, _ in described} == flags
    assert (constant("kStorageHasChecksum"), constant("kStorageHasNoData")) == (1, 2)
    assert re.search(r"bit 0: crc32c is valid\. bit 1: no data", PAGE)
    assert (constant("kFileRootIsOrderedDict"), constant("kSectionRequired")) == (1, 1)
    assert constant("kFileFlagsRequired") == 0xFFFF0000
    assert [row[0] for row in rows("\nFlags:\n")] == ["0", "1-15", "16-31"]


def test_the_example_checksum_of_the_page():
    text, crc = re.search(r"ASCII bytes `(\d+)` is (0x[0-9A-F]+)", PAGE).groups()
    assert reader.crc32c(text.encode()) == int(crc, 16)


# ---- Golden files: what version 1.0 wrote is read for ever, and written again the same ----


def golden_state():
    """Of every kind of record."""
    base = torch.arange(10, dtype=torch.int32)
    weight = nn.Parameter(torch.tensor([[1.5, -0.0], [2.0, 65504.0]]))
    state = OrderedDict(
        [
            ("weight", weight),
            ("tied", weight),
            ("base", base),
            ("part", base[1:9:3]),
            ("half", torch.tensor([1, -2, 0.5], dtype=torch.bfloat16)),
            ("mask", torch.tensor([True, False])),
            ("conj", torch.tensor([1 + 2j]).conj()),
            ("empty", torch.empty(0, 3)),
            ("meta", torch.empty(4, 5, dtype=torch.float64, device="meta")),
            ("ключ", torch.tensor(7)),
        ]
    )
    state._metadata = OrderedDict([("", {"version": 1}), ("layer", {})])
    return state


def golden_tree():
    again = [1, {"$x": None}]
    return {
        "tensor": torch.arange(4, dtype=torch.float16),
        "array": np.arange(6, dtype="<u2").reshape(2, 3),
        "big-endian": np.array([1, 2], ">i4"),
        "plain": [None, True, -1, 2**53, 0.1, math.inf, 1j, "é\ud800", b"\0", bytearray(b"\1")],
        "numpy": np.float32(1.5),
        "tuple": (torch.Size([2, 3]), (), {"b", "a"}, frozenset([2, 1])),
        "torch": [torch.bfloat16, torch.device("cuda:1"), torch.strided, torch.channels_last],
        "ordered": OrderedDict([("z", 1), (3, 4)]),
        "named": torch.return_types.max((torch.ones(1), torch.zeros(1, dtype=torch.int64))),
        "again": [again, again],
        "note": with_attributes(torch.zeros(1), note="x"),
    }


def golden_dtypes():
    """A tensor of every dtype that torch has names and values for."""
    return {str(dtype).removeprefix("torch."): filled((3, 2), dtype) for dtype in PLAIN_DTYPES}


def golden_flat():
    """The least: a dictionary, whose data have no checksums."""
    neg = torch.tensor([1 + 2j]).conj().imag
    return {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([-0.0]), "neg": neg}


def golden_sparse():
    """Of what no tree can hold, so that there is a pickle."""
    tensor = torch.sparse_coo_tensor([[0, 2], [1, 0]], [1.5, -2.0], (3, 2), check_invariants=True)
    return OrderedDict(sparse=tensor.coalesce(), dense=torch.arange(3), n=[1, "two"])


METADATA = {"made by": "fastsd", "$": "é"}
GOLDEN_OPTIONS = {
    "state": {"metadata": METADATA},
    "tree": {"metadata": METADATA},
    "dtypes": {},
    "flat": {"checksum": False},
    "sparse": {"metadata": METADATA},
}


def write_golden(name):
    return saved(globals()[f"golden_{name}"](), **GOLDEN_OPTIONS[name])


@pytest.mark.parametrize("name", GOLDEN_OPTIONS)
def test_golden_files(name):
    wanted, options = globals()[f"golden_{name}"](), GOLDEN_OPTIONS[name]
    metadata = options.get("metadata", {})
    path = GOLDEN / f"v1_0_{name}.fsd"
    written = path.read_bytes()
    file = reader.read(written)
    assert file.metadata == metadata
    for mmap in (True, False):
        assert_same(fastsd.load(path, mmap=mmap), wanted)
    with fastsd.open(path) as archive:
        assert archive.metadata == metadata
        assert archive.version == (1, 0)
        assert archive.verify().unchecked == (() if options.get("checksum", True) else (*wanted,))
    if 9 in file.sections:
        return  # how torch pickles is torch's, and not the same in all releases
    assert_same(rebuild(file), wanted)
    assert write_golden(name) == written


def test_a_golden_file_has_every_feature():
    """So that none is forgotten when one comes: sections, flags, kinds of storages, dtypes."""
    files = [reader.read(path.read_bytes()) for path in GOLDEN.glob("v1_0_*.fsd")]
    assert len(files) == len(GOLDEN_OPTIONS)
    assert {kind for file in files for kind in file.sections} == set(range(1, 10))
    tensors = [t for file in files for t in file.tensors]
    assert {t.dtype for t in tensors} >= {str(d).removeprefix("torch.") for d in PLAIN_DTYPES}
    flags = {1 << bit for bit in range(5) if any(t.flags & 1 << bit for t in tensors)}
    assert flags == {REQUIRES_GRAD, PARAMETER, CONJ, NEG, 16}
    assert any(t.same_as != number for file in files for number, t in enumerate(file.tensors))
    storages = {s.flags for file in files for s in file.storages}
    assert {0, CHECKSUM, NO_DATA} <= storages
    assert {file.flags for file in files} == {0, 1}
    assert {device for file in files for device in file.devices} == {"cpu", "meta"}
    assert any(t.shape and 0 in t.shape for t in tensors)
    assert any(t.shape == () for t in tensors)


def test_a_golden_file_of_the_future():
    """Version 1.7, with optional flags and sections that nobody knows yet, between those that are:
    what this version knows is read."""
    path = GOLDEN / "v1_7_future.fsd"
    sections = [(8, 0, b'{"k":"v"}'), (10, 0, b"\xff" * 9), (999, 0, b"")]
    written = write([FLOATS, BYTES], sections, flags=0xFFFF, version=(1, 7))
    assert path.read_bytes() == written
    assert_same(fastsd.load(path, verify="checksums"), OrderedDict(WANTED))
    with fastsd.open(path) as archive:
        assert archive.version == (1, 7)
        assert archive.metadata == {"k": "v"}


@pytest.mark.parametrize("bit", range(16, 32))
def test_required_flags_that_are_not_known_are_refused(bit):
    with pytest.raises(fastsd.VersionError, match="flag"):
        fastsd.load(io.BytesIO(write([FLOATS], flags=1 << bit)))


@pytest.mark.parametrize("kind", [10, 999])
def test_required_sections_that_are_not_known_are_refused(kind):
    with pytest.raises(fastsd.VersionError, match=f"section {kind}|{kind}"):
        fastsd.load(io.BytesIO(write([FLOATS], [(kind, 1, b"new")])))


SAVE_ALL = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
import test_format, torch, io, fastsd
for name in test_format.GOLDEN_OPTIONS:
    print(name, hashlib.sha256(test_format.write_golden(name)).hexdigest())
names = {"z", "y", "x", "w"}
for format, value in (("fsd", names), ("pth", sorted(names))):  # pickles have sets as they come
    file = io.BytesIO()
    fastsd.save({"b": torch.arange(3), "a": value}, file, format=format)
    print(format, hashlib.sha256(file.getvalue()).hexdigest())
file = io.BytesIO()
fastsd.save({"b": torch.arange(3), "a": torch.ones(2)}, file, format="safetensors")
print("safetensors", hashlib.sha256(file.getvalue()).hexdigest())
"""


def test_the_same_input_gives_the_same_bytes_in_every_process():
    """Whatever order sets have there, and wherever in memory things are."""
    found = []
    for seed in ("0", "12345"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SAVE_ALL, str(HERE)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(dict(line.split() for line in done.stdout.splitlines()))
    assert len(found[0]) == len(GOLDEN_OPTIONS) + 3
    assert found[0] == found[1]
    for name in GOLDEN_OPTIONS:
        if name != "sparse":
            golden = (GOLDEN / f"v1_0_{name}.fsd").read_bytes()
            assert found[0][name] == hashlib.sha256(golden).hexdigest()
