"""The native core: files, the container's bytes, and tensors over memory. Private.

Functions release the GIL while they read or write, honour Ctrl-C, and raise the errors of
`fastsd.errors` and OSError, with the path.
"""

from collections.abc import Callable, Sequence
from typing import Any, type_check_only

import torch

@type_check_only
class _pybind11_type(type): ...

DTYPES: tuple[tuple[int, str, int], ...]
"""(number in files, torch's name, bytes of an item) of every dtype of the format."""

CRC32C_IMPLEMENTATION: str
""""sse4.2", "armv8" or "portable"."""

CRC32_IMPLEMENTATION: str
""""pclmulqdq", "armv8" or "portable"."""

def set_torch(
    tensor_type: object, uint8: object, int8: object, from_dlpack: object, exchange: object
) -> bool:
    """Gives the core torch.Tensor, two dtypes, torch.utils.dlpack.from_dlpack, and the capsule
    torch.Tensor.__dlpack_c_exchange_api__ or None. Returns whether the capsule will be used."""

def crc32c(data: object, value: int = ...) -> int:
    """CRC32C of a buffer, following bytes whose CRC32C is ``value``."""

def crc32(data: object, value: int = ...) -> int:
    """CRC-32, as zlib's, of a buffer, following bytes whose CRC-32 is ``value``."""

def has_safetensors_dtype(number: int) -> bool:
    """Whether safetensors has a name for a dtype."""

def parse_json(text: bytes, tensors: list[Any], decode: Callable[[str, Any], Any] | None) -> Any:
    """The value of a JSON text, as json.loads gives it. NaN, Infinity and names that occur twice in
    an object are refused, and so is nesting deeper than 2000.

    An object with one member whose name starts with "$" is a node, innermost first:
    ``{"$tensor": n}`` is ``tensors[n]``, any other what ``decode(name, value)`` returns; with None
    there are no nodes. Raises ValueError and RecursionError, with the place in bytes, and what
    ``decode`` raises. Collecting garbage is paused meanwhile."""

def find_bad_nesting(stream: bytes) -> str | None:
    """What is wrong with a pickle stream in which tuples are nested so deeply, or so often within
    each other, that hashing them would end the process or never end; None if nothing is."""

def read_torch_pickle(
    stream: bytes, sizes: Sequence[tuple[str, int]]
) -> tuple[
    list[str],
    list[tuple[int, tuple[int, ...], tuple[int, ...], int, int, int, int]],
    list[str],
    int,
    dict[int, bytes],
    bool,
    list[str],
]:
    """What torch's pickle stream says of its storages, which are given by key with their sizes:
    (names, records as of `Reader.tensor`, devices of the storages, file flags, sections, whether it
    is plain data, the names of what is not). Nothing is imported or executed."""

def file_system(path: str | bytes) -> tuple[str, bool]:
    """Name of the file system that holds a file, and whether it is mapped by default."""

class MappedFile(metaclass=_pybind11_type):
    """A file and the memory that it is mapped to, privately."""

    def __init__(self, descriptor: int, name: str | bytes) -> None:
        """Maps all of a regular file. Keeps a descriptor of its own."""

    @property
    def begin(self) -> int:
        """The address of its first byte."""

    @property
    def nbytes(self) -> int: ...
    @property
    def offset(self) -> int:
        """Where in the file that byte is."""

    def read(self, begin: int, target: object) -> None:
        """Fills a writable buffer with the bytes from ``begin`` on, as the file has them now.
        Raises TruncatedError if it ends before."""

    def drop_pages(self) -> None:
        """Takes the pages of the mapping, which nobody may have changed, out of this process; they
        are read from the file again where they are needed."""

    def tensor(self) -> torch.Tensor:
        """The mapping as a uint8 tensor, which outlives this."""

