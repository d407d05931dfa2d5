"""``fastsd verify``: files and trees, checked.

``--json`` prints an object of

- ``files``: a list of `fastsd.integrity.FileCheck`, field by field: ``path``, ``status`` ("good",
  "damaged", "unreadable" or "skipped"), ``file_bytes``, ``format``, ``tensors``, ``checked_bytes``,
  ``unchecked`` (names), ``damaged`` (names) and ``error``;
- ``totals``: ``good``, ``damaged``, ``unreadable`` and ``skipped`` files, ``checked_bytes``, and
  ``unchecked_tensors``.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from fastsd.cli import terminal
from fastsd.integrity import FileCheck, verify_file, verify_tree

if TYPE_CHECKING:
    from fastsd.cli.terminal import Commands

_STATUSES = ("good", "damaged", "unreadable", "skipped")
_EPILOG = """\
Below a directory every file of a known format counts, known by its content; others are
skipped, and named. Exit code: 0 if all is good, 1 if something is damaged or cannot be read,
2 if it could not start.

example:
  fastsd verify checkpoints/ model.fsd
"""


def add_parser(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "verify",
        parents=[common],
        help="check structure and checksums of files and trees",
        description="Checks the structure of files, and the checksums that they have.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a file, or a directory of some")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for path in args.paths:
        os.stat(path)  # what is not there is said before anything is done
    checks: list[FileCheck] = []
    nbytes = 0
    with terminal.Progress(args.progress) as progress:
        for check in itertools.chain.from_iterable(_verify(path) for path in args.paths):
            checks.append(check)
            nbytes += check.checked_bytes
            progress.say(f"{len(checks):,} files, {terminal.format_bytes(nbytes)} checked")
    if args.json:
        terminal.print_json(
            {"files": [asdict(check) for check in checks], "totals": _count(checks)}
        )
    else:
        _print(checks)
    for check in checks:
        if check.is_bad:
            terminal.print_error(str(check.error), check.path)
    return int(any(check.is_bad for check in checks))


def _verify(path: str) -> Iterator[FileCheck]:
    return verify_tree(path) if os.path.isdir(path) else iter([verify_file(path)])


def _count(checks: list[FileCheck]) -> dict[str, int]:
    totals = {status: sum(check.status == status for check in checks) for status in _STATUSES}
    totals["checked_bytes"] = sum(check.checked_bytes for check in checks)
    totals["unchecked_tensors"] = sum(len(check.unchecked) for check in checks)
    return totals


def _print(checks: list[FileCheck]) -> None:
    terminal.print_table(
        ("file", "format", "tensors", "checked", "result"),
        ([check.path, *_describe(check)] for check in checks),
        right=("tensors", "checked"),
    )
    totals = _count(checks)
    parts = [f"{totals[status]:,} {status}" for status in _STATUSES if totals[status]]
    size = terminal.format_bytes(totals["checked_bytes"])
    line = f"{', '.join(parts) or 'no files'}; {size} agree with their checksums"
    if unchecked := totals["unchecked_tensors"]:
        line += f"; {terminal.format_count(unchecked, 'tensor')} have none: structure only"
    terminal.print_lines(["", line])


def _describe(check: FileCheck) -> list[str]:
    """All columns but the path."""
    if check.format is None:
        return ["", "", "", f"{check.status}: {check.error}"]
    size = terminal.format_bytes(check.checked_bytes) if check.checked_bytes else ""
    result: str = check.status
    if check.error:
        result += f": {check.error}"
    elif check.unchecked and not check.checked_bytes:
        result += ", structure only: it has no checksums"
    elif check.unchecked:
        result += f", structure only of {terminal.format_count(len(check.unchecked), 'tensor')}"
    return [check.format, f"{check.tensors:,}", size, result]
