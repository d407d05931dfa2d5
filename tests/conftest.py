import os
import shutil
import signal
import subprocess

import pytest
from hypothesis import settings
from stub_gpu import stub_gpu  # noqa: F401  (a fixture)

import fastsd

# The same examples in every run. To look further: --hypothesis-profile=explore
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=100)
settings.register_profile("explore", deadline=None, max_examples=5000)
settings.load_profile("suite")


def pytest_configure(config):
    # A job in the background may have been told to ignore Ctrl-C, and would tell its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Torch says so once a process, to whoever makes the first tensor of torch.complex32.
    config.addinivalue_line("filterwarnings", "ignore:ComplexHalf support:UserWarning")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.fsd"


@pytest.fixture
def round_trip(path):
    """Saves an object to a file and loads it again."""

    def save_and_load(obj, **options):
        fastsd.save(obj, path)
        return fastsd.load(path, **options)

    return save_and_load


@pytest.fixture(autouse=True)
def leave_no_litter(tmp_path):
    """No test, whatever it interrupts, may leave a temporary file behind."""
    yield
    found = [name for _, _, names in os.walk(tmp_path) for name in names]
    assert not [name for name in found if name.startswith(".fastsd-")]


@pytest.fixture
def preload(tmp_path_factory):
    """Compiles C functions that stand in for the system's in processes with this environment."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("preload")

    def compile_library(source):
        (folder / "library.c").write_text(source)
        command = ["cc", "-shared", "-fPIC", "-o", "library.so", "library.c", "-ldl"]
        subprocess.run(command, cwd=folder, check=True)
        return {**os.environ, "LD_PRELOAD": str(folder / "library.so")}

    return compile_library
