"""Into what exists: modules, mappings of tensors, and whatever else has `load_state_dict`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch.nn.modules.module import _IncompatibleKeys
from torch.nn.parameter import is_lazy

from fastsd.deferred import can_defer
from fastsd.errors import UnsupportedError


class Target:
    """What is loaded into, and how: ``strict`` and ``assign`` are None where the caller left them
    to the target. Raises UnsupportedError for what cannot be loaded into in this way."""

    def __init__(
        self,
        target: Any,
        *,
        strict: bool | None = None,
        assign: bool | None = None,
        ignore_mismatched_sizes: bool = False,
    ) -> None:
        self._target = target
        self._strict = strict
        self._assign = assign
        self._ignores_sizes = ignore_mismatched_sizes
        self._is_module = isinstance(target, torch.nn.Module)
        has_method = callable(getattr(type(target), "load_state_dict", None))
        self._is_mapping = isinstance(target, MutableMapping) and not has_method
        # Others take whatever their own state_dict() gives, which need not be a flat dictionary.
        self.takes_tensors = self._is_module or self._is_mapping
        # Others may keep what they are given, as an optimizer keeps its moments.
        self.copies = self.takes_tensors and not assign
        # An optimizer puts its state where its parameters are.
        self.moves = self.copies or isinstance(target, torch.optim.Optimizer)
        if not self._is_mapping:
            self._check_method()

    def _check_method(self) -> None:
        kind = type(self._target).__name__
        load = getattr(self._target, "load_state_dict", None)
        if not callable(load):
            raise UnsupportedError(
                f"cannot load into a {kind}: pass a module, a mapping, or something else that has "
                "load_state_dict()"
            )
        for name in self._options():
            if not _takes(load, name):
                raise UnsupportedError(f"{kind}.load_state_dict() takes no argument {name!r}")
        if self._ignores_sizes and not self._is_module:
            raise UnsupportedError(
                f"ignore_mismatched_sizes is for modules and mappings, not for a {kind}"
            )

    def _options(self) -> dict[str, bool]:
        options = {"strict": self._strict, "assign": self._assign}
        return {name: value for name, value in options.items() if value is not None}

    def can_defer(self) -> bool:
        """Whether copies into GPUs may be put off until all is loaded."""
        return can_defer(self._target)

    def load(self, state: Any) -> Any:
        """Loads a state_dict; returns what the target's own method returns."""
        if self._is_mapping:
            options = self._options()
            return _fill_mapping(self._target, state, self._ignores_sizes, **options)
        load: Callable[..., Any] = self._target.load_state_dict
        mismatched: set[str] = set()
        if self._ignores_sizes:
            mismatched = _find_mismatched(self._target.state_dict(), state, _fits_module)
        if not mismatched:
            return load(state, **self._options())
        with _expected_missing(self._target, mismatched) as missing:
            result = load(_leave_out(state, mismatched), **self._options())
        if isinstance(result, _IncompatibleKeys) and missing:
            result.missing_keys[:] = missing
        return result


def _takes(function: Callable[..., Any], name: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a built-in may have none to show
        return True
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return name in parameters or takes_any


# ---- Mismatched sizes ----


def _find_mismatched(
    own: Mapping[str, Any],
    state: Mapping[str, Any],
    fits: Callable[[torch.Tensor, torch.Tensor], bool],
) -> set[str]:
    """The names of tensors of which what is loaded does not fit what is there."""
    return {
        name
        for name, tensor in own.items()
        if isinstance(tensor, torch.Tensor)
        and isinstance(state.get(name), torch.Tensor)
        and not fits(tensor, state[name])
    }


def _fits_mapping(own: torch.Tensor, loaded: torch.Tensor) -> bool:
    return own.shape == loaded.shape


def _fits_module(own: torch.Tensor, loaded: torch.Tensor) -> bool:
    if is_lazy(own) or is_lazy(loaded):  # without a shape yet
        return True
    # Torch also takes the single element of a vector for a scalar, as files of torch 0.3 need.
    return own.shape == loaded.shape or (own.ndim == 0 and loaded.shape == (1,))


def _leave_out(state: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """A copy without some of the names, which keeps its type and its `_metadata`."""
    rest = copy(state)
    for name in names:
        del rest[name]
    return rest


@contextmanager
def _expected_missing(module: torch.nn.Module, names: set[str]) -> Iterator[list[str]]:
    """While this lasts, no strict check of the module fails for these; lists all that were
    missing."""
    missing: list[str] = []

    def take_out(_: torch.nn.Module, keys: Any) -> None:
        missing.extend(keys.missing_keys)
        keys.missing_keys[:] = [name for name in missing if name not in names]

    hook = module.register_load_state_dict_post_hook(take_out)
    try:
        yield missing
    finally:
        hook.remove()


# ---- Mappings ----


def _fill_mapping(
    target: MutableMapping[str, torch.Tensor],
    state: dict[str, Any],
    ignores_sizes: bool,
    strict: bool = True,
    assign: bool = False,
) -> _IncompatibleKeys:
    """What Module.load_state_dict does, for a mapping; keys and shapes are checked before
    copying."""
    mismatched = _find_mismatched(target, state, _fits_mapping) if ignores_sizes else set()
    missing = [key for key in target if key not in state]
    unexpected = [key for key in state if key not in target]
    common = [key for key in target if key in state and key not in mismatched]
    problems = []
    if strict and unexpected:
        problems.append("Unexpected key(s): " + ", ".join(f'"{key}"' for key in unexpected) + ".")
    if strict and missing:
        problems.append("Missing key(s): " + ", ".join(f'"{key}"' for key in missing) + ".")
    problems += filter(None, (_find_problem(key, target[key], state[key]) for key in common))
    if problems:
        raise RuntimeError("Error(s) in loading into a mapping:\n\t" + "\n\t".join(problems))
    with torch.no_grad():
        for key in common:
            if assign:
                target[key] = state[key]
            else:
                target[key].copy_(state[key])
    return _IncompatibleKeys(missing + [key for key in target if key in mismatched], unexpected)


def _find_problem(key: str, own: object, loaded: object) -> str | None:
    if not (isinstance(own, torch.Tensor) and isinstance(loaded, torch.Tensor)):
        return f"{key} is no tensor in the file and in the mapping."
    if not _fits_mapping(own, loaded):
        return f"size mismatch for {key}: {loaded.shape} in the file, {own.shape} in the mapping."
    return None
