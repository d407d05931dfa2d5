"""Paths and file objects: how what is passed as `f` reaches the core."""

from __future__ import annotations

import errno
import fcntl
import operator
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from io import BytesIO, RawIOBase, TextIOBase
from tempfile import SpooledTemporaryFile
from typing import IO, Any

from fastsd import _core
from fastsd.errors import UnsupportedError

_WRITE_BYTES = 8 << 20
_READ_BYTES = 1 << 20  # what is read is copied, while it is still in the processor's cache
# docs/FORMAT.md, "The preamble": whoever has one may not be asked for a byte behind the archive.
_MAGIC = b"\x8fFSD"
_PREAMBLE_BYTES = 48
_FIRST_BYTES = 512  # what tells any format from the others


def is_path(f: object) -> bool:
    """Whether `f` names a file, rather than being one."""
    return isinstance(f, (str, bytes, os.PathLike))


def encode_path(f: Any) -> bytes:
    """The path as the system takes it. Raises ValueError for one that holds a null byte, and
    FileNotFoundError for one that is empty."""
    path = os.fsencode(f)
    if not path:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f)
    if b"\0" in path:
        raise ValueError("embedded null byte")
    return path


def is_stream_path(path: bytes) -> bool:
    """Whether what is there is written to and not replaced: a device, a pipe, a nameless file."""
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode):
            # A file may just be losing its name to another process that saves to the same path:
            # only what is reached through a link, as in /proc/self/fd, and stays so is nameless.
            is_nameless = status.st_nlink == 0 and os.path.islink(path)
            return is_nameless and os.path.samestat(status, os.stat(path))
    except OSError:
        return False
    return not stat.S_ISDIR(status.st_mode)


class Source:
    """An archive to be read: its first bytes, and how to open it."""

    def __init__(
        self,
        peek: Callable[[], bytes],
        open_reader: Callable[[bool | None], _core.Reader],
        open_stream: Callable[[], AbstractContextManager[IO[bytes]]],
        name: bytes,
    ) -> None:
        self.peek = peek
        self.open_stream = open_stream  # at the start of it, for what only torch can read
        self._open_reader = open_reader
        self.name = os.fsdecode(name)
        self.end: int | None = None

    def open(self, mmap: bool | None) -> _core.Reader:
        """Opens the archive; once, within the context of `open_source`. ``mmap`` as `fastsd.load`
        takes it; what cannot be mapped is read, whatever it says."""
        reader = self._open_reader(mmap)
        self.end = reader.file_bytes
        return reader


@contextmanager
def open_source(f: Any) -> Iterator[Source]:
    """What `f` holds: a path the one archive of that file, a file object the one that comes next.

    A file object is left behind the archive or, after an error, where it stood, if it can go back.
    A regular file is used through its descriptor; anything else is read, just as far as the archive
    reaches. Raises AttributeError for what has no ``read``, and what that raises.
    """
    if is_path(f):
        path = encode_path(f)
        yield Source(
            partial(_read_first, path),
            lambda mmap: _core.Reader(path, path, mmap),
            lambda: open(path, "rb"),  # noqa: SIM115
            path,
        )
        return
    if not hasattr(f, "read"):
        raise AttributeError(
            f"expected a path or a binary file object with a 'read' attribute, not "
            f"{type(f).__name__}"
        )
    if isinstance(f, TextIOBase):
        raise TypeError(f"expected a file opened in binary mode, not {f}")
    begin = _tell(f)
    try:
        first = _read_up_to(f, _PREAMBLE_BYTES)
        if begin is not None and not first.startswith(_MAGIC):
            first += _read_up_to(f, _FIRST_BYTES - len(first))
        descriptor = None if begin is None else _find_descriptor(f, begin, first)
        if begin is None or descriptor is None:
            yield _stream_source(f, begin, first)
        else:
            source = _descriptor_source(f, descriptor, begin, first)
            yield source
            if source.end is not None:
                f.seek(begin + source.end)
    except BaseException:
        if begin is not None:
            with suppress(Exception):
                f.seek(begin)
        raise


def _read_first(path: bytes) -> bytes:
    with open(path, "rb") as file:
        return file.read(_FIRST_BYTES)


def _name(f: Any) -> bytes:
    name = getattr(f, "name", None)  # of a descriptor without a path a number
    return os.fsencode(name if name and isinstance(name, (str, bytes)) else str(f))


def _tell(f: Any) -> int | None:
    """Where a file object stands; None for one that cannot tell, or could not go back there."""
    try:
        begin = f.tell()
        f.seek(begin)
    except (AttributeError, OSError, ValueError):  # a closed one says so when it is read
        return None
    return begin if isinstance(begin, int) else None


# ---- Regular files ----


def _find_descriptor(f: Any, begin: int, first: bytes) -> int | None:
    """The descriptor of a regular file whose bytes are those that `f` gives; None if there is none.

    That `f` has a descriptor does not say so: compressed files have one, too. That the file has
    ``first`` where `f` stood does: in an .fsd archive this holds the checksum of the header, which
    has those of the data. Of others the file must have the size, too, that `f` says it has.
    """
    if isinstance(f, SpooledTemporaryFile):  # to ask for its descriptor would put it on the disk
        return None
    try:
        descriptor: int = f.fileno()
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        is_same = os.pread(descriptor, len(first), begin) == first
        if is_same and not first.startswith(_MAGIC):
            is_same = f.seek(0, os.SEEK_END) == os.fstat(descriptor).st_size
    except (AttributeError, OSError, ValueError, TypeError):
        return None
    return descriptor if is_same else None


