"""Objects that are not plain data: torch's own pickle stream, over the container's storages.

torch.save's stream (`data.pkl` in its zip files) names storages by keys and holds everything else.
torch writes and reads it here too, `weights_only` and `map_location` included; only the records go
elsewhere: the stream to a section of the header, each storage, whole, to one of the container's.
That it may be asked to is private to torch (`torch.serialization._save` and `_load`), and tested.
"""

from __future__ import annotations

import ctypes
import io
import mmap
import os
import pickle
import re
import struct
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from traceback import walk_tb
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import _weights_only_unpickler, serialization

from fastsd import _core, gpu
from fastsd.errors import FormatError
from fastsd.formats import fsd
from fastsd.names import NameRules
from fastsd.placement import fakes_tensors, skips_data
from fastsd.tensors import CPU, Describer
from fastsd.upload import fetch, moved_by

_STREAM = "data.pkl"
_STORAGE = "data/"
_ALIGNMENT = ".storage_alignment"
_ALIGN_BYTES = 64  # where a file does not say it


class Pickled(NamedTuple):
    """An object as torch.save writes it: the stream, and the storages that it names, by key.

    ``records`` are those that torch.save would put before the storages, the stream among them.
    """

    stream: bytes
    storages: dict[str, torch.UntypedStorage]
    records: Sequence[tuple[str, str | bytes]] = ()


def dump(
    obj: object, pickle_module: Any, pickle_protocol: int | None, *, without_byteorder: bool = False
) -> Pickled:
    """Pickles an object as torch.save does; raises what it raises.

    Storages in CPU memory, and on GPUs that the core reads, are shared with the object; others are
    copied.
    """
    module = pickle if pickle_module is None else pickle_module
    protocol = serialization.DEFAULT_PROTOCOL if pickle_protocol is None else pickle_protocol
    serialization._check_dill_version(module)
    with _Recorder() as recorder:
        # Releases without skip_data copy all, too.
        if gpu.is_in_use() and hasattr(serialization, "skip_data") and not skips_data():
            module = _watch(module, recorder.found)
        serialization._save(obj, recorder, module, protocol, without_byteorder)
    return Pickled(recorder.stream, recorder.storages, recorder.records)


def _watch(module: Any, found: dict[str, torch.UntypedStorage]) -> Any:
    """The module to pickle with, which notes the storages by the keys that torch gives them: torch
    itself hands over host copies, of which all would be kept until they are written."""

    class Pickler(module.Pickler):  # type: ignore[misc]
        def __init_subclass__(cls) -> None:
            super().__init_subclass__()
            identify = cls.persistent_id

            def persistent_id(self: Any, obj: Any) -> Any:
                identity = identify(self, obj)
                if identity is not None:
                    found[identity[2]] = getattr(obj, "_untyped_storage", obj)
                return identity

            cls.persistent_id = persistent_id

    return SimpleNamespace(Pickler=Pickler)


def wrap_stream(stream: bytes, byte_order: str = "little") -> list[tuple[str, str | bytes]]:
    """The records of a file with this stream, as torch 2.13 writes them, for `plan_zip`."""
    version = (".format_version", "1")
    alignment = (_ALIGNMENT, str(_ALIGN_BYTES))
    return [(_STREAM, stream), version, alignment, ("byteorder", byte_order)]


def plan_zip(
    records: Sequence[tuple[str, str | bytes]], storages: Mapping[str, Any], archive: str
) -> _core.Plan:
    """Lays out what torch.save writes: records, and storages by their keys in the stream.

    A storage is an UntypedStorage in CPU memory, or a contiguous tensor of all its bytes.
    ``archive`` is the folder within the file.
    """
    describer = Describer()
    names = [_STORAGE + key for key in storages]
    plan = _core.Plan(names, list(storages.values()), describer)
    align_bytes = int(dict(records).get(_ALIGNMENT, _ALIGN_BYTES))
    plan.finish_zip(archive, records, align_bytes)
    return plan


