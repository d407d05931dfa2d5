"""Directories of torch.distributed.checkpoint, read without running what is in them."""

import datetime
import os
import pickle
import resource
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from fastsd.errors import FormatError, TruncatedError
from fastsd.formats.dcp import read_dcp

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def make_state():
    generator = torch.Generator().manual_seed(0)
    return {
        "model": OrderedDict(
            weight=torch.randn(5, 3, generator=generator),
            half=torch.randn(4, generator=generator).bfloat16(),
            empty=torch.zeros(0, 7),
            scalar=torch.tensor(3, dtype=torch.int64),
        ),
        "list": [torch.ones(2), {"deep": torch.zeros(1, dtype=torch.bool)}],
        "epoch": 7,
        "name": "run",
        "nothing": None,
        "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}],
    }


def save(state, directory, **options):
    dcp.save(state, storage_writer=dcp.FileSystemWriter(directory, **options))


def assert_same(a, b):
    if isinstance(b, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(b, dict):
        assert a.keys() == b.keys()
        for key in b:
            assert_same(a[key], b[key])
    elif isinstance(b, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("single_file_per_rank", [True, False])
def test_reads_what_torch_wrote(tmp_path, single_file_per_rank):
    state = make_state()
    save(state, tmp_path, single_file_per_rank=single_file_per_rank)
    assert_same(read_dcp(tmp_path), state)


SHARDED = """
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
whole = torch.arange(35.0).reshape(5, 7)
state = {f"dim{d}": distribute_tensor(whole, mesh, [Shard(d)]) for d in (0, 1)}
dcp.save({"m": state, "whole": whole}, checkpoint_id=f"{folder}/checkpoint")
os._exit(0)  # not waiting for the other, which may have gone already
"""


def test_puts_shards_of_several_processes_together(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", SHARDED]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    directory = tmp_path / "checkpoint"
    assert len(list(directory.glob("*.distcp"))) == 2
    whole = torch.arange(35.0).reshape(5, 7)
    assert_same(read_dcp(directory), {"m": {"dim0": whole, "dim1": whole}, "whole": whole})


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_metadata_that_would_run_code(tmp_path):
    save({"a": torch.ones(1)}, tmp_path)
    target = tmp_path / "executed"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Bomb(target)))
    with pytest.raises(FormatError, match=r"posix\.mkdir"):
        read_dcp(tmp_path)
    assert not target.exists()
    with pytest.raises(FormatError):  # no metadata, but what it names runs
        read_dcp(tmp_path, trust=True)
    assert target.exists()


def test_names_that_only_look_like_torchs(tmp_path):
    class Fake:
        def __reduce__(self):
            return os.system, ("true",)

    text = pickle.dumps(Fake()).replace(b"posix", b"torch")
    (tmp_path / ".metadata").write_bytes(text)
    with pytest.raises(FormatError, match=r"torch\.system"):
        read_dcp(tmp_path)


def test_metadata_cannot_change_torchs_classes(tmp_path):
    # BUILD sets attributes of whatever is on the stack, a class too.
    module = b"torch.distributed.checkpoint.metadata"
    text = b"\x80\x02c" + module + b"\nMetadata\nN}X\x06\x00\x00\x00hackedK\x01s\x86b."
    changed = pickle.loads(text)
    assert changed is torch_metadata.Metadata
    assert changed.hacked == 1
    del torch_metadata.Metadata.hacked
    (tmp_path / ".metadata").write_bytes(text)
    with pytest.raises(FormatError):
        read_dcp(tmp_path)
    assert not hasattr(torch_metadata.Metadata, "hacked")


def test_objects_that_need_trust(tmp_path):
    target = tmp_path / "executed"
    save({"a": torch.ones(1), "config": Bomb(target)}, tmp_path)
    with pytest.raises(
        pickle.UnpicklingError, match=r"__0_0\.distcp: 'config' names posix.mkdir, "
    ):
        read_dcp(tmp_path)
    assert not target.exists()
    read_dcp(tmp_path, trust=True)
    assert target.exists()


def test_objects_of_a_class_load_with_trust(tmp_path):
    state = {"a": torch.ones(1), "day": datetime.date(2020, 1, 2)}
    save(state, tmp_path)
    assert_same(read_dcp(tmp_path, trust=True), state)


def rewrite(directory, change):
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def place_of(metadata, name):
    return next(info for index, info in metadata.storage_data.items() if index.fqn == name)


def lie_about_file(file):
    def change(metadata):
        place_of(metadata, "a").relative_path = file

    return change


def lie_about_length(metadata):
    place_of(metadata, "a").length = 1 << 40


def lie_about_overlap(metadata):
    entries, places = metadata.state_dict_metadata, metadata.storage_data
    for i in range(100):
        entries[f"x{i}"] = entries["a"]
        places[torch_metadata.MetadataIndex(f"x{i}", torch.Size([0, 0]))] = place_of(metadata, "a")


def lie_about_size(metadata):
    metadata.state_dict_metadata["a"].size = torch.Size([1 << 40, 1 << 40])


def lie_about_size_and_chunk(metadata):
    entry = metadata.state_dict_metadata["a"]
    entry.size = entry.chunks[0].sizes = torch.Size([1 << 20, 1 << 20])


def lie_about_shape(metadata):
    entry = metadata.state_dict_metadata["a"]
    entry.size = entry.chunks[0].sizes = torch.Size([3, 5])


def lie_about_dtype(metadata):
    metadata.state_dict_metadata["a"].properties.dtype = torch.int32


def lie_about_offset(metadata):
    entry, info = metadata.state_dict_metadata["a"], place_of(metadata, "a")
    entry.chunks[0].offsets = torch.Size([1, 0])
    metadata.storage_data = {torch_metadata.MetadataIndex("a", torch.Size([1, 0])): info}


def lie_about_lists(metadata):
    metadata.planner_data = {"a": ("list", 1 << 40)}


def lie_about_depth(metadata):
    metadata.planner_data = {"a": ("x",) * 501}


def lose_place(metadata):
    metadata.storage_data = {}


def compress(metadata):
    info = place_of(metadata, "a")
    key = next(iter(metadata.storage_data))
    metadata.storage_data[key] = _StorageInfo(info.relative_path, 0, info.length, ["zstd"])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lie_about_file("../outside"), "outside the directory"),
        (lie_about_file("/etc/passwd"), "outside the directory"),
        (lie_about_file("link"), "outside the directory"),
        (lie_about_file("zero\0byte"), "outside the directory"),
        (lie_about_file("half\ud800"), "outside the directory"),
        (lie_about_file(3), "no place"),
        (lie_about_length, "less than its chunks"),
        (lie_about_overlap, "less than its chunks"),
        (lie_about_size, "not made of its chunks"),
        (lie_about_size_and_chunk, "larger than its place"),
        (lie_about_shape, r"should be"),
        (lie_about_dtype, r"should be"),
        (lie_about_offset, "a chunk outside it"),
        (lie_about_lists, "items missing"),
        (lie_about_depth, "too long"),
        (lose_place, "KeyError"),
        (compress, "is compressed"),
    ],
)
def test_metadata_that_lies(tmp_path, change, complaint):
    directory = tmp_path / "checkpoint"
    save({"a": torch.ones(5, 3)}, directory)
    (tmp_path / "outside").write_bytes(b"secret")
    (directory / "link").symlink_to(tmp_path / "outside")
    rewrite(directory, change)
    with pytest.raises(FormatError, match=complaint):
        read_dcp(directory)


