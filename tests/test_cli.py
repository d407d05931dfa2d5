"""The command line: what it prints, and where, and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch

import fastsd
from fastsd import _core
from fastsd.cli import main, terminal
from fastsd.cli.outline import build, walk
from fastsd.summary import summarize

DTYPES = [getattr(torch, name) for _, name, _ in _core.DTYPES if hasattr(torch, name)]
HOSTILE = "evil\x1b[31m\x07\x9b1m[bold]:smile:\r\n\u202e\u200b\x00"
HARMLESS = re.compile(r"[^\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e]*")


@pytest.fixture
def run(capsys):
    """Runs a command line; returns its exit code, stdout and stderr."""

    def run_main(*argv):
        code = main([str(arg) for arg in argv])
        return code, *capsys.readouterr()

    return run_main


@pytest.fixture
def run_json(run):
    def run_main(*argv, code=0):
        found, out, err = run(*argv, "--json")
        assert found == code
        return json.loads(out), err

    return run_main


class TerminalText:
    """Stands for a stdout that is a terminal."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def isatty(self):
        return True


@pytest.fixture
def on_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def enter():
        monkeypatch.setattr(sys, "stdout", TerminalText(sys.stdout))

    return enter


def save_model(path, layers=32, **options):
    weight = torch.randn(10, 4)
    state = {"embed.weight": weight}
    for layer in range(layers):
        state[f"model.layers.{layer}.attn.q.weight"] = torch.randn(4, 4)
        state[f"model.layers.{layer}.norm"] = torch.ones(4, dtype=torch.bfloat16)
    state |= {"head.weight": weight, "step": torch.tensor(3), "t": torch.randn(3, 2).t()}
    fastsd.save(state, path, **options)
    return state