def find_archive_name(path: bytes | None) -> str:
    """What torch.save calls the folder in a file at a path, or None: in a file object."""
    name = os.path.basename(path or b"").rpartition(b".")
    stem = name[0] or name[2] * (not name[1])
    return stem.decode() if stem and (path or b"").isascii() else "archive"


class _Recorder:
    """What torch takes for a zip file to write to.

    ``found`` are the storages that have been pickled, by key, if they are watched.
    """

    def __init__(self) -> None:
        self.stream = b""
        self.records: list[tuple[str, str | bytes]] = []
        self.storages: dict[str, torch.UntypedStorage] = {}
        self.found: dict[str, torch.UntypedStorage] = {}
        self._without_data = ExitStack()

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        self._without_data.close()
        self.found.clear()  # the class that torch derives has it until garbage is collected

    def write_record(self, name: str, data: Any, nbytes: int) -> None:
        if name.startswith(_STORAGE):
            if isinstance(data, int):  # releases before 2.3 give the address
                data = _copy_memory(data, nbytes)
            self.storages[name.removeprefix(_STORAGE)] = data
            return
        self.records.append((name, data))
        if name == _STREAM:
            self.stream = data
            # All has been pickled; storages are next, which torch need not copy.
            if any(gpu.is_served(gpu.device_of(storage)) for storage in self.found.values()):
                self._without_data.enter_context(serialization.skip_data())

    def write_record_metadata(self, name: str, nbytes: int) -> None:
        """Under torch.serialization.skip_data: room for the bytes, which are zero, unless it is on
        because they have been found."""
        key = name.removeprefix(_STORAGE)
        storage = self.found.get(key)
        if storage is None:
            storage = _make_zeros(nbytes)
        elif not gpu.is_served(gpu.device_of(storage)):
            storage = storage.cpu()
        self.storages[key] = storage


def _copy_memory(address: int, nbytes: int) -> torch.UntypedStorage:
    storage = torch.UntypedStorage(nbytes)
    ctypes.memmove(storage.data_ptr(), address, nbytes)
    return storage


def _make_zeros(nbytes: int) -> torch.UntypedStorage:
    # Anonymous memory takes no room as long as it is only read.
    if nbytes == 0:
        return torch.UntypedStorage(0)
    zeros = torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
    return zeros.untyped_storage()


class Unpickling(NamedTuple):
    """How a stream may be read: the arguments of torch.load of these names."""

    weights_only: bool | None = None
    pickle_module: Any = None
    load_args: Mapping[str, Any] = MappingProxyType({})

    def check(self) -> None:
        """Raises RuntimeError where torch.load does, whatever is in the file."""
        if self.weights_only and self.pickle_module is not None:
            raise RuntimeError(
                "Can not safely load weights when explicit pickle_module is specified"
            )


