"""Run the benchmarks, print one table, keep the JSON and draw one picture."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any

from picture import draw_picture
from places import (
    DISK_VARIABLE,
    HERE,
    MEMORY_VARIABLE,
    WORK,
    available_memory_bytes,
    find_places,
    free_bytes,
)
from report import ROWS, Results, build_markdown, build_text, merge_laps

RESULTS = HERE / "results"
# The large dictionary in three formats in a place, and a file being written.
ROOM_BYTES, ROOM_QUICK_BYTES = 6_000_000_000, 400_000_000
# Dictionary, model, copy, and, on tmpfs, the files.
MEMORY_BYTES, MEMORY_QUICK_BYTES = 9_000_000_000, 1_500_000_000


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, few rounds: does everything run?"
    )
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        help='measure a part, as in pytest -k: "load_call", "save and tmpfs and big"',
    )
    parser.add_argument(
        "--dir", help=f"directory on the disk to measure (default: {DISK_VARIABLE}, or .work here)"
    )
    return parser.parse_args()


def find_lack(disk: str | None, quick: bool) -> str | None:
    """Say what room there is too little of, or None if all is well."""
    need = ROOM_QUICK_BYTES if quick else ROOM_BYTES
    for place in find_places(disk):
        free = free_bytes(place.path)
        if free < need:
            return f"{place.label} has {free / 1e9:.1f} GB free, {need / 1e9:.1f} GB are needed"
    need, free_memory = (MEMORY_QUICK_BYTES if quick else MEMORY_BYTES), available_memory_bytes()
    if free_memory is not None and free_memory < need:
        return f"{free_memory / 1e9:.1f} GB of memory are free, {need / 1e9:.1f} GB are needed"
    return None


def busy_seconds() -> float:
    """Return the seconds that all cores together have worked since the machine started."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    idle = int(fields[3]) + int(fields[4])
    return (sum(map(int, fields[:8])) - idle) / os.sysconf("SC_CLK_TCK")


def our_seconds() -> float:
    """Return the seconds that this program and the ones it has started and seen end have worked."""
    return sum(os.times()[:4])


def measure_others(options: argparse.Namespace) -> dict[str, Any] | None:
    """Measure, and note what share of the cores other programs took meanwhile."""
    busy, ours, start = busy_seconds(), our_seconds(), time.perf_counter()
    content = measure(options)
    if content is not None:
        others = (busy_seconds() - busy) - (our_seconds() - ours)
        whole = (time.perf_counter() - start) * (os.cpu_count() or 1)
        content["machine_info"]["others_percent"] = max(0, round(100 * others / whole))
        content["machine_info"]["seconds"] = round(time.perf_counter() - start)
    return content


def measure(options: argparse.Namespace) -> dict[str, Any] | None:
    """Run the suites in directories that are gone afterwards; return pytest-benchmark's JSON."""
    with ExitStack() as stack:
        environment = dict(os.environ)
        environment[MEMORY_VARIABLE] = ""
        environment["FASTSD_BENCH_QUICK"] = "1" if options.quick else "0"
        for place in find_places(options.dir):
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="fastsd-bench-", dir=place.path)
            )
            environment[MEMORY_VARIABLE if place.name == "tmpfs" else DISK_VARIABLE] = folder
        document = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run.json"
        command = [sys.executable, "-m", "pytest", str(HERE / "suite"), "-c", HERE / "pytest.ini"]
        command += [f"--rootdir={HERE}", f"--benchmark-json={document}", "--benchmark-quiet"]
        command += ["-k", options.only] if options.only else []
        done = subprocess.run([str(part) for part in command], env=environment, check=False)
        if done.returncode != 0 or not document.exists():
            print(f"pytest ended with status {done.returncode}", file=sys.stderr)
            return None
        content: dict[str, Any] = json.loads(document.read_text())
    return content


def keep(content: dict[str, Any], folder: Path) -> list[Path]:
    """Write JSON, table and picture; return where."""
    folder.mkdir(parents=True, exist_ok=True)
    results, today = Results(content), date.today().isoformat()
    machine = re.sub(r"[^a-z0-9]+", "-", results.machine["cpu"].lower()).strip("-")
    name = f"{today}-{machine}-{results.machine['cores']}-cores"
    paths = [folder / f"{name}.json", folder / "latest.md", folder / "latest.png"]
    paths[0].write_text(json.dumps(content, indent=1) + "\n")
    paths[1].write_text(build_markdown(results, today))
    if any(results.has(row) for row in ROWS):
        draw_picture(results, paths[2])
        return paths
    return paths[:2]  # limits alone make no picture


def main() -> int:
    """Measure, print, keep."""
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if lack := find_lack(options.dir, options.quick):
        print(f"Not enough room: {lack}; see --quick and --dir.", file=sys.stderr)
        return 2
    content = measure_others(options)
    if content is None:
        return 1
    content["benchmarks"] = merge_laps(content["benchmarks"])
    whole = not options.quick and not options.only
    print("\n" + build_text(Results(content)) + "\n")
    # Parts and rehearsals do not replace the results of a whole run.
    for path in keep(content, RESULTS if whole else WORK / "partial"):
        print(f"written: {os.path.relpath(path)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nStopped; the temporary files are gone.", file=sys.stderr)
        sys.exit(130)
