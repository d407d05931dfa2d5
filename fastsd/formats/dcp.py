"""torch.distributed.checkpoint: a directory of ``*.distcp`` files, and ``.metadata``, a pickle.

The pickle says which tensors there are, of which chunks they are made and where in the files those
lie. Here it is read into stand-ins for torch's classes, so that it can neither run nor change
anything, whatever it names.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch

from fastsd import _core
from fastsd.errors import FormatError, TruncatedError

METADATA_NAME = ".metadata"
SHARD_SUFFIX = ".distcp"
_METADATA_BYTES_MAX = 1 << 30
_NESTING_MAX = 500
_TUPLE_ITEMS_MAX = 1000


def read_dcp(directory: str | os.PathLike[str], trust: bool = False) -> dict[str, Any]:
    """The state that `torch.distributed.checkpoint.save` wrote, put together in memory, nested as
    it was: tensors on the CPU, whole whatever number of processes wrote them, and plain objects.

    Other objects, and globals in ``.metadata`` that torch does not write, are unpickled only with
    ``trust``; otherwise nothing in the directory can run code. No file outside it is read. Memory:
    the tensors, and twice the largest chunk.

    Raises FormatError, TruncatedError, pickle.UnpicklingError for objects that need trust, OSError.
    """
    directory = Path(directory)
    path = directory / METADATA_NAME
    try:
        metadata = _read_metadata(path, trust)
        chunks = list(_list_chunks(metadata))
        keys = _find_keys(metadata)
    except FormatError as error:
        raise type(error)(error.detail, path=str(path)) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:
        # Whatever the unpickler and objects that lack what they should have raise.
        detail = f"is damaged, or not what torch writes: {type(error).__name__}: {error}"
        raise FormatError(detail, path=str(path)) from error
    state = _read_chunks(directory, chunks, trust)
    return _nest({keys[name]: state[name] for name in keys}, path)


# ---- The metadata ----


def _read_metadata(path: Path, trust: bool) -> Any:
    if path.stat().st_size > _METADATA_BYTES_MAX:
        raise FormatError(f"is larger than {_METADATA_BYTES_MAX} bytes")
    return _Unpickler(io.BytesIO(path.read_bytes()), trust).load()


# In Python: the native one takes as much memory as a number in the stream says.
class _Unpickler(pickle._Unpickler):
    """Finds stand-ins, made for this file alone: a pickle can set attributes of a class, too."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)
    del dispatch[pickle.BYTEARRAY8[0]]  # so does this; torch has none

    def __init__(self, file: io.BytesIO, trust: bool) -> None:
        super().__init__(file)
        self._trust = trust
        self._found = _make_stand_ins()
        self._weights: dict[int, tuple[object, int]] = {}

    def weigh_tuple(self) -> None:
        """Refuses what as a key of a dictionary would take for ever, or all of the C stack: tuples
        that refer to one another, or are deep."""
        made = self.stack[-1]  # type: ignore[attr-defined]
        weight = 1 + sum(self._weights.get(id(part), (part, 1))[1] for part in made)
        if weight > _TUPLE_ITEMS_MAX:
            raise pickle.UnpicklingError(f"it has a tuple of more than {_TUPLE_ITEMS_MAX} items")
        self._weights[id(made)] = (made, weight)  # kept, so that nothing else gets its identity

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        package = module.partition(".")[0]
        if package in ("torch", "pathlib", "collections") and name in self._found:
            return self._found[name]
        if self._trust:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"it names {module}.{name}, which torch does not write here: load with trust if you "
            "trust who made it"
        )


def _weigh(load: Callable[..., None]) -> Callable[[_Unpickler], None]:
    def load_and_weigh(unpickler: _Unpickler) -> None:
        load(unpickler)
        unpickler.weigh_tuple()

    return load_and_weigh


for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    _Unpickler.dispatch[_code[0]] = _weigh(_Unpickler.dispatch[_code[0]])


def _make_stand_ins() -> dict[str, Any]:
    class Record:
        storage_data = planner_data = transform_descriptors = offset = None

        def __init__(self, *args: object) -> None:
            pass

    class Properties(Record):
        def __setstate__(self, state: tuple[Any, ...]) -> None:
            self.dtype = state[0]

    class Index(Record):
        def _key(self) -> object:
            return (self.fqn, self.offset)  # type: ignore[attr-defined]

        def __hash__(self) -> int:
            return hash(self._key())

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Index) and self._key() == other._key()

    names = ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")
    others = ("StorageMeta", "_StorageInfo", "_MEM_FORMAT_ENCODING", "PosixPath", "_get_layout")
    return {
        **{name: type(name, (Record,), {}) for name in (*names, *others)},
        "TensorProperties": Properties,
        "MetadataIndex": Index,
        "Size": lambda sizes=(): tuple(sizes),
        "OrderedDict": dict,
    }


