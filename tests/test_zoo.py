"""Whole zoos: what is converted, recorded, skipped, refused and reported."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import fastsd
from fastsd.zoo import (
    Options,
    Outcome,
    PoolEngine,
    RayEngine,
    StartError,
    convert_one,
    plan_zoo,
    run_plan,
)
from fastsd.zoo.engines import Advance, find_memory
from fastsd.zoo.manifest import MANIFEST_NAME, Manifest

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


class Bomb:
    """Unpickling it calls something."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def save_legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


class InlineEngine:
    """Converts in this process, and remembers what it was given."""

    def __init__(self):
        self.names = []

    def run(self, items):
        for item in items:
            self.names.append(item.name)
            yield Advance(item.name, 1)
            yield convert_one(item, lambda nbytes: None)


class Recorder:
    """A progress that adds up."""

    def __init__(self):
        self.total = self.done = 0
        self.finished = []

    def start(self, items, nbytes):
        self.items, self.total = items, nbytes

    def advance(self, nbytes):
        assert nbytes >= 0
        self.done += nbytes

    def finish(self, outcome):
        self.finished.append(outcome.name)


@pytest.fixture
def zoo(tmp_path):
    folder = tmp_path / "zoo"
    (folder / "a").mkdir(parents=True)
    torch.save(STATE, folder / "a/new.pth")
    save_legacy(STATE, folder / "old.pt")
    save_file(STATE, folder / "st.safetensors")
    (folder / "README.md").write_text("text")
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def run(zoo, out):
    """Runs the zoo through an engine; statuses by name, and the summary."""

    def run_zoo(engine=None, progress=None, root=None, **options):
        engine = engine or InlineEngine()
        plan = plan_zoo(root or zoo, out, Options(**options))
        summary = run_plan(plan, engine, progress)
        return {o.name: o.status for o in summary.outcomes}, summary

    return run_zoo


NAMES = ["a/new.pth", "old.pt", "st.safetensors"]


def assert_converted(*paths):
    for path in paths:
        state = fastsd.load(path)
        assert state.keys() == STATE.keys()
        assert all(torch.equal(state[name], STATE[name]) for name in STATE)


def read_manifest(out):
    return [json.loads(line) for line in (out / MANIFEST_NAME).read_text().splitlines()]


def test_converts_all_there_is(run, zoo, out):
    progress = Recorder()
    statuses, summary = run(progress=progress)
    assert statuses == dict.fromkeys(NAMES, "done")
    assert summary.exit_code == 0
    assert_converted(out / "a/new.fsd", out / "old.fsd", out / "st.fsd")
    assert sorted(progress.finished) == NAMES
    assert progress.done == progress.total == sum((zoo / n).stat().st_size for n in NAMES)
    assert sorted(p.name for p in out.rglob("*.*")) == [
        MANIFEST_NAME, "new.fsd", "old.fsd", "st.fsd",
    ]  # fmt: skip


def test_manifest_says_what_was_done(run, zoo, out):
    run()
    records = read_manifest(out)
    assert [r["name"] for r in records] == NAMES
    record = records[0]
    source, target = zoo / "a/new.pth", out / "a/new.fsd"
    status = source.stat()
    assert record["pieces"] == [["a/new.pth", status.st_size, str(status.st_mtime_ns)]]
    assert record["source_crc32c"] == fastsd._core.crc32c(source.read_bytes())
    assert record["target"] == str(target)
    assert record["target_nbytes"] == target.stat().st_size
    assert record["target_crc32c"] == fastsd._core.crc32c(target.read_bytes())
    assert record["options"]["to"] == "fsd"
    assert record["torch"] == torch.__version__


def test_a_second_run_skips_what_is_done(run):
    run()
    engine, progress = InlineEngine(), Recorder()
    statuses, summary = run(engine, progress)
    assert statuses == dict.fromkeys(NAMES, "skipped")
    assert (engine.names, progress.total, summary.exit_code) == ([], 0, 0)


def change_source(zoo, out):
    torch.save({**STATE, "more": torch.ones(1)}, zoo / "old.pt")


def change_source_but_not_its_size(zoo, out):
    text = (zoo / "old.pt").read_bytes()
    (zoo / "old.pt").write_bytes(text[:-1] + bytes([text[-1] ^ 1]))


def lose_target(zoo, out):
    (out / "old.fsd").unlink()


def change_target(zoo, out):
    fastsd.save({}, out / "old.fsd")


@pytest.mark.parametrize(
    "change", [change_source, change_source_but_not_its_size, lose_target, change_target]
)
def test_what_has_changed_is_done_again(run, zoo, out, change):
    run()
    change(zoo, out)
    engine = InlineEngine()
    statuses, _ = run(engine)
    assert engine.names == ["old.pt"]
    assert statuses["old.pt"] == "done"
    assert statuses["a/new.pth"] == "skipped"


