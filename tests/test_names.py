"""`prefix`, `select` and `rename`: only what is wanted, under the names that are wanted."""

import argparse
import copy
import re
from collections import OrderedDict
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from same import assert_same, filled, shares_storage, small_state, through_memory
from torch import nn

import fastsd
from fastsd import _core


def make_model():
    return nn.Sequential(
        OrderedDict(
            body=nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)),
            head=nn.Linear(3, 2),
        )
    )


def by_hand(state, prefix="", select=lambda name: True, rename=lambda name: name):
    """What people write instead, with dictionaries."""
    bare = {name[len(prefix) :]: t for name, t in state.items() if name.startswith(prefix)}
    return {rename(name): tensor for name, tensor in bare.items() if select(name)}


@pytest.fixture
def saved(path):
    """The path of a model's state, and the state."""
    state = make_model().state_dict()
    fastsd.save(state, path)
    return path, state


# ---- What is chosen ----


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("options", [{}, {"map_location": "cpu"}, {"map_location": lambda s, _: s}])
def test_a_prefix_chooses_and_is_taken_off(options, mmap, saved):
    path, state = saved
    found = fastsd.load(path, prefix="body.", mmap=mmap, **options)
    assert_same(dict(found), by_hand(state, "body."))


@pytest.mark.parametrize(
    ("select", "wanted"),
    [
        ("head.weight", ["head.weight"]),
        ("head.*", ["head.weight", "head.bias"]),
        ("*.1.*_mean", ["body.1.running_mean"]),
        ("????.bias", ["head.bias"]),
        ("body.[0]*s", ["body.0.bias"]),
        (["head.bias", "body.0.*", "head.bias"], ["body.0.weight", "body.0.bias", "head.bias"]),
        ({"head.bias"}, ["head.bias"]),
        ((name for name in ["head.weight", "head.bias"]), ["head.weight", "head.bias"]),
        (lambda name: name.endswith("0.bias"), ["body.0.bias"]),
        (re.compile("head").match, ["head.weight", "head.bias"]),
        ([], []),
        (lambda name: False, []),
    ],
)
def test_select_chooses_in_the_order_of_the_file(select, wanted, saved):
    path, state = saved
    found = fastsd.load(path, select=select)
    assert list(found) == wanted
    assert_same(dict(found), {name: state[name] for name in wanted})


@pytest.mark.parametrize(
    ("rename", "function"),
    [
        ({"": "module."}, lambda name: "module." + name),
        ({"head.": "fc.", "head.bias": "b"}, {"head.weight": "fc.weight", "head.bias": "b"}.get),
        ({"other.": ""}, lambda name: name),
        ({"head": "h", "": "x."}, lambda n: n.replace("head", "h") if "head" in n else "x." + n),
        (str.upper, str.upper),
        ({}, lambda name: name),
    ],
)
def test_rename(rename, function, saved):
    path, state = saved
    found = fastsd.load(path, rename=rename)
    names = [function(name) or name for name in state]
    assert_same(dict(found), dict(zip(names, state.values(), strict=True)))


def test_a_wrapper_is_taken_off_where_there_is_one(path):
    rename = {"module._orig_mod.": "", "module.": "", "_orig_mod.": ""}
    state = make_model().state_dict()
    for wrapper in ("", "module.", "_orig_mod.", "module._orig_mod."):
        fastsd.save({wrapper + name: tensor for name, tensor in state.items()}, path)
        assert list(fastsd.load(path, rename=rename)) == list(state)


def test_select_sees_names_without_the_prefix_and_rename_what_is_left(saved):
    path, state = saved
    seen = []

    def select(name):
        seen.append(name)
        return name.startswith("0.")

    found = fastsd.load(path, prefix="body.", select=select, rename={"0.": "first."})
    assert seen == list(by_hand(state, "body."))
    assert list(found) == ["first.weight", "first.bias"]


def test_a_name_may_look_like_a_pattern(path):
    tensors = {"a[0]": torch.zeros(1), "a0": torch.ones(1), "*": torch.ones(2), "a": torch.ones(3)}
    fastsd.save(tensors, path)
    assert list(fastsd.load(path, select="a[0]")) == ["a[0]"]
    assert list(fastsd.load(path, select="*")) == ["*"]
    assert list(fastsd.load(path, select="a[[]0]")) == ["a[0]"]
    assert list(fastsd.load(path, select="a?")) == ["a0"]


NAMES = st.text("ab.", max_size=4)


