"""What torch.save writes, read as it is: the same as torch.load reads, in every way to load it."""

import gzip
import io
import os
import threading
import warnings
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mapped import lies_in, mapped_ranges
from same import assert_same, filled, medium_state, raw, small_state
from test_like_torch import (
    LIBRARIES,
    OBJECTS,
    PLAIN,
    STORED,
    SUBCLASSES,
    TENSORS,
    assert_same_outcome,
    attempt,
)
from test_torch_pickle import TORCH_DTYPES, grow, scalars, tensors
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_files import damage, find_record, find_records, save, unzip, zipped

import fastsd
from fastsd import ChecksumError, FormatError, NamesError


def load_both(data, **options):
    """What both libraries make of the bytes of a file; fails unless it is the same."""
    wanted, found = [
        attempt(partial(library.load, io.BytesIO(data), **options))
        for library in LIBRARIES.values()
    ]
    assert_same_outcome(wanted, found)
    if found.error is None and options.get("map_location") is None:
        assert memory_of(found.value) == memory_of(wanted.value)
    return found.value


def walk_tensors(obj, seen=None):
    """The dense tensors of nested plain containers, each once."""
    seen = {} if seen is None else seen
    if id(obj) in seen:
        return
    seen[id(obj)] = obj
    if type(obj) in (torch.Tensor, nn.Parameter):
        if obj.layout == torch.strided and obj.device.type == "cpu" and not obj.is_nested:
            yield obj
    elif isinstance(obj, dict):
        for value in obj.values():
            yield from walk_tensors(value, seen)
    elif isinstance(obj, (list, tuple)):
        for value in obj:
            yield from walk_tensors(value, seen)


def memory_of(obj):
    """Of each tensor: which is the first in the same storage, the storage's bytes, the offset."""
    first = {}
    found = []
    for number, tensor in enumerate(walk_tensors(obj)):
        storage = tensor.untyped_storage()
        same = first.setdefault(storage.data_ptr(), number) if storage.nbytes() else None
        found.append((same, storage.nbytes(), tensor.storage_offset()))
    return found


# ---- Any object ----

EVERYTHING = {**PLAIN, **OBJECTS, **TENSORS, **STORED, **SUBCLASSES}


@pytest.mark.parametrize("weights_only", [None, True, False])
@pytest.mark.parametrize("name", EVERYTHING)
def test_all_that_torch_saves(name, weights_only):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            data = save(EVERYTHING[name]())
        except Exception:
            pytest.skip("torch does not save it")
    load_both(data, weights_only=weights_only)


@given(
    st.recursive(st.one_of(scalars, tensors()), grow, max_leaves=20),
    st.sampled_from([2, 3, 4, 5]),
)
def test_any_tree(tree, protocol):
    load_both(save(tree, pickle_protocol=protocol), weights_only=protocol == 2)


@given(st.dictionaries(st.text(max_size=9), tensors()), st.booleans())
def test_any_state_dict(state, is_ordered):
    load_both(save(OrderedDict(state) if is_ordered else state))


def test_state_dicts_keep_their_metadata():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    loaded = load_both(save(model.state_dict()))
    assert loaded._metadata == model.state_dict()._metadata
    assert type(loaded) is OrderedDict


def test_parameters_and_gradients():
    parameter = nn.Parameter(torch.ones(3))
    state = {"a": parameter, "b": nn.Parameter(torch.ones(2), requires_grad=False)}
    loaded = load_both(save({**state, "c": torch.ones(2, requires_grad=True), "again": parameter}))
    assert [type(loaded[name]) for name in "abc"] == [nn.Parameter, nn.Parameter, torch.Tensor]
    assert [loaded[name].requires_grad for name in "abc"] == [True, False, True]
    assert loaded["a"] is loaded["again"]