def test_a_source_that_only_looks_newer_is_not_done_again(run, zoo):
    run()
    os.utime(zoo / "old.pt", (1, 1))
    engine = InlineEngine()
    run(engine)
    assert engine.names == []


def test_other_options_do_it_again(run):
    run()
    assert set(run(metadata={"by": "me"})[0].values()) == {"done"}
    assert set(run(metadata={"by": "me"}, trust=True)[0].values()) == {"skipped"}


def test_a_torn_line_is_ignored_and_not_written_to(run, out):
    run()
    with (out / MANIFEST_NAME).open("ab") as file:
        file.truncate(file.tell() - 30)
    engine = InlineEngine()
    run(engine)
    assert engine.names == ["st.safetensors"]
    engine = InlineEngine()
    run(engine)
    assert engine.names == []


@pytest.mark.parametrize("line", [b"{}", b"3", b'{"name": []}', b"\xff\0", b"[" * 99999])
def test_lines_that_are_no_records(run, out, line):
    run()
    with (out / MANIFEST_NAME).open("ab") as file:
        file.write(line + b"\n")
    assert set(run()[0].values()) == {"skipped"}


def test_goes_on_past_bad_files(run, zoo, out):
    whole = (zoo / "a/new.pth").read_bytes()
    (zoo / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (zoo / "lfs.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (zoo / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x"}}')
    progress = Recorder()
    statuses, summary = run(progress=progress)
    failed = {name for name, status in statuses.items() if status == "failed"}
    assert failed == {"cut.pth", "lfs.pth", "model.safetensors.index.json"}
    assert summary.exit_code == 1
    assert all(o.reason and "\n" not in o.reason for o in summary.select("failed"))
    assert progress.done == progress.total
    assert_converted(out / "a/new.fsd", out / "old.fsd", out / "st.fsd")
    assert not (out / "cut.fsd").exists()
    assert run()[0] == {**dict.fromkeys(NAMES, "skipped"), **dict.fromkeys(failed, "failed")}


def test_reports_what_wants_to_be_unpickled_and_runs_none_of_it(run, zoo, out, tmp_path):
    target = tmp_path / "executed"
    bomb = {**STATE, "x": Bomb(os.mkdir, str(target))}
    torch.save(bomb, zoo / "zip.pth")
    save_legacy(bomb, zoo / "legacy.pth")
    (zoo / "plain.pkl").write_bytes(pickle.dumps(bomb))
    _, summary = run(to="safetensors")
    failed = {o.name: o for o in summary.select("failed")}
    assert failed.keys() == {"zip.pth", "legacy.pth", "plain.pkl"}
    assert all(outcome.wants_trust for outcome in failed.values())
    assert failed["legacy.pth"].wanted == ("posix.mkdir",)
    assert "posix.mkdir" in failed["plain.pkl"].wanted
    assert failed["zip.pth"].wanted == ("posix.mkdir",)
    assert failed["zip.pth"].reason == "it needs trust, to unpickle posix.mkdir"
    assert not target.exists()
    records = {r["name"]: r for r in read_manifest(out)}
    assert records["zip.pth"]["wanted"] == ["posix.mkdir"]


