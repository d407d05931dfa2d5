"""Casting the tensors of an object without holding them in memory."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fastsd import _core, pickled
from fastsd.errors import FastsdError, UnsupportedError
from fastsd.pieces import PIECE_BYTES, Pieces
from fastsd.tree import flatten
from fastsd.upload import check_dtype, is_cast

_SLAB_BYTES = 64 << 20
_ALIGN_BYTES = 64
_PIECE_ITEMS = PIECE_BYTES // 8  # of the widest dtype


class _Done(NamedTuple):
    original: object  # kept, so that nothing else gets its identity
    changed: Any


class Caster:
    """Casts floating point tensors, piece by piece, into nameless files in ``directory``.

    ``mapped`` are mapped files that the tensors lie in, which nobody has edited in memory. float8
    and narrower types, which go with scales of their own, other types and numpy arrays stay as they
    are. ``on_cast`` is told of bytes that are done.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        directory: str,
        mapped: Sequence[_core.MappedFile] = (),
        on_cast: Callable[[int], None] = lambda nbytes: None,
    ) -> None:
        check_dtype(dtype)
        self._dtype = dtype
        self._pieces = Pieces(mapped)
        self._buffer = torch.empty(
            _PIECE_ITEMS, dtype=dtype
        )  # one for all: heaps keep what is freed
        self._spool = _Spool(directory)
        self._on_cast = on_cast
        self._storages: dict[tuple[int, int, torch.dtype], torch.UntypedStorage] = {}
        self._dtypes: dict[tuple[int, int], tuple[torch.dtype, str]] = {}
        self._done: dict[int, _Done] = {}

    def cast(self, obj: Any) -> Any:
        """The object with its tensors cast, in dictionaries, lists and tuples, of the same types
        and with the same attributes. What occurs twice still does, and tensors over one storage
        share one again.

        Raises UnsupportedError, which names the place, for tensors that are sparse or of a
        subclass, that share memory with others of another dtype, or are in objects of other kinds;
        and OSError.
        """
        try:
            return self._cast(obj, "")
        finally:
            self._spool.close()

    @property
    def mapped(self) -> list[_core.MappedFile]:
        """The files that the cast tensors lie in."""
        return self._spool.mapped

    def _cast(self, obj: Any, place: str) -> Any:
        if isinstance(obj, torch.Tensor) or type(obj) in (list, tuple) or isinstance(obj, dict):
            if id(obj) not in self._done:
                self._done[id(obj)] = _Done(obj, None)
                self._done[id(obj)] = _Done(obj, self._cast_once(obj, place))
            if self._done[id(obj)].changed is None:
                raise UnsupportedError(f"{place!r} contains itself, and cannot be cast")
            return self._done[id(obj)].changed
        _check_no_tensors(obj, place)
        return obj

    def _cast_once(self, obj: Any, place: str) -> Any:
        if isinstance(obj, torch.Tensor):
            return self._cast_tensor(obj, place)
        if isinstance(obj, dict):
            changed = copy.copy(obj)
            for key, value in obj.items():
                changed[key] = self._cast(value, _join(place, key))
            return changed
        return type(obj)([self._cast(value, _join(place, i)) for i, value in enumerate(obj)])

    def _cast_tensor(self, tensor: torch.Tensor, place: str) -> torch.Tensor:
        if tensor.layout == torch.strided and not tensor.is_meta:
            self._check_sharing(tensor, place)
        if not is_cast(tensor.dtype) or tensor.dtype == self._dtype:
            return tensor
        is_known = type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_nested
        if tensor.layout != torch.strided or not is_known:
            raise UnsupportedError(
                f"{place!r} cannot be cast: a {type(tensor).__name__} of layout {tensor.layout}"
            )
        view = tensor.detach().to(self._dtype) if tensor.is_meta else self._cast_view(tensor)
        if isinstance(tensor, torch.nn.Parameter):
            view = torch.nn.Parameter(view, tensor.requires_grad)
        else:
            view.requires_grad_(tensor.requires_grad)
        vars(view).update(vars(tensor))
        return view

    def _check_sharing(self, tensor: torch.Tensor, place: str) -> None:
        """Raises UnsupportedError for one of several dtypes over the same memory, of which one is
        to be cast."""
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            return
        key = (storage.data_ptr(), storage.nbytes())
        dtype, other = self._dtypes.setdefault(key, (tensor.dtype, place))
        if dtype != tensor.dtype and (is_cast(dtype) or is_cast(tensor.dtype)):
            raise UnsupportedError(
                f"{other!r} and {place!r} share memory as {dtype} and {tensor.dtype}, which they "
                "would not once they were cast"
            )

    def _cast_view(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = self._cast_storage(tensor.detach())
        view = torch.empty(0, dtype=self._dtype)
        view.set_(storage, int(tensor.storage_offset()), tensor.shape, tensor.stride())
        return torch._neg_view(view) if tensor.is_neg() else view

    def _cast_storage(self, tensor: torch.Tensor) -> torch.UntypedStorage:
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), storage.nbytes(), tensor.dtype)
        if key not in self._storages:
            items = storage.nbytes() // tensor.itemsize
            flat = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (items,), (1,))
            self._storages[key] = self._cast_items(flat)
        return self._storages[key]

    def _cast_items(self, flat: torch.Tensor) -> torch.UntypedStorage:
        storage, write = self._spool.take(flat.numel() * self._dtype.itemsize)
        for piece in flat.split(_PIECE_ITEMS):
            target = self._buffer[: len(piece)]
            target.copy_(self._pieces.fetch(piece))
            write(target)
            self._on_cast(piece.nbytes)
        return storage


