"""How opening grows with the number of tensors: the header sets the cost, not the data.

Files are sparse: their headers are real, their data holes, so that 100 GB take no room. Each size
is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

COUNTS = (10, 100, 1_000, 10_000, 100_000, 200_000, 1_000_000)
TENSOR_BYTES = 512 << 10
DATA_BYTES_MAX = 100_000_000_000
MAP_NORESERVE = 0x4000  # Linux: mmap.h


def write_sparse(path: Path, count: int) -> None:
    """Write the header of a file with so many tensors, and holes for their bytes."""
    import torch

    from fastsd.saving import make_plan

    items = min(TENSOR_BYTES, DATA_BYTES_MAX // count) // 4
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    zeros = torch.frombuffer(mmap.mmap(-1, count * items * 4, flags=flags), dtype=torch.float32)
    names = (f"layers.{i // 10}.block.{i % 10}.weight" for i in range(count))
    plan = make_plan(dict(zip(names, zeros.split(items), strict=True)), "fsd", None)
    plan.prepare(False)
    step = bytearray(1 << 20)
    with path.open("wb") as file:
        # The header ends where the first storage starts, of which nothing but zeros are read.
        begin = 0
        while begin < plan.file_bytes and (begin == 0 or any(step)):
            part = memoryview(step)[: min(len(step), plan.file_bytes - begin)]
            plan.gather(begin, part)
            file.write(part)
            begin += len(part)
        file.truncate(plan.file_bytes)


def measure(path: str) -> dict[str, Any]:
    """Open a file, list its names, look at one tensor; return seconds and memory."""
    import fastsd

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    archive = fastsd.open(path)
    opened = time.perf_counter()
    names = list(archive)
    listed = time.perf_counter()
    archive[names[-1]].sum()
    looked = time.perf_counter()
    return {
        "tensors": len(names),
        "file_bytes": os.path.getsize(path),
        "open_ms": (opened - start) * 1e3,
        "list_ms": (listed - opened) * 1e3,
        "last_tensor_ms": (looked - listed) * 1e3,
        "memory_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


def main() -> int:
    """Measure all sizes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return 0
    if options.write:
        write_sparse(Path(options.write[0]), int(options.write[1]))
        return 0
    rows = []
    with tempfile.TemporaryDirectory(prefix="fastsd-scale-") as folder:
        for count in COUNTS:
            path = os.path.join(folder, f"{count}.fsd")
            again = [sys.executable, __file__]
            subprocess.run([*again, "--write", path, str(count)], check=True)
            done = subprocess.run([*again, "--measure", path], check=True, capture_output=True)
            rows.append(json.loads(done.stdout))
            os.unlink(path)
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    print(f"{'tensors':>9} {'file':>9} {'open':>10} {'list':>9} {'last tensor':>12} {'memory':>9}")
    for row in rows:
        print(
            f"{row['tensors']:>9,} {row['file_bytes'] / 1e9:>6.2f} GB {row['open_ms']:>7.2f} ms"
            f" {row['list_ms']:>6.2f} ms {row['last_tensor_ms']:>9.3f} ms"
            f" {row['memory_mib']:>5.0f} MiB"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
