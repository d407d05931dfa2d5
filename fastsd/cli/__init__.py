"""The command line: parses arguments and prints; what is done is done by the modules below.

A subcommand is a module here with two functions: ``add_parser(commands, common)`` adds its
arguments and names ``run(args) -> exit code`` as what runs it. Results go to stdout, errors and
progress to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from fastsd import __version__
from fastsd.cli import bench, convert, diff, inspect, terminal, verify

# In the order of `fastsd --help`.
_COMMANDS = (inspect, convert, verify, diff, bench)

_TROUBLE = 2
_INTERRUPTED = 130
_BROKEN_PIPE = 141  # as of a program that the signal has ended


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line, by default that of the process; returns the exit code."""
    try:
        args = _make_parser().parse_args(argv)
    except SystemExit as end:  # --help, --version, or usage that argparse has explained
        return end.code if isinstance(end.code, int) else _TROUBLE
    try:
        terminal.prepare()
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # What is still in the buffer would break the pipe again when Python ends.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return _BROKEN_PIPE
    except KeyboardInterrupt:
        return _INTERRUPTED
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        terminal.print_error(error)
        return _TROUBLE


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastsd",
        description="Looks into, converts, checks, compares and times files of PyTorch weights.",
    )
    parser.add_argument("--version", action="version", version=f"fastsd {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON document")
    common.add_argument(
        "--progress", action="store_true", help="show progress even if stderr is no terminal"
    )
    common.add_argument("--debug", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands, common)
    return parser
