"""What happens to names between a file and what is loaded: `prefix`, `select` and `rename`."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import translate
from typing import Any

from fastsd.errors import NamesError

Select = Callable[[str], object] | str | Iterable[str]
Rename = Callable[[str], str] | Mapping[str, str]

_SHOWN_NAMES_MAX = 5
_SHOWN_NAME_CHARACTERS_MAX = 100


@dataclass(frozen=True)
class Choice:
    """The tensors that rules have chosen: their ``numbers`` in the file, ascending, and ``names``,
    what each is called now."""

    rules: NameRules
    numbers: list[int]
    names: list[str]


class NameRules:
    """`prefix`, `select` and `rename`, as for `fastsd.load`. Raises TypeError for other types."""

    def __init__(
        self, prefix: str | None = None, select: Select | None = None, rename: Rename | None = None
    ) -> None:
        if not isinstance(prefix, (str, type(None))):
            raise TypeError(f"prefix must be a str, not {type(prefix).__name__}")
        self.prefix = prefix or ""
        self._select = select if select is None or callable(select) else _to_patterns(select)
        self._rename = rename if rename is None or callable(rename) else _to_renaming(rename)
        self.keeps_modules = rename is None or not callable(rename)

    def choose(self, stored: list[str], path: str) -> Choice:
        """What of the names of a file is wanted, and as what. Raises NamesError."""
        try:
            numbers = self._strip_prefix(stored)
            if self._select is not None:
                numbers = _apply_select(self._select, numbers)
            return Choice(self, list(numbers.values()), self._apply_rename(list(numbers)))
        except NamesError as error:
            error.path = path
            raise

    def rename_modules(
        self, metadata: Mapping[Any, Any] | None, prefix: str
    ) -> OrderedDict[str, Any] | None:
        """A state_dict's `_metadata`, its module names following those of the tensors.

        Module "m" counts as name "m.". ``prefix`` is what is still to be taken off. Where two
        become one the later stays: what is wrapped comes after its wrapper. None if there is no
        metadata, or names are changed by a function, of which nobody knows what it makes of
        modules.
        """
        if metadata is None or not self.keeps_modules:
            return None
        renamed: OrderedDict[str, Any] = OrderedDict()
        for module, value in metadata.items():
            name = f"{module}." if module else ""
            if not (isinstance(module, str) and name.startswith(prefix)):
                continue
            new = self._rename_one(name[len(prefix) :])
            if new == "" or new.endswith("."):
                renamed[new[:-1]] = value
        return renamed

    def _strip_prefix(self, stored: list[str]) -> dict[str, int]:
        """The names that start with the prefix, without it, to their numbers."""
        start = len(self.prefix)
        numbers = {name[start:]: i for i, name in enumerate(stored) if name.startswith(self.prefix)}
        if self.prefix and not numbers:
            raise NamesError(f"no name starts with prefix {self.prefix!r}; {_describe(stored)}")
        if self.prefix and all(name.startswith(".") for name in numbers):
            raise NamesError(
                f"a dot follows prefix {self.prefix!r}: did you mean {self.prefix + '.'!r}?"
            )
        return numbers

    def _rename_one(self, name: str) -> str:
        return name if self._rename is None else self._rename(name)

    def _apply_rename(self, names: list[str]) -> list[str]:
        if self._rename is None:
            return names
        renamed: dict[str, str] = {}
        for name in names:
            new = self._rename(name)
            if not isinstance(new, str):
                raise TypeError(f'rename made a {type(new).__name__} of "{name}", not a str')
            other = renamed.setdefault(new, name)
            if other is not name:
                raise NamesError(f'rename makes "{new}" of both "{other}" and "{name}"')
        return list(renamed)


def _apply_select(
    select: Callable[[str], object] | list[str], numbers: dict[str, int]
) -> dict[str, int]:
    """The selected part, in the same order."""
    if callable(select):
        return {name: number for name, number in numbers.items() if select(name)}
    found: set[str] = set()
    for pattern in select:
        matching = _find_matching(pattern, numbers)
        if not matching:
            raise NamesError(f"no name matches select {pattern!r}; {_describe(list(numbers))}")
        found.update(matching)
    return {name: number for name, number in numbers.items() if name in found}


def _find_matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The name itself, though it may hold what is special in patterns; else what matches."""
    if pattern in names:
        return [pattern]
    if not re.search(r"[*?[]", pattern):
        return []
    matches = re.compile(translate(pattern)).match
    return [name for name in names if matches(name)]


def _describe(names: list[str]) -> str:
    """Some of the names, from all over the file, for a message."""
    if not names:
        return "the file holds no tensor"
    step = -(-len(names) // _SHOWN_NAMES_MAX)
    shown = [_shorten(name) for name in names[::step]]
    rest = len(names) - len(shown)
    return "there are " + ", ".join(shown) + (f" and {rest} more" if rest else "")


def _shorten(name: str) -> str:
    is_long = len(name) > _SHOWN_NAME_CHARACTERS_MAX
    return f'"{name[:_SHOWN_NAME_CHARACTERS_MAX]}..."' if is_long else f'"{name}"'


def _to_patterns(select: object) -> list[str]:
    if isinstance(select, str):
        return [select]
    patterns: list[Any] = list(select) if isinstance(select, Iterable) else [None]
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(
            "select must be a function of a name, a pattern, or several names and patterns, "
            f"not {_describe_type(select)}"
        )
    return patterns


def _to_renaming(rename: object) -> Callable[[str], str]:
    """A function for a dict from leading parts of names to what replaces them, longest first."""
    is_strings = isinstance(rename, Mapping) and all(
        isinstance(text, str) for item in rename.items() for text in item
    )
    if not is_strings:
        raise TypeError(
            "rename must be a function from name to name, or a dict from leading parts of names "
            f"to what replaces them, not {_describe_type(rename)}"
        )
    parts: dict[str, str] = dict(rename)  # type: ignore[call-overload]
    lengths = sorted({len(part) for part in parts}, reverse=True)

    def replace(name: str) -> str:
        for length in lengths:
            new = parts.get(name[:length])
            if new is not None:
                return new + name[length:]
        return name

    return replace


def _describe_type(value: object) -> str:
    kind = type(value).__name__
    if isinstance(value, Mapping):
        value = [text for item in value.items() for text in item]
    if isinstance(value, (list, tuple, set, frozenset)):
        strange = next((item for item in value if not isinstance(item, str)), None)
        return f"{kind} with {type(strange).__name__}"
    return kind
