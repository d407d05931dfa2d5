"""``fastsd convert``: what it prints, and where, and how it ends."""

import json
import os
import pickle

import pytest
import torch

import fastsd
from fastsd.cli import main
from fastsd.cli.convert import parse_size
from fastsd.cli.progress import Bar, Lines
from fastsd.zoo import Outcome

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3)}


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command line; returns its exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def run_main(*argv):
        code = main(["convert", *(str(arg) for arg in argv)])
        return code, *capsys.readouterr()

    return run_main


@pytest.fixture
def zoo(tmp_path):
    folder = tmp_path / "zoo"
    folder.mkdir()
    torch.save(STATE, folder / "a.pth")
    torch.save(STATE, folder / "b.pth")
    (folder / "README.md").write_text("text")
    return folder


def test_one_file(run, zoo, tmp_path):
    target = tmp_path / "x.fsd"
    code, out, err = run(zoo / "a.pth", target, "--verify")
    assert (code, err) == (0, "")
    assert out.startswith(f"{target}: 1 tensor, ")
    assert torch.equal(fastsd.load(target)["a.weight"], STATE["a.weight"])
    code, out, _ = run(zoo / "a.pth", target, "--json")
    assert (code, json.loads(out)["target"]) == (0, str(target))
    run(zoo / "b.pth", tmp_path)
    assert (tmp_path / "b.fsd").is_file()


def test_one_file_that_fails(run, zoo, tmp_path):
    target = tmp_path / "executed"
    (zoo / "p.pkl").write_bytes(pickle.dumps({"a": Bomb(target)}))
    code, out, err = run(zoo / "p.pkl", tmp_path / "x.fsd")
    assert (code, out) == (1, "")
    assert err == (
        f"fastsd: {zoo}/p.pkl: it needs trust, to unpickle posix.mkdir; --trust allows it\n"
    )
    assert not target.exists()
    assert run(zoo / "nothing.pth", tmp_path / "x.fsd")[0] == 2
    assert run(zoo / "a.pth")[0] == 2


def test_zoo(run, zoo, tmp_path):
    code, out, _ = run(zoo, tmp_path / "out", "--to", "fsd", "--jobs", 1)
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [
        ["done", "2"], ["skipped", "0"], ["failed", "0"],
    ]  # fmt: skip
    assert (tmp_path / "out/b.fsd").is_file()
    (zoo / "cut.pth").write_bytes((zoo / "a.pth").read_bytes()[:500])
    (zoo / "trust.pkl").write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    code, out, err = run(zoo, tmp_path / "out", "--jobs", 1)
    assert code == 1
    assert "cut.pth" in out
    assert "it needs trust, to unpickle posix.mkdir" in out
    assert "1 file would need --trust" in err
    assert [line.split()[:2] for line in out.splitlines()[-3:]] == [
        ["done", "0"], ["skipped", "2"], ["failed", "2"],
    ]  # fmt: skip
    code, out, _ = run(zoo, tmp_path / "out", "--jobs", 1, "--json")
    found = {item["name"]: item for item in json.loads(out)["items"]}
    assert code == 1
    assert found["a.pth"]["outcome"] == "skipped"
    assert found["trust.pkl"]["wanted"] == ["posix.mkdir"]
    assert not (tmp_path / "executed").exists()


def test_dry_run(run, zoo, tmp_path):
    code, out, _ = run(zoo, tmp_path / "out", "--dry-run")
    nbytes = sum((zoo / name).stat().st_size for name in ("a.pth", "b.pth"))
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["a.pth", "b.pth"]
    assert "2 checkpoints, " in out
    assert "1 other file, 4 B: left alone" in out
    _, out, _ = run(zoo, tmp_path / "out", "--dry-run", "--json")
    assert sum(item["nbytes"] for item in json.loads(out)["items"]) == nbytes
    assert not (tmp_path / "out").exists()
    torch.save(STATE, zoo / "a.ckpt")
    code, out, _ = run(zoo, tmp_path / "out", "--dry-run")
    assert code == 1
    assert "a.ckpt would be written to the same a.fsd" in out


def test_what_cannot_start(run, zoo, tmp_path):
    assert run(tmp_path / "nothing", tmp_path / "out") == (
        2, "", f"fastsd: {tmp_path}/nothing: No such file or directory\n",
    )  # fmt: skip
    code, _, err = run(zoo, zoo)
    assert code == 2
    assert "directory of its own" in err
    assert run("nothing://x/y", tmp_path / "out")[0] == 2


def test_a_url_of_one_file(run, zoo, tmp_path):
    pytest.importorskip("fsspec")
    code, _, err = run(f"file://{zoo}/a.pth", tmp_path / "out", "--jobs", 1)
    assert (code, err) == (0, "")
    assert [p.name for p in (tmp_path / "out").glob("*.fsd")] == ["a.fsd"]


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("17", 17), ("5GB", 5 * 10**9), ("1.5k", 1500), ("2GiB", 2 << 30), ("3 mb", 3_000_000)],
)
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("argument", ["x", "-5", "5 apples", "", "GB"])
def test_sizes_that_are_none(run, zoo, tmp_path, argument):
    assert run(zoo, tmp_path / "out", f"--memory={argument}")[0] == 2


def test_plain_lines_now_and_then():
    now = 0.0
    lines = []
    progress = Lines(lines.append, lambda: now)
    progress.start(2, 1_000_000)
    for _ in range(79):
        now += 0.125
        progress.advance(5_000)
    assert len(lines) == 1
    assert lines[0] == "fastsd: 0 of 2 files, 200 kB of 1 MB, 40 kB/s, 20 s left\n"
    now += 5
    progress.finish(Outcome("x", "done"))
    assert lines[1].startswith("fastsd: 1 of 2 files, 395 kB of 1 MB, ")


def test_a_bar(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with Bar() as progress:
        progress.start(2, 1_000_000)
        progress.advance(500_000)
        progress.finish(Outcome("x", "done"))
    out, err = capsys.readouterr()
    assert out == ""
    assert "1 of 2 files" in err
    assert "0.5/1.0 MB" in err
