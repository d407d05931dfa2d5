"""What the core finds in torch's pickle streams without unpickling, against what torch loads."""

import argparse
import io
import pickle
import re
import zipfile
from collections import Counter, OrderedDict, defaultdict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from same import PLAIN_DTYPES, assert_same, filled
from torch import nn

from fastsd import _core
from fastsd.formats.fsd import Section
from fastsd.tensors import TensorRecord, apply_flags, dtype_of, view_storage
from fastsd.tree import flatten, restore_flat, restore_metadata, restore_tree

# Torch refuses to save the others.
TORCH_DTYPES = [
    dtype for dtype in PLAIN_DTYPES if not re.fullmatch(r"torch\.u?int[1-7]", str(dtype))
]
ROOT_IS_ORDERED = 1
IS_PARAMETER = 2


class Walked(NamedTuple):
    names: list[str]
    records: list[TensorRecord]
    devices: list[str]
    flags: int
    sections: dict[int, bytes]
    is_plain: bool
    globals: list[str]


class File(NamedTuple):
    """What torch.save writes."""

    whole: bytes
    stream: bytes
    storages: dict[str, bytes]

    def walk(self) -> Walked:
        sizes = [(key, len(data)) for key, data in self.storages.items()]
        return walk(self.stream, sizes)

    def load(self, **options: Any) -> Any:
        return torch.load(io.BytesIO(self.whole), **options)

    def load_stream(self) -> tuple[Any, str]:
        """What torch makes of another stream over the same storages, or why it refuses to."""
        copy = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(self.whole)) as old, zipfile.ZipFile(copy, "w") as new:
            for entry in old.infolist():
                is_stream = entry.filename.endswith("/data.pkl")
                new.writestr(entry.filename, self.stream if is_stream else old.read(entry))
        try:
            return torch.load(io.BytesIO(copy.getvalue()), weights_only=True), ""
        except (RuntimeError, pickle.UnpicklingError) as error:
            return None, str(error)


def walk(stream, sizes=()):
    names, records, *rest = _core.read_torch_pickle(stream, list(sizes))
    return Walked(names, [TensorRecord(*record) for record in records], *rest)


def save(obj, protocol=2):
    file = io.BytesIO()
    torch.save(obj, file, pickle_protocol=protocol)
    with zipfile.ZipFile(file) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    storages = {
        name.removeprefix("data/"): data
        for name, data in records.items()
        if name.startswith("data/")
    }
    return File(file.getvalue(), records["data.pkl"], storages)


def restore(file, walked):
    """The object that the tables describe, over the file's bytes."""
    storages = [storage_of(data) for data in file.storages.values()]
    tensors: list[torch.Tensor] = []
    for name, record in zip(walked.names, walked.records, strict=True):
        if record.same_as != len(tensors):
            tensors.append(tensors[record.same_as])
            continue
        dtype = dtype_of(record.dtype)
        if record.storage < len(storages):
            tensor = view_storage(storages[record.storage], dtype, record.storage_offset, record)
        else:
            assert walked.devices[record.storage] == "meta"
            tensor = torch.empty_strided(record.shape, record.stride, dtype=dtype, device="meta")
        tensors.append(apply_flags(name, tensor, record.flags))
    if Section.TREE in walked.sections:
        return restore_tree(walked.sections[Section.TREE], tensors)
    kind = OrderedDict if walked.flags & ROOT_IS_ORDERED else dict
    metadata = restore_metadata(walked.sections.get(Section.STATE_METADATA))
    return restore_flat(kind(zip(walked.names, tensors, strict=True)), metadata)


def storage_of(data):
    storage = torch.UntypedStorage(len(data))
    torch.empty(0, dtype=torch.uint8).set_(storage).copy_(
        torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)
    )
    return storage


def check_plain(obj, protocol=2):
    """Walks what torch.save makes of an object, and compares with what torch loads."""
    file = save(obj, protocol)
    walked = file.walk()
    assert (walked.is_plain, walked.globals) == (True, [])
    restored = restore(file, walked)
    assert_same(restored, file.load(weights_only=protocol == 2))
    flat = flatten(restored)
    assert walked.names == flat.names
    assert (Section.TREE in walked.sections) == (flat.tree is not None)
    return walked


