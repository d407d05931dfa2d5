"""`load_into`: torch decides what fits; bytes go where they belong, with little memory."""

import json
import subprocess
import sys
from collections import OrderedDict, UserDict

import pytest
import torch
from same import assert_same, raw, shares_storage, small_state
from torch import nn

import fastsd


def make_model():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def outcome(call):
    """What a call returns, or its error."""
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


def values_of(model):
    return {name: raw(tensor) for name, tensor in model.state_dict().items()}


@pytest.fixture
def saved(path):
    """The path of a model's state, and the model."""
    model = make_model()
    fastsd.save(model.state_dict(), path)
    return path, model


# ---- Modules ----


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("mmap", [None, True, False])
def test_a_model_gets_the_saved_values(mmap, assign, saved):
    path, model = saved
    other = make_model()
    result = fastsd.load_into(other, path, assign=assign, mmap=mmap)
    assert str(result) == "<All keys matched successfully>"
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same(other.state_dict(), model.state_dict())
    assert all(parameter.requires_grad for parameter in other.parameters())


def test_values_are_copied_into_the_tensors_that_are_there(saved):
    path, _ = saved
    other = make_model()
    before = {name: tensor.data_ptr() for name, tensor in other.state_dict().items()}
    fastsd.load_into(other, path)
    assert {name: tensor.data_ptr() for name, tensor in other.state_dict().items()} == before


def test_assign_puts_the_loaded_tensors_in_their_place(saved):
    path, model = saved
    other = make_model().to(torch.float64)
    fastsd.load_into(other, path, assign=True)
    assert_same(other.state_dict(), model.state_dict())
    other(torch.rand(5, 4)).sum().backward()
    before = path.read_bytes()
    with torch.no_grad():
        other[0].weight.zero_()
    assert path.read_bytes() == before


def test_assign_fills_a_model_without_memory(saved):
    path, model = saved
    with torch.device("meta"):
        other = make_model()
    fastsd.load_into(other, path, assign=True)
    assert not any(tensor.is_meta for tensor in other.state_dict().values())
    assert_same(other.state_dict(), model.state_dict())


def change_missing(state):
    del state["0.weight"], state["1.running_mean"]


def change_unexpected(state):
    state["3.weight"] = torch.ones(2)
    state["extra"] = torch.ones(1)


def change_shape(state):
    state["0.weight"] = torch.ones(4, 3)
    state["2.bias"] = torch.ones(())


def change_all(state):
    del state["1.bias"]
    change_unexpected(state)
    change_shape(state)


def change_dtypes(state):
    for name, tensor in state.items():
        state[name] = tensor.to(torch.float16)


def change_value(state):
    state["0.weight"] = [1.0, 2.0]


def change_order(state):
    for name in reversed(list(state)):
        state.move_to_end(name)


def change_nothing(state):
    pass


CHANGES = [
    change_missing,
    change_unexpected,
    change_shape,
    change_all,
    change_dtypes,
    change_value,
    change_order,
    change_nothing,
]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_results_and_errors_are_those_of_torch(change, strict, assign, path):
    state = make_model().state_dict()
    change(state)
    fastsd.save(state, path)
    model, reference = make_model(), make_model()
    reference.load_state_dict(model.state_dict())
    found = outcome(lambda: fastsd.load_into(model, path, strict=strict, assign=assign))
    wanted = outcome(lambda: reference.load_state_dict(state, strict=strict, assign=assign))
    assert type(found) is type(wanted)
    assert found == wanted
    assert values_of(model) == values_of(reference)


def test_tied_weights_stay_tied(path):
    def make_tied():
        model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
        model["head"].weight = model["embed"].weight
        return model

    source = make_tied()
    fastsd.save(source.state_dict(), path)
    for assign in (False, True):
        model = make_tied()
        fastsd.load_into(model, path, assign=assign)
        assert values_of(model) == values_of(source)
        assert shares_storage(model["head"].weight, model["embed"].weight)


class WithExtraState(nn.Module):
    def __init__(self, extra):
        super().__init__()
        self.extra = extra
        self.linear = nn.Linear(2, 2)

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


@pytest.mark.parametrize(
    "extra", [{"scale": (1, 2.5)}, torch.ones(3), [torch.ones(1), None], "text"]
)
def test_extra_state(extra, path):
    source = nn.Sequential(WithExtraState(extra))
    fastsd.save(source.state_dict(), path)
    model = nn.Sequential(WithExtraState(None))
    fastsd.load_into(model, path)
    assert_same(model[0].extra, extra)
    assert_same(model.state_dict(), source.state_dict())


