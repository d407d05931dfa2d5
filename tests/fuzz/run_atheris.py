"""Runs a target of attack.py under atheris: run_atheris.py TARGET [what libFuzzer takes]."""

import atexit
import importlib.util
import json
import json.scanner
import shlex
import shutil
import sys
import sysconfig
import warnings
from pathlib import Path

import atheris
import torch  # noqa: F401 - before what is instrumented, which would take in parts of it

ROOT = Path(__file__).parents[2]


class CoreFinder:
    """Finds the extension beside the sources, where the editable install has not put it.

    atheris cannot instrument what that install's own finder imports: it is not used here.
    """

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "fastsd._core":
            return None
        (core,) = Path(sysconfig.get_path("platlib"), "fastsd").glob("_core*.so")
        return importlib.util.spec_from_file_location(name, core)


sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
sys.meta_path.insert(0, CoreFinder)
sys.path.insert(0, str(ROOT))

with atheris.instrument_imports(include=["fastsd"]):
    import attack

# What the core's parser is compared with.
for function in (
    json.decoder.py_scanstring,
    json.decoder.JSONObject,
    json.decoder.JSONArray,
    json.scanner.py_make_scanner,
):
    atheris.instrument_func(function)


def main():
    target = sys.argv.pop(1)
    body = attack.TARGETS[target]
    # What -merge starts again, through a shell.
    sys.argv[0] = shlex.join([sys.executable, __file__, target])
    warnings.simplefilter("ignore")
    atexit.register(shutil.rmtree, attack.scratch(), ignore_errors=True)
    atheris.Setup(sys.argv, body)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