def check_not_plain(obj, names, protocol=2):
    walked = save(obj, protocol).walk()
    assert not walked.is_plain
    assert walked.flags == 0
    # As far as it can be told: with marks where an unpickler would have to say more.
    assert all(b'{"$opaque":null}' in text for text in walked.sections.values())
    assert set(walked.sections) <= {Section.TREE}
    assert walked.names == names
    return walked


# ---- Plain data ----

PLAIN = {
    "None": None,
    "bools": [True, False],
    "small ints": [0, 1, 255, 256, 65535, 65536, -1, -256, 2**31 - 1, 2**31, -(2**31) - 1],
    "ints": [2**53 - 1, 2**53, -(2**53), 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64],
    "huge ints": [10**500, -(7**401), 1 << 2000, -(1 << 2007), 0xFF << 100],
    "floats": [0.0, -0.0, 0.1, 1e308, 5e-324, 1.0, 1e22, 1e16, 1e-7, float("inf"), float("nan")],
    "complex": [1j, complex(-0.0, float("nan"))],
    "strings": ["", "text", "ключ", "🔑", "\0\n\t\x1f\x7f\u2028", '"\\/', "$tensor"],
    "surrogates": ["\ud800", "a\udfffb", "\udc00\ud800", "\ud83d\ude00", {"\ud800": ["x"]}],
    "bytes": [b"\0\xff", bytes(range(256)), b"a", b"ab", b"abc"],
    "bytearrays": [bytearray(b"\0\xff"), bytearray()],
    "sequences": [[], (), [[]], ((), ()), [1, (2, [3])], (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
    "sets": [{1, "a", None, (1, 2), 2.5}, set()],
    "dicts": [{}, {"a": {"b": {}}}, OrderedDict(), OrderedDict(z=1, a=OrderedDict())],
    "keys": {1: "int", "1": "str", None: 0, b"1": 1, (1, "x"): 2, 0.5: 3, 2**70: 4, 1j: 5},
    "torch's keys": {torch.float32: 1, torch.strided: 2, torch.Size([1, 2]): 3},
    "dollars": [{"$tensor": 0}, {"$a": 1, "$b": 2}, OrderedDict({"$x": 1}), {"$": {}}],
    "sizes": [torch.Size([]), torch.Size([2**40, 0, 3])],
    "dtypes": [*PLAIN_DTYPES, torch.qint8, torch.quint4x2],
    "devices": [torch.device(d) for d in ("cpu", "cpu:0", "cuda", "cuda:3", "meta", "mps")],
    "layouts": [torch.strided, torch.sparse_coo, torch.sparse_bsc, torch.jagged, torch._mkldnn],
}


@pytest.mark.parametrize("value", PLAIN.values(), ids=PLAIN)
def test_plain_values(value):
    check_plain(value)
    check_plain({"nested": [value, {"again": (value,)}]})


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("value", PLAIN.values(), ids=PLAIN)
def test_plain_values_in_other_protocols(value, protocol):
    obj = [value, frozenset([1, frozenset(["a"])]), b"", {"t": torch.ones(2)}]
    if protocol == 3:
        obj[1] = None  # asks for builtins.frozenset by name
        obj[2] = b"x"
    check_plain(obj, protocol)


def test_long_texts_and_many_items():
    text = "long" * 100_000
    check_plain([text, text.encode(), list(range(2500)), {str(i): i for i in range(2500)}])
    check_plain([text, text.encode(), set(range(2500)), bytearray(b"x" * 70_000)], protocol=5)


def test_one_object_in_two_places():
    for value in (
        [1],
        {"a": 1},
        OrderedDict(a=1),
        {1, 2},
        (1, [2]),
        bytearray(b"x"),
        torch.ones(3),
    ):
        check_plain({"a": [value, (1, value)], "b": {"c": value}, "d": [value]})
    inner = {"w": torch.ones(2)}
    middle = [inner, inner]
    check_plain({"first": middle, "second": (middle, inner), "third": {"x": middle}})
    shared = ("x", ("y",))
    check_plain([{shared: shared}, {(1, shared), (2, shared)}, shared, OrderedDict({shared: 1})])


def test_attributes_of_ordered_dicts():
    state = OrderedDict(a=torch.ones(1), b=1)
    state.note = [torch.zeros(2), state["a"]]
    state._metadata = OrderedDict({"": {"version": 1}})
    check_plain(state)
    check_plain({"x": state, "y": [state]})


@pytest.mark.parametrize("metadata", [OrderedDict(), OrderedDict({"$a": {}}), {}, [], {1: 2}, None])
def test_flat_with_irregular_metadata(metadata):
    state = OrderedDict(a=torch.ones(1))
    state._metadata = metadata
    check_plain(state)


def test_names_are_those_of_save():
    one = torch.ones(1)
    check_plain({"a.b": {"c": one}, "a": {"b.c": torch.ones(1), "b": {"c": torch.ones(1)}}})
    check_plain([{1: one, "1": torch.ones(1)}])
    check_plain([{None: one, True: torch.ones(1), "\ud800x": torch.ones(1), "": {"": one}}])
    check_plain([{"ж" * 12_000: one, "ж" * 11_000: torch.ones(1)}])
    check_plain({"x" * 65536: one})
    check_plain({"x" * 65537: one})
    check_plain({"\ud800": one})
    check_plain(one)


# ---- Tensors ----


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_every_dtype(dtype):
    check_plain({"a": filled((3, 2), dtype), "b": torch.empty(0, dtype=dtype)})
    if dtype.is_floating_point or dtype.is_complex:
        check_plain([nn.Parameter(filled((3, 2), dtype)), torch.ones(2)])


def test_views():
    base = torch.arange(60.0).reshape(3, 4, 5)
    check_plain(
        {
            "base": base,
            "row": base[1],
            "transposed": base.transpose(0, 2),
            "stepped": base[::2, 1:, ::3],
            "broadcast": base[0, 0].expand(7, 5),
            "scalar": base[2, 3, 4],
            "empty": base[:0],
            "empty at the end": base.flatten()[60:],
            "conj": torch.tensor([1j, 2]).conj(),
            "neg": torch.tensor([1j, 2]).conj().imag,
            "grad": torch.ones(2, requires_grad=True),
            "parameter": nn.Parameter(base),
            "frozen": nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False),
            "meta": torch.empty(3, 4, device="meta"),
            "meta parameter": nn.Parameter(torch.empty(2, device="meta")),
        }
    )


def test_module_with_tied_weights():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5))
    model[1].weight = model[0].weight
    walked = check_plain(model.state_dict())
    assert walked.flags == ROOT_IS_ORDERED
    assert list(walked.sections) == [Section.STATE_METADATA]
    check_plain(dict(model.named_parameters(remove_duplicate=False)))


