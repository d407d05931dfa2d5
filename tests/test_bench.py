"""`fastsd bench`: it measures what it says, a process each, and names what it cannot."""

import json
import mmap
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastsd
from fastsd.bench import (
    Settings,
    Synthetic,
    cache,
    child,
    contenders,
    models,
    plot,
    process,
    report,
    results,
    run,
    runner,
)
from fastsd.bench.contenders import CONTENDERS, find_contender, find_contenders
from fastsd.bench.machine import file_system
from fastsd.bench.memory import touch
from fastsd.bench.results import Limit, Times, find_limit
from fastsd.cli import main

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture
def state():
    return {"a.weight": torch.randn(64, 33), "a.bias": torch.randn(7), "n": torch.tensor(3)}


def write_pages(path, pages=64):
    path.write_bytes(os.urandom(pages * mmap.PAGESIZE))
    return path


def on_disk(path):
    """Skips where the page cache is all there is."""
    if file_system(path) in ("tmpfs", "ramfs", "overlay", "unknown"):
        pytest.skip("needs a disk")


# ---- Numbers ----


def test_percentiles_interpolate():
    assert Times.of([]) is None
    assert Times.of([0.25]) == Times(250, 250, 250)
    times = Times.of([i / 1000 for i in reversed(range(101))])
    assert (times.p50, times.p90, times.p99) == pytest.approx((50, 90, 99))
    times = Times.of([0.004, 0.001, 0.003, 0.002])
    assert (times.p50, times.p90) == pytest.approx((2.5, 3.7))


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (1_234_567_890, "1.23 GB")],
)
def test_sizes_have_three_digits(nbytes, text):
    assert results.format_size(nbytes) == text


LIMITS = (
    Limit("memcpy", "", 10.0),
    Limit("pread", "", 8.0),
    Limit("map", "", 9.0),
    Limit("write", "", 2.0),
    Limit("H2D cuda:0", "", 50.0),
    Limit("D2H cuda:0", "", 1.0),
    Limit("direct", "", 6.0),
)


@pytest.mark.parametrize(
    ("work", "device", "warmth", "is_dropped", "name"),
    [
        ("load", "cpu", "warm", True, "map"),
        ("load", "cpu", "cold", True, "direct"),
        ("load", "cpu", "cold", False, "map"),
        ("load", "cuda:0", "warm", True, "H2D cuda:0"),
        ("load", "cuda:0", "cold", True, "direct"),
        ("save", "cpu", "", True, "write"),
        ("save", "cuda:0", "", True, "D2H cuda:0"),
    ],
)
def test_the_slowest_way_binds(work, device, warmth, is_dropped, name):
    assert find_limit(LIMITS, work, device, warmth, is_dropped).name == name


def test_a_bus_slower_than_the_disk_binds_cold_loads():
    limits = (Limit("H2D cuda:0", "", 5.0), Limit("direct", "", 6.0))
    assert find_limit(limits, "load", "cuda:0", "cold", True).name == "H2D cuda:0"


def test_the_faster_way_from_the_disk_binds_cold_loads():
    limits = (*LIMITS, Limit("readahead", "", 7.0))
    assert find_limit(limits, "load", "cpu", "cold", True).name == "readahead"
    assert find_limit(limits, "load", "cpu", "warm", True).name == "map"


def test_a_limit_that_was_not_found_binds_nothing():
    limits = (*LIMITS[:-1], Limit("direct", "not on this file system", None))
    assert find_limit(limits, "load", "cpu", "cold", True) is None
    assert find_limit((), "load", "cpu", "warm", True) is None


# ---- The page cache ----


def test_a_dropped_file_is_out_of_the_cache(tmp_path):
    on_disk(tmp_path)
    path = write_pages(tmp_path / "x")
    cache.warm_file(path)
    assert cache.find_resident(path) == 1.0
    assert cache.drop_file(path) == ""
    assert cache.find_resident(path) < 0.5


def test_a_file_that_somebody_has_mapped_is_not_called_cold(tmp_path):
    on_disk(tmp_path)
    path = write_pages(tmp_path / "x")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        assert sum(memory[:: mmap.PAGESIZE]) >= 0
        assert re.fullmatch(r"not cold: \d+% stayed in the cache", cache.drop_file(path))


