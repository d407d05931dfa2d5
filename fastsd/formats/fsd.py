"""The container, .fsd (docs/FORMAT.md): the core reads its bytes, this module its sections."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch

from fastsd import _core
from fastsd.archive import Archive
from fastsd.errors import EmptyError, FormatError
from fastsd.files import Source

_MAGIC = b"\x8fFSD\r\n\x1a\n"  # docs/FORMAT.md, "The preamble"
ROOT_IS_ORDERED_DICT = 1  # a flag of the file


class Section(IntEnum):
    """Sections of the header that Python reads."""

    TREE = 6
    STATE_METADATA = 7
    METADATA = 8
    PICKLE = 9


def open_reader(source: Source, mmap: bool | None) -> _core.Reader:
    """Reads and validates a file's header. Raises FormatError with the likely cause, or OSError."""
    try:
        return source.open(mmap)
    except FormatError as error:
        first = source.peek()
        if not first:
            detail = "it is empty: an interrupted copy? Or it stands at its end: seek(0) first?"
            raise EmptyError(detail, path=error.path) from None
        cause = find_cause(first)
        if cause:
            raise type(error)(f"{error.detail}; {cause}", path=error.path) from None
        raise


def open_archive(source: Source, mmap: bool | None, device: torch.device | str) -> Archive:
    """The archive in a file; errors as for `open_reader`."""
    reader = open_reader(source, mmap)
    return Archive(reader, decode_metadata(reader), device)


# First bytes of what people pass by mistake, and what to do about it.
_OTHERS = (
    (b"PK\x03\x04", "it looks like a zip file, as torch.save writes: use torch.load"),
    (b"\x80\x02", "it looks like a pickle, as old releases of torch.save write: use torch.load"),
    (b"\x80", "it looks like a pickle"),
    (b"version https://git-lfs", "it is a git-lfs pointer: run `git lfs pull`"),
    (b"<", "it looks like HTML or XML: a download that gave an error page?"),
    (b"\x8fFSD", "its newlines were converted: it was copied as text"),
    (b"\x1f\x8b", "it looks like a gzip file: pass what gzip.open gives"),
    (b"\x89HDF", "it looks like an HDF5 file"),
    (b"GGUF", "it looks like a GGUF file"),
)


def find_cause(first: bytes) -> str | None:
    """What a file with these first bytes is, if not in this format; None if it cannot be told."""
    if first.startswith(_MAGIC):
        return None
    if not any(first):
        return "it starts with zeros: it was never completely written"
    if first[4:9] == b"\0\0\0\0{":
        return "it looks like a safetensors file: use safetensors.torch.load_file"
    return next((cause for magic, cause in _OTHERS if first.startswith(magic)), None)


def encode_metadata(metadata: dict[str, str]) -> bytes:
    """The section for the user's strings. Raises TypeError for anything else."""
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f"metadata maps strings to strings, not {key!r} to {value!r}")
    return json.dumps(metadata, separators=(",", ":")).encode()


def decode_metadata(reader: _core.Reader) -> dict[str, str]:
    """The user's strings; empty if there are none."""
    text = reader.section(Section.METADATA)
    if text is None:
        return {}
    metadata = decode_json(text, Section.METADATA, path=reader.name)
    is_strings = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not is_strings:
        raise FormatError("section metadata does not map strings to strings", path=reader.name)
    return dict(metadata)


def decode_json(
    text: bytes,
    section: Section,
    tensors: list[Any] | None = None,
    decode: Callable[[str, Any], Any] | None = None,
    path: str = "",
) -> Any:
    """The value of a section, with ``decode`` for its nodes (see `_core.parse_json`).

    Raises FormatError, which names ``path``, the section, the cause and mostly the byte.
    """
    try:
        return _core.parse_json(text, tensors or [], decode)
    except MemoryError:
        raise
    except Exception as error:
        # Whatever JSON, numpy or torch raises for a text, or a node, that is not as it must be.
        detail = f"section {section.name.lower()} is damaged: {type(error).__name__}: {error}"
        raise FormatError(detail, path=path) from error
