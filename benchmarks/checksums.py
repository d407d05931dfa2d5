"""What checksums cost: a save with them against one without, and how quickly files are verified.

Medians of rounds in which all take turns, warm. Beside them what the machine does: a read of all
bytes, which is the most that verification could reach.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fastsd
from fastsd import _core
from places import find_places

STEP_BYTES = 4 << 20


def read_all(path: Path) -> None:
    """Read a file from the page cache into one buffer, over and over."""
    step = bytearray(STEP_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(step):
            pass


def measure(folder: Path, state: dict[str, torch.Tensor], rounds: int) -> dict[str, float]:
    """Return the median seconds of each piece of work."""
    with_checksums, without = folder / "with.fsd", folder / "without.fsd"
    whole = next(iter(state.values())).untyped_storage()
    memory = torch.empty(0, dtype=torch.uint8).set_(whole).numpy()
    work: dict[str, Callable[[], object]] = {
        "save without": lambda: fastsd.save(state, without, checksum=False),
        "save with": lambda: fastsd.save(state, with_checksums),
        "verify": lambda: fastsd.open(with_checksums).verify(),
        "read, one thread": lambda: read_all(with_checksums),
        "checksum, one thread": lambda: _core.crc32c(memory),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            if number > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> int:
    """Measure in each place and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    nbytes = options.mib << 20
    base = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    state = {f"layers.{i}.weight": part for i, part in enumerate(base.chunk(100))}
    for place in find_places():
        with tempfile.TemporaryDirectory(prefix="fastsd-checksums-", dir=place.path) as folder:
            medians = measure(Path(folder), state, options.rounds)
        print(f"{place.label}, {options.mib} MiB, {len(os.sched_getaffinity(0))} processors")
        for name, median in medians.items():
            print(f"  {name:<22} {median * 1e3:8.1f} ms {nbytes / median / 1e9:7.2f} GB/s")
        cost = medians["save with"] / medians["save without"] - 1
        print(f"  checksums cost {100 * cost:+.1f} % of a save")
    return 0


if __name__ == "__main__":
    sys.exit(main())
