"""``fastsd inspect``: what is in files.

``--json`` prints an object of

- ``files``: a list of `fastsd.summary.Summary`, field by field: ``path``, ``format``,
  ``version``, ``file_bytes``, ``storages``, ``storage_bytes``, ``checksummed``, ``metadata``,
  ``unsafe_globals``, ``pickle_problem``; ``total``, and by name ``by_dtype`` and ``by_prefix``,
  each of ``tensors`` and ``nbytes``; and ``tensors``, a list of `fastsd.summary.TensorSummary`:
  ``name``, ``dtype``, ``shape``, ``stride``, ``is_contiguous``, ``nbytes``, ``storage``,
  ``shares_with``, ``is_tied``, ``device``, ``requires_grad`` and ``crc32c``;
- ``errors``: a list of ``path`` and ``error``, for files that could not be read.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from fastsd.cli import terminal
from fastsd.cli.outline import build, walk
from fastsd.summary import Summary, TensorSummary, Total, summarize

if TYPE_CHECKING:
    from fastsd.cli.terminal import Commands

_TROUBLE = 2
_SHOWN_PREFIXES_MAX = 20
_COLUMNS = ("name", "dtype", "shape", "size", "notes")
_EPILOG = """\
By default names are shown as an outline, in which numbered parts with the same tensors in them are
one line: "0..31" with "x32". Exit code: 0, or 2 if a file could not be read.

examples:
  fastsd inspect model.fsd
  fastsd inspect --flat model.fsd | grep bias
  fastsd inspect --json *.fsd > summary.json
"""


def add_parser(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "inspect",
        parents=[common],
        help="show names, dtypes, shapes, sizes, sharing and totals",
        description="Shows what is in files, without reading tensors.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", metavar="PATH")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--flat", action="store_true", help="a table of full names")
    form.add_argument("--all", action="store_true", help="the outline with nothing folded")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    documents = []
    errors = []
    for path in args.paths:
        try:
            summary = summarize(path)
        except Exception as error:
            if args.debug:
                raise
            terminal.print_error(error, path)
            errors.append({"path": path, "error": terminal.describe_error(error)})
            continue
        if args.json:
            documents.append(asdict(summary))
        else:
            _print(summary, _flat_rows(summary) if args.flat else _tree_rows(summary, args.all))
    if args.json:
        terminal.print_json({"files": documents, "errors": errors})
    return _TROUBLE if errors else 0


def _print(summary: Summary, rows: Iterable[list[str]]) -> None:
    terminal.print_lines([_describe_file(summary)])
    if summary.tensors:
        terminal.print_lines()
        terminal.print_table(_COLUMNS, rows, right=("size",))
        _print_totals("dtype", summary.by_dtype)
        _print_totals("prefix", summary.by_prefix)
    terminal.print_mapping("metadata", summary.metadata)
    if summary.unsafe_globals:
        terminal.print_lines(["", "to load it, weights_only=True would have to allow"])
        terminal.print_lines(f"  {terminal.clean(name)}" for name in summary.unsafe_globals)
    if summary.pickle_problem:
        terminal.print_lines(["", f"its pickle cannot be read: {summary.pickle_problem}"])
    terminal.print_lines()


def _describe_file(summary: Summary) -> str:
    size = "" if summary.file_bytes is None else f", {terminal.format_bytes(summary.file_bytes)}"
    version = f" {summary.version}" if summary.version else ""
    with_checksums = "no checksums"
    if summary.checksummed == summary.storages:
        with_checksums = "checksums"
    elif summary.checksummed:
        with_checksums = f"checksums of {summary.checksummed:,}"
    return (
        f"{summary.path}: {summary.format}{version}{size}, "
        f"{terminal.format_count(summary.total.tensors, 'tensor')} of "
        f"{terminal.format_bytes(summary.total.nbytes)} in "
        f"{terminal.format_count(summary.storages, 'storage')}, {with_checksums}"
    )


def _flat_rows(summary: Summary) -> Iterator[list[str]]:
    return ([tensor.name, *_describe(tensor)] for tensor in summary.tensors)


def _tree_rows(summary: Summary, all_: bool) -> Iterator[list[str]]:
    for depth, node in walk(build(summary.tensors, fold=not all_)):
        label = "  " * depth + terminal.clean(node.label)
        label += f" x{node.count}" if node.count > 1 else ""
        if node.tensor is not None:
            yield [label, *_describe(node.tensor)]
        else:
            tensors, nbytes = node.measure()
            count = terminal.format_count(tensors, "tensor")
            yield [label, "", "", terminal.format_bytes(nbytes), count]


def _describe(tensor: TensorSummary) -> list[str]:
    """All columns but the name."""
    notes = []
    if tensor.shares_with is not None:
        how = "tied with" if tensor.is_tied else "shares memory with"
        notes.append(f"{how} {terminal.clean(tensor.shares_with)}")
    if not tensor.is_contiguous:
        notes.append(f"stride {terminal.format_shape(tensor.stride)}")
    if tensor.device != "cpu":
        notes.append(f"from {tensor.device}")
    if tensor.requires_grad:
        notes.append("requires grad")
    size = terminal.format_bytes(tensor.nbytes)
    return [tensor.dtype, terminal.format_shape(tensor.shape), size, ", ".join(notes)]


def _print_totals(title: str, totals: dict[str, Total]) -> None:
    terminal.print_lines()
    shown = list(totals.items())[:_SHOWN_PREFIXES_MAX]
    rows = [
        [name or "(none)", f"{total.tensors:,}", terminal.format_bytes(total.nbytes)]
        for name, total in shown
    ]
    if len(totals) > len(shown):
        rows.append([f"and {len(totals) - len(shown):,} more", "", ""])
    terminal.print_table((title, "tensors", "size"), rows, right=("tensors", "size"))
