"""A bar of bytes, with rate and time left, on stderr; by rich."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

Tell = Callable[[int], None]


def make_bar(*, is_transient: bool) -> RichProgress:
    """What is shown, not started yet, and taken away at the end if ``is_transient``.

    Raises ImportError where there is no rich.
    """
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
    except ImportError:
        raise ImportError("to show progress takes rich: pip install fastsd[cli]") from None
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr, markup=False, emoji=False, highlight=False),
        transient=is_transient,
    )


class Progress:
    """How far a load is: several steps, each of so many bytes."""

    def __init__(self, bar: RichProgress, description: str) -> None:
        self._bar = bar
        self._task = bar.add_task(description, total=0)
        self._total = 0
        self._done = 0

    def expect(self, nbytes: int) -> None:
        """So many in all, if that is known before; otherwise each step adds its own."""
        self._total = nbytes
        self._bar.update(self._task, total=nbytes)

    @contextmanager
    def step(self, nbytes: int) -> Iterator[Tell]:
        """Gives what is to be told how many of these bytes are done."""
        begin = self._done
        self.expect(max(self._total, begin + nbytes))
        yield lambda done: self._bar.update(self._task, completed=begin + done)
        self._done = begin + nbytes
        self._bar.update(self._task, completed=self._done)


@contextmanager
def show_progress(description: str) -> Iterator[Progress]:
    """A bar while this lasts. Raises ImportError where there is no rich."""
    with make_bar(is_transient=False) as bar:
        yield Progress(bar, description)
