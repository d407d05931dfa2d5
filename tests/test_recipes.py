"""The recipes in docs/ do what they say, as they stand."""

import re
from pathlib import Path

import pytest
import torch
from same import assert_same

import fastsd
from fastsd import _core
from fastsd.formats import fsd

RECIPES = Path(__file__).resolve().parent.parent / "docs" / "recipes"
PAGES = sorted(path.name for path in RECIPES.glob("*.md") if path.name != "README.md")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run(page, folder, monkeypatch):
    """Runs the code of a page in a folder; returns its names."""
    monkeypatch.chdir(folder)
    text = (RECIPES / page).read_text(encoding="utf-8")
    names = {"__name__": page}
    for match in BLOCK.finditer(text):
        # Blank lines in front, so that a failure names the line of the page.
        padding = "\n" * text.count("\n", 0, match.start(1))
        exec(compile(padding + match.group(1), str(RECIPES / page), "exec"), names)
    return names


def check_resume(names):
    assert not has_pickle("checkpoint.fsd")
    for part in ("model", "optimizer", "schedule", "scaler"):
        straight, resumed = (
            getattr(names[run], part).state_dict() for run in ("straight", "resumed")
        )
        assert_same(resumed, straight)


def check_average(names):
    states = [fastsd.load(f"step-{step}.fsd") for step in range(5)]
    assert names["soup"]["1.num_batches_tracked"] == 5
    expected = sum(state["0.weight"].double() for state in states) / 5
    torch.testing.assert_close(names["soup"]["0.weight"], expected.float())
    for state in states[1:]:
        states[0]["0.weight"] = 0.9 * states[0]["0.weight"] + 0.1 * state["0.weight"]
    torch.testing.assert_close(names["ema"]["0.weight"], states[0]["0.weight"])


def has_pickle(path):
    return _core.Reader(path, path, None).section(fsd.Section.PICKLE) is not None


CHECKS = {"resume.md": check_resume, "average.md": check_average}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("page", PAGES)
def test_recipe_runs(page, tmp_path, monkeypatch):
    names = run(page, tmp_path, monkeypatch)
    CHECKS.get(page, lambda names: None)(names)


def test_every_recipe_is_listed():
    listed = re.findall(r"\]\((\w+\.md)\)", (RECIPES / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == PAGES
