"""Whether a file holds what was written to it, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from fastsd import _core, pickled
from fastsd.errors import ChecksumError, UnsupportedError
from fastsd.formats import fsd
from fastsd.formats.detect import open_any
from fastsd.pieces import Pieces, list_mapped, split_bytes
from fastsd.restore import restore
from fastsd.saving import Format
from fastsd.tensors import CPU
from fastsd.tree import flatten


class Parts(NamedTuple):
    """An object taken apart: its tensors by name, and a description of all else."""

    description: tuple[object, ...]
    tensors: dict[str, Any]


def take_apart(obj: Any, format: Format) -> Parts:
    """The parts of an object, as a file of a format has them. Raises what torch.save raises."""
    if format != "pth":
        try:
            return _take_plain(obj, has_order=format == "fsd")
        except UnsupportedError:
            pass  # to be pickled
    return take_pickled(pickled.dump(obj, None, None))


def take_pickled(parts: pickled.Pickled) -> Parts:
    """The parts of a pickle: its storages, and the stream."""
    order = dict(parts.records).get("byteorder", b"little")
    order = order.encode() if isinstance(order, str) else order
    return Parts((parts.stream, order), dict(parts.storages))


def _take_plain(obj: Any, *, has_order: bool) -> Parts:
    flat = flatten(obj)
    # safetensors files have names that are tied to others last.
    names = tuple(flat.names) if has_order else frozenset(flat.names)
    description = (names, flat.tree, flat.is_ordered, flat.state_metadata)
    return Parts(description, dict(zip(flat.names, flat.tensors, strict=True)))


def _take_file(reader: _core.Reader, *, is_pickled: bool) -> Parts:
    if not is_pickled:
        obj = restore([reader], CPU, pickled.Unpickling())[0]
        return _take_plain(obj, has_order=reader.format == "fsd")
    order = reader.section(fsd.Section.BYTE_ORDER) or b"little"
    return Parts((reader.section(fsd.Section.PICKLE), order), dict(reader.load_storages()))


def check_file(
    path: str,
    wanted: Parts,
    metadata: Mapping[str, str],
    mapped: Iterable[_core.MappedFile],
    on_compared: Callable[[int], None],
) -> None:
    """Reads a file again, and ``wanted`` from the files that are ``mapped``.

    Raises ChecksumError, which names the tensors, for one that does not hold it.
    """
    with open_any(path, True) as opened:
        (reader,) = opened.readers
        is_pickled = len(wanted.description) == 2
        is_exact = reader.format != "safetensors"  # keeps values, and not how they lie in memory
        found = _take_file(reader, is_pickled=is_pickled)
        compare = _Comparison([*mapped, *list_mapped(opened.readers)], is_exact, on_compared)
        different = [
            name
            for name, value in wanted.tensors.items()
            if not compare.is_same(value, found.tensors.get(name))
        ]
        is_described = found.description == wanted.description
        has_metadata = fsd.decode_metadata(reader) == metadata
    if different:
        named = ", ".join(different[:10])
        detail = f"{len(different)} tensors are not what was written: {named}"
        raise ChecksumError(detail, path=path, tensors=tuple(different))
    if not is_described or not has_metadata:
        what = "what is beside the tensors" if has_metadata else "the metadata"
        raise ChecksumError(f"{what} is not what was written", path=path)


class _Comparison:
    """Two tensors at a time, in bounded memory."""

    def __init__(
        self,
        mapped: list[_core.MappedFile],
        is_exact: bool,
        on_compared: Callable[[int], None],
    ) -> None:
        self._wanted = Pieces(mapped)
        self._found = Pieces(mapped)
        self._is_exact = is_exact
        self._on_compared = on_compared

    def is_same(self, wanted: Any, found: Any) -> bool:
        wanted, found = _as_tensor(wanted), _as_tensor(found)
        if found is None or found.dtype != wanted.dtype or found.shape != wanted.shape:
            return False
        if self._is_exact and _describe(wanted) != _describe(found):
            return False
        if not self._is_exact:
            wanted = wanted.detach().resolve_conj().resolve_neg()
        if wanted.is_meta:
            return True
        for ours, theirs in zip(split_bytes(wanted), split_bytes(found), strict=True):
            if not torch.equal(self._wanted.fetch(ours), self._found.fetch(theirs)):
                return False
            self._on_compared(ours.nbytes)
        return True


def _as_tensor(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.require(value, requirements=["C", "W"]))
    if isinstance(value, torch.UntypedStorage):
        return torch.empty(0, dtype=torch.uint8).set_(value)
    return value


def _describe(tensor: torch.Tensor) -> tuple[object, ...]:
    flags = tensor.requires_grad, tensor.is_conj(), tensor.is_neg(), tensor.is_meta
    return type(tensor), tensor.stride(), *flags
