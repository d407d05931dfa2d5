"""``fastsd convert``: one file, or a whole zoo of them.

``--json`` prints an object of ``items``. With ``--dry-run`` these are the plan: ``name``,
``target``, ``form``, ``nbytes``, ``memory``, ``note`` and ``problem``; beside them are ``others``
and ``others_nbytes``, of files that are left alone, and ``refused``, reasons by name. Otherwise
the items are what became of it: ``name``, ``outcome`` ("done", "skipped" or "failed"), ``reason``,
``wanted`` (globals that need trust), ``note``, ``source_crc32c``, ``target``, ``target_nbytes``,
``target_stamp``, ``target_crc32c``, ``seconds``, ``layout``, ``picked``, ``dropped``, ``tensors``
and ``verified``. For one file it is a `fastsd.convert.Report`, field by field.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastsd.cli import terminal
from fastsd.cli.progress import make_progress
from fastsd.convert import Report, convert, size_of
from fastsd.zoo import (
    Engine,
    Options,
    Outcome,
    Plan,
    PoolEngine,
    RayEngine,
    StartError,
    Summary,
    plan_zoo,
    run_plan,
)
from fastsd.zoo.plan import FORMATS
from fastsd.zoo.trees import is_remote
from fastsd.zoo.work import explain

if TYPE_CHECKING:
    from fastsd.cli.terminal import Commands

_FAILED = 1
_TROUBLE = 2
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_FILE_SUFFIXES = (".fsd", ".pth", ".pt", ".safetensors")
_EPILOG = """\
A directory or URL is a zoo, of which all checkpoints are converted into the directory TARGET; but a
directory is one checkpoint, sharded or of torch.distributed.checkpoint, if TARGET ends in
.fsd, .pth, .pt or .safetensors. A zoo that was converted before is gone through again, and what is
done is skipped, as TARGET/fastsd-manifest.jsonl says. Exit code: 0 if all is well, 1 if something
failed, 2 if it could not start.

examples:
  fastsd convert model.pth model.fsd
  fastsd convert zoo/ fast/ --to fsd --jobs 8 --dry-run
  fastsd convert s3://bucket/zoo fast/ --to fsd --disk 100GB --verify
"""


def add_parser(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "convert",
        parents=[common],
        help="convert a file, or a whole zoo",
        description="Converts files from any format that is read to any that is written.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("target", metavar="TARGET")
    _add_options(parser)
    _add_zoo_options(parser)
    parser.set_defaults(run=run)


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--to", choices=FORMATS, help="the format; by default as TARGET ends, of a zoo fsd")
    add("--pick", metavar="KEY", help="take what stands under this key; auto finds the weights")
    add("--strip-prefix", metavar="P", help="take P off names that start with it")
    add("--dtype", choices=_DTYPES, help="cast floating point tensors")
    add("--drop-optimizer", action="store_true", help="leave out the state of optimizers")
    add("--metadata", action="append", type=_entry, metavar="KEY=VALUE", help="strings to keep")
    add("--max-shard-size", type=parse_size, metavar="SIZE", help="write shards of at most SIZE")
    add("--lossy", action="store_true", help="leave out what the format cannot hold, and say so")
    add("--verify", action="store_true", help="load both sides again and compare every tensor")
    add("--trust", action="store_true", help="unpickle anything: files may run any code")


def _add_zoo_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("zoos").add_argument
    add("--dry-run", action="store_true", help="print the plan and its bytes, and do nothing")
    add("--jobs", type=_count, metavar="N", help="processes; by default one for each processor")
    add("--memory", type=parse_size, metavar="SIZE", help="all processes together; default 80%%")
    add("--disk", type=parse_size, metavar="SIZE", help="for what is fetched; default 50%%")
    add("--keep-suffix", action="store_true", help="x.pth becomes x.pth.fsd, not x.fsd")
    add("--engine", choices=("processes", "ray"), default="processes")
    add("--address", metavar="A", help="of the Ray cluster; a local one by default")
    add("--all", action="store_true", help="list all files in the end, not only what failed")


def _entry(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError("must be KEY=VALUE")
    return key, value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be a number, at least 1")
    return int(text)


def parse_size(text: str) -> int:
    """Bytes: "1000", "5GB" (powers of 1000) or "5GiB" (powers of 1024)."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError("must be a size, such as 500MB, 4GB or 4GiB")
    number, unit, is_binary = match.groups()
    power = " kmgt".index(unit.lower() or " ")
    return int(float(number) * (1024 if is_binary else 1000) ** power)


def run(args: argparse.Namespace) -> int:
    is_one = os.path.isfile(args.source) or args.target.endswith(_FILE_SUFFIXES)
    return _run_file(args) if is_one and not is_remote(args.source) else _run_zoo(args)


# ---- One file ----


def _run_file(args: argparse.Namespace) -> int:
    source = Path(args.source)
    source.stat()  # what is not there is said before anything is done
    target = args.target
    if os.path.isdir(target):
        target = os.path.join(target, f"{source.stem}.{args.to or FORMATS[0]}")
    start = time.monotonic()
    nbytes, done = size_of(args.source), 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        show(done, max(done, nbytes))

    with terminal.Progress(args.progress) as show:
        try:
            report = convert(
                source,
                target,
                to=args.to,
                pick=args.pick,
                strip_prefix=args.strip_prefix,
                dtype=args.dtype and getattr(torch, args.dtype),
                drop_optimizer=args.drop_optimizer,
                metadata=dict(args.metadata) if args.metadata else None,
                max_shard_size=args.max_shard_size,
                trust=args.trust,
                verify=args.verify,
                lossy=args.lossy,
                progress=advance,
            )
        except Exception as error:
            if args.debug:
                raise
            hint = "" if args.trust else "; --trust allows it"
            reason, wanted = explain(error, source, args.trust)
            terminal.print_error(reason + hint * bool(wanted), str(source))
            return _FAILED
    if args.json:
        terminal.print_json(asdict(report))
    else:
        _print_report(report, time.monotonic() - start)
    return 0


