"""Which globals a file wants to import before it can be unpickled; nothing is unpickled to ask."""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from torch import _weights_only_unpickler

from fastsd.api import get_unsafe_globals_in_checkpoint
from fastsd.zoo.recognise import Form

_LEGACY_PICKLES = 4  # torch's magic number, protocol, system; and what was saved


def find_wanted(path: Path, form: Form | None) -> list[str]:
    """What stands between the file and `weights_only`; of a plain pickle, which never loads so, all
    that it names. None of a directory, or if it cannot be told. Raises OSError."""
    try:
        if form is Form.PICKLE:
            with path.open("rb") as file:
                return sorted(set(_list_globals(file)))
        if form is Form.LEGACY:
            return _list_legacy(path)
        return [] if path.is_dir() else get_unsafe_globals_in_checkpoint(path)
    except OSError:
        raise
    except Exception:  # a pickle that cannot be walked, or of a kind that torch cannot tell of
        return []


def _list_legacy(path: Path) -> list[str]:
    with path.open("rb") as file:
        found = {name for _ in range(_LEGACY_PICKLES) for name in _list_globals(file)}
    allowed = _weights_only_unpickler._get_allowed_globals().keys()
    return sorted(found - allowed - _weights_only_unpickler._get_user_allowed_globals().keys())


def _list_globals(file: IO[bytes]) -> Iterator[str]:
    """The globals of the pickle that comes next."""
    memo: dict[int, object] = {}
    pushed: list[object] = [None, None]  # the two that STACK_GLOBAL looks at
    for code, argument, _ in pickletools.genops(file):
        if code.name == "GLOBAL":
            yield str(argument).replace(" ", ".")
        elif code.name == "STACK_GLOBAL":
            yield f"{pushed[-2]}.{pushed[-1]}"
        elif code.name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if argument is None else int(argument)] = pushed[-1]
            continue
        is_get = code.name in ("GET", "BINGET", "LONG_BINGET")
        value = memo.get(int(argument)) if is_get and argument is not None else argument
        pushed = [pushed[-1], value if isinstance(value, str) else None]
