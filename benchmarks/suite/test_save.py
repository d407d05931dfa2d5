"""Saving to a fresh file, with and without waiting for the disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import Spec, Workshop
from cases import DICTIONARIES
from contenders import DURABLE_SAVERS, LOADERS, MODULE_LOADERS, SAVERS, Saver
from measure import same_bits, start_afresh


def clear_target(spec: Spec, path: Path) -> Callable[[], None]:
    """Return what comes before a round: no old file, and no old writes left to the disk."""

    def clear() -> None:
        path.unlink(missing_ok=True)
        start_afresh(trim=False)
        if spec.place.name == "disk":
            os.sync()

    return clear


def measure_saves(benchmark: Any, spec: Spec, workshop: Workshop, saver: Saver) -> None:
    """Time a saver on fresh files, after checking once that its file holds every bit."""
    path = workshop.target(f"target.{saver.kind}")
    clear = clear_target(spec, path)
    if spec.lap == 0:
        clear()
        saver.save(workshop.state, path)
        loaders = MODULE_LOADERS if spec.case.key == "module" else LOADERS
        loader = next(loader for loader in loaders.values() if loader.kind == saver.kind)
        assert same_bits(loader.load(path), workshop.state)
    benchmark.pedantic(
        lambda: saver.save(workshop.state, path),
        setup=clear,
        rounds=spec.case.rounds,
        warmup_rounds=spec.warmups,
    )
    path.unlink()


@pytest.mark.matrix(group="save", cases=DICTIONARIES, contenders=list(SAVERS))
def test_save(spec: Spec, workshop: Workshop, benchmark: Any) -> None:
    """The bytes are with the operating system afterwards; fastsd computes its checksums."""
    measure_saves(benchmark, spec, workshop, SAVERS[spec.contender])


@pytest.mark.matrix(group="save", cases=["adamw", "module"], contenders=["fastsd", "torch"])
def test_save_objects(spec: Spec, workshop: Workshop, benchmark: Any) -> None:
    """The same, of a nested checkpoint and of a whole module, which is pickled."""
    measure_saves(benchmark, spec, workshop, SAVERS[spec.contender])


@pytest.mark.matrix(group="durable", cases=["big", "1000"], contenders=list(DURABLE_SAVERS))
def test_durable_save(spec: Spec, workshop: Workshop, benchmark: Any) -> None:
    """File and directory are synced afterwards."""
    measure_saves(benchmark, spec, workshop, DURABLE_SAVERS[spec.contender])