def _find_keys(metadata: Any) -> dict[str, tuple[Any, ...]]:
    """Under which keys each entry was, one inside the other. Raises FormatError."""
    paths = metadata.planner_data or {}
    found = {name: paths.get(name, (name,)) for name in metadata.state_dict_metadata}
    for keys in found.values():
        is_path = isinstance(keys, tuple) and 0 < len(keys) <= _NESTING_MAX
        if not (is_path and all(type(key) in (str, int) for key in keys)):
            raise FormatError(f"has no name, or too long a one: {keys!r:.100}")
    if len(set(found.values())) < len(found):
        raise FormatError("has two entries with one name")
    return found


class _Chunk:
    """A part of a tensor, or a whole object, and where it lies. Raises FormatError."""

    def __init__(self, name: str, entry: Any, part: Any, info: Any) -> None:
        self.name = name
        self.file, self.begin, self.nbytes = info.relative_path, info.offset, info.length
        if info.transform_descriptors:
            raise FormatError(f"{name!r} is compressed, which cannot be read")
        if not (_is_size(self.begin) and _is_size(self.nbytes) and isinstance(self.file, str)):
            raise FormatError(f"{name!r} has no place in a file")
        self.is_tensor = part is not None
        if part is None:
            return
        self.shape, self.dtype = tuple(entry.size), entry.properties.dtype
        self.offsets, self.sizes = tuple(part.offsets), tuple(part.sizes)
        dims = (self.shape, self.offsets, self.sizes)
        if not all(_is_size(n) for dim in dims for n in dim) or len({*map(len, dims)}) != 1:
            raise FormatError(f"{name!r} has a chunk without a place in it")
        if any(n > s or o > s - n for s, o, n in zip(*dims[:2], self.sizes, strict=True)):
            raise FormatError(f"{name!r} has shape {self.shape} and a chunk outside it")
        if math.prod(self.sizes) * self.dtype.itemsize > self.nbytes:
            raise FormatError(f"{name!r} has a chunk that is larger than its place in the file")


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _list_chunks(metadata: Any) -> Iterator[_Chunk]:
    # By what identifies them: the objects' own order of attributes is not to be relied on.
    places = {(i.fqn, i.offset): info for i, info in metadata.storage_data.items()}
    for name, entry in metadata.state_dict_metadata.items():
        parts = getattr(entry, "chunks", None)
        if parts is None:
            yield _Chunk(name, entry, None, places[name, None])
            continue
        yield from (_Chunk(name, entry, part, places[name, part.offsets]) for part in parts)
        # Else there would be memory that nobody has written.
        if not parts or sum(math.prod(p.sizes) for p in parts) != math.prod(entry.size):
            raise FormatError(f"{name!r} is not made of its chunks, or they overlap")


# ---- The chunks ----


def _read_chunks(directory: Path, chunks: list[_Chunk], trust: bool) -> dict[str, Any]:
    by_file: dict[str, list[_Chunk]] = defaultdict(list)
    for chunk in chunks:
        by_file[chunk.file].append(chunk)
    files = {name: _inside(directory, name) for name in by_file}
    for name, path in files.items():
        # Else a small file could be loaded many times over.
        if sum(chunk.nbytes for chunk in by_file[name]) > (actual := path.stat().st_size):
            detail = f"has {actual} bytes, less than its chunks: an interrupted copy?"
            raise TruncatedError(detail, path=str(path))
    state: dict[str, Any] = {}
    for name, path in files.items():
        of_file = by_file[name]
        with path.open("rb", buffering=0) as file:
            for chunk in sorted(of_file, key=lambda c: c.begin):
                view = _View(file.fileno(), chunk.begin, chunk.nbytes)
                try:
                    _put(state, chunk, _load(view, chunk, trust))
                except FormatError as error:
                    raise type(error)(error.detail, path=str(path)) from error
                except pickle.UnpicklingError as error:
                    raise _name_globals(error, view, f"{path}: {chunk.name!r}") from error
                except (OSError, MemoryError):
                    raise
                except Exception as error:
                    detail = f"{chunk.name!r} is damaged: {type(error).__name__}: {error}"
                    raise FormatError(detail, path=str(path)) from error
    return state


