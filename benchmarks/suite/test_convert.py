"""Converting a file to another format, beside `cp` of it."""

from __future__ import annotations

from typing import Any

import pytest

from bench import Spec, Workshop
from contenders import CONVERTERS, LOADERS
from measure import same_bits
from test_save import clear_target


@pytest.mark.matrix(group="convert", cases=["big"], contenders=list(CONVERTERS))
def test_convert(spec: Spec, workshop: Workshop, benchmark: Any) -> None:
    """From a file in the page cache; the bytes are with the operating system afterwards."""
    converter = CONVERTERS[spec.contender]
    source = workshop.file(converter.source)
    target = workshop.target(f"target.{converter.target}")
    clear = clear_target(spec, target)
    if spec.lap == 0:
        clear()
        converter.convert(source, target)
        loader = next(loader for loader in LOADERS.values() if loader.kind == converter.target)
        assert same_bits(loader.load(target), workshop.state)
    benchmark.pedantic(
        lambda: converter.convert(source, target),
        setup=clear,
        rounds=spec.case.rounds,
        warmup_rounds=spec.warmups,
    )
    target.unlink()
