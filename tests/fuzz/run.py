"""Attacks targets, one after another:

    python tests/fuzz/run.py [--seconds N] [--programs FOLDER] [--keep] [TARGET...]

Inputs that are found to do something new stay in build/fuzz/corpus; what fails goes to
tests/fuzz/regressions, where the ordinary tests run it from then on. `--keep` minimises all that
has been found into tests/fuzz/corpus instead.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NATIVE = sorted(path.stem for path in (HERE / "targets").glob("*.cc"))
PYTHON = ["open", "tree", "json", "index", "dcp", "chunks"]
KEPT_BYTES_MAX = 8 << 10  # of an input in the repository

ENVIRONMENT = {
    **os.environ,
    # What is too large to be allocated is refused, as it is without the sanitizer.
    "ASAN_OPTIONS": "allocator_may_return_null=1:detect_leaks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "OMP_NUM_THREADS": "1",
}


def command(target, programs):
    if target in PYTHON:
        return [sys.executable, str(HERE / "run_atheris.py"), target]
    return [str(programs / f"fuzz_{target}")]


def attack(target, programs, found, seconds):
    """Whether the target stands it. Prints how often it was run."""
    failed = HERE / "regressions" / target
    for folder in (found, failed):
        folder.mkdir(parents=True, exist_ok=True)
    dictionary = HERE / "dictionaries" / f"{target}.dict"
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={(16 if target in PYTHON else 64) << 10}",
        "-timeout=60",
        "-rss_limit_mb=3000",
        "-print_final_stats=1",
        f"-artifact_prefix={failed}/",
        *([f"-dict={dictionary}"] if dictionary.exists() else []),
    ]
    folders = [found, HERE / "corpus" / target, failed]
    result = subprocess.run(
        [*command(target, programs), *options, *map(str, folders)],
        env=ENVIRONMENT,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    runs = re.findall(r"number_of_executed_units: (\d+)|^Done (\d+) runs", result.stdout, re.M)
    coverage = re.findall(r" cov: (\d+)", result.stdout)
    count = max((int(number) for pair in runs for number in pair if number), default=0)
    edges = coverage[-1] if coverage else "-"
    verdict = "stands" if result.returncode == 0 else "FAILS"
    print(f"{target:12} {count:>12,} runs, coverage {edges:>5}: {verdict}", flush=True)
    if result.returncode:
        print(result.stdout[-6000:])
    if not any(failed.iterdir()):
        failed.rmdir()
    return result.returncode == 0


def keep(target, programs, found):
    """Puts the fewest inputs that reach what all of them reach into the repository's corpus."""
    corpus = HERE / "corpus" / target
    with tempfile.TemporaryDirectory() as scratch:
        options = ["-merge=1", f"-max_len={KEPT_BYTES_MAX}", scratch, str(corpus), str(found)]
        subprocess.run([*command(target, programs), *options], env=ENVIRONMENT, check=True)
        shutil.rmtree(corpus, ignore_errors=True)
        corpus.mkdir(parents=True)
        for path in Path(scratch).iterdir():
            shutil.copy(path, corpus / path.name)


def main():
    parser = argparse.ArgumentParser(description="Attack targets, one after another.")
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--programs", type=Path, default=ROOT / "build" / "fuzz")
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    targets = args.targets or [*NATIVE, *PYTHON]
    unknown = set(targets) - {*NATIVE, *PYTHON}
    if unknown:
        parser.error(f"no target {', '.join(sorted(unknown))}; there are: {[*NATIVE, *PYTHON]}")
    stands = True
    for target in targets:
        found = args.programs / "corpus" / target
        if args.keep:
            keep(target, args.programs, found)
        else:
            stands = attack(target, args.programs, found, args.seconds) and stands
    sys.exit(not stands)


if __name__ == "__main__":
    main()