def test_hooks_are_called_and_see_the_metadata(saved):
    path, source = saved

    def what_hooks_see(load):
        seen = []

        def before(module, state, prefix, metadata, *args):
            seen.append((type(module), list(state), prefix, dict(metadata), args))

        def after(module, keys):
            seen.append((type(module), keys))

        model = make_model()
        for module in (model, model[1]):
            module.register_load_state_dict_pre_hook(before)
            module.register_load_state_dict_post_hook(after)
        load(model)
        return seen

    found = what_hooks_see(lambda model: fastsd.load_into(model, path))
    assert found == what_hooks_see(lambda model: model.load_state_dict(source.state_dict()))
    assert len(found) == 4


def test_a_batch_norm_without_its_counter_fails_as_with_torch(path):
    state = nn.BatchNorm1d(3).state_dict()
    del state["num_batches_tracked"]
    fastsd.save(state, path)
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        fastsd.load_into(nn.BatchNorm1d(3), path)
    del state._metadata
    fastsd.save(state, path)
    fastsd.load_into(nn.BatchNorm1d(3), path)


def test_an_optimizer_in_progress_goes_on(saved):
    """What refers to the parameters still does after loading into them."""
    path, source = saved
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    fastsd.load_into(model, path)
    model(torch.rand(5, 4)).sum().backward()
    optimizer.step()
    assert values_of(model)["0.weight"] != values_of(source)["0.weight"]


# ---- Mappings ----


def zeros():
    return OrderedDict((name, torch.zeros_like(tensor)) for name, tensor in small_state().items())


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict])
def test_a_mapping_is_filled_in_place(kind, path):
    fastsd.save(small_state(), path)
    target = kind(zeros())
    tensors = list(target.values())
    result = fastsd.load_into(target, path)
    assert type(result) is type(nn.Linear(1, 1).load_state_dict(nn.Linear(1, 1).state_dict()))
    assert result == ([], [])
    assert all(a is b for a, b in zip(tensors, target.values(), strict=True))
    assert_same(dict(target), dict(small_state()))


def test_a_mapping_gets_the_loaded_tensors_with_assign(path):
    fastsd.save(small_state(), path)
    target = dict.fromkeys(small_state(), torch.empty(0))
    target |= {name: torch.empty_like(t, device="meta") for name, t in small_state().items()}
    fastsd.load_into(target, path, assign=True)
    assert_same(target, dict(small_state()))


def test_parameters_in_a_mapping_are_filled(path):
    fastsd.save({"w": torch.ones(3, dtype=torch.float64)}, path)
    target = {"w": nn.Parameter(torch.zeros(3))}
    fastsd.load_into(target, path)
    assert target["w"].tolist() == [1.0] * 3
    assert target["w"].is_leaf
    assert target["w"].requires_grad


@pytest.mark.parametrize("assign", [False, True])
def test_a_mapping_that_does_not_fit_is_an_error_and_nothing_is_copied(assign, path):
    fastsd.save(small_state(), path)
    target = zeros()
    del target["steps"]
    target["other"] = torch.zeros(1)
    target["bias"] = torch.zeros(4)
    before = {name: raw(tensor) for name, tensor in target.items()}
    tensors = list(target.values())
    with pytest.raises(RuntimeError) as caught:
        fastsd.load_into(target, path, assign=assign)
    message = str(caught.value)
    assert 'Unexpected key(s): "steps"' in message
    assert 'Missing key(s): "other"' in message
    assert "size mismatch for bias" in message
    assert "[3]" in message
    assert "[4]" in message
    assert {name: raw(tensor) for name, tensor in target.items()} == before
    assert all(a is b for a, b in zip(tensors, target.values(), strict=True))


@pytest.mark.parametrize("assign", [False, True])
def test_a_mapping_that_need_not_fit(assign, path):
    fastsd.save(small_state(), path)
    target = zeros()
    del target["steps"]
    target["other"] = torch.zeros(1)
    result = fastsd.load_into(target, path, strict=False, assign=assign)
    assert result == (["other"], ["steps"])
    assert "steps" not in target
    assert target["other"].item() == 0
    assert_same(target["weight"], small_state()["weight"])


def test_sizes_must_fit_even_if_not_strict(path):
    fastsd.save({"a": torch.ones(1), "w": torch.ones(3)}, path)
    target = {"a": torch.zeros(1), "w": torch.zeros(1, 3)}
    with pytest.raises(RuntimeError, match="size mismatch for w"):
        fastsd.load_into(target, path, strict=False)
    assert target["a"].item() == 0


