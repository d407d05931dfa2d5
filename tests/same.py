"""What "the same object" means here: bit for bit, with everything that a file keeps."""

import io
import struct
from collections import OrderedDict

import numpy as np
import torch

import fastsd

MUTABLE = (list, dict, set, bytearray, np.ndarray, torch.Tensor)


def assert_same(found, wanted):
    """Fails unless both have the same nesting, types, order, bits and identities.

    Strides of numpy arrays may differ, and which tensors share a storage: see `shares_storage`.
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
        if isinstance(wanted, torch.Tensor):
            compare_tensors(found, wanted, place)
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
        else:
            assert found == wanted, place
        if not isinstance(wanted, np.generic):
            attributes = getattr(found, "__dict__", {}), getattr(wanted, "__dict__", {})
            if any(attributes):
                self.compare(*attributes, f"attributes of {place}")


def compare_tensors(found, wanted, place=""):
    assert describe(found) == describe(wanted), place
    if not wanted.is_meta:
        assert raw(found) == raw(wanted), place


def describe(tensor):
    """All that a file keeps of a tensor, except its bytes."""
    return {
        "dtype": tensor.dtype,
        "shape": tensor.shape,
        "stride": tensor.stride(),
        "device": tensor.device,
        "layout": tensor.layout,
        "requires_grad": tensor.requires_grad,
        "conj": tensor.is_conj(),
        "neg": tensor.is_neg(),
    }


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
