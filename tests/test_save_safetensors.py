"""save(format="safetensors"): for safetensors itself, numpy and transformers; refusals."""

import io
import json
import os
import struct
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from same import filled, small_state

import fastsd
from fastsd.saving import make_plan

safetensors = pytest.importorskip("safetensors")
from safetensors import numpy as safetensors_numpy  # noqa: E402
from safetensors import torch as safetensors_torch  # noqa: E402

BASE = filled((30, 40), torch.float32)
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    *(
        getattr(torch, name)
        for name in ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")
        if hasattr(torch, name)
    ),
]


def save(obj, **options):
    target = io.BytesIO()
    fastsd.save(obj, target, format="safetensors", **options)
    return target.getvalue()


def read_header(data):
    (header_bytes,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + header_bytes])


def metadata_of(data):
    return read_header(data)["__metadata__"]


def assert_holds(data, wanted):
    """safetensors itself reads these tensors, bit for bit, and no others."""
    found = safetensors_torch.load(data)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(bits(found[name]), bits(tensor)), name


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_by_safetensors(dtype, path):
    state = {
        "a": filled((3, 8), dtype),
        "scalar": filled((), dtype),
        "empty": filled((0, 2), dtype),
    }
    fastsd.save(state, path, format="safetensors")
    found = safetensors_torch.load_file(path)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(bits(found[name]), bits(tensor))


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="a dtype of newer torch")
def test_pairs_of_four_bits_are_as_safetensors_has_them(path):
    state = {"a": torch.arange(12, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).reshape(3, 4)}
    data = save(state)
    path.write_bytes(data)
    assert read_header(data)["a"]["shape"] == [3, 8]
    found = safetensors_torch.load_file(path)["a"]
    assert found.dtype == state["a"].dtype
    assert found.shape == (3, 4)
    assert torch.equal(found.view(torch.uint8), state["a"].view(torch.uint8))


def test_numpy_and_safe_open_read_it(path):
    fastsd.save(small_state(), path, format="safetensors", metadata={"who": "é\n"})
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata()["who"] == "é\n"
        assert file.metadata()["format"] == "pt"
    state = {"a": BASE, "b": filled((5,), torch.int64)}
    arrays = safetensors_numpy.load(save(state))
    assert all(arrays[name].tobytes() == state[name].numpy().tobytes() for name in state)


def test_the_layout_is_that_of_the_format():
    state = {
        "bytes": filled((3,), torch.uint8),
        "wide": filled((2,), torch.float64),
        "half": filled((5,), torch.float16),
        "wide too": filled((1,), torch.int64),
    }
    data = save(state)
    header = read_header(data)
    assert list(header) == ["__metadata__", *state]
    assert struct.unpack("<Q", data[:8])[0] % 8 == 0
    spans = {name: header[name]["data_offsets"] for name in state}
    assert sorted(spans, key=spans.get) == ["wide", "wide too", "half", "bytes"]
    assert [end for _, end in sorted(spans.values())] == [16, 24, 34, 37]
    assert data == save(state)


VIEWS = {
    "transposed": BASE.t(),
    "columns": BASE[:, 3:17],
    "every third": BASE[::3, 1::3],
    "expanded": BASE[:1].expand(7, 40),
    "channels last": filled((2, 3, 4, 5), torch.float32).to(memory_format=torch.channels_last),
    "permuted": filled((4, 5, 6), torch.bfloat16).permute(2, 0, 1),
    "flipped axes of one": filled((1, 9, 1), torch.int8).transpose(0, 2),
    "conjugated": (torch.arange(6.0) * 1j).to(torch.complex64).conj(),
    "negated": (torch.arange(6.0) * 1j).to(torch.complex64).conj().imag,
    "large": filled((1500, 1111), torch.float32).t(),
    "large pieces": filled((2, 3, 700_000), torch.uint8).transpose(0, 1),
}


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("name", VIEWS)
def test_tensors_are_stored_contiguously(name, durable, path):
    state = {"first": filled((3,), torch.uint8), name: VIEWS[name]}
    fastsd.save(state, path, format="safetensors", durable=durable)
    assert_holds(path.read_bytes(), {k: v.resolve_conj().resolve_neg() for k, v in state.items()})
    assert path.read_bytes() == save(state)


def test_durable_files_are_the_same(path):
    state = {str(n): filled((n,), torch.uint8) for n in (100, 0, 9 << 20, 5, 24 << 20, 12345)}
    fastsd.save(state, path, format="safetensors", durable=True)
    assert path.read_bytes() == save(state)
    assert_holds(save(state), state)


@st.composite
def states(draw):
    def tensor():
        dtype = draw(st.sampled_from(DTYPES[:11]))
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
        value = filled(tuple(shape), dtype)
        return value.permute(draw(st.permutations(range(len(shape)))))

    names = draw(st.lists(st.text(max_size=8), unique=True, max_size=8))
    return {name: tensor() for name in names if name != "__metadata__"}


@settings(max_examples=200, deadline=None)
@given(state=states(), metadata=st.dictionaries(st.text(), st.text(), max_size=3))
def test_any_flat_dictionary_is_read_by_safetensors(state, metadata):
    metadata = {f"user.{key}": value for key, value in metadata.items()}
    data = save(state, metadata=metadata)
    assert_holds(data, state)
    assert metadata_of(data) == {"format": "pt", **metadata}


# ---- Tensors that share memory ----


