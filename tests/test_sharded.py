"""Directories and indexes of shards: read as one archive; those that lead elsewhere are refused."""

import json
import os
import pickle
import re
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from same import assert_same, small_state
from torch import nn

import fastsd
from fastsd import FastsdError, FormatError, LimitError, NamesError, UnsupportedError

STATE = {
    "a.weight": torch.arange(6.0).view(2, 3),
    "a.bias": torch.ones(3),
    "b.weight": torch.arange(4, dtype=torch.bfloat16),
    "b.count": torch.tensor(3),
}
INDEX = "model.safetensors.index.json"


def write_index(folder, places, name=INDEX):
    folder.mkdir(exist_ok=True, parents=True)
    text = places if isinstance(places, str) else json.dumps({"metadata": {}, "weight_map": places})
    (folder / name).write_text(text)
    return folder / name


def save_shard(state, path):
    path.parent.mkdir(exist_ok=True, parents=True)
    if path.suffix == ".bin":
        torch.save(state, path)
    elif path.suffix == ".fsd":
        fastsd.save(state, path)
    else:
        safetensors.torch.save_file(state, path)


def write_shards(folder, suffix="safetensors", name=INDEX):
    """Two shards, with two tensors each."""
    places = {}
    for number, part in enumerate("ab"):
        file = f"model-{number + 1:05}-of-00002.{suffix}"
        state = {name: tensor for name, tensor in STATE.items() if name.startswith(part)}
        save_shard(state, folder / file)
        places |= dict.fromkeys(state, file)
    return write_index(folder, places, name)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "model"


KINDS = {"safetensors": INDEX, "bin": "pytorch_model.bin.index.json", "fsd": "model.fsd.index.json"}


def sort(state):
    return dict(sorted(state.items()))


# ---- What is there ----


@pytest.mark.parametrize("mmap", [None, True, False])
@pytest.mark.parametrize("suffix", KINDS)
def test_a_directory_and_its_index_are_one_archive(suffix, mmap, folder):
    index = write_shards(folder, suffix, KINDS[suffix])
    for place in (folder, str(folder), os.fsencode(folder), index, str(index)):
        assert_same(sort(fastsd.load(place, mmap=mmap)), sort(STATE))
    assert_same(fastsd.load(folder, prefix="b.", select="count"), {"count": torch.tensor(3)})
    renamed = fastsd.load(folder, rename={"a.": "c."}, select="*.weight")
    assert sorted(renamed) == ["b.weight", "c.weight"]
    with pytest.raises(NamesError):
        fastsd.load(folder, select="c.*")
    target = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
    fastsd.load_into(target, folder, mmap=mmap)
    assert_same(target, STATE)
    with fastsd.open(folder, mmap=mmap) as archive:
        assert sorted(archive) == sorted(STATE)
        assert [Path(file).name for file in archive.files] == [
            f"model-0000{i}-of-00002.{suffix}" for i in (1, 2)
        ]
        assert_same(sort(archive), sort(STATE))
        assert archive.info("b.count").path == archive.files[1]
        assert archive.get_slice("a.weight")[1].tolist() == [3, 4, 5]
        assert len({archive.info(name).storage for name in archive}) == 4
        assert bool(archive.verify().unchecked) == (suffix == "safetensors")


def test_a_module_is_loaded_strictly(folder):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    parts = {"x.safetensors": {}, "y.safetensors": {}}
    for name, tensor in model.state_dict().items():
        parts["x.safetensors" if name[0] == "0" else "y.safetensors"][name] = tensor
    for name, state in parts.items():
        save_shard(state, folder / name)
    write_index(folder, {name: file for file, state in parts.items() for name in state})
    other = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    fastsd.load_into(other, folder)
    assert_same(sort(other.state_dict()), sort(model.state_dict()))
    with pytest.raises(RuntimeError, match=r"Missing key.*2\.weight"):
        fastsd.load_into(nn.Sequential(*other, nn.Linear(4, 5)), folder)


