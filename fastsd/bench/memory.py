"""The bytes of tensors: reading all of them, counting them, and giving memory back."""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastsd.bench.machine import count_cores

Bytes = npt.NDArray[np.uint8]
_PIECE_BYTES = 4 << 20


def raw_bytes(tensor: Tensor) -> Tensor:
    """The tensor's elements, in order, as a flat tensor of bytes."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of all tensors, tied ones counted once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def touch(tensors: Iterable[Tensor]) -> None:
    """Reads every byte of every tensor of the CPU.

    Summing 64-bit integers runs at the speed of memory on all cores, so the loaders decide the
    time; a sum, unlike a search, cannot stop early. Each thread has one share of the bytes and they
    meet once: torch's own meet, spinning, at every tensor, and on a busy machine wait there.
    """
    pieces = [piece for tensor in tensors for piece in _split(raw_bytes(tensor).numpy())]
    share = sum(map(len, pieces)) // count_cores() + 1
    ends = itertools.accumulate(map(len, pieces))
    shares = itertools.groupby(zip(pieces, ends, strict=True), lambda pair: pair[1] // share)
    works = [[piece for piece, _ in group] for _, group in shares]
    if len(works) < 2:
        _read([piece for work in works for piece in work])
        return
    list(_start_threads().map(_read, works))


def _split(memory: Bytes) -> list[Bytes]:
    return [memory[i : i + _PIECE_BYTES] for i in range(0, len(memory), _PIECE_BYTES)]


def _read(pieces: list[Bytes]) -> None:
    for piece in pieces:
        # safetensors files have tensors at any address.
        head = min(-piece.ctypes.data % 8, len(piece))
        end = head + (len(piece) - head) // 8 * 8
        np.add.reduce(piece[head:end].view(np.int64))
        if head or end < len(piece):
            np.add.reduce(piece[:head])
            np.add.reduce(piece[end:])


@functools.cache
def _start_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count_cores())


def find_trim() -> Callable[[int], int]:
    """The C library's ``malloc_trim``, or something that does nothing where it has none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)


trim_heap = find_trim()


def start_afresh(*, trim: bool = True) -> None:
    """Collects garbage and, if ``trim``, gives freed memory back to the system.

    A program reads its weights once, into memory that it has not had before: no round that reads
    them may live on what the last one left.
    """
    gc.collect()
    if trim:
        trim_heap(0)
