"""What the demonstration and the benchmarks share: bits, bytes, touching and syncing."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn


def raw_bytes(tensor: Tensor) -> Tensor:
    """Return the tensor's elements, in order, as a flat tensor of bytes."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def list_parts(obj: object, path: str = "") -> dict[str, object]:
    """Return what an object holds, tensors and plain values, by the way that leads to it."""
    if isinstance(obj, nn.Module):
        obj = obj.state_dict()
    items: Iterable[tuple[object, object]]
    if isinstance(obj, Mapping):
        items = obj.items()
    elif isinstance(obj, (list, tuple)):
        items = enumerate(obj)
    else:
        return {path: obj}
    return {k: v for key, part in items for k, v in list_parts(part, f"{path}/{key}").items()}


def list_tensors(obj: object) -> list[Tensor]:
    """Return the tensors that an object holds."""
    return [part for part in list_parts(obj).values() if isinstance(part, Tensor)]


def same_part(left: object, right: object) -> bool:
    """Tell whether two values are equal; tensors in shape, dtype and bits."""
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return type(left) is type(right) and left == right
    is_alike = left.shape == right.shape and left.dtype == right.dtype
    return is_alike and torch.equal(raw_bytes(left), raw_bytes(right))


def same_bits(left: object, right: object) -> bool:
    """Tell whether two objects hold the same tensors and plain values in the same places."""
    ours, theirs = list_parts(left), list_parts(right)
    return ours.keys() == theirs.keys() and all(same_part(ours[k], theirs[k]) for k in ours)


def digest_tensor(tensor: Tensor) -> str:
    """Return the SHA-256 of dtype, shape and raw bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(raw_bytes(tensor).numpy().data)
    return digest.hexdigest()


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of all tensors, tied ones counted once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def touch(tensors: Iterable[Tensor]) -> None:
    """Read every byte of every tensor.

    Summing 64-bit integers runs at the speed of memory on all cores, so the loaders decide the
    time; a sum, unlike a search, cannot stop early.
    """
    for tensor in tensors:
        row_bytes = tensor.shape[-1] * tensor.itemsize if tensor.ndim else 0
        if row_bytes % 8 == 0 and row_bytes and tensor.is_contiguous():
            tensor.detach().view(torch.int64).sum()
        else:
            raw_bytes(tensor).sum()


def drop_tied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep the first name of each memory: safetensors refuses tensors that share it."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in tensors.items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            kept[name] = tensor
    return kept


def sync_file(path: Path) -> None:
    """Make a written file survive a power cut: sync it and the directory that names it."""
    for target in (path, path.parent):
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def warm_file(path: Path, chunk_bytes: int = 16 << 20) -> None:
    """Bring a file into the page cache."""
    buffer = bytearray(chunk_bytes)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def find_trim() -> Callable[[int], int]:
    """Return the C library's ``malloc_trim``, or something that does nothing where it has none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)


trim_heap = find_trim()


def start_afresh(*, trim: bool = True) -> None:
    """Collect garbage and, if ``trim``, give freed memory back to the system.

    A program reads its weights once, into memory that it has not had before: no round that reads
    them may live on what the last one left.
    """
    gc.collect()
    if trim:
        trim_heap(0)