def damage(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# ---- inspect ----


def test_inspect_json_has_everything(run_json, path):
    state = save_model(path, metadata={"epoch": "3"})
    state["grad"] = torch.nn.Parameter(torch.ones(2))
    fastsd.save(state, path, metadata={"epoch": "3"})
    document, err = run_json("inspect", path)
    assert (err, document["errors"]) == ("", [])
    (file,) = document["files"]
    assert (file["path"], file["format"], file["version"]) == (str(path), "fsd", "1.0")
    assert file["file_bytes"] == path.stat().st_size
    assert file["metadata"] == {"epoch": "3"}
    assert file["storages"] == file["checksummed"] == len(state) - 1
    assert file["unsafe_globals"] == []
    assert file["pickle_problem"] is None
    assert [tensor["name"] for tensor in file["tensors"]] == list(state)
    for found, tensor in zip(file["tensors"], state.values(), strict=True):
        assert found["dtype"] == str(tensor.dtype).removeprefix("torch.")
        assert found["shape"] == list(tensor.shape)
        assert found["stride"] == list(tensor.stride())
        assert found["is_contiguous"] == tensor.is_contiguous()
        assert found["nbytes"] == tensor.nbytes
        assert found["requires_grad"] == tensor.requires_grad
        assert found["device"] == "cpu"
        assert type(found["crc32c"]) is int
    tied = {tensor["name"]: tensor["shares_with"] for tensor in file["tensors"]}
    assert {name: other for name, other in tied.items() if other} == {"head.weight": "embed.weight"}
    distinct = [tensor for name, tensor in state.items() if name != "head.weight"]
    assert file["total"] == {
        "tensors": len(state),
        "nbytes": sum(tensor.nbytes for tensor in distinct),
    }
    assert file["storage_bytes"] == file["total"]["nbytes"]
    assert file["by_dtype"]["bfloat16"] == {"tensors": 32, "nbytes": 32 * 8}
    assert file["by_prefix"]["model"] == {"tensors": 64, "nbytes": 32 * (64 + 8)}
    assert file["by_prefix"][""]["tensors"] == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inspect_shows_every_dtype(run, path, dtype):
    fastsd.save({"x": torch.empty(2, 3, dtype=dtype)}, path)
    code, out, _ = run("inspect", path)
    assert code == 0
    assert re.search(rf"^x +{str(dtype).removeprefix('torch.')} +\[2, 3\]", out, re.MULTILINE)


def test_inspect_folds_equal_layers(run, path):
    save_model(path)
    code, out, err = run("inspect", path)
    assert (code, err) == (0, "")
    assert re.search(r"^  0\.\.31 x32 +2\.3 kB +64 tensors$", out, re.MULTILINE)
    assert out.count("attn.q.weight") == 1
    assert re.search(r"^head\.weight +float32 .*tied with embed\.weight$", out, re.MULTILINE)
    assert re.search(r"^t +float32 +\[2, 3\] +24 B +stride \[1, 2\]$", out, re.MULTILINE)
    assert re.search(r"^step +int64 +\[\]", out, re.MULTILINE)
    assert len(out.splitlines()) < 30
    _, out, _ = run("inspect", "--all", path)
    assert out.count("attn.q.weight") == 32


def test_inspect_flat_has_full_names(run, path):
    state = save_model(path)
    _, out, _ = run("inspect", "--flat", path)
    assert [line.split()[0] for line in out.splitlines()[3 : 3 + len(state)]] == list(state)


def outline(path, **options):
    nodes = walk(build(summarize(path).tensors, **{"fold": True, **options}))
    return [("  " * depth + node.label, node.count) for depth, node in nodes]


def test_outline_keeps_what_is_different(path):
    tensors = {f"l.{i}.w": torch.ones(2 if i % 2 else 3) for i in range(6)}
    tensors |= {"l.9.w": torch.ones(2), "l.x.w": torch.ones(2), "a": torch.ones(1)}
    tensors |= {"a.b": torch.ones(1), "l.7.w": tensors["l.1.w"]}
    fastsd.save(tensors, path)
    assert outline(path) == [
        ("l", 1),
        ("  0, 2, 4.w", 3),
        ("  1, 3, 5, 9.w", 4),
        ("  x.w", 1),
        ("  7.w", 1),
        ("a", 1),
        ("  b", 1),
    ]
    assert len(outline(path, fold=False)) == 12


@pytest.mark.parametrize("name", ["", ".", "..", "." * 5000, "9" * 5000, "0." * 300 + "x", "٣.x"])
def test_outline_of_strange_names(run, path, name):
    fastsd.save({name: torch.ones(1), "other": torch.ones(1)}, path)
    code, out, err = run("inspect", path)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) < 1000


def test_inspect_nested_and_empty_files(run, run_json, path):
    fastsd.save({"model": {"w": torch.ones(2)}, "epoch": 3}, path)
    assert run_json("inspect", path)[0]["files"][0]["tensors"][0]["name"] == "model.w"
    fastsd.save({}, path)
    code, out, _ = run("inspect", path)
    assert code == 0
    assert "0 tensors of 0 B in 0 storages" in out


def test_inspect_names_what_a_pickle_wants(run, run_json, path):
    fastsd.save(torch.nn.Linear(2, 2), path)
    (file,) = run_json("inspect", path)[0]["files"]
    assert "torch.nn.modules.linear.Linear" in file["unsafe_globals"]
    assert "  torch.nn.modules.linear.Linear\n" in run("inspect", path)[1]


def test_inspect_says_what_checksums_there_are(run, path):
    fastsd.save({"a": torch.ones(2)}, path)
    assert "in 1 storage, checksums\n" in run("inspect", path)[1]
    fastsd.save({"a": torch.ones(2)}, path, checksum=False)
    assert "in 1 storage, no checksums\n" in run("inspect", path)[1]


def test_inspect_goes_on_past_a_bad_file(run, run_json, path, tmp_path):
    save_model(path)
    bad = tmp_path / "bad"
    bad.write_text("hello")
    code, out, err = run("inspect", bad, tmp_path / "none", path)
    assert code == 2
    assert str(path) in out
    first, second = err.splitlines()
    assert first.startswith(f"fastsd: {bad}: ")
    assert second == f"fastsd: {tmp_path}/none: No such file or directory"
    document, _ = run_json("inspect", bad, path, code=2)
    assert [file["path"] for file in document["files"]] == [str(path)]
    assert [error["path"] for error in document["errors"]] == [str(bad)]


