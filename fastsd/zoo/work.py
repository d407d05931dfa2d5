"""One conversion of a zoo: what every engine runs, wherever it runs it."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from fastsd import _core
from fastsd.convert import Report, convert
from fastsd.errors import FastsdError
from fastsd.zoo.plan import PlanItem
from fastsd.zoo.recognise import Form, recognise_file
from fastsd.zoo.trees import LocalTree, Piece, RemoteTree, is_remote, iterate_bytes
from fastsd.zoo.wanted import find_wanted

Status = Literal["done", "skipped", "failed"]
SCRATCH_NAME = ".fastsd-fetched"


@dataclass(frozen=True)
class Outcome:
    """What became of an item. ``reason`` says why it failed, in one line.

    ``wanted`` are the globals that it wants to import, if that is why; ``wants_trust`` says that
    it could be converted if the item were ``trusted``. The CRC32C of all source files one after the
    other is ``source_crc32c``; of what was written there are the size, stamps and CRC32C.
    """

    name: str
    status: Status
    reason: str = ""
    wanted: tuple[str, ...] = ()
    wants_trust: bool = False
    note: str = ""
    report: Report | None = None
    source_crc32c: int | None = None
    target: str = ""
    target_nbytes: int = 0
    target_stamp: str = ""
    target_crc32c: int | None = None
    seconds: float = 0.0


def convert_one(item: PlanItem, on_bytes: Callable[[int], None] | None = None) -> Outcome:
    """Converts an item. Never raises an Exception: what goes wrong is an outcome.

    ``on_bytes`` is told how many more bytes are done. An item that is not ``trusted`` runs no code
    of its file.
    """
    start = time.monotonic()
    try:
        if item.problem:
            return Outcome(item.name, "failed", item.problem)
        outcome = _convert(item, on_bytes)
    except Exception as error:
        outcome = Outcome(item.name, "failed", describe(error))
    return replace(outcome, seconds=time.monotonic() - start)


def describe(error: BaseException) -> str:
    """One line of what is wrong."""
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    text = " ".join(str(error).split())
    if isinstance(error, (FastsdError, OSError, pickle.UnpicklingError)) and text:
        return text
    return f"{type(error).__name__}: {text}"


def _convert(item: PlanItem, on_bytes: Callable[[int], None] | None) -> Outcome:
    options = item.options
    Path(item.target).parent.mkdir(parents=True, exist_ok=True)
    with _local_source(item) as (source, files):
        try:
            report = convert(
                source,
                item.target,
                to=options.to,
                pick=options.pick,
                strip_prefix=options.strip_prefix,
                dtype=None if options.dtype is None else getattr(torch, options.dtype),
                drop_optimizer=options.drop_optimizer,
                metadata=options.metadata,
                max_shard_size=options.max_shard_size,
                trust=item.trusted,
                verify=options.verify,
                lossy=options.lossy,
                progress=on_bytes,
            )
        except Exception as error:
            reason, wanted = explain(error, Path(source), item.trusted)
            # Of the pickles in a directory only the error tells.
            wants_trust = isinstance(error, pickle.UnpicklingError) or isinstance(
                error.__cause__, pickle.UnpicklingError
            )
            return Outcome(
                item.name,
                "failed",
                reason,
                wanted=wanted,
                wants_trust=not item.trusted and (wants_trust or item.form is Form.PICKLE),
                note=item.note,
            )
        checksum = checksum_files(files)
    if not is_remote(item.root) and stamp_files(files) != [p.stamp for p in item.pieces]:
        return Outcome(item.name, "failed", "it changed while it was converted: run again")
    # Of the target, too, only what is on the disk may be recorded as done.
    targets = list_target(Path(report.target))
    for path in targets:
        _sync(path)
    return Outcome(
        item.name,
        "done",
        note=item.note,
        report=report,
        source_crc32c=checksum,
        target=report.target,
        target_nbytes=sum(path.stat().st_size for path in targets),
        target_stamp=" ".join(stamp_files(targets)),
        target_crc32c=checksum_files(targets),
    )


# ---- Sources ----


@contextmanager
def _local_source(item: PlanItem) -> Iterator[tuple[str, list[Path]]]:
    """The path to convert, and those of all its pieces; what is remote is fetched for as long."""
    if not is_remote(item.root):
        tree = LocalTree(item.root)
        yield tree.locate(item.name), [Path(tree.locate(p.name)) for p in item.pieces]
        return
    remote = RemoteTree(item.root)
    os.makedirs(item.scratch, exist_ok=True)
    folder = tempfile.mkdtemp(dir=item.scratch)
    try:
        paths = [_fetch(remote, piece, Path(folder)) for piece in item.pieces]
        yield str(Path(folder, item.name)), paths
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fetch(remote: RemoteTree, piece: Piece, folder: Path) -> Path:
    path = folder / piece.name
    path.parent.mkdir(parents=True, exist_ok=True)
    remote.fetch(piece.name, str(path))
    if path.stat().st_size != piece.nbytes:
        raise OSError(f"{piece.name}: fetched {path.stat().st_size} bytes of {piece.nbytes}")
    return path


def explain(error: Exception, path: Path, trusted: bool = False) -> tuple[str, tuple[str, ...]]:
    """What went wrong with a source, in one line, and the globals that it wants, if it is that."""
    form = _recognise(path)
    is_pickles = form is Form.PICKLE or isinstance(error, pickle.UnpicklingError)
    wanted = find_wanted(path, form) if is_pickles and not trusted else []
    if not wanted:
        return describe(error), ()
    more = f" and {len(wanted) - 5} more" if wanted[5:] else ""
    return f"it needs trust, to unpickle {', '.join(wanted[:5])}{more}", tuple(wanted)


def _recognise(path: Path) -> Form | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return recognise_file(path.name, file)


# ---- What is recorded ----


def list_target(path: Path) -> list[Path]:
    """The files that a conversion has written: one, or all in a directory. Raises OSError."""
    return sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]


def stamp_files(paths: list[Path]) -> list[str]:
    return [str(path.stat().st_mtime_ns) for path in paths]


def checksum_files(paths: list[Path]) -> int:
    """The CRC32C of the files' bytes, one after the other: with instructions of the processor, it
    is bounded by memory, where hashes without keys would take longer than converting."""
    value = 0
    for path in paths:
        for data in iterate_bytes(path):
            value = _core.crc32c(data, value)
    return value


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(outcome: Outcome) -> dict[str, Any]:
    """What a record, or a machine-readable summary, says about an outcome."""
    report = outcome.report
    return {
        "outcome": outcome.status,
        "reason": outcome.reason,
        "wanted": list(outcome.wanted),
        "note": outcome.note,
        "source_crc32c": outcome.source_crc32c,
        "target": outcome.target,
        "target_nbytes": outcome.target_nbytes,
        "target_stamp": outcome.target_stamp,
        "target_crc32c": outcome.target_crc32c,
        "seconds": round(outcome.seconds, 3),
        "layout": report and report.layout,
        "picked": report and report.picked,
        "dropped": list(report.dropped) if report else [],
        "tensors": report and report.tensors,
        "verified": report and report.verified,
    }