def _descriptor_source(f: Any, descriptor: int, begin: int, first: bytes) -> Source:
    name = _name(f)
    # Whoever can write to the file may be about to, and would change tensors that are mapped.
    is_written = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY

    def open_reader(mmap: bool | None) -> _core.Reader:
        safe = False if mmap is None and is_written else mmap
        return _core.Reader.from_descriptor(descriptor, name, begin, safe)

    return Source(lambda: first, open_reader, lambda: _return_to(f, begin), name)


@contextmanager
def _return_to(f: Any, begin: int) -> Iterator[Any]:
    f.seek(begin)
    yield f


# ---- Streams ----


def _stream_source(f: Any, begin: int | None, first: bytes) -> Source:
    name = _name(f)
    is_read = False

    def open_reader(mmap: bool | None) -> _core.Reader:
        nonlocal is_read
        start = 0 if begin is None else begin
        reader = _core.Reader.from_stream(_read_into(f, first), name, start, _count_left(f, start))
        is_read = True
        return reader

    def open_stream() -> AbstractContextManager[IO[bytes]]:
        if begin is not None:
            return _return_to(f, begin)
        if is_read:
            detail = "only torch can read it, from a file that can seek"
            raise UnsupportedError(detail, path=os.fsdecode(name))
        return _return_to(BytesIO(first + f.read()), 0)

    return Source(lambda: first, open_reader, open_stream, name)


def _count_left(f: Any, begin: int) -> int | None:
    """How many bytes there are from `begin` on, where it costs nothing to ask."""
    if not isinstance(f, BytesIO):
        return None
    here = f.tell()
    end = f.seek(0, os.SEEK_END)
    f.seek(here)
    return max(0, end - begin)


def _read_into(f: Any, first: bytes) -> Callable[[memoryview], int]:
    """Fills the front of a buffer with ``first``, then with what `f` has, once it has any."""
    # Not one that another object lends: what that reads might not be what `f` does.
    has_readinto = hasattr(type(f), "readinto") or "readinto" in getattr(f, "__dict__", ())
    read_next = f.readinto if has_readinto else partial(_copy_into, f)

    def read_into(target: memoryview) -> int:
        nonlocal first
        if first:
            nbytes = min(len(first), len(target))
            target[:nbytes] = first[:nbytes]
            first = first[nbytes:]
            return nbytes
        got = operator.index(_given(f, read_next(target)))
        if not 0 <= got <= len(target):
            raise ValueError(f"readinto() gave {got} bytes, where {len(target)} were asked for")
        return got

    return read_into


def _copy_into(f: Any, target: memoryview) -> int:
    data = _read(f, min(len(target), _READ_BYTES))
    target[: len(data)] = data
    return len(data)


def _read_up_to(f: Any, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes and (chunk := _read(f, nbytes - len(data))):
        data += chunk
    return data


def _read(f: Any, nbytes: int) -> memoryview:
    """What one call of ``read`` gives: not more than was asked for, and nothing at the end."""
    chunk = _given(f, f.read(nbytes))
    if not isinstance(chunk, (bytes, bytearray, memoryview)):
        raise TypeError(f"expected a file opened in binary mode, but read() gave {type(chunk)}")
    data = memoryview(chunk).cast("B")
    if len(data) > nbytes:
        raise ValueError(f"read() gave {len(data)} bytes, where {nbytes} were asked for")
    return data


def _given(f: Any, result: Any) -> Any:
    if result is None:
        raise BlockingIOError(errno.EAGAIN, "the file is non-blocking and has no data yet", str(f))
    return result


# ---- Writing ----


def write_stream(
    plan: _core.Plan,
    f: Any,
    *,
    durable: bool,
    checksum: bool,
    mapped: Sequence[_core.MappedFile] = (),
) -> None:
    """Writes a plan to a file object from where it stands, using ``write`` and, if it has one,
    ``flush``.

    What lies in the memory of ``mapped`` is read from the files: see `_core.Plan.write`. With
    ``durable``, which takes a file that has a descriptor, it is on its device when this returns.
    Raises what the object raises, and ValueError, before anything is written, for a file that would
    change under the tensors that are mapped from it.
    """
    descriptor = f.fileno() if durable else -1  # raises before anything is written
    _check_not_read(plan, f)
    plan.prepare(checksum, mapped)
    slab = memoryview(bytearray(min(_WRITE_BYTES, plan.file_bytes)))
    for begin in range(0, plan.file_bytes, _WRITE_BYTES):
        part = slab[: min(_WRITE_BYTES, plan.file_bytes - begin)]
        plan.gather(begin, part)
        _write_all(f, part)
    if hasattr(f, "flush"):
        f.flush()
    if durable:
        os.fsync(descriptor)


def _check_not_read(plan: _core.Plan, f: Any) -> None:
    try:
        descriptor = f.fileno()
    except (AttributeError, OSError, ValueError):
        return
    if isinstance(descriptor, int) and plan.reads_from(descriptor, _tell(f) or 0):
        raise ValueError(
            f"{f} is the file that tensors to be saved are mapped from: save to its path, which "
            "replaces it, or load them with mmap=False"
        )


def _write_all(f: Any, data: memoryview) -> None:
    # Raw files may take less than they are given; others return the length, or nothing.
    while data:
        with data[:] as lent:  # useless to an object that keeps it: the memory is used again
            written = f.write(lent)
        if written is None and not isinstance(f, RawIOBase):
            return
        if written is None:
            raise BlockingIOError(errno.EAGAIN, "the file is non-blocking and is full", str(f))
        if written == 0:
            raise OSError(errno.EIO, "write() took nothing", str(getattr(f, "name", f)))
        if not 0 < written <= len(data):
            raise ValueError(f"write() took {written} bytes of the {len(data)} that it was given")
        data = data[written:]
