"""State_dicts in several files, by Hugging Face's convention."""

import errno
import json
import os
from collections import OrderedDict

import pytest
import torch
from same import assert_same, filled

import fastsd
from fastsd import _core, shards
from fastsd.shards import NAMES, plan_shards, write_sharded

hub = pytest.importorskip("huggingface_hub")
safetensors_torch = pytest.importorskip("safetensors.torch")

FORMATS = list(NAMES)
LOADERS = {
    "fsd": fastsd.load,
    "pth": torch.load,
    "safetensors": safetensors_torch.load_file,
}


def make_state():
    state = OrderedDict((f"layer.{i}", filled((100 + i,), torch.float32)) for i in range(10))
    state["huge"] = filled((5000,), torch.float32)
    state["tied"] = state["layer.3"]
    state._metadata = OrderedDict({"": {"version": 1}})
    return state


def read_index(folder, format):
    return json.loads((folder / NAMES[format].index_file).read_text())


@pytest.mark.parametrize("format", FORMATS)
def test_files_and_index_hold_everything_once(format, tmp_path):
    state = make_state()
    files = write_sharded(state, tmp_path, format, 1000)
    index = read_index(tmp_path, format)
    assert sorted(files) == sorted(os.listdir(tmp_path))
    assert files[-1] == NAMES[format].index_file
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for name, tensor in state.items() if name != "tied"
    )
    found = {}
    for file in files[:-1]:
        shard = LOADERS[format](tmp_path / file)
        assert not shard.keys() & found.keys()
        assert {name for name, place in index["weight_map"].items() if place == file} == set(shard)
        found |= shard
    missing = {"tied"} if format == "safetensors" else set()
    assert found.keys() == state.keys() - missing
    for name in found:
        assert_same(found[name], state[name])


def test_names_are_those_of_the_convention(tmp_path):
    for format, first in (
        ("fsd", "model-00001-of-00003.fsd"),
        ("pth", "pytorch_model-00001-of-00003.bin"),
        ("safetensors", "model-00001-of-00003.safetensors"),
    ):
        state = {str(i): torch.ones(10) for i in range(3)}
        assert write_sharded(state, tmp_path, format, 40)[0] == first


@pytest.mark.parametrize("format", FORMATS)
def test_tied_tensors_stay_together(format):
    files = plan_shards(make_state(), format, 1000).files
    (shard,) = (names for names in files.values() if "tied" in names)
    assert "layer.3" in shard


def test_the_rules_are_those_of_the_hub():
    state = make_state()
    split = hub.split_torch_state_dict_into_shards(state, max_shard_size=1000)
    shards = plan_shards(state, "safetensors", 1000)
    assert {file: set(names) for file, names in shards.files.items()} == {
        file: set(names) for file, names in split.filename_to_tensors.items()
    }
    order = list(state)
    for names in shards.files.values():
        assert names == sorted(names, key=order.index)


@pytest.mark.parametrize("format", ["fsd", "pth"])
def test_each_shard_is_what_the_dictionary_was(format, tmp_path):
    state = make_state()
    for file in write_sharded(state, tmp_path, format, 1000)[:-1]:
        shard = LOADERS[format](tmp_path / file)
        assert type(shard) is OrderedDict
        assert shard._metadata == state._metadata


@pytest.mark.parametrize("format", FORMATS)
def test_what_fits_one_file_has_no_index(format, tmp_path):
    only = NAMES[format].pattern.format(suffix="")
    write_sharded(make_state(), tmp_path, format, 1000)
    assert write_sharded(make_state(), tmp_path, format, 1 << 20) == [only]
    assert NAMES[format].index_file not in os.listdir(tmp_path)
    write_sharded(make_state(), tmp_path, format, 1000, durable=True)
    assert only not in os.listdir(tmp_path)
    assert write_sharded({}, tmp_path, format, 1000) == [only]
    assert LOADERS[format](tmp_path / only) == {}


def test_what_is_no_tensor_is_refused(tmp_path):
    with pytest.raises(fastsd.UnsupportedError, match=r"\['a', 'b'\]"):
        write_sharded({"a": 1, "b": {}, "c": torch.ones(1)}, tmp_path, "pth", 1000)
    with pytest.raises(ValueError, match="positive"):
        write_sharded({}, tmp_path, "pth", 0)


def test_a_missing_hub_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"fastsd\[hub\]"):
        write_sharded({}, tmp_path, "pth", 1000)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["pth", "safetensors"])
def test_transformers_reads_it(format, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=20,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config)
    config.save_pretrained(tmp_path)
    assert len(write_sharded(model.state_dict(), tmp_path, format, 10_000)) > 3
    loaded, report = transformers.BertForMaskedLM.from_pretrained(
        tmp_path, use_safetensors=format == "safetensors", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))


# ---- Over what an earlier save left ----


def by_name(state):
    return dict(sorted(state.items()))


def save_both(folder, format):
    """An old save and a new one, whose shards have the same names."""
    state = by_name(make_state())
    del state["tied"]
    old = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    new = {name: torch.ones_like(tensor) for name, tensor in old.items()}
    files = write_sharded(old, folder, format, 1000)
    return old, new, files


@pytest.mark.parametrize("format", FORMATS)
def test_a_save_that_fails_leaves_the_old_one(format, tmp_path, monkeypatch):
    old, new, files = save_both(tmp_path, format)
    make_plan = shards.make_plan
    for failing in files[:-1]:  # of which the index is the last

        def fail(shard, format, path, *args, failing=failing, **kwargs):
            if path.endswith(failing.encode()):
                raise OSError(errno.ENOSPC, "full")
            return make_plan(shard, format, path, *args, **kwargs)

        monkeypatch.setattr(shards, "make_plan", fail)
        with pytest.raises(OSError, match="full"):
            write_sharded(new, tmp_path, format, 1000)
        assert_same(by_name(fastsd.load(tmp_path)), old)
        assert sorted(os.listdir(tmp_path)) == sorted(files)


@pytest.mark.parametrize("format", FORMATS)
def test_shards_of_two_saves_are_never_shown_as_one(format, tmp_path):
    """Whichever of the calls that change the directory is the last one that a process makes."""
    _, new, files = save_both(tmp_path / "0", format)
    seen = set()
    for count in range(len(files) + 3):
        folder = tmp_path / str(count)
        old, new, _ = save_both(folder, format)
        child = os.fork()
        if child == 0:
            os._exit(save_and_die(new, folder, format, count))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (0, 77)
        try:
            found = by_name(fastsd.load(folder))
        except IsADirectoryError:
            seen.add("none")
            continue
        is_old = not any(tensor.any() for tensor in found.values())
        assert_same(found, old if is_old else new)
        seen.add("old" if is_old else "new")
    assert seen == {"old", "none", "new"}
    write_sharded(new, tmp_path / "2", format, 1000)
    assert_same(by_name(fastsd.load(tmp_path / "2")), new)


def save_and_die(state, folder, format, count):
    """Saves in a process that ends in place of the call after `count` ones."""
    left = count

    def dying(call):
        def count_down(*args, **kwargs):
            nonlocal left
            if left == 0:
                os._exit(77)
            left -= 1
            return call(*args, **kwargs)

        return count_down

    os.unlink = dying(os.unlink)
    _core.PendingFile.commit = dying(_core.PendingFile.commit)
    write_sharded(state, folder, format, 1000)
    return 0