class PendingFile(metaclass=_pybind11_type):
    """A file that is complete and has no name yet. Nothing is left of it unless it is committed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def commit(self, durable: bool) -> None:
        """Gives the file its name, in place of what is there."""

def write_bytes(path: str | bytes, data: bytes, durable: bool) -> PendingFile:
    """Writes a small file, which has yet to be committed."""

class Plan(metaclass=_pybind11_type):
    """Tensors about to be written, which it keeps alive."""

    def __init__(
        self, names: list[str], tensors: list[Any], describe: Callable[[str, Any], tuple[Any, ...]]
    ) -> None:
        """``describe`` is called for each tensor that is not plain, and returns (address, or None
        for a meta tensor; dtype number; shape; stride in items; flags; device number; identity;
        None or, of what lies on a GPU, its ordinal and the handle of a stream: what has been put
        into that before something is read is done by then)."""

    def finish(
        self, file_flags: int, devices: Sequence[str], sections: Sequence[tuple[int, bytes]]
    ) -> None:
        """Lays out an .fsd file. One of the three layouts is chosen, once, before anything below
        them."""

    def finish_zip(
        self, archive: str, records: Sequence[tuple[str, str | bytes]], align_bytes: int
    ) -> None:
        """Lays out a zip file as torch.save writes: the records, by name, then each tensor, by its
        name, whole and apart from others, all in the folder ``archive``."""

    def find_shared(self) -> list[list[int]]:
        """The first step to a safetensors file: groups of tensors, by number, that overlap without
        being equal views."""

    def finish_safetensors(self, metadata: str | bytes) -> None:
        """The second step: lays out the file. ``metadata`` is the JSON of ``__metadata__``, or
        empty."""

    def write(
        self,
        path: str | bytes,
        durable: bool,
        checksum: bool,
        mapped: Sequence[MappedFile] = ...,
        on_written: Callable[[int], None] | None = None,
    ) -> PendingFile:
        """Writes the file, which has yet to be committed. What lies in the memory of ``mapped``,
        which nobody may have changed, is read from the files: that takes no memory, and where a
        file has become shorter TruncatedError is raised. ``on_written`` is told, now and then, how
        many bytes have been written; what it raises stops the writing."""

    def reads_from(self, descriptor: int, offset: int) -> bool:
        """Whether tensors are mapped from what a descriptor's file has at ``offset`` or behind."""

    def prepare(self, checksum: bool, mapped: Sequence[MappedFile] = ...) -> None:
        """Before `gather`: where the file holds checksums, reads all data once. ``mapped``: as for
        `write`, also for `gather`."""

    def gather(self, begin: int, target: object) -> None:
        """Fills a writable buffer with the bytes of the file from ``begin`` on."""

    @property
    def tied(self) -> list[tuple[int, int]]:
        """(Number of a tensor, that of the first one in the same storage), once these are known."""

    @property
    def file_bytes(self) -> int: ...

