"""Saving from GPUs, without one: CPU tensors stand for a GPU's, and the stub driver for CUDA's.

Their addresses are given to the core with a bit that only the stub takes away, so that nothing can
read them but through it. tests/cpp/cuda_save_test.cc is about the bytes; this is about the rest.
"""

import ctypes
import io
from collections import OrderedDict
from pathlib import Path
from random import Random

import pytest
import torch
from same import assert_same, filled

import fastsd
from fastsd import _core, gpu, pickled, tensors
from fastsd.shards import write_sharded

LIBRARY = Path(__file__).resolve().parent.parent / "build" / "dev" / "libfastsd_stub_cuda.so"
DEVICE_BIT = 1 << 62  # tests/stub_cuda/stub_cuda.h
MIB = 1 << 20


class Stub:
    """The driver's stub, and which storages it is to have."""

    def __init__(self):
        self._library = ctypes.CDLL(str(LIBRARY))
        self.places = {}
        self.is_served = True

    def set(self, name, value):
        self._library.stub_set(name.encode(), ctypes.c_long(value))

    def get(self, name):
        self._library.stub_get.restype = ctypes.c_long
        return self._library.stub_get(name.encode())

    def reset(self):
        self._library.stub_reset()

    def put(self, value, index=0):
        """Has all memory of a tensor, a module, or what is in a container, be that of a GPU."""
        if isinstance(value, torch.Tensor):
            self.places[value.untyped_storage().data_ptr()] = torch.device("cuda", index)
        elif isinstance(value, torch.nn.Module):
            self.put(value.state_dict(), index)
        elif isinstance(value, (dict, list)):
            for item in value.values() if isinstance(value, dict) else value:
                self.put(item, index)
        return value

    def find(self, storage):
        return self.places.get(storage.data_ptr(), storage.device)


@pytest.fixture
def stub(monkeypatch):
    if not LIBRARY.is_file():
        pytest.skip("the stub driver has not been built")
    arguments = (torch.Tensor, torch.uint8, torch.int8, torch.utils.dlpack.from_dlpack)
    stub = Stub()
    locate = tensors.location_tag
    find = tensors.Describer._find

    def tag(storage):
        device = stub.find(storage)
        return str(device) if device.type == "cuda" else locate(storage)

    def find_unreadable(self, storage):
        address, place = find(self, storage)
        return (address | DEVICE_BIT if place and address else address), place

    monkeypatch.setattr(gpu, "device_of", stub.find)
    monkeypatch.setattr(gpu, "is_served", lambda device: device.type == "cuda" and stub.is_served)
    monkeypatch.setattr(gpu, "is_in_use", lambda: True)
    monkeypatch.setattr(gpu, "current_stream", lambda device: 0)
    monkeypatch.setattr(tensors, "location_tag", tag)
    monkeypatch.setattr(tensors.Describer, "_find", find_unreadable)
    _core.set_cuda_library(str(LIBRARY))
    assert _core.cuda_device_count() == 2
    for count in ("copies", "bytes", "fail_copy", "misuses"):
        stub.set(count, 0)
    _core.set_torch(*arguments, None)  # or else the core would see where they are
    yield stub
    _core.set_torch(*arguments, getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))
    _core.release_pinned()
    _core.set_cuda_library("")
    assert (stub.get("streams"), stub.get("events"), stub.get("misuses")) == (0, 0, 0)


def noise(nbytes):
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8)


def make_state():
    """Tensors of several windows, tied, strided, with flags, and empty ones."""
    big = noise(5 * MIB)
    matrix = filled((300, 500), torch.float32)
    tied = torch.nn.Parameter(filled((7, 11), torch.float32))
    return OrderedDict(
        {
            "big": big,
            "half": filled((1001,), torch.bfloat16),
            "column": matrix[:, 3],
            "transposed": filled((40, 50), torch.float64).t(),
            "tied": tied,
            "tied again": tied,
            "grad": filled((5,), torch.float32).requires_grad_(),
            "empty": torch.empty(0, 3),
            "scalar": torch.tensor(2.5),
            "conjugated": filled((9,), torch.complex64).conj(),
        }
    )