@pytest.mark.skipif(file_system(Path("/dev/shm")) != "tmpfs", reason="there is no tmpfs")
def test_tmpfs_is_never_called_cold():
    path = Path(f"/dev/shm/fastsd-test-{os.getpid()}")
    try:
        write_pages(path)
        assert cache.drop_file(path) == "not cold: 100% stayed in the cache"
    finally:
        path.unlink()


def test_an_empty_file_has_no_pages(path):
    path.write_bytes(b"")
    assert cache.find_resident(path) == 0.0


def test_touching_reads_every_page(tmp_path):
    on_disk(tmp_path)
    state = {f"w{i}": torch.randn(100_000 + i) for i in range(20)}
    path = tmp_path / "x.fsd"
    fastsd.save(state, path)
    assert cache.drop_file(path) == ""
    loaded = fastsd.load(path)
    touch(loaded.values())
    assert cache.find_resident(path) == 1.0


def test_touching_takes_tensors_of_every_form():
    odd = torch.arange(23, dtype=torch.uint8)[3:]
    touch(
        [torch.ones(()), torch.ones(0), odd, torch.ones(4, 5).t(), torch.ones(3, dtype=torch.bool)]
    )
    touch([])
    touch([torch.ones(3 << 20), torch.ones(1, requires_grad=True)])


# ---- Models ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("nbytes", "count"), [(10_000_000, 300), (1_000_000, 1), (4096, 50), (9, 20)]
)
def test_made_up_weights_have_the_size_that_was_asked_for(nbytes, count, dtype):
    state = models.make_state(Synthetic(nbytes, count, dtype))
    assert len(state) == count
    assert {tensor.dtype for tensor in state.values()} == {dtype}
    wanted = max(nbytes // dtype.itemsize, count) * dtype.itemsize
    assert sum(tensor.nbytes for tensor in state.values()) == wanted


def test_made_up_weights_have_large_and_small_tensors_of_random_bits():
    state = models.make_state(Synthetic(40_000_000))
    sizes = sorted(tensor.nbytes for tensor in state.values())
    assert sizes[-1] > 100 * sizes[0]
    big = state["layers.0.mlp.up.weight"].flatten().view(torch.uint8)
    assert 120 < big.double().mean() < 135
    assert len(big.unique()) == 256


@pytest.mark.parametrize("suffix", ["fsd", "safetensors", "pth"])
def test_a_given_file_is_measured_itself_and_converted_for_others(tmp_path, state, suffix):
    path = tmp_path / f"model.{suffix}"
    fastsd.save(state, path, format=suffix)
    with models.open_models([path], None, {"fsd", "safetensors", "pth"}) as (model,):
        assert model.files[suffix] == path
        assert (model.tensors, model.nbytes) == (3, 64 * 33 * 4 + 28 + 8)
        for file in model.files.values():
            assert all(torch.equal(tensor, state[k]) for k, tensor in fastsd.load(file).items())
    assert os.listdir(tmp_path) == [path.name]


def test_of_a_checkpoint_all_formats_get_the_same_part(tmp_path, state):
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": state, "epoch": 3}, path)
    with models.open_models([path], None, {"fsd", "safetensors", "pth"}) as (model,):
        assert model.notes == ("only 'state_dict' of the file",)
        for file in model.files.values():
            assert fastsd.load(file).keys() == state.keys()


def test_only_the_formats_that_are_read_are_made(tmp_path, state):
    fastsd.save(state, tmp_path / "x.fsd")
    with models.open_models([tmp_path / "x.fsd"], tmp_path, {"fsd"}) as (model,):
        assert "pth" not in model.files


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    class Usage:
        free = 1000

    monkeypatch.setattr(models.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(OSError, match="are needed for the weights in every format"):
        run([Synthetic(10_000)], Settings(("cpu",)), tmp_path)
    assert os.listdir(tmp_path) == []


def test_weights_that_safetensors_cannot_hold_are_refused(tmp_path):
    torch.save({"a": {"b": [1, 2]}}, tmp_path / "x.pth")
    with pytest.raises(fastsd.UnsupportedError):
        run([tmp_path / "x.pth"], Settings(("cpu",)), tmp_path)
    assert os.listdir(tmp_path) == ["x.pth"]


# ---- Contenders ----


def test_contenders_have_keys_of_their_own():
    assert len({contender.key for contender in CONTENDERS}) == len(CONTENDERS)
    assert {c.format for c in CONTENDERS} <= {*models.CONVERTED, models.PACKED}


def test_who_is_not_installed_is_named_with_the_reason(monkeypatch):
    monkeypatch.setattr(contenders, "find_version", lambda package: None)
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: None)
    (flashpack,) = find_contenders(["flashpack"])
    assert flashpack.find_lack("cpu") == "flashpack is not installed"


def test_who_loads_to_gpus_only_is_named_with_the_reason(monkeypatch):
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: object())
    (who,) = find_contenders(["InstantTensor"])
    assert who.find_lack("cpu") == "it does not load to cpu"
    assert who.find_lack("cuda:1") == ""


