"""What "the same object" means here: bit for bit, with everything that a file keeps."""

import io
import struct
from collections import OrderedDict
from enum import Enum
from types import FunctionType
from weakref import ReferenceType

import numpy as np
import torch
from torch import SymInt, nn
from torch.nn.parameter import UninitializedTensorMixin

import fastsd

STORAGES = (torch.TypedStorage, torch.UntypedStorage)
MUTABLE = (list, dict, set, bytearray, np.ndarray, torch.Tensor, nn.Module)

WITHOUT_ATTRIBUTES = (np.generic, type, Enum, FunctionType, ReferenceType, SymInt, *STORAGES)


def assert_same(found, wanted):
    """Fails unless both have the same nesting, types, order, bits and identities.

    Strides of numpy arrays may differ, and which tensors share a storage: see `shares_storage`.
    Objects of other classes are compared by their attributes.
    """
    _Comparison().compare(found, wanted, "")


class _Comparison:
    def __init__(self):
        self.twins = {}  # what is one object in one of the two is one in the other
        self.kept = []

    def compare(self, found, wanted, place):
        assert type(found) is type(wanted), place
        if isinstance(wanted, MUTABLE):
            self.kept.append((found, wanted))  # or else an id may be given to another object
            known = id(found) in self.twins or ~id(wanted) in self.twins
            assert self.twins.setdefault(id(found), id(wanted)) == id(wanted), place
            assert self.twins.setdefault(~id(wanted), id(found)) == id(found), place
            if known:
                return
        if isinstance(wanted, UninitializedTensorMixin):
            assert (found.dtype, found.device) == (wanted.dtype, wanted.device), place
        elif isinstance(wanted, torch.Tensor):
            compare_tensors(found, wanted, place)
        elif isinstance(wanted, ReferenceType):
            self.compare(found(), wanted(), place)
        elif isinstance(wanted, STORAGES):
            compare_storages(found, wanted, place)
        elif isinstance(wanted, (np.ndarray, np.generic)) and wanted.dtype.hasobject:
            assert found.dtype == wanted.dtype, place
            self.compare(found.tolist(), wanted.tolist(), place)
        elif isinstance(wanted, (np.ndarray, np.generic)):
            assert found.dtype == wanted.dtype, place
            assert found.dtype.fields == wanted.dtype.fields, place
            assert found.shape == wanted.shape, place
            assert found.tobytes() == wanted.tobytes(), place
        elif isinstance(wanted, dict):
            self.compare(tuple(found), tuple(wanted), f"keys of {place}")
            for (key, value), twin in zip(found.items(), wanted.values(), strict=True):
                self.compare(value, twin, f"{place}.{key}")
        elif isinstance(wanted, (list, tuple)):
            assert len(found) == len(wanted), place
            for i, (value, twin) in enumerate(zip(found, wanted, strict=True)):
                self.compare(value, twin, f"{place}.{i}")
        elif isinstance(wanted, (set, frozenset)):
            self.compare(sorted(found, key=repr), sorted(wanted, key=repr), place)
        elif isinstance(wanted, (float, complex)):
            assert bits(found) == bits(wanted), place
        elif isinstance(wanted, SymInt):
            pass  # the sizes of jagged tensors, each of which has one of its own
        elif not own_attributes(wanted) or isinstance(wanted, WITHOUT_ATTRIBUTES):
            assert found == wanted or type(wanted).__eq__ is object.__eq__, place
        if not isinstance(wanted, WITHOUT_ATTRIBUTES):
            attributes = own_attributes(found), own_attributes(wanted)
            if any(attributes):
                self.compare(*attributes, f"attributes of {place}")


def own_attributes(value):
    slots = [name for kind in type(value).__mro__ for name in vars(kind).get("__slots__", ())]
    own = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return {**getattr(value, "__dict__", {}), **own}


def compare_storages(found, wanted, place=""):
    assert found.device == wanted.device, place
    assert getattr(found, "dtype", None) == getattr(wanted, "dtype", None), place
    assert found.nbytes() == wanted.nbytes(), place
    if found.device.type != "meta":
        pair = (torch.empty(0, dtype=torch.uint8).set_(s.untyped()) for s in (found, wanted))
        assert torch.equal(*pair), place


