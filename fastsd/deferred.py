"""Tensors of a mapped file that are read when they are copied to a GPU, rather than touched.

`Module.load_state_dict` copies from what it is given, tensor by tensor, out of a mapping, by page
faults. Here the copies into tensors on GPUs are noted, while torch does all its checks, and then
carried out at once: from the file, in parallel, straight into the parameters.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, MutableMapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from fastsd import _core, gpu
from fastsd.tensors import CPU, extent_items, view_items
from fastsd.upload import Passage, Transfer, is_cast, send

_SLAB_BYTES = 64 << 20
_OVERLAPS = 1  # ATen/MemoryOverlap.h: MemOverlap::Yes


class _Copy(NamedTuple):
    """A copy to be made: from a mapped tensor to one on a GPU of the same shape."""

    target: torch.Tensor
    source: torch.Tensor


class _Deferred(torch.Tensor):
    """A tensor over a mapped file, which notes that it is copied to a GPU. To everything else it is
    the tensor that it stands for."""

    _copies: Copies
    _begin_version: int

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.copy_ and len(args) >= 2 and isinstance(args[1], _Deferred):
                source = args[1]
                is_edited = _version_of(source) != source._begin_version
                if not is_edited and source._copies.note(args[0], source.as_subclass(torch.Tensor)):
                    return args[0]
            return func(*args, **(kwargs or {}))


class Copies:
    """Copies from mapped files to GPUs that are put off until the end of the context, also if that
    ends with a RuntimeError: then torch has found something wrong, and copied the rest."""

    def __init__(self, readers: Iterable[_core.Reader], passage: Passage) -> None:
        mapped = [(reader, file) for reader in readers if (file := reader.mapped_file())]
        self._mapped = sorted(mapped, key=lambda pair: pair[1].begin)
        self._begins = [file.begin for _, file in self._mapped]
        self._passage = passage
        self._copies: dict[tuple[Any, ...], _Copy] = {}

    def __enter__(self) -> Copies:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        if kind is None or issubclass(kind, RuntimeError):
            self.carry_out()

    def defer(self, state: MutableMapping[str, Any]) -> None:
        """Puts tensors that note their copies in the place of those over the files."""
        for name, value in state.items():
            if type(value) is torch.Tensor and self._find(value) is not None:
                deferred = value.as_subclass(_Deferred)
                deferred._copies = self
                deferred._begin_version = _version_of(value)
                state[name] = deferred

    def note(self, target: torch.Tensor, source: torch.Tensor) -> bool:
        """Puts a copy off; False if it is none for this, and to be made now."""
        if not (_can_be_filled_later(target) and _is_sure(target, source)):
            return False
        # Of several into the same memory the last one counts.
        key = (str(target.device), target.data_ptr(), target.shape, target.stride(), target.dtype)
        self._copies.pop(key, None)
        self._copies[key] = _Copy(target.detach(), source)
        # For autograd it is edited now; older releases have no other way to say so.
        target.detach().as_strided((0,), (1,)).zero_()
        return True

    def carry_out(self) -> None:
        """Makes all copies that were put off. Raises DeviceError, TruncatedError and OSError."""
        copies, self._copies = list(self._copies.values()), {}
        if _overlap(copies):  # then their order counts
            for copy in copies:
                self._send_all([copy])
        else:
            self._send_all(copies)

    def _send_all(self, copies: Iterable[_Copy]) -> None:
        by_file: dict[int, list[tuple[int, _Copy]]] = {}
        for copy in copies:
            file, offset = self._find_place(copy.source)
            by_file.setdefault(file, []).append((offset, copy))
        for file, placed in by_file.items():
            placed.sort(key=lambda pair: pair[0])
            self._send(self._mapped[file][0], placed)

    def _send(self, reader: _core.Reader, placed: list[tuple[int, _Copy]]) -> None:
        """Straight into targets that take the bytes as they are, by way of others into the rest."""
        straight = []
        end = 0
        for offset, copy in placed:
            if _takes_bytes(copy) and offset >= end:
                begin = copy.target.storage_offset() * copy.target.itemsize
                storage = copy.target.untyped_storage()
                straight.append(
                    Transfer(offset, copy.source.nbytes, copy.target.device, storage, int(begin))
                )
                end = offset + copy.source.nbytes
            else:
                self._send_through_slab(reader, offset, copy)
        send(reader, straight, self._passage)

    def _send_through_slab(self, reader: _core.Reader, offset: int, copy: _Copy) -> None:
        """A piece at a time where the target is contiguous, else at once; torch casts."""
        target, source = copy
        pieces = [target]
        if target.is_contiguous():
            pieces = list(target.view(-1).split(max(1, _SLAB_BYTES // source.itemsize)))
        sizes = [piece.numel() * source.itemsize for piece in pieces]
        if not source.nbytes:
            return
        (slab,) = gpu.allocate([max(sizes)], target.device)
        for piece, nbytes in zip(pieces, sizes, strict=True):
            send(reader, [Transfer(offset, nbytes, target.device, slab)], self._passage)
            items = view_items(slab, source.dtype, 0, piece.numel())
            with torch.no_grad():
                piece.copy_(items.view(piece.shape))
            offset += nbytes

    def _find(self, tensor: torch.Tensor) -> int | None:
        """The number of the file that a tensor is mapped from."""
        if tensor.device.type != CPU or tensor.layout != torch.strided:
            return None
        number = bisect_right(self._begins, tensor.data_ptr()) - 1
        if number < 0:
            return None
        file = self._mapped[number][1]
        return number if tensor.data_ptr() + tensor.nbytes <= file.begin + file.nbytes else None

    def _find_place(self, tensor: torch.Tensor) -> tuple[int, int]:
        """The number of the file that a tensor is mapped from, and its offset in that."""
        number = self._find(tensor)
        assert number is not None
        _, file = self._mapped[number]
        return number, file.offset + tensor.data_ptr() - file.begin


def _version_of(tensor: torch.Tensor) -> int:
    """How often a tensor has been edited; those of inference_mode do not count that."""
    return 0 if tensor.is_inference() else tensor._version


def _can_be_filled_later(target: torch.Tensor) -> bool:
    """Whether a tensor is memory of a GPU that the core reaches, and nothing more. Subclasses have
    their own ways to be copied into."""
    return (
        type(target) in (torch.Tensor, nn.Parameter)
        and target.layout == torch.strided
        and gpu.is_served(target.device)
        and not (target.is_conj() or target.is_neg())
    )


def _is_sure(target: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether torch would make a copy without an error or a warning, which would come too late."""
    is_castable = is_cast(target.dtype) and is_cast(source.dtype)
    return (
        target.shape == source.shape
        and (target.dtype == source.dtype or is_castable)
        and source.is_contiguous()
        and not (source.is_conj() or source.is_neg())
        and (not target.is_inference() or torch.is_inference_mode_enabled())
        and torch._debug_has_internal_overlap(target) != _OVERLAPS
    )


