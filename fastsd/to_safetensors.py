"""Flat dictionaries as safetensors files, and the refusal of what these cannot hold."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from fastsd import _core, tree
from fastsd.errors import NotPlainError, UnsupportedError
from fastsd.tensors import Describer, check_plain, number_of, warn_of_hooks

if TYPE_CHECKING:
    from fastsd.tensors import Described

# Keys of `__metadata__`, whose values are strings. What starts with this is fastsd's own.
PREFIX = "fastsd."
TIED = "fastsd.tied"
"""JSON: names that were left out, each with the one under which the same tensor is stored."""
ORDERED = "fastsd.ordered"
"""There if the dictionary was an OrderedDict."""
STATE_METADATA = "fastsd.state_metadata"
"""The `_metadata` of a state_dict, as the section of that name in .fsd files holds it."""
FRAMEWORK = {"format": "pt"}
"""transformers reads no file without it."""


def plan_safetensors(
    obj: object, metadata: Mapping[str, str] | None, *, lossy: bool = False
) -> _core.Plan:
    """Lays out a safetensors file.

    ``obj`` is a dict or OrderedDict from str to dense tensors, with no attributes but `_metadata`.
    Tensors are stored row-major, as torch's `contiguous()` has them. Of tensors that are equal
    views of the same memory the first is stored. Parameters and ``requires_grad`` are not kept.
    ``lossy``: tensors that overlap otherwise are stored each in full, and what sort of mapping it
    is, and attributes that cannot be kept, are left out. Raises UnsupportedError, which names each
    key that cannot be held.
    """
    own = _encode_metadata(metadata)
    if not isinstance(obj, Mapping):
        raise UnsupportedError(
            f"safetensors holds dictionaries from str to tensors, not a {_name_type(obj)}; "
            "the formats 'fsd' and 'pth' do"
        )
    own |= _describe_dictionary(obj, lossy)
    names, tensors = list(obj), list(obj.values())
    describer = _DenseDescriber()
    try:
        if "__metadata__" in names:
            raise NotPlainError("a name that is taken")
        plan = _core.Plan(names, tensors, describer)
        _check_overlaps(names, plan.find_shared(), lossy)
        tied = {names[name]: names[kept] for name, kept in plan.tied}
        if tied:
            own[TIED] = _to_json(tied)
        plan.finish_safetensors(_to_json(own))
    except (UnsupportedError, TypeError, UnicodeEncodeError):
        _refuse_items(obj)
        raise
    warn_of_hooks(tensors)
    return plan


def _to_json(strings: dict[str, str]) -> str:
    return json.dumps(strings, separators=(",", ":"))


def _encode_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """The user's strings, with what every file has. Raises TypeError or ValueError."""
    own = dict(metadata or {})
    for key, value in own.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f"metadata maps strings to strings, not {key!r} to {value!r}")
        if is_reserved(key, value):
            raise ValueError(f"metadata key {key!r} is fastsd's own in safetensors files")
    return FRAMEWORK | own


def is_reserved(key: str, value: str) -> bool:
    """Whether an entry of the metadata cannot be the user's."""
    return key.startswith(PREFIX) or FRAMEWORK.get(key, value) != value


def _describe_dictionary(obj: Mapping[Any, Any], lossy: bool) -> dict[str, str]:
    """What the metadata say of the dictionary itself. Raises UnsupportedError."""
    attributes = _attributes_of(obj)
    state_metadata = attributes.pop("_metadata", None)
    text = None if state_metadata is None else tree.encode_state_metadata(state_metadata)
    if not lossy:
        if type(obj) not in (dict, OrderedDict):
            raise UnsupportedError(
                f"safetensors holds a dict or OrderedDict, not a {_name_type(obj)}: pass dict(...)"
            )
        if state_metadata is not None and text is None:
            attributes["_metadata"] = state_metadata
        if attributes:
            raise UnsupportedError(
                f"the dictionary's attributes {sorted(attributes)} cannot be kept: pass dict(...)"
            )
    found = {}
    if isinstance(obj, OrderedDict):
        found[ORDERED] = "true"
    if text is not None:
        found[STATE_METADATA] = text.decode()
    return found