def test_shards_of_several_formats(folder):
    save_shard({"a": torch.ones(1)}, folder / "1.bin")
    save_shard({"b": torch.ones(2)}, folder / "2.safetensors")
    save_shard({"c": torch.ones(3)}, folder / "3.fsd")
    write_index(folder, {"a": "1.bin", "b": "2.safetensors", "c": "3.fsd"})
    assert {name: t.numel() for name, t in fastsd.load(folder).items()} == {"a": 1, "b": 2, "c": 3}


def test_shards_below(folder):
    save_shard({"a": torch.ones(1)}, folder / "parts" / "1.bin")
    write_index(folder, {"a": "parts/1.bin"})
    assert list(fastsd.load(folder)) == ["a"]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.fsd"])
def test_a_directory_with_one_file(name, folder):
    save_shard(STATE, folder / name)
    (folder / "config.json").write_text("{}")
    assert_same(sort(fastsd.load(folder)), sort(STATE))


def test_an_index_with_another_name(folder):
    index = write_shards(folder, name="model.safetensors.index.fp16.json")
    assert_same(sort(fastsd.load(folder)), sort(STATE))
    write_index(folder, "{}", "other.index.json")
    with pytest.raises(FormatError, match=r"several indexes: name one of .*fp16.json, other"):
        fastsd.load(folder)
    assert_same(sort(fastsd.load(index)), sort(STATE))


def test_a_directory_without_anything(folder):
    folder.mkdir()
    with pytest.raises(IsADirectoryError, match="without an index of shards") as caught:
        fastsd.load(folder)
    assert caught.value.filename == str(folder)


@pytest.mark.parametrize("below", ["", "text_encoder"])
def test_the_layout_of_a_cache(below, tmp_path):
    """As huggingface_hub keeps files: links from snapshots/REVISION to blobs."""
    cache = tmp_path / "models--x--y"
    write_shards(tmp_path / "real")
    (cache / "blobs").mkdir(parents=True)
    folder = cache / "snapshots" / "0123" / below
    folder.mkdir(parents=True)
    for number, file in enumerate(sorted((tmp_path / "real").iterdir())):
        file.rename(cache / "blobs" / str(number))
        (folder / file.name).symlink_to(os.path.relpath(cache / "blobs" / str(number), folder))
    assert_same(sort(fastsd.load(folder)), sort(STATE))
    assert_same(sort(fastsd.load(folder / INDEX)), sort(STATE))
    (tmp_path / "link").symlink_to(folder)
    assert_same(sort(fastsd.load(tmp_path / "link")), sort(STATE))


def test_links_within_the_directory(folder):
    write_shards(folder)
    first = folder / "model-00001-of-00002.safetensors"
    first.rename(folder / "other")
    first.symlink_to("other")
    assert_same(sort(fastsd.load(folder)), sort(STATE))


# ---- What leads elsewhere ----


@pytest.fixture
def secret(tmp_path):
    """A good file, outside of the directory."""
    path = tmp_path / "secret.safetensors"
    save_shard(STATE, path)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "x/../../secret.safetensors",
        "./../secret.safetensors",
        "..",
        "..\\secret.safetensors",
        "/etc/passwd",
        "//etc/passwd",
        "",
        "a\0b",
        "\ud800",
    ],
)
@pytest.mark.usefixtures("secret")
def test_names_of_files_elsewhere(name, folder):
    (folder / "x").mkdir(parents=True)
    index = write_index(folder, dict.fromkeys(STATE, name))
    for place in (folder, index):
        for call in (fastsd.load, fastsd.open, lambda f: fastsd.load_into({}, f)):
            with pytest.raises(FormatError, match="names a file") as caught:
                call(place)
            assert caught.value.path == str(index)


def test_an_absolute_path_of_a_good_file(folder, secret):
    write_index(folder, dict.fromkeys(STATE, str(secret)))
    with pytest.raises(FormatError, match="outside of its directory"):
        fastsd.load(folder)


