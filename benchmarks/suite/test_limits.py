"""The machine's own limits on as many bytes as the large dictionary has."""

from __future__ import annotations

from typing import Any

import pytest

from bench import Spec, Workshop
from limits import LIMITS
from test_save import clear_target


def make_arguments(spec: Spec, workshop: Workshop, need: str) -> list[Any]:
    """Return what a limit works on; files to read are fastsd's, warm in the page cache."""
    if need == "model":
        return [workshop.model(), workshop.state]
    if need == "meta":
        return [spec.case.make_empty_model("meta"), workshop.state]
    if need == "map":
        return [workshop.file("fsd"), workshop.size]
    if need == "read":
        return [workshop.file("fsd"), *workshop.flat_copies(1)]
    if need == "write":
        return [*workshop.flat_copies(1), workshop.target("target.raw")]
    return [*workshop.flat_copies(2)]


@pytest.mark.matrix(group="limits", cases=["big"], contenders=list(LIMITS))
def test_limit(spec: Spec, workshop: Workshop, benchmark: Any) -> None:
    """One bare limit."""
    need, run = LIMITS[spec.contender]
    arguments = make_arguments(spec, workshop, need)

    def prepare() -> None:
        if need == "write":
            clear_target(spec, arguments[1])()
        elif need == "meta":
            arguments[0] = spec.case.make_empty_model("meta")

    results: list[object] = []  # a mapping is unmapped after the clock has stopped
    try:
        run(*arguments)
    except OSError as error:
        benchmark.skipped = True
        pytest.skip(f"not on this file system: {error.strerror}")
    benchmark.pedantic(
        lambda: results.append(run(*arguments)),
        setup=prepare,
        teardown=results.clear,
        rounds=spec.case.rounds,
    )
    workshop.target("target.raw").unlink(missing_ok=True)
