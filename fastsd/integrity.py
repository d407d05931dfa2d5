"""Files and trees of files, checked: their structure, and their checksums where there are any."""

from __future__ import annotations

import os
import pickle
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from fastsd import api
from fastsd.errors import ChecksumError, FastsdError
from fastsd.formats.dcp import METADATA_NAME, SHARD_SUFFIX

PathLike = str | os.PathLike[str]
Status = Literal["good", "damaged", "unreadable", "skipped"]

# A file that starts, or is named, so is one of ours, whatever else is wrong with it.
_FSD = b"\x8fFSD"
_ZIP = b"PK\x03\x04"
_ZIP_NAME_AT = 30
_INDEX_SUFFIX = ".index.json"
_SUFFIXES = (".fsd", ".safetensors", _INDEX_SUFFIX)
_FIRST_BYTES = 512


@dataclass(frozen=True)
class FileCheck:
    """What was found of a file.

    ``status``: "good"; "damaged", or named by the caller and not of a format that `fastsd.open`
    knows; "unreadable", which the system refused to read; "skipped", which a tree holds and
    `fastsd.open` does not know. ``error`` says why, and ``damaged`` names the tensors whose bytes
    are not what was written. ``checked_bytes`` agree with their checksums; ``unchecked`` names the
    tensors that have none, so that only their place in the file was checked. ``shards`` are the
    files that an index of such leads to.
    """

    path: str
    status: Status
    file_bytes: int | None = None
    format: str | None = None
    tensors: int | None = None
    checked_bytes: int = 0
    unchecked: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def is_bad(self) -> bool:
        return self.status in ("damaged", "unreadable")


def verify_file(path: PathLike, *, is_certain: bool = True) -> FileCheck:
    """Reads a file, or a directory that `fastsd.open` takes for one, and checks what can be.

    Whatever is wrong with it is in the result, and not raised. ``is_certain``: that it is of a
    format that `fastsd.open` knows; else a file of another is skipped, and of an index the shards
    are not read.
    """
    known = FileCheck(os.fsdecode(path), "good")
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode):
            known = replace(known, file_bytes=status.st_size)
        with api.open(path) as archive:
            known = replace(known, format=archive.format, tensors=len(archive))
            if known.path.endswith(_INDEX_SUFFIX):
                known = replace(known, shards=list(archive.files))
            if known.shards and not is_certain:
                return known
            report = archive.verify()
        unchecked = list(report.unchecked)
        return replace(known, checked_bytes=report.checked_nbytes, unchecked=unchecked)
    except OSError as error:
        return replace(known, status="unreadable", error=error.strerror or str(error))
    except ChecksumError as error:
        affected = list(error.tensors)
        return replace(known, status="damaged", error=error.detail, damaged=affected)
    except (FastsdError, pickle.UnpicklingError, ValueError, RuntimeError) as error:
        is_ours = is_certain or known.format is not None or _claims_to_be_ours(known.path)
        detail = error.detail if isinstance(error, FastsdError) else str(error)
        return replace(known, status="damaged" if is_ours else "skipped", error=detail)


def verify_tree(path: PathLike) -> Iterator[FileCheck]:
    """Checks each regular file below a directory, by name and once, whatever links lead to it.

    Links to directories are not followed. Of an index of shards only its own structure is checked,
    and that all that it promises is there: the shards are files below the directory themselves.
    """
    seen: set[tuple[int, int]] = set()
    unreadable: list[OSError] = []
    for folder, folders, names in os.walk(path, onerror=unreadable.append):
        folders.sort()
        if METADATA_NAME in names and any(name.endswith(SHARD_SUFFIX) for name in names):
            error = "is one of torch.distributed.checkpoint, which has no checksums"
            yield FileCheck(folder, "skipped", error=error)
            continue
        for name in sorted(names):
            file = os.path.join(folder, name)
            try:
                status = os.stat(file)
            except OSError as error:
                yield FileCheck(file, "skipped", error=error.strerror)
                continue
            if not stat.S_ISREG(status.st_mode):
                yield FileCheck(file, "skipped", error="is no regular file")
            elif (identity := (status.st_dev, status.st_ino)) not in seen:
                seen.add(identity)
                yield verify_file(file, is_certain=False)
    for refusal in unreadable:
        yield FileCheck(str(refusal.filename), "unreadable", error=refusal.strerror)


def _claims_to_be_ours(path: str) -> bool:
    if path.lower().endswith(_SUFFIXES):
        return True
    with open(path, "rb") as file:
        first = file.read(_FIRST_BYTES)
    if first.startswith(_ZIP):  # of all kinds of zip file torch's start with such a name
        return b"/data.pkl" in first[_ZIP_NAME_AT:] or b"/.format_version" in first[_ZIP_NAME_AT:]
    return first.startswith(_FSD)
