"""From files to memory on devices.

Bytes are read from the file on their way, never through a mapping of it, and take no more host
memory than is pinned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from fastsd import _core, gpu
from fastsd.progress import Progress, Tell
from fastsd.tensors import CPU, view_items

_HOST_SLAB_BYTES = 8 << 20  # for accelerators that torch serves
_CAST = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Passage:
    """What is done with bytes on their way, in one load.

    ``dtype``: what floating point tensors become. ``checks``: whether checksums are compared as the
    bytes pass, where that can be: ``right`` and ``damaged`` then have the storages of each file
    that have been found so. ``progress``: what is told of the bytes.
    """

    progress: Progress | None = None

    def __init__(self, dtype: torch.dtype | None = None, *, checks: bool = False) -> None:
        if dtype is not None:
            check_dtype(dtype)
        self.dtype = dtype
        self.checks = checks
        self.right: dict[_core.Reader, list[int]] = {}
        self.damaged: dict[_core.Reader, list[int]] = {}

    @contextmanager
    def step(self, nbytes: int) -> Iterator[Tell | None]:
        """Gives what is to be told how many of so many more bytes are done; None: nothing is."""
        if self.progress is None:
            yield None
        else:
            with self.progress.step(nbytes) as tell:
                yield tell


def is_cast(dtype: torch.dtype) -> bool:
    """Whether tensors of the dtype are cast where another is asked for. float8 and narrower types,
    which go with scales of their own, are not."""
    return dtype in _CAST


def check_dtype(dtype: torch.dtype) -> None:
    """Raises ValueError for one that nothing is cast to."""
    if dtype not in _CAST:
        names = ", ".join(sorted(str(known).removeprefix("torch.") for known in _CAST))
        raise ValueError(f"dtype must be one of {names}, not {dtype}")


class Transfer(NamedTuple):
    """Bytes of a file, by their offset in it, and their place in a storage on a device."""

    offset: int
    nbytes: int
    device: torch.device
    target: torch.UntypedStorage
    begin: int = 0


def send(reader: _core.Reader, transfers: Sequence[Transfer], passage: Passage) -> list[int]:
    """Fills the targets, which do not overlap, from the file, in which the transfers ascend.

    Returns when all is there: if `Passage.checks`, and all goes to devices that the core serves,
    the transfers' checksums, otherwise nothing. Raises DeviceError, TruncatedError and OSError.
    """
    devices = {transfer.device for transfer in transfers}
    served = {device: gpu.ordinal_of(device) for device in devices if gpu.is_served(device)}
    straight = [t for t in transfers if t.device in served]
    checksums: list[int] = []
    if straight:
        streams = [(ordinal, gpu.current_stream(device)) for device, ordinal in served.items()]
        uploads = [(t.offset, t.nbytes, served[t.device], _address(t)) for t in straight]
        with passage.step(sum(t.nbytes for t in straight)) as tell:
            checksums = reader.upload(uploads, streams, passage.checks, tell)
    for device in devices - served.keys():
        own = [t for t in transfers if t.device == device]
        if device.type == CPU:
            with passage.step(sum(t.nbytes for t in own)) as tell:
                reader.read([(t.offset, t.nbytes, _address(t)) for t in own], tell)
        elif gpu.is_accelerator(device):
            _send_through_torch(reader, own, passage)
    return checksums if passage.checks and len(straight) == len(transfers) else []


def _address(transfer: Transfer) -> int:
    return int(transfer.target.data_ptr()) + transfer.begin


def _send_through_torch(
    reader: _core.Reader, transfers: Sequence[Transfer], passage: Passage
) -> None:
    """By torch's own copies out of pinned memory, one after the other."""
    slab = torch.empty(_HOST_SLAB_BYTES, dtype=torch.uint8, device=CPU)
    if transfers[0].device.type in ("cuda", "xpu"):
        slab = slab.pin_memory()
    address = slab.data_ptr()
    for transfer in transfers:
        target = view_items(transfer.target, torch.uint8, transfer.begin, transfer.nbytes)
        with passage.step(transfer.nbytes) as tell:
            for part in target.split(len(slab)):
                done = part.storage_offset() - transfer.begin
                reader.read([(transfer.offset + done, len(part), address)])
                part.copy_(slab[: len(part)])
                if tell is not None:
                    tell(done + len(part))


def fetch(
    reader: _core.Reader, offset: int, nbytes: int, device: torch.device
) -> torch.UntypedStorage:
    """Bytes of a file, from an offset in it, on an accelerator. Raises what `send` raises."""
    (target,) = gpu.allocate([nbytes], device)
    send(reader, [Transfer(offset, nbytes, device, target)], Passage())
    return target


@contextmanager
def moved_by(
    storage: torch.UntypedStorage, move: Callable[[torch.device], torch.UntypedStorage]
) -> Iterator[None]:
    """While this lasts, ``storage.to(device=...)``, and so ``storage.cuda()``, calls ``move`` for
    accelerators."""

    def to(*, device: Any, non_blocking: bool = False) -> torch.UntypedStorage:
        where = torch.device(device)
        if gpu.is_accelerator(where):
            return move(where)
        copy: torch.UntypedStorage = torch.UntypedStorage.to(storage, device=where)
        return copy

    attributes = vars(storage)
    before = attributes.get("to")
    attributes["to"] = to
    try:
        yield
    finally:
        if before is None:
            del attributes["to"]
        else:
            attributes["to"] = before
