"""How measurements are laid out, run in turns, and described without naming a machine.

A test carries ``@pytest.mark.matrix(group=..., cases=[...], contenders=[...])`` and takes a
``spec``. Order: place, dictionary, group, lap, contender; so contenders alternate, and every second
lap goes through them backwards.
"""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors import __version__ as safetensors_version

import fastsd
from bench import Spec, Workshop
from cases import CASES, QUICK
from fastsd.bench.machine import memory_gib, processor_name
from places import find_places

GROUPS = ("save", "durable", "convert", "load", "touch", "into", "assign", "limits")
PLACES = find_places()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Expand the matrix of a test into its specs."""
    for mark in metafunc.definition.iter_markers("matrix"):
        group, cases, contenders = (mark.kwargs[key] for key in ("group", "cases", "contenders"))
        specs = [
            Spec(group, place, CASES[case], contender, lap)
            for place in PLACES
            for case in cases
            for contender in contenders
            for lap in range(CASES[case].laps)
        ]
        metafunc.parametrize("spec", specs, ids=[spec.label for spec in specs])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort into the order that the head of this file describes."""
    turns = {id(item): index for index, item in enumerate(items)}

    def order(item: pytest.Item) -> tuple[int, ...]:
        spec: Spec = item.callspec.params["spec"]  # type: ignore[attr-defined]
        turn = turns[id(item)] * (-1 if spec.lap % 2 else 1)
        case = list(CASES).index(spec.case.key)
        return (PLACES.index(spec.place), case, GROUPS.index(spec.group), spec.lap, turn)

    items.sort(key=order)


@pytest.fixture(scope="session")
def warehouse() -> Iterator[Workshop]:
    """Keep one workshop for the run and clear it at the end, also after Ctrl-C."""
    workshop = Workshop()
    yield workshop
    workshop.close()


@pytest.fixture
def workshop(warehouse: Workshop, spec: Spec, benchmark: Any) -> Workshop:
    """Prepare for ``spec`` and note beside the measurement what is measured."""
    show_progress(spec)
    warehouse.enter(spec)
    benchmark.group = f"{spec.group} {spec.case.title} {spec.place.label}"
    benchmark.extra_info.update(
        group=spec.group,
        case=spec.case.key,
        title=spec.case.title,
        tensors=warehouse.count,
        bytes=warehouse.size,
        place=spec.place.name,
        file_system=spec.place.label,
        contender=spec.contender,
        lap=spec.lap,
    )
    gc.collect()
    return warehouse


def pytest_report_teststatus(report: Any) -> tuple[str, str, str] | None:
    """Leave out the dots; a line a group says more."""
    if not report.passed:
        return None
    return ("passed" if report.when == "call" else "", "", "")


_shown: set[tuple[str, str, str]] = set()


def show_progress(spec: Spec) -> None:
    """Print a line when a place, a dictionary or a group begins."""
    key = (spec.place.name, spec.case.key, spec.group)
    if key not in _shown:
        _shown.add(key)
        print(f"... {spec.place.label}: {spec.case.title}: {spec.group}", flush=True)


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    """Say what matters for speed and nothing that identifies a machine."""
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "kernel": ".".join(platform.release().split(".")[:2]),
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": memory_gib(),
        "python_version": platform.python_version(),
        "torch_version": torch.__version__,
        "safetensors_version": safetensors_version,
        "fastsd_version": fastsd.__version__,
        "quick": QUICK,
    }


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    """Keep the commit and whether the tree was clean."""
    for key in set(commit_info) - {"id", "time", "dirty"}:
        del commit_info[key]


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Replace the parameters, which hold directories; ``extra_info`` says the same without."""
    for entry in output_json["benchmarks"]:
        entry["params"] = None