@given(
    st.lists(NAMES, unique=True, max_size=8),
    st.text("ab.", max_size=2),
    st.lists(st.text("ab.*?", max_size=3), max_size=3),
    st.dictionaries(st.text("ab.", max_size=2), NAMES, max_size=4),
)
def test_options_do_what_dictionaries_do_by_hand(names, prefix, patterns, parts):
    def rename(name):
        part = max((p for p in parts if name.startswith(p)), key=len, default=None)
        return name if part is None else parts[part] + name[len(part) :]

    def select(name):
        return any(name == p or (p not in bare and fnmatchcase(name, p)) for p in patterns)

    state = {name: torch.full((), float(i)) for i, name in enumerate(names)}
    bare = by_hand(state, prefix)
    left = [name for name in bare if select(name)]
    fits = (
        (not prefix or not all(name.startswith(".") for name in bare))
        and all(p in bare or any(fnmatchcase(name, p) for name in bare) for p in patterns)
        and len(set(map(rename, left))) == len(left)
    )
    options = {"prefix": prefix, "select": patterns, "rename": parts}
    if fits:
        assert_same(through_memory(state, **options), by_hand(state, prefix, select, rename))
    else:
        with pytest.raises(fastsd.NamesError):
            through_memory(state, **options)


# ---- Nested files ----


def make_checkpoint():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(5, 4)).sum().backward()
    optimizer.step()
    return {
        "epoch": 3,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "parts": [{"w": torch.ones(2)}, (torch.zeros(1), torch.ones(1))],
    }


def test_names_of_nested_files_are_the_keys_on_the_way(path):
    checkpoint = make_checkpoint()
    fastsd.save(checkpoint, path)
    model = fastsd.load(path, prefix="model.")
    assert_same(model, checkpoint["model"])
    moments = fastsd.load(path, prefix="optimizer.state.0.")
    assert_same(moments, checkpoint["optimizer"]["state"][0])
    parts = fastsd.load(path, prefix="parts.")
    w, (zero, one) = checkpoint["parts"][0]["w"], checkpoint["parts"][1]
    assert_same(parts, {"0.w": w, "1.0": zero, "1.1": one})
    with fastsd.open(path) as archive:
        everything = fastsd.load(path, prefix="")
        assert list(everything) == list(archive)
        assert_same(everything, dict(archive))


@pytest.mark.parametrize("mmap", [True, False])
def test_tensors_with_attributes_and_arrays_are_only_tensors(mmap, path):
    tensor = torch.ones(2)
    tensor.note = "kept"
    fields = torch.zeros(3).numpy()
    fastsd.save({"a": {"t": tensor, "n": fields}, "b": {(1, 2): torch.zeros(1)}}, path)
    found = fastsd.load(path, prefix="a.", mmap=mmap)
    assert {name: t.tolist() for name, t in found.items()} == {"t": [1, 1], "n": [0, 0, 0]}


# ---- Memory that is shared, and kinds of tensors ----


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("map_location", [None, "cpu", lambda storage, _: storage])
def test_what_is_tied_stays_tied_within_the_selection(map_location, mmap, path):
    base = filled((10, 4), torch.float32)
    same = nn.Parameter(filled((3,), torch.float32))
    state = {
        "whole": base,
        "rows": base[2:4],
        "same": same,
        "again": same,
        "once more": same,
        "alone": torch.ones(2),
        "column": base[:, 1],
    }
    fastsd.save(state, path)
    names = list(state)
    for bits in range(1, 1 << len(names)):
        chosen = [name for i, name in enumerate(names) if bits >> i & 1]
        found = fastsd.load(path, map_location, select=chosen, mmap=mmap)
        assert_same(dict(found), {name: state[name] for name in chosen})
        views = [found[name] for name in chosen if name in {"whole", "rows", "column"}]
        assert not views or shares_storage(*views)


def test_every_kind_of_tensor_can_be_chosen_alone(path):
    state = dict(small_state())
    state |= {
        "parameter": nn.Parameter(torch.ones(2), requires_grad=False),
        "trained": torch.ones(2, requires_grad=True),
        "meta": torch.empty(3, 2, device="meta"),
        "conj": torch.ones(2, dtype=torch.complex64).conj(),
        "strided": filled((4, 6), torch.int16)[::2, ::3],
    }
    fastsd.save(state, path)
    for name, tensor in state.items():
        assert_same(fastsd.load(path, select=[name]), {name: tensor})


def test_only_chosen_storages_are_placed(path):
    fastsd.save({"a": torch.ones(2), "b": torch.ones(30), "c": torch.ones(400)}, path)
    sizes = []

    def place(storage, _):
        sizes.append(storage.nbytes())
        return storage

    fastsd.load(path, place, select=["c", "a"])
    assert sizes == [8, 1600]


