"""An archive: a source of bytes, its storages, the tensors that view them, and their tree."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import torch

from fastsd import gpu
from fastsd.errors import ChecksumError, FormatError, NamesError
from fastsd.tensors import (
    CPU,
    REQUIRES_GRAD,
    Loaded,
    Placed,
    StorageRecord,
    TensorRecord,
    apply_flags,
    dtype_of,
    extent_items,
    rebuild_rest,
    view_storage,
)
from fastsd.upload import Passage, fetch

if TYPE_CHECKING:
    from fastsd import _core


@dataclass(frozen=True)
class TensorInfo:
    """What an archive knows of a tensor without reading it.

    ``stride`` and ``storage_offset`` count items, ``nbytes`` the bytes of all elements; tensors
    with the same ``storage`` share memory. ``file_offset`` is where the storage starts in the
    file ``path``, wherever in it the archive does. ``has_checksum``: `Archive.verify` checks it;
    ``crc32c`` is the checksum if it is one of that kind, as in .fsd files.
    """

    name: str
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    nbytes: int
    requires_grad: bool
    device: str
    storage: int
    storage_offset: int
    storage_nbytes: int
    file_offset: int
    has_checksum: bool
    crc32c: int | None
    path: str


@dataclass(frozen=True)
class Verification:
    """What `Archive.verify` has read: ``checked_nbytes`` bytes agree with their checksums, and
    ``unchecked`` names the tensors that were saved without any."""

    checked_nbytes: int
    unchecked: tuple[str, ...]


class TensorSlice:
    """A tensor that is read when it is indexed, and only as far as the index reaches."""

    def __init__(self, archive: Archive, name: str) -> None:
        self._archive = archive
        self._name = name
        self._info = archive.info(name)

    @property
    def shape(self) -> torch.Size:
        return self._info.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._info.dtype

    def get_shape(self) -> list[int]:
        """The shape, as safetensors' slices give it."""
        return list(self._info.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        """The part that an index selects: integers, slices with positive steps, ``...`` and None.

        Where the file is mapped this is a view of it; elsewhere, and for GPUs, the bytes from the
        first to the last element of the part are read. On a GPU a part with gaps is then copied to
        memory of its own, so that they take none. Raises IndexError and TypeError as torch does.
        """
        return self._archive._read(self._name, index)


class Archive(Mapping[str, torch.Tensor]):
    """A read-only mapping from names to tensors, in the order of the file.

    Nothing is read until it is asked for. Tensors of a mapped archive are views of the file:
    writable, but what is written to them stays in this process and reaches no file. They outlive
    the archive. Tensors that share a storage share it when they come from the same archive, too.

    Made by `fastsd.open`; also a context manager that closes it. Safe to use from several threads.
    """

    def __init__(
        self,
        readers: Sequence[_core.Reader],
        metadata: Mapping[str, str],
        device: torch.device | str = CPU,
        *,
        legacy_path: str | None = None,
    ) -> None:
        self._legacy_path = legacy_path  # of what torch has read, and is in memory now
        self._readers: list[_core.Reader] = list(readers)  # one a file; none once it is closed
        self._metadata = metadata
        self._device = torch.device(device)
        # Tensors, and storages, are numbered file after file.
        self._first_numbers = _find_firsts(reader.tensor_count for reader in readers)
        self._first_storages = _find_firsts(reader.storage_count for reader in readers)
        names = chain.from_iterable(reader.names() for reader in readers)
        self._numbers = {name: number for number, name in enumerate(names)}
        self._shared = {
            (file, storage)
            for file, reader in enumerate(readers)
            for storage in _find_shared(reader)
        }
        self._whole: dict[tuple[int, int], torch.UntypedStorage] = {}

    # ---- Mapping ----

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._read(name, ...)

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, name: object) -> bool:
        return name in self._numbers

    def __repr__(self) -> str:
        state = ", ".join(map(repr, self.files)) or "closed"
        return f"<fastsd.Archive {state}, {len(self)} tensors>"

    # ---- Looking without reading ----

    def info(self, name: str) -> TensorInfo:
        """What is known of a tensor. Raises NamesError, a KeyError, if there is none."""
        file, record, storage = self._find(name)
        dtype = dtype_of(record.dtype)
        shape = torch.Size(record.shape)
        return TensorInfo(
            name=name,
            dtype=dtype,
            shape=shape,
            stride=record.stride,
            nbytes=shape.numel() * dtype.itemsize,
            requires_grad=bool(record.flags & REQUIRES_GRAD),
            device=storage.device,
            storage=self._first_storages[file] + record.storage,
            storage_offset=record.storage_offset,
            storage_nbytes=storage.nbytes,
            file_offset=storage.offset,
            has_checksum=storage.checksum is not None,
            crc32c=storage.checksum if self._readers[file].format == "fsd" else None,
            path=self._readers[file].name,
        )

    @property
    def metadata(self) -> dict[str, str]:
        """The strings that were given to `fastsd.save`; empty if there were none."""
        return dict(self._metadata)

    @property
    def files(self) -> tuple[str, ...]:
        """The files that it is in: one, or one for each shard. None once it is closed."""
        if self._legacy_path is not None and self._readers:
            return (self._legacy_path,)
        return tuple(reader.name for reader in self._readers)

    @property
    def format(self) -> str:
        """What the files are: "fsd", "pth" (torch.save's zip files), "safetensors", or "legacy",
        which torch had to read."""
        return "legacy" if self._legacy_path is not None else self._open_readers()[0].format

    @property
    def is_plain(self) -> bool:
        """Whether tensors and plain values are all that is in it. False: there is a pickle that
        only an unpickler can load as it was; the tensors that it names are here all the same."""
        return all(reader.is_plain for reader in self._open_readers())

    @property
    def is_mapped(self) -> bool:
        """Whether tensors are views of the mapped file; else they are read into memory."""
        return all(reader.is_mapped for reader in self._open_readers())

    @property
    def version(self) -> tuple[int, int] | None:
        """The version of the .fsd container, major and minor; None for other formats."""
        reader = self._open_readers()[0]
        return reader.version if self.format == "fsd" else None

    def get_slice(self, name: str) -> TensorSlice:
        """The tensor as something to be indexed, so that only a part of it is read."""
        return TensorSlice(self, name)

    def verify(self) -> Verification:
        """Reads every storage that has a checksum, in parallel, and compares them.

        Raises ChecksumError, naming the tensors, where they differ. Memory is not touched: what is
        verified is the file.
        """
        return verify(self._open_readers())

    def close(self) -> None:
        """Forgets the file. Tensors stay as they are."""
        self._readers = []
        self._whole.clear()

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # ---- Reading ----

    def _open_readers(self) -> list[_core.Reader]:
        if not self._readers:
            raise ValueError("the archive is closed")
        return self._readers

    def _find(self, name: str) -> tuple[int, TensorRecord, StorageRecord]:
        readers = self._open_readers()
        if name not in self._numbers:
            raise NamesError(f"holds no tensor {name!r}", path=readers[0].name)
        number = self._numbers[name]
        file = bisect_right(self._first_numbers, number) - 1
        record = TensorRecord(*readers[file].tensor(number - self._first_numbers[file]))
        return file, record, StorageRecord(*readers[file].storage(record.storage))

    def _read(self, name: str, index: Any) -> torch.Tensor:
        file, record, stored = self._find(name)
        dtype = dtype_of(record.dtype)
        # Torch itself says what an index means, on a tensor without memory.
        whole = torch.empty_strided(record.shape, record.stride, dtype=torch.uint8, device="meta")
        part = whole[index]
        if part.untyped_storage()._cdata != whole.untyped_storage()._cdata:
            raise TypeError(f"a slice takes integers, slices, ... and None, not {index!r}")
        offset = record.storage_offset + int(part.storage_offset())
        part_record = record._replace(shape=tuple(part.shape), stride=part.stride())
        if stored.has_no_data:
            tensor = torch.empty_strided(
                part_record.shape, part_record.stride, dtype=dtype, device="meta"
            )
        else:
            storage, begin = self._storage(file, part_record, offset, dtype.itemsize)
            tensor = view_storage(storage, dtype, offset - begin // dtype.itemsize, part_record)
            if self._has_gaps(file, part_record):
                tensor = tensor.contiguous()
        try:
            return apply_flags(name, tensor, record.flags)
        except FormatError as error:
            error.path = self._readers[file].name
            raise

    def _has_gaps(self, file: int, record: TensorRecord) -> bool:
        """Whether a part takes more memory on a GPU than it has elements; the pages of a mapping
        cost nothing, and what is shared stays so."""
        if not gpu.is_accelerator(self._device) or (file, record.storage) in self._shared:
            return False
        return extent_items(record.shape, record.stride) > torch.Size(record.shape).numel()

    def _storage(
        self, file: int, record: TensorRecord, offset: int, itemsize: int
    ) -> tuple[torch.UntypedStorage, int]:
        """A storage on the device with those bytes of a stored one that a part of it takes, and
        where they start in that."""
        key = (file, record.storage)
        if key not in self._shared:
            begin = offset * itemsize
            end = begin + extent_items(record.shape, record.stride) * itemsize
            return self._fetch(file, record.storage, begin, end), begin
        storage = self._whole.get(key)
        if storage is None:
            stored = StorageRecord(*self._open_readers()[file].storage(record.storage))
            fetched = self._fetch(file, record.storage, 0, stored.nbytes)
            storage = self._whole.setdefault(key, fetched)  # another thread's, if it was quicker
        return storage, 0

    def _fetch(self, file: int, number: int, begin: int, end: int) -> torch.UntypedStorage:
        reader = self._open_readers()[file]
        if begin == end:  # wherever that is
            begin = end = 0
        if gpu.is_accelerator(self._device):
            stored = StorageRecord(*reader.storage(number))
            return fetch(reader, stored.offset + begin, end - begin, self._device)
        return reader.base(number, begin, end).to(self._device).untyped_storage()


def _find_firsts(counts: Iterable[int]) -> list[int]:
    """The number of the first item of each file, where files have so many."""
    return list(accumulate(counts, initial=0))[:-1]


def _find_shared(reader: _core.Reader) -> frozenset[int]:
    """The storages that several tensors view."""
    if reader.storage_count == reader.tensor_count:
        return frozenset()
    storages = [TensorRecord(*reader.tensor(i)).storage for i in range(reader.tensor_count)]
    return frozenset(storage for storage, count in Counter(storages).items() if count > 1)


def load_tensors(
    reader: _core.Reader,
    placed: Placed | None = None,
    numbers: Sequence[int] | None = None,
    *,
    is_ordered: bool = False,
    passage: Passage | None = None,
) -> dict[str, torch.Tensor]:
    """Tensors by name, in the order of the file: all, or those of ascending numbers; in an
    OrderedDict, if so asked.

    Storages without any of them are not read, nor are those that are ``placed``; None: all stay in
    host memory.
    """
    placed = placed or Placed({}, {})
    takes_all = placed.restore is not None
    if passage is None or passage.progress is None:
        loaded = Loaded(*reader.load(is_ordered, takes_all, numbers, list(placed.storages)))
    else:
        with passage.step(_count_unread(reader, numbers, placed)) as tell:
            loaded = Loaded(
                *reader.load(is_ordered, takes_all, numbers, list(placed.storages), tell)
            )
    if loaded.rest:
        all_numbers = range(reader.tensor_count) if numbers is None else numbers
        rebuild_rest(reader, loaded, all_numbers, placed)
    return loaded.by_name


def _count_unread(reader: _core.Reader, numbers: Sequence[int] | None, placed: Placed) -> int:
    """How many bytes loading has yet to read."""
    if reader.is_mapped:
        return 0
    records = {n: StorageRecord(*record) for n, record in reader.storages(numbers)}
    return sum(r.nbytes for n, r in records.items() if n not in placed.storages)


def verify(readers: Sequence[_core.Reader], passage: Passage | None = None) -> Verification:
    """Compares every stored byte with its checksum, but for those of which ``passage`` knows;
    raises ChecksumError for the first file that has others."""
    parts = [_verify_file(reader, passage or Passage()) for reader in readers]
    unchecked = [name for part in parts for name in part.unchecked]
    return Verification(sum(part.checked_nbytes for part in parts), tuple(unchecked))


def _verify_file(reader: _core.Reader, passage: Passage) -> Verification:
    damaged = set(reader.find_damage(passage.right.get(reader, ())))
    damaged.update(passage.damaged.get(reader, ()))
    names = reader.names()
    checked = 0
    unchecked = []
    affected = []
    for storage_number in range(reader.storage_count):
        storage = StorageRecord(*reader.storage(storage_number))
        if storage.checksum is not None:
            checked += storage.nbytes
    for number, name in enumerate(names):
        record = TensorRecord(*reader.tensor(number))
        storage = StorageRecord(*reader.storage(record.storage))
        if record.storage in damaged:
            affected.append(name)
        elif storage.checksum is None and storage.nbytes > 0 and not storage.has_no_data:
            unchecked.append(name)
    if damaged:
        place = StorageRecord(*reader.storage(min(damaged)))
        named = ", ".join(f'"{name}"' for name in affected[:10]) or "none that has a name"
        raise ChecksumError(
            f"{len(damaged)} of {reader.storage_count} storages are damaged, the first at bytes "
            f"{place.offset} to {place.offset + place.nbytes}; tensors affected: {named}"
            + (f" and {len(affected) - 10} more" if len(affected) > 10 else ""),
            path=reader.name,
            tensors=tuple(affected),
        )
    return Verification(checked, tuple(unchecked))
