"""Between torch's tensors and the views that an archive holds.

Plain tensors never come here: the core makes and describes them itself, through DLPack. What needs
more than that does: flags, shared storages, devices, meta tensors, dtypes that DLPack lacks, numpy
arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.utils.dlpack
from torch.serialization import location_tag
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import warn_if_has_hooks

from fastsd import _core, gpu
from fastsd.errors import FormatError, NotPlainError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Place = tuple[int, int] | None
    Described = tuple[int | None, int, tuple[int, ...], tuple[int, ...], int, int, int, Place]

# docs/FORMAT.md, "Tensors": flags.
REQUIRES_GRAD = 1
IS_PARAMETER = 2
IS_CONJ = 4
IS_NEG = 8
IS_ARRAY = 16

CPU = "cpu"

# Older releases of torch lack some of the dtypes.
_DTYPES: dict[int, torch.dtype] = {
    number: getattr(torch, name) for number, name, _ in _core.DTYPES if hasattr(torch, name)
}
_NUMBERS: dict[torch.dtype, int] = {dtype: number for number, dtype in _DTYPES.items()}
_NAMES: dict[int, str] = {number: name for number, name, _ in _core.DTYPES}
_NUMPY_NUMBERS: dict[np.dtype[np.generic], int] = {
    np.dtype(name): number
    for number, name, _ in _core.DTYPES
    if name.removeprefix("u").startswith(("bool", "int", "float", "complex"))
    and isinstance(getattr(np, name, None), type)
    and number in _DTYPES
}

# Older releases have no exchange table: every tensor then takes the slower ways of this module.
_core.set_torch(
    torch.Tensor,
    torch.uint8,
    torch.int8,
    torch.utils.dlpack.from_dlpack,
    getattr(torch.Tensor, "__dlpack_c_exchange_api__", None),
)


Restore = Callable[[torch.UntypedStorage, str], torch.UntypedStorage]
"""Puts a storage, saved from the given device, where it belongs."""


class TensorRecord(NamedTuple):
    """A tensor of an archive, as the core reports it. Strides and offset count items."""

    dtype: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage: int
    storage_offset: int
    flags: int
    same_as: int


class StorageRecord(NamedTuple):
    """A storage of an archive. ``offset`` is that of its first byte in the file."""

    offset: int
    nbytes: int
    checksum: int | None
    device: str
    has_no_data: bool


def dtype_of(number: int) -> torch.dtype:
    """The torch dtype of a number of the format; raises if this release of torch has none."""
    try:
        return _DTYPES[number]
    except KeyError:
        raise FormatError(
            f"dtype {_NAMES.get(number, number)} does not exist in torch {torch.__version__}"
        ) from None


def number_of(dtype: torch.dtype) -> int:
    """The number of the format for a torch dtype. Raises KeyError if it has none."""
    return _NUMBERS[dtype]


def is_numpy_native(dtype: np.dtype[np.generic]) -> bool:
    """Whether arrays of this dtype are stored as they are, as tensors of the same dtype."""
    return dtype in _NUMPY_NUMBERS


class Describer:
    """Describes to the core what it does not describe itself; an instance serves one save.

    ``devices`` are the names that the archive records; number 0 is the CPU. The core reads the
    memory of GPUs itself; that of other devices is copied to the host, and the copies live as long
    as the describer.
    """

    def __init__(self) -> None:
        self.devices = [CPU]
        self._kept: list[object] = []
        self._places: dict[torch.device, Place] = {}
        self._host_copies: dict[tuple[str, int, int], torch.UntypedStorage] = {}

    def __call__(
        self, name: str, value: torch.Tensor | np.ndarray | torch.UntypedStorage
    ) -> Described:
        if isinstance(value, np.ndarray):
            return self._describe_array(value)
        if isinstance(value, torch.UntypedStorage):
            return self._describe_storage(value)
        return self._describe_tensor(name, value)

    def _describe_array(self, array: np.ndarray) -> Described:
        identity = id(array)
        itemsize = array.itemsize
        if any(s < 0 or s % itemsize for s in array.strides):
            array = np.ascontiguousarray(array)
            self._kept.append(array)
        stride = tuple(s // itemsize for s in array.strides)
        number = _NUMPY_NUMBERS[array.dtype]
        return (array.ctypes.data, number, array.shape, stride, IS_ARRAY, 0, identity, None)

    def _describe_storage(self, storage: torch.UntypedStorage) -> Described:
        """All bytes of a storage, which counts as one of the CPU wherever it lies."""
        number = _NUMBERS[torch.uint8]
        address, place = self._find(storage)
        return (address, number, (storage.nbytes(),), (1,), 0, 0, id(storage), place)

    def _describe_tensor(self, name: str, tensor: torch.Tensor) -> Described:
        check_plain(name, tensor)
        storage = tensor.untyped_storage()
        device = self._device_number(location_tag(storage))
        address: int | None = None
        place: Place = None
        if not tensor.is_meta:
            check_within_storage(name, tensor, storage)
            address, place = self._find(storage)
            if address:  # else it has been freed
                address += int(tensor.storage_offset()) * tensor.itemsize
        flags = (
            REQUIRES_GRAD * tensor.requires_grad
            | IS_PARAMETER * isinstance(tensor, torch.nn.Parameter)
            | IS_CONJ * tensor.is_conj()
            | IS_NEG * tensor.is_neg()
        )
        number = _NUMBERS[tensor.dtype]
        shape, stride = tuple(tensor.shape), tensor.stride()
        return (address, number, shape, stride, flags, device, id(tensor), place)

    def _device_number(self, tag: str) -> int:
        if tag not in self.devices:
            self.devices.append(tag)
        return self.devices.index(tag)

    def _find(self, storage: torch.UntypedStorage) -> tuple[int, Place]:
        """The address at which a storage's bytes, or their host copies, are, and on which GPU."""
        device = gpu.device_of(storage)
        if device.type == CPU:
            return storage.data_ptr(), None
        if not gpu.is_served(device):
            return self._host_copy(storage).data_ptr(), None
        if device not in self._places:
            self._places[device] = (gpu.ordinal_of(device), gpu.current_stream(device))
        return storage.data_ptr(), self._places[device]

    def _host_copy(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        # Several Python objects may stand for one storage, and storages of several sizes start
        # alike.
        key = (str(storage.device), storage.data_ptr(), storage.nbytes())
        if key not in self._host_copies:
            self._host_copies[key] = storage.cpu()
        return self._host_copies[key]


def check_plain(name: str, tensor: torch.Tensor) -> None:
    """Raises NotPlainError unless the container can hold the tensor without pickle."""
    kind = type(tensor)
    if kind not in (torch.Tensor, torch.nn.Parameter):
        reason = f"is a {kind.__module__}.{kind.__qualname__}, a subclass of torch.Tensor"
    elif tensor.layout != torch.strided:
        reason = f"has layout {tensor.layout}"
    elif tensor.is_quantized:
        reason = f"is quantized ({tensor.dtype})"
    elif tensor.is_nested:
        reason = "is a nested tensor"
    elif tensor.dtype not in _NUMBERS:
        reason = f"has dtype {tensor.dtype}"
    else:
        return
    raise NotPlainError(f'tensor "{name}" {reason}')


def check_within_storage(name: str, tensor: torch.Tensor, storage: torch.UntypedStorage) -> None:
    """Raises UnsupportedError for a tensor whose storage was made smaller under it."""
    extent = extent_items(tensor.shape, tensor.stride())
    needed = (tensor.storage_offset() + extent) * tensor.itemsize
    if extent > 0 and needed > storage.nbytes():
        raise UnsupportedError(
            f'tensor "{name}" needs {needed} bytes of a storage of {storage.nbytes()} bytes'
        )


def warn_of_hooks(values: Iterable[torch.Tensor | np.ndarray]) -> None:
    """Warns of backward hooks, which are not saved, as torch.save does (not of parameters')."""
    for value in [value for value in values if getattr(value, "_backward_hooks", None)]:
        if not isinstance(value, torch.nn.Parameter):
            warn_if_has_hooks(value)


def extent_items(shape: Sequence[int], stride: Sequence[int]) -> int:
    """How many items a strided view reaches over, from its first to its last."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory as an array, which no mode may make a fake one."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return tensor.numpy()
    with _disable_current_modes():
        return tensor.numpy()


def view_storage(
    storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, record: TensorRecord
) -> torch.Tensor:
    """A tensor of the record's shape and stride over the storage, which it shares."""
    tensor = torch.empty(0, dtype=dtype, device=storage.device)
    tensor.set_(storage, offset, record.shape, record.stride)
    fake_device = getattr(storage, "_fake_device", None)
    if fake_device is not None:
        tensor.fake_device = fake_device  # type: ignore[attr-defined]
    return tensor


def view_items(
    storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, count: int
) -> torch.Tensor:
    """So many items of a storage, in a row; offset and count are in items."""
    tensor = torch.empty(0, dtype=dtype, device=storage.device)
    return tensor.set_(storage, offset, (count,), (1,))


def apply_flags(name: str, tensor: torch.Tensor, flags: int) -> torch.Tensor:
    """The tensor with the properties that the flags name; a Parameter shares its memory."""
    if flags & (IS_CONJ | IS_NEG):
        if flags & IS_CONJ and not tensor.is_complex():
            raise FormatError(f'tensor "{name}" is marked as conjugated and is not complex')
        bits = {"conj": IS_CONJ, "neg": IS_NEG}
        names = [name for name, bit in bits.items() if flags & bit]
        torch._utils.set_tensor_metadata(tensor, dict.fromkeys(names, True))
    requires_grad = bool(flags & REQUIRES_GRAD)
    if requires_grad and not (tensor.is_floating_point() or tensor.is_complex()):
        raise FormatError(f'tensor "{name}" of dtype {tensor.dtype} is marked as requiring grad')
    if flags & IS_PARAMETER:
        return torch.nn.Parameter(tensor, requires_grad)
    return tensor.requires_grad_() if requires_grad else tensor


class Loaded(NamedTuple):
    """What the core has made: tensors by name, None for those of the numbers in ``rest``.

    ``bases`` holds, by number, all bytes of each storage that the rest lies in.
    """

    by_name: dict[str, torch.Tensor]
    rest: list[int]
    bases: dict[int, torch.Tensor]


class Placed(NamedTuple):
    """Storages that are where they belong, by number; the dtypes that tensors have whose storages
    were cast; and what puts storages where they belong that are not here, None: they stay in host
    memory."""

    storages: dict[int, torch.UntypedStorage]
    dtypes: dict[int, torch.dtype]
    restore: Restore | None = None


def rebuild_rest(
    reader: _core.Reader,
    loaded: Loaded,
    numbers: Iterable[int],
    placed: Placed,
) -> None:
    """Fills in the tensors that the core has left to Python.

    ``numbers`` are those of all that were loaded, ascending. Tensors that shared a storage share it
    again.
    """
    by_name, rest, bases = loaded
    names = dict(zip(numbers, by_name, strict=True))
    storages = dict(placed.storages)
    for number in rest:
        name = names[number]
        record = TensorRecord(*reader.tensor(number))
        original = names.setdefault(record.same_as, name)  # or the first that is wanted
        if original != name:
            by_name[name] = by_name[original]
            continue
        if record.storage not in storages or record.flags & IS_ARRAY:
            stored = StorageRecord(*reader.storage(record.storage))
            if stored.has_no_data:
                dtype = placed.dtypes.get(record.storage) or dtype_of(record.dtype)
                meta = torch.empty_strided(record.shape, record.stride, dtype=dtype, device="meta")
                by_name[name] = apply_flags(name, meta, record.flags)
                continue
            storage = bases[record.storage].untyped_storage()
            if record.flags & IS_ARRAY:
                by_name[name] = _view_array(storage, record)
                continue
            storages[record.storage] = _restore(storage, stored, placed.restore)
        storage = storages[record.storage]
        dtype = placed.dtypes.get(record.storage) or dtype_of(record.dtype)
        tensor = view_storage(storage, dtype, record.storage_offset, record)
        by_name[name] = apply_flags(name, tensor, record.flags)


def _view_array(storage: torch.UntypedStorage, record: TensorRecord) -> torch.Tensor:
    with _disable_current_modes():  # arrays are never fake
        return view_storage(storage, dtype_of(record.dtype), record.storage_offset, record)


def _restore(
    storage: torch.UntypedStorage, record: StorageRecord, restore: Restore | None
) -> torch.UntypedStorage:
    return storage if restore is None else mark_place(restore(storage, record.device), record)


def mark_place(storage: torch.UntypedStorage, record: StorageRecord) -> torch.UntypedStorage:
    """The storage, which says where its bytes are if it has none, as torch.load has it."""
    if storage.device.type == "meta":
        storage._checkpoint_offset = record.offset
    return storage
