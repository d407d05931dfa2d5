"""Conversions as work on files: what they check, need, tell and leave behind."""

import io
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from same import PLAIN_DTYPES, assert_same, filled, small_state

import fastsd
from fastsd import convert
from fastsd.saving import write
from fastsd.shards import write_sharded

pytest.importorskip("huggingface_hub")

MODULE = sys.modules["fastsd.convert"]  # whose name in the package is the function's
FORMATS = ["fsd", "pth", "safetensors"]
MIB = 1 << 20


def make_big(mib=24):
    return {f"layer.{i}": torch.full((MIB // 4,), 1.0 + i) for i in range(mib)}


# ---- Verifying ----


def damage(path, needle):
    data = bytearray(path.read_bytes())
    place = data.index(needle)
    data[place] ^= 1
    path.write_bytes(data)


@pytest.fixture
def damaging(monkeypatch):
    """Changes a byte behind the back of what has written a file."""

    def install(needle):
        def damage_if_there(path):
            if needle in path.read_bytes():
                damage(path, needle)

        def write_and_damage(plan, f, **options):
            write(plan, f, **options)
            damage_if_there(Path(os.fsdecode(f)))

        def write_shards_and_damage(state, directory, *args, **options):
            files = write_sharded(state, directory, *args, **options)
            for file in files:
                damage_if_there(Path(directory, file))
            return files

        monkeypatch.setattr(MODULE, "write", write_and_damage)
        monkeypatch.setattr("fastsd.shards.write_sharded", write_shards_and_damage)

    return install


@pytest.mark.parametrize(
    "options", [{}, {"dtype": torch.float64}, {"max_shard_size": 100}], ids=str
)
@pytest.mark.parametrize("to", FORMATS)
def test_a_changed_bit_is_found(to, options, tmp_path, damaging):
    state = {f"x{i}": torch.full((20,), 1.0 + i) for i in range(4)}
    fastsd.save(state, tmp_path / "a.fsd")
    convert(tmp_path / "a.fsd", tmp_path / "good", to=to, verify=True, **options)
    wanted = state["x2"].to(options.get("dtype", torch.float32))
    damaging(wanted.numpy().tobytes())
    with pytest.raises(fastsd.ChecksumError) as caught:
        convert(tmp_path / "a.fsd", tmp_path / "bad", to=to, verify=True, **options)
    assert len(caught.value.tensors) == 1
    assert str(tmp_path / "bad") in caught.value.path
    convert(tmp_path / "a.fsd", tmp_path / "bad", to=to, **options)  # not asked


@pytest.mark.parametrize("to", ["fsd", "pth"])
def test_a_changed_bit_of_a_carried_pickle_is_found(to, tmp_path, damaging):
    state = {"a": torch.arange(20.0), "b": torch.eye(3).to_sparse(), "note": "some words"}
    torch.save(state, tmp_path / "a.pth")
    damaging(state["a"].numpy().tobytes())
    with pytest.raises(fastsd.ChecksumError, match="not what was written"):
        convert(tmp_path / "a.pth", tmp_path / "b", to=to, verify=True)


def is_saved_by_torch(dtype):
    try:
        torch.save(torch.empty(1, dtype=dtype), io.BytesIO())
    except (KeyError, RuntimeError):
        return False
    return True


def test_dtypes_that_torch_does_not_save_are_refused(tmp_path):
    others = [dtype for dtype in PLAIN_DTYPES if not is_saved_by_torch(dtype)]
    for dtype in others:
        fastsd.save({"a": torch.empty(1, dtype=dtype)}, tmp_path / "a.fsd")
        with pytest.raises(fastsd.UnsupportedError, match=r"a\.fsd.*torch\.save refuses"):
            convert(tmp_path / "a.fsd", tmp_path / "b.pth")


@pytest.mark.parametrize("to", FORMATS)
def test_every_dtype_and_every_bit_is_compared(to, tmp_path):
    dtypes = [dtype for dtype in PLAIN_DTYPES if to != "pth" or is_saved_by_torch(dtype)]
    state = {str(dtype): filled((5, 3), dtype) for dtype in dtypes}
    state["nan"] = torch.arange(-128, 128, dtype=torch.int16).view(torch.bfloat16)
    fastsd.save(state, tmp_path / "a.fsd")
    report = convert(tmp_path / "a.fsd", tmp_path / "b", to=to, verify=True, lossy=True)
    assert report.tensors + len(report.dropped) == len(state)
    assert (len(report.dropped) > 0) == (to == "safetensors")
    found = fastsd.load(tmp_path / "b")
    assert_same(dict(found), {name: state[name] for name in found})


def test_large_strided_tensors_are_compared(tmp_path, damaging):
    wide = filled((3000, 2000), torch.float32)
    state = {"t": wide.t(), "part": filled((4000, 1500), torch.int16)[:, 10:1300]}
    fastsd.save(state, tmp_path / "a.pth", format="pth")
    for to in FORMATS:
        convert(tmp_path / "a.pth", tmp_path / "b", to=to, verify=True)
    damaging(state["part"][3000, 7:107].numpy().tobytes())
    with pytest.raises(fastsd.ChecksumError, match="part"):
        convert(tmp_path / "a.pth", tmp_path / "b", to="safetensors", verify=True)


# ---- Memory ----

MEASURE = """
import sys
import torch
import fastsd

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) >> 10

source, target, to, dtype, size = sys.argv[1:]
options = dict(
    to=to, verify=True, dtype=getattr(torch, dtype, None), max_shard_size=int(size) or None
)
fastsd.convert(source, target + ".first", to="fsd", verify=True)
begin = peak()
fastsd.convert(target + ".large", target, **options)
print(peak() - begin)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "to", "dtype", "size"),
    [
        ("pth", "fsd", "", 0),
        ("fsd", "safetensors", "", 0),
        ("fsd", "pth", "bfloat16", 0),
        ("pth", "safetensors", "float64", 100 * MIB),
        ("shards", "fsd", "", 0),
    ],
)
def test_memory_does_not_grow_with_the_source(source, to, dtype, size, tmp_path):
    state = {f"layer.{i}": torch.ones(10 * MIB // 4) for i in range(8)}
    state["huge"] = torch.ones(220 * MIB // 4)
    large = tmp_path / "b.large"
    if source == "shards":
        write_sharded(state, large, "fsd", 100 * MIB)
    else:
        fastsd.save(state, large, format=source)
    del state
    fastsd.save(small_state(), tmp_path / "a.fsd")
    arguments = [tmp_path / "a.fsd", tmp_path / "b", to, dtype, str(size)]
    command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 150  # of 300, or 600 once cast to a wider dtype


# ---- Progress ----


@pytest.mark.parametrize(
    "options",
    [{}, {"verify": True}, {"dtype": torch.float16, "verify": True}, {"max_shard_size": 5 * MIB}],
    ids=str,
)
@pytest.mark.parametrize("to", FORMATS)
def test_progress_adds_up(to, options, tmp_path):
    fastsd.save(make_big(), tmp_path / "a.fsd")
    told = []
    report = convert(tmp_path / "a.fsd", tmp_path / "b", to=to, progress=told.append, **options)
    assert sum(told) == report.source_nbytes == os.path.getsize(tmp_path / "a.fsd")
    assert min(told) > 0
    if options:
        assert len(told) > 3


def test_progress_is_told_while_a_file_is_written(tmp_path, preload):
    """However quick the machine: every write takes a while."""
    slow = preload(
        "#define _GNU_SOURCE\n#include <dlfcn.h>\n#include <sys/uio.h>\n#include <unistd.h>\n"
        "typedef ssize_t (*Write)(int, const struct iovec *, int, off_t);\n"
        "ssize_t pwritev(int f, const struct iovec *v, int n, off_t o) { usleep(20000);"
        ' return ((Write)dlsym(RTLD_NEXT, "pwritev"))(f, v, n, o); }\n'
        "ssize_t pwritev64(int f, const struct iovec *v, int n, off_t o)"
        " { return pwritev(f, v, n, o); }\n"
    )
    fastsd.save(make_big(40), tmp_path / "a.fsd")
    code = (
        "import sys, fastsd; told = []; fastsd.convert(*sys.argv[1:], progress=told.append);"
        "print(len(told), max(told), sum(told))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.fsd"), str(tmp_path / "b.pth")]
    found = subprocess.run(command, env=slow, capture_output=True, text=True, check=True)
    calls, largest, total = map(int, found.stdout.split())
    assert calls > 3
    assert largest < total / 2


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "options",
    [{}, {"verify": True}, {"dtype": torch.float16}, {"max_shard_size": 5 * MIB}],
    ids=str,
)
@pytest.mark.parametrize("to", FORMATS)
def test_errors_of_the_callback_stop_it(to, options, tmp_path):
    fastsd.save(make_big(), tmp_path / "a.fsd")
    calls = itertools.count()

    def tell(nbytes):
        if next(calls) == (2 if "verify" not in options and options else 0):
            raise Stop

    with pytest.raises(Stop):
        convert(tmp_path / "a.fsd", tmp_path / "b", to=to, progress=tell, **options)
    found = [path for path in tmp_path.rglob("*") if path.is_file()]
    if options and "verify" not in options:
        assert found == [tmp_path / "a.fsd"]
    else:  # the first that is heard may be when all is written
        assert {path.name for path in found} <= {"a.fsd", "b"}
        assert not (tmp_path / "b").exists() or len(fastsd.load(tmp_path / "b")) == 24


@pytest.mark.parametrize(
    "options", [{}, {"dtype": torch.float16}, {"max_shard_size": 5 * MIB}], ids=str
)
def test_ctrl_c_stops_it(options, tmp_path):
    fastsd.save(make_big(), tmp_path / "a.fsd")
    told = []

    def tell(nbytes):
        told.append(nbytes)
        if len(told) == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "a.fsd", tmp_path / "b.pth", to="pth", progress=tell, **options)
    assert not any(path.name.startswith(".") for path in tmp_path.rglob("*"))


# ---- Targets ----


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("how", ["itself", "link", "hard link"])
def test_the_target_may_be_the_source(to, how, tmp_path):
    state = small_state()
    source, target = tmp_path / "a", tmp_path / "b"
    torch.save(state, source)
    if how == "link":
        target.symlink_to(source)
    elif how == "hard link":
        target.hardlink_to(source)
    else:
        target = source
    report = convert(source, target, to=to, dtype=torch.float64, verify=True)
    assert report.target_nbytes == target.stat().st_size
    assert fastsd.open(target).format == to
    assert fastsd.load(target)["weight"].dtype == torch.float64
    if how == "hard link":
        assert_same(torch.load(source), state)


@pytest.mark.parametrize("format", FORMATS)
def test_shards_do_not_overwrite_their_source(format, tmp_path):
    state = {f"x{i}": torch.ones(30) for i in range(4)}
    files = write_sharded(state, tmp_path / "a", format, 130)
    before = {file: (tmp_path / "a" / file).read_bytes() for file in files}
    (tmp_path / "link").symlink_to(tmp_path / "a")
    bad = [(tmp_path / "a", 130), (tmp_path / "link", 130), (tmp_path / "a" / files[0], None)]
    for target, size in bad:
        with pytest.raises(ValueError, match="part of the source"):
            convert(tmp_path / "a", target, to=format, max_shard_size=size)
    assert {
        file: (tmp_path / "a" / file).read_bytes() for file in os.listdir(tmp_path / "a")
    } == before
    other = "fsd" if format == "pth" else "pth"
    convert(tmp_path / "a", tmp_path / "a", to=other, max_shard_size=130, verify=True)
    assert all((tmp_path / "a" / file).read_bytes() == data for file, data in before.items())


def test_a_single_file_is_not_replaced_by_its_shards(tmp_path):
    fastsd.save(small_state(), tmp_path / "model.fsd")
    with pytest.raises(ValueError, match="part of the source"):
        convert(tmp_path / "model.fsd", tmp_path, to="fsd", max_shard_size=20)
    assert os.listdir(tmp_path) == ["model.fsd"]


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_bad_targets(dtype, tmp_path):
    source = tmp_path / "a.fsd"
    fastsd.save(small_state(), source)
    (tmp_path / "folder.fsd").mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        convert(source, tmp_path / "none" / "b.fsd", dtype=dtype)
    assert caught.value.filename == str(tmp_path / "none" / "b.fsd")
    with pytest.raises(IsADirectoryError):
        convert(source, tmp_path / "folder.fsd", dtype=dtype)
    with pytest.raises(ValueError, match="to="):
        convert(source, tmp_path / "b.onnx", dtype=dtype)
    assert sorted(os.listdir(tmp_path)) == ["a.fsd", "folder.fsd"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_directories_that_are_read_only(dtype, tmp_path):
    fastsd.save(small_state(), tmp_path / "a.fsd")
    (tmp_path / "folder").mkdir(mode=0o555)
    with pytest.raises(PermissionError):
        convert(tmp_path / "a.fsd", tmp_path / "folder" / "b.fsd", dtype=dtype)


LIMITED = """
import resource, signal, sys, torch, fastsd
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10 << 20, 10 << 20))
options = {"dtype": torch.float16} if sys.argv[3] else {}
try:
    fastsd.convert(sys.argv[1], sys.argv[2], **options)
except OSError as error:
    print(error.errno)
"""


@pytest.mark.parametrize("casts", ["", "yes"])
def test_no_room_is_an_error_and_leaves_nothing(casts, tmp_path):
    fastsd.save(make_big(), tmp_path / "a.fsd")
    command = [sys.executable, "-c", LIMITED, tmp_path / "a.fsd", tmp_path / "b.pth", casts]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(found.stdout) > 0
    assert os.listdir(tmp_path) == ["a.fsd"]


# ---- Sources that change ----


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float16}], ids=str)
@pytest.mark.parametrize("to", FORMATS)
def test_a_source_that_shrinks_is_an_error(to, options, tmp_path, monkeypatch):
    """And not the end of the process."""
    source = tmp_path / "a.fsd"
    fastsd.save(make_big(), source)
    original = MODULE.read_content

    def read(*args, **kwargs):
        found = original(*args, **kwargs)
        os.truncate(source, 2 * MIB)
        return found

    monkeypatch.setattr(MODULE, "read_content", read)
    with pytest.raises(fastsd.TruncatedError, match="ended at byte"):
        convert(source, tmp_path / "b", to=to, **options)
    assert os.listdir(tmp_path) == ["a.fsd"]


def test_a_source_that_is_written_to_is_said(tmp_path, monkeypatch):
    source = tmp_path / "a.fsd"
    fastsd.save(make_big(2), source)
    original = MODULE.read_content

    def read(*args, **kwargs):
        found = original(*args, **kwargs)
        with source.open("r+b") as file:
            file.seek(MIB)
            file.write(b"other")
        os.utime(source, ns=(1, 1))
        return found

    monkeypatch.setattr(MODULE, "read_content", read)
    with pytest.raises(fastsd.FormatError, match="changed while"):
        convert(source, tmp_path / "b", to="pth")
