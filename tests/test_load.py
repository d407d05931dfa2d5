"""What `load` gives back: whose memory it is, where it is put, and from what it is read."""

import copy
import gc
import io
import os
import struct
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from mapped import lies_in, mapped_ranges
from same import (
    PLAIN_DTYPES,
    assert_same,
    filled,
    medium_state,
    raw,
    shares_storage,
    small_state,
    through_memory,
    through_torch,
)
from torch import nn

import fastsd
from fastsd import _core

# ---- Whose memory it is ----


@pytest.mark.parametrize("mmap", [None, True])
def test_tensors_are_views_of_the_mapped_file(mmap, round_trip, path):
    loaded = round_trip({**small_state(), "p": nn.Parameter(torch.ones(2))}, mmap=mmap)
    ranges = mapped_ranges(path)
    assert all(lies_in(tensor, ranges) for tensor in loaded.values() if tensor.numel() > 0)


def test_without_mmap_tensors_have_memory_of_their_own(round_trip, path):
    loaded = round_trip(small_state(), mmap=False)
    assert_same(loaded, small_state())
    assert mapped_ranges(path) == []


@pytest.mark.parametrize("mmap", [None, True, False])
@pytest.mark.parametrize("verify", ["structure", "checksums"])
def test_every_way_of_reading_gives_the_same(mmap, verify, round_trip):
    state = medium_state()
    assert_same(round_trip(state, mmap=mmap, verify=verify), state)


@pytest.mark.parametrize("mmap", [True, False])
def test_tensors_can_be_edited_and_the_file_stays_as_it_is(mmap, round_trip, path):
    state = {**small_state(), "shared": torch.ones(5), "view": torch.ones(2)}
    state["view"] = state["shared"][1:3]
    loaded = round_trip(state, mmap=mmap)
    before = path.read_bytes()
    other = fastsd.load(path, mmap=mmap)
    for tensor in loaded.values():
        tensor.fill_(1)
        tensor.zero_()
    assert not any(tensor.any() for tensor in loaded.values())
    assert path.read_bytes() == before
    assert_same(other, state)
    assert_same(fastsd.load(path, mmap=mmap), state)


@pytest.mark.parametrize("mmap", [True, False])
def test_each_tensor_has_a_storage_of_its_own_and_of_its_size(mmap, round_trip):
    state = medium_state()
    loaded = round_trip(state, mmap=mmap)
    storages = [tensor.untyped_storage() for tensor in loaded.values()]
    assert [storage.nbytes() for storage in storages] == [t.nbytes for t in state.values()]
    places = {storage.data_ptr() for storage in storages if storage.nbytes() > 0}
    assert len(places) == sum(storage.nbytes() > 0 for storage in storages)
    assert all(place % 64 == 0 for place in places)


@pytest.mark.parametrize("mmap", [True, False])
def test_shared_storages_have_their_size_too(mmap, round_trip):
    base = torch.arange(100)
    loaded = round_trip({"a": base[10:30], "b": base[20:50]}, mmap=mmap)
    assert shares_storage(*loaded.values())
    assert {tensor.untyped_storage().nbytes() for tensor in loaded.values()} == {40 * 8}


@pytest.mark.parametrize("mmap", [None, True, False])
@pytest.mark.parametrize(
    "change", [os.unlink, lambda path: fastsd.save({"new": torch.ones(3)}, path)]
)
def test_the_file_may_be_deleted_or_replaced_while_tensors_live(change, mmap, round_trip, path):
    state = medium_state()
    loaded = round_trip(state, mmap=mmap)
    change(path)
    assert_same(loaded, state)


def test_the_mapping_lives_as_long_as_any_tensor(round_trip, path):
    loaded = round_trip(small_state())
    last = loaded.popitem(last=False)[1]
    del loaded
    gc.collect()
    assert mapped_ranges(path)
    assert raw(last) == raw(small_state()["weight"])
    del last
    gc.collect()
    assert not mapped_ranges(path)


def test_no_descriptor_stays_open(round_trip, path):
    before = len(os.listdir("/proc/self/fd"))
    kept = [round_trip(small_state(), mmap=mmap) for mmap in (None, True, False)]
    with open(path, "rb") as file:
        kept.append(fastsd.load(file))
    kept.append(fastsd.load(io.BytesIO(path.read_bytes())))
    assert len(os.listdir("/proc/self/fd")) == before