def _print_report(report: Report, seconds: float) -> None:
    rate = int(report.source_nbytes / max(seconds, 1e-3))
    parts = [
        terminal.format_count(report.tensors, "tensor"),
        f"{terminal.format_bytes(report.target_nbytes)} at {terminal.format_bytes(rate)}/s",
    ]
    if report.picked is not None:
        parts.append(f"{report.picked!r} of a checkpoint ({report.layout})")
    if report.verified:
        parts.append("verified")
    terminal.print_lines([f"{terminal.clean(report.target, None)}: {', '.join(parts)}"])
    terminal.print_lines(f"  dropped: {terminal.clean(key)}" for key in report.dropped)


# ---- Zoos ----


def _run_zoo(args: argparse.Namespace) -> int:
    try:
        plan = plan_zoo(args.source, args.target, _make_options(args))
    except Exception as error:  # a file system at the other end of a network can raise anything
        if args.debug:
            raise
        terminal.print_error(error, args.source)
        return _TROUBLE
    if args.dry_run:
        _print_json_plan(plan) if args.json else _print_plan(plan)
        return int(any(item.problem for item in plan.items))
    for name, reason in plan.refused.items():
        terminal.print_error(reason, name)
    try:
        with make_progress(is_quiet=args.json and not args.progress) as progress:
            summary = run_plan(plan, _make_engine(args), progress)
    except (StartError, ImportError) as error:
        terminal.print_error(str(error))
        return _TROUBLE
    if args.json:
        terminal.print_json({"items": summary.to_json()})
    else:
        _print_summary(plan, summary, args.all)
    return summary.exit_code


def _make_options(args: argparse.Namespace) -> Options:
    return Options(
        to=args.to or FORMATS[0],
        pick=args.pick,
        strip_prefix=args.strip_prefix,
        dtype=args.dtype,
        drop_optimizer=args.drop_optimizer,
        metadata=dict(args.metadata) if args.metadata else None,
        max_shard_size=args.max_shard_size,
        lossy=args.lossy,
        verify=args.verify,
        trust=args.trust,
        keep_suffix=args.keep_suffix,
    )


def _make_engine(args: argparse.Namespace) -> Engine:
    if args.engine == "ray":
        return RayEngine(args.address, args.jobs)
    disk = args.disk
    if disk is None and is_remote(args.source):
        out = Path(args.target).absolute()
        place = next(path for path in (out, *out.parents) if path.exists())
        disk = shutil.disk_usage(place).free // 2
    return PoolEngine(args.jobs, args.memory, disk)


def _print_json_plan(plan: Plan) -> None:
    keys = ("name", "target", "nbytes", "memory", "note", "problem")
    items = [
        {"form": item.form.value, **{k: getattr(item, k) for k in keys}} for item in plan.items
    ]
    terminal.print_json(
        {
            "items": items,
            "others": plan.others,
            "others_nbytes": plan.others_nbytes,
            "refused": plan.refused,
        }
    )


def _print_plan(plan: Plan) -> None:
    out = Path(plan.out)
    rows = (
        [
            item.name,
            item.form.value,
            terminal.format_bytes(item.nbytes),
            str(Path(item.target).relative_to(out)),
            item.problem or item.note,
        ]
        for item in plan.items
    )
    terminal.print_table(("source", "form", "size", "target", "remark"), rows, right=("size",))
    size = terminal.format_bytes(plan.nbytes)
    others = terminal.format_bytes(plan.others_nbytes)
    terminal.print_lines(
        [
            "",
            f"{terminal.format_count(len(plan.items), 'checkpoint')}, {size}, into {plan.out}",
            f"{terminal.format_count(plan.others, 'other file')}, {others}: left alone",
            *(f"left out: {name}: {reason}" for name, reason in plan.refused.items()),
        ]
    )


def _print_summary(plan: Plan, summary: Summary, all_: bool) -> None:
    sizes = {item.name: item.nbytes for item in plan.items}
    shown = [o for o in summary.outcomes if all_ or o.status == "failed" or o.note]
    if shown:
        terminal.print_table(
            ("file", "size", "result", "remark"),
            ([o.name, terminal.format_bytes(sizes[o.name]), o.status, _remark(o)] for o in shown),
            right=("size",),
        )
        terminal.print_lines()
    rows = []
    for status in ("done", "skipped", "failed"):
        outcomes = summary.select(status)
        nbytes = sum(sizes[outcome.name] for outcome in outcomes)
        rows.append([status, f"{len(outcomes):,}", terminal.format_bytes(nbytes)])
    terminal.print_table(("result", "files", "size"), rows, right=("files", "size"))
    wants_trust = sum(outcome.wants_trust for outcome in summary.select("failed"))
    if wants_trust and not plan.options.trust:
        files = terminal.format_count(wants_trust, "file")
        sys.stderr.write(f"fastsd: {files} would need --trust, which lets them run any code\n")


def _remark(outcome: Outcome) -> str:
    if outcome.reason:
        return outcome.reason
    picked = ""
    if outcome.report is not None and outcome.report.picked is not None:
        picked = f"{outcome.report.picked!r} of a checkpoint ({outcome.report.layout})"
    return "; ".join(filter(None, (picked, outcome.note)))
