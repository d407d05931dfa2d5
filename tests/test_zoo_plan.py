"""What is in a tree of checkpoints, and what is to become of it; nothing is converted here."""

import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import fastsd
from fastsd.zoo import Options, plan_zoo
from fastsd.zoo.recognise import Form, recognise_file

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def make(path, save=torch.save, state=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    save(STATE if state is None else state, path)
    return path


def make_index(folder, weight_map, name="model.safetensors.index.json"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def make_sharded(folder):
    for i, name in enumerate(STATE, 1):
        make(folder / f"model-{i}-of-2.safetensors", save_file, {name: STATE[name]})
    make_index(folder, {name: f"model-{i}-of-2.safetensors" for i, name in enumerate(STATE, 1)})


def save_legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


def save_pickle(state, path):
    path.write_bytes(pickle.dumps(state))


@pytest.fixture
def zoo(tmp_path):
    folder = tmp_path / "zoo"
    folder.mkdir()
    return folder


@pytest.fixture
def plan(zoo, tmp_path):
    """Plans the zoo: (source, target) of each item, from their roots; and the plan."""

    def make_plan(**options):
        plan = plan_zoo(zoo, tmp_path / "out", Options(**options))
        out = tmp_path / "out"
        names = [(i.name, Path(i.target).relative_to(out).as_posix()) for i in plan.items]
        assert not out.exists()
        return names, plan

    return make_plan


def test_recognises_by_content(zoo, plan):
    forms = {
        "zip.pth": (torch.save, Form.TORCH_ZIP),
        "zip.anything": (torch.save, Form.TORCH_ZIP),
        "old.pth": (save_legacy, Form.LEGACY),
        "lies.safetensors": (torch.save, Form.TORCH_ZIP),
        "st.bin": (save_file, Form.SAFETENSORS),
        "f": (fastsd.save, Form.FSD),
        "numpy.pkl": (save_pickle, Form.PICKLE),
    }
    for name, (save, _) in forms.items():
        make(zoo / name, save)
    for name in ("README.md", "config.json", "vocab.bin", "cover.png"):
        (zoo / name).write_bytes(b'{"a": "0123456789"}')
    (zoo / "data.p").write_bytes(pickle.dumps([1]))
    with zipfile.ZipFile(zoo / "code.zip", "w") as file:
        file.writestr("x.py", "")
    names, found = plan()
    assert {i.name: i.form for i in found.items} == {n: form for n, (_, form) in forms.items()}
    assert dict(names)["zip.anything"] == "zip.anything.fsd"
    assert dict(names)["old.pth"] == "old.fsd"
    assert found.others == 6
    assert found.others_nbytes > 0
    assert found.nbytes == sum((zoo / name).stat().st_size for name in forms)


def test_what_only_claims_to_be_a_checkpoint(zoo, plan):
    whole = make(zoo / "whole.pth").read_bytes()
    (zoo / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (zoo / "lfs.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (zoo / "empty.ckpt").write_bytes(b"")
    (zoo / "cut.bin").write_bytes(b"")
    _, found = plan()
    forms = {i.name: i.form for i in found.items}
    assert forms.pop("whole.pth") is Form.TORCH_ZIP
    assert forms == dict.fromkeys(("cut.pth", "lfs.safetensors", "empty.ckpt"), Form.UNKNOWN)


@pytest.mark.parametrize("member", ["sys_info", "file.txt"])
def test_tar_files(member):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as members:
        members.addfile(tarfile.TarInfo(member))
    file.seek(0)
    form = recognise_file("x.tar", file)
    assert form is (Form.LEGACY if member == "sys_info" else None)


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02", b"", b"\0" * 8 + b"{", b"ustar"])
@pytest.mark.parametrize("rest", [b"", b"\0" * 600, b"\xff" * 600, b"ustar" * 150])
def test_any_bytes_are_recognised_or_left(start, rest):
    assert recognise_file("x.pth", io.BytesIO(start + rest)) is not None
    recognise_file("x.md", io.BytesIO(start + rest))


def test_targets_mirror_the_tree(zoo, plan):
    for name in ("a/b/x.pth", "a/y.pth.tar", "resnet-1.5", "z.v2.CKPT"):
        make(zoo / name)
    assert dict(plan(to="safetensors")[0]) == {
        "a/b/x.pth": "a/b/x.safetensors",
        "a/y.pth.tar": "a/y.safetensors",
        "resnet-1.5": "resnet-1.5.safetensors",
        "z.v2.CKPT": "z.v2.safetensors",
    }
    assert dict(plan(keep_suffix=True)[0])["a/y.pth.tar"] == "a/y.pth.tar.fsd"


def test_collisions_are_found(zoo, plan):
    for name in ("x.pth", "x.ckpt", "y.pth"):
        make(zoo / name)
    names, found = plan()
    assert len(names) == 3
    problems = {i.name: i.problem for i in found.items}
    assert problems["y.pth"] == ""
    assert "x.ckpt would be written to the same x.fsd" in problems["x.pth"]
    assert "x.pth would be written to the same x.fsd" in problems["x.ckpt"]
    assert not any(i.problem for i in plan(keep_suffix=True)[1].items)


def test_shards_have_a_directory_of_their_own(zoo, plan):
    for name in ("x.pth", "y.pth", "y/z.pth"):
        make(zoo / name)
    names, found = plan(max_shard_size="1GB")
    assert names == [("x.pth", "x"), ("y.pth", "y"), ("y/z.pth", "y/z")]
    assert ["same" in i.problem for i in found.items] == [False, True, False]


def test_sharded_checkpoints_are_one_item(zoo, plan):
    make_sharded(zoo / "llm")
    names, found = plan()
    assert names == [("llm/model.safetensors.index.json", "llm/model.fsd")]
    (item,) = found.items
    assert (item.form, item.problem, len(item.pieces)) == (Form.SHARDED, "", 3)
    assert item.nbytes == sum(p.stat().st_size for p in (zoo / "llm").iterdir())


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/etc/passwd", "a/../../x", "..\\x", "", ".", "a\0b"]
)
def test_indexes_that_lead_elsewhere(zoo, plan, shard):
    make(zoo / "outside.safetensors", save_file)
    make(zoo / "llm/a.safetensors", save_file)
    make_index(zoo / "llm", {"a": "a.safetensors", "b": shard})
    _, found = plan()
    (item,) = [i for i in found.items if i.form is Form.SHARDED]
    assert "names a file outside its directory" in item.problem
    assert [p.name for p in item.pieces] == ["llm/model.safetensors.index.json"]


def test_indexes_of_links_and_of_missing_files(zoo, plan, tmp_path):
    outside = make(tmp_path / "outside.safetensors", save_file)
    make_index(zoo / "a", {"x": "link.safetensors"})
    (zoo / "a/link.safetensors").symlink_to(outside)
    make_index(zoo / "b", {"x": "missing.safetensors"})
    _, found = plan()
    problems = [i.problem for i in found.items]
    assert problems == [
        "the index names a/link.safetensors: a link that leads out of the zoo",
        "the index names b/missing.safetensors: it is missing",
    ]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"weight_map": 3}', '{"weight_map": []}', "[" * 100_000]
)
def test_files_that_are_no_indexes(zoo, plan, text):
    (zoo / "model.safetensors.index.json").write_text(text)
    names, found = plan()
    assert (names, found.others) == ([], 1)


def test_safetensors_are_preferred(zoo, plan):
    for folder in ("a", "b", "c"):
        (zoo / folder).mkdir()
    make(zoo / "a/model.safetensors", save_file)
    make(zoo / "a/pytorch_model.bin")
    make(zoo / "b/pytorch_model.bin")
    make(zoo / "c/model.fp16.safetensors", save_file)
    make(zoo / "c/pytorch_model.fp16.bin")
    make(zoo / "c/pytorch_model.bin")
    make_sharded(zoo / "d")
    make(zoo / "d/pytorch_model-1-of-1.bin")
    make_index(zoo / "d", {"a": "pytorch_model-1-of-1.bin"}, "pytorch_model.bin.index.json")
    names, found = plan()
    assert [name for name, _ in names] == [
        "a/model.safetensors",
        "b/pytorch_model.bin",
        "c/model.fp16.safetensors",
        "c/pytorch_model.bin",
        "d/model.safetensors.index.json",
    ]
    notes = {i.name: i.note for i in found.items}
    assert notes["a/model.safetensors"] == "pytorch_model.bin is taken for the same model and left"
    assert notes["b/pytorch_model.bin"] == ""
    assert notes["d/model.safetensors.index.json"].startswith("pytorch_model.bin.index.json")
    assert found.others == 4


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_distributed_checkpoints_are_directories(zoo, plan):
    dcp.save(STATE, checkpoint_id=zoo / "run/step-10.1")
    make(zoo / "run/step-10.1/extra/x.pth")
    (zoo / "half").mkdir()
    (zoo / "half/.metadata").write_bytes(b"")
    names, found = plan()
    assert names == [
        ("run/step-10.1", "run/step-10.1.fsd"),
        ("run/step-10.1/extra/x.pth", "run/step-10.1/extra/x.fsd"),
    ]
    item = found.items[0]
    assert item.form is Form.DCP
    assert item.memory > item.nbytes > 0


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_zoo_that_is_one_distributed_checkpoint(zoo, plan):
    dcp.save(STATE, checkpoint_id=zoo)
    assert plan()[0] == [(".", "zoo.fsd")]


def test_links(zoo, plan, tmp_path):
    outside = make(tmp_path / "elsewhere/x.pth")
    (zoo / "file.pth").symlink_to(outside)
    (zoo / "folder").symlink_to(outside.parent)
    (zoo / "broken.pth").symlink_to(zoo / "nothing")
    (zoo / "loop.pth").symlink_to(zoo / "loop.pth")
    make(zoo / "blobs/0123")
    (zoo / "snapshots/1").mkdir(parents=True)
    (zoo / "snapshots/1/model.bin").symlink_to("../../blobs/0123")
    names, found = plan()
    assert names == [("snapshots/1/model.bin", "snapshots/1/model.fsd")]
    assert found.refused["file.pth"] == "a link that leads out of the zoo"
    assert found.refused["folder"] == "a link to a directory"
    assert {"broken.pth", "loop.pth"} < found.refused.keys()


def test_hidden_files_pipes_and_the_output_are_left_out(zoo, tmp_path):
    make(zoo / ".git/x.pth")
    make(zoo / ".x.pth")
    make(zoo / "out/x.pth")
    os.mkfifo(zoo / "pipe.pth")
    assert plan_zoo(zoo, zoo / "out", Options()).items == []


def test_memory_is_that_of_the_form(zoo, plan):
    big = {"x": torch.zeros(1 << 20)}
    for name, save in (("a.pth", torch.save), ("b.pth", save_legacy), ("c.fsd", fastsd.save)):
        make(zoo / name, save, big)
    small, large, mapped = (item.memory for item in plan()[1].items)
    assert small == mapped
    assert large - small == (zoo / "b.pth").stat().st_size


def test_a_root_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        plan_zoo(tmp_path / "nothing", tmp_path / "out", Options())


def test_urls(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    files.pipe("/zoo-plan/a/x.pth", buffer.getvalue())
    files.pipe("/zoo-plan/a/README.md", b"text")
    files.pipe("/zoo-plan/a/.hidden/x.pth", buffer.getvalue())
    try:
        plan = plan_zoo("memory://zoo-plan", tmp_path / "out", Options())
    finally:
        files.rm("/zoo-plan", recursive=True)
    (item,) = plan.items
    assert (item.name, item.target) == ("a/x.pth", str(tmp_path / "out/a/x.fsd"))
    assert (item.nbytes, item.disk) == (len(buffer.getvalue()),) * 2
    assert item.pieces[0].stamp
    assert plan.others == 1
