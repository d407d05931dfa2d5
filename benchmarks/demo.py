"""Save and load real models with fastsd, prove every bit, and time it beside the usual ways.

For each model this saves ``model.state_dict()``, has a second process load the file into a
freshly made model with strict checking, compares the SHA-256 of every tensor, and prints what
each way took. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastsd
from demo_check import probe_model
from measure import count_bytes, digest_tensor, drop_tied, start_afresh, touch
from models import SOURCES
from places import file_system, free_bytes

CHECK = Path(__file__).with_name("demo_check.py")
ROOM_BYTES = 2_500_000_000  # the larger model in three formats, and some to spare
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Way:
    """One way to save and load; ``save`` is None where another way's file is loaded again."""

    name: str
    file: str
    save: Callable[[State, Path], object] | None
    load: Callable[[Path], State]


WAYS = (
    Way("fastsd", "model.fsd", fastsd.save, fastsd.load),
    Way("torch", "model.pt", torch.save, torch.load),
    Way("torch, mmap=True", "model.pt", None, lambda path: torch.load(path, mmap=True)),
    Way("safetensors", "model.safetensors", lambda s, p: save_file(drop_tied(s), p), load_file),
)


@contextmanager
def announce(text: str) -> Iterator[None]:
    """Show what is going on while it goes on; on a terminal the line is wiped afterwards."""
    live = sys.stderr.isatty()
    sys.stdout.flush()
    print(f"... {text}", file=sys.stderr, end="" if live else "\n", flush=True)
    try:
        yield
    finally:
        if live:
            print("\r\x1b[K", file=sys.stderr, end="", flush=True)


def time_median(action: Callable[[], object], prepare: Callable[[], object], rounds: int) -> float:
    """Return the median seconds of ``action``; preparing and freeing results is not timed."""
    seconds = []
    for _ in range(rounds + 1):  # the first one warms up
        prepare()
        start_afresh()
        start = time.perf_counter()
        result = action()
        seconds.append(time.perf_counter() - start)
        del result
    return statistics.median(seconds[1:])


def load_and_touch(way: Way, path: Path) -> State:
    """Load and read every byte, so that a lazy loader has done its work, too."""
    state = way.load(path)
    touch(state.values())
    return state


def time_way(way: Way, state: State, folder: Path, rounds: int) -> list[str]:
    """Measure one way and return its row of the table."""
    path, size = folder / way.file, count_bytes(state.values())
    row = [way.name, "", ""]
    if save := way.save:
        seconds = time_median(
            lambda: save(state, path), lambda: path.unlink(missing_ok=True), rounds
        )
        row[1:] = [f"{seconds * 1e3:.1f}", f"{size / seconds / 1e9:.2f}"]
    call = time_median(lambda: way.load(path), lambda: None, rounds)
    whole = time_median(lambda: load_and_touch(way, path), lambda: None, rounds)
    row += [f"{call * 1e3:.2f}", f"{whole * 1e3:.1f}", f"{size / whole / 1e9:.2f}"]
    return [*row, f"{path.stat().st_size / 1e6:.2f}"]


def print_table(rows: list[list[str]]) -> None:
    """Print rows under the two lines of headings, numbers to the right."""
    above = ["", "save", "", "load call", "load, read all", "", "file"]
    below = ["", "ms", "GB/s", "ms", "ms", "GB/s", "MB"]
    table = [above, below, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(below))]
    for row in table:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([f"  {row[0]:<{widths[0]}}", *cells]))
    print()


def check_elsewhere(name: str, model: torch.nn.Module, path: Path) -> bool:
    """Let a second process load the file into a fresh model; say and return whether all agrees."""
    state = model.state_dict()
    question = {
        "model": name,
        "path": str(path),
        "digests": {key: digest_tensor(tensor) for key, tensor in state.items()},
        "probe": probe_model(model),
    }
    done = subprocess.run(
        [sys.executable, str(CHECK)],
        input=json.dumps(question),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        print(f"  NOT CHECKED: the second process ended with status {done.returncode}")
        return False
    answer: dict[str, Any] = json.loads(done.stdout)
    ms = answer["seconds"] * 1e3
    rate = count_bytes(state.values()) / ms / 1e6
    print("  In a second process, into a freshly made model:")
    print(f"    fastsd.load_into(model, path, strict=True)   {ms:.1f} ms, {rate:.2f} GB/s")
    for finding in answer["findings"]:
        print(f"    {'ok  ' if finding['good'] else 'BAD '} {finding['text']}")
    print()
    return all(finding["good"] for finding in answer["findings"])


def show_model(name: str, folder: Path, rounds: int) -> bool:
    """Demonstrate one model; return whether the second process found everything identical."""
    with announce(f"making {name}"):
        model = SOURCES[name]()
    state = model.state_dict()
    size = count_bytes(state.values())
    print(f"{name}: {len(state)} tensors, {size / 1e6:.1f} MB\n")
    rows = []
    for way in WAYS:
        with announce(f"{name}: {way.name}, {rounds} rounds"):
            rows.append(time_way(way, state, folder, rounds))
    print_table(rows)
    with announce(f"{name}: loading in a second process, comparing SHA-256"):
        good = check_elsewhere(name, model, folder / WAYS[0].file)
    for path in folder.iterdir():
        path.unlink()
    return good


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="measurements per figure")
    parser.add_argument(
        "--dir",
        default=os.environ.get("FASTSD_BENCH_DIR"),
        help="where the files go meanwhile (default: the usual place for temporary files)",
    )
    return parser.parse_args()


def main() -> int:
    """Demonstrate every model in a directory that is gone afterwards."""
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="fastsd-demo-", dir=options.dir) as name:
        folder = Path(name)
        if free_bytes(folder) < ROOM_BYTES:
            print(f"The demonstration needs {ROOM_BYTES / 1e9:.1f} GB of room; see --dir.")
            return 2
        print(
            f"fastsd {fastsd.__version__}, torch {torch.__version__}, {torch.get_num_threads()} "
            f"threads, {file_system(folder)}, warm page cache, medians of {options.rounds}\n"
        )
        good = [show_model(model, folder, options.rounds) for model in SOURCES]
    print("Every tensor is bit-identical." if all(good) else "FAILED: see the lines marked BAD.")
    return 0 if all(good) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nStopped; the temporary files are gone.", file=sys.stderr)
        sys.exit(130)