def test_only_chosen_tensors_are_made(path):
    fastsd.save({f"t{i}": torch.full((2,), float(i)) for i in range(100)}, path)
    reader = _core.Reader(str(path), str(path), None)
    for bases_only in (False, True):
        by_name, rest, bases = reader.load(False, bases_only, [3, 77])
        assert list(by_name) == ["t3", "t77"]
        assert rest == ([3, 77] if bases_only else [])
        assert list(bases) == rest
    assert reader.load(False, False, [])[0] == {}
    for numbers in ([77, 3], [3, 3]):
        with pytest.raises(ValueError, match="ascend"):
            reader.load(False, False, numbers)
    with pytest.raises(IndexError, match="100"):
        reader.load(False, False, [3, 100])


def bytes_read():
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


@pytest.mark.parametrize("mmap", [True, False])
def test_only_chosen_bytes_are_read(mmap, path):
    fastsd.save(
        {"a": torch.ones(1 << 20), "b": torch.ones(1 << 19), "c": torch.ones(1 << 20)}, path
    )
    before = bytes_read()
    found = fastsd.load(path, select="b", mmap=mmap)
    during = bytes_read() - before
    wanted = 0 if mmap else 1 << 21
    assert wanted <= during < wanted + (1 << 17)
    assert found["b"].sum() == 1 << 19
    before = bytes_read()
    fastsd.load_into({"a": torch.zeros(1)}, path, select=[], strict=False)
    assert bytes_read() - before < 1 << 17


def test_checksums_are_those_of_the_whole_file(saved):
    path, _ = saved
    with fastsd.open(path) as archive:
        place = archive.info("head.bias").file_offset
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    fastsd.load(path, prefix="body.")
    with pytest.raises(fastsd.ChecksumError, match=r"head\.bias"):
        fastsd.load(path, prefix="body.", verify="checksums")


# ---- _metadata ----


def versions(state):
    return {module: value["version"] for module, value in state._metadata.items()}


ALL_VERSIONS = {"": 1, "body": 1, "body.0": 1, "body.1": 2, "head": 1}
PREFIXED = [
    ({"prefix": ""}, ALL_VERSIONS),
    ({"prefix": "body."}, {"": 1, "0": 1, "1": 2}),
    ({"prefix": "bod"}, {"y": 1, "y.0": 1, "y.1": 2}),
    ({"prefix": "body.1."}, {"": 2}),
    ({"prefix": "body.", "rename": {"1.": "norm."}}, {"": 1, "0": 1, "norm": 2}),
]
IN_PLACE = [
    ({"select": "*head*"}, ALL_VERSIONS),
    ({"rename": {"": "m."}}, {"m": 1, "m.body": 1, "m.body.0": 1, "m.body.1": 2, "m.head": 1}),
    ({"rename": {"body.1.": "", "body.0.": "x"}}, {"": 2, "body": 1, "head": 1}),
]


@pytest.mark.parametrize(("options", "wanted"), PREFIXED + IN_PLACE)
def test_versions_of_modules_go_with_their_names(options, wanted, saved):
    path, _ = saved
    found = fastsd.load(path, **options)
    assert type(found) is OrderedDict
    assert versions(found) == wanted


@pytest.mark.parametrize("key", ["model", "a.b", 7])
@pytest.mark.parametrize(("options", "wanted"), PREFIXED)
def test_versions_in_a_state_dict_that_a_prefix_leads_to(options, wanted, key, path):
    state = {"first": [1, torch.ones(1)], key: make_model().state_dict(), "last": {"x": 1}}
    fastsd.save(state, path)
    found = fastsd.load(path, **options | {"prefix": f"{key}.{options['prefix']}"})
    assert type(found) is OrderedDict
    assert versions(found) == wanted


def test_metadata_of_a_state_dict_that_is_nested_by_its_extra_state(path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"plain": (1, 2)}

        def set_extra_state(self, state):
            pass

    state = nn.Sequential(Extra(2, 2), nn.BatchNorm1d(2)).state_dict()
    fastsd.save(state, path)
    found = fastsd.load(path, prefix="1.")
    assert versions(found) == {"": 2}
    assert "_extra_state" not in fastsd.load(path, prefix="0.")


def test_metadata_that_two_dictionaries_share(path):
    state = make_model().state_dict()
    other = copy.copy(state)
    assert other._metadata is state._metadata
    fastsd.save({"model": state, "ema": other}, path)
    found = fastsd.load(path, prefix="ema.")
    assert_same(found, state)


