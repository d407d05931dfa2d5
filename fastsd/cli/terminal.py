"""What all commands print with. Whatever comes from a file is made harmless on the way."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from fastsd.errors import FastsdError

if TYPE_CHECKING:
    import argparse

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_TEXT_CHARACTERS_MAX = 200
_UNITS = ("kB", "MB", "GB", "TB", "PB", "EB")


class MissingPackageError(Exception):
    """Something optional that a command needs is not installed."""


def prepare() -> None:
    """Lets stdout and stderr print any text in any encoding."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


# ---- Text ----


def clean(text: str, characters_max: int | None = _TEXT_CHARACTERS_MAX) -> str:
    """A text that cannot steer a terminal: control, direction and invisible characters as escapes,
    on one line, and cut in the middle where it is long. For what is in files, and their names."""
    if characters_max is not None and len(text) > characters_max:
        part = (characters_max - 1) // 2
        text = f"{text[:part]}…{text[-part:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def format_bytes(nbytes: int) -> str:
    """ "17 B", "1.23 GB": three digits, and powers of 1000."""
    if nbytes < 1000:
        return f"{nbytes} B"
    power = 1
    while nbytes >= 999.5 * 1000**power and power < len(_UNITS):
        power += 1
    return f"{nbytes / 1000**power:.3g} {_UNITS[power - 1]}"


def format_count(count: int, noun: str) -> str:
    """ "1 tensor", "1,234 tensors"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


# ---- Results ----


def print_json(document: object) -> None:
    # ASCII alone, so that no text in it can steer a terminal.
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")


def print_lines(lines: Iterable[str] = ("",)) -> None:
    for line in lines:
        sys.stdout.write(clean(line, None) + "\n")


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    right: Sequence[str] = (),
    folding: Sequence[str] | None = None,
) -> None:
    """Prints texts in columns; those named in ``right`` are numbers, those in ``folding`` may take
    several lines on a terminal (by default all others).

    On a terminal they are made to fit. Elsewhere a row is a line, whatever its length.
    """
    cells = [[clean(cell) for cell in row] for row in rows]
    is_right = [column in right for column in columns]
    if sys.stdout.isatty():
        folds = [folding is None or column in folding for column in columns]
        _print_fitting(columns, cells, is_right, folds)
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for row in (columns, *cells):
        aligned = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_right, strict=True)
        )
        sys.stdout.write("  ".join(aligned).rstrip() + "\n")


def check_tables() -> None:
    """Raises MissingPackageError if `print_table` would: for those who work long before it."""
    if not sys.stdout.isatty():
        return
    try:
        import rich.table  # noqa: F401
    except ModuleNotFoundError:
        raise MissingPackageError(
            "tables on a terminal need rich: pip install 'fastsd[cli]' (or: fastsd ... | cat)"
        ) from None


def _print_fitting(
    columns: Sequence[str],
    cells: Sequence[Sequence[str]],
    is_right: Sequence[bool],
    folds: Sequence[bool],
) -> None:
    check_tables()
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column, right, fold in zip(columns, is_right, folds, strict=True):
        side: Literal["left", "right"] = "right" if right else "left"
        table.add_column(column, justify=side, no_wrap=right or not fold, overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))  # a Text has no markup
    Console(file=sys.stdout).print(table)


def print_mapping(title: str, items: Mapping[str, str]) -> None:
    """Prints what the user has written into a file, or nothing if there is none."""
    if items:
        print_lines(["", title])
        print_lines(f"  {clean(key)}: {clean(value)}" for key, value in items.items())


# ---- Errors and progress ----


def print_error(error: BaseException | str, path: str = "") -> None:
    """Prints one line: the file and what is wrong."""
    text = error if isinstance(error, str) else describe_error(error)
    if path and not text.startswith(path):
        text = f"{path}: {text}"
    sys.stderr.write(f"fastsd: {clean(' '.join(text.split()), None)}\n")


def describe_error(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{_to_text(error.filename)}: {error.strerror}"
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    if isinstance(error, (FastsdError, OSError, MissingPackageError)):
        return str(error)
    kind = f"{type(error).__name__}: " if type(error).__module__ == "builtins" else ""
    return f"{kind}{error} (--debug shows where)"


def _to_text(path: Any) -> str:
    return path.decode(errors="backslashreplace") if isinstance(path, bytes) else str(path)


class Progress:
    """One line on stderr, if that is a terminal, or else lines now and then, if asked for."""

    def __init__(self, is_wanted: bool) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._is_shown = is_wanted or self._is_terminal
        self._pause = 0.1 if self._is_terminal else 1.0
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Says how many bytes of how many are done."""
        rate = int(done / max(time.monotonic() - self._start, 1e-3))
        percent = 100 * done // total if total else 100
        sizes = f"{format_bytes(done)} of {format_bytes(total)}"
        self.say(f"{percent}%, {sizes}, {format_bytes(rate)}/s")

    def say(self, text: str) -> None:
        """Shows a text, if the last one has stood for long enough."""
        if time.monotonic() - self._last >= self._pause:
            self.announce(text)

    def announce(self, text: str) -> None:
        """Shows a text at once: for what is begun, and takes long."""
        if not self._is_shown:
            return
        self._last = time.monotonic()
        sys.stderr.write(f"\r\x1b[K{text}" if self._is_terminal else f"fastsd: {text}\n")
        sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._is_shown and self._is_terminal:
            sys.stderr.write("\r\x1b[K")  # what comes next starts the line
