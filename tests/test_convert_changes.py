"""What conversions change on request, and what they would lose otherwise."""

import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from same import assert_same, filled, shares_storage, small_state

import fastsd
from fastsd import convert
from fastsd.cast import Caster

ADAM = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


@pytest.fixture
def run(tmp_path):
    """Converts an object, and loads what comes of it."""

    def save_and_convert(obj, to="fsd", **options):
        fastsd.save(obj, tmp_path / "source.fsd")
        report = convert(
            tmp_path / "source.fsd", tmp_path / "target", to=to, verify=True, **options
        )
        return fastsd.load(tmp_path / "target"), report

    return save_and_convert


# ---- Picking ----


def test_keys_may_hold_dots(run):
    obj = {"a": {"b.c": {"w": torch.ones(1)}, "b": {"c": 1}}, "a.b": {"d": torch.zeros(1)}, "n": 1}
    found, report = run(obj, pick="a.b.d")
    assert_same(found, obj["a.b"]["d"])
    assert report.dropped == ("a: not in 'a.b.d'", "n: not in 'a.b.d'")
    del obj["a.b"]
    found, report = run(obj, pick="a.b.c")
    assert_same(found, obj["a"]["b.c"])
    assert report.dropped == ("n: not in 'a.b.c'", "a.b: not in 'a.b.c'")


@pytest.mark.parametrize("pick", ["x", "a.x", "a.w.x"])
def test_what_is_not_there_is_not_picked(run, pick, tmp_path):
    with pytest.raises(fastsd.NamesError, match="x") as caught:
        run({"a": {"w": torch.ones(1)}}, pick=pick)
    assert caught.value.path == str(tmp_path / "source.fsd")
    assert not (tmp_path / "target").exists()


