"""One run: who is measured with what, in which order, and in how much time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastsd.bench import machine
from fastsd.bench.contenders import CONTENDERS, PACKAGES, Contender
from fastsd.bench.models import Model, Synthetic, open_models
from fastsd.bench.process import ChildError, run_child
from fastsd.bench.results import Document, Limit, ModelInfo, Result, Times, find_limit

CACHES = ("warm", "cold")
# What a process may take beyond its share of the time before it is given up, and beyond all of it.
_GRACE_SECONDS = 60.0
_LATE_SECONDS = 30.0
# What each process may load for, however little time there is: it has cost more to start.
_LOADS_SECONDS_MIN = 1.0
_NO_TIME = "the time was over"
# Whom to measure first, as there may be too little time for all.
_FIRST = ("fastsd", "safetensors", "InstantTensor", "InstantTensor buffered", "fastsafetensors")


@dataclass(frozen=True)
class Settings:
    """What to measure. ``repeat`` loads after the first; ``seconds`` for all, None for no end."""

    devices: tuple[str, ...]
    caches: tuple[str, ...] = CACHES
    repeat: int = 10
    seconds: float | None = None
    saves: bool = False
    contenders: tuple[Contender, ...] = CONTENDERS

    def to_json(self) -> dict[str, Any]:
        names = list(dict.fromkeys(contender.name for contender in self.contenders))
        return {**asdict(replace(self, contenders=())), "contenders": names}


@dataclass(frozen=True)
class _Task:
    """A measurement to come."""

    work: str
    model: Model
    contender: Contender
    device: str
    cache: str

    def find_lack(self) -> str:
        """Why it cannot be done, or ""."""
        lack = self.contender.find_lack(self.device)
        return lack or self.model.lacking.get(self.contender.format, "")


class _Clock:
    """Shares what time there is among what is left to do."""

    def __init__(self, seconds: float | None) -> None:
        self._start = time.monotonic()
        self._seconds = seconds
        self._overhead = 0.0

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        return math.inf if self._seconds is None else self._seconds - self.elapsed

    def share(self, tasks: int) -> float | None:
        """Seconds of repeats for the next of so many processes, or None for as many as it takes."""
        if self._seconds is None:
            return None
        return max(_LOADS_SECONDS_MIN, self.left / tasks - self._overhead)

    def timeout(self, seconds: float = 0.0) -> float:
        """When to give up a process that may load for so long."""
        return min(seconds + _GRACE_SECONDS, max(0.0, self.left) + _LATE_SECONDS)

    def note(self, whole: float, loads: float) -> None:
        """Learns what a process takes beside its repeats: it starts, imports, and loads once."""
        self._overhead = (self._overhead + whole - loads) / 2 if self._overhead else whole - loads


def run(
    sources: Sequence[Path | Synthetic],
    settings: Settings,
    work: Path | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> Document:
    """Measures files and made-up models. ``say`` is told what is being done.

    What cannot be measured, or fails, is a `Result` that says why. Scratch folders are made beside
    the files, or in ``work``, and are gone in the end. Raises OSError, and what `convert` raises,
    for what prevents all of it.
    """
    clock = _Clock(settings.seconds)
    who = machine.describe(settings.devices, PACKAGES)
    formats = {c.format for c in settings.contenders if _takes_part(c, settings.devices)}
    say("making the files")
    with open_models(list(sources), work, formats) as models:
        limits = {}
        for model in models:
            say(f"{model.name}: the machine's limits")
            limits[model.name] = _measure_limits(model, settings, clock)
        tasks = [task for model in models for task in _list_tasks(model, settings)]
        results = _measure_all(tasks, limits, settings, clock, say)
        infos = tuple(_describe(model, limits[model.name]) for model in models)
    return Document(who, settings.to_json(), round(clock.elapsed, 1), infos, results)


def _takes_part(contender: Contender, devices: Sequence[str]) -> bool:
    return not all(contender.find_lack(device) for device in devices)


def _describe(model: Model, limits: tuple[Limit, ...]) -> ModelInfo:
    facts = model.tensors, model.nbytes, model.dtypes, model.file_system, model.notes
    return ModelInfo(model.name, *facts, limits)


def _measure_limits(model: Model, settings: Settings, clock: _Clock) -> tuple[Limit, ...]:
    scratch = str(model.folder / "limit") if settings.saves else None
    task = {"do": "limits", "path": str(model.reference), "devices": list(settings.devices)}
    found = []
    try:
        for value in run_child({**task, "scratch": scratch}, clock.timeout()):
            found.append(Limit(**value))
    except ChildError as error:
        found.append(Limit("others", str(error), None))
    return tuple(found)


def _list_tasks(model: Model, settings: Settings) -> Iterator[_Task]:
    """In the order of the tables."""
    for device in settings.devices:
        for cache in settings.caches:
            for contender in settings.contenders:
                yield _Task("load", model, contender, device, cache)
        if settings.saves:
            for contender in settings.contenders:
                if contender.save is not None:
                    yield _Task("save", model, contender, device, "")


def _measure_all(
    tasks: Sequence[_Task],
    limits: Mapping[str, tuple[Limit, ...]],
    settings: Settings,
    clock: _Clock,
    say: Callable[[str], object],
) -> tuple[Result, ...]:
    """Measures in the order of importance, and gives results in that of the tasks."""
    order = sorted(range(len(tasks)), key=lambda number: _rank(tasks[number]))
    ranked = _measure_each([tasks[number] for number in order], limits, settings, clock, say)
    found = dict(zip(order, ranked, strict=True))
    return tuple(found[number] for number in range(len(tasks)))


def _rank(task: _Task) -> tuple[bool, bool]:
    return task.contender.name not in _FIRST, task.work == "save"


def _measure_each(
    tasks: Sequence[_Task],
    limits: Mapping[str, tuple[Limit, ...]],
    settings: Settings,
    clock: _Clock,
    say: Callable[[str], object],
) -> Iterator[Result]:
    todo = sum(not task.find_lack() for task in tasks)
    done = 0
    for task in tasks:
        if lack := task.find_lack():
            yield _make_result(task, reason=lack)
        elif clock.left <= 0:
            yield _make_result(task, reason=_NO_TIME)
        else:
            cache = f", {task.cache}" if task.cache else ""
            what = f"{task.work} {task.contender.key}, {task.device}{cache}"
            say(f"{done + 1} of {todo}: {task.model.name}: {what}")
            yield _measure(task, limits[task.model.name], settings.repeat, clock, todo - done)
            done += 1


def _make_result(task: _Task, *, reason: str = "", **rest: Any) -> Result:
    who = task.model.name, task.work, task.contender.name, task.contender.format
    rest = {"status": "skipped", **rest}
    return Result(*who, task.device, task.cache, reason=reason, **rest)  # type: ignore[arg-type]


def _measure(
    task: _Task, limits: Sequence[Limit], repeat: int, clock: _Clock, tasks: int
) -> Result:
    """Starts the process, and makes a result of what it tells; it is the next of ``tasks``."""
    seconds = clock.share(tasks)
    timeout = None if seconds is None else clock.timeout(seconds)
    samples: list[dict[str, Any]] = []
    start = time.monotonic()
    try:
        samples.extend(run_child(_describe_task(task, repeat, seconds), timeout))
    except ChildError as error:
        status = "skipped" if error.is_import else "failed"
        return _make_result(task, status=status, reason=str(error), rounds=len(samples))
    if not samples:
        return _make_result(task, status="failed", reason="its process ended before it loaded")
    clock.note(time.monotonic() - start, sum(sample["ready"] for sample in samples[1:]))
    return _summarize(task, samples, limits, repeat)


def _describe_task(task: _Task, repeat: int, seconds: float | None) -> dict[str, Any]:
    described = {
        "do": task.work,
        "contender": task.contender.key,
        "device": task.device,
        "repeat": repeat,
        "seconds": seconds,
        "reference": str(task.model.reference),
    }
    if task.work == "save":
        return {**described, "path": str(task.model.folder / f"saved.{task.contender.format}")}
    path = task.model.files[task.contender.format]
    return {**described, "path": str(path), "cache": task.cache}


def _summarize(
    task: _Task, samples: Sequence[dict[str, Any]], limits: Sequence[Limit], repeat: int
) -> Result:
    first, *others = samples
    ready = Times.of([sample["ready"] for sample in others])
    call = Times.of([sample["call"] for sample in others if "call" in sample])
    warmth = next((s["cache"] for s in samples if s.get("cache")), "")
    rate = task.model.nbytes / ready.p50 / 1e6 if ready and ready.p50 else None
    limit = find_limit(limits, task.work, task.device, task.cache, not warmth)
    percent = None
    if rate is not None and limit is not None and limit.gb_per_s:
        percent = 100 * rate / limit.gb_per_s
    short = f"{len(others)} of {repeat} rounds" if len(others) < repeat else ""
    return _make_result(
        task,
        status="measured",
        rounds=len(others),
        first=first["ready"] * 1e3,
        call=call,
        ready=ready,
        gb_per_s=rate,
        limit=limit.name if limit else None,
        percent=percent,
        notes=tuple(filter(None, (warmth, short))),
    )


def default_devices() -> tuple[str, ...]:
    """The first GPU if there is one, or the CPU."""
    return ("cuda:0",) if torch.cuda.is_available() else ("cpu",)
