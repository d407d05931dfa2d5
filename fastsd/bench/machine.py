"""What a machine is, as far as it matters for speed; nothing here tells one from its twins."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path

import torch

from fastsd import gpu


def processor_name() -> str:
    """The processor's name as it calls itself."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1) if found else platform.machine()


def memory_gib() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)


def count_cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0))


def file_system(path: Path) -> str:
    """The type of the file system that holds ``path``, such as "ext4", or "unknown"."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    target = path.resolve()
    found, depth = "unknown", 0
    for line in lines:
        left, _, right = line.partition(" - ")
        mount = Path(left.split()[4].replace("\\040", " "))
        if target.is_relative_to(mount) and len(mount.parts) >= depth:
            found, depth = right.split()[0], len(mount.parts)
    return found


def find_version(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe(devices: tuple[str, ...], packages: tuple[str, ...]) -> dict[str, str]:
    """Hardware, system and versions of all that takes part, by name, for people to read."""
    found = {
        "processor": processor_name(),
        "cores": str(count_cores()),
        "memory": f"{memory_gib()} GiB",
        "kernel": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "Python": platform.python_version(),
        "fastsd": find_version("fastsd") or "not installed",
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "not in this torch",
    }
    for device in devices:
        if torch.device(device).type == "cuda":
            found[device] = torch.cuda.get_device_name(device)
    if any(torch.device(device).type == "cuda" for device in devices):
        found |= gpu.describe()
    return found | {name: find_version(name) or "not installed" for name in packages}
