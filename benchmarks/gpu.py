"""Test and measure on a machine with a GPU, with the Python and the packages that it has.

Nothing is fetched and no .venv is made: the extension is built into build/gpu/site, and what is
missing there, as wheels in a folder, goes into build/gpu/peers. `make gpu` runs this in under nine
minutes. Whatever goes wrong after the build, the rest is still done, and what there is is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
SITE, PEERS, RUN = BUILD / "site", BUILD / "peers", BUILD / "run"
RESULTS = ROOT / "benchmarks" / "results"
REHEARSALS = ROOT / "benchmarks" / ".work" / "partial"  # ignored by git
# Everything ends after this, with a reserve: what one hung process may take over its time.
WHOLE_SECONDS, RESERVE_SECONDS = 520, 60
BUILD_SECONDS, TEST_SECONDS = 240, 90
END_SECONDS = 15
# Beside those marked gpu: what moves tensors between devices, or looks where they are.
DEVICE_FILES = ("test_load.py", "test_load_into.py", "test_save.py", "test_into_torch.py")
DEVICE_TESTS = "gpu or cuda or device or location"
# Other releases of torch warn of other things, plugins that we do not know may do anything, and
# nobody is there to look: all that can be told is told, in few lines.
TOLERANT = ["-q", "-p", "no:cacheprovider", "-W", "default", "--disable-warnings", "--tb=short"]
TOLERANT += ["--continue-on-collection-errors", "-o", "faulthandler_timeout=60"]
LINES_SHOWN = 25
# The largest that fits is measured, and one that shows what it costs to begin.
SIZES_GB = (8, 4, 2, 1)
SMALL = "100MB"
FORMATS, FILES_SECONDS = 4, 60  # in which they are written
PROBE_BYTES = 256 << 20
GPU_OPTIONS = ("--device", "cuda", "--repeat", "7")
CPU_OPTIONS = ("--size", "20MB,5MB", "--device", "cpu", "--repeat", "3")
HAS_GPU = "import sys, torch; sys.exit(not torch.cuda.is_available())"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", default=".whl", help="folder of wheels of what is missing")
    parser.add_argument("--out", help="folder that gets a copy of the results")
    return parser.parse_args()


def run(*command: str | Path, seconds: float, output: Path | None = None) -> int:
    """Run a program with what was built; return its status, 124 if it took too long.

    It starts in a folder of its own: in the repository's, Python would find the sources of the
    package, which have no extension, before the built one. Nothing that it has started stays.
    """
    environment = {**os.environ, "PYTHONPATH": f"{SITE}{os.pathsep}{PEERS}"}
    # Those of `make` are for .venv; plugins of pytest are not what the tests are made for.
    environment |= {"SKBUILD_BUILD_DIR": str(BUILD / "cmake"), "SKBUILD_CMAKE_DEFINE": ""}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONUNBUFFERED": "1"}
    with open(output or os.devnull, "ab") as file:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=RUN,
            env=environment,
            stdout=file if output else None,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # for who cleans up, and ends its own children
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            return 124
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def build() -> int:
    """Build the package, with the tools that are there or that have come as wheels."""
    command = [*pip("install", "--no-build-isolation"), "--target", SITE, ROOT]
    return run(*command, seconds=BUILD_SECONDS)


def pip(*command: str) -> list[str]:
    """Return the start of a pip command that fetches nothing."""
    return [sys.executable, "-m", "pip", *command, "--quiet", "--no-deps", "--no-index"]


def install_wheels(folder: Path) -> None:
    """Install wheels, all at once; or one by one, so that any that does not fit is only named."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels or run(*pip("install"), "--target", PEERS, *wheels, seconds=BUILD_SECONDS) == 0:
        return
    for wheel in wheels:
        if run(*pip("install"), "--target", PEERS, wheel, seconds=BUILD_SECONDS) != 0:
            print(f"left out: {wheel.name}", file=sys.stderr)