def test_loaded_tensors_are_ordinary_tensors(round_trip, tmp_path):
    loaded = round_trip(dict(small_state()))
    assert_same(copy.deepcopy(loaded), loaded)
    assert_same(through_torch(loaded), loaded)
    assert_same(through_memory(loaded), loaded)
    assert loaded["weight"].numpy().sum() == 66
    shared = loaded["weight"].share_memory_()
    assert shared.is_shared()
    assert raw(shared) == raw(small_state()["weight"])


@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_garbage_collector_stays_as_it_was(is_enabled, round_trip):
    before = gc.isenabled()
    try:
        (gc.enable if is_enabled else gc.disable)()
        round_trip(small_state())
        assert gc.isenabled() == is_enabled
    finally:
        (gc.enable if before else gc.disable)()


@pytest.mark.parametrize("shared", [False, True])
def test_tensors_have_version_counters_of_their_own(shared, round_trip):
    """Or else to change a buffer in place would break backward for unrelated weights."""
    state = {"weight": torch.ones(3), "buffer": torch.zeros(3)}
    if shared:  # then the tensors are made another way
        base = torch.cat([*state.values()])
        state = {"weight": base[:3], "buffer": base[3:], "base": base}
    loaded = round_trip(state)
    weight = loaded["weight"].requires_grad_()
    result = (weight * weight).sum()
    loaded["buffer"].add_(1)
    result.backward()
    assert weight.grad.tolist() == [2.0] * 3


def test_a_module_with_assigned_buffers_can_be_trained(path):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    fastsd.save(model.state_dict(), path)
    model.load_state_dict(fastsd.load(path), assign=True)
    model(torch.rand(4, 3)).sum().backward()  # BatchNorm changes its buffers in forward
    assert all(parameter.grad is not None for parameter in model.parameters())


# ---- State dictionaries ----


@pytest.mark.parametrize("keep", [True, False])
def test_a_batch_norm_without_its_counter_loads_as_with_torch(keep, tmp_path):
    """It passes strict loading only if `_metadata` is gone."""
    state = nn.BatchNorm1d(3).state_dict()
    del state["num_batches_tracked"]
    if not keep:
        del state._metadata
    fastsd.save(state, tmp_path / "fsd")
    torch.save(state, tmp_path / "pt")
    outcomes = []
    for loaded in (fastsd.load(tmp_path / "fsd"), torch.load(tmp_path / "pt")):
        try:
            outcomes.append(str(nn.BatchNorm1d(3).load_state_dict(loaded)))
        except RuntimeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
    assert ("Missing key" in outcomes[0]) == keep


# ---- Where it is put ----


def placed_object():
    base = torch.arange(10.0)
    return {
        "plain": torch.ones(3),
        "views": [base[:6], base[4:]],
        "whole": base,
        "parameter": nn.Parameter(torch.rand(2)),
        "lazy": torch.tensor([1j]).conj(),
        "meta": torch.empty(3, device="meta"),
        "bits": filled((3,), torch.bits8),
        "empty": torch.empty(0, 2),
        "array": np.arange(3),
        "other array": np.array(["a", "bcd"]),
        "device": torch.device("cuda:1"),
    }


LOCATIONS = {
    "None": None,
    "cpu": "cpu",
    "cpu:0": "cpu:0",
    "cpu device": torch.device("cpu"),
    "meta": "meta",
    "meta device": torch.device("meta"),
    "empty dict": {},
    "dict to cpu": {"cuda:0": "cpu"},
    "dict to meta": {"cpu": "meta"},
    "same": lambda storage, location: storage,
    "left to torch": lambda storage, location: None,
    "copy": lambda storage, location: storage.clone(),
    "callable to meta": lambda storage, location: torch.UntypedStorage(
        storage.nbytes(), device="meta"
    ),
    "no device": "nonsense",
    "no device in dict": {"cpu": "nonsense"},
    "cuda": "cuda",
    "last cuda": "cuda:63",
    "error": lambda storage, location: 1 // 0,
}


