"""What `save` puts into a file, and what it refuses: tensors and flat dictionaries of them."""

import io
import os
import subprocess
import sys
import threading
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from same import (
    PLAIN_DTYPES,
    assert_same,
    filled,
    raw,
    shares_storage,
    small_state,
    through_memory,
    through_torch,
)
from torch import nn

import fastsd


def data_of(written):
    """The bytes of a file after its header."""
    return written[int.from_bytes(written[16:24], "little") :]


def data_bytes(path):
    return len(data_of(path.read_bytes()))


# ---- Dictionaries ----


def test_a_flat_dictionary_comes_back(round_trip):
    state = dict(small_state())
    assert_same(round_trip(state), state)


def test_save_returns_none_and_makes_one_file(path, tmp_path):
    assert fastsd.save(small_state(), path) is None
    assert list(tmp_path.iterdir()) == [path]


def test_keys_keep_their_order(round_trip):
    names = [f"layer.{i * 7919 % 1000}" for i in range(1000)]
    assert list(round_trip({name: torch.zeros(1) for name in names})) == names


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_an_empty_dictionary(kind, round_trip):
    assert_same(round_trip(kind()), kind())


@pytest.mark.parametrize(
    "name", ["", " ", "a.b", "a/b\\c", "\n\0", "ключ", "🔑", "$tensor", "\ud800"]
)
def test_any_string_is_a_name(name, round_trip):
    state = {"first": torch.zeros(2), name: torch.ones(2)}
    assert_same(round_trip(state), state)


def test_the_longest_name(round_trip):
    state = {"n" * 65536: torch.ones(1)}
    assert_same(round_trip(state), state)
    longer = {"n" * 65537: torch.ones(1), "ü" * 40000: torch.zeros(1)}
    assert_same(round_trip(longer), longer)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(3, 2),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Embedding(5, 6)),
        lambda: nn.TransformerEncoderLayer(8, 2, 16),
        lambda: nn.LSTM(3, 5, num_layers=2),
    ],
    ids=["linear", "sequential", "transformer", "lstm"],
)
def test_a_state_dict_keeps_its_metadata(make, round_trip):
    state = make().state_dict()
    assert type(state._metadata) is OrderedDict
    assert_same(round_trip(state), state)


def test_attributes_of_an_ordered_dict(round_trip):
    state = small_state()
    state._metadata = OrderedDict({"": {"version": 1, "extra": (None, 2.5)}})
    state.note = {"run": 17}
    assert_same(round_trip(state), state)


def test_a_tensor_alone(round_trip):
    tensor = torch.arange(5)
    assert_same(round_trip(tensor), tensor)


def test_many_tensors(round_trip):
    state = {f"t{i}": torch.full((i % 7,), i) for i in range(3000)}
    assert_same(round_trip(state), state)


# ---- Sharing ----


def test_tied_tensors_are_stored_once_and_tied_again(path):
    weight = torch.rand(300, 300)
    fastsd.save({"encoder": weight, "other": torch.rand(10), "decoder": weight}, path)
    assert data_bytes(path) < 1.1 * weight.nbytes
    loaded = fastsd.load(path)
    assert loaded["encoder"] is loaded["decoder"]
    assert raw(loaded["encoder"]) == raw(weight)


def test_views_of_one_storage_are_stored_once_and_share_it_again(path):
    base = torch.arange(10_000, dtype=torch.float32)
    state = {
        "end": base[9_000:],
        "whole": base,
        "steps": base[7::13],
        "table": base.view(100, 100).t(),
        "bytes": base.view(torch.uint8)[2:-2],
        "detached": base.detach(),
        "none": base[5:5],
    }
    fastsd.save(state, path)
    assert data_bytes(path) < 1.1 * base.nbytes
    loaded = fastsd.load(path)
    assert_same(loaded, state)
    sharing = [value for name, value in loaded.items() if name != "none"]
    assert shares_storage(*sharing)
    loaded["whole"].fill_(3)
    assert all(
        (value == 3).all() for name, value in loaded.items() if name not in ("none", "bytes")
    )


def test_views_that_only_touch_are_stored_apart(round_trip):
    base = torch.arange(1000)
    loaded = round_trip({"low": base[:400], "high": base[400:]})
    assert_same(loaded, {"low": base[:400], "high": base[400:]})
    assert not shares_storage(*loaded.values())
    assert [value.untyped_storage().nbytes() for value in loaded.values()] == [3200, 4800]


