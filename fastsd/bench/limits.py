"""Bare limits: what the machine does when nobody keeps a format.

`measure` times those that bind loads and saves; the functions that it times are also there by
themselves.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsd.bench.cache import drop_file, sync_file, warm_file
from fastsd.bench.machine import count_cores
from fastsd.bench.memory import touch
from fastsd.bench.results import Limit

CHUNK_BYTES = 8 << 20
PAGE_BYTES = 4096

# What is measured is the best of some rounds over at most so many bytes.
_ROUNDS = 4
_BYTES_MAX = 1 << 30
# Reads that are going at a time (a thread keeps one going, so threads are the depth of the queue),
# and the size of each. Disks want many, and the best differs.
_DIRECT_DEPTHS = (4, 16, 32, 64)
_DIRECT_CHUNKS = (1 << 20, 8 << 20)
_DIRECT_SECONDS = 0.6


# ---- Single passes ----


def copy_memory(source: Tensor, target: Tensor) -> None:
    """Copies from memory to memory on all cores."""
    target.copy_(source)


def read_parallel(path: Path, target: Tensor) -> None:
    """Reads a file into memory that is already there, chunk by chunk, a thread a core."""
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
        with ThreadPoolExecutor(count_cores()) as threads:
            list(threads.map(read_chunk, range(0, len(view), CHUNK_BYTES)))
    finally:
        os.close(descriptor)


def map_and_touch(path: Path, size: int) -> Tensor:
    """Maps a file privately and reads every byte of it as one tensor."""
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    touch([tensor])
    return tensor


def write_at_once(source: Tensor, path: Path) -> None:
    """Creates a file and hands all bytes to the system, which may take them in several calls."""
    _write(source.numpy().data, path, 0)


def write_and_sync(source: Tensor, path: Path) -> None:
    """Writes, then syncs file and directory."""
    write_at_once(source, path)
    sync_file(path)


def write_direct(source: Tensor, path: Path) -> None:
    """Writes whole pages past the page cache, then syncs file and directory."""
    _write(source.numpy().data[: len(source) // PAGE_BYTES * PAGE_BYTES], path, os.O_DIRECT)
    sync_file(path)


def _write(left: memoryview, path: Path, flags: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flags, 0o644)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    finally:
        os.close(descriptor)


def read_direct(path: Path, depth: int, chunk_bytes: int, seconds: float) -> float:
    """Reads a file past the page cache, up to its last whole page, with ``depth`` reads going all
    the time, for about so many seconds. Returns bytes a second. Raises OSError."""
    size = path.stat().st_size // PAGE_BYTES * PAGE_BYTES
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    buffers = _map_buffer(depth * chunk_bytes)
    end = time.perf_counter() + seconds

    def read_share(index: int) -> int:
        done = 0
        # Neighbouring chunks are with different threads: all read from the start to the end.
        for start in range(index * chunk_bytes, size, depth * chunk_bytes):
            view = buffers[index * chunk_bytes :][: min(chunk_bytes, size - start)]
            done += os.preadv(descriptor, [view], start)
            if time.perf_counter() > end:
                break
        return done

    try:
        with ThreadPoolExecutor(depth) as threads:
            begin = time.perf_counter()
            done = sum(threads.map(read_share, range(depth)))
            return done / (time.perf_counter() - begin)
    finally:
        os.close(descriptor)


def _map_buffer(size: int) -> memoryview:
    """Memory that starts at a page and has been written to, in pages as large as there are: of
    small ones a request to a disk can name a few only."""
    memory = mmap.mmap(-1, size)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    memory[:: mmap.PAGESIZE] = bytes(-(-size // mmap.PAGESIZE))
    return memoryview(memory)


# ---- All that bind ----


def measure(path: Path, devices: list[str], scratch: Path | None) -> Iterator[Limit]:
    """Times all limits on a file, on devices, and of writing to ``scratch`` unless that is None.

    The file is read whatever its format, and is in the page cache afterwards or is not.
    """
    size = min(path.stat().st_size, _BYTES_MAX)
    source = _make_pages(size)
    target = _make_pages(size)
    yield _time("memcpy", "memory to memory, all cores", size, lambda: copy_memory(source, target))
    warm_file(path)
    how = f"parallel pread from the page cache, {count_cores()} threads"
    yield _time("pread", how, size, lambda: read_parallel(path, target))
    how = "map the file, touch every byte, from the page cache"
    yield _time("map", how, size, lambda: map_and_touch(path, size))
    if scratch is not None:
        yield _time_writes(source, scratch)
    for device in devices:
        if torch.device(device).type == "cuda":
            yield from _measure_copies(device, size)
    yield _time_cold(path, target)
    yield _measure_direct(path)


def _make_pages(size: int) -> Tensor:
    """Memory that starts at a page and has been written to."""
    memory = torch.full((size + PAGE_BYTES,), 1, dtype=torch.uint8)
    start = -memory.data_ptr() % PAGE_BYTES
    return memory[start : start + size]


def _time(name: str, how: str, size: int, run: Callable[[], object]) -> Limit:
    best = float("inf")
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        result = run()
        best = min(best, time.perf_counter() - begin)
        del result  # what was mapped is unmapped when the clock has stopped
    return Limit(name, how, size / best / 1e9)


def _time_writes(source: Tensor, scratch: Path) -> Limit:
    best = float("inf")
    try:
        for _ in range(_ROUNDS):
            scratch.unlink(missing_ok=True)
            begin = time.perf_counter()
            write_at_once(source, scratch)
            best = min(best, time.perf_counter() - begin)
    finally:
        scratch.unlink(missing_ok=True)
    return Limit("write", "one big buffered write to a new file", len(source) / best / 1e9)


def _measure_copies(device: str, size: int) -> Iterator[Limit]:
    host = torch.ones(size, dtype=torch.uint8, pin_memory=True)
    there = torch.ones(size, dtype=torch.uint8, device=device)
    for name, how, source, target in (
        ("H2D", "pinned memory to the device", host, there),
        ("D2H", "the device to pinned memory", there, host),
    ):
        best = min(_time_copy(source, target, device) for _ in range(_ROUNDS))
        yield Limit(f"{name} {device}", how, size / best / 1e9)


def _time_copy(source: Tensor, target: Tensor, device: str) -> float:
    with torch.cuda.device(device):
        begin: Any = torch.cuda.Event(enable_timing=True)
        end: Any = torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def _time_cold(path: Path, target: Tensor) -> Limit:
    """Where the system reads ahead well, this can be faster than direct reads."""
    how = f"parallel pread of a file out of the page cache, {count_cores()} threads"
    best = float("inf")
    for _ in range(_ROUNDS):
        if reason := drop_file(path):
            return Limit("readahead", reason, None)
        begin = time.perf_counter()
        read_parallel(path, target)
        best = min(best, time.perf_counter() - begin)
    return Limit("readahead", how, len(target) / best / 1e9)


def _measure_direct(path: Path) -> Limit:
    """The best of several depths and sizes, out of the page cache."""
    best, shape = 0.0, ""
    try:
        for chunk_bytes in _DIRECT_CHUNKS:
            for depth in _DIRECT_DEPTHS:
                drop_file(path)  # some file systems serve direct reads from the cache
                rate = read_direct(path, depth, chunk_bytes, _DIRECT_SECONDS)
                if rate > best:
                    best, shape = rate, f"{depth} reads of {chunk_bytes >> 20} MiB at a time"
    except OSError as error:
        return Limit("direct", f"not on this file system: {error.strerror}", None)
    return Limit("direct", f"O_DIRECT, {shape}", best / 1e9)