def compare_tensors(found, wanted, place=""):
    assert describe(found) == describe(wanted), place
    for part, twin in zip(parts(found), parts(wanted), strict=True):
        compare_tensors(part, twin, place)
    if not wanted.is_nested and has_bytes(wanted):
        assert raw(found) == raw(wanted), place


def describe(tensor):
    """All that a file keeps of a tensor, except its bytes."""
    is_nested = tensor.is_nested  # and has no shape of its own, but those of its parts
    return {
        "dtype": tensor.dtype,
        "rank": tensor.dim(),
        "shape": None if is_nested else tensor.shape,
        "stride": tensor.stride() if tensor.layout == torch.strided and not is_nested else None,
        "device": tensor.device,
        "layout": tensor.layout,
        "requires_grad": tensor.requires_grad,
        "conj": tensor.is_conj(),
        "neg": tensor.is_neg(),
        "quantizer": quantizer(tensor) if tensor.is_quantized else None,
        "coalesced": tensor.layout == torch.sparse_coo and tensor.is_coalesced(),
    }


def has_bytes(tensor):
    """Whether elements lie in memory at strides of their own; not so in wrappers, for one."""
    try:
        return tensor.untyped_storage().data_ptr() != 0
    except (RuntimeError, NotImplementedError):
        return False


def quantizer(tensor):
    if tensor.qscheme() == torch.per_tensor_affine:
        return (tensor.qscheme(), tensor.q_scale(), tensor.q_zero_point())
    scales, zero_points = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
    return (tensor.qscheme(), scales.tolist(), zero_points.tolist(), tensor.q_per_channel_axis())


def parts(tensor):
    """The strided tensors that one of another layout is made of."""
    if tensor.is_nested:
        return tensor.detach().unbind()
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return ()


def raw(tensor):
    """The bytes of all elements, in order, whatever the dtype and its bits."""
    size = tensor.element_size()
    view = torch.empty(0, dtype=torch.uint8, device="cpu").set_(
        tensor.untyped_storage(),
        tensor.storage_offset() * size,
        (*tensor.shape, size),
        (*(step * size for step in tensor.stride()), 1),
    )
    return view.contiguous().flatten().numpy().tobytes()


def bits(number):
    parts = (number.real, number.imag) if isinstance(number, complex) else (number,)
    return struct.pack(f">{len(parts)}d", *parts)


def shares_storage(*tensors):
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


def through_memory(obj, **options):
    """What `load` makes of what `save` writes, without a file."""
    file = io.BytesIO()
    fastsd.save(obj, file)
    file.seek(0)
    return fastsd.load(file, **options)


def through_torch(obj, **options):
    file = io.BytesIO()
    torch.save(obj, file)
    file.seek(0)
    return torch.load(file, weights_only=False, **options)


def filled(shape, dtype, seed=0):
    """A tensor with random bits; for torch.bool, with 0 and 1."""
    tensor = torch.empty(shape, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(256, (tensor.untyped_storage().nbytes(),), generator=generator)
    if dtype == torch.bool:
        data %= 2
    as_bytes = torch.empty(0, dtype=torch.uint8, device="cpu").set_(tensor.untyped_storage())
    as_bytes.copy_(data)
    return tensor


def all_dtypes():
    found = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    return sorted(found, key=str)


def is_quantized(dtype):
    return str(dtype).startswith(("torch.qint", "torch.quint"))


PLAIN_DTYPES = [dtype for dtype in all_dtypes() if not is_quantized(dtype)]


def small_state():
    """A state_dict with a bit of everything that one has."""
    return OrderedDict(
        weight=torch.arange(12, dtype=torch.float32).reshape(3, 4),
        bias=torch.tensor([1.5, -0.0, float("nan")]),
        half=torch.ones(5, dtype=torch.bfloat16),
        steps=torch.tensor(7),
        mask=torch.tensor([True, False]),
        empty=torch.empty(0, 3),
    )


def medium_state():
    """9 MB: enough for several threads."""
    state = {f"small{i}": filled((i,), torch.uint8, seed=i) for i in range(300)}
    state |= {f"large{i}": filled((1 << 20,), torch.int16, seed=i) for i in range(4)}
    return state
