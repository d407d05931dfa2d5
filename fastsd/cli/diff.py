"""``fastsd diff``: two files compared.

``--json`` prints an object of ``equal``, whether they are, within the tolerance; ``path_a``,
``path_b``; ``only_a``, ``only_b`` and ``different``, lists of names; and ``tensors``, a list of
`fastsd.diff.TensorDiff`, field by field, of all that both files have: ``name``, ``shape_a``,
``shape_b``, ``dtype_a``, ``dtype_b``, ``elements``, ``bit_identical``, ``compared_as``,
``differing``, ``outside``, ``nonfinite``, ``max_abs`` and ``mean_abs``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from fastsd.cli import terminal
from fastsd.diff import Diff, TensorDiff, compare

if TYPE_CHECKING:
    from fastsd.cli.terminal import Commands

_SHOWN_MAX = 50
_EPILOG = """\
Tensors alone are compared, by name; plain values and metadata are not. Dtypes may differ: values
are promoted, exactly but for integers beyond 2**53 beside floating point. NaN equals NaN. Exit
code: 0 if the files are equal, within the tolerance, 1 if they differ, 2 if that cannot be told.

examples:
  fastsd diff old.fsd new.fsd
  fastsd diff model.fsd cast.safetensors --ignore-dtypes --rtol 1e-2
  fastsd diff model.fsd wrapped.fsd --strip-prefix module.
"""


def add_parser(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "diff",
        parents=[common],
        help="compare the tensors of two files",
        description="Compares the tensors of two files, whatever their formats.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    for name in ("--rtol", "--atol"):
        parser.add_argument(name, type=_tolerance, default=0.0, metavar="X", help=_TOLERANCE)
    parser.add_argument(
        "--ignore-dtypes", action="store_true", help="dtypes may differ where values do not"
    )
    parser.add_argument(
        "--rename",
        action="append",
        dest="renamings",
        default=[],
        type=_renaming,
        metavar="OLD=NEW",
        help="replace the leading part OLD of names, in both files",
    )
    parser.add_argument(
        "--strip-prefix",
        action="append",
        dest="renamings",
        type=lambda prefix: (prefix, ""),
        metavar="P",
        help="take P off names that start with it, in both files",
    )
    parser.add_argument("--all", action="store_true", help="show all tensors, equal ones, too")
    parser.set_defaults(run=run)


_TOLERANCE = "equal is what has abs(a - b) <= atol + rtol * abs(b)"


def _tolerance(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError("must be a finite number, not below 0")
    return value


def _renaming(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError("must be OLD=NEW")
    return old, new


def _rename(renamings: Sequence[tuple[str, str]], name: str) -> str:
    """The name after one renaming after another, in the order in which they were given."""
    for old, new in renamings:
        if name.startswith(old):
            name = new + name[len(old) :]
    return name


def run(args: argparse.Namespace) -> int:
    with terminal.Progress(args.progress) as progress:
        found = compare(
            args.a,
            args.b,
            rename=partial(_rename, args.renamings) if args.renamings else None,
            rtol=args.rtol,
            atol=args.atol,
            ignore_dtypes=args.ignore_dtypes,
            on_progress=progress,
        )
    if args.json:
        terminal.print_json({"equal": found.is_equal, **asdict(found)})
    else:
        _print(found, args.all)
    return int(not found.is_equal)


def _print(found: Diff, all_: bool) -> None:
    shown_max = None if all_ else _SHOWN_MAX
    for path, names in ((found.path_a, found.only_a), (found.path_b, found.only_b)):
        if names:
            count = terminal.format_count(len(names), "tensor")
            terminal.print_lines([f"only in {terminal.clean(path)}: {count}"])
            terminal.print_lines(f"  {terminal.clean(name)}" for name in names[:shown_max])
            _print_rest(len(names), shown_max)
            terminal.print_lines()
    notable = [t for t in found.tensors if all_ or not t.bit_identical]
    if notable:
        terminal.print_table(
            ("tensor", "dtype", "shape", "differing", "max", "mean", "compared"),
            (_describe(tensor) for tensor in notable[:shown_max]),
            right=("differing", "max", "mean"),
        )
        _print_rest(len(notable), shown_max)
        terminal.print_lines()
    terminal.print_lines([_summarize(found)])


def _print_rest(count: int, shown_max: int | None) -> None:
    if shown_max is not None and count > shown_max:
        terminal.print_lines([f"  and {count - shown_max:,} more (--all shows them)"])


def _describe(tensor: TensorDiff) -> list[str]:
    dtype = _both(tensor.dtype_a, tensor.dtype_b)
    shape = _both(terminal.format_shape(tensor.shape_a), terminal.format_shape(tensor.shape_b))
    differing = "" if tensor.differing is None else f"{tensor.differing:,}"
    how = f"as {tensor.compared_as}" if tensor.compared_as else "values not compared"
    if tensor.bit_identical:
        how = "identical"
    elif tensor.differing == 0:
        how += ", equal" if tensor.dtype_a != tensor.dtype_b else ", equal, not the same bits"
    elif tensor.outside == 0:
        how += ", within tolerance"
    if tensor.nonfinite:
        how += f", {tensor.nonfinite:,} by NaN or infinity"
    return [
        tensor.name,
        dtype,
        shape,
        differing,
        _number(tensor.max_abs),
        _number(tensor.mean_abs),
        how,
    ]


def _both(a: str, b: str) -> str:
    return a if a == b else f"{a} / {b}"


def _number(value: int | float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _summarize(found: Diff) -> str:
    identical = sum(tensor.bit_identical for tensor in found.tensors)
    parts = [
        f"{terminal.format_count(len(found.tensors), 'tensor')} in both",
        f"{identical:,} bit-identical",
        f"{len(found.different):,} different",
    ]
    if found.only_a or found.only_b:
        parts.append(f"{len(found.only_a) + len(found.only_b):,} in one alone")
    return f"{'equal' if found.is_equal else 'different'}: {', '.join(parts)}"