# ---- verify ----


def test_verify(run, run_json, path, tmp_path):
    state = save_model(path)
    unchecked = tmp_path / "unchecked"
    save_model(unchecked, checksum=False)
    (tmp_path / "readme").write_text("hello")
    code, out, err = run("verify", tmp_path)
    assert (code, err) == (0, "")
    assert "unchecked" in out
    assert "good, structure only" in out
    assert re.search(r"readme +skipped: ", out)
    document, _ = run_json("verify", path, unchecked)
    good, other = document["files"]
    assert (good["status"], other["status"]) == ("good", "good")
    assert (good["tensors"], good["unchecked"]) == (len(state), [])
    assert other["unchecked"] == list(state)
    assert document["totals"] == {
        "good": 2,
        "damaged": 0,
        "unreadable": 0,
        "skipped": 0,
        "checked_bytes": good["checked_bytes"],
        "unchecked_tensors": len(state),
    }


def test_verify_finds_damage(run, run_json, path):
    save_model(path)
    damage(path)
    code, out, err = run("verify", path)
    assert code == 1
    assert re.search(r"damaged: 1 of 67 storages are damaged, .*\"t\"", out)
    (line,) = err.splitlines()
    assert line.startswith(f"fastsd: {path}: 1 of 67 storages are damaged")
    document, _ = run_json("verify", path, code=1)
    assert document["files"][0]["damaged"] == ["t"]


def test_verify_needs_its_files(run, path, tmp_path):
    save_model(path)
    assert run("verify", path, tmp_path / "none") == (
        2,
        "",
        f"fastsd: {tmp_path}/none: No such file or directory\n",
    )
    (tmp_path / "text").write_text("hello")
    code, _, err = run("verify", tmp_path / "text")
    assert code == 1
    assert err.startswith(f"fastsd: {tmp_path}/text: ")


# ---- diff ----


def test_diff(run, run_json, path, tmp_path):
    state = save_model(path)
    assert run("diff", path, path) == (
        0,
        "equal: 68 tensors in both, 68 bit-identical, 0 different\n",
        "",
    )
    other = tmp_path / "other"
    changed = {name: tensor.clone() for name, tensor in state.items() if name != "t"}
    changed["embed.weight"][0, 0] += 0.5
    changed["head.weight"] = changed["head.weight"].double()
    changed["new"] = torch.ones(1)
    fastsd.save(changed, other)
    code, out, err = run("diff", path, other)
    assert (code, err) == (1, "")
    assert f"only in {path}: 1 tensor\n  t\n" in out
    assert f"only in {other}: 1 tensor\n  new\n" in out
    assert re.search(
        r"^embed\.weight +float32 +\[10, 4\] +1 +0\.5 +0\.0125 +as float64$", out, re.M
    )
    assert re.search(r"^head\.weight +float32 / float64 .* as float64, equal$", out, re.M)
    assert "different: 67 tensors in both, 65 bit-identical, 2 different, 2 in one alone\n" in out
    document, _ = run_json("diff", path, other, code=1)
    assert (document["equal"], document["only_a"], document["only_b"]) == (False, ["t"], ["new"])
    assert document["different"] == ["embed.weight", "head.weight"]
    found = {tensor["name"]: tensor for tensor in document["tensors"]}["embed.weight"]
    gap = (state["embed.weight"].double() - changed["embed.weight"].double()).abs()
    assert found["max_abs"] == gap.max().item()
    assert found["mean_abs"] == pytest.approx(gap.mean().item())
    assert (found["differing"], found["elements"]) == (1, 40)


def test_diff_tolerance_and_names(run, path, tmp_path):
    fastsd.save({"module.x": torch.ones(3)}, path)
    other = tmp_path / "other"
    fastsd.save({"y": torch.full((3,), 1.01)}, other)
    names = ("--strip-prefix", "module.", "--rename", "x=y")
    assert run("diff", path, other)[0] == 1
    assert run("diff", path, other, *names)[0] == 1
    code, out, _ = run("diff", path, other, *names, "--rtol", "0.1")
    assert code == 0
    assert "as float64, within tolerance\n" in out
    assert run("diff", path, other, *names, "--atol", "0.1")[0] == 0
    fastsd.save({"y": torch.ones(3).half()}, other)
    assert run("diff", path, other, *names)[0] == 1
    assert run("diff", path, other, *names, "--ignore-dtypes")[0] == 0


