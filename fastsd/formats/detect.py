"""What a file is, by its content, and opening it: whatever it is called."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from fastsd import _core
from fastsd.errors import EmptyError, FormatError
from fastsd.files import Source, is_path, open_source
from fastsd.formats import legacy, sharded
from fastsd.formats.fsd import Section

_FSD_MAGIC = b"\x8fFSD\r\n\x1a\n"  # docs/FORMAT.md, "The preamble"


class Opened(NamedTuple):
    """What `open_any` has found: readers, one for each file that the archive is in; or none and a
    source, of which torch has to read it."""

    readers: list[_core.Reader]
    source: Source | None = None


@contextmanager
def open_any(f: Any, mmap: bool | None) -> Iterator[Opened]:
    """Opens what `f` names or is: a file in any of the formats, a directory or an index of shards.

    Raises FormatError with the likely cause, OSError, and what `open_source` raises.
    """
    if is_path(f) and os.path.isdir(f):
        yield _open_shards(sharded.find_shards(os.fsdecode(f)), mmap)
        return
    with open_source(f) as source:
        reader = _open_reader(source, mmap)
        if reader is not None and reader.section(Section.TORCH_SCRIPT) is None:
            yield Opened([reader])
        elif _is_json(source.peek()):
            if not is_path(f):
                detail = "it looks like JSON: an index of shards is loaded by its path"
                raise FormatError(detail, path=source.name)
            yield _open_shards(sharded.read_index(source.name), mmap)
        else:
            yield Opened([], source)


def _open_shards(shards: sharded.Shards, mmap: bool | None) -> Opened:
    def open_shard(path: str) -> _core.Reader:
        with open_source(path) as source:
            reader = _open_reader(source, mmap)
        if reader is None or reader.section(Section.TORCH_SCRIPT) is not None:
            raise FormatError("a shard in a format that only torch reads", path=path)
        return reader

    return Opened(sharded.open_shards(shards, open_shard))


def _open_reader(source: Source, mmap: bool | None) -> _core.Reader | None:
    """None: it is for others to read."""
    try:
        return source.open(mmap)
    except FormatError as error:
        first = source.peek()
        if legacy.is_for_torch(first) or _is_json(first):
            return None
        if not first:
            detail = "it is empty: an interrupted copy? Or it stands at its end: seek(0) first?"
            raise EmptyError(detail, path=error.path) from None
        cause = find_cause(first)
        if cause:
            raise type(error)(f"{error.detail}; {cause}", path=error.path) from None
        raise


def _is_json(first: bytes) -> bool:
    return first.lstrip().startswith(b"{")


# First bytes of what people pass by mistake, and what to do about it.
_OTHERS = (
    (b"version https://git-lfs", "it is a git-lfs pointer: run `git lfs pull`"),
    (b"<", "it looks like HTML or XML: a download that gave an error page?"),
    (b"\x8fFSD", "its newlines were converted: it was copied as text"),
    (b"\x1f\x8b", "it looks like a gzip file: pass what gzip.open gives"),
    (b"\x89HDF", "it looks like an HDF5 file"),
    (b"GGUF", "it looks like a GGUF file"),
)


def find_cause(first: bytes) -> str | None:
    """What a file with these first bytes is, if of no format that is read; None if it cannot be
    told."""
    if first.startswith(_FSD_MAGIC):
        return None
    if not any(first):
        return "it starts with zeros: it was never completely written"
    return next((cause for magic, cause in _OTHERS if first.startswith(magic)), None)
