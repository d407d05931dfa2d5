"""What a file is, by its content; its suffix counts only where the content leaves it open."""

from __future__ import annotations

import tarfile
import zipfile
from enum import Enum
from pathlib import PurePosixPath
from typing import IO

_FSD_MAGIC = b"\x8fFSD"
_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa85019")  # torch's, pickled as a LONG1
_FIRST_BYTES = 512
_SAFETENSORS_HEADER_BYTES_MAX = 100_000_000  # safetensors' own limit
# Whatever else is under these names was meant to be a checkpoint: a truncated download, a pointer.
_CERTAIN = frozenset((".pth", ".pt", ".ckpt", ".safetensors", ".fsd"))
# Pickles under other names are left alone.
CHECKPOINT_SUFFIXES = _CERTAIN | {".bin", ".pkl", ".pickle", ".tar", ".th", ".model", ".weights"}


class Form(Enum):
    """What has to be done to read something; the value is how a plan names it."""

    FSD = "fsd"
    SAFETENSORS = "safetensors"
    TORCH_ZIP = "torch"
    LEGACY = "torch, legacy"
    PICKLE = "pickle"
    SHARDED = "sharded"
    DCP = "distributed"
    UNKNOWN = "unknown"

    @property
    def is_mapped(self) -> bool:
        """Whether it is converted in bounded memory, rather than loaded whole."""
        return self in (Form.FSD, Form.SAFETENSORS, Form.TORCH_ZIP, Form.SHARDED)


def recognise_file(name: str, file: IO[bytes]) -> Form | None:
    """What a file is that stands at its beginning; None for one that is no checkpoint.

    UNKNOWN is what its name says is one, and its content does not. Raises OSError.
    """
    first = file.read(_FIRST_BYTES)
    suffix = PurePosixPath(name).suffix.lower()
    form = _recognise_bytes(first, suffix, file)
    if form is None and suffix in _CERTAIN:
        return Form.UNKNOWN
    return form


def _recognise_bytes(first: bytes, suffix: str, file: IO[bytes]) -> Form | None:
    if first.startswith(_FSD_MAGIC):
        return Form.FSD
    if first.startswith(_ZIP_MAGIC):
        return _recognise_zip(file)
    if first[8:9] == b"{" and int.from_bytes(first[:8], "little") <= _SAFETENSORS_HEADER_BYTES_MAX:
        return Form.SAFETENSORS
    if first[:1] == b"\x80" and first[1:2] <= b"\x05":
        if _LEGACY_MAGIC in first[:32]:
            return Form.LEGACY
        return Form.PICKLE if suffix in CHECKPOINT_SUFFIXES else None
    if first[257:262] == b"ustar":
        return _recognise_tar(file)
    return None


def _recognise_zip(file: IO[bytes]) -> Form | None:
    try:
        file.seek(0)
        with zipfile.ZipFile(file) as records:
            is_torch = any(name.endswith("/data.pkl") for name in records.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return None
    return Form.TORCH_ZIP if is_torch else None


def _recognise_tar(file: IO[bytes]) -> Form | None:
    try:
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as members:
            first = members.next()
    except (tarfile.TarError, ValueError):
        return None
    is_torch = first is not None and first.name in ("sys_info", "pickle", "storages", "tensors")
    return Form.LEGACY if is_torch else None