def test_views_that_interleave_share_a_storage(path):
    table = torch.rand(100, 30)
    parts = dict(zip("qkv", table.chunk(3, dim=1), strict=True))
    fastsd.save(parts, path)
    assert data_bytes(path) < 1.1 * table.nbytes
    loaded = fastsd.load(path)
    assert_same(loaded, parts)
    assert shares_storage(*loaded.values())


def test_the_same_parameter_twice_is_one_parameter(round_trip):
    model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "decoder": nn.Linear(4, 4)})
    model["decoder"].weight = model["encoder"].weight
    state = model.state_dict(keep_vars=True)
    loaded = round_trip(state)
    assert_same(loaded, state)
    assert loaded["encoder.weight"] is loaded["decoder.weight"]


@pytest.mark.parametrize("empty", [torch.empty(0), torch.empty(2, 2, device="meta")])
def test_the_same_tensor_without_bytes_twice_is_one_tensor(empty, round_trip):
    loaded = round_trip({"a": empty, "b": empty, "c": empty.clone()})
    assert loaded["a"] is loaded["b"]
    assert loaded["a"] is not loaded["c"]


def test_tensors_and_numpy_arrays_over_the_same_memory(round_trip):
    array = np.arange(6.0)
    state = {"array": array, "tensor": torch.from_numpy(array), "again": array}
    loaded = round_trip(state)
    assert_same(loaded, state)
    loaded["tensor"][0] = 9
    assert loaded["array"][0] == 9


def test_the_storages_of_loaded_tensors_have_the_right_size(round_trip):
    big = torch.rand(100, 100)
    loaded = round_trip({"row": big[3], "column": big[:, 3], "item": big[3, 3], "none": big[:0]})
    sizes = {name: value.untyped_storage().nbytes() for name, value in loaded.items()}
    # Row, column and item overlap: from big[0, 3] to big[99, 3]. An empty tensor needs nothing.
    assert sizes == dict.fromkeys(["row", "column", "item"], (99 * 100 + 1) * 4) | {"none": 0}


# ---- Strides and shapes ----

