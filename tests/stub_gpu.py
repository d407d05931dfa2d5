"""GPUs for tests on machines without: the core works over the stub driver (tests/stub_cuda), whose
"device memory" is host memory, and torch is told that storages there are in the host's."""

import ctypes
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fastsd import _core, gpu

ROOT = Path(__file__).resolve().parent.parent


class StubGpu:
    """What tests set, and what they find: see tests/stub_cuda/stub_cuda.h."""

    def __init__(self, path):
        self._library = ctypes.CDLL(str(path))
        self._library.stub_get.restype = ctypes.c_long
        self._library.stub_reset()
        self.allocated = []  # (bytes, device) of each storage

    def set(self, setting, value):
        self._library.stub_set(setting.encode(), ctypes.c_long(value))

    def get(self, count):
        return self._library.stub_get(count.encode())

    def reset(self):
        self._library.stub_reset()

    @property
    def devices(self):
        return {str(device) for _, device in self.allocated}

    def allocate(self, sizes, device):
        if gpu.is_accelerator(device):
            self.allocated += [(size, device) for size in sizes]
        storages = [torch.UntypedStorage(size) for size in sizes]
        for storage in storages:  # not by torch, whose threads a forked process does not have
            ctypes.memset(storage.data_ptr(), 0xEE, storage.nbytes())
        return storages


def find_stub():
    found = sorted(ROOT.glob("build/*/libfastsd_stub_cuda.so"))
    if not found:
        pytest.skip("there is no stub driver: `make build` makes it")
    return found[0]


@contextmanager
def stubbed():
    """Two GPUs. What is put on them is in host memory; nothing may be left on its way."""
    path = find_stub()
    with pytest.MonkeyPatch.context() as patch:
        _core.set_cuda_library(str(path))
        stub = StubGpu(path)
        patch.setattr(gpu, "allocate", stub.allocate)
        patch.setattr(gpu, "current_stream", lambda device: 0)
        patch.setattr(gpu, "ordinal_of", lambda device: device.index or 0)
        patch.setattr(
            torch.serialization, "_validate_device", lambda location, _: torch.device(location)
        )
        yield stub
    _core.release_pinned()
    left = {name: stub.get(name) for name in ("streams", "events", "misuses")}
    stub.reset()
    _core.set_cuda_library("")
    assert left == {"streams": 0, "events": 0, "misuses": 0}


@pytest.fixture
def stub_gpu():
    with stubbed() as stub:
        yield stub
