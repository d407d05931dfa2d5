"""Two files compared, tensor by tensor and piece by piece, whatever their formats and sizes."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from fastsd import api
from fastsd.archive import TensorInfo
from fastsd.errors import FormatError
from fastsd.names import NameRules, Rename
from fastsd.summary import name_of

PathLike = str | os.PathLike[str]

# What is compared at once, as it is computed with. Several such arrays exist at a time.
_BLOCK_BYTES = 8 << 20
# After so many bytes files are opened anew: pages of a mapping count as memory until it is gone.
_WINDOW_BYTES = 64 << 20
# A Python int in a numpy array takes about as many times the room of a float64.
_OBJECT_FACTOR = 8


@dataclass(frozen=True)
class TensorDiff:
    """A tensor that both files have.

    ``compared_as`` is what its values were promoted to, exactly but for integers beyond 2**53
    beside floating point: "int64", "uint64", "integers" (of any size), "float64", "complex128";
    "bits" for the same dtype without arithmetic; None if values were not compared, because of their
    shapes, their dtypes, or as there are none (meta tensors). Counts are then None, too.

    ``differing`` counts elements that are not equal (NaN equals NaN, -0.0 equals 0.0), ``outside``
    those of them beyond the tolerance, and ``nonfinite`` those whose difference is no finite
    number. ``max_abs`` and ``mean_abs`` are of the absolute differences of all other elements,
    the former exact for integers; None for "bits", and if there are no such elements.
    ``bit_identical``: the same dtype, shape and bits; or no data in both.
    """

    name: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    dtype_a: str
    dtype_b: str
    elements: int
    bit_identical: bool
    compared_as: str | None = None
    differing: int | None = None
    outside: int | None = None
    nonfinite: int | None = None
    max_abs: int | float | None = None
    mean_abs: float | None = None


@dataclass(frozen=True)
class Diff:
    """Two files: names that one of them has, and tensors that both have, in the order of A.

    ``different`` names the tensors of both that differ beyond the tolerance, or in what cannot be
    compared; in their dtypes alone only if those count.
    """

    path_a: str
    path_b: str
    only_a: list[str]
    only_b: list[str]
    different: list[str]
    tensors: list[TensorDiff] = field(repr=False)

    @property
    def is_equal(self) -> bool:
        return not (self.only_a or self.only_b or self.different)


def compare(
    a: PathLike,
    b: PathLike,
    *,
    rename: Rename | None = None,
    rtol: float = 0.0,
    atol: float = 0.0,
    ignore_dtypes: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Diff:
    """Compares the tensors of two files that `fastsd.open` reads; plain values are left out.

    Args:
        rename: What tensors are called, in both files, as for `fastsd.load`.
        rtol, atol: Elements differ within the tolerance if abs(a - b) <= atol + rtol * abs(b).
        ignore_dtypes: Tensors may be equal though their dtypes differ.
        on_progress: Called with the bytes compared until now, and of all there are.

    Memory needed: about 128 MiB, whatever the size; a storage that several tensors share is held
    as a whole where files cannot be mapped, as is one that is laid out differently in the
    other file. Raises what `fastsd.open` raises, NamesError where two names become one, and
    FormatError if a file is replaced meanwhile.
    """
    with _Pair(a, b, rename, on_progress or (lambda done, total: None)) as pair:
        tensors = _compare_tensors(pair, rtol, atol)
        return Diff(
            path_a=pair.a.path,
            path_b=pair.b.path,
            only_a=[name for name in pair.a.infos if name not in pair.b.infos],
            only_b=[name for name in pair.b.infos if name not in pair.a.infos],
            different=[tensor.name for tensor in tensors if _is_different(tensor, ignore_dtypes)],
            tensors=tensors,
        )


def _is_different(tensor: TensorDiff, ignore_dtypes: bool) -> bool:
    if tensor.shape_a != tensor.shape_b:
        return True
    if tensor.dtype_a != tensor.dtype_b and not ignore_dtypes:
        return True
    if tensor.compared_as is None:
        return not tensor.bit_identical
    return bool(tensor.outside)


# ---- Files, piece by piece ----


class _Side:
    """One of the files: ``infos`` of its tensors by their new names."""

    def __init__(self, path: PathLike, rename: Rename | None) -> None:
        self.path = os.fsdecode(path)
        self.archive = api.open(path)
        stored = list(self.archive)
        names = NameRules(rename=rename).choose(stored, self.path).names
        self.infos = {new: self.archive.info(name) for new, name in zip(names, stored, strict=True)}

    def read(self, name: str, block: tuple[slice, ...]) -> torch.Tensor:
        part = self.archive.get_slice(self.infos[name].name)[block]
        return part.detach().cpu().resolve_conj().resolve_neg()

    def renew(self, name: str) -> None:
        """Gives pages and cached storages back. Raises FormatError if the tensor has changed."""
        info = self.infos[name]
        self.archive.close()
        self.archive = api.open(self.path)
        if info.name not in self.archive or self.archive.info(info.name) != info:
            raise FormatError("was replaced while it was compared", path=self.path)


class _Pair:
    """Both files, and how far the comparison has come."""

    def __init__(
        self,
        a: PathLike,
        b: PathLike,
        rename: Rename | None,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self.a = _Side(a, rename)
        self.b = _Side(b, rename)
        self.common = [name for name in self.a.infos if name in self.b.infos]
        self._on_progress = on_progress
        self._done = 0
        self._total = sum(self.a.infos[name].nbytes for name in self.common)
        self._in_window = 0

    def __enter__(self) -> _Pair:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.a.archive.close()
        self.b.archive.close()

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        self._on_progress(self._done, self._total)

    def blocks(self, name: str, items_max: int) -> Iterator[tuple[tuple[slice, ...], int]]:
        """Indices of pieces, of at most so many items, of a tensor of the same shape in both; and
        how often each occurs: what is expanded in both files is read once.

        Files are opened anew between pieces, so that nobody may keep what was read of one.
        """
        a, b = self.a.infos[name], self.b.infos[name]
        is_expanded = [x == y == 0 for x, y in zip(a.stride, b.stride, strict=True)]
        expanded = list(zip(a.shape, is_expanded, strict=True))
        times = math.prod(size for size, once in expanded if once)
        shape = [min(size, 1) if once else size for size, once in expanded]
        for block in _split(shape, a.stride, items_max):
            yield block, times
            items = math.prod(index.stop - index.start for index in block)
            self.advance(items * times * a.dtype.itemsize)
            self._in_window += items * (a.dtype.itemsize + b.dtype.itemsize)
            if self._in_window >= _WINDOW_BYTES:
                self._in_window = 0
                self.a.renew(name)
                self.b.renew(name)


def _split(
    shape: Sequence[int], stride: Sequence[int], items_max: int
) -> Iterator[tuple[slice, ...]]:
    """Indices of blocks of at most so many items that cover a tensor, in the order of memory."""
    order = sorted(range(len(shape)), key=lambda i: -stride[i])
    sizes = [1] * len(shape)
    left = items_max
    for dim in reversed(order):
        sizes[dim] = max(1, min(shape[dim], left))
        left //= sizes[dim]
    starts = (range(0, shape[dim], sizes[dim]) for dim in order)
    for begins in itertools.product(*starts):
        begin_of = dict(zip(order, begins, strict=True))
        yield tuple(
            slice(begin_of[dim], min(begin_of[dim] + sizes[dim], size))
            for dim, size in enumerate(shape)
        )


# ---- Values ----

_INTEGERS = {
    getattr(torch, name)
    for name in ("bool", *(f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64)))
    if hasattr(torch, name)  # older releases lack some
}
_UNSIGNED = {dtype for dtype in _INTEGERS if name_of(dtype).startswith(("bool", "uint"))}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


_OPAQUE = "bits"
_FLOATING = ("float64", "complex128")
_META = "meta"  # the device of tensors without data


@dataclass
class _Counts:
    """What is known of the pieces until now, as in `TensorDiff`. ``scaled_sum`` is the sum of the
    differences; but of floating point divided by the number of elements, or it might overflow."""

    is_identical: bool = True
    differing: int = 0
    outside: int = 0
    nonfinite: int = 0
    max_abs: int | float = 0
    scaled_sum: int | float = 0

    def add(self, other: _Counts, times: int) -> None:
        self.is_identical &= other.is_identical
        self.differing += other.differing * times
        self.outside += other.outside * times
        self.nonfinite += other.nonfinite * times
        self.max_abs = max(self.max_abs, other.max_abs)
        self.scaled_sum += other.scaled_sum * times

    def mean(self, elements: int) -> float:
        finite = elements - self.nonfinite
        if isinstance(self.scaled_sum, int):
            return self.scaled_sum / finite
        return min(self.scaled_sum * (elements / finite), self.max_abs)  # rounding may exceed it


@dataclass(frozen=True)
class _Rule:
    """How the values of a tensor are compared; ``common`` as `TensorDiff.compared_as`."""

    common: str
    elements: int
    rtol: float
    atol: float

    @property
    def items_max(self) -> int:
        factor = {"complex128": 2, "integers": _OBJECT_FACTOR}.get(self.common, 1)
        return _BLOCK_BYTES // 8 // factor


def _find_common(a: torch.dtype, b: torch.dtype) -> str | None:
    """What two dtypes are promoted to; None if there is no such thing."""
    if not (_is_number(a) and _is_number(b)):
        return _OPAQUE if a == b else None
    both = {a, b}
    if both <= _INTEGERS:
        if getattr(torch, "uint64", None) not in both:
            return "int64"
        return "uint64" if both <= _UNSIGNED else "integers"
    return "complex128" if a.is_complex or b.is_complex else "float64"


def _is_number(dtype: torch.dtype) -> bool:
    """Whether it has arithmetic; what packs several values into an item has none."""
    if dtype in _INTEGERS or dtype.is_complex:
        return True
    return dtype.is_floating_point and not name_of(dtype).startswith("float4")


def _compare_tensors(pair: _Pair, rtol: float, atol: float) -> list[TensorDiff]:
    """All tensors; those that are tied in both files once."""
    known: dict[tuple[TensorInfo, TensorInfo], TensorDiff] = {}
    tensors = []
    for name in pair.common:
        key = replace(pair.a.infos[name], name=""), replace(pair.b.infos[name], name="")
        if key in known:
            pair.advance(key[0].nbytes)
        else:
            known[key] = _compare_tensor(pair, name, rtol, atol)
        tensors.append(replace(known[key], name=name))
    return tensors


def _compare_tensor(pair: _Pair, name: str, rtol: float, atol: float) -> TensorDiff:
    a, b = pair.a.infos[name], pair.b.infos[name]
    elements = a.shape.numel()
    known = partial(
        TensorDiff,
        name=name,
        shape_a=tuple(a.shape),
        shape_b=tuple(b.shape),
        dtype_a=name_of(a.dtype),
        dtype_b=name_of(b.dtype),
        elements=elements,
    )
    common = _find_common(a.dtype, b.dtype) if a.shape == b.shape else None
    if common is None or _META in (a.device, b.device):
        is_same = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        return known(bit_identical=is_same)
    rule = _Rule(common, elements, rtol, atol)
    counts = _Counts(is_identical=a.dtype == b.dtype)
    for block, times in pair.blocks(name, rule.items_max):
        read = pair.a.read(name, block), pair.b.read(name, block)
        counts.add(_compare_block(*read, rule), times)
        del read
    finite = elements - counts.nonfinite
    has_values = common != _OPAQUE and finite > 0
    return known(
        compared_as=common,
        differing=counts.differing,
        outside=counts.outside,
        nonfinite=counts.nonfinite,
        max_abs=counts.max_abs if has_values else None,
        mean_abs=counts.mean(elements) if has_values else None,
        bit_identical=counts.is_identical,
    )


def _compare_block(a: torch.Tensor, b: torch.Tensor, rule: _Rule) -> _Counts:
    if a.dtype == b.dtype and torch.equal(_bits(a), _bits(b)):
        return _Counts()
    if rule.common == _OPAQUE:
        differing = _count(_bits(a) != _bits(b))
        return _Counts(False, differing, differing)
    if rule.common in _FLOATING:
        dtype = getattr(torch, rule.common)
        return _compare_floating(a.to(dtype), b.to(dtype), rule)
    return _compare_integers(_to_integers(a, rule), _to_integers(b, rule), rule)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.itemsize == 16:
        tensor = torch.view_as_real(tensor)
    return tensor.view(_BITS[tensor.itemsize])


def _compare_floating(a: torch.Tensor, b: torch.Tensor, rule: _Rule) -> _Counts:
    differs = a != b
    gap = (a - b).abs()
    is_infinite = ~gap.isfinite()
    if is_infinite.any():
        differs &= ~_are_same_nan(a, b)
        gap[is_infinite] = 0.0
    outside = differs
    if rule.rtol or rule.atol:
        is_close = (gap <= rule.atol + rule.rtol * b.abs()) & ~is_infinite
        outside = differs & ~is_close
    return _Counts(
        is_identical=False,
        differing=_count(differs),
        outside=_count(outside),
        nonfinite=_count(differs & is_infinite),
        max_abs=float(gap.max()),
        scaled_sum=float(gap.div_(rule.elements).sum()),
    )


def _are_same_nan(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where values are equal if NaN equals NaN; of what is complex in both parts."""
    if a.is_complex():
        return _are_same_nan(torch.view_as_real(a), torch.view_as_real(b)).all(-1)
    return (a == b) | (a.isnan() & b.isnan())


