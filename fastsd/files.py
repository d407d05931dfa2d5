"""Paths and file objects: how what is passed as `f` reaches the core, which knows only paths."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

from fastsd import _core

_CHUNK_BYTES = 8 << 20
# docs/FORMAT.md, "The preamble".
_PREAMBLE_BYTES = 48
_FILE_BYTES_AT = 24
MAGIC = b"\x8fFSD\r\n\x1a\n"


def is_path(f: object) -> bool:
    """Whether `f` names a file, rather than being one."""
    return isinstance(f, (str, bytes, os.PathLike))


def encode_path(f: Any) -> bytes:
    """The path as the system takes it. Raises ValueError for one that holds a null byte."""
    path = os.fsencode(f)
    if b"\0" in path:
        raise ValueError("embedded null byte")
    return path


def is_stream_path(path: bytes) -> bool:
    """Whether what is there is written to and not replaced: a device, a pipe, a nameless file."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    is_nameless = stat.S_ISREG(status.st_mode) and status.st_nlink == 0
    return is_nameless or not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode))


class Source(NamedTuple):
    """Where the core can read, and what messages call it."""

    path: bytes
    name: bytes


@contextmanager
def open_source(f: Any) -> Iterator[Source]:
    """A path under which the core can open what `f` is, for as long as the context lasts.

    A file object is read from where it stands and left behind the archive. A regular file that
    holds just the archive is opened again, so that it can be mapped; from anything else the
    archive is copied once, into memory.
    """
    if is_path(f):
        path = encode_path(f)
        yield Source(path, path)
        return
    if not hasattr(f, "read"):
        raise TypeError(f"expected a path or a binary file object, not {type(f).__name__}")
    name = os.fsencode(str(getattr(f, "name", None) or f))
    with _descriptor(f) as descriptor:
        yield Source(b"/proc/self/fd/%d" % descriptor, name)


@contextmanager
def _descriptor(f: Any) -> Iterator[int]:
    preamble = _read_up_to(f, _PREAMBLE_BYTES)
    is_fsd = preamble.startswith(MAGIC) and len(preamble) == _PREAMBLE_BYTES
    nbytes = int.from_bytes(preamble[_FILE_BYTES_AT : _FILE_BYTES_AT + 8], "little")
    if is_fsd and _is_regular_file_of(f, nbytes):
        f.seek(nbytes)
        yield f.fileno()
        return
    descriptor = os.memfd_create("fastsd")
    try:
        with open(descriptor, "wb", closefd=False) as memory:
            memory.write(preamble)
            left = nbytes - len(preamble) if is_fsd else 0
            while left > 0 and (chunk := f.read(min(left, _CHUNK_BYTES))):
                memory.write(chunk)
                left -= len(chunk)
        yield descriptor
    finally:
        os.close(descriptor)


def _read_up_to(f: Any, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes and (chunk := f.read(nbytes - len(data))):
        if not isinstance(chunk, (bytes, bytearray)):
            raise TypeError(f"expected a file opened in binary mode, but read() gave {type(chunk)}")
        data += chunk
    return data


def _is_regular_file_of(f: Any, nbytes: int) -> bool:
    try:
        status = os.fstat(f.fileno())
        is_at_start: bool = f.tell() == _PREAMBLE_BYTES
    except (OSError, AttributeError, ValueError):
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == nbytes and is_at_start


def write_stream(plan: _core.Plan, f: IO[bytes], *, durable: bool, checksum: bool) -> None:
    """Writes a plan to a file object from where it stands, using `write` alone.

    With ``durable``, which takes a file that has a descriptor, it is on its device when this
    returns.
    """
    descriptor = f.fileno() if durable else -1  # raises before anything is written
    _write_all(f, memoryview(plan.header(checksum)))
    slab = memoryview(bytearray(min(_CHUNK_BYTES, plan.file_bytes - plan.header_bytes)))
    for begin in range(plan.header_bytes, plan.file_bytes, _CHUNK_BYTES):
        part = slab[: min(_CHUNK_BYTES, plan.file_bytes - begin)]
        plan.gather(begin, part)
        _write_all(f, part)
    if durable:
        f.flush()
        os.fsync(descriptor)


def _write_all(f: IO[bytes], data: memoryview) -> None:
    # Raw files may take less than they are given; others return the length, or nothing.
    while data:
        written = f.write(data)
        if written == 0:
            raise OSError(errno.EIO, "write() took nothing", str(getattr(f, "name", f)))
        data = data[len(data) if written is None else written :]
