"""Paths and file objects: how what is passed as `f` reaches the core, which knows only paths."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from fastsd import _core
from fastsd.errors import FastsdError

_CHUNK_BYTES = 8 << 20
# docs/FORMAT.md, "The preamble".
_PREAMBLE_BYTES = 48
_FILE_BYTES_AT = 24
_MAGIC = b"\x8fFSD\r\n\x1a\n"


def is_path(f: object) -> bool:
    """Whether `f` names a file, rather than being one."""
    return isinstance(f, (str, bytes, os.PathLike))


def is_stream_path(path: str | bytes) -> bool:
    """Whether a device or a pipe is there, which is written to and not replaced."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextmanager
def readable_path(f: Any) -> Iterator[bytes]:
    """A path under which the core can read what `f` is, for as long as the context is open.

    A file object is read from where it stands and left behind the archive. A regular file that
    holds just the archive is opened again, so that it can be mapped; from anything else the
    archive is copied once, into memory. Errors name `f` in place of the path.
    """
    if is_path(f):
        yield os.fsencode(f)
        return
    if not hasattr(f, "read"):
        raise TypeError(f"expected a path or a binary file object, not {type(f).__name__}")
    name = str(getattr(f, "name", None) or f)
    with _descriptor(f) as descriptor:
        try:
            yield b"/proc/self/fd/%d" % descriptor
        except FastsdError as error:
            error.path = name
            raise


@contextmanager
def _descriptor(f: Any) -> Iterator[int]:
    preamble = _read_up_to(f, _PREAMBLE_BYTES)
    is_fsd = preamble.startswith(_MAGIC) and len(preamble) == _PREAMBLE_BYTES
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

    With ``durable``, a file that has a descriptor is on its device when this returns.
    """
    _write_all(f, memoryview(plan.header(checksum)))
    slab = memoryview(bytearray(min(_CHUNK_BYTES, plan.file_bytes - plan.header_bytes)))
    for begin in range(plan.header_bytes, plan.file_bytes, _CHUNK_BYTES):
        part = slab[: min(_CHUNK_BYTES, plan.file_bytes - begin)]
        plan.gather(begin, part)
        _write_all(f, part)
    if durable:
        f.flush()
        os.fsync(f.fileno())


def _write_all(f: IO[bytes], data: memoryview) -> None:
    # Raw files may take less than they are given; others return the length, or nothing.
    while data:
        written = f.write(data)
        data = data[len(data) if written is None else written :]
