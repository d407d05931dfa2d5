"""Where measurements take place: directories, their file systems, and room in them."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from fastsd.bench.machine import file_system

HERE = Path(__file__).resolve().parent
WORK = HERE / ".work"  # ignored by git
DISK_VARIABLE = "FASTSD_BENCH_DIR"
MEMORY_VARIABLE = "FASTSD_BENCH_SHM"  # set to nothing to leave tmpfs out


@dataclass(frozen=True)
class Place:
    """A directory to measure in. ``label`` is what results show; the path stays private."""

    name: str
    label: str
    path: Path


def find_places(disk: str | None = None) -> list[Place]:
    """Return tmpfs, where there is one, and the disk (``disk``, its variable, or the default)."""
    places = []
    memory = os.environ.get(MEMORY_VARIABLE, "/dev/shm")
    if memory and file_system(Path(memory)) == "tmpfs" and os.access(memory, os.W_OK):
        places.append(Place("tmpfs", "tmpfs", Path(memory)))
    path = Path(disk or os.environ.get(DISK_VARIABLE) or WORK)
    path.mkdir(parents=True, exist_ok=True)
    kind = file_system(path)
    if kind != "tmpfs":
        places.append(Place("disk", f"disk ({kind})", path))
    elif not places:
        places.append(Place("tmpfs", "tmpfs", path))
    return places


def free_bytes(path: Path) -> int:
    """Return the room left in the file system that holds ``path``."""
    return shutil.disk_usage(path).free


def available_memory_bytes() -> int | None:
    """Return the memory that programs can still take, or None where nobody says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kibibytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return int(kibibytes) * 1024 if kibibytes else None