def outcome(load):
    """What is loaded, or the error instead."""
    try:
        return load()
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("mmap", [None, False])
@pytest.mark.parametrize("location", LOCATIONS.values(), ids=LOCATIONS)
def test_map_location_does_what_it_does_in_torch(location, mmap, path, tmp_path):
    obj = placed_object()
    fastsd.save(obj, path)
    torch.save(obj, tmp_path / "x.pt")
    wanted = outcome(lambda: torch.load(tmp_path / "x.pt", location, weights_only=False))
    found = outcome(lambda: fastsd.load(path, location, mmap=mmap))
    assert_same(found, wanted)
    if isinstance(found, dict) and not found["whole"].is_meta:
        assert shares_storage(found["whole"], *found["views"])


def test_a_callable_map_location_is_asked_once_for_each_storage(path):
    base = torch.arange(10.0)
    obj = {"a": base, "b": base[3:], "c": torch.ones(7), "m": torch.empty(3, device="meta")}
    obj["n"] = np.arange(5)
    calls = {"torch": [], "fastsd": []}

    def ask(name):
        def answer(storage, location):
            calls[name].append((type(storage), storage.nbytes(), storage.device, location))
            return storage

        return answer

    assert_same(through_memory(obj, map_location=ask("fastsd")), obj)
    through_torch(obj, map_location=ask("torch"))
    assert calls["fastsd"] == calls["torch"]


def record_device(path, device):
    """Turns a file saved from the CPU into one saved from another device."""
    data = bytearray(path.read_bytes())
    header_bytes, section_count = struct.unpack_from("<Q12xI", data, 16)
    for i in range(section_count):
        kind, _, offset, nbytes = struct.unpack_from("<IIQQ", data, 48 + 24 * i)
        if kind == 5:
            assert data[offset : offset + nbytes] == b"cpu".ljust(32, b"\0")
            data[offset : offset + 32] = device.encode().ljust(32, b"\0")
    data[12:16] = bytes(4)
    data[12:16] = struct.pack("<I", _core.crc32c(data[:header_bytes]))
    path.write_bytes(data)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_was_saved_from_a_gpu_goes_back_to_one(path):
    state = {"w": torch.ones(3), "p": nn.Parameter(torch.ones(2))}
    fastsd.save(state, path)
    record_device(path, "cuda:0")
    with pytest.raises(RuntimeError, match=r"torch\.cuda\.is_available\(\) is False"):
        fastsd.load(path)
    for location in ("cpu", torch.device("cpu"), {"cuda:0": "cpu"}, lambda storage, where: storage):
        assert_same(fastsd.load(path, location), state)
    assert_same(fastsd.load(path, "meta"), through_torch(state, map_location="meta"))
    with fastsd.open(path) as archive:
        assert archive.info("w").device == "cuda:0"
        assert_same(archive["w"], state["w"])
    target = {"w": torch.zeros(3), "p": torch.zeros(2)}
    fastsd.load_into(target, path)
    assert target["w"].tolist() == [1.0] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_error_for_a_missing_gpu_is_the_one_of_torch(path):
    fastsd.save({"w": torch.ones(3)}, path)
    record_device(path, "cuda:0")
    error = outcome(lambda: fastsd.load(path))
    restore = torch.serialization.default_restore_location
    assert error == outcome(lambda: restore(torch.ones(1).untyped_storage(), "cuda:0"))


def test_an_unknown_device_in_the_file_is_an_error_of_torch(path):
    fastsd.save({"w": torch.ones(3)}, path)
    record_device(path, "abacus:1")
    with pytest.raises(RuntimeError, match="abacus:1"):
        fastsd.load(path)
    assert_same(fastsd.load(path, "cpu"), {"w": torch.ones(3)})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_tensors_of_a_gpu(path):
    base = torch.arange(1000.0, device="cuda:0")
    state = {
        "base": base,
        "view": base[::7],
        "again": base,
        "parameter": nn.Parameter(base.clone()),
        "cpu": torch.ones(3),
    }
    fastsd.save(state, path)
    for location in (None, "cpu", "cuda:0", "meta"):
        loaded = fastsd.load(path, location)
        wanted = through_torch(state, map_location=location)
        assert {k: t.device for k, t in loaded.items()} == {k: t.device for k, t in wanted.items()}
        if location != "meta":
            assert_same(
                {k: t.cpu() for k, t in loaded.items()}, {k: t.cpu() for k, t in wanted.items()}
            )
            assert shares_storage(loaded["base"], loaded["view"])
            assert loaded["base"] is loaded["again"]