def test_a_function_that_renames_drops_the_metadata_as_by_hand(path, saved):
    path, _ = saved
    found = fastsd.load(path, rename=lambda name: name)
    assert not hasattr(found, "_metadata")


# ---- What does not fit ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix": "model."}, "no name starts with prefix 'model.'; there are \"body.0.weight\""),
        ({"select": "weight"}, "no name matches select 'weight'; there are"),
        ({"select": ["head.*", "x*"]}, "no name matches select 'x*'; there are"),
        ({"prefix": "head.", "select": "head.bias"}, 'there are "weight", "bias"'),
        (
            {"rename": {"body.0": "a", "head": "a"}},
            '"a.weight" of both "body.0.weight" and "head.w',
        ),
        ({"rename": lambda name: "x"}, '"x" of both "body.0.weight" and "body.0.bias"'),
    ],
)
def test_names_that_do_not_fit(options, message, saved):
    path, _ = saved
    for load in (fastsd.load, lambda *args, **kw: fastsd.load_into(make_model(), *args, **kw)):
        with pytest.raises(fastsd.NamesError, match=re.escape(message)) as caught:
            load(path, **options)
        assert isinstance(caught.value, KeyError)
        assert str(caught.value).startswith(f"{path}: ")


def test_messages_stay_short(path):
    fastsd.save({f"{i}" + "x" * 10_000: torch.ones(1) for i in range(100)}, path)
    with pytest.raises(fastsd.NamesError, match="and 95 more") as caught:
        fastsd.load(path, prefix="y")
    assert len(str(caught.value)) < 1000
    fastsd.save({}, path)
    with pytest.raises(fastsd.NamesError, match="holds no tensor"):
        fastsd.load(path, select="y")
    assert fastsd.load(path, prefix="") == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix": b"x"}, "prefix must be a str, not bytes"),
        ({"prefix": ["x"]}, "prefix must be a str, not list"),
        ({"select": 3}, "select must be .* not int"),
        ({"select": ["a", 3]}, "select must be .* list with int"),
        ({"select": b"x"}, "select must be .* bytes"),
        ({"rename": "x"}, "rename must be .* str"),
        ({"rename": {"a": None}}, "rename must be .* dict with NoneType"),
        ({"rename": [("a", "b")]}, "rename must be .* list"),
        ({"rename": lambda name: None}, 'rename made a NoneType of "body.0.weight"'),
    ],
)
def test_arguments_of_other_types_are_refused(options, message, saved):
    path, _ = saved
    with pytest.raises(TypeError, match=message):
        fastsd.load(path, **options)
    with pytest.raises(TypeError, match=message):
        fastsd.load_into(make_model(), path, **options)


def test_what_a_function_raises_goes_through(saved):
    path, _ = saved

    def fail(name):
        raise ZeroDivisionError(name)

    with pytest.raises(ZeroDivisionError, match=r"body\.0\.weight"):
        fastsd.load(path, select=fail)
    with pytest.raises(ZeroDivisionError, match=r"body\.0\.weight"):
        fastsd.load(path, rename=fail)


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    readme = Path(__file__).parent.parent / "README.md"
    (example,) = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out == "['1.weight', '1.bias']\n"


def test_a_prefix_without_its_dot(saved):
    path, _ = saved
    with pytest.raises(fastsd.NamesError, match=r"did you mean 'body\.'\?"):
        fastsd.load(path, prefix="body")


# ---- Files with a pickle ----


def test_names_of_an_object_that_had_to_be_pickled(tmp_path):
    model = nn.DataParallel(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    state = model.state_dict()
    path = tmp_path / "x.fsd"
    checkpoint = {
        "args": argparse.Namespace(lr=1),
        "nets": [{"state_dict": state}],
        "t": (torch.ones(2),) * 2,
    }
    fastsd.save(checkpoint, path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        chosen = fastsd.load(path, prefix="nets.0.state_dict.", rename={"module.": ""})
        tied = fastsd.load(path, select="t.*")
        with pytest.raises(fastsd.NamesError, match=r"no name starts with prefix 'optimizer\.'"):
            fastsd.load(path, prefix="optimizer.")
        fresh = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        fastsd.load_into(fresh, path, prefix="nets.0.state_dict.module.")
    assert_same(chosen, model.module.state_dict())
    assert chosen._metadata == fresh.state_dict()._metadata
    assert list(tied) == ["t.0", "t.1"]
    assert tied["t.0"] is tied["t.1"]
    assert_same(fresh.state_dict(), model.module.state_dict())
