"""Storages of a file, put where they belong and cast on the way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from fastsd import _core, gpu
from fastsd.errors import UnsupportedError
from fastsd.tensors import (
    CPU,
    IS_ARRAY,
    Placed,
    Restore,
    StorageRecord,
    TensorRecord,
    dtype_of,
    mark_place,
    view_items,
)
from fastsd.upload import Passage, Transfer, is_cast, moved_by, send

_SLAB_BYTES = 64 << 20  # of a device's memory, for what is cast there


class _Move(NamedTuple):
    """A storage that goes to a device and, unless ``dtype`` is None, is cast from that."""

    number: int
    record: StorageRecord
    device: torch.device
    dtype: torch.dtype | None


def place(
    reader: _core.Reader,
    restore: Restore | None,
    numbers: Sequence[int] | None,
    passage: Passage,
    *,
    asks_each: bool,
) -> Placed:
    """Puts storages of tensors, of all or those of ascending numbers, where they belong, and casts
    them.

    ``restore`` is what torch does with a storage in host memory, None: nothing. If ``asks_each`` it
    is somebody's own, and has each of them; else it is torch's, and asked once for each device that
    they were saved from.

    Raises DeviceError, torch's errors, and UnsupportedError for memory that tensors of several
    dtypes share and that would have to be cast.
    """
    records = {n: StorageRecord(*record) for n, record in reader.storages(numbers)}
    dtypes = _find_dtypes(reader, numbers) if passage.dtype is not None else {}
    dtypes = {n: dtype for n, dtype in dtypes.items() if dtype != passage.dtype}
    places: Mapping[int, _Place] = dict.fromkeys(records, torch.device(CPU))
    if restore is not None:
        places = _find_places(reader, restore, records, passage, asks_each)
    storages: dict[int, torch.UntypedStorage] = {}
    moves = []
    for number, where in places.items():
        if isinstance(where, torch.UntypedStorage):
            cast = _cast_whole(where, dtypes.get(number), passage)
            storages[number] = mark_place(cast, records[number])
        elif number in dtypes or where.type != CPU:
            moves.append(_Move(number, records[number], where, dtypes.get(number)))
    storages.update(_carry_out(reader, moves, passage))
    if passage.dtype is None:
        return Placed(storages, {})
    # Those without data, which are on no list of the reader's, get their dtypes, too.
    have_cast = [n for n in dtypes if n in storages or n not in records]
    return Placed(storages, dict.fromkeys(have_cast, passage.dtype))


_Place = torch.device | torch.UntypedStorage
"""Where a storage is to be moved, or what has become of it."""


def _find_places(
    reader: _core.Reader,
    restore: Restore,
    records: Mapping[int, StorageRecord],
    passage: Passage,
    asks_each: bool,
) -> dict[int, _Place]:
    places: dict[int, _Place] = {}
    moves: dict[str, torch.device | None] = {}  # of storages saved from these devices
    for number, record in records.items():
        if not asks_each and record.device not in moves:
            moves[record.device] = _find_move(restore, record.device)
        where = moves.get(record.device)
        places[number] = _ask(reader, restore, number, record, passage) if where is None else where
    return places


def _find_move(restore: Restore, tag: str) -> torch.device | None:
    """Where ``restore`` moves storages in host memory to, if that is all it does."""
    stand_in = torch.UntypedStorage(0, device="meta")  # equal to nothing else
    devices = [torch.device(CPU)]

    def note(device: torch.device) -> torch.UntypedStorage:
        devices.append(device)
        return stand_in

    storage = torch.UntypedStorage(0, device=CPU)
    with moved_by(storage, note):
        result = restore(storage, tag)
    return devices[-1] if result is (storage if len(devices) == 1 else stand_in) else None


def _ask(
    reader: _core.Reader,
    restore: Restore,
    number: int,
    record: StorageRecord,
    passage: Passage,
) -> torch.UntypedStorage:
    """What ``restore`` makes of a storage in host memory. Where it moves that to an accelerator the
    bytes are read from the file, at once, as it may look at them there."""

    def move(device: torch.device) -> torch.UntypedStorage:
        (target,) = gpu.allocate([record.nbytes], device)
        _fill(reader, [_Move(number, record, device, None)], {number: target}, passage)
        return target

    storage = reader.base(number, 0, record.nbytes).untyped_storage()
    with moved_by(storage, move):
        return restore(storage, record.device)


def _find_dtypes(reader: _core.Reader, numbers: Iterable[int] | None) -> dict[int, torch.dtype]:
    """The dtypes of storages that can be cast. Raises UnsupportedError where one is shared by
    several dtypes."""
    found: dict[int, torch.dtype] = {}
    for number in range(reader.tensor_count) if numbers is None else numbers:
        record = TensorRecord(*reader.tensor(number))
        if record.flags & IS_ARRAY:
            continue
        dtype = dtype_of(record.dtype)
        other = found.setdefault(record.storage, dtype)
        if other != dtype and (is_cast(other) or is_cast(dtype)):
            name = reader.names()[number]
            detail = f'tensor "{name}" of {dtype} shares memory with one of {other}: cannot be cast'
            raise UnsupportedError(detail, path=reader.name)
    return {storage: dtype for storage, dtype in found.items() if is_cast(dtype)}


def _carry_out(
    reader: _core.Reader, moves: list[_Move], passage: Passage
) -> dict[int, torch.UntypedStorage]:
    """The moves' storages, filled."""
    storages: dict[int, torch.UntypedStorage] = {}
    for device in dict.fromkeys(move.device for move in moves):
        own = [move for move in moves if move.device == device]
        targets = gpu.allocate([_count_bytes(move, passage.dtype) for move in own], device)
        storages.update((move.number, t) for move, t in zip(own, targets, strict=True))
    _fill(reader, [move for move in moves if move.dtype is None], storages, passage)
    for device in dict.fromkeys(move.device for move in moves):
        casts = [move for move in moves if move.dtype is not None and move.device == device]
        _cast_on_the_way(reader, casts, storages, passage)
    return storages


