"""Saving from a GPU. What can be told without one is in test_save_from_gpus.py."""

import io
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from same import PLAIN_DTYPES, assert_same, filled

import fastsd
from fastsd import _core

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MIB = 1 << 20
SLEEP_CYCLES = 1_000_000_000  # half a second


def to_gpu(tensor, storages=None):
    """The tensor on the GPU, over a copy of its storage: of any dtype, with the same strides."""
    storages = {} if storages is None else storages
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in storages:
        storages[storage.data_ptr()] = storage.cuda()
    moved = torch.empty(0, dtype=tensor.dtype, device="cuda").set_(
        storages[storage.data_ptr()], tensor.storage_offset(), tensor.shape, tensor.stride()
    )
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(moved, tensor.requires_grad)
    return moved


def state_to_gpu(state):
    moved, storages = {}, {}
    for tensor in state.values():
        moved.setdefault(id(tensor), to_gpu(tensor, storages))
    return OrderedDict((name, moved[id(tensor)]) for name, tensor in state.items())


def noise(nbytes):
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device="cuda")


def make_state():
    matrix = filled((3000, 500), torch.float32)
    tied = torch.nn.Parameter(filled((70, 11), torch.float32))
    return OrderedDict(
        {
            "matrix": matrix,
            "column": matrix[:, 3],
            "slice": filled((100, 100), torch.bfloat16)[10:20, ::3],
            "transposed": filled((400, 1500), torch.float64).t(),
            "tied": tied,
            "tied again": tied,
            "empty": torch.empty(0, 3),
            "scalar": torch.tensor(2.5),
            "odd": filled((777_777,), torch.uint8),
        }
    )


def test_the_core_finds_the_gpus():
    assert _core.cuda_device_count() == torch.cuda.device_count()


@pytest.mark.parametrize("durable", [False, True])
def test_every_dtype(durable, path):
    state = OrderedDict((str(dtype), filled((5, 7), dtype)) for dtype in PLAIN_DTYPES)
    fastsd.save(state_to_gpu(state), path, durable=durable)
    assert_same(fastsd.load(path, map_location="cpu"), state)


def test_tied_and_strided_tensors_and_parameters(path):
    state = make_state()
    fastsd.save(state_to_gpu(state), path)
    loaded = fastsd.load(path, map_location="cpu", verify="checksums")
    assert_same(loaded, state)
    assert loaded["tied"] is loaded["tied again"]


def test_devices_are_recorded(path):
    fastsd.save({"x": torch.ones(3, device="cuda"), "y": torch.ones(3)}, path)
    loaded = fastsd.load(path)
    assert [str(loaded[name].device) for name in "xy"] == ["cuda:0", "cpu"]


@pytest.mark.parametrize("format", ["pth", "safetensors"])
def test_other_formats(format, path):
    state = make_state()
    if format == "safetensors":
        del state["column"]
    fastsd.save(state_to_gpu(state), path, format=format)
    if format == "pth":
        assert_same(torch.load(path, map_location="cpu"), state)
    loaded = fastsd.load(path, map_location="cpu")
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor)


@pytest.mark.parametrize("format", ["fsd", "pth", "safetensors"])
def test_streams(format, tmp_path):
    state = {"x": noise(20 * MIB), "y": noise(100).reshape(10, 10).t()}
    fastsd.save(state, tmp_path / "archive", format=format)
    stream = io.BytesIO()
    fastsd.save(state, stream, format=format)
    assert stream.getvalue() == (tmp_path / "archive").read_bytes()


@pytest.mark.parametrize("format", ["fsd", "pth"])
def test_a_module(format, path):
    model = torch.nn.Sequential(torch.nn.Linear(300, 500), torch.nn.BatchNorm1d(500)).cuda()
    fastsd.save(model, path, format=format)
    loaded = fastsd.load(path, weights_only=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert loaded.state_dict()[name].device == tensor.device


def test_many_small_tensors(path):
    state = {str(i): torch.full((i % 600,), float(i), device="cuda") for i in range(5000)}
    fastsd.save(state, path)
    loaded = fastsd.load(path, map_location="cpu")
    assert all(torch.equal(loaded[name], tensor.cpu()) for name, tensor in state.items())


def peak_bytes():
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10


@pytest.mark.parametrize("kind", ["tensors", "durable", "module", "pth"])
def test_a_model_larger_than_the_ring_takes_little_host_memory(kind, path):
    state = {str(i): noise(256 * MIB) for i in range(5)}
    obj = torch.nn.ParameterDict(
        {name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in state.items()}
    )
    fastsd.save({"x": noise(32 * MIB)}, path)  # what the first save of a process needs once
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    before = peak_bytes()
    fastsd.save(
        obj if kind == "module" else state,
        path,
        durable=kind == "durable",
        format="pth" if kind == "pth" else "fsd",
    )
    assert peak_bytes() - before < 128 * MIB
    loaded = fastsd.load(path, weights_only=False, map_location="cpu")
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor.cpu())


def test_a_save_comes_after_the_work_of_the_current_stream(path):
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        tensor = torch.zeros(20 * MIB, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLEEP_CYCLES)
            tensor.fill_(7)
            fastsd.save({"x": tensor}, path)
        assert (fastsd.load(path, map_location="cpu")["x"] == 7).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_several_gpus(path):
    state = {str(i): torch.full((MIB,), float(i), device=f"cuda:{i % 2}") for i in range(10)}
    with torch.cuda.device(1):
        fastsd.save(state, path)
        assert torch.cuda.current_device() == 1
    loaded = fastsd.load(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert all(loaded[name].device == tensor.device for name, tensor in state.items())