@pytest.mark.parametrize("indices", [[0], [0, 1]])
def test_what_comes_back_is_the_same(stub, indices, path):
    state = make_state()
    for i, tensor in enumerate(state.values()):
        stub.put(tensor, indices[i % len(indices)])
    fastsd.save(state, path)
    assert stub.get("copies") > 5
    loaded = fastsd.load(path, map_location="cpu")
    assert_same(loaded, state)
    assert loaded["tied"] is loaded["tied again"]


def test_nested_objects_with_tensors_here_and_there(stub, path):
    state = make_state()
    obj = {"model": stub.put(state), "cpu": filled((9,), torch.int16), "epoch": 3, "list": [1, "x"]}
    fastsd.save(obj, path)
    assert_same(fastsd.load(path, map_location="cpu"), obj)


def test_devices_are_recorded(stub, path):
    state = {"a": torch.ones(3), "b": torch.ones(4), "c": torch.ones(5)}
    stub.put(state["a"], 0)
    stub.put(state["b"], 1)
    fastsd.save(state, path)
    seen = []
    fastsd.load(path, map_location=lambda storage, location: seen.append(location) or storage)
    assert seen == ["cuda:0", "cuda:1", "cpu"]


@pytest.mark.parametrize("format", ["pth", "safetensors"])
def test_other_formats_are_the_same_bytes(stub, format, tmp_path):
    state = make_state()
    fastsd.save(state, tmp_path / "x", format=format)
    wanted = (tmp_path / "x").read_bytes()
    assert stub.get("copies") == 0
    stub.put(state)
    fastsd.save(state, tmp_path / "x", format=format)
    assert (tmp_path / "x").read_bytes() == wanted
    assert stub.get("copies") > 5


def test_safetensors_refuses_what_overlaps(stub, path):
    memory = torch.arange(12.0).reshape(3, 4)
    state = stub.put({"rows": memory[:2], "transposed": memory.t()})
    with pytest.raises(fastsd.UnsupportedError, match="overlap in memory"):
        fastsd.save(state, path, format="safetensors")


