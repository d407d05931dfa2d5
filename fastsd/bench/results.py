"""What was measured, as data: limits, results, and the document that holds them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch

Status = Literal["measured", "skipped", "failed"]


@dataclass(frozen=True)
class Limit:
    """What the machine does at best: ``gb_per_s`` (10^9 bytes), or None with the reason in ``how``.

    ``name`` is "memcpy", "pread", "map", "write", "direct", "readahead", or "H2D" or "D2H" and a
    device.
    """

    name: str
    how: str
    gb_per_s: float | None


@dataclass(frozen=True)
class Times:
    """Percentiles of some times, in milliseconds."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times | None:
        """Those of a list, with linear interpolation; None for an empty one."""
        if not seconds:
            return None
        return cls(*(float(ms) for ms in np.percentile(seconds, [50, 90, 99]) * 1e3))


@dataclass(frozen=True)
class Result:
    """One measurement: a contender, a format, a device, and for loads a state of the cache.

    ``first`` is the first load or save of the process and ``ready`` are the others, in
    milliseconds, until all is where it should be: on the CPU every byte touched, on a GPU
    synchronized, and for saves until the call returns. ``call`` is until a load's call returns.
    ``gb_per_s`` is the model's bytes over the median of ``ready``, ``limit`` names the limit that
    binds it, and ``percent`` is the share of that. ``notes`` say what else one should know.
    ``status`` other than "measured" comes with a ``reason`` and without numbers.
    """

    model: str
    work: Literal["load", "save"]
    contender: str
    format: str
    device: str
    cache: str
    status: Status
    reason: str = ""
    rounds: int = 0
    first: float | None = None
    call: Times | None = None
    ready: Times | None = None
    gb_per_s: float | None = None
    limit: str | None = None
    percent: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelInfo:
    """A model that was measured: its bytes without headers, and where its files lay."""

    name: str
    tensors: int
    nbytes: int
    dtypes: tuple[str, ...]
    file_system: str
    notes: tuple[str, ...]
    limits: tuple[Limit, ...]


@dataclass(frozen=True)
class Document:
    """A whole run. ``machine`` describes hardware and versions, ``settings`` what was asked for."""

    machine: Mapping[str, str]
    settings: Mapping[str, Any]
    seconds: float
    models: tuple[ModelInfo, ...]
    results: tuple[Result, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def has_failed(self) -> bool:
        """Whether something went wrong that was meant to work."""
        return any(result.status == "failed" for result in self.results)


def format_size(nbytes: int) -> str:
    """ "600 B", "50 MB", "8 GB": three digits, and powers of 1000."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 1000)):
        if nbytes >= 0.9995 * size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes} B"


def find_limit(
    limits: Sequence[Limit], work: str, device: str, cache: str, is_dropped: bool
) -> Limit | None:
    """The limit that binds: the slowest of the ways that all bytes have to go.

    Loads to the CPU are held against the faster of reading from the page cache and mapping it;
    those to a GPU, against its bus; either, if the file is cold, against the faster way of reading
    it from the disk where that is slower. Saves are held against the bus and writing.
    """
    found = {limit.name: limit for limit in limits if limit.gb_per_s is not None}
    ways: list[Limit] = []
    if work == "save":
        ways += [found[name] for name in (f"D2H {device}", "write") if name in found]
    elif torch.device(device).type == "cuda":
        ways += [found[name] for name in (f"H2D {device}",) if name in found]
    else:
        warm = [found[name] for name in ("pread", "map") if name in found]
        ways += [max(warm, key=_rate)] if warm else []
    if work == "load" and cache == "cold" and is_dropped:
        cold = [found[name] for name in ("direct", "readahead") if name in found]
        if not cold:
            return None
        ways.append(max(cold, key=_rate))
    return min(ways, key=_rate, default=None)


def _rate(limit: Limit) -> float:
    return limit.gb_per_s or 0.0
