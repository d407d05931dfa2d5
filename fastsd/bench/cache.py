"""Files on the disk and in the page cache: putting them there, and looking whether they are."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

# Pages that the system reads ahead or holds for a moment longer do not make a file warm.
_STAYS_MAX = 0.01


def sync_file(path: Path) -> None:
    """Makes a written file survive a power cut: syncs it and the directory that names it."""
    for target in (path, path.parent):
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def warm_file(path: Path, chunk_bytes: int = 16 << 20) -> None:
    """Brings a file into the page cache, unless all of it is there."""
    if find_resident(path) == 1.0:
        return
    buffer = bytearray(chunk_bytes)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def drop_file(path: Path) -> str:
    """Takes a file out of the page cache. Returns "", or why it is still there, in words.

    Pages that are not yet on the disk or are mapped by anybody cannot be dropped, and on tmpfs the
    cache is all there is.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    resident = find_resident(path)
    if resident is None:
        return "not known to be cold: the system does not tell what is in its cache"
    return f"not cold: {resident:.0%} stayed in the cache" if resident > _STAYS_MAX else ""


def find_resident(path: Path) -> float | None:
    """The part of a file's pages that is in the page cache, or None where nobody says."""
    if not path.stat().st_size:
        return 0.0
    with path.open("rb") as file:
        # Private and writable: ctypes gives addresses of writable memory only.
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    flags = np.empty(-(-len(memory) // mmap.PAGESIZE), np.uint8)
    start = ctypes.c_ubyte.from_buffer(memory)
    try:
        size = ctypes.c_size_t(len(memory))
        address = ctypes.c_void_p(ctypes.addressof(start))
        failed = ctypes.CDLL(None).mincore(address, size, ctypes.c_void_p(flags.ctypes.data))
    finally:
        del start  # nobody may point into it when it is closed
        memory.close()
    if failed:
        return None
    return float((flags & 1).mean())