def test_diff_shows_the_first_of_many(run, path, tmp_path):
    fastsd.save({f"x{i}": torch.ones(1) for i in range(60)}, path)
    other = tmp_path / "other"
    fastsd.save({f"x{i}": torch.zeros(1) for i in range(60)}, other)
    _, out, _ = run("diff", path, other)
    assert "  and 10 more (--all shows them)\n" in out
    assert "x59" not in out
    assert "x59" in run("diff", path, other, "--all")[1]
    fastsd.save({}, other)
    assert "x59" not in run("diff", path, other)[1]
    assert "x59" in run("diff", path, other, "--all")[1]


def test_diff_of_nonfinite_values_is_json(run_json, path, tmp_path):
    fastsd.save({"x": torch.tensor([float("nan"), float("inf"), 1e308], dtype=torch.float64)}, path)
    other = tmp_path / "other"
    fastsd.save({"x": torch.tensor([1, -float("inf"), -1e308], dtype=torch.float64)}, other)
    found = run_json("diff", path, other, code=1)[0]["tensors"][0]
    assert (found["differing"], found["nonfinite"], found["max_abs"]) == (3, 3, None)


def test_diff_in_trouble(run, path, tmp_path):
    save_model(path)
    code, out, err = run("diff", path, tmp_path / "none")
    assert (code, out) == (2, "")
    assert err == f"fastsd: {tmp_path}/none: No such file or directory\n"
    code, _, err = run("diff", path, path, "--rename", "t=step")
    assert code == 2
    assert re.fullmatch(rf"fastsd: {path}: rename makes .*\n", err)


# ---- Texts from files ----


@pytest.mark.parametrize("command", ["inspect", "inspect --flat", "diff", "verify", "json"])
@pytest.mark.parametrize("terminal_columns", [False, True])
def test_hostile_texts_are_made_harmless(run, tmp_path, on_terminal, command, terminal_columns):
    folder = tmp_path / "\x1b[2J\u202e[red]"
    folder.mkdir()
    path, other = folder / "a", folder / "b"
    tied = torch.ones(3)
    state = {HOSTILE: tied, f"{HOSTILE}.2": tied}
    fastsd.save(state, path, metadata={HOSTILE: HOSTILE})
    fastsd.save({f"{HOSTILE}.2": torch.zeros(3)}, other)
    damage(other)
    if terminal_columns:
        on_terminal()
    argv = {
        "diff": ("diff", path, other),
        "verify": ("verify", folder),
        "json": ("inspect", "--json", path),
    }.get(command, (*command.split(), path))
    _, out, err = run(*argv)
    out = re.sub(r"\x1b\[[01]?m", "", out)  # the headings' own
    assert HARMLESS.fullmatch(out)
    assert HARMLESS.fullmatch(err)
    if command != "json":
        flat = re.sub(r"\s", "", out)
        assert "[red]" in flat
        assert "\\x1b[2J\\u202e" in flat
    if command in ("inspect", "inspect --flat", "diff"):
        assert ":smile:" in flat


def test_errors_are_harmless_too(run, tmp_path):
    code, _, err = run("inspect", tmp_path / HOSTILE.replace("\0", ""))
    assert code == 2
    assert len(err.splitlines()) == 1
    assert HARMLESS.fullmatch(err)