def _join(place: str, key: object) -> str:
    return f"{place}.{key}" if place else str(key)


def _check_no_tensors(value: object, place: str) -> None:
    """Raises UnsupportedError for an object with tensors, which would stay as they are."""
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return
    try:
        has_tensors = any(isinstance(t, torch.Tensor) for t in flatten(value).tensors)
    except FastsdError:
        has_tensors = bool(pickled.dump(value, None, None).storages)
    if has_tensors:
        raise UnsupportedError(
            f"{place!r} is a {type(value).__name__}, in which tensors cannot be cast: pick a part"
        )


class _Spool:
    """Nameless files for what is cast, and the memory that they are mapped to."""

    def __init__(self, directory: str) -> None:
        self.mapped: list[_core.MappedFile] = []
        self._directory = directory
        self._descriptor = -1
        self._room = 0
        self._used = 0

    def take(self, nbytes: int) -> tuple[torch.UntypedStorage, Callable[[torch.Tensor], None]]:
        """A storage, and what writes to it: pieces of at most `PIECE_BYTES`, one after the other,
        which come to lie in the file and not in memory."""
        if nbytes > self._room - self._used:
            self._extend(max(nbytes, _SLAB_BYTES))
        begin = at = self._used
        self._used += -(-nbytes // _ALIGN_BYTES) * _ALIGN_BYTES

        def write(piece: torch.Tensor) -> None:
            nonlocal at
            data = piece.view(torch.uint8).numpy().data
            while data:
                written = os.pwrite(self._descriptor, data, at)
                data = data[written:]
                at += written

        return self._memory[begin : begin + nbytes], write

    def _extend(self, nbytes: int) -> None:
        self.close()
        with tempfile.TemporaryFile(dir=self._directory) as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)  # a full disk is an error at once
            self._descriptor = os.dup(file.fileno())
        self.mapped.append(_core.MappedFile(self._descriptor, "a temporary file"))
        self._memory = self.mapped[-1].tensor().untyped_storage()
        self._room = nbytes
        self._used = 0

    def close(self) -> None:
        """Nothing more is taken; what was stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
