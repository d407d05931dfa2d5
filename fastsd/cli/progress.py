"""How far a zoo is: one bar on a terminal, a line now and then elsewhere, always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from fastsd.cli import terminal
from fastsd.progress import make_bar
from fastsd.zoo import Outcome

_LINE_SECONDS = 5.0


class Lines:
    """Plain lines, at most one in some seconds. Also what is not shown, for ``write`` None."""

    def __init__(
        self,
        write: Callable[[str], object] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write = write
        self._clock = clock
        self._begin = self._last = clock()
        self._items = self._nbytes = self._finished = self._done = 0

    def start(self, items: int, nbytes: int) -> None:
        self._items, self._nbytes = items, nbytes
        self._begin = self._last = self._clock()

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        self._say()

    def finish(self, outcome: Outcome) -> None:
        self._finished += 1
        self._say()

    def _say(self) -> None:
        now = self._clock()
        if self._write is None or now - self._last < _LINE_SECONDS:
            return
        self._last = now
        rate = self._done / max(now - self._begin, 1e-3)
        left = f", {(self._nbytes - self._done) / rate:.0f} s left" if rate else ""
        size, total, speed = map(terminal.format_bytes, (self._done, self._nbytes, int(rate)))
        counts = f"{self._finished:,} of {self._items:,} files"
        self._write(f"fastsd: {counts}, {size} of {total}, {speed}/s{left}\n")

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass


class Bar:
    """A bar with bytes, rate and time left."""

    def __init__(self) -> None:
        self._progress = make_bar(is_transient=True)
        self._task: Any = None
        self._items = self._finished = 0

    def start(self, items: int, nbytes: int) -> None:
        self._items = items
        self._task = self._progress.add_task(self._describe(), total=nbytes)

    def advance(self, nbytes: int) -> None:
        self._progress.update(self._task, advance=nbytes)

    def finish(self, outcome: Outcome) -> None:
        self._finished += 1
        self._progress.update(self._task, description=self._describe())

    def _describe(self) -> str:
        return f"{self._finished:,} of {self._items:,} files"

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()


def make_progress(is_quiet: bool) -> Bar | Lines:
    """What suits stderr; lines, too, on a terminal without rich."""
    if is_quiet:
        return Lines(None)
    if sys.stderr.isatty():
        try:
            return Bar()
        except ImportError:
            pass
    return Lines(sys.stderr.write)
