"""The contenders: the same work by fastsd, torch and safetensors, spelled as people spell it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastsd
from measure import sync_file

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Loader:
    """Reads a file of format ``kind``."""

    kind: str
    load: Callable[[Path], Any]


@dataclass(frozen=True)
class Filler:
    """Reads a file of format ``kind`` into a model."""

    kind: str
    fill: Callable[[nn.Module, Path], object]


@dataclass(frozen=True)
class Saver:
    """Writes a file of format ``kind``."""

    kind: str
    save: Callable[[Any, Path], object]


def save_and_sync(save: Callable[[State, Path], object]) -> Callable[[State, Path], None]:
    """Return ``save`` followed by a sync of the file and its directory."""

    def save_durably(state: State, path: Path) -> None:
        save(state, path)
        sync_file(path)

    return save_durably


def save_safetensors(state: State, path: Path) -> None:
    """Call ``save_file``, which wants a plain dictionary."""
    save_file(dict(state), path)


LOADERS = {
    "fastsd": Loader("fsd", fastsd.load),
    "torch": Loader("pt", torch.load),
    "torch-mmap": Loader("pt", lambda path: torch.load(path, mmap=True)),
    "safetensors": Loader("safetensors", load_file),
    # The others' own files, read by fastsd:
    "fastsd-pt": Loader("pt", fastsd.load),
    "fastsd-safetensors": Loader("safetensors", fastsd.load),
    # fastsd's other ways, for comparison with its default:
    "fastsd-read": Loader("fsd", lambda path: fastsd.load(path, mmap=False)),
    "fastsd-verify": Loader("fsd", lambda path: fastsd.load(path, verify="checksums")),
}

# A whole module is code as well as data: whoever loads one must trust it, with both libraries.
MODULE_LOADERS = {
    "fastsd": Loader("fsd", lambda path: fastsd.load(path, weights_only=False)),
    "torch": Loader("pt", lambda path: torch.load(path, weights_only=False)),
    "torch-mmap": Loader("pt", lambda path: torch.load(path, weights_only=False, mmap=True)),
}

FILLERS = {
    "fastsd": Filler("fsd", fastsd.load_into),
    "torch": Filler("pt", lambda model, path: model.load_state_dict(torch.load(path))),
    "torch-mmap": Filler(
        "pt", lambda model, path: model.load_state_dict(torch.load(path, mmap=True))
    ),
    "safetensors": Filler(
        "safetensors", lambda model, path: model.load_state_dict(load_file(path))
    ),
}

ASSIGNERS = {
    "fastsd": Filler("fsd", lambda model, path: fastsd.load_into(model, path, assign=True)),
    "torch": Filler("pt", lambda model, path: model.load_state_dict(torch.load(path), assign=True)),
    "torch-mmap": Filler(
        "pt", lambda model, path: model.load_state_dict(torch.load(path, mmap=True), assign=True)
    ),
    "safetensors": Filler(
        "safetensors", lambda model, path: model.load_state_dict(load_file(path), assign=True)
    ),
}


@dataclass(frozen=True)
class Converter:
    """Makes a file of format ``target`` from one of format ``source``."""

    source: str
    target: str
    convert: Callable[[Path, Path], object]


CONVERTERS = {
    "cp": Converter(
        "pt", "pt", lambda source, path: subprocess.run(["cp", source, path], check=True)
    ),
    "pt-fsd": Converter("pt", "fsd", fastsd.convert),
    "fsd-pt": Converter("fsd", "pt", fastsd.convert),
    "pt-safetensors": Converter("pt", "safetensors", fastsd.convert),
    "safetensors-fsd": Converter("safetensors", "fsd", fastsd.convert),
}

SAVERS = {
    "fastsd": Saver("fsd", fastsd.save),
    "torch": Saver("pt", torch.save),
    "safetensors": Saver("safetensors", save_safetensors),
}

DURABLE_SAVERS = {
    "fastsd": Saver("fsd", lambda state, path: fastsd.save(state, path, durable=True)),
    "torch": Saver("pt", save_and_sync(torch.save)),
    "safetensors": Saver("safetensors", save_and_sync(save_safetensors)),
}