def test_carries_pickles_over_without_trust(run, zoo, out, tmp_path):
    target = tmp_path / "executed"
    torch.save({**STATE, "x": Bomb(os.mkdir, str(target))}, zoo / "zip.pth")
    assert run()[0]["zip.pth"] == "done"
    assert not target.exists()
    with pytest.raises(pickle.UnpicklingError):
        fastsd.load(out / "zip.fsd")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_directories(run, zoo, out):
    dcp.save(STATE, checkpoint_id=zoo / "run/step1")
    for name, tensor in STATE.items():
        save_file({name: tensor}, zoo / f"{name}.safetensors")
    weights = {name: f"{name}.safetensors" for name in STATE}
    (zoo / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    statuses, _ = run()
    assert statuses["run/step1"] == statuses["model.safetensors.index.json"] == "done"
    assert len(statuses) == len(NAMES) + 2
    assert_converted(out / "run/step1.fsd", out / "model.fsd")


def test_shards(run, out):
    assert set(run(max_shard_size=24)[0].values()) == {"done"}
    assert len(list((out / "st").glob("*.fsd"))) == 2
    assert_converted(out / "a/new", out / "old", out / "st")
    assert set(run(max_shard_size=24)[0].values()) == {"skipped"}
    (out / "st/model.fsd.index.json").unlink()
    assert run(max_shard_size=24)[0]["st.safetensors"] == "done"


ADAM = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
LAYOUTS = {
    "flat": (STATE, None),
    "timm": (
        {"arch": "x", "state_dict": STATE, "state_dict_ema": {}, "optimizer": ADAM},
        "state_dict",
    ),
    "lightning": (
        {"state_dict": STATE, "pytorch-lightning_version": "2", "optimizer_states": [ADAM]},
        "state_dict",
    ),
    "mmengine": ({"meta": {"epoch": 1}, "state_dict": STATE, "message_hub": {}}, "state_dict"),
    "detectron2": ({"model": STATE, "optimizer": ADAM, "iteration": 3}, "model"),
    "training": ({"epoch": 3, "net": STATE, "optimizer": ADAM}, "net"),
}  # fmt: skip


@pytest.mark.parametrize("to", ["fsd", "pth", "safetensors"])
def test_weights_of_known_layouts(run, zoo, out, to):
    for name in NAMES:
        (zoo / name).unlink()
    for name, (checkpoint, _) in LAYOUTS.items():
        torch.save(checkpoint, zoo / f"{name}.ckpt")
    run(to=to, pick="auto", verify=True)
    records = {r["name"].removesuffix(".ckpt"): r for r in read_manifest(out)}
    assert {n: (r["outcome"], r["reason"]) for n, r in records.items()} == dict.fromkeys(
        LAYOUTS, ("done", "")
    )
    found = {name: (r["layout"], r["picked"], r["verified"]) for name, r in records.items()}
    assert found == {name: (name, pick, True) for name, (_, pick) in LAYOUTS.items()}
    assert any("optimizer" in key for key in records["timm"]["dropped"])
    assert_converted(*(out / f"{name}.{to}" for name in LAYOUTS))


def test_layouts_that_need_trust(zoo, out):
    torch.manual_seed(0)
    module = torch.nn.Linear(2, 3)
    torch.save({"model": module, "ema": None, "train_args": {}, "epoch": 3}, zoo / "yolo.pt")
    arrays = {name: tensor.numpy() for name, tensor in STATE.items()}
    caffe2 = {"model": arrays, "__author__": "me", "matching_heuristics": True}
    (zoo / "detectron.pkl").write_bytes(pickle.dumps(caffe2))
    items = {i.name: i for i in plan_zoo(zoo, out, Options("safetensors", pick="auto")).items}
    for name in ("yolo.pt", "detectron.pkl"):
        outcome = convert_one(items[name])
        assert (outcome.status, outcome.wants_trust) == ("failed", True)
        assert outcome.wanted
    outcomes = {n: convert_one(replace(items[n], trusted=True)) for n in items}
    assert {n: o.reason for n, o in outcomes.items()} == dict.fromkeys(items, "")
    layouts = {n: (o.report.layout, o.report.picked) for n, o in outcomes.items()}
    assert layouts["yolo.pt"] == ("ultralytics", "model")
    assert layouts["detectron.pkl"] == ("detectron2", "model")
    assert_converted(out / "detectron.safetensors")
    assert torch.equal(fastsd.load(out / "yolo.safetensors")["weight"], module.weight)


def test_leftovers_of_a_killed_run_are_cleaned(run, out):
    run()
    for name in (".fastsd-12345678.tmp", "a/.fastsd-12345678.tmp", ".fastsd-fetched/x/y.pth"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"torn")
    (out / "a/.other").write_bytes(b"")
    run()
    assert sorted(p.name for p in out.rglob(".*")) == [".other"]


def test_one_run_at_a_time(run, out):
    with Manifest(str(out)), pytest.raises(StartError, match="another run"):
        run()
    run()


def test_the_output_needs_a_place(zoo, out):
    with pytest.raises(StartError, match="directory of its own"):
        run_plan(plan_zoo(zoo, zoo, Options()), InlineEngine())
    out.write_bytes(b"a file")
    with pytest.raises(StartError):
        run_plan(plan_zoo(zoo, out, Options()), InlineEngine())


def test_a_source_that_changes_meanwhile(zoo, out):
    plan = plan_zoo(zoo, out, Options())
    os.utime(zoo / "old.pt", (1, 1))
    (outcome,) = run_plan(plan, InlineEngine()).select("failed")
    assert (outcome.name, outcome.reason) == (
        "old.pt", "it changed while it was converted: run again",
    )  # fmt: skip


@pytest.fixture
def memory_url(zoo):
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    files.put(str(zoo), "/zoo", recursive=True)
    yield "memory://zoo"
    files.rm("/zoo", recursive=True)


def test_urls_are_fetched_and_leave_nothing(run, out, memory_url):
    statuses, _ = run(root=memory_url)
    assert statuses == dict.fromkeys(NAMES, "done")
    assert_converted(out / "a/new.fsd", out / "old.fsd", out / "st.fsd")
    assert not list(out.glob(".*"))
    assert read_manifest(out)[0]["root"] == memory_url
    assert set(run(root=memory_url)[0].values()) == {"skipped"}


# ---- The pool ----


def test_pool(run, zoo, out, tmp_path):
    """Good files, one that kills its process, and one that is trusted: each in its own place."""
    target = tmp_path / "executed"
    save_legacy({**STATE, "x": Bomb(os.mkdir, str(target))}, zoo / "trusted.pth")
    (zoo / "deadly.pkl").write_bytes(pickle.dumps(Bomb(os.kill, Self(), signal.SIGKILL)))
    progress = Recorder()
    statuses, summary = run(PoolEngine(jobs=2), progress, trust=True)
    failed = {o.name: o.reason for o in summary.select("failed")}
    assert failed.keys() == {"deadly.pkl"}
    assert "killed" in failed["deadly.pkl"]
    assert statuses == {
        **dict.fromkeys([*NAMES, "trusted.pth"], "done"),
        **dict.fromkeys(failed, "failed"),
    }
    assert target.exists()
    assert_converted(out / "a/new.fsd", out / "old.fsd", out / "st.fsd")
    assert progress.done == progress.total
    records = {r["name"]: r for r in read_manifest(out)}
    assert records["deadly.pkl"]["outcome"] == "failed"


class Self:
    """Unpickles as the number of the process that unpickles it."""

    def __reduce__(self):
        return os.getpid, ()


def test_pool_with_little_memory_takes_one_at_a_time(run, monkeypatch):
    engine = PoolEngine(jobs=4, memory=1)
    most = 0
    collect = PoolEngine._collect

    def count(self):
        nonlocal most
        most = max(most, len(self._busy()))
        return collect(self)

    monkeypatch.setattr(PoolEngine, "_collect", count)
    assert set(run(engine)[0].values()) == {"done"}
    assert most == 1


def test_pool_within_its_disk(run, out, zoo):
    pytest.importorskip("fsspec")
    smallest = min((zoo / name).stat().st_size for name in NAMES)
    statuses, summary = run(PoolEngine(jobs=1, disk=smallest), root=f"file://{zoo}")
    assert sorted(statuses.values()) == ["done", "failed", "failed"]
    assert all("allowed" in o.reason for o in summary.select("failed"))
    assert not list(out.glob(".*"))


def test_memory_there_is():
    assert 0 < find_memory() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_an_engine_that_is_closed_stops_its_processes(zoo, out):
    events = PoolEngine(jobs=1).run(plan_zoo(zoo, out, Options()).items)
    assert isinstance(next(e for e in events if isinstance(e, Outcome)), Outcome)
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    before = children.read_text().split()
    events.close()
    assert len(children.read_text().split()) < len(before)


KILLED = """
import sys
from fastsd.zoo import Options, PoolEngine, plan_zoo, run_plan
if __name__ == "__main__":
    run_plan(plan_zoo(sys.argv[1], sys.argv[2], Options()), PoolEngine(jobs=1))
"""


def test_resumes_after_a_kill(run, zoo, out, tmp_path):
    for i in range(200):
        torch.save(STATE, zoo / f"{i}.pth")
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    process = subprocess.Popen([sys.executable, str(script), str(zoo), str(out)])
    manifest = out / MANIFEST_NAME
    deadline = time.monotonic() + 60
    while not (manifest.exists() and manifest.stat().st_size):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    engine = InlineEngine()
    statuses, _ = run(engine)
    assert set(statuses.values()) == {"done", "skipped"}
    assert 0 < len(engine.names) < 203
    assert [n for n, s in statuses.items() if s == "done"] == engine.names
    assert_converted(*(out / f"{i}.fsd" for i in range(200)))


# ---- Ray ----


@pytest.mark.filterwarnings("default")  # Ray's own
def test_ray(run, zoo, out, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    target = tmp_path / "executed"
    for name in NAMES[1:]:
        (zoo / name).unlink()
    save_legacy({**STATE, "x": Bomb(os.mkdir, str(target))}, zoo / "trusted.pth")
    (zoo / "quits.pkl").write_bytes(pickle.dumps(Bomb(os._exit, 3)))
    progress = Recorder()
    statuses, summary = run(RayEngine(jobs=2), progress, trust=True)
    assert statuses == {"a/new.pth": "done", "quits.pkl": "failed", "trusted.pth": "done"}
    assert summary.exit_code == 1
    assert target.exists()
    assert progress.done == progress.total
    assert_converted(out / "a/new.fsd")
    assert {r["name"] for r in read_manifest(out)} == statuses.keys()
    assert run(trust=True)[0]["a/new.pth"] == "skipped"