# ---- What must not matter ----


@pytest.fixture(params=["device", "default device", "dtype", "no_grad"])
def ambience(request):
    """A setting of torch that torch.load ignores."""
    if request.param == "device":
        with torch.device("meta"):
            yield
    elif request.param == "default device":
        torch.set_default_device("meta")
        yield
        torch.set_default_device(None)
    elif request.param == "dtype":
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)
    else:
        with torch.no_grad():
            yield


OBJECT = placed_object() | {"real": torch.rand(3), "leaf": torch.rand(2, requires_grad=True)}


@pytest.mark.parametrize("mmap", [None, False])
def test_the_ambient_device_dtype_and_grad_mode_are_ignored(mmap, ambience, round_trip, path):
    assert_same(round_trip(OBJECT, mmap=mmap), OBJECT)
    with fastsd.open(path, mmap=mmap) as archive:
        assert_same(archive["leaf"], OBJECT["leaf"])
        assert_same(archive["plain"], OBJECT["plain"])
        assert_same(archive.get_slice("plain")[1:], OBJECT["plain"][1:])


def test_in_inference_mode_tensors_are_what_torch_makes_them(path, tmp_path):
    state = {"plain": torch.ones(3), "parameter": nn.Parameter(torch.ones(2))}
    fastsd.save(state, path)
    torch.save(state, tmp_path / "x.pt")
    with torch.inference_mode():
        found, wanted = fastsd.load(path), torch.load(tmp_path / "x.pt")
        for name, tensor in wanted.items():
            assert found[name].is_inference() == tensor.is_inference()
            assert found[name].requires_grad == tensor.requires_grad
        with fastsd.open(path) as archive:
            assert archive["plain"].tolist() == [1.0] * 3
            assert archive.get_slice("plain")[:2].tolist() == [1.0] * 2
        model = nn.Linear(1, 1)
        fastsd.save(model.state_dict(), path)
        fastsd.load_into(model, path)


@pytest.fixture
def older_torch():
    """As if torch had no DLPack exchange table."""
    arguments = torch.Tensor, torch.uint8, torch.int8, torch.utils.dlpack.from_dlpack
    assert not _core.set_torch(*arguments, None)
    yield
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    assert _core.set_torch(*arguments, exchange) == (exchange is not None)


@pytest.mark.parametrize("mmap", [None, False])
def test_torch_without_the_exchange_table_gives_the_same(mmap, older_torch, round_trip):
    state = {str(dtype): filled((2, 3), dtype) for dtype in PLAIN_DTYPES}
    state |= {f"{dtype} view": filled((4, 4), dtype)[1:, ::2].t() for dtype in PLAIN_DTYPES}
    state |= {f"{dtype} empty": torch.empty(2, 0, dtype=dtype) for dtype in PLAIN_DTYPES}
    assert_same(round_trip(state, mmap=mmap), state)


def test_torch_without_the_exchange_table_writes_the_same_bytes(path, tmp_path):
    obj = placed_object() | medium_state()
    fastsd.save(obj, path)
    _core.set_torch(torch.Tensor, torch.uint8, torch.int8, torch.utils.dlpack.from_dlpack, None)
    try:
        fastsd.save(obj, tmp_path / "older.fsd")
        assert_same(fastsd.load(path), obj)
    finally:
        exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
        _core.set_torch(
            torch.Tensor, torch.uint8, torch.int8, torch.utils.dlpack.from_dlpack, exchange
        )
    assert path.read_bytes() == (tmp_path / "older.fsd").read_bytes()


def test_the_ambience_does_not_matter_without_the_exchange_table(older_torch, ambience, round_trip):
    assert_same(round_trip(OBJECT), OBJECT)
    assert_same(round_trip({"plain": OBJECT["plain"]}), {"plain": OBJECT["plain"]})


# ---- File systems ----


def test_local_file_systems_are_mapped(path):
    fastsd.save(small_state(), path)
    name, maps_well = _core.file_system(str(path))
    assert name
    with fastsd.open(path) as archive:
        assert archive.is_mapped == maps_well


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no tmpfs")
def test_memory_file_systems_are_mapped():
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        assert _core.file_system(file.name) == ("tmpfs", True)