def _fill(
    reader: _core.Reader,
    moves: Sequence[_Move],
    storages: Mapping[int, torch.UntypedStorage],
    passage: Passage,
) -> None:
    """Fills storages with what is in the file, and compares checksums if that is asked for."""
    transfers = [
        Transfer(m.record.offset, m.record.nbytes, m.device, storages[m.number]) for m in moves
    ]
    checksums = send(reader, transfers, passage)
    for move, checksum in zip(moves, checksums, strict=False):
        if move.record.checksum is not None:
            is_right = checksum == move.record.checksum
            found = passage.right if is_right else passage.damaged
            found.setdefault(reader, []).append(move.number)


def _count_bytes(move: _Move, dtype: torch.dtype | None) -> int:
    """What a storage takes once it is there."""
    if move.dtype is None or dtype is None:
        return move.record.nbytes
    return move.record.nbytes // move.dtype.itemsize * dtype.itemsize


# ---- Casting ----


def _cast_whole(
    storage: torch.UntypedStorage, source: torch.dtype | None, passage: Passage
) -> torch.UntypedStorage:
    """A storage of items of another dtype where it is; as it is if there is no ``source``."""
    if source is None or passage.dtype is None:
        return storage
    items = view_items(storage, source, 0, storage.nbytes() // source.itemsize)
    return items.to(passage.dtype).untyped_storage()


def _cast_on_the_way(
    reader: _core.Reader,
    moves: list[_Move],
    storages: dict[int, torch.UntypedStorage],
    passage: Passage,
) -> None:
    """Fills storages of one device with items of another dtype, by way of a slab there."""
    target_dtype = passage.dtype
    if target_dtype is None or not moves:
        return
    device = moves[0].device
    total = sum(gpu.round_up(move.record.nbytes) for move in moves)
    slab_bytes = min(total, _SLAB_BYTES)
    (slab,) = gpu.allocate([slab_bytes], device)
    transfers: list[Transfer] = []
    casts: list[tuple[torch.Tensor, torch.Tensor]] = []
    used = 0

    def empty_slab() -> None:
        nonlocal used
        send(reader, transfers, passage)
        for items, target in casts:
            target.copy_(items)
        transfers.clear()
        casts.clear()
        used = 0

    for move in moves:
        source = move.dtype
        assert source is not None
        done = 0
        while done < move.record.nbytes:
            if slab_bytes - used < gpu.BLOCK_BYTES:
                empty_slab()
            nbytes = min(move.record.nbytes - done, slab_bytes - used)
            transfers.append(Transfer(move.record.offset + done, nbytes, device, slab, used))
            count = nbytes // source.itemsize
            items = view_items(slab, source, used // source.itemsize, count)
            target = view_items(storages[move.number], target_dtype, done // source.itemsize, count)
            casts.append((items, target))
            done += nbytes
            used += gpu.round_up(nbytes)
    empty_slab()