def test_a_key_that_is_missing_needs_no_trust(tmp_path):
    torch.save({"model": Holder(), "a": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(fastsd.NamesError, match="there are 'model'"):
        convert(tmp_path / "a.pth", tmp_path / "b.fsd", pick="weights")


@pytest.mark.parametrize("key", ["state_dict", "model", "model_ema", "net", "params", "ema"])
def test_weights_are_found(run, key):
    obj = {"epoch": 3, key: small_state(), "optimizer": ADAM}
    for to in ("fsd", "safetensors"):
        found, report = run(obj, to, pick="auto")
        assert_same(found, obj[key])
        assert report.picked == key
        assert report.dropped == (f"epoch: not in {key!r}", f"optimizer: not in {key!r}")


def test_optimizers_are_dropped(run):
    state = small_state()
    obj = OrderedDict(model=state, optimizer=ADAM, lr_schedulers=[{"last_epoch": 1}], epoch=3)
    obj.note = "mine"
    found, report = run(obj, drop_optimizer=True)
    wanted = OrderedDict(model=state, epoch=3)
    wanted.note = "mine"
    assert_same(found, wanted)
    assert report.dropped == tuple(
        f"{key}: state of an optimizer" for key in ("optimizer", "lr_schedulers")
    )


# ---- Names ----


def test_prefixes_go_from_names_and_modules(run):
    state = OrderedDict(
        {"module.a.w": torch.ones(1), "module.b": torch.ones(2), "n": torch.ones(3)}
    )
    modules = {"": {"version": 1}, "module": {"version": 2}, "module.a": {"version": 3}}
    state._metadata = OrderedDict(modules)
    found, _ = run(state, strip_prefix="module.")
    assert list(found) == ["a.w", "b", "n"]
    assert dict(found._metadata) == {"": {"version": 2}, "a": {"version": 3}}


@pytest.mark.parametrize(
    ("names", "prefix", "problem"),
    [
        (["a", "b"], "m.", "no key starts with 'm.'"),
        (["m.a", "a"], "m.", 'two keys "a"'),
    ],
)
def test_prefixes_that_do_not_fit(run, names, prefix, problem, tmp_path):
    with pytest.raises(fastsd.NamesError, match=problem):
        run({name: torch.ones(1) for name in names}, strip_prefix=prefix)
    with pytest.raises(fastsd.NamesError, match="a list"):
        run([torch.ones(1)], strip_prefix=prefix)


# ---- Casting ----


@pytest.mark.parametrize("to", ["fsd", "pth", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_point_is_cast_as_torch_does(run, to, dtype):
    state = OrderedDict(
        (str(t), filled((7, 5), t, seed=i))
        for i, t in enumerate((torch.float16, torch.bfloat16, torch.float32, torch.float64))
    )
    state |= {
        "int": torch.arange(5),
        "float8": filled((8,), torch.float8_e4m3fn),
        "bool": torch.tensor([True]),
        "complex": torch.ones(2, dtype=torch.complex64),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(1.5),
        "big": torch.randn(3_000_000),
    }
    del state["complex"]
    found, _ = run(state, to, dtype=dtype)
    kept = {"int", "float8", "bool"}
    assert_same(dict(found), {k: t if k in kept else t.to(dtype) for k, t in state.items()})


def test_what_shares_memory_still_does(run):
    base = torch.randn(4, 6)
    state = {"a": base, "t": base.t(), "row": base[1], "tied": base, "int": torch.arange(3)}
    found, _ = run(state, dtype=torch.bfloat16)
    half = base.bfloat16()
    wanted = {"a": half, "t": half.t(), "row": half[1], "tied": half, "int": torch.arange(3)}
    assert_same(found, wanted)
    assert shares_storage(*(found[name] for name in ("a", "t", "row", "tied")))


def test_parameters_and_attributes_are_kept(run):
    state = {
        "p": torch.nn.Parameter(torch.randn(3)),
        "q": torch.nn.Parameter(torch.randn(3), requires_grad=False),
        "g": torch.randn(3).requires_grad_(),
        "meta": torch.empty(3, 2, device="meta"),
        "note": torch.randn(2),
    }
    state["note"].axis = 1
    for to in ("fsd", "pth"):
        found, _ = run(state, to, dtype=torch.float16)
        assert [type(t) for t in found.values()] == [type(t) for t in state.values()]
        assert [t.requires_grad for t in found.values()] == [True, False, True, False, False]
        assert found["note"].axis == 1
        assert {t.dtype for t in found.values()} == {torch.float16}
        assert found["meta"].is_meta


def test_nested_values_and_optimizers_are_cast_too(run):
    state = small_state()
    obj = OrderedDict(model=state, more=[state["weight"], (torch.ones(2), 3)], optimizer=ADAM)
    obj["again"] = obj["more"]
    found, _ = run(obj, dtype=torch.bfloat16)
    assert found["more"] is found["again"]
    assert found["model"]["weight"] is found["more"][0]
    assert found["more"][1][0].dtype == torch.bfloat16
    assert found["optimizer"]["state"][0]["exp_avg"].dtype == torch.bfloat16
    assert found["optimizer"]["param_groups"] == ADAM["param_groups"]


def test_negated_views_are_cast(tmp_path):
    real = torch.randn(3)
    found = Caster(torch.float16, str(tmp_path)).cast({"a": torch._neg_view(real)})
    assert torch.equal(found["a"], (-real).half())


class Holder:
    def __init__(self):
        self.weight = torch.ones(3)


@pytest.mark.parametrize(
    "value",
    [
        torch.eye(3).to_sparse(),
        torch.nn.Linear(2, 2),
        Holder(),
        {"deep": [torch.return_types.max([torch.ones(2), torch.arange(2)])]},
    ],
    ids=["sparse", "module", "object", "named tuple"],
)
def test_what_cannot_be_cast_is_named(tmp_path, value):
    torch.save({"model": {"x": value}, "a": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(fastsd.UnsupportedError, match=r"a\.pth.*'model\.x") as caught:
        convert(
            *(tmp_path / "a.pth", tmp_path / "b.fsd"), pick=None, dtype=torch.float16, trust=True
        )
    assert caught.value.path == str(tmp_path / "a.pth")
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


def test_memory_of_several_dtypes_cannot_be_cast(run):
    base = torch.randn(4)
    with pytest.raises(fastsd.UnsupportedError, match="'a' and 'b' share memory"):
        run({"a": base, "b": base.view(torch.int32)}, dtype=torch.float16)


def test_only_floating_point_is_cast_to(run):
    with pytest.raises(ValueError, match="int8"):
        run(small_state(), dtype=torch.int8)


# ---- What safetensors cannot hold ----


def make_odd():
    base = torch.arange(8.0)
    odd = torch.ones(2)
    odd.axis = 1
    return {
        "fine": torch.ones(3),
        "array": np.arange(3),
        "values": {"lr": 0.1},
        "epoch": 3,
        7: torch.ones(1),
        "sparse": torch.eye(2).to_sparse(),
        "complex": torch.ones(2, dtype=torch.complex128),
        "meta": torch.ones(2, device="meta"),
        "trained": torch.ones(2, requires_grad=True),
        "odd": odd,
        "left": base[:5],
        "right": base[3:],
        "strings": np.array(["a", "b"]),
    }


LOST = (
    "values",
    "epoch",
    "7",
    "sparse",
    "complex",
    "meta",
    "trained",
    "odd",
    "left",
    "right",
    "strings",
)


def test_every_loss_is_an_error_or_reported(run, tmp_path):
    odd = make_odd()
    with pytest.raises(fastsd.UnsupportedError) as caught:
        run(odd, "safetensors", trust=True)
    lines = str(caught.value).splitlines()[1:]
    assert str(tmp_path / "source.fsd") in str(caught.value)
    assert not (tmp_path / "target").exists()
    found, report = run(odd, "safetensors", lossy=True, trust=True)
    assert [line.strip() for line in lines] == list(report.dropped)
    for name in LOST:
        assert any(name in line.partition(":")[0].split(", ") for line in report.dropped), name
    assert not any(line.startswith(("fine:", "array:")) for line in report.dropped)
    assert set(found) == {"fine", "array", "trained", "odd", "left", "right"}
    assert torch.equal(found["array"], torch.from_numpy(odd["array"]))
    assert torch.equal(found["right"], odd["right"])


def test_dictionaries_lose_nothing_silently(run, tmp_path):
    state = small_state()
    state.note = "mine"
    with pytest.raises(fastsd.UnsupportedError, match="attribute 'note'"):
        run(state, "safetensors")
    found, report = run(state, "safetensors", lossy=True)
    assert report.dropped == ("the dictionary's attribute 'note'",)
    assert type(found) is OrderedDict
    arrays = OrderedDict(a=np.ones(3))
    arrays._metadata = OrderedDict({"": {"version": 1}})
    found, report = run(arrays, "safetensors")
    assert report.dropped == ()
    assert found._metadata == arrays._metadata


@pytest.mark.parametrize("to", ["fsd", "pth", "safetensors"])
def test_only_tensors_go_to_shards(run, to):
    obj = {"a": torch.ones(3), "epoch": 3, 5: torch.ones(1)}
    with pytest.raises(fastsd.UnsupportedError) as caught:
        run(obj, to, max_shard_size=100)
    assert "\n  epoch: " in str(caught.value)
    assert "\n  5: " in str(caught.value)
    found, report = run(obj, to, max_shard_size=100, lossy=True)
    assert list(found) == ["a"]
    assert [line.partition(":")[0] for line in report.dropped] == ["epoch", "5"]
    with pytest.raises(fastsd.UnsupportedError, match="dictionaries"):
        run([torch.ones(3)], to, max_shard_size=100)


def test_torch_refuses_views_of_several_dtypes(run):
    base = torch.randn(4)
    with pytest.raises(fastsd.UnsupportedError, match="different types"):
        run({"a": base, "b": base.view(torch.int32)}, "pth")


# ---- Metadata ----


def test_metadata_are_kept_replaced_or_left_out(tmp_path):
    source, target = tmp_path / "a.fsd", tmp_path / "b"
    fastsd.save(small_state(), source, metadata={"author": "me", "format": "pt"})
    for to in ("fsd", "safetensors"):
        convert(source, target, to=to, verify=True)
        assert fastsd.open(target).metadata["author"] == "me"
        convert(source, target, to=to, metadata={"a": "b"}, verify=True)
        assert fastsd.open(target).metadata.items() - {("format", "pt")} == {("a", "b")}
        convert(source, target, to=to, metadata={}, verify=True)
        assert not fastsd.open(target).metadata.items() - {("format", "pt")}
    with pytest.raises(fastsd.UnsupportedError, match="metadata 'author'"):
        convert(source, target, to="pth")
    report = convert(source, target, to="pth", lossy=True)
    assert report.dropped == ("metadata 'author': the format has no place for it",)
    assert convert(source, target, to="pth", metadata={}).dropped == ()


def test_metadata_of_other_frameworks(tmp_path):
    fastsd.save(small_state(), tmp_path / "a.fsd", metadata={"format": "mlx"})
    with pytest.raises(fastsd.UnsupportedError, match="metadata 'format'"):
        convert(tmp_path / "a.fsd", tmp_path / "b.safetensors")
    convert(tmp_path / "a.fsd", tmp_path / "b.safetensors", lossy=True, verify=True)


def test_metadata_that_differ_between_shards(tmp_path):
    safetensors_torch = pytest.importorskip("safetensors.torch")
    names = {}
    for name in ("a", "b"):
        file = f"{name}.safetensors"
        names[name] = file
        metadata = {"by": name, "for": "all"}
        safetensors_torch.save_file({name: torch.ones(2)}, tmp_path / file, metadata)
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": ' + str(names).replace("'", '"') + "}"
    )
    with pytest.raises(fastsd.UnsupportedError, match=r"metadata 'by' of .*b\.safetensors"):
        convert(tmp_path, tmp_path / "c.fsd")
    convert(tmp_path, tmp_path / "c.fsd", lossy=True)
    assert fastsd.open(tmp_path / "c.fsd").metadata == {"by": "a", "for": "all"}


def test_trust_reads_what_needs_it(tmp_path):
    torch.save({"holder": Holder(), "a": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(pickle.UnpicklingError, match="Holder"):
        convert(tmp_path / "a.pth", tmp_path / "b.fsd", pick="holder")
    report = convert(tmp_path / "a.pth", tmp_path / "b.fsd", pick="holder", trust=True, verify=True)
    assert (report.picked, report.dropped, report.tensors) == ("holder", ("a: not in 'holder'",), 1)
