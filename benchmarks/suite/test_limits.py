"""The machine's own limits on as many bytes as the large dictionary has."""

from __future__ import annotations

from typing import Any

import pytest

from bench import Spec, Workshop
from limits import LIMITS
from test_load import measure_calls
from test_save import clear_target


@pytest.mark.matrix(group="limits", cases=["big"], contenders=list(LIMITS))
def test_limit(spec: Spec, workshop: Workshop, benchmark: Any) -> None:
    """One bare limit; files to read are fastsd's, warm in the page cache."""
    need, run = LIMITS[spec.contender]
    if need == "map":
        path = workshop.file("fsd")
        measure_calls(benchmark, spec, lambda: run(path, workshop.size))
        return
    path = workshop.file("fsd") if need == "read" else workshop.target("target.raw")
    memory = workshop.flat_copies(2 if need == "copy" else 1)
    choices: dict[str, list[Any]] = {
        "copy": [*memory],
        "write": [*memory, path],
        "read": [path, *memory],
    }
    arguments = choices[need]
    clear = clear_target(spec, path) if need == "write" else None
    try:
        run(*arguments)
    except OSError as error:
        benchmark.skipped = True
        pytest.skip(f"not on this file system: {error.strerror}")
    benchmark.pedantic(run, arguments, setup=clear, rounds=spec.case.rounds)
    workshop.target("target.raw").unlink(missing_ok=True)