# Answers for the system what an environment variable says, where it says anything.
FAKE_FSTATFS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/vfs.h>

int fstatfs(int fd, struct statfs *status) {
  int (*real)(int, struct statfs *) = (int (*)(int, struct statfs *))dlsym(RTLD_NEXT, "fstatfs");
  int result = real(fd, status);
  const char *type = getenv("FAKE_FILE_SYSTEM");
  if (type != NULL) status->f_type = (long)strtoul(type, NULL, 16);
  return result;
}
"""
FAKED = """
import os, sys, fastsd
path = sys.argv[1]
for name in "6969 517b ff534d42 fe534d42 0bd00bd0 65735546 01021997 ef53 58465342 01021994".split():
    os.environ["FAKE_FILE_SYSTEM"] = name
    with fastsd.open(path) as archive, fastsd.open(path, mmap=True) as mapped:
        fastsd.load(path)["weight"].add_(1)
        fastsd.save(fastsd.load(path), path)
        print(*fastsd._core.file_system(path), archive.is_mapped, mapped.is_mapped)
"""


def test_network_file_systems_are_read_unless_mapping_is_asked_for(path, preload):
    fastsd.save(small_state(), path)
    run = subprocess.run(
        [sys.executable, "-c", FAKED, str(path)],
        env=preload(FAKE_FSTATFS),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = [line.split() for line in run.stdout.splitlines()]
    read, mapped = ["False", "False", "True"], ["True", "True", "True"]
    names = ["nfs", "smb", "cifs", "smb2", "lustre", "fuse", "9p"]
    assert found[:7] == [[name, *read] for name in names]
    assert found[7:] == [[name, *mapped] for name in ("ext", "xfs", "tmpfs")]


# ---- Paths ----


@pytest.mark.parametrize("kind", [str, os.fsencode, lambda path: path, os.path.relpath])
def test_all_kinds_of_path(kind, path):
    fastsd.save(small_state(), kind(path))
    assert_same(fastsd.load(kind(path)), small_state())
    with fastsd.open(kind(path)) as archive:
        assert len(archive) == len(small_state())


@pytest.mark.parametrize("name", [b"caf\xe9", "ключ".encode(), b"a b\n", b"x" * 255])
def test_all_kinds_of_file_name(name, tmp_path):
    path = os.path.join(os.fsencode(tmp_path), name)
    fastsd.save(small_state(), path)
    assert os.listdir(os.fsencode(tmp_path)) == [name]
    assert_same(fastsd.load(path), small_state())
    assert_same(fastsd.load(os.fsdecode(path)), small_state())
    os.truncate(path, 100)
    with pytest.raises(fastsd.FormatError) as caught:
        fastsd.load(path)
    assert caught.value.path == os.fsdecode(path)


@pytest.mark.parametrize(
    "call", [fastsd.load, fastsd.open, lambda path: fastsd.load_into({}, path)]
)
def test_what_is_not_there_is_an_os_error_with_the_path(call, tmp_path):
    for name in ("missing.fsd", b"missing-\xe9", "no folder/x.fsd"):
        path = os.path.join(os.fsencode(tmp_path), os.fsencode(name))
        with pytest.raises(FileNotFoundError) as caught:
            call(path)
        assert os.fsencode(caught.value.filename) == path
    with pytest.raises(IsADirectoryError):
        call(tmp_path)


def test_a_path_with_a_null_byte_is_no_path(tmp_path):
    name = str(tmp_path / "x") + "\0y"
    with pytest.raises(ValueError, match="null"):
        fastsd.save({}, name)
    assert os.listdir(tmp_path) == []
    fastsd.save({}, tmp_path / "x")
    with pytest.raises(ValueError, match="null"):
        fastsd.load(name)


def test_verify_has_two_levels(path):
    fastsd.save(small_state(), path)
    with pytest.raises(ValueError, match="'everything'"):
        fastsd.load(path, verify="everything")


def test_checksums_that_are_not_there_cannot_be_verified(path):
    fastsd.save(small_state(), path, checksum=False)
    with pytest.raises(fastsd.ChecksumError, match="saved without checksums") as caught:
        fastsd.load(path, verify="checksums")
    assert "weight" in caught.value.tensors
    assert "empty" not in caught.value.tensors
