"""The sections of an archive that are JSON (docs/FORMAT.md); the core reads everything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import IntEnum
from typing import Any

from fastsd import _core
from fastsd.errors import FormatError

ROOT_IS_ORDERED_DICT = 1  # a flag of the file
OWN = "fastsd."  # what keys of metadata start with that are fastsd's own, in safetensors files


class Section(IntEnum):
    """Sections of the header that Python reads."""

    TREE = 6
    STATE_METADATA = 7
    METADATA = 8
    PICKLE = 9
    # Not of this format, but of those that the core reads as if they were.
    BYTE_ORDER = 0x10000
    TORCH_SCRIPT = 0x10001


def encode_metadata(metadata: dict[str, str]) -> bytes:
    """The section for the user's strings. Raises TypeError for anything else."""
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f"metadata maps strings to strings, not {key!r} to {value!r}")
    return json.dumps(metadata, separators=(",", ":")).encode()


def decode_metadata(reader: _core.Reader) -> dict[str, str]:
    """The user's strings; empty if there are none. Not what fastsd itself keeps among them."""
    text = reader.section(Section.METADATA)
    if text is None:
        return {}
    metadata = decode_json(text, Section.METADATA, path=reader.name)
    is_strings = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not is_strings:
        raise FormatError("section metadata does not map strings to strings", path=reader.name)
    if reader.format == "safetensors":
        return {key: value for key, value in metadata.items() if not key.startswith(OWN)}
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