def test_a_contender_that_nobody_knows():
    with pytest.raises(
        ValueError, match="no contender is called 'turbo'; there are: fastsd, torch"
    ):
        find_contenders(["fastsd", "turbo"])


# ---- What a child does, here ----


def load_here(tmp_path, reference, file, key="fastsd fsd", **options):
    options = {"cache": "warm", "repeat": 2, "seconds": None, **options}
    paths = {"path": str(tmp_path / file), "reference": str(tmp_path / reference)}
    return list(child.load(contender=key, device="cpu", **paths, **options))


@pytest.mark.parametrize("key", [c.key for c in CONTENDERS if not c.find_lack("cpu")])
@pytest.mark.parametrize("warmth", ["warm", "cold"])
def test_loads_are_timed_until_the_call_and_until_all_is_there(tmp_path, state, key, warmth):
    format = find_contender(key).format
    if format == models.PACKED:
        pytest.skip("made by its own library, in a process")
    fastsd.save(state, tmp_path / "x.fsd")
    fastsd.save(state, tmp_path / f"y.{format}", format=format)
    samples = load_here(tmp_path, "x.fsd", f"y.{format}", key, cache=warmth)
    assert len(samples) == 3
    assert all(0 < sample["call"] <= sample["ready"] for sample in samples)


def test_repeats_end_with_the_time_but_there_is_one(tmp_path, state):
    fastsd.save(state, tmp_path / "x.fsd")
    assert len(load_here(tmp_path, "x.fsd", "x.fsd", repeat=100, seconds=0.0)) == 2


def test_a_loader_that_gives_other_weights_has_failed(tmp_path, state):
    fastsd.save(state, tmp_path / "x.fsd")
    other = state | {"a.bias": state["a.bias"] + 1}
    fastsd.save(other, tmp_path / "y.fsd")
    with pytest.raises(ValueError, match=r"differs from what was saved: a\.bias"):
        load_here(tmp_path, "x.fsd", "y.fsd")
    del other["a.bias"]
    fastsd.save(other, tmp_path / "y.fsd")
    with pytest.raises(ValueError, match=r"lacks 1 tensors, such as a\.bias"):
        load_here(tmp_path, "x.fsd", "y.fsd")


def test_one_name_of_tied_weights_is_enough(tmp_path, state):
    fastsd.save(state | {"tied": state["a.weight"]}, tmp_path / "x.fsd")
    fastsd.save(state, tmp_path / "y.fsd")
    assert len(load_here(tmp_path, "x.fsd", "y.fsd")) == 3


@pytest.mark.parametrize("key", [c.key for c in CONTENDERS if c.save and not c.find_lack("cpu")])
def test_saves_are_timed_and_leave_nothing(tmp_path, state, key):
    fastsd.save(state, tmp_path / "x.fsd")
    paths = {"path": str(tmp_path / "saved"), "reference": str(tmp_path / "x.fsd")}
    samples = child.save(contender=key, device="cpu", repeat=2, seconds=None, **paths)
    assert all(sample["ready"] > 0 for sample in samples)
    assert os.listdir(tmp_path) == ["x.fsd"]