def test_links_that_lead_elsewhere(folder, secret):
    write_index(folder, dict.fromkeys(STATE, "x"))
    link = folder / "x"
    for target in ("../secret.safetensors", str(secret), "/etc/passwd", "/dev/zero", "y"):
        link.symlink_to(target)
        if target == "y":
            (folder / "y").symlink_to("../secret.safetensors")
        with pytest.raises(FormatError, match="'x' is a link that leads out of its directory"):
            fastsd.load(folder)
        link.unlink()
    (folder / "sub").symlink_to("..")
    write_index(folder, dict.fromkeys(STATE, "sub/secret.safetensors"))
    with pytest.raises(FormatError, match="leads out of its directory"):
        fastsd.load(folder)
    link.symlink_to("x")
    write_index(folder, dict.fromkeys(STATE, "x"))
    with pytest.raises((FormatError, OSError)):
        fastsd.load(folder)


def test_blobs_are_those_of_a_cache_only(tmp_path, secret):
    (tmp_path / "blobs").mkdir()
    secret.rename(tmp_path / "blobs" / "1")
    folder = tmp_path / "other" / "0123"
    write_index(folder, dict.fromkeys(STATE, "x"))
    (folder / "x").symlink_to("../../blobs/1")
    with pytest.raises(FormatError, match="leads out of its directory"):
        fastsd.load(folder)


# ---- What is no file ----


def test_a_shard_that_is_no_regular_file(folder):
    write_index(folder, {"a": "x"})
    os.mkfifo(folder / "x")
    with pytest.raises(UnsupportedError, match="not a regular file") as caught:
        fastsd.load(folder)
    assert caught.value.path == str(folder / "x")
    (folder / "x").unlink()
    (folder / "x").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        fastsd.load(folder)
    assert caught.value.filename == str(folder / "x")


def test_an_index_that_is_no_regular_file(folder):
    folder.mkdir()
    os.mkfifo(folder / INDEX)
    with pytest.raises(IsADirectoryError, match="without an index"):
        fastsd.load(folder)
    with pytest.raises(UnsupportedError, match="not a regular file"):
        fastsd.load(folder / INDEX)
    (folder / INDEX).unlink()
    (folder / INDEX).symlink_to("/dev/zero")
    with pytest.raises(IsADirectoryError):
        fastsd.load(folder)
    with pytest.raises(UnsupportedError, match="not a regular file"):
        fastsd.load(folder / INDEX)


def test_a_missing_shard(folder):
    write_shards(folder)
    missing = folder / "model-00002-of-00002.safetensors"
    missing.unlink()
    with pytest.raises(FileNotFoundError, match="a shard is missing") as caught:
        fastsd.load(folder)
    assert caught.value.filename == str(missing)
    assert str(folder / INDEX) in str(caught.value)


# ---- An index that is not as the files are ----


def test_a_tensor_in_two_shards(folder):
    save_shard({"a": torch.ones(1), "b": torch.ones(1)}, folder / "1.safetensors")
    save_shard({"b": torch.zeros(1)}, folder / "2.safetensors")
    index = write_index(folder, {"a": "1.safetensors", "b": "2.safetensors"})
    with pytest.raises(
        FormatError, match=r'"b" is in two shards, .*1\.safe.* and .*2\.safe'
    ) as caught:
        fastsd.load(folder)
    assert caught.value.path == str(index)