def _count(mask: torch.Tensor) -> int:
    return int(mask.count_nonzero())


def _to_integers(tensor: torch.Tensor, rule: _Rule) -> np.ndarray:
    array: np.ndarray = tensor.reshape(-1).numpy()
    return array.astype(object if rule.common == "integers" else rule.common)


def _compare_integers(a: np.ndarray, b: np.ndarray, rule: _Rule) -> _Counts:
    differs = a != b
    gap = np.maximum(a, b) - np.minimum(a, b)
    if gap.dtype != object:
        gap = gap.view(np.uint64)  # where int64 overflows, this does not
    outside = differs
    if rule.rtol or rule.atol:
        tolerance = rule.atol + rule.rtol * np.abs(b.astype(np.float64))
        outside = differs & ~(gap.astype(np.float64) <= tolerance)
    return _Counts(
        is_identical=False,
        differing=int(differs.sum()),
        outside=int(outside.sum()),
        max_abs=int(gap.max()),
        scaled_sum=_sum_exactly(gap),
    )


def _sum_exactly(gap: np.ndarray) -> int:
    if gap.dtype == object:
        return int(gap.sum())
    high, low = gap >> np.uint64(32), gap & np.uint64(0xFFFFFFFF)
    return (int(high.sum()) << 32) + int(low.sum())
