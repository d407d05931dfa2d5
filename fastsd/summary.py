"""What is in a file, without reading a tensor: names, dtypes, shapes, sharing, totals."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from fastsd import api
from fastsd.archive import TensorInfo
from fastsd.errors import FastsdError


@dataclass(frozen=True)
class TensorSummary:
    """A tensor of a file.

    ``dtype`` is torch's name without "torch."; ``stride`` counts items; ``nbytes`` are those of all
    elements. ``shares_with`` is the first tensor in the same storage, None for that one itself;
    ``is_tied``: it is also the same elements of it. ``device`` and ``requires_grad`` are what was
    saved.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    is_contiguous: bool
    nbytes: int
    storage: int
    shares_with: str | None
    is_tied: bool
    device: str
    requires_grad: bool
    crc32c: int | None


@dataclass
class Total:
    """How many tensors, and their bytes, with tied ones counted once."""

    tensors: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class Summary:
    """A file. ``version`` is that of its container and ``file_bytes`` its size, None where there is
    no such thing (a directory). ``storage_bytes`` is what the file holds of tensors. Of
    ``storages``, ``checksummed`` have a checksum; meta storages and empty ones need none and count
    as if they had. ``by_prefix`` has the names up to their first dot, and "" for those without one.
    ``unsafe_globals`` are what a pickle in the file needs and ``weights_only=True`` refuses;
    ``pickle_problem`` says why that could not be told.
    """

    path: str
    format: str
    version: str | None
    file_bytes: int | None
    storages: int
    storage_bytes: int
    checksummed: int
    total: Total
    by_dtype: dict[str, Total]
    by_prefix: dict[str, Total]
    metadata: dict[str, str]
    unsafe_globals: list[str]
    pickle_problem: str | None
    tensors: list[TensorSummary] = field(repr=False)


def summarize(path: str | os.PathLike[str]) -> Summary:
    """Describes a file that `fastsd.open` reads. Raises what that raises; loads nothing."""
    with api.open(path) as archive:
        try:
            infos = [archive.info(name) for name in archive]
        except FastsdError as error:
            error.path = error.path or os.fsdecode(path)
            raise
        metadata = archive.metadata
        format_, version = archive.format, archive.version
    tensors = _find_shared(infos)
    storages = {info.storage: info for info in infos}
    unsafe_globals, problem = _find_unsafe_globals(path)
    return Summary(
        path=os.fsdecode(path),
        format=format_,
        version=".".join(map(str, version)) if version else None,
        file_bytes=None if os.path.isdir(path) else os.stat(path).st_size,
        storages=len(storages),
        storage_bytes=sum(s.storage_nbytes for s in storages.values() if s.device != "meta"),
        checksummed=sum(not _lacks_checksum(info) for info in storages.values()),
        total=_add_up(tensors, lambda _: "").get("", Total()),
        by_dtype=_add_up(tensors, lambda tensor: tensor.dtype),
        by_prefix=_add_up(tensors, lambda tensor: _prefix_of(tensor.name)),
        metadata=metadata,
        unsafe_globals=unsafe_globals,
        pickle_problem=problem,
        tensors=tensors,
    )


def name_of(dtype: torch.dtype) -> str:
    """torch's name of a dtype, without "torch."."""
    return str(dtype).removeprefix("torch.")


def _lacks_checksum(info: TensorInfo) -> bool:
    return not info.has_checksum and info.storage_nbytes > 0 and info.device != "meta"


def _find_shared(infos: Iterable[TensorInfo]) -> list[TensorSummary]:
    first_of: dict[int, TensorInfo] = {}
    return [_summarize(info, first_of.setdefault(info.storage, info)) for info in infos]


def _summarize(info: TensorInfo, first: TensorInfo) -> TensorSummary:
    return TensorSummary(
        name=info.name,
        dtype=name_of(info.dtype),
        shape=tuple(info.shape),
        stride=info.stride,
        is_contiguous=_is_contiguous(info.shape, info.stride),
        nbytes=info.nbytes,
        storage=info.storage,
        shares_with=None if info is first else first.name,
        is_tied=info is not first and _elements(info) == _elements(first),
        device=info.device,
        requires_grad=info.requires_grad,
        crc32c=info.crc32c,
    )


def _elements(info: TensorInfo) -> tuple[object, ...]:
    return info.dtype, info.shape, info.stride, info.storage_offset


def _is_contiguous(shape: Iterable[int], stride: Iterable[int]) -> bool:
    if 0 in (shape := tuple(shape)):
        return True
    expected = 1
    for size, step in zip(reversed(shape), reversed(tuple(stride)), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _add_up(
    tensors: Iterable[TensorSummary], key: Callable[[TensorSummary], str]
) -> dict[str, Total]:
    """Totals by what ``key`` gives, the largest first."""
    totals: dict[str, Total] = {}
    for tensor in tensors:
        total = totals.setdefault(key(tensor), Total())
        total.tensors += 1
        total.nbytes += 0 if tensor.is_tied else tensor.nbytes
    return dict(sorted(totals.items(), key=lambda item: -item[1].nbytes))


def _prefix_of(name: str) -> str:
    prefix, dot, _ = name.partition(".")
    return prefix if dot else ""


def _find_unsafe_globals(path: str | os.PathLike[str]) -> tuple[list[str], str | None]:
    if os.path.isdir(path):
        return [], None
    try:
        return api.get_unsafe_globals_in_checkpoint(path), None
    except (FastsdError, pickle.UnpicklingError) as error:
        return [], str(error)