def test_equal_views_are_stored_once():
    column = BASE[:, 2]
    state = {"a": BASE, "b": BASE, "c": BASE[:], "d": column.clone(), "e": torch.nn.Parameter(BASE)}
    state["f"] = state["d"]
    data = save(state)
    assert_holds(data, {"a": state["a"], "d": state["d"]})
    assert json.loads(metadata_of(data)["fastsd.tied"]) == {"b": "a", "c": "a", "e": "a", "f": "d"}


def test_safetensors_loads_tied_models(path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(5, 7, bias=False)
            self.embedding = torch.nn.Embedding(7, 5)
            self.head.weight = self.embedding.weight

    saved, loaded = Tied(), Tied()
    fastsd.save(saved.state_dict(), path, format="safetensors")
    assert safetensors_torch.load_model(loaded, path) == (set(), [])
    assert torch.equal(saved.embedding.weight, loaded.embedding.weight)
    assert loaded.head.weight is loaded.embedding.weight


OVERLAPS = {
    "whole": BASE,
    "part": BASE[3:5],
    "columns": BASE[:, 1:3],
    "other": torch.ones(3),
    "alike": BASE,
}


def test_other_overlaps_are_refused(path):
    with pytest.raises(fastsd.UnsupportedError, match=r"\['whole', 'part', 'columns'\]"):
        fastsd.save(OVERLAPS, path, format="safetensors")
    assert os.listdir(path.parent) == []


def test_other_overlaps_can_be_taken_apart(path):
    plan = make_plan(OVERLAPS, "safetensors", None, lossy=True)
    plan.write(os.fsencode(path), False, True).commit(False)
    stored = {name: tensor for name, tensor in OVERLAPS.items() if name != "alike"}
    assert_holds(path.read_bytes(), stored)


# ---- What the dictionary is ----


def test_what_a_state_dict_is_stands_in_the_metadata():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    state = model.state_dict()
    metadata = metadata_of(save(state))
    assert metadata.keys() == {"format", "fastsd.ordered", "fastsd.state_metadata"}
    assert json.loads(metadata["fastsd.state_metadata"])["1"] == {"version": 2}
    assert metadata_of(save(OrderedDict(a=BASE))) == {"format": "pt", "fastsd.ordered": "true"}
    assert metadata_of(save({})) == {"format": "pt"}
    assert_holds(save(state), state)


# ---- What is refused ----

BAD = {
    "a": {"nested": torch.ones(1)},
    "b": [torch.ones(1)],
    "c": 3,
    "d": np.ones(2),
    "e": torch.eye(3).to_sparse(),
    "f": torch.ones(1, dtype=torch.complex128),
    "g": torch.ones(1, device="meta"),
    "h": torch.empty(1, dtype=torch.bits8),
    5: torch.ones(1),
    "__metadata__": torch.ones(1),
    "\ud800": torch.ones(1),
}
WHY = [
    r"'a' is a nested value, a dict",
    r"'b' is a nested value, a list",
    r"'c' is a int, no tensor",
    r"'d' is a numpy.ndarray, no tensor",
    r"'e' has layout torch.sparse_coo",
    r"'f' has dtype torch.complex128",
    r"'g' is a meta tensor, which has no data",
    r"'h' has dtype torch.bits8",
    r"5 is a key of type int, not str",
    r"'__metadata__' is the key of a file's metadata",
    r"'\ud800' is a key that has no UTF-8",
]


def test_each_item_that_cannot_be_held_is_named(path):
    with pytest.raises(fastsd.UnsupportedError) as caught:
        fastsd.save({**BAD, "good": torch.ones(1)}, path, format="safetensors")
    assert str(caught.value).splitlines()[1:] == [f"  {line}" for line in WHY]
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize(("item", "why"), list(zip(BAD.items(), WHY, strict=True)), ids=WHY)
def test_one_item_that_cannot_be_held_is_named(item, why):
    with pytest.raises(fastsd.UnsupportedError) as caught:
        save(dict([item]))
    assert str(caught.value).splitlines()[1:] == [f"  {why}"]


class Bag(dict):
    pass


def test_what_is_no_plain_dictionary_is_refused():
    with pytest.raises(fastsd.UnsupportedError, match="not a list"):
        save([BASE])
    with pytest.raises(fastsd.UnsupportedError, match=r"not a .*\.Bag"):
        save(Bag(a=BASE))
    state = OrderedDict(a=BASE)
    state.note = "kept nowhere"
    with pytest.raises(fastsd.UnsupportedError, match="note"):
        save(state)
    del state.note
    state._metadata = OrderedDict(a=object())
    with pytest.raises(fastsd.UnsupportedError, match="_metadata"):
        save(state)


@pytest.mark.parametrize("key", ["fastsd.tied", "fastsd.anything", "format"])
def test_reserved_metadata_are_refused(key):
    with pytest.raises(ValueError, match=key):
        save({}, metadata={key: "x"})
    assert metadata_of(save({}, metadata={"format": "pt"})) == {"format": "pt"}


def test_metadata_that_are_no_strings_are_refused():
    with pytest.raises(TypeError, match="strings to strings"):
        save({}, metadata={"a": 1})


def test_headers_that_safetensors_would_refuse_are_refused():
    with pytest.raises(fastsd.LimitError, match="100000000"):
        save({"a": BASE}, metadata={"x": "y" * 100_000_000})
