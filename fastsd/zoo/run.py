"""Runs: a plan carried out, with what earlier runs have done taken into account."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from fastsd.zoo.engines import Advance, Engine, Event
from fastsd.zoo.manifest import LockedError, Manifest
from fastsd.zoo.plan import Plan, PlanItem
from fastsd.zoo.trees import is_remote
from fastsd.zoo.work import SCRATCH_NAME, Outcome, to_json

_LEFTOVER_PREFIX = ".fastsd-"  # of files that have not got their names yet


class StartError(Exception):
    """A run could not begin."""


class Progress(Protocol):
    """Told how a run goes; all counts are of bytes of sources."""

    def start(self, items: int, nbytes: int) -> None: ...

    def advance(self, nbytes: int) -> None: ...

    def finish(self, outcome: Outcome) -> None: ...


@dataclass
class Summary:
    """What became of all items of a plan, in its order once the run is over."""

    outcomes: list[Outcome] = field(default_factory=list)

    def select(self, status: str) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.status == status]

    @property
    def exit_code(self) -> int:
        """0 if all is well, 1 if something failed."""
        return 1 if self.select("failed") else 0

    def to_json(self) -> list[dict[str, Any]]:
        return [{"name": outcome.name, **to_json(outcome)} for outcome in self.outcomes]


def run_plan(plan: Plan, engine: Engine, progress: Progress | None = None) -> Summary:
    """Converts what the manifest does not say is done, and records what comes of it.

    One item's trouble is its outcome. Raises StartError where the output directory cannot be
    written, is the zoo itself, or has another run writing to it; and what the engine raises when it
    starts.
    """
    _check_out(plan)
    try:
        manifest = Manifest(plan.out)
    except (LockedError, OSError) as error:
        raise StartError(str(error)) from error
    with manifest:
        _clean(Path(plan.out))
        try:
            return _run(plan, engine, manifest, progress)
        finally:
            _clean(Path(plan.out))  # of processes that were stopped, too


def _check_out(plan: Plan) -> None:
    if not is_remote(plan.root) and Path(plan.root).resolve() == Path(plan.out).resolve():
        raise StartError(f"{plan.out}: the output needs a directory of its own")


def _clean(out: Path) -> None:
    """Removes what conversions that were killed had begun."""
    shutil.rmtree(out / SCRATCH_NAME, ignore_errors=True)
    for folder, _, names in os.walk(out):
        for name in names:
            if name.startswith(_LEFTOVER_PREFIX):
                Path(folder, name).unlink(missing_ok=True)


def _run(plan: Plan, engine: Engine, manifest: Manifest, progress: Progress | None) -> Summary:
    skipped = [item for item in plan.items if not item.problem and manifest.is_done(item)]
    outcomes = {item.name: Outcome(item.name, "skipped", note=item.note) for item in skipped}
    scratch = str(Path(plan.out, SCRATCH_NAME))
    todo = {
        item.name: replace(item, scratch=scratch)
        for item in plan.items
        if item.name not in outcomes
    }
    tally = _Tally(todo, progress)
    for item in [item for item in todo.values() if item.problem]:
        outcomes[item.name] = Outcome(item.name, "failed", item.problem)
        tally.finish(outcomes[item.name])
    with closing(_start(engine, [i for i in todo.values() if not i.problem])) as events:
        for event in events:
            if isinstance(event, Advance):
                tally.advance(event.name, event.nbytes)
                continue
            manifest.append(todo[event.name], event)
            outcomes[event.name] = event
            tally.finish(event)
    return Summary([outcomes[item.name] for item in plan.items])


def _start(engine: Engine, items: list[PlanItem]) -> Generator[Event, None, None]:
    if items:  # an engine may take long to start
        yield from engine.run(items)


class _Tally:
    """Keeps the count of bytes at what it should be, whatever an item said on its way."""

    def __init__(self, items: dict[str, PlanItem], progress: Progress | None) -> None:
        self._left = {name: item.nbytes for name, item in items.items()}
        self._progress = progress
        if progress is not None:
            progress.start(len(items), sum(self._left.values()))

    def advance(self, name: str, nbytes: int) -> None:
        counted = min(nbytes, self._left[name])
        self._left[name] -= counted
        if self._progress is not None:
            self._progress.advance(counted)

    def finish(self, outcome: Outcome) -> None:
        self.advance(outcome.name, self._left[outcome.name])
        if self._progress is not None:
            self._progress.finish(outcome)