def test_values_that_are_no_tensors_are_an_error_and_nothing_is_copied(path):
    fastsd.save({"w": torch.ones(2), "epoch": 3}, path)
    target = {"w": torch.zeros(2), "epoch": 0}
    with pytest.raises((RuntimeError, TypeError), match="epoch"):
        fastsd.load_into(target, path)
    assert target["w"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("target", [None, [torch.ones(1)], torch.ones(1), "x"])
def test_other_targets_are_refused(target, path):
    fastsd.save(small_state(), path)
    with pytest.raises(fastsd.UnsupportedError, match=type(target).__name__):
        fastsd.load_into(target, path)


@pytest.mark.parametrize("obj", [[torch.ones(1)], torch.ones(1), None, 3])
def test_files_that_hold_no_dictionary_are_refused(obj, path):
    fastsd.save(obj, path)
    with pytest.raises(fastsd.UnsupportedError, match=f"holds a {type(obj).__name__}") as caught:
        fastsd.load_into(nn.Linear(1, 1), path)
    assert caught.value.path == str(path)


# ---- Memory ----

MEASURED = """
import json, os, sys, threading, time
import torch, fastsd

def anonymous_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

def measure(name, call):
    peak = start = anonymous_bytes()
    done = threading.Event()
    def sample():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_bytes())
    thread = threading.Thread(target=sample)
    thread.start()
    result = call()
    peak = max(peak, anonymous_bytes())
    done.set()
    thread.join()
    growth[name] = peak - start
    return result

def make_model():
    model = torch.nn.Sequential(*(torch.nn.Linear(2048, 4096) for _ in range(8)))
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    return model

growth = {}
path = sys.argv[1]
model = make_model()
state = model.state_dict()
nbytes = sum(tensor.nbytes for tensor in state.values())
assert nbytes > 256 << 20
gaps = {name: tensor[..., 1:-1] for name, tensor in state.items()}
measure("save gaps", lambda: fastsd.save(gaps, path))
measure("save durably", lambda: fastsd.save(state, path, durable=True))
with open(path, "wb") as file:
    measure("save to a file object", lambda: fastsd.save(state, file))
measure("save", lambda: fastsd.save(state, path))
del gaps
with torch.no_grad():
    for parameter in model.parameters():
        parameter.zero_()
measure("load into", lambda: fastsd.load_into(model, path))
assert all(parameter.min() == 1 for parameter in model.parameters())
nested = path + ".nested"
fastsd.save({"model": state}, nested)
options = {"prefix": "model.", "ignore_mismatched_sizes": True}
measure("load into, selected", lambda: fastsd.load_into(model, nested, **options))
os.unlink(nested)
del state
measure("load into, assigned", lambda: fastsd.load_into(model, path, assign=True))
loaded = measure("load by map", lambda: fastsd.load(path))
measure("touch", lambda: [tensor.sum() for tensor in loaded.values()])
measure("verify", lambda: fastsd.load(path, verify="checksums"))
print(json.dumps(growth))
"""


@pytest.fixture(scope="module")
def growth(tmp_path_factory):
    """The most that each call adds to the anonymous memory of a process, for a model of 268 MB."""
    path = tmp_path_factory.mktemp("memory") / "x.fsd"
    run = subprocess.run(
        [sys.executable, "-c", MEASURED, str(path)], stdout=subprocess.PIPE, check=True
    )
    path.unlink()
    return json.loads(run.stdout)


COPYING = ["load into", "load into, selected", "save", "save gaps", "save durably", "verify"]


@pytest.mark.parametrize("call", COPYING)
def test_no_call_needs_more_than_64_mib(call, growth):
    assert growth[call] < 64 << 20


def test_saving_to_a_file_object_needs_no_more_than_64_mib(growth):
    assert growth["save to a file object"] < 64 << 20


@pytest.mark.parametrize("call", ["load by map", "load into, assigned", "touch"])
def test_mapping_needs_no_memory_a_byte(call, growth):
    assert growth[call] < 4 << 20


def test_verify_finds_damage_before_anything_is_copied(path):
    fastsd.save({"w": torch.ones(1000)}, path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    target = {"w": torch.zeros(1000)}
    with pytest.raises(fastsd.ChecksumError, match='"w"'):
        fastsd.load_into(target, path, verify="checksums")
    assert target["w"].sum() == 0
