"""The demonstration's second process: load a saved file into a fresh model and compare.

Reads one JSON object from standard input (model, path, digests, probe) and writes another to
standard output: how long loading took, and a list of findings.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastsd
from measure import digest_tensor
from models import TARGETS

TOKENS = torch.arange(1000, 1032)[None]


def probe_model(model: nn.Module) -> list[float]:
    """Run the model on fixed tokens and return a few numbers of its output."""
    with torch.inference_mode():
        output: list[float] = model.eval()(TOKENS).mean(dim=1).flatten()[:64].tolist()
    return output


def find(text: str, good: bool) -> dict[str, Any]:
    """Make one finding."""
    return {"text": text, "good": good}


def compare_digests(
    what: str, state: Mapping[str, Tensor], expected: dict[str, str]
) -> dict[str, Any]:
    """Compare names, their order, dtypes, shapes and raw bytes with what the first process had."""
    actual = {name: digest_tensor(tensor) for name, tensor in state.items()}
    different = [name for name in expected if actual.get(name) != expected[name]]
    same_order = list(actual) == list(expected)
    text = f"{what}: {len(expected) - len(different)} of {len(expected)} tensors bit-identical"
    text += f", first difference {different[0]!r}" if different else " (SHA-256)"
    text += "" if same_order else ", names or their order differ"
    return find(text, not different and same_order)


def compare_probe(model: nn.Module, expected: list[float]) -> dict[str, Any]:
    """Compare the outputs of the saved and the loaded model."""
    close = torch.allclose(torch.tensor(probe_model(model)), torch.tensor(expected), atol=1e-5)
    return find("forward pass: same output as the saved model", close)


def find_ties(state: Mapping[str, Tensor]) -> set[tuple[str, ...]]:
    """Return the groups of names that share memory."""
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(tensor.data_ptr(), []).append(name)
    return {tuple(sorted(names)) for names in groups.values() if len(names) > 1}


def answer_question(question: dict[str, Any]) -> dict[str, Any]:
    """Load, and compare everything that can be compared."""
    torch.manual_seed(1)  # other values than the saved model had
    model, path = TARGETS[question["model"]](), Path(question["path"])
    fresh = model.state_dict()
    ties = find_ties(fresh)
    start = time.perf_counter()
    result = fastsd.load_into(model, path, strict=True)
    seconds = time.perf_counter() - start
    left_over = [*result.missing_keys, *result.unexpected_keys]
    loaded = fastsd.load(path)
    findings = [
        find("no missing and no unexpected keys", not left_over),
        compare_digests("load_into", model.state_dict(), question["digests"]),
        compare_digests("load", loaded, question["digests"]),
        compare_probe(model, question["probe"]),
    ]
    if ties:
        names = "; ".join(" = ".join(group) for group in sorted(ties))
        tied = ties == find_ties(loaded) == find_ties(model.state_dict())
        findings.append(find(f"tied tensors share memory again: {names}", tied))
    return {"seconds": seconds, "findings": findings}


if __name__ == "__main__":
    try:
        json.dump(answer_question(json.load(sys.stdin)), sys.stdout)
    except KeyboardInterrupt:
        sys.exit(130)  # the first process says so