def test_a_tensor_that_is_not_where_the_index_says(folder):
    save_shard({"a": torch.ones(1)}, folder / "1.safetensors")
    save_shard({"b": torch.ones(1)}, folder / "2.safetensors")
    for places, name in (
        ({"a": "2.safetensors", "b": "1.safetensors"}, "a"),
        ({"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}, "c"),
    ):
        write_index(folder, places)
        with pytest.raises(FormatError, match=f'tensors are not where the index says: "{name}"'):
            fastsd.load(folder)


BAD_INDEXES = {
    "no JSON": ('{"weight_map": {', "is no JSON"),
    "text behind": ('{"weight_map": {}} x', "is no JSON"),
    "a list": ("[1]", None),
    "no map": ('{"metadata": {}}', 'has no "weight_map"'),
    "a map that is a list": ('{"weight_map": ["a"]}', 'has no "weight_map"'),
    "a map that is null": ('{"weight_map": null}', 'has no "weight_map"'),
    "a number for a name": ('{"weight_map": {"a": 1}}', 'no file name for "a"'),
    "null for a name": ('{"weight_map": {"a": null}}', 'no file name for "a"'),
    "a list for a name": ('{"weight_map": {"a": ["x"]}}', 'no file name for "a"'),
    "a name twice": ('{"weight_map": {"a": "x", "a": "y"}}', "a name occurs twice"),
    "a map twice": ('{"weight_map": {}, "weight_map": {}}', "a name occurs twice"),
    "deep nesting": ('{"weight_map":' + "[" * 100_000, "is no JSON"),
    "no UTF-8": ('{"weight_map": {"a": "\udcff"}}', None),
    "a huge number": ('{"x": ' + "9" * 10_000 + "}", "is no JSON"),
    "nothing": ('{"weight_map": {}}', "names no files"),
}


@pytest.mark.parametrize("name", BAD_INDEXES)
def test_an_index_that_cannot_be(name, folder):
    text, message = BAD_INDEXES[name]
    folder.mkdir()
    index = folder / INDEX
    index.write_bytes(text.encode(errors="surrogateescape"))
    for place in (folder, index) if text[0] == "{" else (folder,):
        with pytest.raises(FormatError, match=message) as caught:
            fastsd.load(place)
        assert caught.value.path == str(index)
        assert len(caught.value.detail) < 500


def test_a_huge_index(folder):
    folder.mkdir()
    with (folder / INDEX).open("wb") as file:
        file.write(b'{"weight_map": {}}')
        file.truncate(1 << 40)
    with pytest.raises(LimitError, match="an index of 1099511627776 bytes"):
        fastsd.load(folder)
    write_index(folder, {str(i): f"{i}.bin" for i in range(70_000)})
    with pytest.raises(LimitError, match="names 70000 files"):
        fastsd.load(folder)


# ---- Shards that are damaged, or would run code ----


def test_a_damaged_shard_is_named(folder):
    write_shards(folder)
    shard = folder / "model-00002-of-00002.safetensors"
    data = shard.read_bytes()
    for damaged in (data[:-1], data[:20], b"", b"version https://git-lfs.github.com/spec/v1\n"):
        shard.write_bytes(damaged)
        with pytest.raises(FormatError) as caught:
            fastsd.load(folder)
        assert caught.value.path == str(shard)


class Exploit:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_a_shard_that_would_run_code(folder, monkeypatch):
    write_shards(folder, "bin", KINDS["bin"])
    monkeypatch.chdir(folder)
    shard = folder / "model-00002-of-00002.bin"
    torch.save({"b.weight": torch.ones(1), "b.count": Exploit()}, shard)
    index = folder / KINDS["bin"]
    index.write_text(index.read_text().replace('"b.count"', '"b.weight"'), "utf-8")
    write_index(
        folder, {"a.weight": "model-00001-of-00002.bin", "b.weight": shard.name}, index.name
    )
    with pytest.raises(pickle.UnpicklingError, match=f"{re.escape(str(shard))}: Weights only"):
        fastsd.load(folder)
    assert fastsd.get_unsafe_globals_in_checkpoint(folder) == [f"{os.name}.mkdir"]
    shard.write_bytes(pickle.dumps({"b.weight": Exploit()}))
    with pytest.raises(FastsdError, match="only torch reads"):
        fastsd.load(folder)
    assert not Path("executed").exists()


def test_a_shard_that_holds_no_dictionary(folder):
    save_shard({"a": torch.ones(1)}, folder / "1.safetensors")
    torch.save(torch.ones(2), folder / "2.bin")
    write_index(folder, {"a": "1.safetensors", "tensor": "2.bin"})
    with pytest.raises(FormatError, match="a shard that holds a Tensor"):
        fastsd.load(folder)


def test_many_threads(folder):
    write_shards(folder)
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(fastsd.load(folder))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for found in results:
        assert_same(sort(found), sort(STATE))


def test_one_shard_keeps_its_type(folder):
    torch.save(small_state(), folder.with_suffix(".pth"))
    folder.mkdir()
    folder.with_suffix(".pth").rename(folder / "pytorch_model.bin")
    assert_same(fastsd.load(folder), small_state())
