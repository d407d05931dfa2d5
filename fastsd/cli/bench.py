"""``fastsd bench``: how long files take to load here, beside other formats and libraries.

``--json`` prints a `fastsd.bench.Document`, field by field:

- ``machine``: texts by name, on hardware, system, drivers and versions;
- ``settings``: ``devices``, ``caches``, ``repeat``, ``seconds``, ``saves`` and ``contenders``;
- ``seconds``: how long it all took;
- ``models``: a list of ``name``, ``tensors``, ``nbytes``, ``dtypes``, ``file_system``, ``notes``
  and ``limits``, a list of ``name``, ``how`` and ``gb_per_s`` (10^9 bytes a second, or null);
- ``results``: a list of ``model``, ``work`` ("load" or "save"), ``contender``, ``format``,
  ``device``, ``cache`` ("warm", "cold" or, for saves, ""), ``status`` ("measured", "skipped" or
  "failed"), ``reason``, ``rounds`` (after the first), ``first``, ``call`` and ``ready`` (each
  ``p50``, ``p90`` and ``p99``; all in milliseconds), ``gb_per_s``, ``limit`` (the name of the one
  that binds), ``percent`` (of that) and ``notes``.
"""

from __future__ import annotations

import argparse
import errno
import json
import re
import shutil
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastsd.bench import Document, Settings, Synthetic, find_contenders, plot, report, run
from fastsd.bench.contenders import NAMES
from fastsd.bench.runner import CACHES, default_devices
from fastsd.cli import terminal
from fastsd.cli.convert import parse_size

if TYPE_CHECKING:
    from fastsd.cli.terminal import Commands

_FAILED = 1
_TERMINATED = 143
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_DEFAULT_BYTES = 1_000_000_000
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")
_EPILOG = f"""\
Every measurement is a process of its own, which loads once ("first") and then --repeat times. The
same weights are converted to the format that each contender reads, in a scratch folder beside the
file, or for made-up weights here; room for all formats is needed. A contender that is not
installed, or does not load to a device, is named with the reason.

contenders: {", ".join(NAMES)}.

Exit code: 0 if all went well, 1 if a contender failed, 2 if it could not start.

examples:
  fastsd bench model.safetensors
  fastsd bench --size 100MB,8GB --device cpu,cuda --save --seconds 300
  fastsd bench --size 1GB --tensors 20000 --dtype float32 --cache warm --contenders fastsd,torch
  fastsd bench model.fsd --work /mnt/nvme --json > here.json
"""


def add_parser(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "bench",
        parents=[common],
        help="measure loading here, beside other formats and libraries",
        description="Measures how long weights take to load, and to save, on this machine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("paths", nargs="*", type=Path, metavar="FILE", help="weights to load; default: made-up")
    add("--size", type=_sizes, metavar="SIZE,...", help="of made-up weights; default 1GB")
    add("--tensors", type=_count, default=300, metavar="N", help="that they have; default 300")
    add("--dtype", choices=_DTYPES, default="bfloat16", help="that they have; default bfloat16")
    add("--device", type=_devices, metavar="D,...", help="cpu, cuda, cuda:N; default a GPU if any")
    add("--cache", type=_caches, default=CACHES, metavar="C,...", help="default warm,cold")
    add("--contenders", type=_contenders, default=(), metavar="NAME,...", help="default all")
    add("--repeat", type=_count, default=10, metavar="N", help="loads after the first; default 10")
    add("--seconds", type=_count, metavar="S", help="fewer repeats, so that all ends about then")
    add("--save", action="store_true", help="measure saving, too: for how long the call blocks")
    add("--work", type=Path, metavar="DIR", help="where scratch folders are made")
    add("--output", action="append", default=[], type=_output, metavar="FILE.json|.md")
    add("--plot", type=_picture, metavar="FILE", help="draw a picture (.png, .svg, .pdf)")
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    _check(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))  # removes what it has made
    settings = Settings(
        devices=args.device or default_devices(),
        caches=args.cache,
        repeat=args.repeat,
        seconds=args.seconds,
        saves=args.save,
        contenders=find_contenders(args.contenders),
    )
    with terminal.Progress(args.progress) as progress:
        document = run(_list_sources(args), settings, args.work, progress.announce)
    if args.json:
        terminal.print_json(document.to_json())
    else:
        _print(document)
    _write(document, args.output, args.plot)
    return _FAILED if document.has_failed else 0


def _check(args: argparse.Namespace) -> None:
    """Raises what can be known before anything is measured."""
    if not args.json:
        terminal.check_tables()
    for path in args.paths:
        path.stat()
    for path in filter(None, [*args.output, args.plot]):
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(path.parent))
    if args.plot is not None and find_spec("matplotlib") is None:
        raise terminal.MissingPackageError("--plot needs matplotlib: pip install 'fastsd[bench]'")
    for device in args.device or ():
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise terminal.MissingPackageError(f"--device {device}: torch sees no GPU here")


def _list_sources(args: argparse.Namespace) -> list[Path | Synthetic]:
    sizes = args.size or ([] if args.paths else [_DEFAULT_BYTES])
    dtype = getattr(torch, args.dtype)
    made_up = [Synthetic(size, args.tensors, dtype) for size in sizes]
    return list(dict.fromkeys([*args.paths, *made_up]))


def _write(document: Document, outputs: list[Path], picture: Path | None) -> None:
    for path in outputs:
        if path.suffix == ".json":
            text = json.dumps(document.to_json(), indent=1, allow_nan=False) + "\n"
        else:
            text = report.build_markdown(document)
        path.write_text(text, encoding="utf-8")
    if picture is not None:
        plot.draw(document, picture)


def _print(document: Document) -> None:
    terminal.print_lines([report.describe_machine(document)])
    is_narrow = sys.stdout.isatty()
    for table in report.list_tables(document):
        terminal.print_lines(["", table.title])
        columns = shutil.get_terminal_size().columns
        _, names, rows = report.fit(table, columns) if is_narrow else table
        terminal.print_table(names, rows, right=report.NUMBERS, folding=report.FOLDING)
    terminal.print_lines()
    terminal.print_lines(report.list_remarks(document))


# ---- Arguments ----


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be a number, at least 1")
    return int(text)


def _sizes(text: str) -> list[int]:
    sizes = [parse_size(part) for part in text.split(",")]
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError("must be at least a byte")
    return sizes


def _devices(text: str) -> tuple[str, ...]:
    devices = []
    for part in text.split(","):
        if not _DEVICE.fullmatch(part):
            raise argparse.ArgumentTypeError("must be cpu, cuda or cuda:N, or several with commas")
        devices.append("cuda:0" if part == "cuda" else part)
    return tuple(dict.fromkeys(devices))


def _caches(text: str) -> tuple[str, ...]:
    parts = tuple(dict.fromkeys(text.split(",")))
    if not set(parts) <= set(CACHES):
        raise argparse.ArgumentTypeError("must be warm, cold or warm,cold")
    return parts


def _contenders(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    try:
        find_contenders(names)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return names


def _output(text: str) -> Path:
    return _path_of(text, ".json", ".md")


def _picture(text: str) -> Path:
    return _path_of(text, ".png", ".svg", ".pdf")


def _path_of(text: str, *suffixes: str) -> Path:
    path = Path(text)
    if path.suffix not in suffixes:
        *most, last = suffixes
        raise argparse.ArgumentTypeError(f"must end in {', '.join(most)} or {last}")
    return path