def test_whole_storages_are_there():
    big = torch.arange(1000.0)
    loaded = load_both(save({"part": big[:10], "end": big[990:], "none": big[:0]}))
    assert [t.untyped_storage().nbytes() for t in loaded.values()] == [4000] * 3
    loaded["part"].untyped_storage()  # what lies behind it is there, too
    assert torch.equal(torch.as_strided(loaded["part"], (1000,), (1,), 0), big)
    loaded["end"][0] = -1
    assert torch.as_strided(loaded["part"], (1,), (1,), 990) == -1


@pytest.mark.parametrize("mmap", [None, True, False])
def test_views_share_memory(mmap, tmp_path):
    whole = torch.arange(8)
    views = [whole, whole.storage(), whole[3:], whole.view(2, 4).T]
    for kept in (views, [views[0], *views[2:]]):  # with a storage an unpickler has to read it
        path = tmp_path / "x.pth"
        torch.save(kept, path)
        loaded = fastsd.load(path, mmap=mmap)
        assert_same(loaded, torch.load(path))
        loaded[0].fill_(-1)
        assert all((part == -1).all() for part in loaded[-2:])


def test_tensors_of_several_dtypes_over_one_storage():
    data = save([torch.arange(4.0), torch.arange(4, dtype=torch.int32)])
    records = unzip(data)
    stream = records["data.pkl"]
    assert stream.count(b"X\1\0\0\0001") == 1
    records["data.pkl"] = stream.replace(b"X\1\0\0\0001", b"X\1\0\0\0000")
    load_both(zipped(records))


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_every_dtype(dtype):
    load_both(
        save({"a": filled((3, 4), dtype), "0-d": filled((), dtype), "e": filled((0,), dtype)})
    )


# ---- Byte orders ----

OF_WIDE_ITEMS = [dtype for dtype in TORCH_DTYPES if dtype.itemsize > 1]


def swap_storages(data, order=b"big"):
    """The file as a machine with the other byte order would have written it."""
    records = unzip(data)
    state = torch.load(io.BytesIO(data), weights_only=False)
    for number, tensor in enumerate(walk_tensors(state)):
        size = tensor.itemsize // (2 if tensor.is_complex() else 1)
        items = np.frombuffer(records[f"data/{number}"], f"u{size}")
        records[f"data/{number}"] = items.byteswap().tobytes()
    if order is None:
        del records["byteorder"]
    else:
        records["byteorder"] = order
    return zipped(records)


def wide_state():
    return {str(dtype): filled((3, 5), dtype, seed=i) for i, dtype in enumerate(OF_WIDE_ITEMS)}


def torch_knows(dtype):
    """Whether torch itself can turn the bytes of it round."""
    tensor = filled(3, dtype)
    loaded = attempt(partial(torch.load, io.BytesIO(swap_storages(save([tensor]))))).value
    return loaded is not None and raw(loaded[0]) == raw(tensor)


@pytest.mark.parametrize("mmap", [None, True, False])
def test_big_endian_files(mmap, tmp_path):
    state = {name: t for name, t in wide_state().items() if torch_knows(t.dtype)}
    assert len(state) > 8
    path = tmp_path / "big.pth"
    data = swap_storages(save(state))
    path.write_bytes(data)
    assert_same(torch.load(path), state)
    assert_same(fastsd.load(path, mmap=mmap), state)
    assert path.read_bytes() == data
    assert_same(fastsd.load(io.BytesIO(data)), state)
    floats = fastsd.load(path, prefix="torch.", select="float*", mmap=mmap)
    assert len(floats) > 2
    assert all(raw(tensor) == raw(state[f"torch.{name}"]) for name, tensor in floats.items())
    filled_in = {name: tensor.clone() for name, tensor in wide_state().items() if name in state}
    fastsd.load_into(filled_in, path)
    assert_same(filled_in, state)


def test_the_storages_of_a_big_endian_file_are_bytes_until_it_is_loaded(tmp_path):
    path = tmp_path / "big.pth"
    path.write_bytes(swap_storages(save({"x": torch.arange(3, dtype=torch.int16)})))
    with fastsd.open(path) as archive:
        assert not archive.is_plain
        assert [archive[name].dtype for name in archive] == [torch.uint8]
        assert archive["0"].tolist() == [0, 0, 0, 1, 0, 2]


