"""Safetensors files, read as they are: the same as safetensors itself reads, zero-copy."""

import io
import json
import struct
from collections import OrderedDict

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from mapped import lies_in, mapped_ranges
from same import assert_same, filled, raw
from torch import nn

import fastsd
from fastsd import FormatError, LimitError, TruncatedError, UnsupportedError, VersionError

DTYPES = [*dict.fromkeys(safetensors.torch._TYPES.values())]
LENGTH_BYTES = 8


def build(header, data=b"", length=None):
    """A file with any header: an object, or its text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin, end, dtype="U8", shape=None):
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def misalign(data, by):
    """The same file with a header that is longer by some spaces."""
    (length,) = struct.unpack("<Q", data[:LENGTH_BYTES])
    header = data[LENGTH_BYTES : LENGTH_BYTES + length].rstrip(b" ")
    header += b" " * (-(LENGTH_BYTES + len(header)) % 64 + by)
    return build(header, data[LENGTH_BYTES + length :])


def state_of_all_dtypes():
    state = {}
    for dtype in DTYPES:
        for shape in ((3, 4), (), (0,), (2, 0, 3), (1, 1, 5), (2,)):
            state[f"{dtype}{shape}"] = filled(shape, dtype, seed=len(state))
    return state


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


# ---- The same as safetensors ----


@pytest.mark.parametrize("by", [0, 1, 3, 4, 8])
@pytest.mark.parametrize("mmap", [None, True, False])
def test_every_dtype_and_shape(mmap, by, file):
    file.write_bytes(misalign(safetensors.torch.save(state_of_all_dtypes()), by))
    wanted = safetensors.torch.load_file(file)
    with safetensors.safe_open(file, "pt") as other:
        assert_same(sort(fastsd.load(file, mmap=mmap)), sort(wanted))
        assert sorted(fastsd.load(file)) == sorted(other.keys())
        with fastsd.open(file, mmap=mmap) as archive:
            assert_same(sort(archive), sort(wanted))
            for name in wanted:
                assert archive.get_slice(name).get_shape() == other.get_slice(name).get_shape()


SHAPES = st.lists(st.integers(0, 4), max_size=4)


@given(st.dictionaries(st.text(max_size=8), st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=6))
def test_any_state(kinds):
    kinds.pop("__metadata__", None)
    state = {name: filled(shape, dtype) for name, (dtype, shape) in kinds.items()}
    try:
        data = safetensors.torch.save(state)
    except Exception:
        return  # names that it cannot write
    assert_same(sort(fastsd.load(io.BytesIO(data))), sort(safetensors.torch.load(data)))


def sort(state):
    return dict(sorted(state.items()))


def test_tensors_come_in_the_order_of_the_header():
    data = build({"z": entry(2, 3), "a": entry(0, 2), "m": entry(3, 3)}, b"\1\2\3")
    loaded = fastsd.load(io.BytesIO(data))
    assert list(loaded) == ["z", "a", "m"]
    assert [t.tolist() for t in loaded.values()] == [[3], [1, 2], []]


def test_four_bit_floats_are_two_to_a_byte():
    dtype = getattr(torch, "float4_e2m1fn_x2", None)
    if dtype is None:
        pytest.skip("this torch has none")
    data = build({"x": entry(0, 6, "F4", [2, 6])}, bytes(range(6)))
    loaded = fastsd.load(io.BytesIO(data))["x"]
    assert (loaded.dtype, loaded.shape) == (dtype, (2, 3))
    assert raw(loaded) == bytes(range(6))


@pytest.mark.parametrize("name", ["F6_E2M3", "F6_E3M2"])
def test_dtypes_that_torch_has_not(name):
    with pytest.raises(UnsupportedError, match=f"tensor `x` has dtype {name}"):
        fastsd.load(io.BytesIO(build({"x": entry(0, 3, name, [4])}, bytes(3))))


def test_nothing_at_all():
    assert fastsd.load(io.BytesIO(build({}))) == {}
    assert fastsd.load(io.BytesIO(build({"__metadata__": {"a": "b"}}))) == {}


# ---- Tensors anywhere in the file ----


def by_an_odd_byte(tensor):
    """The same tensor at an odd address."""
    memory = torch.empty(tensor.nbytes + 65, dtype=torch.uint8).numpy()
    begin = -memory.ctypes.data % 64 + 1
    part = torch.from_numpy(memory[begin : begin + tensor.nbytes])
    part.copy_(torch.frombuffer(bytearray(raw(tensor)), dtype=torch.uint8))
    return part


def test_mapped_tensors_lie_in_the_file_wherever_they_are(file):
    state = {"byte": filled((1,), torch.uint8), **state_of_all_dtypes()}
    file.write_bytes(misalign(safetensors.torch.save(state), 3))
    loaded = fastsd.load(file, mmap=True)
    ranges = mapped_ranges(file)
    assert all(lies_in(tensor, ranges) for tensor in loaded.values() if tensor.numel())
    odd = [t for t in loaded.values() if t.numel() and t.data_ptr() % t.itemsize]
    assert {t.dtype for t in odd} == {dtype for dtype in DTYPES if dtype.itemsize > 1}
    before = file.read_bytes()
    for tensor in loaded.values():
        tensor.zero_()
    assert file.read_bytes() == before


def matmuls(x):
    return [x @ x.T, torch.einsum("ij,kj->ik", x, x), x.T.contiguous() @ x, torch.outer(x[0], x[1])]


def reductions(x):
    return [x.sum(), x.sum(0), x.mean(1), x.std(), x.amax(1), x.argmax(), x.cumsum(0), x.prod(1)]


def elementwise(x):
    return [x + x, x * 2, -x, x.exp(), x.sigmoid(), x.abs(), x > 0, x.clamp(-1, 1), x / 3, x.sqrt()]


def copies(x):
    return [x.clone(), x.T.contiguous(), x[::2, 1::3], x.flip(0), x.to(torch.float64), x.half()]


def indexing(x):
    picked = torch.tensor([3, 1, 2])
    return [x[picked], x.gather(1, picked[None]), x.sort(1).values, x.topk(3).values, x.roll(1)]


def networks(x):
    functional = nn.functional
    image = x[:16, :16].reshape(1, 1, 16, 16)
    return [
        functional.linear(x, x, x[:, 0]),
        functional.softmax(x, 1),
        functional.layer_norm(x, x.shape[1:], x[0], x[1]),
        functional.gelu(x),
        functional.conv2d(image, image[:, :, :3, :3]),
        functional.embedding(torch.tensor([0, 2, 5]), x),
        functional.scaled_dot_product_attention(*[x[None, None]] * 3),
        functional.max_pool2d(image, 2),
    ]


def in_place(x):
    x += 1
    x.mul_(x)
    x[1:3].zero_()
    x.index_add_(0, torch.tensor([4, 5]), x[:2].clone())
    return [x]


def complex_parts(x):
    return [x + x, x * x, x @ x.T, x.abs(), x.conj() * x, x.real.clone(), x.sum(), x.angle()]


def integers(x):
    return [x + x, x * 3, x.sum(), x % 7, x & 3, x.sort(1).values, x.unique(), x.cumsum(0), x // 5]


WORK = {
    **dict.fromkeys(
        (torch.float64, torch.float32, torch.bfloat16, torch.float16),
        (matmuls, reductions, elementwise, copies, indexing, networks, in_place),
    ),
    torch.complex64: (complex_parts,),
    torch.int64: (integers, indexing, in_place),
    torch.int16: (integers, indexing, in_place),
}


@pytest.mark.parametrize("by", [1, 2, 5])
@pytest.mark.parametrize("dtype", WORK, ids=str)
def test_work_on_misaligned_tensors_gives_what_it_gives_on_aligned_ones(dtype, by, file):
    generator = torch.Generator().manual_seed(3)
    real = torch.rand(37, 41, generator=generator, dtype=torch.float64) * 8 - 4
    wanted = real.to(dtype)
    file.write_bytes(misalign(safetensors.torch.save({"x": wanted}), by))
    for work in WORK[dtype]:
        if work is networks:
            wanted = wanted[:, :37].contiguous()
            file.write_bytes(misalign(safetensors.torch.save({"x": wanted}), by))
        found = fastsd.load(file, mmap=True)["x"]
        assert found.data_ptr() % 64 == by
        aligned = wanted.clone()
        assert aligned.data_ptr() % 64 == 0
        for i, (one, other) in enumerate(zip(work(found), work(aligned), strict=True)):
            torch.testing.assert_close(one, other, equal_nan=True, msg=f"{work.__name__} {i}")


def test_a_model_over_misaligned_weights(file):
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    file.write_bytes(misalign(safetensors.torch.save(model.state_dict()), 1))
    other = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    fastsd.load_into(other, file, assign=True, mmap=True)
    assert all(parameter.data_ptr() % 4 for parameter in other.parameters())
    x = torch.randn(2, 5, 32)
    gradients = []
    for each in (model, other):
        torch.manual_seed(1)
        loss = each(x).square().sum()
        loss.backward()
        optimizer = torch.optim.AdamW(each.parameters())
        optimizer.step()
        gradients.append([loss, *each.parameters(), *(p.grad for p in each.parameters())])
    for one, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(one, wanted)


def test_misaligned_tensors_are_saved_and_loaded_again(file, path):
    state = {"a": torch.arange(5.0), "b": torch.arange(5, dtype=torch.bfloat16)}
    file.write_bytes(misalign(safetensors.torch.save(state), 1))
    fastsd.save(fastsd.load(file, mmap=True), path)
    assert_same(fastsd.load(path), state)
    assert fastsd.load(file, mmap=True)["a"].numpy().tolist() == [0, 1, 2, 3, 4]


def test_unmapped_tensors_are_aligned(file):
    state = {"byte": filled((1,), torch.uint8), "x": torch.arange(5.0)}
    file.write_bytes(misalign(safetensors.torch.save(state), 1))
    assert fastsd.load(file, mmap=False)["x"].data_ptr() % 4 == 0


# ---- Metadata, and what fastsd keeps there ----


def test_metadata(file):
    metadata = {"format": "pt", "a": 'ä\n"', "": "x"}
    safetensors.torch.save_file({"x": torch.ones(1)}, file, metadata)
    with fastsd.open(file) as archive, safetensors.safe_open(file, "pt") as other:
        assert archive.metadata == other.metadata() == metadata
        assert (archive.format, archive.is_plain, archive.version) == ("safetensors", True, None)


def test_null_metadata():
    data = build({"__metadata__": None, "x": entry(0, 1)}, b"\1")
    with fastsd.open(io.BytesIO(data)) as archive:
        assert archive.metadata == {}


def test_what_fastsd_adds_comes_back(file):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3)
            self.second.weight = self.first.weight

    state = Tied().state_dict()
    fastsd.save(state, file, format="safetensors", metadata={"mine": "1"})
    loaded = fastsd.load(file)
    assert type(loaded) is OrderedDict
    assert loaded._metadata == state._metadata
    assert sort(loaded).keys() == sort(state).keys()
    assert loaded["first.weight"].data_ptr() == loaded["second.weight"].data_ptr()
    assert set(safetensors.torch.load_file(file)) == {*state} - {"second.weight"}
    assert fastsd.open(file).metadata.get("mine") == "1"
    assert not any(key.startswith("fastsd.") for key in fastsd.open(file).metadata)
    fastsd.load_into(Tied(), file)  # strictly


@pytest.mark.parametrize(
    "tied",
    [
        "[]",
        '{"b": 1}',
        '{"b": "c"}',
        '{"x": "x"}',
        "{",
        '{"b": "x", "b": "x"}',
        "null",
        '{"b":"x"}x',
    ],
)
def test_tied_names_that_cannot_be(tied):
    data = build({"__metadata__": {"fastsd.tied": tied}, "x": entry(0, 1)}, b"\1")
    with pytest.raises(FormatError, match=r"the metadata fastsd\.tied|two tensors are named b"):
        fastsd.load(io.BytesIO(data))
    assert list(safetensors.torch.load(data)) == ["x"]


@pytest.mark.parametrize("metadata", ["[]", "{", "1", '"x"'])
def test_state_metadata_that_cannot_be(metadata):
    data = build({"__metadata__": {"fastsd.state_metadata": metadata}, "x": entry(0, 1)}, b"\1")
    with pytest.raises(FormatError, match="state_metadata"):
        fastsd.load(io.BytesIO(data))


def test_empty_own_metadata():
    own = {"fastsd.tied": "{}", "fastsd.ordered": "1", "fastsd.state_metadata": "{}"}
    loaded = fastsd.load(io.BytesIO(build({"__metadata__": own, "x": entry(0, 1)}, b"\1")))
    assert type(loaded) is OrderedDict
    assert list(loaded) == ["x"]


# ---- In every way to load ----


def test_load_into_is_strict(file):
    model = nn.Linear(3, 4)
    safetensors.torch.save_file(model.state_dict(), file)
    other = nn.Linear(3, 4)
    fastsd.load_into(other, file)
    assert_same(sort(other.state_dict()), sort(model.state_dict()))
    safetensors.torch.save_file({"weight": model.weight, "more": torch.ones(1)}, file)
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*bias.*Unexpected key.*more"):
        fastsd.load_into(other, file)
    result = fastsd.load_into(other, file, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["bias"], ["more"])


def test_names_and_places(file):
    state = {"m.a": torch.ones(2), "m.b": torch.zeros(3), "n": torch.ones(1)}
    safetensors.torch.save_file(state, file)
    assert_same(sort(fastsd.load(file, prefix="m.")), {"a": torch.ones(2), "b": torch.zeros(3)})
    assert set(fastsd.load(file, select="*a", rename={"m.": ""})) == {"a"}
    assert fastsd.load(file, map_location="meta")["n"].device.type == "meta"
    assert_same(sort(fastsd.load(file, map_location=lambda s, _: s.clone())), state)


@pytest.mark.parametrize("weights_only", [True, False, None])
def test_there_is_nothing_to_unpickle(weights_only, file):
    safetensors.torch.save_file({"x": torch.ones(2)}, file)
    assert_same(fastsd.load(file, weights_only=weights_only), {"x": torch.ones(2)})
    assert fastsd.get_unsafe_globals_in_checkpoint(file) == []


def test_what_cannot_be_checked_is_said(file):
    safetensors.torch.save_file({"x": torch.ones(2)}, file)
    with pytest.raises(fastsd.ChecksumError, match="nothing to check"):
        fastsd.load(file, verify="checksums")
    assert fastsd.open(file).verify().unchecked == ("x",)


def test_slices_read_what_they_need(file):
    # Where the rest of the file has been cut off since it was opened, reading it would fail.
    data = safetensors.torch.save({"x": torch.arange(3000.0).view(30, 100)})
    file.write_bytes(data)
    with fastsd.open(file, mmap=False) as archive, safetensors.safe_open(file, "pt") as other:
        wanted = other.get_slice("x")
        mine = archive.get_slice("x")
        for index in (3, slice(2, 5), (slice(1, 9, 2), slice(3, 7)), (..., 4), (2, 3)):
            assert torch.equal(mine[index], torch.arange(3000.0).view(30, 100)[index])
        assert torch.equal(mine[2:5, 3:7], wanted[2:5, 3:7])
        with file.open("r+b") as f:
            f.truncate(len(data) - 20 * 400)
        assert torch.equal(mine[5:10], torch.arange(500.0, 1000.0).view(5, 100))
        with pytest.raises(TruncatedError):
            mine[5:11]


# ---- What safetensors refuses ----

X = entry(0, 1)
BAD = {
    "a hole": ({"a": entry(0, 1), "b": entry(2, 3)}, 3, FormatError, "tensor `b`.*hole behind 1"),
    "a hole at the start": ({"a": entry(1, 2)}, 2, FormatError, "hole behind 0"),
    "an overlap": ({"a": entry(0, 2), "b": entry(1, 3)}, 3, FormatError, "in use up to 2"),
    "the same bytes twice": ({"a": X, "b": X}, 1, FormatError, "in use up to 1"),
    "less data": ({"a": entry(0, 4)}, 3, TruncatedError, "3 behind its header.*accounts for 4"),
    "more data": ({"a": entry(0, 4)}, 5, FormatError, "5 behind its header.*accounts for 4"),
    "backwards": ({"a": entry(1, 0, shape=[0])}, 1, FormatError, "`a` needs 0 bytes"),
    "another size": ({"a": entry(0, 4, shape=[5])}, 4, FormatError, "needs 5 bytes"),
    "another size of items": ({"a": entry(0, 4, "F32", [4])}, 4, FormatError, "needs 16 bytes"),
    "a dtype of the future": ({"a": entry(0, 1, "F1")}, 1, VersionError, "F1, unknown"),
    "elements beyond counting": (
        {"a": entry(0, 0, shape=[2**62, 2**62])},
        0,
        FormatError,
        "63 bits can count",
    ),
    "elements beyond counting, none of them there": (
        {"a": entry(0, 0, shape=[0, 2**62, 2**62])},
        0,
        FormatError,
        "63 bits can count",
    ),
    "bytes beyond counting": (
        {"a": entry(0, 0, "F64", [2**61])},
        0,
        FormatError,
        "63 bits can count",
    ),
    "a large size": ({"a": entry(0, 0, shape=[2**63])}, 0, FormatError, "size is too large"),
    "too many dimensions": ({"a": entry(0, 1, shape=[1] * 65)}, 1, LimitError, "64 dimensions"),
}
BAD_TEXTS = {
    "a name twice": (b'{"a":%s,"a":%s}', "two tensors are named a"),
    "the same name twice, escaped": (b'{"a":%s,"\\u0061":%s}', "two tensors are named a"),
    "NaN": (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', "whole number"),
    "NaN as an offset": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,NaN]}}',
        "whole number",
    ),
    "a negative size": (b'{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}', "whole number"),
    "a negative offset": (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[-1,0]}}', "whole numb"),
    "a float": (b'{"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}', "whole number"),
    "a float with an exponent": (
        b'{"a":{"dtype":"U8","shape":[1e0],"data_offsets":[0,1]}}',
        "whole",
    ),
    "a number of many digits": (
        b'{"a":{"dtype":"U8","shape":[1' + b"0" * 99 + b'],"data_offsets":[0,1]}}',
        "64 bits",
    ),
    "a text as a size": (
        b'{"a":{"dtype":"U8","shape":["1"],"data_offsets":[0,1]}}',
        "whole number",
    ),
    "three offsets": (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,2]}}', "two data_offs"),
    "one offset": (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}}', "two data_offsets"),
    "no dtype": (b'{"a":{"shape":[1],"data_offsets":[0,1]}}', "expected dtype"),
    "no shape": (b'{"a":{"dtype":"U8","data_offsets":[0,1]}}', "expected dtype, shape"),
    "no offsets": (b'{"a":{"dtype":"U8","shape":[1]}}', "data_offsets"),
    "a dtype twice": (
        b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        "twice",
    ),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', "twice"),
    "metadata that are no texts": (b'{"__metadata__":{"a":1}}', "expected a string"),
    "metadata with a name twice": (b'{"__metadata__":{"a":"1","a":"2"}}', "a name occurs twice"),
    "metadata that is a list": (b'{"__metadata__":[]}', "object"),
    "a list": (b"[]", None),
    "no end": (b'{"a":', None),
    "a trailing comma": (b"{,}", None),
    "something behind": (b"{}x", "nothing more"),
    "a zero byte behind": (b"{}\0", "nothing more"),
    "no UTF-8": (b'{"\xff":%s}', "not UTF-8"),
    "half a character": (b'{"\\ud800":%s}', "half a character"),
    "a control character": (b'{"\n":%s}', "end of the string"),
}


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("name", BAD)
def test_headers_that_cannot_be(name, mmap, file):
    header, nbytes, kind, message = BAD[name]
    file.write_bytes(build(header, bytes(nbytes)))
    with pytest.raises(kind, match=message) as caught:
        fastsd.load(file, mmap=mmap)
    assert str(file) in str(caught.value)
    with pytest.raises(kind, match=message):
        fastsd.load(io.BytesIO(file.read_bytes()))
    if name not in ("too many dimensions", "elements beyond counting, none of them there"):
        with pytest.raises(safetensors.SafetensorError):
            safetensors.torch.load_file(file)


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_texts_that_cannot_be(name, file):
    text, message = BAD_TEXTS[name]
    file.write_bytes(build(text.replace(b"%s", json.dumps(X).encode()), bytes(1)))
    with pytest.raises(FormatError, match=message) as caught:
        fastsd.load(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("length", [2**60, 2**63, 2**64 - 1, 100_000_001, 2**48])
def test_a_header_that_claims_to_be_huge(length, file):
    file.write_bytes(build({"x": X}, b"\1", length=length))
    with pytest.raises(FormatError) as caught:
        fastsd.load(file)
    assert str(file) in str(caught.value)
    if length < 2**48:
        assert isinstance(caught.value, LimitError)
        assert "100000000" in str(caught.value)


def test_a_header_that_is_huge(file):
    with file.open("wb") as f:
        f.write(struct.pack("<Q", 100_000_000) + b'{"__metadata__":{}}')
        f.seek(8 + 100_000_000 - 1)
        f.write(b" ")
    with pytest.raises(FormatError, match="byte 27"):
        fastsd.load(file)


@pytest.mark.parametrize("opening", [b"[", b'{"":', b'[{"":'])
def test_deep_nesting_ends(opening, file):
    for depth in (90, 1000, 1_000_000):
        text = b'{"a":{"more":' + opening * depth
        file.write_bytes(build(text))
        with pytest.raises(FormatError, match="nested too deeply" if depth > 100 else None):
            fastsd.load(file)


def test_names_of_any_length_end(file):
    file.write_bytes(build({"a" * 70_000: X}, b"\1"))
    with pytest.raises(LimitError, match="70000 bytes, more than the limit of 65536"):
        fastsd.load(file)


def test_many_names_that_are_the_same_are_found_quickly(file):
    text = b"{" + b",".join(b'"a":%s' % json.dumps(entry(0, 0)).encode() for _ in range(50_000))
    file.write_bytes(build(text + b"}"))
    with pytest.raises(FormatError, match="two tensors are named a"):
        fastsd.load(file)


@given(st.data())
def test_damaged_headers_are_refused_or_read_as_safetensors_does(data):
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.int8)}
    whole = bytearray(safetensors.torch.save(state, {"k": "v"}))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(8, len(whole) - 1))
        whole[at] = data.draw(st.sampled_from(b'"{}[],:0123456789aUF\\ue.-+ \0\xff'))
    whole = bytes(whole)
    try:
        wanted = safetensors.torch.load(whole)
    except Exception:
        wanted = None
    try:
        found = fastsd.load(io.BytesIO(whole))
    except fastsd.FastsdError:
        return
    assert wanted is not None
    assert_same(sort(found), sort(wanted))


def test_numpy_reads_the_same(file):
    import safetensors.numpy

    safetensors.numpy.save_file({"x": np.arange(6).reshape(2, 3)}, file)
    assert fastsd.load(file)["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
