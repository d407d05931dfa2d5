"""The inputs of tests/fuzz: every seed, and every one that ever failed, through its target.

Those of the native targets are run by tests/fuzz/corpus_test.cc, with the native tests.
"""

import shutil
import sys
import warnings
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz"
sys.path.insert(0, str(FUZZ))

import attack  # noqa: E402 - beside the targets, which `make fuzz` runs without these tests

import run  # noqa: E402


def inputs(target):
    folders = [FUZZ / "corpus" / target, FUZZ / "regressions" / target]
    return [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())]


@pytest.fixture(autouse=True, scope="module")
def no_litter():
    yield
    shutil.rmtree(attack.scratch(), ignore_errors=True)


@pytest.mark.parametrize("target", run.PYTHON)
def test_targets_stand_their_corpus(target):
    assert inputs(target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about what files hold
        for path in inputs(target):
            try:
                attack.TARGETS[target](path.read_bytes())
            except BaseException as error:
                raise AssertionError(f"{path} fails") from error


def test_every_target_is_known():
    assert set(run.PYTHON) == set(attack.TARGETS)
    assert {path.name for path in (FUZZ / "corpus").iterdir()} == {*run.NATIVE, *run.PYTHON}


def test_targets_notice_a_broken_promise(monkeypatch):
    """Or else they would stand anything."""
    seed = inputs("tree")[0].read_bytes()
    monkeypatch.setattr(attack.fastsd, "load", lambda *_, **__: 1 / 0)
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        attack.TARGETS["tree"](seed)


def test_watch_notices_what_a_file_must_not_do(tmp_path):
    with pytest.raises(AssertionError, match="open"), attack.Watch(0):
        (tmp_path / "canary").write_text("sings")
    with pytest.raises(AssertionError, match=r"os\.mkdir"), attack.Watch(0):
        (tmp_path / "folder").mkdir()