def is_restricted(how: Unpickling) -> bool:
    """Whether the restricted unpickler reads, by torch.load's rules: the environment may force it
    either way, but not against an explicit ``weights_only=True``."""
    must = _is_set("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    must_not = _is_set("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    if must and must_not:
        raise RuntimeError(
            "Only one of `TORCH_FORCE_WEIGHTS_ONLY_LOAD` or `TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD` "
            "should be set, but both were set."
        )
    if must:
        how._replace(weights_only=True).check()
        return True
    if how.weights_only is not None:
        return how.weights_only
    if must_not:
        _warn(
            "Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD detected, since the "
            "`weights_only` argument was not explicitly passed to `fastsd.load`, forcing "
            "weights_only=False."
        )
        return False
    # An explicit pickle module is for what the restricted unpickler cannot read.
    return how.pickle_module is None


def _is_set(variable: str) -> bool:
    return os.getenv(variable, "0").lower() in ("1", "y", "yes", "true")


def _warn(message: str) -> None:
    """Warns whoever has called fastsd."""
    level = 1
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("fastsd."):
        level += 1
        frame = frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def is_turned_by_default(reader: _core.Reader) -> bool:
    """Whether a file does not say its byte order, and torch has been told that it is big then."""
    is_unsaid = reader.format == "pth" and reader.section(fsd.Section.BYTE_ORDER) is None
    return is_unsaid and (
        serialization.get_default_load_endianness() == serialization.LoadEndianness.BIG
    )


def load(reader: _core.Reader, stream: bytes, map_location: Any, how: Unpickling) -> Any:
    """The object of a stream; its storages are views of the file, or have been read.

    Raises FormatError where stream and storages disagree, and what torch.load raises.
    """
    with ExitStack() as moving:
        records = _Records(reader, stream, moving)
        obj = _load(records, stream, map_location, how)
    records.check_moved()
    return obj


def _load(records: _Records, stream: bytes, map_location: Any, how: Unpickling) -> Any:
    load_args = {"encoding": "utf-8", **how.load_args}
    if not is_restricted(how):
        module = how.pickle_module or pickle
        serialization._check_dill_version(module)
        return serialization._load(records, map_location, module, **load_args)
    if how.load_args:
        _warn("pickle_load_args only works if `weights_only=False`.")
    try:
        problem = _core.find_bad_nesting(stream)
        if problem:
            raise pickle.UnpicklingError(problem)
        if b"sparse" in stream:
            return _load_sparse(records, map_location, load_args)
        return serialization._load(records, map_location, _weights_only_unpickler, **load_args)
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError(explain(records.path, str(error))) from None
    except (MemoryError, OSError):
        raise
    except Exception as error:
        if not _is_from_unpickling(error):
            raise  # what a map_location, or a class that was declared safe, has to say
        if type(error) in (RuntimeError, ValueError):
            raise type(error)(f"{records.path}: {error}") from error
        if isinstance(error, RuntimeError):  # out of a device's memory, for one
            raise
        detail = f"section pickle is damaged: {type(error).__name__}: {error}"
        raise pickle.UnpicklingError(f"{records.path}: {detail}") from error


def _is_from_unpickling(error: BaseException) -> bool:
    """Whether it was raised in torch's unpickling itself, rather than in what that has called."""
    modules = find_modules(error)
    while modules[-1] == "re":  # which torch has look at the places that a stream names
        modules.pop()
    return modules[-1] in _UNPICKLING


def find_modules(error: BaseException) -> list[str]:
    """The modules whose code an error has come through, that which raised it last."""
    return [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]


_UNPICKLING = {
    "torch._weights_only_unpickler",
    "torch.serialization",
    "torch._utils",
    "torch._tensor",
    "torch.nn.parameter",
    __name__,
}


def _load_sparse(records: _Records, map_location: Any, load_args: dict[str, Any]) -> Any:
    while True:
        try:
            module = make_restricted_module(SparseTensors.check)
            return serialization._load(records, map_location, module, **load_args)
        except ListClearedError:
            pass


class ListClearedError(Exception):
    """Another thread's load has cleared the list of sparse tensors that are to be checked."""


class SparseTensors(list[torch.Tensor]):
    """Those that an unpickler has made: torch's own leaves them unchecked unless it is told to.

    Their indices may then lie outside of them, and what uses them would write anywhere. torch lists
    them for all threads together, and each load of each thread clears the list when it is done.
    """

    def check(self) -> None:
        """Raises RuntimeError for one with indices beyond it."""
        if not (skips_data() or fakes_tensors()):
            for tensor in self:
                _check_sparse(tensor)


def make_restricted_module(
    take: Callable[[SparseTensors], None], prepare: Callable[[Any], None] = lambda file: None
) -> Any:
    """What torch takes for a module to unpickle with: its restricted unpickler, which hands over
    the sparse tensors that it has made, and has a file prepared before it reads it.

    It raises ListClearedError where it has to be called again.
    """

    class Unpickler(_weights_only_unpickler.Unpickler):
        def __init__(self, file: Any, **options: Any) -> None:
            prepare(file)
            super().__init__(file, **options)

        def load(self) -> Any:
            listed = torch._utils._sparse_tensors_to_validate
            marker = torch.empty(0, layout=torch.sparse_coo, device=CPU)
            listed.append(marker)
            try:
                obj = super().load()  # type: ignore[no-untyped-call]
                found = SparseTensors(listed)
                if all(tensor is not marker for tensor in found):
                    raise ListClearedError
                take(found)
                return obj
            finally:
                listed.clear()  # or else the next file would have to answer for them

    def load(file: Any, **options: Any) -> Any:
        return Unpickler(file, **options).load()

    return SimpleNamespace(__name__=__name__, Unpickler=Unpickler, load=load)


def _check_sparse(tensor: torch.Tensor) -> None:
    """Raises RuntimeError for indices that lie outside of their tensor."""
    if tensor.device.type == "meta":
        return
    if tensor.layout == torch.sparse_coo:
        # Whether they are sorted harms nobody.
        args = (tensor._indices(), tensor._values(), tensor.size(), False)
        _check_unpinned(torch._validate_sparse_coo_tensor_args, *args)
        return
    is_by_row = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    compressed = tensor.crow_indices() if is_by_row else tensor.ccol_indices()
    plain = tensor.col_indices() if is_by_row else tensor.row_indices()
    _check_unpinned(
        torch._validate_sparse_compressed_tensor_args,
        *(compressed, plain, tensor.values(), tensor.size(), tensor.layout),
    )


def _check_unpinned(check: Callable[..., None], *args: Any) -> None:
    try:
        check(*args, check_pinning=False)
    except TypeError:  # older releases have no such argument
        check(*args)


def choose(obj: object, rules: NameRules, path: str) -> dict[str, torch.Tensor]:
    """The tensors of an object that rules choose, under their new names, in a flat dictionary.

    Names are the keys on the way to a tensor, joined by dots, as in a file without a pickle. The
    `_metadata` of the innermost dictionary that the prefix leads into is kept. Raises NamesError.
    """
    tensors: dict[str, torch.Tensor] = {}
    holders: dict[str, Mapping[Any, Any]] = {}
    try:
        _collect(obj, "", tensors, holders, {})
    except RecursionError:
        raise FormatError("the object is nested too deeply to choose from", path=path) from None
    choice = rules.choose(list(tensors), path)
    values = list(tensors.values())
    chosen = OrderedDict(
        (new, values[i]) for new, i in zip(choice.names, choice.numbers, strict=True)
    )
    inner = max((way for way in holders if rules.prefix.startswith(way)), key=len, default=None)
    if inner is not None:
        metadata = rules.rename_modules(holders[inner], rules.prefix[len(inner) :])
        if metadata is not None:
            vars(chosen)["_metadata"] = metadata
    return chosen


def _collect(
    obj: object,
    way: str,
    tensors: dict[str, torch.Tensor],
    holders: dict[str, Mapping[Any, Any]],
    seen: dict[int, object],
) -> None:
    """Finds tensors, and dictionaries with `_metadata`, by the way that first leads to them.

    ``seen`` holds by identity what has been walked, and so keeps it from being another's.
    """
    if isinstance(obj, torch.Tensor):
        tensors.setdefault(way.removesuffix("."), obj)
        return
    if not isinstance(obj, (Mapping, list, tuple)) or id(obj) in seen:
        return
    seen[id(obj)] = obj
    metadata = getattr(obj, "_metadata", None)
    if isinstance(metadata, Mapping):
        holders[way] = metadata
    for key, value in obj.items() if isinstance(obj, Mapping) else enumerate(obj):
        _collect(value, f"{way}{key}.", tensors, holders, seen)


_TRUST = (
    "Pass `weights_only=False` to `fastsd.load` only if you trust the source of the file: loading "
    "it may then run any code."
)


def explain(path: str, message: str) -> str:
    """torch's message, with what can be done about it."""
    text = f"{path}: Weights only load failed. "
    if "must be imported to load" in message:
        return f"{text}{message}\n{_TRUST}"
    if re.search(r"GLOBAL (\S+) was not an allowed global by default", message):
        text += (
            "This file can still be loaded; to do so you have two options:\n"
            f"\t(1) {_TRUST}\n"
            "\t(2) To keep `weights_only=True`, allow what is missing, as this message says: "
        )
    else:
        text += (
            f"{_TRUST}\nIf it should load without, file an issue with the following so that we can "
            "make `weights_only=True` compatible with it: "
        )
    return f"{text}WeightsUnpickler error: {message}"


def find_unsafe_globals(stream: bytes, path: str) -> list[str]:
    """What a stream refers to by name and the restricted unpickler does not allow now."""
    try:
        found = _weights_only_unpickler.get_globals_in_pkl(io.BytesIO(stream))
    except (pickle.UnpicklingError, EOFError, LookupError, ValueError, struct.error) as error:
        raise pickle.UnpicklingError(f"{path}: {type(error).__name__}: {error}") from error
    allowed = _weights_only_unpickler._get_allowed_globals().keys()
    return sorted(found - allowed - _weights_only_unpickler._get_user_allowed_globals().keys())


class _Records:
    """What torch takes for a zip file to read from.

    As long as ``moving`` is open, what torch moves of a mapped file to an accelerator is read from
    the file. That is done at once, as what is being unpickled may look at it.
    """

    def __init__(self, reader: _core.Reader, stream: bytes, moving: ExitStack) -> None:
        self._reader = reader
        self._moving = moving
        self.path = reader.name
        self._stream = stream
        self._byte_order = reader.section(fsd.Section.BYTE_ORDER)
        if reader.format == "fsd":
            self._byte_order = b"little"
        self._is_turned = self._byte_order == b"big" or is_turned_by_default(reader)
        self._places = reader.storage_places()
        self._storages: dict[str, torch.Tensor] | None = None
        self._moved: list[tuple[str, torch.UntypedStorage, int]] = []

    def has_record(self, name: str) -> bool:
        return name == _STREAM or (name == "byteorder" and self._byte_order is not None)

    def get_record(self, name: str) -> bytes:
        return (self._byte_order or b"") if name == "byteorder" else self._stream

    def get_storage_from_record(self, name: str, nbytes: int, dtype: Any) -> torch.Tensor:
        """All bytes of a storage, as a tensor whose own storage holds nothing else."""
        key, _, stored = self._find(name)
        if nbytes > stored:
            raise self._damaged(key, f"of {nbytes} bytes, which has {stored}")
        if self._storages is None:
            self._storages = self._reader.load_storages()
        tensor = self._storages[key]
        if nbytes < stored:
            tensor = self._cut(tensor.untyped_storage(), nbytes)
        self._watch_moves(key, tensor.untyped_storage())
        return tensor

    def _watch_moves(self, key: str, storage: torch.UntypedStorage) -> None:
        offset, _ = self._places[key]
        reader = self._reader
        # Those in the other byte order are turned around in memory before they are moved.
        is_read = reader.is_mapped and not self._is_turned

        def move(device: torch.device) -> torch.UntypedStorage:
            nbytes = storage.nbytes()
            moved = (
                fetch(reader, offset, nbytes, device)
                if is_read
                else torch.UntypedStorage.to(storage, device=device)
            )
            self._moved.append((key, moved, nbytes))
            return moved

        self._moving.enter_context(moved_by(storage, move))

    def check_moved(self) -> None:
        """Raises RuntimeError, as torch does for memory of the host, where a tensor reaches beyond
        a storage on an accelerator. torch makes those larger, by bytes of whoever had them."""
        for key, storage, nbytes in self._moved:
            if storage.nbytes() > nbytes:
                detail = f"a tensor reaches beyond storage {key!r}, which has {nbytes} bytes"
                raise RuntimeError(f"{self.path}: {detail}")

    def get_record_offset(self, name: str) -> int:
        return self._find(name)[1]

    def serialization_id(self) -> str:
        return ""

    def _find(self, name: str) -> tuple[str, int, int]:
        """The key of a storage, its offset in the file and its bytes."""
        key = name.removeprefix(_STORAGE)
        if key not in self._places:
            raise self._damaged(key, "which is not in the file")
        return key, *self._places[key]

    def _cut(self, storage: torch.UntypedStorage, nbytes: int) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device=CPU).set_(storage[:nbytes])

    def _damaged(self, key: str, why: str) -> FormatError:
        return FormatError(
            f"section pickle is damaged: it names a storage {key!r} {why}", path=self._reader.name
        )