class _DenseDescriber(Describer):
    """Tensors as values: conjugations and negations that were put off are carried out."""

    def __init__(self) -> None:
        super().__init__()
        self._resolved: dict[int, torch.Tensor] = {}

    def __call__(self, name: str, value: Any) -> Described:
        if not isinstance(value, torch.Tensor):
            raise NotPlainError(f"{name!r} is no tensor")
        check_plain(name, value)
        if value.is_conj() or value.is_neg():
            if id(value) not in self._resolved:
                self._resolved[id(value)] = value.detach().resolve_conj().resolve_neg()
            value = self._resolved[id(value)]
        address, number, shape, stride, _, device, identity, place = super().__call__(name, value)
        return (address, number, shape, stride, 0, device, identity, place)


def _check_overlaps(names: list[str], overlaps: list[list[int]], lossy: bool) -> None:
    if not overlaps or lossy:
        return
    groups = "".join(f"\n  {[names[number] for number in group]}" for group in overlaps)
    raise UnsupportedError(
        "these tensors overlap in memory without being the same, which safetensors cannot hold: "
        f"they would no longer share it. Clone them, or use format='fsd' or 'pth'.{groups}"
    )


def find_problems(obj: Mapping[Any, Any]) -> dict[Any, str]:
    """The keys that cannot be held, and why."""
    found = {key: _find_problem(key, value) for key, value in obj.items()}
    return {key: problem for key, problem in found.items() if problem is not None}


def find_holdable(obj: object) -> tuple[dict[str, torch.Tensor], list[str]]:
    """What a file can hold of a dictionary, and what it cannot: a line for each key, and why.

    Raises UnsupportedError for an object that is none.
    """
    if not isinstance(obj, Mapping):
        raise UnsupportedError(f"safetensors holds dictionaries, not a {_name_type(obj)}")
    problems = find_problems(obj)
    lost = [f"{key}: {problem}" for key, problem in problems.items()]
    held = OrderedDict((key, value) for key, value in obj.items() if key not in problems)
    for key, tensor in held.items():
        is_trained = tensor.requires_grad or isinstance(tensor, torch.nn.Parameter)
        lost += [f"{key}: that it requires grad, or is a Parameter"] * is_trained
        lost += [f"{key}: its attribute {name!r}" for name in vars(tensor)]
        if is_trained or vars(tensor):
            held[key] = tensor.detach()
    names = list(held)
    plan = _core.Plan(names, list(held.values()), _DenseDescriber())
    for group in plan.find_shared():
        lost.append(f"{', '.join(names[number] for number in group)}: that they overlap in memory")
    metadata = getattr(obj, "_metadata", None)
    if isinstance(metadata, OrderedDict) and tree.encode_state_metadata(metadata) is not None:
        vars(held)["_metadata"] = metadata
    unheld = _attributes_of(obj).keys() - vars(held).keys()
    lost += [f"the dictionary's attribute {name!r}" for name in sorted(unheld)]
    if type(obj) not in (dict, OrderedDict):
        lost.append(f"that the dictionary is a {_name_type(obj)}")
    return held if isinstance(obj, OrderedDict) or vars(held) else dict(held), lost


def _attributes_of(obj: object) -> dict[str, Any]:
    """An object's attributes; none of one that can have none."""
    return dict(getattr(obj, "__dict__", {}))


def _refuse_items(obj: Mapping[Any, Any]) -> None:
    """Raises UnsupportedError for the keys and values that cannot be held, if there are any."""
    problems = [f"\n  {key!r} {problem}" for key, problem in find_problems(obj).items()]
    if problems:
        raise UnsupportedError(
            "safetensors holds dense tensors of some dtypes by name, which these are not (the "
            "formats 'fsd' and 'pth' hold them):" + "".join(problems)
        )


def _find_problem(key: object, value: object) -> str | None:
    """Why an item cannot be held; None if it can."""
    if not isinstance(key, str):
        return f"is a key of type {_name_type(key)}, not str"
    if key == "__metadata__":
        return "is the key of a file's metadata"
    try:
        key.encode()
    except UnicodeEncodeError:
        return "is a key that has no UTF-8"
    if isinstance(value, (Mapping, list, tuple, set)):
        return f"is a nested value, a {_name_type(value)}"
    if not isinstance(value, torch.Tensor):
        return f"is a {_name_type(value)}, no tensor"
    try:
        check_plain(key, value)
    except NotPlainError as error:
        return error.detail.removeprefix(f'tensor "{key}" ')
    if not _core.has_safetensors_dtype(number_of(value.dtype)):
        return f"has dtype {value.dtype}"
    return "is a meta tensor, which has no data" if value.is_meta else None


def _name_type(value: object) -> str:
    kind = type(value)
    is_builtin = kind.__module__ == "builtins"
    return kind.__qualname__ if is_builtin else f"{kind.__module__}.{kind.__qualname__}"
