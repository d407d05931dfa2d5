"""What everything is measured on: dictionaries, with models to load them into, and checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models import Bags, GPTBlocks

QUICK = os.environ.get("FASTSD_BENCH_QUICK") == "1"


@dataclass(frozen=True)
class Case:
    """One object to save and how often to measure on it: a plain dictionary of a model's tensors,
    or what ``make_object`` makes of the model.

    Contenders take turns: each is measured in ``laps`` laps, ``rounds`` rounds a lap. A round of a
    load makes ``calls`` calls, so that microseconds are not lost in the clock.
    """

    key: str
    title: str
    make_model: Callable[[], nn.Module]
    rounds: int
    laps: int = 2
    calls: int = 1
    make_object: Callable[[nn.Module], object] | None = None

    def make_state(self) -> Any:
        """Return the object to save: float32 tensors in memory of their own, filled with noise."""
        model = self.make_empty_model("cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.uniform_()
        return self.make_object(model) if self.make_object else dict(model.state_dict())

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


def make_checkpoint(model: nn.Module, records: int) -> dict[str, object]:
    """Return what a training script saves: model, AdamW with its moments, a history of values."""
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.rand(parameter.shape)
    optimizer.step()
    optimizer.zero_grad()
    history = [
        {
            "step": i,
            "loss": 1 / (i + 1),
            "lr": 1e-3 * 0.99**i,
            "split": f"shard-{i % 7}",
            "ok": True,
        }
        for i in range(records)
    ]
    return {
        "epoch": 3,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "history": history,
    }


def object_cases(
    size: str, *, rows: int, width: int, records: int, rounds: int, laps: int
) -> list[Case]:
    """Return a nested checkpoint and a whole module, of parameters that come to ``size``."""
    return [
        Case(
            "adamw",
            f"AdamW checkpoint, {size}",
            lambda: Bags(250, (rows, 333)),
            rounds,
            laps,
            make_object=lambda model: make_checkpoint(model, records),
        ),
        Case(
            "module",
            f"whole nn.Module, {size}",
            lambda: GPTBlocks(25, width),
            rounds,
            laps,
            make_object=lambda model: model,
        ),
    ]


def list_cases() -> list[Case]:
    """Return what a full run measures."""
    return [
        Case("10", "10 small tensors", lambda: Bags(10, (64, 64)), rounds=30, calls=10),
        Case("big", "300 tensors, 1.1 GB", lambda: GPTBlocks(25, 960), rounds=4),
        Case("1000", "1,000 x 16 kB", lambda: Bags(1000, (64, 64)), rounds=15),
        Case("20000", "20,000 x 2 kB", lambda: Bags(20_000, (512,)), rounds=5),
        *object_cases("1.1 GB", rows=1_100, width=960, records=2_000, rounds=4, laps=2),
    ]


def list_quick_cases() -> list[Case]:
    """Return small stand-ins under the same keys, to see that everything runs."""
    return [
        Case("10", "10 small tensors", lambda: Bags(10, (64, 64)), rounds=3, laps=1, calls=10),
        Case("big", "300 tensors, 44 MB", lambda: GPTBlocks(25, 192), rounds=2, laps=1),
        Case("1000", "200 x 16 kB", lambda: Bags(200, (64, 64)), rounds=2, laps=1),
        Case("20000", "2,000 x 2 kB", lambda: Bags(2_000, (512,)), rounds=2, laps=1),
        *object_cases("44 MB", rows=44, width=192, records=100, rounds=2, laps=1),
    ]


DICTIONARIES = ["10", "big", "1000", "20000"]
CASES = {case.key: case for case in (list_quick_cases() if QUICK else list_cases())}