BASE = torch.arange(2 * 3 * 4 * 5, dtype=torch.int32).reshape(2, 3, 4, 5)
VIEWS = {
    "contiguous": BASE,
    "transposed": BASE.transpose(1, 3),
    "permuted": BASE.permute(3, 0, 2, 1),
    "stepped": BASE[:, ::2, 1::2, ::3],
    "narrowed": BASE[1:, 1:2, 2:],
    "expanded": torch.arange(3).expand(4, 3),
    "expanded in the middle": torch.rand(2, 1, 3).expand(2, 5, 3),
    "expanded from one": torch.tensor(1.5).expand(1000, 1000),
    "channels last": BASE.to(memory_format=torch.channels_last),
    "channels last 3d": torch.rand(1, 2, 3, 2, 2).to(memory_format=torch.channels_last_3d),
    "unfolded": torch.arange(10).unfold(0, 4, 1),
    "overlapping": torch.arange(20).as_strided((5, 4, 3), (2, 3, 1)),
    "offset": torch.arange(20).as_strided((2, 2), (7, 2), 5),
    "diagonal": torch.rand(5, 5).diagonal(),
    "flipped": torch.arange(5).flip(0),
    "0-dim": torch.tensor(3.5),
    "0-dim view": BASE[1, 2, 3, 4],
    "size 1, odd strides": torch.empty_strided((1, 3, 1), (100, 1, 17)).zero_(),
    "zero-size": torch.empty(0),
    "zero-size in the middle": torch.empty(3, 0, 2),
    "zero-size, odd strides": torch.empty_strided((0, 3), (7, 5)),
    "zero-size view": BASE[:, 2:2],
    "64 dimensions": torch.ones([1] * 62 + [2, 3]),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_shape_and_stride(view, round_trip):
    assert_same(round_trip({"view": view}), {"view": view})


def test_expanded_tensors_are_not_blown_up(path):
    fastsd.save({"one": torch.tensor(1.5).expand(5000, 5000)}, path)
    assert data_bytes(path) <= 256


def test_more_than_64_dimensions_are_refused(path):
    with pytest.raises(fastsd.UnsupportedError, match='"deep" has more than 64 dimensions'):
        fastsd.save({"deep": torch.ones([1] * 65)}, path)


@st.composite
def random_views(draw):
    """Tensors of several dtypes that lie across one run of bytes in all ways torch knows."""
    base = torch.full((512,), 0xFF, dtype=torch.uint8)
    begin = draw(st.integers(0, 7)) * 16
    views = {}
    for i in range(draw(st.integers(1, 6))):
        typed = base[begin:].view(
            draw(st.sampled_from([torch.uint8, torch.int16, torch.complex128]))
        )
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        stride = draw(st.lists(st.integers(0, 9), min_size=len(shape), max_size=len(shape)))
        last = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if all(shape) else 0
        room = typed.numel() - 1 - last
        if room < 0:
            continue
        offset = typed.storage_offset() + draw(st.integers(0, room))
        views[f"v{i}"] = typed.as_strided(shape, stride, offset)
    return views


@given(random_views())
def test_random_views_come_back_and_each_reachable_byte_is_stored_once(views):
    file = io.BytesIO()
    fastsd.save(views, file)
    reachable = set()
    for view in views.values():
        size = view.itemsize
        places = torch.arange(512).as_strided(view.shape, view.stride(), view.storage_offset())
        reachable.update(at * size + i for at in places.flatten().tolist() for i in range(size))
    data = data_of(file.getvalue())
    assert data.count(b"\xff") == len(reachable)
    assert data.count(b"\0") == len(data) - len(reachable)
    file.seek(0)
    assert_same(fastsd.load(file), views)


# ---- Dtypes and what else a tensor has ----


@pytest.mark.parametrize("dtype", PLAIN_DTYPES, ids=str)
def test_every_dtype(dtype, round_trip):
    tensor = filled((4, 6), dtype)
    state = {
        "plain": tensor,
        "view": tensor[1:, ::2].t(),
        "0-dim": filled((), dtype, seed=1),
        "zero-size": torch.empty(2, 0, dtype=dtype),
        "apart": filled((3,), dtype, seed=2),
    }
    assert_same(round_trip(state), state)


Z = torch.tensor([1 + 2j, -3 - 0j, complex("nan")])
LAZY = {
    "conj": Z.conj(),
    "conj of a view": Z[::2].conj(),
    "neg": Z.conj().imag,
    "conj and neg": torch._neg_view(Z.conj()),
    "real neg": torch._neg_view(torch.tensor([1.0, -0.0])),
    "integer neg": torch._neg_view(torch.tensor([1, 2])),
    "0-dim": Z[0].conj(),
    "zero-size": Z[:0].conj(),
}


@pytest.mark.parametrize("tensor", LAZY.values(), ids=LAZY)
def test_conjugate_and_negative_bits(tensor, round_trip):
    loaded = round_trip({"lazy": tensor, "plain": torch.ones(2)})["lazy"]
    assert_same(loaded, tensor)
    assert raw(loaded.resolve_conj().resolve_neg()) == raw(tensor.resolve_conj().resolve_neg())


def test_a_conjugate_shares_memory_with_its_original(round_trip):
    loaded = round_trip({"z": Z, "conj": Z.conj()})
    assert_same(loaded, {"z": Z, "conj": Z.conj()})
    assert shares_storage(*loaded.values())


def test_parameters_and_requires_grad(round_trip):
    leaf = torch.rand(3, requires_grad=True)
    state = {
        "parameter": nn.Parameter(torch.rand(3)),
        "frozen": nn.Parameter(torch.rand(3), requires_grad=False),
        "integers": nn.Parameter(torch.arange(3), requires_grad=False),
        "leaf": leaf,
        "result": leaf * 2,
        "complex": nn.Parameter(torch.rand(2, dtype=torch.complex64)),
        "strided": nn.Parameter(torch.rand(3, 4).t()),
        "plain": torch.rand(3),
    }
    loaded = round_trip(state)
    assert_same(loaded, state)
    assert_same(loaded, through_torch(state))
    assert all(value.is_leaf and value.grad is None for value in loaded.values())


def test_loaded_parameters_can_be_trained(round_trip):
    loaded = round_trip({"w": nn.Parameter(torch.ones(3))})["w"]
    loaded.square().sum().backward()
    assert loaded.grad.tolist() == [2.0] * 3


def test_meta_tensors_have_a_shape_and_no_bytes(path):
    state = {
        "meta": torch.empty(1000, 1000, device="meta"),
        "strided": torch.empty(4, 5, device="meta", dtype=torch.int8).t(),
        "parameter": nn.Parameter(torch.empty(3, device="meta")),
        "zero-size": torch.empty(0, 4, device="meta"),
        "real": torch.ones(3),
    }
    fastsd.save(state, path)
    assert data_bytes(path) <= 256
    assert_same(fastsd.load(path), state)
    assert_same(fastsd.load(path), through_torch(state))


def test_attributes_of_tensors(round_trip):
    tensor, parameter = torch.rand(2), nn.Parameter(torch.rand(2))
    tensor.note = {"scale": 0.5, "other": torch.ones(1)}
    parameter.tags = ["a", (1, 2)]
    state = {"tensor": tensor, "parameter": parameter, "again": tensor}
    loaded = round_trip(state)
    assert_same(loaded, state)
    assert_same(loaded, through_torch(state))


def test_buffers_stay_buffers(round_trip):
    state = {"buffer": nn.Buffer(torch.rand(2), persistent=False)}
    loaded = round_trip(state)
    assert isinstance(loaded["buffer"], nn.Buffer)
    assert_same(loaded, through_torch(state))


# ---- Only what tensors can reach ----

UNREACHED = {
    "before and after": lambda base: [base[1000:1010]],
    "between rows": lambda base: [base[:4096].view(64, 64)[:, :40]],
    "between steps": lambda base: [base[::9]],
    "between items": lambda base: [base.view(torch.int32)[::3]],
    "between two views": lambda base: [base[:100:50], base[75:8000:4000]],
    "in a gap of overlapping views": lambda base: [base[0:64:63], base[10:30]],
    "around a single item": lambda base: [base[5]],
    "before a view of wider items": lambda base: [base[9:11], base[8:16].view(torch.float64)],
    "of an empty view": lambda base: [base[100:100]],
    "array steps": lambda base: [base.numpy()[::5]],
    "array backwards": lambda base: [base.numpy()[::-5]],
    "array field": lambda base: [base.numpy().view("u1, 7V")["f0"]],
}


@pytest.mark.parametrize("writing", ["file", "durable", "stream"])
@pytest.mark.parametrize("take", UNREACHED.values(), ids=UNREACHED)
def test_bytes_that_no_tensor_reaches_stay_private(take, writing, path):
    base = torch.full((1 << 16,), 0xFF, dtype=torch.uint8)
    views = take(base)
    for view in views:
        view[...] = 0  # what is left of the other bytes would be seen
    if writing == "stream":
        with open(path, "wb") as file:
            fastsd.save(views, file)
    else:
        fastsd.save(views, path, durable=writing == "durable")
    assert not any(data_of(path.read_bytes()))
    assert_same([np.asarray(v) for v in fastsd.load(path)], [np.asarray(v) for v in views])


def test_a_small_view_of_a_big_tensor_makes_a_small_file(path):
    big = torch.zeros(10_000_000)
    fastsd.save({"head": big[:10]}, path)
    assert path.stat().st_size <= 8192
    assert fastsd.load(path)["head"].untyped_storage().nbytes() == 40


# ---- Options ----


def test_metadata_are_strings(path):
    metadata = {"format": "pt", "": "", "ключ": "значение\n", "json": '{"a": [1]}'}
    fastsd.save(small_state(), path, metadata=metadata)
    with fastsd.open(path) as archive:
        assert archive.metadata == metadata
        assert list(archive.metadata) == list(metadata)
    assert_same(fastsd.load(path), small_state())


@pytest.mark.parametrize("metadata", [{"a": 1}, {1: "a"}, {"a": None}, {"a": b"b"}])
def test_other_metadata_is_refused(metadata, path):
    with pytest.raises(TypeError, match="strings to strings"):
        fastsd.save({}, path, metadata=metadata)
    assert not path.exists()


def test_checksums_can_be_left_out(path):
    fastsd.save(small_state(), path, checksum=False)
    assert_same(fastsd.load(path), small_state())
    with fastsd.open(path) as archive:
        assert all(archive.info(name).crc32c is None for name in archive)


def test_recorded_checksums_are_those_of_the_bytes(path):
    state = small_state()
    fastsd.save(state, path)
    with fastsd.open(path) as archive:
        for name, tensor in state.items():
            if tensor.numel() > 0:
                assert archive.info(name).crc32c == fastsd._core.crc32c(raw(tensor))


def test_arguments_of_torch_save_are_accepted(path):
    import pickle

    fastsd.save(small_state(), path, pickle, 2)
    assert_same(
        fastsd.load(path, "cpu", pickle, weights_only=False, encoding="ascii"), small_state()
    )


def test_an_unknown_format_is_refused(path):
    fastsd.save({}, path, format="fsd")
    with pytest.raises(ValueError, match="'zip'"):
        fastsd.save({}, path, format="zip")


# ---- The same bytes ----


def big_state():
    """Sizes around those at which the writer changes its ways; 46 MB, with gaps, across windows."""
    sizes = [0, 1, 255, 256, 257, 4095, 4097, 65535, 65536, 65537, (8 << 20) - 1, (8 << 20) + 1]
    state = {f"n{n}": filled((n,), torch.uint8, seed=n) for n in sizes}
    state["gaps"] = filled((12 << 20,), torch.uint8)[::3]
    state["rows"] = filled((4096, 4096), torch.uint8, seed=1)[:, :4000]
    return state


def test_the_same_object_gives_the_same_bytes_however_it_is_written(tmp_path):
    state = big_state()
    fastsd.save(state, tmp_path / "first")
    first = (tmp_path / "first").read_bytes()
    fastsd.save(state, tmp_path / "again")
    fastsd.save(state, tmp_path / "durable", durable=True)
    with open(tmp_path / "stream", "wb") as file:
        fastsd.save(state, file)
    assert all((tmp_path / name).read_bytes() == first for name in ("again", "durable", "stream"))
    assert_same(fastsd.load(tmp_path / "first", verify="checksums"), state)
    for file in tmp_path.iterdir():
        file.unlink()  # 190 MB; pytest keeps the folders of three runs


HASHED = """
import sys, fastsd
words = [f"word{i}" for i in range(50)]
shared = tuple(words[:3])
obj = {
    "set": set(words),
    "nested": {(word, frozenset(words[:i])) for i, word in enumerate(words)},
    "shared": {(word, shared) for word in words},
    "keys": {frozenset(words): frozenset(words)},
}
fastsd.save(obj, sys.argv[1])
"""


def test_sets_give_the_same_bytes_in_every_process(tmp_path):
    paths = [tmp_path / seed for seed in "12"]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", HASHED, str(p)], env={**os.environ, "PYTHONHASHSEED": p.name}
        )
        for p in paths
    ]
    assert [run.wait() for run in runs] == [0] * len(runs)
    assert len({p.read_bytes() for p in paths}) == 1