def test_limits_are_measured(tmp_path):
    path = write_pages(tmp_path / "x", 600)
    task = {"path": str(path), "devices": ["cpu"], "scratch": str(tmp_path / "limit")}
    found = {limit["name"]: limit["gb_per_s"] for limit in child.measure_limits(**task)}
    assert set(found) == {"memcpy", "pread", "map", "write", "direct", "readahead"}
    assert all(found[name] > 0 for name in ("memcpy", "pread", "map", "write"))
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_loads_saves_and_limits_of_a_gpu(tmp_path, state):
    fastsd.save(state, tmp_path / "x.fsd")
    files = {"path": str(tmp_path / "x.fsd"), "reference": str(tmp_path / "x.fsd")}
    options = {"contender": "fastsd fsd", "device": "cuda:0", "repeat": 2, "seconds": None}
    assert len(list(child.load(**options, **files, cache="cold"))) == 3
    files["path"] = str(tmp_path / "y.fsd")
    assert len(list(child.save(**options, **files))) == 3
    path = write_pages(tmp_path / "z", 600)
    task = {"path": str(path), "devices": ["cuda:0"], "scratch": None}
    found = {limit["name"]: limit["gb_per_s"] for limit in child.measure_limits(**task)}
    assert found["H2D cuda:0"] > 0
    assert found["D2H cuda:0"] > 0


# ---- Processes ----


@pytest.fixture
def child_code(monkeypatch):
    """Stands in for what children run, without what takes long to import."""

    def use(code):
        head = "import json, os, sys, time\ntask, pipe = {task!r}, os.fdopen({descriptor}, 'w')\n"
        monkeypatch.setattr(process, "_CODE", head + code)

    return use


def test_a_child_tells_values_and_prints_to_nobody(child_code, capfd):
    child_code("print('noise', flush=True); pipe.write('{{\"value\": 1}}\\n'); pipe.flush()")
    assert list(process.run_child({})) == [1]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        (
            "message = {{'error': 'Oh: no', 'is_import': False}}\n"
            "pipe.write(json.dumps(message) + '\\n'); pipe.flush(); sys.exit(1)",
            "^Oh: no$",
        ),
        ("os.kill(os.getpid(), 11)", "^ended by SIGSEGV$"),
        ("os.kill(os.getpid(), 9)", "^ended by SIGKILL$"),
        ("sys.exit('no such luck')", "^ended with code 1: no such luck$"),
        ("os._exit(3)", "^ended with code 3: it said nothing$"),
    ],
)
def test_a_child_that_fails_or_dies_says_how(child_code, code, complaint):
    child_code(code)
    with pytest.raises(process.ChildError, match=complaint):
        list(process.run_child({}))


def test_a_child_that_hangs_is_ended(child_code):
    child_code("time.sleep(3600)")  # whoever waits for it is found out
    with pytest.raises(process.ChildError, match=r"stopped after 0\.5 s without an end"):
        list(process.run_child({}, 0.5))


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_nothing_of_a_child_outlives_the_interest_in_it(child_code):
    child_code(
        "import subprocess; other = subprocess.Popen(['sleep', '3600'])\n"
        "pipe.write(json.dumps({{'value': [os.getpid(), other.pid]}}) + '\\n'); pipe.flush()\n"
        "time.sleep(3600)"
    )
    told = process.run_child({})
    pids = next(told)
    assert all(map(is_alive, pids))
    told.close()  # as at Ctrl-C
    end = time.monotonic() + 60
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(map(is_alive, pids))


# ---- Runs ----


@pytest.fixture
def fake(monkeypatch):
    """Stands in for children: answers by contender, and keeps the tasks that it was given."""
    tasks = []

    def answer(task, timeout=None):
        tasks.append(task)
        if task["do"] == "limits":
            yield from ({"name": n.name, "how": n.how, "gb_per_s": n.gb_per_s} for n in LIMITS)
        elif task["contender"] == "torch pth":
            raise process.ChildError("ended by SIGSEGV")
        else:
            yield {"call": 0.5, "ready": 1.0, "cache": ""}
            yield {"call": 0.001, "ready": 0.002, "cache": ""}

    monkeypatch.setattr(runner, "run_child", answer)
    monkeypatch.setattr(models, "run_child", answer)
    answer.tasks = tasks
    return answer


def run_faked(tmp_path, **options):
    who = find_contenders(["fastsd", "torch", "InstantTensor"])
    settings = Settings(**{"devices": ("cpu",), "repeat": 1, "contenders": who, **options})
    return run([Synthetic(1_000_000, 10)], settings, tmp_path)