@pytest.mark.parametrize(
    "text",
    [
        b"\x80\x04}" + b"()" + b"\x85" * 5000 + b"K\x01s.",
        b"\x80\x04}(K\x00K\x01"
        + b"t\x94"
        + b"".join(b"(h%ch%ct\x94" % (i, i) for i in range(60))
        + b"K\x01s.",
        b"\x80\x04]r\xff\xff\xff\x7f.",
        b"\x80\x05\x96" + (1 << 38).to_bytes(8, "little") + b".",
        b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b".",
        b"\x80\x04\x95" + (1 << 60).to_bytes(8, "little") + b"].",
    ],
    ids=["deep", "shared", "memo", "bytearray", "bytes", "frame"],
)
def test_pickles_that_ask_for_too_much(tmp_path, text):
    (tmp_path / ".metadata").write_bytes(text)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), limit[1]))
    try:
        with pytest.raises(FormatError):
            read_dcp(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)


def test_any_byte_of_the_metadata_may_be_damaged(tmp_path):
    save({"a": torch.ones(5, 3), "b": [torch.ones(1), 3]}, tmp_path)
    path = tmp_path / ".metadata"
    text = path.read_bytes()
    refused = 0
    for i in range(len(text)):
        path.write_bytes(text[:i] + bytes([text[i] ^ (1 << i % 8)]) + text[i + 1 :])
        try:
            read_dcp(tmp_path)
        except (FormatError, pickle.UnpicklingError, OSError):
            refused += 1
    assert refused > len(text) // 2


def test_damage(tmp_path):
    save({"a": torch.ones(5, 3)}, tmp_path)
    shard, metadata = tmp_path / "__0_0.distcp", tmp_path / ".metadata"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(TruncatedError, match=r"__0_0\.distcp"):
        read_dcp(tmp_path)
    shard.write_bytes(bytes(len(whole)))
    with pytest.raises((FormatError, pickle.UnpicklingError), match=r"__0_0\.distcp: 'a'"):
        read_dcp(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError):
        read_dcp(tmp_path)
    text = metadata.read_bytes()
    for length in range(0, len(text), 7):
        metadata.write_bytes(text[:length])
        with pytest.raises(FormatError):
            read_dcp(tmp_path)
    metadata.unlink()
    with pytest.raises(FileNotFoundError):
        read_dcp(tmp_path)