def test(report: Path) -> int:
    """Run the tests that need a GPU, then the others that touch devices; return the status.

    All that they say is in ``report``; the end of it is printed.
    """
    tests = ROOT / "tests"
    marked = [path for path in sorted(tests.glob("test_*.py")) if "mark.gpu" in path.read_text()]
    pytest = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", f"--rootdir={ROOT}"]
    others = ["-k", DEVICE_TESTS, "-m", "not gpu and not slow and not crash"]
    statuses = []
    for tested in (["-m", "gpu", *marked], [*others, *(tests / name for name in DEVICE_FILES)]):
        statuses.append(run(*pytest, *TOLERANT, *tested, seconds=TEST_SECONDS, output=report))
        lines = report.read_text(errors="replace").splitlines()
        print("\n".join([*lines[-LINES_SHOWN:], f"pytest: {statuses[-1]}"]), flush=True)
    # 5: there was no such test.
    return max(status for status in statuses if status != 5) if set(statuses) - {5} else 0


def choose_sizes() -> str:
    """Return what the disk has room for, and writes soon enough: all formats, and one saved."""
    probe = RUN / "probe"
    begin = time.monotonic()
    with probe.open("wb") as file:
        file.write(os.urandom(PROBE_BYTES // 16) * 16)
        os.fsync(file.fileno())
    rate = PROBE_BYTES / (time.monotonic() - begin)
    probe.unlink()
    free = shutil.disk_usage(RUN).free
    print(f"disk: {free / 1e9:.0f} GB free, {rate / 1e9:.2f} GB/s written", flush=True)
    most = min(free / (FORMATS + 1.2), rate * FILES_SECONDS / FORMATS)
    size = next((size for size in SIZES_GB if size * 1e9 < most), SIZES_GB[-1])
    return f"{size}GB,{SMALL}"


def measure(options: tuple[str, ...], seconds: float, results: Path) -> int:
    """Measure and keep the results; return the status of `fastsd bench`."""
    outputs = ["--output", results / "gpu.json", "--output", results / "gpu.md"]
    command = [sys.executable, "-m", "fastsd", "bench", "--save", "--progress", *options, *outputs]
    limit = ["--seconds", str(max(30, int(seconds))), "--work", RUN]
    return run(*command, *limit, seconds=seconds + RESERVE_SECONDS)


def keep(paths: list[Path], out: str | None) -> None:
    """Copy what there is to another folder."""
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        for path in filter(Path.is_file, paths):
            shutil.copy(path, out)


def has_failed(results: Path) -> bool:
    """Tell whether fastsd itself failed in the results; others may, and are named there."""
    try:
        found = json.loads((results / "gpu.json").read_text())["results"]
    except (OSError, ValueError):
        return True
    ours = [result for result in found if result["contender"] == "fastsd"]
    return any(result["status"] == "failed" for result in ours)


def main() -> int:
    """Look for the GPU, build, test, measure, keep."""
    options = parse_arguments()
    start = time.monotonic()

    def tell(what: str) -> None:
        print(f"{what} after {time.monotonic() - start:.0f} s", flush=True)

    is_gpu = subprocess.run([sys.executable, "-c", HAS_GPU], check=False).returncode == 0
    if not is_gpu and os.environ.get("GPU_ALLOW_CPU") != "1":
        print("torch sees no GPU here; GPU_ALLOW_CPU=1 rehearses on the CPU", file=sys.stderr)
        return 2
    for folder in (SITE, PEERS, RUN):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    install_wheels(ROOT / options.wheels)  # first, as tools to build with may be among them
    if build() != 0:
        print("the package could not be built", file=sys.stderr)
        return 2
    tell("built")
    results = RESULTS if is_gpu else REHEARSALS
    results.mkdir(parents=True, exist_ok=True)
    for name in ("gpu.json", "gpu.md"):
        (results / name).unlink(missing_ok=True)  # none of an earlier run is taken for this one's
    tests = RUN / "gpu-tests.txt"
    tested = test(tests)
    keep([tests], options.out)
    tell("tested")
    sized = ("--size", choose_sizes(), *GPU_OPTIONS) if is_gpu else CPU_OPTIONS
    left = WHOLE_SECONDS - RESERVE_SECONDS - (time.monotonic() - start)
    measured = measure(sized, left if is_gpu else min(left, 90), results)
    keep([results / "gpu.json", results / "gpu.md"], options.out)
    tell("measured")
    print(f"tests: {tested}, fastsd bench: {measured}", flush=True)
    return int(tested != 0 or measured not in (0, 1) or has_failed(results))


if __name__ == "__main__":
    sys.exit(main())