class Room(metaclass=_pybind11_type):
    """Memory that a stream is read into: a writable buffer. Made by the core alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

class Reader(metaclass=_pybind11_type):
    """An archive whose header has been validated, whatever its container. Thread-safe.

    Names, tensors, devices and flags are those of the object in it, as far as they can be told
    without unpickling."""

    def __init__(self, path: str | bytes, name: str | bytes, mmap: bool | None) -> None:
        """A file that is one archive. ``name`` is what messages call it."""

    @staticmethod
    def from_descriptor(
        descriptor: int, name: str | bytes, begin: int, mmap: bool | None
    ) -> Reader:
        """The archive at ``begin`` of a regular file, of which more may follow. It is mapped only
        if ``begin`` is aligned. Keeps a descriptor of its own."""

    @staticmethod
    def from_stream(
        read_into: Callable[[memoryview], int], name: str | bytes, begin: int, bytes: int | None
    ) -> Reader:
        """The archive that ``read_into`` gives, all of which is read, into memory that `load` hands
        out. It fills the front of a buffer and returns how much that is, and 0 at the end.
        ``begin`` is where the archive starts and ``bytes`` what is left there, if that is
        known. What is no .fsd archive is read to the end of the stream."""

    @property
    def name(self) -> str: ...
    @property
    def format(self) -> str:
        """The container: "fsd", "pth" or "safetensors"."""

    @property
    def is_plain(self) -> bool:
        """Whether tensors, tree and flags are all there is to load; else the section PICKLE has to
        be unpickled."""

    @property
    def globals(self) -> list[str]:
        """What a pickle that is not plain refers to, as "module.name"."""

    @property
    def is_mapped(self) -> bool: ...
    @property
    def is_from_stream(self) -> bool:
        """Whether it was read whole into memory, which `load` hands out or gives back."""
    @property
    def version(self) -> tuple[int, int]: ...
    @property
    def file_flags(self) -> int: ...
    @property
    def file_bytes(self) -> int: ...
    @property
    def header_bytes(self) -> int: ...
    @property
    def devices(self) -> list[str]: ...
    @property
    def tensor_count(self) -> int: ...
    @property
    def storage_count(self) -> int: ...
    def section(self, kind: int) -> bytes | None:
        """The bytes of a section of the header, None if there is none. Numbers from 0x10000 on are
        for what other containers have."""

    def names(self) -> list[str]: ...
    def tensor(
        self, number: int
    ) -> tuple[int, tuple[int, ...], tuple[int, ...], int, int, int, int]:
        """(dtype number, shape, stride, storage, storage_offset, flags, same_as), counting
        items."""

    def storage(self, number: int) -> tuple[int, int, int | None, str, bool]:
        """(offset in the file, wherever the archive starts; bytes; checksum or None; device;
        whether it has no data). The checksum is a CRC32C or, in the format "pth", a CRC-32."""

    def load(
        self,
        is_ordered: bool,
        bases_only: bool,
        numbers: Sequence[int] | None = None,
        placed: Sequence[int] = ...,
        on_done: Callable[[int], object] | None = None,
    ) -> tuple[dict[str, torch.Tensor], list[int], dict[int, torch.Tensor]]:
        """Tensors by name, in a dict or an OrderedDict: all, or those of ascending numbers; the
        numbers of those that are None because they need more than DLPack; and for these, the bytes
        of each storage they lie in. Only storages of these tensors are read; of a stream once,
        and last. ``bases_only``: leave all to the caller. ``placed``: storages that are
        elsewhere already, so that only numpy arrays in them are read. ``on_done`` is told now and
        then how many bytes have been read; what it raises ends the reading."""

    def storages(
        self, numbers: Sequence[int] | None = None
    ) -> list[tuple[int, tuple[int, int, int | None, str, bool]]]:
        """The storages of tensors, of all or of ascending numbers, that have data and may be put
        elsewhere than in host memory: their numbers, and what `storage` tells of them."""

    def read(
        self,
        transfers: Sequence[tuple[int, int, int]],
        on_done: Callable[[int], object] | None = None,
    ) -> None:
        """Reads (offset in the file, bytes, address to put them) in parallel; they ascend."""

    def upload(
        self,
        transfers: Sequence[tuple[int, int, int, int]],
        streams: Sequence[tuple[int, int]],
        checksums: bool = False,
        direct_storage: bool = False,
        on_done: Callable[[int], object] | None = None,
    ) -> list[int]:
        """Copies (offset in the file, bytes, GPU, address in its memory), which ascend, through
        pinned memory, after the work in the stream of each GPU: (GPU, handle). Returns when all is
        there: the transfers' checksums, if asked for. Raises DeviceError."""

    def load_storages(self) -> dict[str, torch.Tensor]:
        """The storages that a pickle names, by key, as uint8 tensors. Of a stream once,
        and last."""

    def storage_places(self) -> dict[str, tuple[int, int]]:
        """The same storages' offsets in the file, wherever the archive starts, and their bytes."""

    def base(self, storage: int, begin: int, end: int) -> torch.Tensor:
        """Bytes of a storage as a uint8 tensor: a view of the mapping, or freshly read."""

    def mapped_file(self) -> MappedFile | None:
        """The file and what it is mapped to; None if it is not mapped."""

    def find_damage(self, checked: Sequence[int] = ...) -> list[int]:
        """Reads all data, but for storages that have been checked; those that differ from their
        checksums."""

def set_cuda_library(path: str) -> None:
    """What is opened as the CUDA driver from now on, "" for the system's: for tests."""

def cuda_version() -> int:
    """13000 for CUDA 13.0, as the driver has it. Raises UnsupportedError with the reason where
    there is no driver that can be used, or no GPU."""

def open_direct_storage() -> None:
    """Raises UnsupportedError with the reason where GPUDirect Storage is off."""

def cuda_device_count() -> int: ...
def set_pinned_bytes_max(bytes: int) -> None:
    """How much memory may be pinned for copies to and from GPUs, in all of the process."""

def pinned_bytes_max() -> int: ...
def pinned_bytes() -> int:
    """How much is."""

def release_pinned() -> None:
    """Gives up what is pinned and not in use."""

class Prefetch(metaclass=_pybind11_type):
    """A thread that brings a mapped file's data into memory, in the order of the file.

    ``numbers`` are those of the tensors, ascending, whose storages are wanted; None: all.
    """

    def __init__(self, reader: Reader, numbers: Sequence[int] | None = None) -> None: ...
    def stop(self) -> None: ...