def _name_globals(error: pickle.UnpicklingError, view: _View, place: str) -> Exception:
    """The error with what the object names in place of torch's advice, if torch can tell."""
    try:
        view.seek(0)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(view)  # type: ignore[arg-type]
    except Exception:  # damaged, or a torch that has no such function
        return pickle.UnpicklingError(f"{place}: {error}")
    return pickle.UnpicklingError(f"{place} names {', '.join(names)}, which needs trust")


def _inside(directory: Path, name: str) -> Path:
    """The path of a file of the directory. Raises FormatError if it leads out of it."""
    path = directory / name
    try:
        is_inside = path.resolve().is_relative_to(directory.resolve())
    except (ValueError, RuntimeError):  # no name at all (a zero byte, half a character); a circle
        is_inside = False
    if not is_inside:
        raise FormatError(f"names a file outside the directory: {name!r}", path=str(directory))
    return path


def _load(view: _View, chunk: _Chunk, trust: bool) -> Any:
    view.check()
    with zipfile.ZipFile(view) as records:
        if any(r.compress_type != zipfile.ZIP_STORED for r in records.infolist()):
            raise FormatError(f"{chunk.name!r} is compressed, which torch never writes")
        pickles = [name for name in records.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise FormatError(f"{chunk.name!r} is not what torch.save writes")
        problem = _core.find_bad_nesting(records.read(pickles[0]))
    if problem is not None:
        raise FormatError(f"{chunk.name!r} cannot be unpickled: {problem}")
    view.seek(0)
    value = torch.load(view, map_location="cpu", weights_only=chunk.is_tensor or not trust)  # type: ignore[arg-type]
    if chunk.is_tensor and not (
        isinstance(value, torch.Tensor)
        and value.dtype == chunk.dtype
        and tuple(value.shape) == chunk.sizes
    ):
        raise FormatError(f"{chunk.name!r} is not the {chunk.dtype} of {chunk.sizes} it should be")
    return value


def _put(state: dict[str, Any], chunk: _Chunk, value: Any) -> None:
    if not chunk.is_tensor or chunk.sizes == chunk.shape:
        state[chunk.name] = value
        return
    if chunk.name not in state:
        # Zeros cost nothing until they are replaced, and nothing else shows where chunks overlap.
        state[chunk.name] = torch.zeros(chunk.shape, dtype=chunk.dtype, device="cpu")
    target = state[chunk.name]
    for dim, (begin, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
        target = target.narrow(dim, begin, length)
    target.copy_(value)


class _View(io.RawIOBase):
    """Part of a file as a file of its own."""

    def __init__(self, descriptor: int, begin: int, nbytes: int) -> None:
        self._descriptor, self._begin, self._nbytes, self._at = descriptor, begin, nbytes, 0

    def check(self) -> None:
        """Raises TruncatedError if the file ends before the part."""
        end = self._begin + self._nbytes
        if end > (actual := os.fstat(self._descriptor).st_size):
            raise TruncatedError(f"ends at {actual} bytes; a chunk reaches to {end}")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._nbytes}[whence]
        if origin + offset < 0:
            raise OSError("seek before the beginning")
        self._at = origin + offset
        return self._at

    def readinto(self, target: Any) -> int:
        left = memoryview(target)[: max(0, self._nbytes - self._at)]
        got = os.preadv(self._descriptor, [left], self._begin + self._at)
        self._at += got
        return got


# ---- Nesting ----


def _nest(leaves: dict[tuple[Any, ...], Any], path: Path) -> dict[str, Any]:
    """What was flattened: strings lead into dictionaries, integers into lists."""
    root: dict[Any, Any] = {}
    for keys, value in leaves.items():
        node: Any = root
        for key in keys[:-1]:
            node = node.setdefault(key, _Branch())
            if not isinstance(node, _Branch):
                raise FormatError(f"{keys!r} leads into a value", path=str(path))
        if isinstance(node.get(keys[-1]), _Branch):
            raise FormatError(f"{keys!r} is a value and leads to others", path=str(path))
        node[keys[-1]] = value
    return {key: _settle(node, path) for key, node in root.items()}


class _Branch(dict[Any, Any]):
    """A dictionary or, if its keys are integers, a list that is not complete."""


def _settle(node: Any, path: Path) -> Any:
    if not isinstance(node, _Branch):
        return node
    make: Callable[[Any], Any] = lambda child: _settle(child, path)  # noqa: E731
    if all(type(key) is str for key in node):
        return {key: make(child) for key, child in node.items()}
    if {*node} != {*range(len(node))}:
        raise FormatError("has a list with items missing", path=str(path))
    return [make(node[i]) for i in range(len(node))]