def test_no_byte_order_record():
    records = unzip(save(small_state()))
    del records["byteorder"]
    assert_same(load_both(zipped(records)), small_state())


@pytest.mark.parametrize("order", [b"", b"middle", b"LITTLE", b"big\n", b"\xff" * 20, b"x" * 100])
def test_a_byte_order_that_there_is_not(order, path):
    path.write_bytes(zipped({**unzip(save(small_state())), "byteorder": order}))
    with pytest.raises(FormatError, match="byteorder"):
        fastsd.load(path)


def test_torchs_default_byte_order_holds_for_files_without_one():
    torch.serialization.set_default_load_endianness(torch.serialization.LoadEndianness.BIG)
    try:
        state = {"a": torch.arange(6, dtype=torch.int32), "b": torch.ones(2, dtype=torch.float64)}
        assert_same(load_both(swap_storages(save(state), order=None)), state)
        assert_same(load_both(save(state)), state)
        assert_same(load_both(swap_storages(save(state))), state)
    finally:
        torch.serialization.set_default_load_endianness(None)


# ---- Other writers ----


@pytest.mark.parametrize("folder", ["archive", "x", "моя модель", "a" * 300, "checkpoint.pth.tar"])
def test_the_folder_may_have_any_name(folder):
    assert_same(load_both(zipped(unzip(save(small_state())), folder)), small_state())


@pytest.mark.parametrize("align", [1, 2, 32, 4096])
@pytest.mark.parametrize("mmap", [None, True, False])
def test_storages_may_lie_anywhere(align, mmap, tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(zipped(unzip(save(small_state())), align=align))
    assert_same(fastsd.load(path, mmap=mmap), small_state())
    assert_same(dict(fastsd.open(path, mmap=mmap)), dict(small_state()))


def test_only_what_is_needed_need_be_there():
    records = unzip(save(small_state()))
    kept = {name: data for name, data in records.items() if name.startswith("data")}
    assert_same(fastsd.load(io.BytesIO(zipped(kept))), small_state())


def test_records_in_another_order_and_others_beside_them():
    records = {"extra/notes.txt": b"hi", **dict(reversed(unzip(save(small_state())).items()))}
    assert_same(load_both(zipped(records)), small_state())


def test_what_torch_writes_from_cpp(path):
    writer = torch._C.PyTorchFileWriter(str(path))
    records = unzip(save(small_state()))
    for name, data in records.items():
        if name.startswith("data"):
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    assert_same(fastsd.load(path), small_state())
    assert_same(torch.load(path), small_state())


def test_what_cpp_pickles(path):
    for obj in (
        {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.int8)},
        [torch.ones(2), torch.zeros(3)],
        (torch.ones(2), 3, "x", [1.5]),
        torch.arange(3),
    ):
        data = torch._C._pickle_save(obj)
        for weights_only in (True, False):
            load_both(data, weights_only=weights_only)
        path.write_bytes(data)
        assert_same(fastsd.load(path, weights_only=False), torch._C._pickle_load_obj(data))