def find(document, contender, cache="warm", work="load"):
    (result, *_) = (
        r for r in document.results if (r.contender, r.cache, r.work) == (contender, cache, work)
    )
    return result


def test_one_that_fails_is_a_row_and_not_the_end(tmp_path, fake):
    document = run_faked(tmp_path)
    assert document.has_failed
    failed = find(document, "torch")
    assert (failed.status, failed.reason, failed.ready) == ("failed", "ended by SIGSEGV", None)
    fastsd_row = find(document, "fastsd")
    assert (fastsd_row.status, fastsd_row.first, fastsd_row.call.p50) == ("measured", 1000.0, 1.0)
    assert fastsd_row.gb_per_s == pytest.approx(0.5)
    assert (fastsd_row.limit, fastsd_row.percent) == ("map", pytest.approx(100 * 0.5 / 9))
    assert find(document, "fastsd", "cold").limit == "direct"
    assert find(document, "InstantTensor").status == "skipped"
    assert os.listdir(tmp_path) == []


def test_when_the_time_is_over_the_rest_is_named(tmp_path, fake, monkeypatch):
    document = run_faked(tmp_path, seconds=0)
    reasons = {r.reason for r in document.results if r.contender != "InstantTensor"}
    assert reasons == {"the time was over"}
    assert not document.has_failed
    assert any("the time was over" in line for line in report.list_remarks(document))


def test_who_matters_most_is_measured_first_and_loads_before_saves(tmp_path, fake):
    document = run_faked(tmp_path, saves=True)
    order = [(task["do"], task["contender"]) for task in fake.tasks if task["do"] != "limits"]
    ours = [("load", f"fastsd {format}") for format in ("fsd", "safetensors", "pth")]
    rest = [("load", "torch pth")] * 2 + [("save", "torch pth")]
    assert order == [*ours, *ours, ("save", "fastsd fsd"), *rest]
    table = [(r.work, r.contender, r.cache) for r in document.results if r.contender == "torch"]
    assert table == [("load", "torch", "warm"), ("load", "torch", "cold"), ("save", "torch", "")]
    assert [r.contender for r in document.results][3] == "torch"  # the tables have their own order


def test_who_lacks_a_package_is_named_and_has_not_failed(tmp_path, monkeypatch):
    def answer(task, timeout=None):
        error = process.ChildError("ModuleNotFoundError: No module named 'humanize'")
        error.is_import = True
        raise error
        yield

    monkeypatch.setattr(runner, "run_child", answer)
    document = run_faked(tmp_path)
    assert find(document, "torch").status == "skipped"
    assert not document.has_failed
    assert any("No module named 'humanize'" in line for line in report.list_remarks(document))


def test_a_child_tells_a_failed_import_apart(monkeypatch):
    def fail():
        import no_such_package

        yield no_such_package

    monkeypatch.setitem(child._TASKS, "fail", fail)
    source, target = os.pipe()
    with pytest.raises(SystemExit):
        child.main({"do": "fail"}, target)
    told = json.loads(os.read(source, 1 << 16))
    os.close(source)
    assert told["is_import"]
    assert "no_such_package" in told["error"]


def test_time_is_shared_among_what_is_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    clock = runner._Clock(100)
    assert clock.share(10) == 10
    clock.note(whole=6, loads=2)  # what starting takes is not for loads
    now[0] = 10
    assert clock.share(9) == 6
    now[0] = 200
    assert clock.share(3) == 1
    assert runner._Clock(None).share(3) is None


def test_no_process_may_go_on_long_after_the_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    clock = runner._Clock(100)
    assert clock.timeout(5) == 65
    now[0] = 98
    assert clock.timeout(5) == 32
    now[0] = 200
    assert clock.timeout() == 30
    assert runner._Clock(None).timeout() == 60


def test_rounds_that_were_left_out_are_said(tmp_path, fake):
    assert find(run_faked(tmp_path, repeat=7), "fastsd").notes == ("1 of 7 rounds",)


