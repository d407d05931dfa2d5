"""Test and measure on a machine with a GPU, with the Python and the packages that it has.

Nothing is fetched and no .venv is made: the extension is built into build/gpu/site, and wheels of
other loaders, from a folder, go into build/gpu/peers. `make gpu` runs this in under nine minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
SITE, PEERS, RUN = BUILD / "site", BUILD / "peers", BUILD / "run"
RESULTS = ROOT / "benchmarks" / "results"
REHEARSALS = ROOT / "benchmarks" / ".work" / "partial"  # ignored by git
# Everything ends after this, with a reserve: what one hung process may take over its time.
WHOLE_SECONDS, RESERVE_SECONDS = 520, 60
TEST_SECONDS = 90
# Beside those marked gpu: what moves tensors between devices, or looks where they are.
DEVICE_FILES = ("test_load.py", "test_load_into.py", "test_save.py", "test_into_torch.py")
DEVICE_TESTS = "gpu or cuda or device or location"
GPU_OPTIONS = ("--size", "8GB,100MB", "--device", "cuda", "--repeat", "7")
CPU_OPTIONS = ("--size", "20MB,5MB", "--device", "cpu", "--repeat", "3")
HAS_GPU = "import sys, torch; sys.exit(not torch.cuda.is_available())"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", default=".whl", help="folder of wheels of other loaders")
    parser.add_argument("--out", help="folder that gets a copy of the results")
    return parser.parse_args()


def run(*command: str | Path, seconds: float | None = None) -> int:
    """Run a program with what was built; return its status, 124 if it took too long.

    It starts in a folder of its own: in the repository's, Python would find the sources of the
    package, which have no extension, before the built one.
    """
    environment = {**os.environ, "PYTHONPATH": f"{SITE}{os.pathsep}{PEERS}"}
    # Those of `make` are for .venv.
    environment |= {"SKBUILD_BUILD_DIR": str(BUILD / "cmake"), "SKBUILD_CMAKE_DEFINE": ""}
    try:
        done = subprocess.run(
            [str(part) for part in command], cwd=RUN, env=environment, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return 124
    return done.returncode


def build() -> bool:
    """Build the package, and install what wheels there are; one that does not fit is left out."""
    for folder in (SITE, PEERS, RUN):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    return run(*pip("install", "--no-build-isolation"), "--target", SITE, ROOT) == 0


def pip(*command: str) -> list[str]:
    """Return the start of a pip command that fetches nothing."""
    return [sys.executable, "-m", "pip", *command, "--quiet", "--no-deps", "--no-index"]


def install_wheels(folder: Path) -> None:
    """Install wheels, all at once; or one by one, so that any that does not fit is only named."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels or run(*pip("install"), "--target", PEERS, *wheels) == 0:
        return
    for wheel in wheels:
        if run(*pip("install"), "--target", PEERS, wheel) != 0:
            print(f"left out: {wheel.name}", file=sys.stderr)


def test() -> int:
    """Run the tests that need a GPU, then the others that touch devices; return the status."""
    tests = ROOT / "tests"
    marked = [path for path in sorted(tests.glob("test_*.py")) if "mark.gpu" in path.read_text()]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    pytest += ["-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}"]
    first = run(*pytest, "-m", "gpu", *marked, seconds=TEST_SECONDS)
    device_files = [tests / name for name in DEVICE_FILES]
    others = ["-k", DEVICE_TESTS, "-m", "not gpu and not slow and not crash"]
    second = run(*pytest, *others, *device_files, seconds=TEST_SECONDS)
    return first or second


def measure(options: tuple[str, ...], seconds: float, results: Path) -> int:
    """Measure and keep the results; return the status of `fastsd bench`."""
    results.mkdir(parents=True, exist_ok=True)
    outputs = ["--output", results / "gpu.json", "--output", results / "gpu.md"]
    command = [sys.executable, "-m", "fastsd", "bench", "--save", "--progress", *options, *outputs]
    limit = ["--seconds", str(max(30, int(seconds))), "--work", RUN]
    return run(*command, *limit, seconds=seconds + RESERVE_SECONDS)


def has_failed(results: Path) -> bool:
    """Tell whether fastsd itself failed in the results; others may, and are named there."""
    found = json.loads((results / "gpu.json").read_text())["results"]
    ours = [result for result in found if result["contender"] == "fastsd"]
    return any(result["status"] == "failed" for result in ours)


def main() -> int:
    """Look for the GPU, build, test, measure, keep."""
    options = parse_arguments()
    start = time.monotonic()
    is_gpu = subprocess.run([sys.executable, "-c", HAS_GPU], check=False).returncode == 0
    if not is_gpu and os.environ.get("GPU_ALLOW_CPU") != "1":
        print("torch sees no GPU here; GPU_ALLOW_CPU=1 rehearses on the CPU", file=sys.stderr)
        return 2
    if not build():
        return 2
    install_wheels(ROOT / options.wheels)
    print(f"built after {time.monotonic() - start:.0f} s", flush=True)
    tested = test()
    print(f"tested after {time.monotonic() - start:.0f} s", flush=True)
    left = WHOLE_SECONDS - RESERVE_SECONDS - (time.monotonic() - start)
    if is_gpu:
        results, measured = RESULTS, measure(GPU_OPTIONS, left, RESULTS)
    else:
        results, measured = REHEARSALS, measure(CPU_OPTIONS, min(left, 90), REHEARSALS)
    print(f"measured after {time.monotonic() - start:.0f} s", flush=True)
    if measured not in (0, 1):
        return measured
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        for name in ("gpu.json", "gpu.md"):
            shutil.copy(results / name, options.out)
    # 5: there was no such test.
    return int(tested not in (0, 5) or has_failed(results))


if __name__ == "__main__":
    sys.exit(main())
