"""Recognising what torch itself has to read: files of releases before 1.6, tar files; and plain
pickles."""

from __future__ import annotations

_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa85019")  # torch's magic number, pickled as a LONG1
_MAGIC_WITHIN = 32  # behind the protocol and, from protocol 4 on, a frame
_TAR_MAGIC_AT = 257  # POSIX.1-1988, "ustar"


def is_for_torch(first: bytes) -> bool:
    """Whether what starts with these bytes is read by `load`."""
    return is_pickle(first) or _is_tar(first)


def is_pickle(first: bytes) -> bool:
    """Whether it is a pickle, or several."""
    return first[:1] == b"\x80" and first[1:2] <= b"\x05"


def is_plain_pickle(first: bytes) -> bool:
    """Whether it is a pickle that torch.save has not written."""
    return is_pickle(first) and _MAGIC not in first[:_MAGIC_WITHIN]


def _is_tar(first: bytes) -> bool:
    return first[_TAR_MAGIC_AT : _TAR_MAGIC_AT + 5] == b"ustar"
