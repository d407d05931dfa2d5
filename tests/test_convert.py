"""From every format that can be read to every one that can be written."""

import json
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from same import assert_same, filled, shares_storage, small_state

import fastsd
from fastsd import convert
from fastsd.shards import NAMES, write_sharded

safetensors_torch = pytest.importorskip("safetensors.torch")
pytest.importorskip("huggingface_hub")

METADATA = {"author": "me"}


class Mine:
    """What no restricted unpickler makes."""

    def __init__(self):
        self.weight = torch.arange(6.0)
        self.half = self.weight[:3]


class Trap:
    """What leaves a trace once it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def make_state():
    state = small_state()
    state["tied"] = state["weight"]
    state._metadata = OrderedDict({"": {"version": 1}, "layer": {"version": 2}})
    return state


def as_big_endian(path):
    """The same zip file, as a big-endian machine has it: every item here has four bytes."""

    def swap(name, data):
        if "/data/" in name:
            return b"".join(data[i : i + 4][::-1] for i in range(0, len(data), 4))
        return b"big" if name.endswith("/byteorder") else data

    with zipfile.ZipFile(path) as file:
        records = [(name, swap(name, file.read(name))) for name in file.namelist()]
    with zipfile.ZipFile(path, "w") as file:
        for name, data in records:
            file.writestr(name, data)


def write_legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


def write_dcp(state, path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    dcp.save(dict(state), checkpoint_id=path, no_dist=True)


def write_detectron2(state, path):
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "me"}))


SOURCES = {
    "fsd": fastsd.save,
    "pth": torch.save,
    "safetensors": lambda state, path: fastsd.save(state, path, format="safetensors"),
    "legacy": write_legacy,
    "fsd shards": lambda state, path: write_sharded(state, path, "fsd", 40),
    "pth shards": lambda state, path: write_sharded(state, path, "pth", 40),
    "safetensors shards": lambda state, path: write_sharded(state, path, "safetensors", 40),
    "dcp": write_dcp,
}
LOADERS = {
    "fsd": fastsd.load,
    "pth": torch.load,
    "safetensors": safetensors_torch.load_file,
}


def load_all(target, format, is_sharded):
    """What the formats' own libraries find."""
    if not is_sharded:
        return LOADERS[format](target)
    index = json.loads((target / NAMES[format].index_file).read_text())
    files = sorted(set(index["weight_map"].values()))
    found = {}
    for file in files:
        found |= LOADERS[format](target / file)
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("is_sharded", [False, True], ids=["file", "shards"])
@pytest.mark.parametrize("to", ["fsd", "pth", "safetensors"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_format_to_every_other(source, to, is_sharded, tmp_path):
    state = make_state()
    SOURCES[source](state, tmp_path / "source")
    target = tmp_path / "target"
    report = convert(
        tmp_path / "source",
        target,
        to=to,
        max_shard_size=40 if is_sharded else None,
        verify=True,
    )
    assert (report.verified, report.dropped, report.picked) == (True, (), None)
    assert report.tensors == len(state)
    files = target.iterdir() if is_sharded else [target]
    assert report.target_nbytes == sum(file.stat().st_size for file in files)
    found = load_all(target, to, is_sharded)
    is_tied = source != "dcp"  # which does not say what was one tensor
    missing = {"tied"} if to == "safetensors" and is_tied else set()
    assert found.keys() == state.keys() - missing
    for name, tensor in found.items():
        assert_same(tensor, state[name])
    again = fastsd.load(target)
    assert again.keys() == state.keys()
    if is_tied:
        assert shares_storage(again["weight"], again["tied"])
    if "shards" not in source and is_tied and not is_sharded:
        assert list(again) == list(state)
        assert type(again) is OrderedDict
        assert again._metadata == state._metadata


@pytest.mark.parametrize("to", ["fsd", "pth", "safetensors"])
def test_big_endian_files(to, tmp_path):
    state = {"a": torch.arange(5.0), "b": torch.arange(4, dtype=torch.int32)}
    torch.save(state, tmp_path / "a.pth")
    as_big_endian(tmp_path / "a.pth")
    assert_same(torch.load(tmp_path / "a.pth"), state)
    convert(tmp_path / "a.pth", tmp_path / "b", to=to, verify=True)
    assert_same(LOADERS[to](tmp_path / "b"), state)


def test_a_big_endian_pickle_is_carried_in_its_order(tmp_path):
    """To "pth", which has a record for it; .fsd files are little-endian."""
    state = {"a": torch.arange(5.0), "b": Mine()}
    torch.save(state, tmp_path / "a.pth")
    as_big_endian(tmp_path / "a.pth")
    report = convert(tmp_path / "a.pth", tmp_path / "b.pth", verify=True)
    assert report.layout == "carried"
    assert read_records(tmp_path / "b.pth") == read_records(tmp_path / "a.pth")
    with pytest.raises(pickle.UnpicklingError, match="trust=True"):
        convert(tmp_path / "a.pth", tmp_path / "b.fsd")
    convert(tmp_path / "a.pth", tmp_path / "b.fsd", trust=True, verify=True)
    found = fastsd.load(tmp_path / "b.fsd", weights_only=False)
    assert torch.equal(found["a"], state["a"])
    assert torch.equal(found["b"].weight, state["b"].weight)


def test_detectron2_takes_trust(tmp_path):
    state = {"a": torch.arange(5.0), "b": torch.ones(2, 2)}
    write_detectron2(state, tmp_path / "a.pkl")
    for to in ("fsd", "safetensors"):
        with pytest.raises(fastsd.FastsdError, match=r"a\.pkl.*trust|a\.pkl.*any code"):
            convert(tmp_path / "a.pkl", tmp_path / "b", to=to)
        assert not (tmp_path / "b").exists()
    report = convert(tmp_path / "a.pkl", tmp_path / "b.safetensors", trust=True, verify=True)
    assert (report.layout, report.picked) == ("detectron2", "model")
    assert report.dropped == ("__author__: not in 'model'",)
    assert_same(safetensors_torch.load_file(tmp_path / "b.safetensors"), state)
    convert(tmp_path / "a.pkl", tmp_path / "b.pth", pick="model", trust=True, verify=True)
    assert set(torch.load(tmp_path / "b.pth", weights_only=False)) == {"a", "b"}


# ---- Pickles that are carried ----


def refuse(*args, **kwargs):
    raise AssertionError("something was unpickled")


@pytest.fixture
def no_unpickling(monkeypatch):
    monkeypatch.setattr(torch.serialization, "_load", refuse)
    monkeypatch.setattr(torch._weights_only_unpickler, "Unpickler", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)


def read_records(path):
    with zipfile.ZipFile(path) as file:
        records = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    return {name: data for name, data in records.items() if name.startswith("data")}


def test_pickles_go_there_and_back_bit_for_bit(tmp_path, no_unpickling):
    trace = tmp_path / "trace"
    state = {"mine": Mine(), "trap": Trap(trace), "big": filled((1 << 20,), torch.float32)[5:10]}
    torch.save(state, tmp_path / "a.pth")
    report = convert(tmp_path / "a.pth", tmp_path / "b.fsd", metadata=METADATA, verify=True)
    assert (report.layout, report.tensors, report.verified) == ("carried", 2, True)
    with pytest.raises(fastsd.UnsupportedError, match="'author'"):
        convert(tmp_path / "b.fsd", tmp_path / "c.pth")
    report = convert(tmp_path / "b.fsd", tmp_path / "c.pth", metadata={}, verify=True)
    assert (report.layout, report.dropped) == ("carried", ())
    assert read_records(tmp_path / "c.pth") == read_records(tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "d.pth", verify=True)
    assert read_records(tmp_path / "d.pth") == read_records(tmp_path / "a.pth")
    assert not trace.exists()


def test_carried_pickles_load_as_they_did(tmp_path):
    torch.save({"mine": Mine()}, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "b.fsd")
    convert(tmp_path / "b.fsd", tmp_path / "c.pth")
    for mine in (
        fastsd.load(tmp_path / "b.fsd", weights_only=False)["mine"],
        torch.load(tmp_path / "c.pth", weights_only=False)["mine"],
    ):
        assert torch.equal(mine.weight, torch.arange(6.0))
        assert shares_storage(mine.weight, mine.half)


@pytest.mark.parametrize("to", ["fsd", "safetensors"])
def test_the_part_that_is_plain_is_taken_without_unpickling(to, tmp_path, no_unpickling):
    trace = tmp_path / "trace"
    state = make_state()
    torch.save({"state_dict": state, "trap": Trap(trace), "epoch": 3}, tmp_path / "a.ckpt")
    report = convert(tmp_path / "a.ckpt", tmp_path / "b", to=to, pick="auto", verify=True)
    assert report.picked == "state_dict"
    assert report.dropped == ("trap: not in 'state_dict'", "epoch: not in 'state_dict'")
    assert_same(fastsd.load(tmp_path / "b"), state)
    assert not trace.exists()


def test_what_takes_trust_says_so_and_names_what_it_wants(tmp_path):
    trace = tmp_path / "trace"
    module = torch.nn.Linear(2, 3)
    torch.save({"model": module, "trap": Trap(trace)}, tmp_path / "a.pt")
    write_legacy({"model": module}, tmp_path / "old.pt")
    for name in ("a.pt", "old.pt"):
        with pytest.raises(pickle.UnpicklingError) as caught:
            convert(tmp_path / name, tmp_path / "b.safetensors")
        text = str(caught.value)
        assert str(tmp_path / name) in text
        assert "torch.nn.modules.linear.Linear" in text
        assert "trust=True" in text
    assert not trace.exists()
    assert not (tmp_path / "b.safetensors").exists()
    for name in ("a.pt", "old.pt"):
        report = convert(tmp_path / name, tmp_path / "b.safetensors", trust=True, verify=True)
        assert report.picked == "model"
        assert_same(fastsd.load(tmp_path / "b.safetensors")["weight"], module.weight.detach())
    assert trace.exists()


# ---- Round trips ----


NESTED = OrderedDict(
    model=make_state(),
    epoch=3,
    history=[1.5, float("inf"), ("a", None)],
    optimizer={"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"params": [0]}]},
)


@pytest.mark.parametrize("first", ["fsd", "pth"])
@pytest.mark.parametrize("second", ["fsd", "pth"])
def test_nested_objects_keep_everything(first, second, tmp_path):
    fastsd.save(NESTED, tmp_path / "a", format=first)
    convert(tmp_path / "a", tmp_path / "b", to=second, verify=True)
    assert_same(LOADERS[second](tmp_path / "b"), NESTED)
    convert(tmp_path / "b", tmp_path / "c", to=first, verify=True)
    assert_same(LOADERS[first](tmp_path / "c"), NESTED)


def test_metadata_and_tied_names_survive_safetensors(tmp_path):
    state = make_state()
    fastsd.save(state, tmp_path / "a.fsd", metadata=METADATA)
    convert(tmp_path / "a.fsd", tmp_path / "b.safetensors", verify=True)
    with safetensors_torch.safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert METADATA.items() <= file.metadata().items()
        assert file.metadata()["format"] == "pt"
    convert(tmp_path / "b.safetensors", tmp_path / "c.fsd", verify=True)
    found = fastsd.load(tmp_path / "c.fsd")
    assert_same(found, state)
    assert shares_storage(found["weight"], found["tied"])
    assert fastsd.open(tmp_path / "c.fsd").metadata == METADATA


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [None, 10_000])
@pytest.mark.parametrize("to", ["pth", "safetensors"])
def test_transformers_reads_it(to, size, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=20,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config)
    fastsd.save(model.state_dict(), tmp_path / "a.fsd")
    folder = tmp_path / "model"
    folder.mkdir()
    config.save_pretrained(folder)
    only = NAMES[to].pattern.format(suffix="")
    convert(tmp_path / "a.fsd", folder if size else folder / only, to=to, max_shard_size=size)
    loaded, report = transformers.BertForMaskedLM.from_pretrained(
        folder, use_safetensors=to == "safetensors", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))