def test_a_file_that_stays_in_the_cache_is_said_and_held_against_warm_limits(tmp_path, monkeypatch):
    def answer(task, timeout=None):
        if task["do"] == "limits":
            yield from ({"name": n.name, "how": n.how, "gb_per_s": n.gb_per_s} for n in LIMITS)
            return
        note = "not cold: 100% stayed in the cache"
        yield from [{"call": 0.1, "ready": 0.1, "cache": note}] * 2

    monkeypatch.setattr(runner, "run_child", answer)
    row = find(run_faked(tmp_path), "fastsd", "cold")
    assert (row.notes, row.limit) == (("not cold: 100% stayed in the cache",), "map")


def test_saves_are_measured_where_asked_for(tmp_path, fake):
    document = run_faked(tmp_path, saves=True)
    assert find(document, "fastsd", "", "save").limit == "write"
    assert {t["contender"] for t in fake.tasks if t["do"] == "save"} == {"fastsd fsd", "torch pth"}
    assert not any(r.work == "save" for r in run_faked(tmp_path).results)


def test_the_document_is_json_and_complete(tmp_path, fake):
    document = run_faked(tmp_path, saves=True).to_json()
    assert json.loads(json.dumps(document, allow_nan=False)) is not None
    assert set(document) == {"machine", "settings", "seconds", "models", "results"}
    assert {"processor", "cores", "memory", "kernel", "torch", "fastsd"} <= document[
        "machine"
    ].keys()
    assert document["settings"]["contenders"] == ["fastsd", "torch", "InstantTensor"]
    (model,) = document["models"]
    assert (model["tensors"], model["nbytes"], model["dtypes"]) == (10, 1_000_000, ("bfloat16",))
    assert {limit["name"] for limit in model["limits"]} == {limit.name for limit in LIMITS}
    for result in document["results"]:
        assert result.keys() == set(results.Result.__dataclass_fields__)
        assert bool(result["reason"]) == (result["status"] != "measured")
    text = json.dumps(document)
    assert str(tmp_path) not in text
    assert os.uname().nodename not in text


def test_tables_and_markdown_say_the_same(tmp_path, fake):
    document = run_faked(tmp_path, saves=True)
    tables = list(report.list_tables(document))
    titles = [table.title.partition(": ")[2].partition(":")[0] for table in tables]
    limits = "what the machine does at best"
    assert titles == ["loading to cpu, warm", "loading to cpu, cold", "saving from cpu", limits]
    assert all(len(row) == len(t.columns) for t in tables for row in t.rows)
    markdown = report.build_markdown(document)
    for row in tables[0].rows:
        assert f"| {' | '.join(row)} |" in markdown
    assert report.describe_machine(document) in markdown
    assert "failed: ended by SIGSEGV" in markdown


@pytest.mark.parametrize(
    ("width", "lacking"),
    [(120, {"notes"}), (86, {"notes", "p90"}), (40, {"notes", *report._SPARE})],
)
def test_narrow_terminals_get_fewer_columns(width, lacking):
    row = ["fastsafetensors", "safetensors", *["1,234"] * 5, "0.123", "61%", "readahead", ""]
    table = report.fit(report.Table("", report._LOADS, [row]), width)
    assert set(report._LOADS) - set(table.columns) == lacking
    assert table.rows == [[row[report._LOADS.index(column)] for column in table.columns]]


def test_a_picture_is_drawn(tmp_path, fake):
    pytest.importorskip("matplotlib")
    plot.draw(run_faked(tmp_path, saves=True), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


# ---- The command line ----


@pytest.fixture
def command(capsys, tmp_path):
    def run_main(*argv):
        code = main(["bench", *map(str, argv)])
        return code, *capsys.readouterr()

    return run_main


def test_the_help_has_examples_and_contenders(command):
    code, out, _ = command("--help")
    assert code == 0
    assert "examples:" in out
    assert "InstantTensor" in out


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["missing.pth"], "missing.pth: No such file or directory"),
        (["--device", "tpu"], "must be cpu, cuda or cuda:N"),
        (["--cache", "tepid"], "must be warm, cold or warm,cold"),
        (["--contenders", "turbo"], "no contender is called 'turbo'"),
        (["--size", "big"], "must be a size"),
        (["--size", "1MB,0"], "must be at least a byte"),
        (["--output", "x.txt"], "must end in .json or .md"),
        (["--output", "missing/x.md"], "missing: there is no such folder"),
        (["--plot", "missing/x.png"], "missing: there is no such folder"),
        (["--plot", "x.md"], "must end in .png, .svg or .pdf"),
        (["--work", "missing"], "missing: No such file or directory"),
        (["--work", __file__], "test_bench.py: Not a directory"),
    ],
)
def test_what_cannot_start_says_why(command, argv, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*argv)
    assert (code, out) == (2, "")
    assert complaint in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(command):
    code, _, err = command("--device", "cpu,cuda")
    assert (code, err) == (2, "fastsd: --device cuda:0: torch sees no GPU here\n")


