"""What torch says of GPUs, for the core, which reaches them through CUDA's driver."""

from __future__ import annotations

from functools import cache

import torch

from fastsd import _core


def device_of(storage: torch.UntypedStorage) -> torch.device:
    """Where a storage lies. Tests, which need no GPU, have some say otherwise."""
    return storage.device


def is_served(device: torch.device) -> bool:
    """Whether the core copies to and from this device's memory: one of CUDA's, with a driver."""
    return device.type == "cuda" and _has_gpus()


def is_in_use() -> bool:
    """Whether there may be tensors on such a device."""
    return bool(torch.cuda.is_initialized())


def current_stream(device: torch.device) -> int:
    """The handle of torch's current stream."""
    return int(torch.cuda.current_stream(device).cuda_stream)


@cache
def _has_gpus() -> bool:
    return torch.version.hip is None and _core.count_gpus() > 0
