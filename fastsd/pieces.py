"""Tensors over mapped files, piece by piece: read from the files rather than through the mapping,
so that memory stays bounded and a file that becomes shorter is an error, not a signal."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator

import torch

from fastsd import _core

PIECE_BYTES = 8 << 20


class Pieces:
    """Reads what lies in mapped files, which nobody has edited in memory."""

    def __init__(self, mapped: Iterable[_core.MappedFile]) -> None:
        self._mapped = sorted(mapped, key=lambda file: file.begin)
        self._begins = [file.begin for file in self._mapped]
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def fetch(self, piece: torch.Tensor) -> torch.Tensor:
        """The piece, of at most `PIECE_BYTES`, or a contiguous copy of it: in memory that the next
        call uses again, if it is mapped. Raises TruncatedError and OSError."""
        if not piece.is_contiguous():
            copy = piece.contiguous()
            for file in self._mapped:
                file.drop_pages()
            return copy
        number = bisect_right(self._begins, piece.data_ptr()) - 1
        if number < 0 or piece.nbytes == 0:
            return piece
        file = self._mapped[number]
        offset = piece.data_ptr() - file.begin
        if offset + piece.nbytes > file.nbytes:
            return piece
        if self._buffer.numel() == 0:
            self._buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8)
        target = self._buffer[: piece.nbytes]
        file.read(offset, target.numpy())
        return target.view(piece.dtype).view(piece.shape)


def list_mapped(readers: Iterable[_core.Reader]) -> list[_core.MappedFile]:
    """Those of the readers' files that are mapped."""
    return [file for reader in readers if (file := reader.mapped_file()) is not None]


def split_bytes(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The bytes of a strided CPU tensor's elements, whatever its dtype: views of type uint8, whose
    shapes depend on those of the elements alone, of at most `PIECE_BYTES` each."""
    size = tensor.itemsize
    view = torch.empty(0, dtype=torch.uint8).set_(
        tensor.untyped_storage(),
        tensor.storage_offset() * size,
        (*tensor.shape, size),
        (*(step * size for step in tensor.stride()), 1),
    )
    return _split(view) if view.numel() > 0 else iter(())


def _split(view: torch.Tensor) -> Iterator[torch.Tensor]:
    if view.nbytes <= PIECE_BYTES:
        yield view
        return
    rows = max(1, PIECE_BYTES // (view.nbytes // len(view)))
    for part in view.split(rows):
        if part.nbytes <= PIECE_BYTES:
            yield part
        else:
            yield from _split(part[0])