def test_training_checkpoint():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3).state_dict(),
        "epoch": 3,
        "best": float("inf"),
        "rng": torch.get_rng_state(),
        "config": {"layers": (3, 2), "dtype": torch.float32, "name": None},
    }
    walked = check_plain(checkpoint)
    assert "optimizer.state.0.exp_avg" in walked.names


# ---- What is not plain ----


class Point(NamedTuple):
    x: int


OPAQUE = {
    "namespace": (argparse.Namespace(a=1), "argparse.Namespace"),
    "named tuple": (Point(1), f"{__name__}.Point"),
    "numpy array": (np.arange(3), "numpy.ndarray"),
    "numpy scalar": (np.float32(1), "numpy.dtype"),
    "counter": (Counter("aab"), "collections.Counter"),
    "defaultdict": (defaultdict(list, a=[1]), "collections.defaultdict"),
    "frozenset": (frozenset([1]), "builtins.frozenset"),
    "empty bytes": (b"", "builtins.bytes"),
    "sparse": (torch.eye(2).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
    "a class": (dict, "builtins.dict"),
    "a storage": (torch.ones(2).untyped_storage(), None),
    "a known class": (OrderedDict, None),
    "module": (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
}


@pytest.mark.parametrize("value", OPAQUE.values(), ids=OPAQUE)
def test_names_around_what_is_not_plain(value):
    obj, name = value
    state = OrderedDict({"layer.weight": torch.ones(2), "layer.bias": torch.zeros(1)})
    names = ["state.layer.weight", "state.layer.bias", "more.0", "more.1.0"]
    more = [state["layer.bias"], (torch.ones(3),)]
    walked = check_not_plain({"before": obj, "state": state, "more": more, "last": obj}, names)
    assert name is None or name in walked.globals
    assert [record.same_as for record in walked.records] == [0, 1, 1, 3]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_tensors_that_are_not_plain():
    tagged = torch.ones(1)
    tagged.note = 1
    parameter = nn.Parameter(torch.ones(1))
    parameter.note = 1
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    obj = {"a": tagged, "b": parameter, "c": quantized, "d": torch.ones(1)}
    walked = check_not_plain(obj, ["d"])
    assert walked.globals == [
        "torch.QInt8Storage",
        "torch.Tensor",
        "torch._tensor._rebuild_from_type_v2",
        "torch._utils._rebuild_parameter_with_state",
        "torch._utils._rebuild_qtensor",
        "torch.per_tensor_affine",
    ]


def test_what_contains_itself():
    obj: dict[str, Any] = {"w": torch.ones(1)}
    obj["self"] = [obj, torch.zeros(1)]
    check_not_plain(obj, ["w", "self.1"])


def test_deep_nesting_ends():
    obj: Any = torch.ones(1)
    for _ in range(150):
        obj = [obj]
    check_plain({"deep": obj})
    for _ in range(120):
        obj = [obj]
    check_not_plain({"deep": obj, "w": torch.ones(1)}, ["w"])


def test_keys_that_are_equal():
    nan = float("nan")
    for obj in ([{nan: 1, float("nan"): 2}], [{2.0**80: 1, 2: 3}]):
        assert not save(obj).walk().is_plain


def test_a_tensor_as_a_key():
    check_not_plain({"a": {torch.ones(1): 2}, "b": torch.ones(1)}, ["b"])


# ---- Any tree, and damaged ones ----

# Other keys are in the names as JSON has them, not as Python's str() does.
keys = st.one_of(st.text(max_size=5), st.integers(-(2**63), 2**63 - 1), st.none())
hashables = st.one_of(keys, st.integers(), st.binary(min_size=1, max_size=5), st.tuples(keys, keys))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(st.characters(exclude_categories=()), max_size=9),
    st.binary(min_size=1, max_size=9),
    st.sampled_from(TORCH_DTYPES),
)


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    tensor = filled(shape, draw(st.sampled_from(TORCH_DTYPES)))
    return tensor.T if len(shape) == 2 and draw(st.booleans()) else tensor


def grow(trees):
    pairs = st.lists(st.tuples(keys, trees), max_size=4)
    return st.one_of(
        st.lists(trees, max_size=4),
        st.lists(trees, max_size=4).map(tuple),
        st.lists(st.tuples(st.text(max_size=5), trees), max_size=4).map(dict),
        pairs.map(dict),
        pairs.map(OrderedDict),
        st.sets(hashables, max_size=4),
        trees.map(lambda tree: [tree, {"again": tree}]),
    )


@given(
    st.recursive(st.one_of(scalars, tensors()), grow, max_leaves=20),
    st.sampled_from([2, 3, 4, 5]),
)
def test_any_tree(tree, protocol):
    check_plain(tree, protocol)


@given(st.dictionaries(st.text(max_size=9), tensors()), st.booleans())
def test_any_flat_dictionary(state, is_ordered):
    check_plain(OrderedDict(state) if is_ordered else state)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@settings(max_examples=300)
@given(st.data())
def test_damaged_streams_are_what_torch_makes_of_them(data):
    state = OrderedDict(w=torch.arange(6.0).reshape(2, 3), p=nn.Parameter(torch.ones(2)))
    state._metadata = OrderedDict({"": {"version": 1}})
    file = save([state, {"a": [1, 2.5, "xé", None, (1, 2**70), {1, 2}]}, state["w"][1]])
    stream = bytearray(file.stream)
    stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    damaged = file._replace(stream=bytes(stream))
    walked = damaged.walk()
    if not walked.is_plain:
        return
    loaded, problem = damaged.load_stream()
    if problem:
        # Of other protocols, or for a device that this machine has not.
        assert re.search("Unsupported operand|device|restore data location", problem)
    else:
        assert_same(restore(file, walked), loaded)
