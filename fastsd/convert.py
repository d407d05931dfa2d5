"""Stand-in, until the real one is here."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastsd import api
from fastsd.errors import FormatError
from fastsd.formats.dcp import read_dcp
from fastsd.layouts import kinds_of, recognise


@dataclass(frozen=True)
class Report:
    source: str
    target: str
    source_nbytes: int
    target_nbytes: int
    tensors: int
    layout: str
    picked: str | None
    dropped: tuple[str, ...]
    verified: bool | None


def _load(source: Path, trust: bool) -> Any:
    if source.is_dir():
        return read_dcp(source, trust)
    first = source.read_bytes()[:16]
    if first.startswith(b"\x8fFSD"):
        return api.load(source, weights_only=not trust)
    if first.lstrip().startswith(b"{"):
        names = json.loads(source.read_text())["weight_map"].values()
        state: dict[str, Any] = {}
        for name in dict.fromkeys(names):
            state |= _load(source.parent / name, trust)
        return state
    if first[8:9] == b"{":
        import safetensors.torch

        return safetensors.torch.load(source.read_bytes())
    if first[:1] == b"\x80" and b"\xfc\x9cF\xf9" not in first:
        if not trust:
            raise FormatError("it is a pickle", path=str(source))
        with source.open("rb") as file:
            return pickle.load(file)
    if first[:1] not in (b"P", b"\x80"):
        raise FormatError("it is nothing known", path=str(source))
    return torch.load(source, weights_only=not trust, map_location="cpu")


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str | None = None,
    pick: str | None = None,
    strip_prefix: str | None = None,
    dtype: torch.dtype | None = None,
    drop_optimizer: bool = False,
    metadata: Mapping[str, str] | None = None,
    max_shard_size: int | str | None = None,
    trust: bool = False,
    verify: bool = False,
    lossy: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Report:
    obj = _load(Path(source), trust)
    layout = recognise(kinds_of(obj, torch.Tensor)) if isinstance(obj, dict) else None
    api.save(obj, target, metadata=metadata)
    nbytes = Path(source).stat().st_size
    if progress is not None:
        progress(nbytes)
    return Report(
        str(source),
        str(target),
        nbytes,
        Path(target).stat().st_size,
        len(obj) if isinstance(obj, dict) else 1,
        layout.name if layout else "object",
        pick,
        (),
        verify or None,
    )