def test_paths_that_are_no_text(run, run_json, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    fastsd.save({"x": torch.ones(1)}, path)
    assert run("verify", tmp_path)[0] == 0
    assert run_json("inspect", path)[0]["files"][0]["path"] == path


# ---- The terminal ----


def test_columns_fit_the_terminal(run, path, on_terminal):
    save_model(path)
    fastsd.save({"x" * 100: torch.ones(2), "y": torch.ones(3)}, path)
    on_terminal()
    _, out, _ = run("inspect", "--flat", path)
    assert "\x1b[1m" in out
    plain = re.sub(r"\x1b\[\d*m", "", out)
    table = plain.split("\n\n")[1]
    assert max(map(len, table.splitlines())) <= 60
    assert "x" * 100 in re.sub(r"[^x]", "", table)


def test_no_color(run, path, on_terminal, monkeypatch):
    save_model(path)
    on_terminal()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[\d*3\dm", run("inspect", path)[1])


def test_without_rich(run, run_json, path, on_terminal, monkeypatch):
    save_model(path)
    for name in ("rich", "rich.console", "rich.table", "rich.text"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run("inspect", path)[0] == 0
    run_json("inspect", path)
    on_terminal()
    code, _, err = run("inspect", path)
    assert code == 2
    assert "fastsd: tables on a terminal need rich: pip install 'fastsd[cli]'" in err
    assert len(err.splitlines()) == 1


def test_progress_goes_to_stderr_where_it_is_asked_for(run, path, monkeypatch):
    save_model(path)
    clock = iter(range(10**6))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    quiet, out, err = run("diff", path, path)
    assert (quiet, err) == (0, "")
    code, same_out, err = run("diff", path, path, "--progress")
    assert (code, same_out) == (0, out)
    assert re.match(r"fastsd: \d+%, .* of .*/s\n", err)
    assert "\x1b" not in err
    assert "fastsd: 1 files, " in run("verify", path, "--progress")[2]
    monkeypatch.setattr(sys, "stderr", TerminalText(sys.stderr))
    assert run("diff", path, path)[2].endswith("\r\x1b[K")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1234567, "1.23 MB"), (999_999, "1 MB")],
)
def test_sizes(nbytes, text):
    assert terminal.format_bytes(nbytes) == text


# ---- How it ends ----


def test_the_script_is_installed():
    (script,) = entry_points(group="console_scripts", name="fastsd")
    assert script.load() is main


def test_help_and_version(run):
    assert run("--version") == (0, f"fastsd {fastsd.__version__}\n", "")
    for command in ("inspect", "verify", "diff"):
        code, out, _ = run(command, "--help")
        assert code == 0
        assert f"  fastsd {command} " in out
        assert "example" in out


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["unknown"],
        ["inspect"],
        ["diff", "a"],
        ["diff", "a", "b", "--rtol", "nan"],
        ["diff", "a", "b", "--atol", "-1"],
        ["diff", "a", "b", "--rename", "x"],
    ],
)
def test_bad_usage(run, argv):
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert "usage: fastsd" in err


def test_debug_shows_a_traceback(run, tmp_path):
    for command in (["inspect", "x"], ["verify", "x"], ["diff", "x", "x"]):
        argv = [command[0], *(tmp_path / name for name in command[1:])]
        assert "Traceback" not in run(*argv)[2]
        assert "Traceback" in run(*argv, "--debug")[2]


def test_what_nobody_expected_is_one_line(run, path, monkeypatch):
    save_model(path)

    def fail(*_):
        raise TypeError("surprise\nat once")

    monkeypatch.setattr(fastsd.Archive, "info", fail)
    code, _, err = run("diff", path, path)
    assert code == 2
    assert err == "fastsd: TypeError: surprise at once (--debug shows where)\n"


def test_interrupts(run, path, monkeypatch):
    save_model(path)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fastsd.Archive, "info", interrupt)
    assert run("inspect", path)[0] == 130
    assert run("diff", path, path) == (130, "", "")


def test_a_pipe_that_closes_is_no_error(path):
    fastsd.save({f"{'x' * 200}{i}": torch.ones(1) for i in range(2000)}, path)
    command = [sys.executable, "-m", "fastsd", "inspect", "--flat", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_stdout_of_any_encoding(path):
    fastsd.save({"größe": torch.ones(1), "x" * 300: torch.ones(1)}, path)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "fastsd", "inspect", str(path)]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"gr\xf6\xdfe" in done.stdout
