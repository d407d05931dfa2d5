"""What happens to an object on the way from one file to another: parts of it, names, dtypes."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fastsd import _core
from fastsd.errors import NamesError, UnsupportedError
from fastsd.layouts import Layout, kinds_of, recognise
from fastsd.tree import Opaque

_CHUNK_ITEMS = 4 << 20  # of a tensor that is cast: at most 32 MiB at a time
_SLAB_BYTES = 64 << 20
_ALIGN_BYTES = 64
_CAST = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def describe(obj: object) -> Layout:
    """The layout of a loaded object; "object" if it is no dictionary."""
    if not isinstance(obj, Mapping):
        return Layout("object")
    tensors = [key for key, value in obj.items() if isinstance(value, torch.Tensor)]
    inner = next(iter(_weights_of(obj)), None)
    names = tensors if inner is None else [f"{inner}.{name}" for name in map(str, obj[inner])]
    return recognise(kinds_of(obj, torch.Tensor), map(str, names))


def _weights_of(obj: Mapping[Any, Any]) -> list[str]:
    pick = recognise(kinds_of(obj, torch.Tensor)).pick
    return [pick] if pick is not None and isinstance(obj[pick], Mapping) else []


def pick_part(obj: Any, key: str, path: str) -> Any:
    """What stands under ``key``: keys on the way, joined by dots. Of a module its state_dict.

    Raises NamesError where there is nothing.
    """
    part = obj
    rest = key
    while rest:
        if not isinstance(part, Mapping):
            raise NamesError(f"nothing to pick {rest!r} from: a {type(part).__name__}", path=path)
        # A key may hold dots itself: the longest that fits is taken.
        fits = [k for k in part if isinstance(k, str) and f"{rest}.".startswith(f"{k}.")]
        if not fits:
            there = ", ".join(repr(k) for k in list(part)[:10])
            raise NamesError(f"there is no {rest!r} to pick; there are {there}", path=path)
        found = max(fits, key=len)
        part = part[found]
        rest = rest[len(found) + 1 :]
    return part.state_dict() if isinstance(part, torch.nn.Module) else part


def find_opaque(obj: Any) -> bool:
    """Whether something in it is known to an unpickler only."""
    if isinstance(obj, Mapping):
        return any(find_opaque(value) for value in obj.values())
    if isinstance(obj, (list, tuple)):
        return any(find_opaque(value) for value in obj)
    return isinstance(obj, Opaque)


def drop_keys(obj: Any, keys: tuple[str, ...]) -> Any:
    """The dictionary without these keys, of the same type; the object itself is left as it is."""
    if not keys:
        return obj
    return type(obj)((key, value) for key, value in obj.items() if key not in keys)


def strip_prefix(obj: Any, prefix: str, path: str) -> Any:
    """A dictionary whose keys have lost ``prefix`` where they start with it, `_metadata` included.

    Raises NamesError if none does, or two keys become one.
    """
    if not isinstance(obj, Mapping):
        raise NamesError(f"no names to strip {prefix!r} from", path=path)
    stripped: OrderedDict[Any, Any] = OrderedDict()
    for key, value in obj.items():
        new = key.removeprefix(prefix) if isinstance(key, str) else key
        if new in stripped:
            raise NamesError(f'stripping {prefix!r} makes two keys "{new}"', path=path)
        stripped[new] = value
    if all(key in stripped for key in obj):
        raise NamesError(f"no key starts with {prefix!r}", path=path)
    metadata = getattr(obj, "_metadata", None)
    if isinstance(metadata, Mapping):
        kept = [(f"{module}.".removeprefix(prefix), value) for module, value in metadata.items()]
        vars(stripped)["_metadata"] = OrderedDict((m.removesuffix("."), value) for m, value in kept)
        return stripped
    return stripped if isinstance(obj, OrderedDict) else dict(stripped)


class Caster:
    """Casts floating point tensors, piece by piece, into nameless files: memory stays bounded.

    ``readers`` are those of mapped files that the tensors lie in, which nobody has edited in
    memory. Tensors over one storage share one again. float8 and narrower types, which go with
    scales of their own, and integers stay as they are.
    """

    def __init__(
        self, dtype: torch.dtype, directory: str, readers: Sequence[_core.Reader] = ()
    ) -> None:
        if dtype not in _CAST:
            names = ", ".join(sorted(str(t).removeprefix("torch.") for t in _CAST))
            raise ValueError(f"dtype must be one of {names}, not {dtype}")
        self._dtype = dtype
        self._readers = readers
        self._slabs = _Slabs(directory)
        self._storages: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        self._done: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def cast(self, obj: Any) -> Any:
        """The object with its tensors cast, in dictionaries, lists and tuples; others are shared.

        Raises UnsupportedError for a tensor that is not dense, and OSError.
        """
        if isinstance(obj, torch.Tensor):
            return self._cast_tensor(obj)
        if isinstance(obj, Mapping):
            items = [(key, self.cast(value)) for key, value in obj.items()]
            if type(obj) is not OrderedDict:
                return dict(items)
            ordered = OrderedDict(items)
            vars(ordered).update(vars(obj))
            return ordered
        if type(obj) in (list, tuple):
            return type(obj)([self.cast(value) for value in obj])
        return obj

    def _cast_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype not in _CAST or tensor.dtype == self._dtype:
            return tensor
        if id(tensor) not in self._done:
            # The original is kept, so that nothing else gets its identity.
            self._done[id(tensor)] = (tensor, self._cast_view(tensor))
        return self._done[id(tensor)][1]

    def _cast_view(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout != torch.strided or tensor.is_meta:
            raise UnsupportedError(f"a tensor of layout {tensor.layout} cannot be cast here")
        base = self._cast_storage(tensor.detach())
        view = torch.empty(0, dtype=self._dtype)
        place = int(tensor.storage_offset())
        view.set_(base.untyped_storage(), place, tensor.shape, tensor.stride())
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(view, tensor.requires_grad)
        return view.requires_grad_(tensor.requires_grad)

    def _cast_storage(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), tensor.dtype)
        if key not in self._storages:
            items = storage.nbytes() // tensor.itemsize
            flat = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (items,), (1,))
            self._storages[key] = self._spool(flat)
        return self._storages[key]

    def _spool(self, flat: torch.Tensor) -> torch.Tensor:
        """A cast copy over pages of a file."""
        copy = self._slabs.take(flat.numel(), self._dtype)
        for source, target in zip(flat.split(_CHUNK_ITEMS), copy.split(_CHUNK_ITEMS), strict=True):
            target.copy_(source)
            for reader in self._readers:
                reader.drop_pages()
            self._slabs.drop_pages()
        return copy


class _Slabs:
    """Memory that is the pages of nameless files, so that the system can put it on the disk."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, items: int, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialized memory for a tensor of rank 1, with a storage of its own."""
        nbytes = items * dtype.itemsize
        if nbytes > self._slab.numel() - self._used:
            self._slab = self._make(max(nbytes, _SLAB_BYTES))
            self._used = 0
        part = self._slab.untyped_storage()[self._used : self._used + nbytes]
        self._used += -(-nbytes // _ALIGN_BYTES) * _ALIGN_BYTES
        return torch.empty(0, dtype=dtype).set_(part, 0, (items,), (1,))

    def drop_pages(self) -> None:
        """Takes out of this process what the page cache, or the disk, has."""
        self._pages.madvise(mmap.MADV_DONTNEED)

    def _make(self, nbytes: int) -> torch.Tensor:
        with tempfile.TemporaryFile(dir=self._directory) as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)  # a full disk is an error, not a signal
            self._pages = mmap.mmap(file.fileno(), nbytes)
        return torch.frombuffer(self._pages, dtype=torch.uint8)


def arrays_to_tensors(obj: Any) -> Any:
    """A flat dictionary's numpy arrays as tensors that share their memory."""
    if not isinstance(obj, Mapping) or not any(isinstance(v, np.ndarray) for v in obj.values()):
        return obj
    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in obj.items()}


def directory_of(target: str) -> str:
    """Where temporary files for a target go: beside it."""
    return os.path.dirname(os.path.abspath(target))
