"""Which framework a checkpoint comes from: real ones where they install, their keys elsewhere."""

from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastsd
from fastsd.convert import convert
from fastsd.layouts import Kind, Layout, kinds_of, recognise

T, M, X, V = Kind.TENSOR, Kind.MAPPING, Kind.OBJECT, Kind.VALUE


@pytest.mark.parametrize(
    ("top_level", "name", "pick"),
    [
        ({"conv1.weight": T, "bn1.num_batches_tracked": T}, "flat", None),
        ({"weight": T, "_extra_state": X}, "flat", None),
        ({"model": T, "optimizer": T}, "flat", None),
        ({}, "flat", None),
        ({"encoder": M, "decoder": M}, "nested", None),
        ({"epoch": V, "arch": V, "state_dict": M, "optimizer": M, "version": V}, "timm", 0),
        ({"state_dict": M, "state_dict_ema": M, "epoch": V}, "timm", "state_dict"),
        ({"model": M, "model_ema": M, "optimizer": M, "args": X}, "timm", "model"),
        ({"state_dict_ema": M}, "timm", "state_dict_ema"),
        (
            {"pytorch-lightning_version": V, "state_dict": M, "loops": M, "optimizer_states": V},
            "lightning",
            "state_dict",
        ),
        ({"meta": M, "state_dict": M, "message_hub": M, "optimizer": M}, "mmengine", "state_dict"),
        ({"model": M, "__author__": V, "matching_heuristics": V}, "detectron2", "model"),
        ({"model": M, "optimizer": M, "scheduler": M, "iteration": V}, "detectron2", "model"),
        ({"model": M, "optimizer": M, "epoch": V}, "training", "model"),
        ({"model_state_dict": M, "optimizer_state_dict": M}, "training", "model_state_dict"),
        ({"params": M, "params_ema": M}, "training", "params"),
        ({"params_ema": M}, "training", "params_ema"),
        ({"net": M, "acc": V, "epoch": V}, "training", "net"),
        ({"state_dict": M}, "training", "state_dict"),
    ],
)
def test_dictionaries(top_level, name, pick):
    layout = recognise(top_level)
    assert (layout.name, layout.pick) == (name, "state_dict" if pick == 0 else pick)
    assert not layout.is_module


@pytest.mark.parametrize(
    ("top_level", "pick", "is_average", "others"),
    [
        ({"model": X, "ema": V, "train_args": M, "date": V}, "model", False, ()),
        ({"model": X, "ema": X, "updates": V, "best_fitness": V}, "model", False, ("ema",)),
        ({"model": V, "ema": X, "train_args": M}, "ema", True, ()),
    ],
)
def test_whole_modules_of_ultralytics(top_level, pick, is_average, others):
    layout = recognise(top_level)
    assert layout == Layout(
        "ultralytics", pick, is_module=True, is_average=is_average, others=others
    )


def test_raw_weights_are_preferred_and_it_says_so():
    layout = recognise({"ema": M, "generator": M, "model": M})
    assert (layout.pick, layout.is_average) == ("model", False)
    assert layout.others == ("generator", "ema")
    assert layout.note == "'model' is taken; there are also 'generator', 'ema'"
    layout = recognise({"params_ema": M})
    assert layout.is_average
    assert layout.note == "there are no raw weights: the moving average in 'params_ema' is taken"
    assert recognise({"model": M, "epoch": V}).note == ""


def test_optimizer_state():
    keys = ("optimizer", "optimizer_states", "lr_schedulers", "scheduler", "scaler", "amp_scaler")
    top_level = {"state_dict": M, "epoch": V, **dict.fromkeys(keys, M)}
    assert recognise(top_level).optimizer == keys
    assert recognise({"optimizer.weight": T, "scale": T}).optimizer == ()


@pytest.mark.parametrize(
    ("pick", "names", "prefix"),
    [
        (None, ["module.a", "module.b.c"], "module."),
        (None, ["module.a", "b"], ""),
        (None, ["modules.a"], ""),
        (None, ["n_averaged", "module.a"], "module."),
        (None, ["module._orig_mod.a", "module._orig_mod.b"], "module._orig_mod."),
        (None, ["model.a", "model.b"], ""),
        ("state_dict", ["state_dict.module.a", "optimizer.state.0.exp_avg"], "module."),
        ("state_dict", ["state_dict.module.a", "state_dict.b"], ""),
        (None, [], ""),
    ],
)
def test_prefixes(pick, names, prefix):
    top_level = dict.fromkeys(names, T) if pick is None else {pick: M}
    assert recognise(top_level, names).prefix == prefix


def test_prefixes_of_lightning():
    top_level = {"pytorch-lightning_version": V, "state_dict": M}
    names = ["state_dict.model.model.embed.weight", "state_dict.model.model.head.weight"]
    assert recognise(top_level, names).prefix == "model."


def test_kinds_of_a_loaded_checkpoint():
    class Config:
        pass

    checkpoint = {
        "t": torch.zeros(1),
        "p": torch.nn.Parameter(torch.zeros(1)),
        "m": OrderedDict(),
        "v": [1],
        "n": None,
        "o": Config(),
        3: 4,
    }
    assert kinds_of(checkpoint, torch.Tensor) == {"t": T, "p": T, "m": M, "v": V, "n": V, "o": X}


@given(
    st.dictionaries(st.sampled_from(["model", "ema", "meta", "opt", "x"]), st.sampled_from(Kind))
)
def test_any_keys_make_a_layout(top_level):
    layout = recognise(top_level)
    wanted = Kind.OBJECT if layout.is_module else Kind.MAPPING
    for key in (*layout.others, *([layout.pick] if layout.pick else [])):
        assert top_level[key] is wanted
    assert layout.pick not in layout.others
    assert set(layout.optimizer) <= top_level.keys()


@pytest.mark.filterwarnings("default")  # Lightning's own, about torch and its data loaders
def test_a_checkpoint_of_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Linear(2, 2)

        def training_step(self, batch):
            return self.model(batch).sum()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Model(), torch.utils.data.DataLoader(torch.zeros(2, 2)))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=False)
    names = [f"state_dict.{name}" for name in checkpoint["state_dict"]]
    layout = recognise(kinds_of(checkpoint, torch.Tensor), names)
    assert (layout.name, layout.pick, layout.prefix) == ("lightning", "state_dict", "model.")
    assert "optimizer_states" in layout.optimizer
    convert(tmp_path / "x.ckpt", tmp_path / "x.fsd", pick="auto", strip_prefix=layout.prefix)
    state = fastsd.load(tmp_path / "x.fsd")
    assert state.keys() == {"weight", "bias"}
    assert torch.equal(state["weight"], checkpoint["state_dict"]["model.weight"])
