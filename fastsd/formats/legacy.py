"""What torch itself has to read: files of releases before 1.6, tar files, TorchScript archives; and
plain pickles, which are read only on trust."""

from __future__ import annotations

import pickle
from typing import Any

import torch

from fastsd.errors import FormatError
from fastsd.files import Source

_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa85019")  # torch's magic number, pickled as a LONG1
_MAGIC_WITHIN = 32  # behind the protocol and, from protocol 4 on, a frame
_TAR_MAGIC_AT = 257  # POSIX.1-1988, "ustar"


def is_for_torch(first: bytes) -> bool:
    """Whether what starts with these bytes is read by `load`."""
    return _is_pickle(first) or _is_tar(first)


def _is_pickle(first: bytes) -> bool:
    return first[:1] == b"\x80" and first[1:2] <= b"\x05"


def _is_tar(first: bytes) -> bool:
    return first[_TAR_MAGIC_AT : _TAR_MAGIC_AT + 5] == b"ustar"


def load(
    source: Source,
    map_location: Any,
    *,
    weights_only: bool,
    pickle_module: Any,
    load_args: dict[str, Any],
) -> Any:
    """The object that torch, or for a plain pickle Python, finds in it.

    Raises what torch.load raises, and FormatError for a plain pickle that is not trusted.
    """
    first = source.peek()
    if _is_pickle(first) and _MAGIC not in first[:_MAGIC_WITHIN]:
        return _load_plain(source, weights_only, pickle_module, load_args)
    with source.open_stream() as stream:
        return torch.load(
            stream,
            map_location,
            None if weights_only else pickle_module,
            weights_only=weights_only,
            mmap=False,
            **({} if weights_only else load_args),
        )


def _load_plain(
    source: Source, weights_only: bool, pickle_module: Any, load_args: dict[str, Any]
) -> Any:
    if weights_only:
        raise FormatError(
            "it is a pickle that torch.save did not write, and reading it may run any code: pass "
            "weights_only=False only if you trust its source",
            path=source.name,
        )
    with source.open_stream() as stream:
        return (pickle_module or pickle).load(stream, **load_args)
