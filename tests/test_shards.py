"""State_dicts in several files, by Hugging Face's convention."""

import json
import os
from collections import OrderedDict

import pytest
import torch
from same import assert_same, filled

import fastsd
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


@pytest.mark.parametrize("format", FORMATS)
def test_the_index_comes_last(format, tmp_path, monkeypatch):
    write_sharded(make_state(), tmp_path, format, 1000)
    before = read_index(tmp_path, format)
    folder = tmp_path / NAMES[format].index_file

    def fail(source, target):
        assert target == str(folder)
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        write_sharded(make_state(), tmp_path, format, 4000)
    assert read_index(tmp_path, format) == before
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


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