@pytest.mark.parametrize("crc", [True, False])
def test_files_without_checksums(crc, path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(crc)
    try:
        torch.save(small_state(), path)
    finally:
        torch.serialization.set_crc32_options(before)
    assert_same(fastsd.load(path), small_state())
    checked = fastsd.open(path).verify()
    assert (checked.checked_nbytes > 0) == crc
    assert bool(checked.unchecked) != crc


# ---- Where to ----


@pytest.mark.parametrize(
    "map_location",
    [
        "cpu",
        "meta",
        torch.device("cpu"),
        torch.device("meta"),
        {"cpu": "meta"},
        {"cuda:0": "cpu"},
        lambda storage, location: storage,
        lambda storage, location: None,
        lambda storage, location: storage.clone(),
        "cuda",
        "nowhere",
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["state_dict", "shared", "views", "attributes"])
def test_map_location(name, map_location):
    load_both(save(EVERYTHING[name]()), map_location=map_location)


def from_device(data, name):
    """The file as it would be had its storages been on another device."""
    records = unzip(data)
    stream = records["data.pkl"]
    old, new = (b"X" + len(n).to_bytes(4, "little") + n for n in (b"cpu", name.encode()))
    assert old in stream
    return zipped({**records, "data.pkl": stream.replace(old, new)})


@pytest.mark.parametrize(
    "map_location", [None, "cpu", {"cuda:0": "cpu"}, lambda s, where: s if "cuda" in where else 1]
)
def test_files_from_other_devices(map_location):
    data = from_device(save(small_state()), "cuda:0")
    if torch.cuda.is_available():
        pytest.skip("the device is there")
    load_both(data, map_location=map_location)
    with fastsd.open(io.BytesIO(data)) as archive:
        assert archive.info("weight").device == "cuda:0"
        assert_same(archive["weight"], small_state()["weight"])


def test_without_data():
    data = save(small_state())
    for mode in (FakeTensorMode, torch.serialization.skip_data):
        results = []
        for library in LIBRARIES.values():
            with mode():
                results.append(library.load(io.BytesIO(data)))
        assert [type(t) for t in results[0].values()] == [type(t) for t in results[1].values()]
        assert [(t.shape, t.device) for t in results[0].values()] == [
            (t.shape, t.device) for t in results[1].values()
        ]


# ---- Mapped or not ----


def test_storages_are_mapped_and_private(tmp_path):
    path = tmp_path / "x.pth"
    state = medium_state()
    torch.save(state, path)
    before = path.read_bytes()
    loaded = fastsd.load(path, mmap=True)
    ranges = mapped_ranges(path)
    assert all(lies_in(t, ranges) for t in loaded.values() if t.numel())
    for tensor in loaded.values():
        tensor.zero_()
    assert path.read_bytes() == before
    assert_same(fastsd.load(path), state)
    path.unlink()
    assert not loaded["large0"].any()


def test_unmapped_tensors_have_memory_of_their_own(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(medium_state(), path)
    loaded = fastsd.load(path, mmap=False)
    assert not mapped_ranges(path)
    assert_same(loaded, medium_state())


@pytest.mark.parametrize("mmap", [None, True, False])
def test_file_objects(mmap, tmp_path):
    path = tmp_path / "x.pth"
    torch.save(small_state(), path)
    data = path.read_bytes()
    with path.open("rb") as file:
        assert_same(fastsd.load(file, mmap=mmap), small_state())
    for offset in (64, 4096, 7):
        path.write_bytes(bytes(offset) + data)
        with path.open("rb") as file:
            file.seek(offset)
            assert_same(fastsd.load(file, mmap=mmap), small_state())
            assert file.tell() == offset + len(data)
    with gzip.open(path, "wb") as file:
        file.write(data)
    with gzip.open(path) as file:
        assert_same(fastsd.load(file, mmap=mmap), small_state())


def test_unseekable_streams(tmp_path):
    data = save(medium_state())
    reading, writing = os.pipe()

    def feed():
        with os.fdopen(writing, "wb") as sink:
            sink.write(data)

    feeder = threading.Thread(target=feed)
    feeder.start()
    with os.fdopen(reading, "rb") as file:
        assert_same(fastsd.load(file), medium_state())
    feeder.join()


class OnlyRead:
    def __init__(self, data):
        self.read = io.BytesIO(data).read


def test_objects_that_only_read():
    assert_same(fastsd.load(OnlyRead(save(small_state()))), small_state())


# ---- Names ----


def test_prefix_select_and_rename(path):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    torch.save({"model": model.state_dict(), "epoch": 3}, path)
    fsd = path.with_suffix(".own")
    fastsd.save({"model": model.state_dict(), "epoch": 3}, fsd)
    for options in (
        {"prefix": "model."},
        {"prefix": "model.0."},
        {"select": "*.weight"},
        {"prefix": "model.", "rename": {"": "module."}},
        {"prefix": "model.", "rename": str.upper, "select": ["0.*", "1.bias"]},
    ):
        found = fastsd.load(path, **options)
        assert found
        assert_same(found, fastsd.load(fsd, **options))
    with pytest.raises(NamesError):
        fastsd.load(path, prefix="nothing.")


@pytest.mark.parametrize(
    "name", ["views", "views beside a sparse tensor", "with attributes and sparse"]
)
def test_names_are_those_of_a_file_of_fastsds(name, path):
    torch.save(EVERYTHING[name](), path)
    fsd = path.with_suffix(".own")
    fastsd.save(EVERYTHING[name](), fsd)
    assert_same(fastsd.load(path, select="*"), fastsd.load(fsd, select="*"))


@pytest.mark.parametrize("mmap", [None, True, False])
def test_load_into(mmap, path):
    model, other = nn.Linear(3, 4), nn.Linear(3, 4)
    torch.save(model.state_dict(), path)
    fastsd.load_into(other, path, mmap=mmap)
    assert_same(other.state_dict(), model.state_dict())
    fastsd.load_into(other, path, mmap=mmap, assign=True)
    assert_same(other.state_dict(), model.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        fastsd.load_into(nn.Linear(2, 4), path)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), path)
    again = torch.optim.Adam(model.parameters())
    fastsd.load_into(again, path, mmap=mmap)
    assert_same(again.state_dict(), optimizer.state_dict())


# ---- Archives ----


@pytest.mark.parametrize("mmap", [None, True, False])
def test_an_archive(mmap, path):
    state = {"model": small_state(), "list": [torch.arange(100.0)[10:]], "epoch": 2}
    torch.save(state, path)
    with fastsd.open(path, mmap=mmap) as archive:
        assert (archive.format, archive.is_plain, archive.version) == ("pth", True, None)
        assert list(archive) == [*(f"model.{name}" for name in small_state()), "list.0"]
        assert_same({n: archive[n] for n in archive}["list.0"], state["list"][0])
        info = archive.info("list.0")
        assert (info.shape, info.dtype, info.nbytes) == ((90,), torch.float32, 360)
        assert (info.storage_offset, info.storage_nbytes, info.crc32c) == (10, 400, None)
        assert path.read_bytes()[info.file_offset :][:400] == torch.arange(100.0).numpy().tobytes()
        assert info.path == str(path)
        assert archive.get_slice("list.0")[5:7].tolist() == [15, 16]
        assert archive.get_slice("model.weight")[1, ::2].tolist() == [4, 6]
        assert archive.verify().checked_nbytes == 400 + sum(
            t.nbytes for t in small_state().values()
        )
        assert archive.metadata == {}


def test_the_names_of_what_an_unpickler_must_load(path):
    torch.save(
        {"a": torch.ones(2), "b": {"c": torch.zeros(3), "sparse": TENSORS["uncoalesced"]()}}, path
    )
    with fastsd.open(path) as archive:
        assert not archive.is_plain
        assert list(archive) == ["a", "b.c"]
        assert torch.equal(archive["b.c"], torch.zeros(3))


# ---- Checksums ----


def test_any_damaged_record_is_found(path):
    data = save(
        {"a": torch.arange(100.0), "b": filled((1 << 20,), torch.uint8), "c": torch.ones(1)}
    )
    for record in find_records(data):
        if not record.name.endswith((".pkl", "byteorder", "/version", *"012")):
            continue  # which is never read
        for at in (0, record.nbytes // 2, record.nbytes - 1):
            path.write_bytes(damage(data, record.begin + at))
            with pytest.raises((ChecksumError, FormatError)) as caught:
                fastsd.load(path, verify="checksums")
            assert str(path) in str(caught.value)
            if "/data/" in record.name:
                assert caught.value.tensors == ("abc"[int(record.name[-1])],)
                fastsd.load(path)  # which does not read it


def test_a_damaged_pickle_is_found_at_once(path):
    data = save(small_state())
    record = find_record(data, "data.pkl")
    for at in range(record.nbytes):
        path.write_bytes(damage(data, record.begin + at))
        with pytest.raises(FormatError, match=r"data\.pkl.*damaged"):
            fastsd.load(path)
