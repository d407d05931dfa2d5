"""Bare limits: what the machine does when nobody keeps a format."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from measure import sync_file, touch

CHUNK_BYTES = 8 << 20
PAGE_BYTES = 4096


def write_at_once(source: Tensor, path: Path) -> None:
    """Create a file and hand all bytes to the system, which may take them in several calls."""
    left = source.numpy().data
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    finally:
        os.close(descriptor)


def write_and_sync(source: Tensor, path: Path) -> None:
    """Write, then sync file and directory."""
    write_at_once(source, path)
    sync_file(path)


def write_direct(source: Tensor, path: Path) -> None:
    """Write whole pages past the page cache, then sync file and directory."""
    left = source.numpy().data[: len(source) // PAGE_BYTES * PAGE_BYTES]
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o644)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    finally:
        os.close(descriptor)
    sync_file(path)


def copy_memory(source: Tensor, target: Tensor) -> None:
    """Copy from memory to memory on all cores."""
    target.copy_(source)


def read_parallel(path: Path, target: Tensor) -> None:
    """Read a file into memory that is already there, chunk by chunk, a thread a core."""
    view = target.numpy().data
    descriptor = os.open(path, os.O_RDONLY)

    def read_chunk(start: int) -> None:
        end = min(start + CHUNK_BYTES, len(view))
        while start < end:
            count = os.preadv(descriptor, [view[start:end]], start)
            if count == 0:
                raise EOFError(path.name)
            start += count

    try:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(read_chunk, range(0, len(view), CHUNK_BYTES)))
    finally:
        os.close(descriptor)


def map_and_touch(path: Path, size: int) -> Tensor:
    """Map a file privately and read every byte of it as one tensor."""
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    touch([tensor])
    return tensor


def fill_model(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors that are in memory into a model: torch's own part of loading into one."""
    model.load_state_dict(state)


def assign_model(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Hand tensors that exist to a model: torch's own part of loading by assignment."""
    model.load_state_dict(state, assign=True)


# What each limit needs: "copy" (source, target), "write" (source, path), "read" (path, target),
# "map" (path, size), "model" or "meta" (model, dictionary).
LIMITS: dict[str, tuple[str, Callable[..., object]]] = {
    "memcpy": ("copy", copy_memory),
    "write": ("write", write_at_once),
    "write-fsync": ("write", write_and_sync),
    "write-direct": ("write", write_direct),
    "pread": ("read", read_parallel),
    "mmap-touch": ("map", map_and_touch),
    "fill": ("model", fill_model),
    "assign": ("meta", assign_model),
}