def _overlap(copies: Iterable[_Copy]) -> bool:
    """Whether any two go to the same memory, at least in part."""
    ranges = sorted((str(c.target.device), c.target.data_ptr(), _end(c.target)) for c in copies)
    return any(a[0] == b[0] and b[1] < a[2] for a, b in pairwise(ranges))


def _end(tensor: torch.Tensor) -> int:
    extent = extent_items(tensor.shape, tensor.stride())
    return tensor.data_ptr() + extent * tensor.itemsize


def _takes_bytes(copy: _Copy) -> bool:
    return copy.target.dtype == copy.source.dtype and copy.target.is_contiguous()


def can_defer(target: Any) -> bool:
    """Whether a target is on GPUs, and looks at nothing until all is loaded: a mapping, or a module
    that is loaded by torch's own code, without hooks."""
    if not isinstance(target, nn.Module):
        return any(_is_served(tensor) for tensor in target.values())
    modules = list(target.modules())
    return all(map(_loads_plainly, modules)) and any(
        _is_served(tensor)
        for module in modules
        for tensor in (*module._parameters.values(), *module._buffers.values())
    )


def _is_served(tensor: object) -> bool:
    return isinstance(tensor, torch.Tensor) and gpu.is_served(tensor.device)


def _loads_plainly(module: nn.Module) -> bool:
    load = getattr(module._load_from_state_dict, "__module__", "")
    is_torchs = load == "torch.nn.modules.module" or load.startswith(
        ("torch.nn.modules.batchnorm", "torch.nn.modules.instancenorm")
    )
    return (
        is_torchs
        and getattr(module.load_state_dict, "__func__", None) is nn.Module.load_state_dict
        and type(module).set_extra_state is nn.Module.set_extra_state
        and not module._load_state_dict_pre_hooks
        and not module._load_state_dict_post_hooks
    )
