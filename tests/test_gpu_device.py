"""Loading to a real GPU: what no stub can show. torch.load is the oracle. Skipped without one."""

import gc
import os
import threading

import pytest
import safetensors.torch
import torch
from same import assert_same
from torch import nn

import fastsd
from fastsd import _core, gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
MIB = 1 << 20


def make_state(nbytes=200 * MIB, tensors=40):
    items = nbytes // tensors // 2
    state = {f"layer.{i}.weight": torch.randn(items).to(torch.bfloat16) for i in range(tensors)}
    state |= {f"layer.{i}.bias": torch.randn(100 + i) for i in range(tensors)}
    return state


def save_as(state, folder, format):
    path = folder / f"x.{format}"
    if format == "safetensors":
        safetensors.torch.save_file(state, path)
    elif format == "pth":
        torch.save(state, path)
    else:
        fastsd.save(state, path)
    return path


def drop_cache(path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def to_cpu(state):
    return {name: tensor.cpu() for name, tensor in state.items()}


def assert_arrived(loaded, state):
    assert all(tensor.is_cuda for tensor in loaded.values())
    assert_same(to_cpu(loaded), state)


def test_the_driver_is_found():
    assert gpu.find_obstacle() is None
    assert gpu.is_served(torch.device("cuda"))
    assert "CUDA driver" in gpu.describe()


@pytest.mark.parametrize("format", ["fsd", "pth", "safetensors"])
@pytest.mark.parametrize("is_warm", [True, False])
def test_every_byte_arrives(tmp_path, format, is_warm):
    state = make_state()
    path = save_as(state, tmp_path, format)
    if not is_warm:
        drop_cache(path)
    assert_arrived(fastsd.load(path, map_location="cuda"), state)
    if not is_warm:
        drop_cache(path)
    assert_arrived(
        fastsd.load(
            path,
            map_location="cuda:0",
            verify="checksums" if format != "safetensors" else "structure",
        ),
        state,
    )


def test_every_dtype(tmp_path):
    names = [name for _, name, _ in _core.DTYPES if hasattr(torch, name)]
    state = {}
    for name in names:
        dtype = getattr(torch, name)
        raw = torch.randint(0, 2, (64,), dtype=torch.uint8)
        try:
            state[name] = torch.empty(0, dtype=dtype).set_(raw.untyped_storage(), 0, (4,), (1,))
            state[name].cuda()
        except (RuntimeError, NotImplementedError):
            state.pop(name, None)
    path = tmp_path / "x.fsd"
    fastsd.save(state, path)
    loaded = fastsd.load(path, map_location="cuda")
    for name, tensor in loaded.items():
        assert tensor.is_cuda
        assert tensor.dtype == state[name].dtype
        assert (
            tensor.cpu().untyped_storage().tolist()
            == fastsd.load(path)[name].untyped_storage().tolist()
        )


def test_saved_from_the_gpu_comes_back_there(tmp_path):
    state = {name: tensor.cuda() for name, tensor in make_state(10 * MIB).items()}
    path = tmp_path / "x.fsd"
    fastsd.save(state, path)
    loaded = fastsd.load(path)
    assert_same(to_cpu(loaded), to_cpu(state))
    assert {str(tensor.device) for tensor in loaded.values()} == {"cuda:0"}


def test_memory_is_torchs_and_freed_tensor_by_tensor(tmp_path):
    state = make_state(400 * MIB, 20)
    path = save_as(state, tmp_path, "fsd")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    segments = torch.cuda.memory_stats()["segment.large_pool.allocated"]
    loaded = fastsd.load(path, map_location="cuda")
    nbytes = sum(tensor.nbytes for tensor in state.values())
    assert torch.cuda.memory_allocated() - before < nbytes + len(state) * 512
    assert torch.cuda.memory_stats()["segment.large_pool.allocated"] - segments <= 2
    assert torch.cuda.max_memory_allocated() - before < nbytes + len(state) * 512 + 64 * MIB
    now = torch.cuda.memory_allocated()
    size = loaded["layer.3.weight"].nbytes
    del loaded["layer.3.weight"]
    assert now - torch.cuda.memory_allocated() >= size


def test_host_memory_is_bounded(tmp_path):
    state = make_state(1500 * MIB, 30)
    path = save_as(state, tmp_path, "fsd")
    del state
    gc.collect()
    gpu.release_pinned_memory()
    gpu.set_pinned_memory(64 * MIB)
    try:
        fastsd.load(path, map_location="cuda")
        assert _core.pinned_bytes() <= 64 * MIB
    finally:
        gpu.set_pinned_memory(512 * MIB)


def test_after_what_the_current_stream_still_does(tmp_path):
    """The memory that a load gets may still be written to by work that is in the stream."""
    state = {"a": torch.arange(50_000_000, dtype=torch.int32)}
    path = save_as(state, tmp_path, "fsd")
    stream = torch.cuda.Stream()
    for _ in range(3):
        with torch.cuda.stream(stream):
            late = torch.empty(50_000_000, dtype=torch.int32, device="cuda")
            torch.cuda._sleep(200_000_000)
            late.fill_(7)
            del late  # its memory goes to the next tensor of this stream
            loaded = fastsd.load(path, map_location="cuda")
            doubled = loaded["a"] * 2  # needs no waiting
        torch.cuda.synchronize()
        assert torch.equal(loaded["a"].cpu(), state["a"])
        assert torch.equal(doubled.cpu(), state["a"] * 2)


def test_threads(tmp_path):
    paths = []
    states = [make_state(50 * MIB, 10 + i) for i in range(4)]
    for i, state in enumerate(states):
        (tmp_path / str(i)).mkdir()
        paths.append(save_as(state, tmp_path / str(i), "fsd"))
    failures = []

    def load(i):
        try:
            for _ in range(3):
                assert_arrived(fastsd.load(paths[i], map_location="cuda"), states[i])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=load, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_into_a_model(tmp_path, dtype):
    source = nn.Sequential(nn.Linear(2000, 3000), nn.BatchNorm1d(3000), nn.Linear(3000, 10))
    path = save_as(source.state_dict(), tmp_path, "fsd")
    target = nn.Sequential(nn.Linear(2000, 3000), nn.BatchNorm1d(3000), nn.Linear(3000, 10))
    target = target.to("cuda", dtype)
    addresses = [parameter.data_ptr() for parameter in target.parameters()]
    fastsd.load_into(target, path)
    assert addresses == [parameter.data_ptr() for parameter in target.parameters()]
    expected = {
        n: t.to(dtype) if t.is_floating_point() else t for n, t in source.state_dict().items()
    }
    assert_same(to_cpu(target.state_dict()), dict(expected))


def test_casts(tmp_path):
    state = make_state(100 * MIB)
    path = save_as(state, tmp_path, "fsd")
    loaded = fastsd.load(path, map_location="cuda", dtype=torch.float32)
    assert_arrived(loaded, {name: tensor.float() for name, tensor in state.items()})


def test_slices(tmp_path):
    matrix = torch.randn(4000, 512)
    path = save_as({"m": matrix}, tmp_path, "fsd")
    with fastsd.open(path, device="cuda") as archive:
        assert torch.equal(archive.get_slice("m")[100:2000].cpu(), matrix[100:2000])
        assert torch.equal(archive.get_slice("m")[:, 3].cpu(), matrix[:, 3])
        assert archive["m"].is_cuda


def test_pickled_objects(tmp_path):
    torch.save(nn.Linear(1000, 1000), tmp_path / "x.pth")
    loaded = fastsd.load(tmp_path / "x.pth", map_location="cuda", weights_only=False)
    expected = torch.load(tmp_path / "x.pth", weights_only=False)
    assert loaded.weight.is_cuda
    assert_same(to_cpu(loaded.state_dict()), dict(expected.state_dict()))


def test_out_of_memory_is_torchs_error_and_leaves_nothing(tmp_path):
    path = tmp_path / "x.fsd"
    fastsd.save({"a": torch.ones(10)}, path)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(64 * MIB / total)
    try:
        state = make_state(200 * MIB)
        path = save_as(state, tmp_path, "fsd")
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        with pytest.raises(torch.cuda.OutOfMemoryError):
            fastsd.load(path, map_location="cuda")
        assert torch.cuda.memory_allocated() == before
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_arrived(fastsd.load(path, map_location="cuda"), state)


def test_record_stream_works_as_for_any_tensor(tmp_path):
    path = save_as({"a": torch.ones(30_000_000)}, tmp_path, "fsd")
    loaded = fastsd.load(path, map_location="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        total = loaded["a"].sum()
    loaded["a"].record_stream(side)
    del loaded
    torch.empty(30_000_000, device="cuda").fill_(9)
    torch.cuda.synchronize()
    assert total.item() == 30_000_000