def test_a_file_that_is_no_weights(command, tmp_path):
    (tmp_path / "x.fsd").write_bytes(b"no weights at all")
    code, _, err = command(tmp_path / "x.fsd")
    assert code == 2
    assert "x.fsd" in err
    assert os.listdir(tmp_path) == ["x.fsd"]


def test_a_picture_without_matplotlib_is_refused_before_anything_is_done(command, monkeypatch):
    monkeypatch.setattr("fastsd.cli.bench.find_spec", lambda name: None)
    code, _, err = command("--plot", "x.png")
    assert code == 2
    assert "pip install 'fastsd[bench]'" in err


def test_a_terminal_without_rich_is_refused_before_anything_is_done(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.table", None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, _, err = command("--size", "1MB")
    assert code == 2
    assert "tables on a terminal need rich" in err


def test_results_go_to_stdout_and_to_files(command, tmp_path, fake):
    options = ["--work", tmp_path, "--device", "cpu", "--size", "1MB", "--contenders", "fastsd"]
    files = ["--output", tmp_path / "x.json", "--output", tmp_path / "x.md"]
    code, out, err = command(*options, *files)
    assert (code, err) == (0, "")
    assert (
        "synthetic 1 MB, 300 x bfloat16: loading to cpu, warm: 300 tensors, 1 MB, bfloat16" in out
    )
    assert "O_DIRECT" not in out
    assert json.loads((tmp_path / "x.json").read_text())["settings"]["devices"] == ["cpu"]
    assert (tmp_path / "x.md").read_text().startswith("# Loading and saving weights\n")
    code, out, _ = command(*options, "--json")
    assert json.loads(out)["results"][0]["status"] == "measured"


def test_the_exit_code_says_that_one_failed(command, tmp_path, fake):
    code, out, _ = command(
        "--work", tmp_path, "--size", "1MB", "--contenders", "torch", "--device", "cpu"
    )
    assert code == 1
    assert "failed: ended by SIGSEGV" in out


# ---- All of it ----


def test_one_real_run(command, tmp_path):
    on_disk(tmp_path)
    argv = ["--size", "2MB", "--tensors", "30", "--device", "cpu", "--cache", "cold", "--repeat", 3]
    code, out, err = command(*argv, "--contenders", "torch mmap", "--work", tmp_path, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    (row,) = document["results"]
    assert (row["status"], row["rounds"], row["notes"]) == ("measured", 3, [])
    assert 0 < row["call"]["p50"] <= row["ready"]["p50"] <= row["ready"]["p99"]
    limits = {limit["name"]: limit["gb_per_s"] for limit in document["models"][0]["limits"]}
    assert limits["memcpy"] > 0
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_everyone_who_is_installed_loads_a_checkpoint(command, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, tmp_path / "checkpoint.pth")
    argv = ["--device", "cpu", "--repeat", 2, "--save", "--json"]
    code, out, _ = command(tmp_path / "checkpoint.pth", *argv)
    assert code == 0
    statuses = {(r["contender"], r["work"]): r["status"] for r in json.loads(out)["results"]}
    for name in ("fastsd", "torch", "safetensors"):
        assert statuses[name, "load"] == statuses[name, "save"] == "measured"
    assert os.listdir(tmp_path) == ["checkpoint.pth"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_no_processes_and_no_files(tmp_path, number):
    argv = [sys.executable, "-m", "fastsd", "bench", "--size", "1MB", "--device", "cpu"]
    argv += ["--repeat", "100000", "--progress", "--work", str(tmp_path)]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, start_new_session=True) as run:
        while "1 of" not in (line := run.stderr.readline()):
            assert line
        time.sleep(4)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(run.pid, number)
        assert run.wait(20) in (130, 143)
    assert children
    assert not any(is_alive(int(pid)) for pid in children)
    assert os.listdir(tmp_path) == []
