"""What one measurement is (Spec), and the material it works on (Workshop)."""

from __future__ import annotations

import gc
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cases import Case
from contenders import SAVERS
from limits import PAGE_BYTES
from measure import count_bytes, list_tensors, sync_file, warm_file
from places import Place


@dataclass(frozen=True)
class Spec:
    """One contender doing one kind of work on one dictionary in one place, for one lap."""

    group: str
    place: Place
    case: Case
    contender: str
    lap: int

    @property
    def warmups(self) -> int:
        """Rounds before the measured ones; in the first lap a checked run has gone before."""
        return 1 if self.lap else 0

    @property
    def label(self) -> str:
        """The part of the test's name in brackets."""
        return f"{self.place.name}-{self.case.key}-{self.contender}-lap{self.lap}"


class Workshop:
    """Holds the dictionary, the files and the models of the place and case at hand, no others."""

    def __init__(self) -> None:
        self._at: tuple[Place, Case] | None = None
        self._folder: Path | None = None
        self._files: dict[str, Path] = {}
        self._model: nn.Module | None = None
        self.state: Any = None
        self.count = self.size = 0

    def enter(self, spec: Spec) -> None:
        """Make the dictionary that ``spec`` needs, after clearing up behind the last one."""
        if self._at == (spec.place, spec.case):
            return
        self.close()
        self._at = (spec.place, spec.case)
        self._folder = Path(tempfile.mkdtemp(prefix="fastsd-bench-", dir=spec.place.path))
        self.state = spec.case.make_state()
        tensors = list_tensors(self.state)
        self.count, self.size = len(tensors), count_bytes(tensors)
        freeze_garbage()

    def close(self) -> None:
        """Remove files and let go of memory."""
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._at, self._folder, self._files, self._model, self.state = None, None, {}, None, None
        gc.unfreeze()
        gc.collect()

    def file(self, kind: str) -> Path:
        """Return a file of this dictionary, on disk and in the page cache."""
        if kind not in self._files:
            path = self.target(f"source.{kind}")
            SAVERS[next(name for name, saver in SAVERS.items() if saver.kind == kind)].save(
                self.state, path
            )
            sync_file(path)
            warm_file(path)
            self._files[kind] = path
        return self._files[kind]

    def target(self, name: str) -> Path:
        """Return the path of a file to write."""
        assert self._folder is not None
        return self._folder / name

    def model(self) -> nn.Module:
        """Return a model in memory that has been written to once; all contenders share it."""
        if self._model is None:
            assert self._at is not None
            self._model = self._at[1].make_empty_model("cpu")
            freeze_garbage()
        return self._model

    def flat_copies(self, count: int) -> list[Tensor]:
        """Return ``count`` byte tensors as large as the dictionary, page-aligned, written to."""
        copies = []
        for _ in range(count):
            memory = torch.full((self.size + PAGE_BYTES,), 1, dtype=torch.uint8)
            start = -memory.data_ptr() % PAGE_BYTES
            copies.append(memory[start : start + self.size])
        return copies


def freeze_garbage() -> None:
    """Keep what exists now out of the collector's sight, so that every round starts alike."""
    gc.collect()
    gc.freeze()
