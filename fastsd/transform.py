"""What happens to an object on the way from one file to another: parts of it, and names."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from fastsd.errors import NamesError
from fastsd.layouts import Layout, kinds_of, recognise
from fastsd.tree import Opaque


class OpaqueError(NamesError):
    """What is asked for is in something that only an unpickler knows. Private."""


def describe(obj: object) -> Layout:
    """The layout of a loaded object; "object" if it is no dictionary."""
    if not isinstance(obj, Mapping):
        return Layout("object")
    kinds = kinds_of(obj, torch.Tensor)
    pick = recognise(kinds).pick
    if pick is not None and isinstance(obj[pick], Mapping):
        return recognise(kinds, [f"{pick}.{name}" for name in obj[pick]])
    return recognise(kinds, [str(k) for k, v in obj.items() if isinstance(v, torch.Tensor)])


class Picked(NamedTuple):
    """A part, and the places beside it that are not taken."""

    part: Any
    left: tuple[str, ...]


def pick_part(obj: Any, key: str) -> Picked:
    """What stands under ``key``: keys on the way, joined by dots. Of a module its state_dict.

    Raises NamesError where there is nothing.
    """
    part, rest, way = obj, key, ""
    left: list[str] = []
    while rest:
        _check_dictionary(part, f"nothing to pick {rest!r} from")
        # A key may hold dots itself: the longest that fits is taken.
        fits = [k for k in part if isinstance(k, str) and f"{rest}.".startswith(f"{k}.")]
        if not fits:
            there = ", ".join(repr(k) for k in list(part)[:10])
            raise NamesError(f"there is no {rest!r} to pick; there are {there}")
        found = max(fits, key=len)
        left += [f"{way}{k}" for k in part if k != found]
        part, rest, way = part[found], rest[len(found) + 1 :], f"{way}{found}."
    return Picked(part.state_dict() if isinstance(part, torch.nn.Module) else part, tuple(left))


def _check_dictionary(obj: object, problem: str) -> None:
    if isinstance(obj, Opaque):
        raise OpaqueError(f"{problem}: it takes an unpickler")
    if not isinstance(obj, Mapping):
        raise NamesError(f"{problem}: a {type(obj).__name__}")


def find_opaque(obj: Any) -> bool:
    """Whether something in it is known to an unpickler only."""
    if isinstance(obj, Mapping):
        return any(find_opaque(value) for value in obj.values())
    if isinstance(obj, (list, tuple)):
        return any(find_opaque(value) for value in obj)
    return isinstance(obj, Opaque)


def replace_items(obj: Mapping[Any, Any], items: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """A dictionary of the same type, with the same attributes and other items."""
    changed: dict[Any, Any] = copy.copy(obj) if isinstance(obj, dict) else {}
    changed.clear()
    changed.update(items)
    return changed


def drop_keys(obj: Any, keys: Collection[Any]) -> Any:
    """The dictionary without these keys; the object itself is left as it is."""
    if not keys:
        return obj
    unwanted = set(keys)
    return replace_items(obj, ((k, value) for k, value in obj.items() if k not in unwanted))


def strip_prefix(obj: Any, prefix: str) -> Any:
    """A dictionary whose keys have lost ``prefix`` where they start with it, `_metadata` included.

    Raises NamesError if none does, or two keys become one.
    """
    _check_dictionary(obj, f"no names to strip {prefix!r} from")
    stripped: dict[Any, Any] = {}
    for key, value in obj.items():
        new = key.removeprefix(prefix) if isinstance(key, str) else key
        if new in stripped:
            raise NamesError(f'stripping {prefix!r} makes two keys "{new}"')
        stripped[new] = value
    if all(key in stripped for key in obj):
        raise NamesError(f"no key starts with {prefix!r}")
    renamed = replace_items(obj, stripped.items())
    metadata = getattr(obj, "_metadata", None)
    if isinstance(metadata, Mapping):
        # The keys are modules: "module" itself goes with the names "module.".
        kept = [(f"{module}.".removeprefix(prefix), value) for module, value in metadata.items()]
        vars(renamed)["_metadata"] = OrderedDict((m.removesuffix("."), v) for m, v in kept)
    return renamed


def arrays_to_tensors(obj: Any) -> Any:
    """A dictionary's numpy arrays as tensors, which share their memory where they can; those that
    torch has no dtype for stay."""
    if not isinstance(obj, Mapping) or not any(isinstance(v, np.ndarray) for v in obj.values()):
        return obj
    return replace_items(obj, ((key, _to_tensor(value)) for key, value in obj.items()))


def _to_tensor(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    try:
        # Torch takes none that is read-only, or goes backwards.
        return torch.from_numpy(np.require(value, requirements=["C", "W"]))
    except TypeError:
        return value