def make_random_state(random):
    """Views of all kinds, which overlap or leave gaps, of storages up to some windows."""
    state = {}
    for number in range(random.randint(2, 5)):
        dtype = random.choice([torch.uint8, torch.bfloat16, torch.float32, torch.complex128])
        items = noise(random.choice([64, 70_000, 300_000, 3 * MIB]) // 16 * 16).view(dtype)
        for part in range(random.randint(1, 4)):
            begin = random.randrange(len(items))
            width = random.randint(1, min(500, len(items)))
            matrix = items[: len(items) // width * width].view(-1, width)
            view = random.choice(
                [
                    items,
                    items[begin : begin + width],
                    items[begin :: random.randint(1, 9)],
                    matrix.t(),
                    matrix[:, width // 2],
                    items[:1].expand(7, 3),
                    items[:0],
                ]
            )
            is_conjugated = dtype.is_complex and random.random() < 0.5
            state[f"{number}.{part}"] = view.conj() if is_conjugated else view
    return state


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("format", ["fsd", "pth", "safetensors"])
def test_any_views_here_and_on_two_gpus_are_the_same_bytes(stub, format, seed, tmp_path):
    random = Random(seed)
    torch.manual_seed(seed)
    state = make_random_state(random)
    path, durable = tmp_path / "archive", random.random() < 0.4
    try:
        fastsd.save(state, path, format=format, durable=durable)
    except fastsd.UnsupportedError:
        assert format == "safetensors"  # which cannot hold what overlaps
        return
    wanted = path.read_bytes()
    where = {name.split(".")[0]: random.choice([None, 0, 1]) for name in state}
    for name, tensor in state.items():
        if (index := where[name.split(".")[0]]) is not None:
            stub.put(tensor, index)
    fastsd.save(state, path, format=format, durable=durable)
    if format == "fsd":  # where the devices are recorded
        assert_same(fastsd.load(path, map_location="cpu", verify="checksums"), state)
    else:
        assert path.read_bytes() == wanted
    stream = io.BytesIO()
    fastsd.save(state, stream, format=format)
    assert stream.getvalue() == path.read_bytes()


@pytest.mark.parametrize("format", ["fsd", "pth", "safetensors"])
def test_streams_get_the_same_bytes(stub, format, tmp_path):
    state = stub.put(make_state())
    path = tmp_path / "archive"  # as torch calls the folder in a file object's zip file
    fastsd.save(state, path, format=format)
    stream = io.BytesIO()
    fastsd.save(state, stream, format=format)
    assert stream.getvalue() == path.read_bytes()


class Custom:
    def __init__(self, tensor):
        self.tensor = tensor


def make_pickled(stub):
    big = stub.put(noise(3 * MIB), 1)
    return {"a": Custom(big), "part": Custom(big[5:9]), "cpu": Custom(torch.arange(5))}


@pytest.mark.parametrize("format", ["fsd", "pth"])
def test_pickled_objects(stub, format, path):
    obj = make_pickled(stub)
    fastsd.save(obj, path, format=format)
    assert stub.get("bytes") == 3 * MIB
    loaded = fastsd.load(path, weights_only=False)
    assert_same(loaded, obj)
    assert loaded["part"].tensor.untyped_storage().data_ptr() == loaded["a"].tensor.data_ptr()


def test_pickled_storages_are_not_copied_by_torch(stub, monkeypatch):
    obj = make_pickled(stub)
    wanted = pickled.dump(obj, None, None)

    skipping = []
    real = pickled._Recorder.write_record_metadata
    monkeypatch.setattr(
        pickled._Recorder,
        "write_record_metadata",
        lambda self, name, nbytes: skipping.append(name) or real(self, name, nbytes),
    )
    parts = pickled.dump(obj, None, None)
    assert skipping == ["data/0", "data/1"]
    assert parts.stream == wanted.stream
    storages = [storage.data_ptr() for storage in parts.storages.values()]
    assert storages == [obj["a"].tensor.data_ptr(), obj["cpu"].tensor.data_ptr()]
    assert not torch.serialization._serialization_tls.skip_data


def test_pickled_objects_without_data(stub, path):
    obj = make_pickled(stub)
    with torch.serialization.skip_data():
        fastsd.save(obj, path)
    assert stub.get("copies") == 0
    assert not fastsd.load(path, weights_only=False)["a"].tensor.any()


def test_pickling_that_fails_leaves_torch_as_it_was(stub, path):
    obj = [*make_pickled(stub).values(), lambda: 0]
    with pytest.raises((AttributeError, TypeError)):
        fastsd.save(obj, path)
    assert not torch.serialization._serialization_tls.skip_data


def test_devices_that_the_core_does_not_serve_are_copied_first(stub, path):
    state = stub.put(make_state())
    stub.is_served = False
    fastsd.save(state, path)
    assert stub.get("copies") == 0
    assert_same(fastsd.load(path, map_location="cpu"), state)


def test_shards(stub, tmp_path):
    pytest.importorskip("huggingface_hub")
    state = stub.put({f"t{i}": noise(MIB + i) for i in range(5)})
    files = write_sharded(state, tmp_path / "model", "fsd", 2 * MIB + 10)
    assert len(files) > 2
    assert_same(fastsd.load(tmp_path / "model", map_location="cpu"), state)


def test_a_storage_that_became_smaller_is_refused(stub, path):
    tensor = stub.put(torch.ones(10))
    tensor.untyped_storage().resize_(8)
    stub.put(tensor)
    with pytest.raises(fastsd.UnsupportedError, match="of a storage of 8 bytes"):
        fastsd.save({"x": tensor}, path)


@pytest.mark.parametrize("durable", [False, True])
def test_a_copy_that_fails_leaves_the_old_file(stub, durable, path):
    fastsd.save({"old": torch.ones(3)}, path)
    before = path.read_bytes()
    stub.set("fail_copy", 3)
    state = stub.put({"x": noise(40 * MIB)})
    with pytest.raises(fastsd.DeviceError, match="CUDA_ERROR_ILLEGAL_ADDRESS") as caught:
        fastsd.save(state, path, durable=durable)
    assert isinstance(caught.value, RuntimeError)
    assert path.read_bytes() == before
    stub.reset()
    fastsd.save(state, path)
    assert_same(fastsd.load(path, map_location="cpu"), state)


def test_a_failing_copy_on_the_way_to_a_stream(stub):
    stub.set("fail_copy", 2)
    with pytest.raises(fastsd.DeviceError):
        fastsd.save(stub.put({"x": noise(4 * MIB)}), io.BytesIO())
    stub.reset()
