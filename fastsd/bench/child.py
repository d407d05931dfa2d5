"""One measurement, in a process of its own; and what its parent hears of it.

A task is a dictionary: ``do`` names a function below, the rest are its arguments. What the function
yields goes to the parent as lines of JSON, ``{"value": ...}``; an error, as ``{"error": text,
"is_import": bool}``.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsd.api import load as fastsd_load
from fastsd.api import open as fastsd_open
from fastsd.bench import limits
from fastsd.bench.cache import drop_file, warm_file
from fastsd.bench.contenders import Contender, find_contender, pack_flashpack
from fastsd.bench.memory import raw_bytes, start_afresh, touch

_CHECKED_TENSORS = 8
_ERROR_CHARACTERS_MAX = 300


def main(task: dict[str, Any], descriptor: int) -> None:
    """Does a task and tells it to a pipe. What others print does not get into that."""
    with os.fdopen(descriptor, "w", encoding="utf-8") as pipe:

        def tell(message: object) -> None:
            pipe.write(json.dumps(message) + "\n")
            pipe.flush()

        try:
            for value in _TASKS[task.pop("do")](**task):
                tell({"value": value})
        except Exception as error:
            tell({"error": _describe(error), "is_import": isinstance(error, ImportError)})
            sys.exit(1)


def _describe(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text[:_ERROR_CHARACTERS_MAX]


# ---- Loads ----


def load(
    *,
    contender: str,
    path: str,
    device: str,
    cache: str,
    repeat: int,
    seconds: float | None,
    reference: str,
) -> Iterator[dict[str, Any]]:
    """Loads a file once and then ``repeat`` times, or for ``seconds``, but at least once.

    Yields for each load ``call`` and ``ready``, seconds from its start until the call returned and
    until all was in place; and ``cache``, which is "" or says that the file was not cold. After the
    first some tensors are compared with those of ``reference``. Raises ValueError if they differ.
    """
    who = find_contender(contender)
    _prepare(who, device)
    for index in range(1 + repeat):
        cached = _set_cache(Path(path), cache)
        begin = time.perf_counter()
        state = who.load(path, device)
        called = time.perf_counter()
        _settle(state, device)
        ready = time.perf_counter()
        yield {"call": called - begin, "ready": ready - begin, "cache": cached}
        if index == 0:
            _check(state, reference)
        del state  # frees memory, and lets go of pages that are to be dropped
        start_afresh()
        if index == 0:
            start = time.perf_counter()
        elif _is_over(start, index, seconds):
            return


def _prepare(who: Contender, device: str) -> None:
    """All that a program has done once before it loads anything."""
    for name in who.modules:
        importlib.import_module(name)
    touch([torch.ones(1 << 22)])  # starts the threads
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
        torch.cuda.synchronize()


def _set_cache(path: Path, cache: str) -> str:
    if cache == "cold":
        return drop_file(path)
    warm_file(path)
    return ""


def _settle(state: Mapping[str, Tensor], device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    else:
        touch(state.values())


def _is_over(start: float, rounds: int, seconds: float | None) -> bool:
    """Whether one more round would end after the time that there is."""
    if seconds is None:
        return False
    elapsed = time.perf_counter() - start
    return elapsed + elapsed / rounds > seconds


def _check(state: Mapping[str, Tensor], reference: str) -> None:
    """Compares some tensors, from the first to the last, bit by bit."""
    with fastsd_open(reference) as archive:
        names = [name for name in archive if name in state]
        # Of tied tensors some formats keep one name only.
        stored = {archive.info(name).storage for name in names}
        lacking = [name for name in archive if archive.info(name).storage not in stored]
        if lacking:
            raise ValueError(f"what was loaded lacks {len(lacking)} tensors, such as {lacking[0]}")
        for name in names[:: max(1, len(names) // _CHECKED_TENSORS)]:
            if not torch.equal(raw_bytes(state[name].cpu()), raw_bytes(archive[name])):
                raise ValueError(f"what was loaded differs from what was saved: {name}")


# ---- Saves ----


def save(
    *, contender: str, path: str, device: str, repeat: int, seconds: float | None, reference: str
) -> Iterator[dict[str, Any]]:
    """Saves tensors from a device to a new file, once and then ``repeat`` times, or for
    ``seconds``, but at least once. Yields ``ready``: for how many seconds each call blocked."""
    who = find_contender(contender)
    _prepare(who, device)
    assert who.save is not None
    # Memory of their own: what is mapped would be read while it is saved.
    state = dict(fastsd_load(reference, map_location="cpu", mmap=False))
    state = {name: tensor.to(device) for name, tensor in state.items()}
    target = Path(path)
    try:
        for index in range(1 + repeat):
            target.unlink(missing_ok=True)  # freeing its pages is not the saver's work
            _settle({}, device)
            begin = time.perf_counter()
            who.save(state, path)
            yield {"ready": time.perf_counter() - begin}
            if index == 0:
                _check(fastsd_load(path, map_location="cpu"), reference)
            start_afresh(trim=False)
            if index == 0:
                start = time.perf_counter()
            elif _is_over(start, index, seconds):
                return
    finally:
        target.unlink(missing_ok=True)


# ---- Other tasks ----


def measure_limits(path: str, devices: list[str], scratch: str | None) -> Iterator[dict[str, Any]]:
    """Yields `fastsd.bench.results.Limit`, field by field."""
    touch([torch.ones(1 << 22)])
    for limit in limits.measure(Path(path), devices, Path(scratch) if scratch else None):
        yield asdict(limit)


def pack(reference: str, path: str) -> Iterator[dict[str, Any]]:
    """Writes a file that fastsd cannot convert to, with the library whose format it is."""
    pack_flashpack(dict(fastsd_load(reference, map_location="cpu")), path)
    yield {"bytes": Path(path).stat().st_size}


_TASKS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "load": load,
    "save": save,
    "limits": measure_limits,
    "pack": pack,
}
