"""The dictionaries that everything is measured on, and models to load them into."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models import Bags, GPTBlocks

QUICK = os.environ.get("FASTSD_BENCH_QUICK") == "1"


@dataclass(frozen=True)
class Case:
    """One dictionary and how often to measure on it.

    Contenders take turns: each is measured in ``laps`` laps, ``rounds`` rounds a lap. A round of a
    load makes ``calls`` calls, so that microseconds are not lost in the clock.
    """

    key: str
    title: str
    make_model: Callable[[], nn.Module]
    rounds: int
    laps: int = 2
    calls: int = 1

    def make_dictionary(self) -> dict[str, Tensor]:
        """Return a dictionary of float32 tensors, each in memory of its own, filled with noise."""
        names = self.make_empty_model("meta").state_dict()
        return {name: torch.rand(tensor.shape) for name, tensor in names.items()}

    def make_empty_model(self, device: str) -> nn.Module:
        """Return the model on ``device`` ("meta" holds no data), zeros in every parameter."""
        with torch.device("meta"):
            model = self.make_model()
        if device != "meta":
            model = model.to_empty(device=device)
            fill_zeros(model)
        return model


def fill_zeros(model: nn.Module) -> None:
    """Set every parameter to zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()


def list_cases() -> list[Case]:
    """Return the four dictionaries of a full run."""
    return [
        Case("10", "10 small tensors", lambda: Bags(10, (64, 64)), rounds=30, calls=10),
        Case("big", "300 tensors, 1.1 GB", lambda: GPTBlocks(25, 960), rounds=4),
        Case("1000", "1,000 x 16 kB", lambda: Bags(1000, (64, 64)), rounds=15),
        Case("20000", "20,000 x 2 kB", lambda: Bags(20_000, (512,)), rounds=5),
    ]


def list_quick_cases() -> list[Case]:
    """Return small stand-ins under the same keys, to see that everything runs."""
    return [
        Case("10", "10 small tensors", lambda: Bags(10, (64, 64)), rounds=3, laps=1, calls=10),
        Case("big", "300 tensors, 44 MB", lambda: GPTBlocks(25, 192), rounds=2, laps=1),
        Case("1000", "200 x 16 kB", lambda: Bags(200, (64, 64)), rounds=2, laps=1),
        Case("20000", "2,000 x 2 kB", lambda: Bags(2_000, (512,)), rounds=2, laps=1),
    ]


CASES = {case.key: case for case in (list_quick_cases() if QUICK else list_cases())}
