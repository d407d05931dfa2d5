"""What the demonstration and the benchmarks share: bits, bytes, touching and syncing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fastsd.bench.cache import sync_file, warm_file
from fastsd.bench.memory import count_bytes, raw_bytes, start_afresh, touch, trim_heap

__all__ = [
    "count_bytes",
    "digest_tensor",
    "drop_tied",
    "list_parts",
    "list_tensors",
    "raw_bytes",
    "same_bits",
    "same_part",
    "start_afresh",
    "sync_file",
    "touch",
    "trim_heap",
    "warm_file",
]


def list_parts(obj: object, path: str = "") -> dict[str, object]:
    """Return what an object holds, tensors and plain values, by the way that leads to it."""
    if isinstance(obj, nn.Module):
        obj = obj.state_dict()
    items: Iterable[tuple[object, object]]
    if isinstance(obj, Mapping):
        items = obj.items()
    elif isinstance(obj, (list, tuple)):
        items = enumerate(obj)
    else:
        return {path: obj}
    return {k: v for key, part in items for k, v in list_parts(part, f"{path}/{key}").items()}


def list_tensors(obj: object) -> list[Tensor]:
    """Return the tensors that an object holds."""
    return [part for part in list_parts(obj).values() if isinstance(part, Tensor)]


def same_part(left: object, right: object) -> bool:
    """Tell whether two values are equal; tensors in shape, dtype and bits."""
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return type(left) is type(right) and left == right
    is_alike = left.shape == right.shape and left.dtype == right.dtype
    return is_alike and torch.equal(raw_bytes(left), raw_bytes(right))


def same_bits(left: object, right: object) -> bool:
    """Tell whether two objects hold the same tensors and plain values in the same places."""
    ours, theirs = list_parts(left), list_parts(right)
    return ours.keys() == theirs.keys() and all(same_part(ours[k], theirs[k]) for k in ours)


def digest_tensor(tensor: Tensor) -> str:
    """Return the SHA-256 of dtype, shape and raw bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(raw_bytes(tensor).numpy().data)
    return digest.hexdigest()


def drop_tied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep the first name of each memory: safetensors refuses tensors that share it."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in tensors.items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            kept[name] = tensor
    return kept
