"""The manifest: one line of JSON for each item that a run has finished with.

Lines are only ever appended, and are on the disk before the run goes on, so that a run that is
killed loses at most the items it was at. The last line of such a run may be torn; it is ignored.
The file is also the lock that keeps a second run off the same directory.
"""

from __future__ import annotations

import fcntl
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fastsd.zoo.plan import PlanItem
from fastsd.zoo.trees import LocalTree, is_remote
from fastsd.zoo.work import Outcome, checksum_files, list_target, stamp_files, to_json

MANIFEST_NAME = "fastsd-manifest.jsonl"
_VERSION = 1  # of the records


class LockedError(Exception):
    """Another run is writing to the same directory."""


class Manifest:
    """The records of a directory, which is locked for as long as this is open."""

    def __init__(self, out: str) -> None:
        """Raises LockedError, and OSError where there can be no such file."""
        os.makedirs(out, exist_ok=True)
        path = Path(out, MANIFEST_NAME)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise LockedError(f"{out}: another run is writing to it") from None
        text = path.read_bytes()
        self._is_torn = not text.endswith(b"\n") and bool(text)
        self._records = _parse(text)

    def __enter__(self) -> Manifest:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._descriptor)

    def is_done(self, item: PlanItem) -> bool:
        """Whether an earlier run has converted the same source with the same options, and what it
        wrote is still there.

        A file is the same if its size and time are, or else its size and checksum.
        """
        record = self._records.get(item.name, {})
        if record.get("outcome") != "done" or record.get("version") != _VERSION:
            return False
        if (record.get("planned_target"), record.get("options")) != (
            item.target,
            _as_json(item.options.to_json()),
        ):
            return False
        return _is_target_same(record) and _is_source_same(record, item)

    def append(self, item: PlanItem, outcome: Outcome) -> None:
        """Records an outcome; it is on the disk when this returns."""
        record = {
            "version": _VERSION,
            "name": item.name,
            "root": item.root,
            "pieces": [[p.name, p.nbytes, p.stamp] for p in item.pieces],
            "options": item.options.to_json(),
            "planned_target": item.target,
            "trusted": item.trusted,
            "fastsd": version("fastsd"),
            "torch": torch.__version__,
            **to_json(outcome),
        }
        line = b"\n" * self._is_torn + json.dumps(record).encode() + b"\n"
        while line:
            line = line[os.write(self._descriptor, line) :]
        os.fsync(self._descriptor)
        self._is_torn = False
        self._records[item.name] = record


def _parse(text: bytes) -> dict[str, dict[str, Any]]:
    """The last record of each item. What is no record, such as a torn line, is ignored."""
    records: dict[str, dict[str, Any]] = {}
    for line in text.split(b"\n"):
        try:
            record = json.loads(line)
            records[record["name"]] = record
        except (ValueError, LookupError, TypeError, RecursionError):
            continue
    return records


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _is_target_same(record: dict[str, Any]) -> bool:
    try:
        paths = list_target(Path(record["target"]))
        nbytes = sum(path.stat().st_size for path in paths)
        return (nbytes, " ".join(stamp_files(paths))) == (
            record["target_nbytes"],
            record["target_stamp"],
        )
    except (OSError, LookupError, TypeError):
        return False


def _is_source_same(record: dict[str, Any], item: PlanItem) -> bool:
    pieces = [[p.name, p.nbytes, p.stamp] for p in item.pieces]
    recorded = record.get("pieces")
    if record.get("root") == item.root and recorded == pieces:
        return all(p.stamp for p in item.pieces)
    try:
        sizes = [[name, nbytes] for name, nbytes, _ in recorded or []]
    except (ValueError, TypeError):
        return False
    if is_remote(item.root) or sizes != [[p.name, p.nbytes] for p in item.pieces]:
        return False
    tree = LocalTree(item.root)
    try:
        checksum = checksum_files([Path(tree.locate(p.name)) for p in item.pieces])
    except OSError:
        return False
    return checksum == record.get("source_crc32c")
