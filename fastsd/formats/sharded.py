"""Checkpoints in several files, with an index: Hugging Face's convention.

`model.safetensors.index.json` holds {"metadata": {...}, "weight_map": {tensor: file}}; the files
lie beside it (https://huggingface.co/docs/transformers/big_models#sharded-checkpoints).
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fastsd import _core
from fastsd.errors import FormatError, LimitError, UnsupportedError

_INDEX_BYTES_MAX = 64 << 20  # those of the largest models have ten
_FILES_MAX = 1 << 16
# What a directory holds that is one model, the preferred first.
_WEIGHTS = (
    "model.fsd",
    "model.safetensors",
    "pytorch_model.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
)


class Shards(NamedTuple):
    """An index: which file each tensor is in. Without one, ``tensors`` is empty."""

    path: str
    files: list[str]
    tensors: dict[str, str]


def find_shards(path: str) -> Shards:
    """What a directory holds: the files of an index, or the one file with a usual name.

    Raises IsADirectoryError for a directory without either, and FormatError for one with several
    indexes, and as `read_index` does.
    """
    directory = Path(path)
    for name in _WEIGHTS:
        index = directory / f"{name}.index.json"
        if index.is_file():
            return read_index(str(index))
        if (directory / name).is_file():
            return Shards(path, [_check_within(directory, name, path)], {})
    others = sorted(other for other in directory.glob("*.index*.json") if other.is_file())
    if len(others) == 1:
        return read_index(str(others[0]))
    if others:
        names = ", ".join(index.name for index in others)
        raise FormatError(f"holds several indexes: name one of {names}", path=path)
    raise IsADirectoryError(
        errno.EISDIR,
        "a directory without an index of shards (*.index.json) or a file with a usual name "
        f"({_WEIGHTS[1]}, {_WEIGHTS[2]}...)",
        path,
    )


def read_index(path: str) -> Shards:
    """Reads an index. Raises FormatError for one that is damaged, or names files elsewhere."""
    try:
        index = json.loads(_read_regular(path), object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the index is no JSON: {error}", path=path) from None
    tensors = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(tensors, dict):
        raise FormatError('not an index of shards: it has no "weight_map"', path=path)
    strange = next((name for name, file in tensors.items() if not isinstance(file, str)), None)
    if strange is not None:
        raise FormatError(f'the index gives no file name for "{strange}"', path=path)
    names = dict.fromkeys(tensors.values())
    if not names:
        raise FormatError("the index names no files", path=path)
    if len(names) > _FILES_MAX:
        raise LimitError(f"the index names {len(names)} files, more than {_FILES_MAX}", path=path)
    places = {name: _check_within(Path(path).parent, name, path) for name in names}
    return Shards(path, list(places.values()), {n: places[file] for n, file in tensors.items()})


def _read_regular(path: str) -> bytes:
    # O_NONBLOCK: a FIFO is refused rather than waited for.
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UnsupportedError("an index that is not a regular file", path=path)
        if status.st_size > _INDEX_BYTES_MAX:
            detail = f"an index of {status.st_size} bytes, more than {_INDEX_BYTES_MAX}"
            raise LimitError(detail, path=path)
        return file.read(_INDEX_BYTES_MAX)


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a name occurs twice in an object")
    return members


def _check_within(directory: Path, name: str, path: str) -> str:
    """The file's path. Raises FormatError for one that leaves the directory.

    Links may lead where the cache of huggingface_hub has them lead: from below snapshots/REVISION
    to blobs/ beside snapshots/.
    """
    if not name or "\0" in name or "\\" in name or os.path.isabs(name) or ".." in Path(name).parts:
        raise FormatError(f"names a file outside of its directory: {name!r}", path=path)
    try:
        home = directory.resolve()
        real = (directory / name).resolve()
    except (ValueError, RuntimeError) as error:  # no name that can be; links that lead in a circle
        raise FormatError(f"names a file that cannot be, {name!r}: {error}", path=path) from None
    caches = [parent.parent for parent in home.parents if parent.name == "snapshots"]
    allowed = [home, *(cache / "blobs" for cache in caches)]
    if not any(real.is_relative_to(root) for root in allowed):
        raise FormatError(f"{name!r} is a link that leads out of its directory", path=path)
    return str(directory / name)


def open_shards(shards: Shards, open_reader: Callable[[str], _core.Reader]) -> list[_core.Reader]:
    """A reader for each file. Raises FormatError where index and files disagree, and OSError."""
    readers = [_open_one(shards, file, open_reader) for file in shards.files]
    found: dict[str, str] = {}
    for file, reader in zip(shards.files, readers, strict=True):
        for name in reader.names():
            if name in found:
                raise FormatError(
                    f'tensor "{name}" is in two shards, {found[name]} and {file}', path=shards.path
                )
            found[name] = file
    _check_complete(shards, found)
    return readers


def _open_one(
    shards: Shards, file: str, open_reader: Callable[[str], _core.Reader]
) -> _core.Reader:
    try:
        return open_reader(file)
    except FileNotFoundError:
        raise FileNotFoundError(
            errno.ENOENT, f"a shard is missing, which {shards.path} names", file
        ) from None


def _check_complete(shards: Shards, found: dict[str, str]) -> None:
    missing = [name for name, file in shards.tensors.items() if found.get(name) != file]
    if missing:
        name = missing[0]
        raise FormatError(
            f'{len(missing)} tensors are not where the index says: "{name}" is not in '
            f"{shards.tensors[name]}",
            path=shards.path,
        )
