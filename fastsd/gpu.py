"""GPUs: which the core reaches by itself, memory on them, and how much of the host's is pinned for
copies. All that asks torch about CUDA is here.

The core needs the driver only (``libcuda.so.1``, CUDA 12 or newer), which it finds at run time. All
else that torch calls an accelerator, ROCm's GPUs included, is served by torch's own copies.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch

from fastsd import _core
from fastsd.errors import UnsupportedError

_PINNED_VARIABLE = "FASTSD_PINNED_BYTES"
_STORAGE_VARIABLE = "FASTSD_GPUDIRECT_STORAGE"

# Of the core's type: as good as no limit.
_PINNED_BYTES_MAX = (1 << 64) - 1

# torch's caching allocator, CUDACachingAllocator.cpp: sizes are multiples of the first; up to the
# second they come from segments of 2 MiB, above it from what is left of larger ones.
BLOCK_BYTES = 512
_SMALL_BYTES = 1 << 20


def device_of(storage: torch.UntypedStorage) -> torch.device:
    """Where a storage lies. Tests, which need no GPU, have some say otherwise."""
    return storage.device


def is_in_use() -> bool:
    """Whether there may be tensors on a CUDA device."""
    return bool(torch.cuda.is_initialized())


def is_accelerator(device: torch.device) -> bool:
    """Whether memory there is something else than the host's."""
    return device.type not in ("cpu", "meta")


def is_served(device: torch.device) -> bool:
    """Whether the core copies to and from the device itself."""
    return device.type == "cuda" and torch.version.hip is None and find_obstacle() is None


def find_obstacle() -> str | None:
    """Why the core reaches no GPU, None if it does."""
    try:
        _core.cuda_version()
    except UnsupportedError as error:
        return error.detail
    return None


def ordinal_of(device: torch.device) -> int:
    """torch's number of a CUDA device, which is the driver's, too."""
    return torch.cuda.current_device() if device.index is None else device.index


def current_stream(device: torch.device) -> int:
    """The driver's handle of the stream that torch uses on a CUDA device in this thread."""
    return int(torch.cuda.current_stream(device).cuda_stream)


def round_up(nbytes: int) -> int:
    """What torch's allocator takes for so many bytes: whole blocks of `BLOCK_BYTES`."""
    return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES


def allocate(sizes: Sequence[int], device: torch.device) -> list[torch.UntypedStorage]:
    """Storages of so many bytes each, from torch's allocator, each freed by itself.

    Raises torch.OutOfMemoryError. On a CUDA device those above 1 MiB take a single allocation of
    the driver's, however many they are; smaller ones share segments of 2 MiB, as always in torch.
    """
    if device.type == "cuda":
        _reserve(sizes, device)
    return [torch.UntypedStorage(size, device=device) for size in sizes]


def _reserve(sizes: Iterable[int], device: torch.device) -> None:
    """Has torch's allocator get the memory at once, which it then splits."""
    blocks = [round_up(size) for size in sizes if size > _SMALL_BYTES]
    if len(blocks) < 2 or not _splits_blocks():
        return
    try:
        torch.UntypedStorage(sum(blocks), device=device)
    except torch.cuda.OutOfMemoryError:  # in one piece; several smaller ones may fit
        pass


def _splits_blocks() -> bool:
    """Whether what one large storage leaves is there for several smaller ones."""
    settings = [os.getenv(name, "") for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")]
    is_native = torch.cuda.memory.get_allocator_backend() == "native"
    return is_native and not any("max_split_size_mb" in setting for setting in settings)


def set_pinned_memory(nbytes: int) -> None:
    """How much host memory may be pinned for copies to and from GPUs, by the whole process.

    512 MiB at first, or what the environment variable FASTSD_PINNED_BYTES says; at least 16 MiB. It
    is taken as loads and saves need it, in slabs of 8 MiB, and kept for the next ones. Thread-safe.
    """
    if nbytes < 0:
        raise ValueError(f"the limit of pinned memory must not be negative: {nbytes}")
    _core.set_pinned_bytes_max(min(nbytes, _PINNED_BYTES_MAX))


def release_pinned_memory() -> None:
    """Gives pinned memory that no load or save is using back to the system. Thread-safe."""
    _core.release_pinned()


def wants_direct_storage() -> bool:
    """Whether files that are not in the page cache are to be read by GPUDirect Storage, where it is
    real: the environment variable FASTSD_GPUDIRECT_STORAGE is 1."""
    return os.getenv(_STORAGE_VARIABLE) == "1"


def _describe_direct_storage() -> str:
    if not wants_direct_storage():
        return f"off: {_STORAGE_VARIABLE} is not 1"
    try:
        _core.open_direct_storage()
    except UnsupportedError as error:
        return error.detail
    return "on"


def describe() -> dict[str, str]:
    """What copies to and from GPUs go through here, in words."""
    obstacle = find_obstacle()
    if obstacle is not None:
        return {"CUDA driver": obstacle}
    version = _core.cuda_version()
    return {
        "CUDA driver": f"{version // 1000}.{version % 1000 // 10}",
        "pinned memory": f"{_core.pinned_bytes() >> 20} of {_core.pinned_bytes_max() >> 20} MiB",
        "GPUDirect Storage": _describe_direct_storage(),
    }


def _apply_environment() -> None:
    text = os.getenv(_PINNED_VARIABLE)
    if text is None:
        return
    if not text.isdecimal():
        raise ValueError(f"{_PINNED_VARIABLE} must be a number of bytes, not {text!r}")
    set_pinned_memory(int(text))


_apply_environment()