# ---- What is refused ----


class Local:
    """Refuses to be pickled."""

    def __reduce__(self):
        raise TypeError("no")


def error_of(call, *args):
    try:
        call(*args)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


REFUSED = {
    "a function without a name": lambda: lambda: None,
    "a lock": threading.Lock,
    "a generator": lambda: (i for i in range(3)),
    "an object that refuses": Local,
    "a scripted module": lambda: torch.jit.script(nn.Linear(1, 1)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("nesting", ["whole", "flat", "nested", "existing"])
@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_what_torch_cannot_save_is_refused_alike_and_leaves_no_file(make, nesting, path, tmp_path):
    obj = {"good": torch.ones(2), "layer.bad": make()}
    if nesting == "nested":
        obj = {"model": [1, None, 2.5, {"bad": make()}]}
    if nesting == "whole":
        obj = make()
    if nesting == "existing":
        path.write_bytes(b"old")
    expected = error_of(torch.save, obj, io.BytesIO())
    with pytest.raises(type(expected)) as caught:
        fastsd.save(obj, path)
    assert str(caught.value) == str(expected)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"] * (nesting == "existing")


@pytest.mark.parametrize("nbytes", [0, 1, 100, 3996])
@pytest.mark.parametrize("as_parameter", [False, True], ids=["tensor", "parameter"])
def test_a_tensor_whose_storage_was_cut_short_is_refused(nbytes, as_parameter, path):
    tensor = torch.ones(1000)
    value = nn.Parameter(tensor) if as_parameter else tensor
    tensor.untyped_storage().resize_(nbytes)
    with pytest.raises(fastsd.UnsupportedError, match='"cut"'):
        fastsd.save({"whole": torch.ones(2), "cut": value}, path)
    assert not path.exists()


def test_a_view_past_the_end_of_its_storage_is_refused(path):
    base = torch.ones(1000)
    view = base[500:]
    base.untyped_storage().resize_(2000)
    fastsd.save({"fits": base[:500]}, path)
    with pytest.raises(fastsd.UnsupportedError, match='"view"'):
        fastsd.save({"view": view}, path)


def test_a_storage_that_has_grown_is_saved(round_trip):
    tensor = torch.arange(10)
    tensor.untyped_storage().resize_(1 << 20)
    assert_same(round_trip({"t": tensor}), {"t": torch.arange(10)})


def test_saving_does_not_change_the_object(round_trip):
    state = small_state()
    versions = {name: value._version for name, value in state.items()}
    before = {name: raw(value) for name, value in state.items()}
    round_trip(state)
    assert {name: value._version for name, value in state.items()} == versions
    assert {name: raw(value) for name, value in state.items()} == before
    assert_same(through_memory(state), state)
