"""Loading a file: the call alone, with every byte read, and into a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from bench import Spec, Workshop
from cases import DICTIONARIES, fill_zeros
from contenders import ASSIGNERS, FILLERS, LOADERS, MODULE_LOADERS, Loader, State
from measure import same_bits, start_afresh, touch

DEFAULTS = ["fastsd", "torch", "torch-mmap", "safetensors"]
TOUCHERS = [*DEFAULTS, "fastsd-read", "fastsd-verify"]
CALLS = [*DEFAULTS, "fastsd-pt", "fastsd-safetensors"]


def measure_calls(benchmark: Any, spec: Spec, call: Callable[[], object]) -> None:
    """Time ``call``; results live until the clock has stopped."""
    results: list[object] = []

    def clear() -> None:
        results.clear()
        start_afresh(trim=spec.group != "load")

    benchmark.pedantic(
        lambda: results.append(call()),
        teardown=clear,
        rounds=spec.case.rounds,
        warmup_rounds=spec.warmups,
        iterations=spec.case.calls,
    )


def measure_load_calls(benchmark: Any, spec: Spec, workshop: Workshop, loader: Loader) -> None:
    """Time a loader, after checking once that what it gives is what was saved."""
    path = workshop.file(loader.kind)
    if spec.lap == 0:
        assert same_bits(loader.load(path), workshop.state)
    measure_calls(benchmark, spec, lambda: loader.load(path))


@pytest.mark.matrix(group="load", cases=DICTIONARIES, contenders=CALLS)
def test_load_call(spec: Spec, workshop: Workshop, benchmark: Any) -> None:
    """The call alone: tensors exist afterwards, whether or not their bytes have been read."""
    measure_load_calls(benchmark, spec, workshop, LOADERS[spec.contender])


@pytest.mark.matrix(group="load", cases=["adamw"], contenders=[*MODULE_LOADERS, "fastsd-pt"])
def test_load_call_of_checkpoint(spec: Spec, workshop: Workshop, benchmark: Any) -> None:
    """The same, of a nested checkpoint, which safetensors has no form for."""
    measure_load_calls(benchmark, spec, workshop, LOADERS[spec.contender])


@pytest.mark.matrix(group="load", cases=["module"], contenders=list(MODULE_LOADERS))
def test_load_call_of_module(spec: Spec, workshop: Workshop, benchmark: Any) -> None:
    """The same, of a whole module, which is unpickled."""
    measure_load_calls(benchmark, spec, workshop, MODULE_LOADERS[spec.contender])


@pytest.mark.matrix(group="touch", cases=["big", "1000"], contenders=TOUCHERS)
def test_load_and_touch(spec: Spec, workshop: Workshop, benchmark: Any) -> None:
    """The call, and then reading every byte once."""
    loader = LOADERS[spec.contender]
    path = workshop.file(loader.kind)

    def load_and_touch() -> State:
        state = loader.load(path)
        touch(state.values())
        return state

    if spec.lap == 0:
        assert same_bits(loader.load(path), workshop.state)
    measure_calls(benchmark, spec, load_and_touch)


@pytest.mark.matrix(group="into", cases=["big", "1000"], contenders=DEFAULTS)
def test_load_into(spec: Spec, workshop: Workshop, benchmark: Any) -> None:
    """Into parameters that exist; what lies between file and model is freed within the call."""
    filler, model = FILLERS[spec.contender], workshop.model()
    path = workshop.file(filler.kind)
    if spec.lap == 0:
        fill_zeros(model)
        filler.fill(model, path)
        assert same_bits(model.state_dict(), workshop.state)
    benchmark.pedantic(
        filler.fill,
        (model, path),
        setup=start_afresh,
        rounds=spec.case.rounds,
        warmup_rounds=spec.warmups,
    )


@pytest.mark.matrix(group="assign", cases=["big", "1000"], contenders=DEFAULTS)
def test_load_into_assign(spec: Spec, workshop: Workshop, benchmark: Any) -> None:
    """Into a model on the meta device, made anew for every round, by assignment."""
    filler = ASSIGNERS[spec.contender]
    path = workshop.file(filler.kind)
    models: list[nn.Module] = []

    def make_model() -> tuple[tuple[object, ...], dict[str, object]]:
        models[:] = [spec.case.make_empty_model("meta")]
        start_afresh()
        return (models[0], path), {}

    if spec.lap == 0:
        make_model()
        filler.fill(models[0], path)
        assert same_bits(models[0].state_dict(), workshop.state)
    benchmark.pedantic(
        filler.fill, setup=make_model, rounds=spec.case.rounds, warmup_rounds=spec.warmups
    )
