"""`load_into` beside torch: the same file, the same calls, the same results and errors."""

import io
import math
from collections import OrderedDict

import pytest
import torch
from same import assert_same, raw, shares_storage
from torch import nn

import fastsd


def outcome(call):
    """What a call returns, or its error."""
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


def through_torch(obj):
    file = io.BytesIO()
    torch.save(obj, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_as_with_torch(make, state, path, **options):
    """Loads a state into two twins, through fastsd and through torch; gives the first and what
    the call returned."""
    fastsd.save(state, path)
    found, wanted = make(), make()
    assert_same(plain(found), plain(wanted))
    result = outcome(lambda: fastsd.load_into(found, path, **options))
    reference = outcome(lambda: wanted.load_state_dict(through_torch(state), **options))
    assert type(result) is type(reference)
    assert result == reference
    assert_same(plain(found), plain(wanted))
    return found, result


def plain(target):
    """What can be compared of a state: modules that are lazy have tensors without a shape."""
    lazy = nn.parameter.is_lazy
    state = target.state_dict()
    if not isinstance(target, nn.Module):
        return state
    return {name: "lazy" if lazy(value) else value for name, value in state.items()}


def seeded(make):
    """A function that makes the same module whenever it is called."""

    def make_again():
        torch.manual_seed(0)
        return make()

    return make_again


def state_of(make, seed=1):
    torch.manual_seed(seed)
    module = make()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_()
    return module.state_dict()


# ---- Modules of many kinds ----


class Versioned(nn.Module):
    """A module whose first version had another name for its weight, and half its scale."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3))
        self.register_buffer("not_saved", torch.zeros(1), persistent=False)

    def _load_from_state_dict(self, state, prefix, metadata, *lists):
        if metadata.get("version", 1) < 2 and prefix + "w" in state:
            state[prefix + "weight"] = 2 * state.pop(prefix + "w")
        super()._load_from_state_dict(state, prefix, metadata, *lists)


class WithExtraState(nn.Module):
    def __init__(self, extra):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


class RenamesWhatItSaves(nn.Module):
    """With hooks on both ways: the file has names that the module has not."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 3)
        self.register_state_dict_post_hook(self._save_as)
        self.register_load_state_dict_pre_hook(self._load_as)

    @staticmethod
    def _save_as(module, state, prefix, metadata):
        for name in [name for name in state if name.startswith(prefix + "inner.")]:
            state[prefix + "outer." + name[len(prefix) + 6 :]] = state.pop(name)

    @staticmethod
    def _load_as(module, state, prefix, *_):
        for name in [name for name in state if name.startswith(prefix + "outer.")]:
            state[prefix + "inner." + name[len(prefix) + 6 :]] = state.pop(name)


def frozen():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    return model


def parametrized(make):
    return nn.Sequential(nn.Linear(2, 2), make(nn.Linear(4, 3)))


def orthogonal(module):
    return nn.utils.parametrizations.orthogonal(module)


def make_lazy():
    return nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())


def make_initialised():
    model = make_lazy()
    model(torch.rand(5, 4))
    return model


MODULES = {
    "linear": lambda: nn.Linear(4, 3),
    "lstm": lambda: nn.LSTM(3, 4, 2, bidirectional=True),
    "transformer": lambda: nn.TransformerEncoderLayer(8, 2, 16),
    "batch norm": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
    "without batch statistics": lambda: nn.BatchNorm1d(3, track_running_stats=False),
    "lists": lambda: nn.ModuleList([nn.ParameterList([torch.rand(3)]), nn.Identity()]),
    "parameter dict": lambda: nn.ParameterDict({"a": torch.rand(2), "b": torch.rand(1)}),
    "complex": lambda: nn.Linear(3, 2, dtype=torch.complex64),
    "half": lambda: nn.Linear(3, 2, dtype=torch.bfloat16),
    "frozen": frozen,
    "tied": Tied,
    "versioned": lambda: nn.Sequential(Versioned(), Versioned()),
    "renamed": lambda: nn.Sequential(RenamesWhatItSaves()),
    "weight norm": lambda: parametrized(nn.utils.parametrizations.weight_norm),
    "spectral norm": lambda: parametrized(nn.utils.parametrizations.spectral_norm),
    "orthogonal": lambda: parametrized(orthogonal),
    "old spectral norm": lambda: parametrized(nn.utils.spectral_norm),
    "initialised": make_initialised,
    "data parallel": lambda: nn.DataParallel(nn.Linear(3, 2)),
    "compiled": lambda: torch.compile(nn.Sequential(nn.Linear(3, 2))),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(nn.Linear(3, 2)),
    "scripted": lambda: torch.jit.script(nn.Linear(3, 2)),
    "extra tensor": lambda: nn.Sequential(WithExtraState(torch.rand(3))),
    "extra dict": lambda: nn.Sequential(WithExtraState({"a": [1, torch.rand(2)], 3: None})),
}


def trained_names(model):
    parameters = model.named_parameters(remove_duplicate=False)
    return [name for name, parameter in parameters if parameter.requires_grad]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", MODULES)
def test_modules_of_every_kind(kind, assign, path):
    make = seeded(MODULES[kind])
    state = state_of(MODULES[kind])
    found, result = assert_as_with_torch(make, state, path, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same(dict(found.state_dict()), dict(state))
    assert trained_names(found) == trained_names(make())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", MODULES)
def test_errors_of_modules_of_every_kind(kind, strict, path):
    state = state_of(MODULES[kind])
    first = next(iter(state), None)
    changed = OrderedDict(state)
    changed._metadata = state._metadata
    if first is not None:
        changed["new." + first] = changed.pop(first)
    if strict:
        changed |= {name: torch.rand(7, 1, 1) for name in list(changed)[:1]}
    changed["new"] = torch.rand(2)
    _, result = assert_as_with_torch(seeded(MODULES[kind]), changed, path, strict=strict)
    # An error, or the named tuple that torch returns.
    assert "new" in str(result)


def test_a_model_without_memory_is_filled_by_assigning(path):
    def make():
        with torch.device("meta"):
            return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

    state = state_of(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    found, _ = assert_as_with_torch(make, state, path, assign=True)
    found(torch.rand(5, 4)).sum().backward()
    with pytest.warns(UserWarning, match="no-op"):
        fastsd.load_into(make(), path)


@pytest.mark.parametrize("assign", [False, True])
def test_tied_weights_stay_tied(assign, path):
    found, _ = assert_as_with_torch(seeded(Tied), state_of(Tied), path, assign=assign)
    assert shares_storage(found.embed.weight, found.head.weight)


def test_the_version_of_a_module_decides_how_it_reads(path):
    state = OrderedDict([("0.w", torch.rand(3)), ("1.weight", torch.rand(3))])
    state._metadata = OrderedDict([("", {"version": 1}), ("0", {}), ("1", {"version": 2})])
    make = seeded(MODULES["versioned"])
    found, _ = assert_as_with_torch(make, state, path)
    assert torch.equal(found[0].weight, 2 * state["0.w"])
    prefixed = OrderedDict((f"model.{name}", tensor) for name, tensor in state.items())
    prefixed._metadata = OrderedDict(
        (f"model.{m}".rstrip("."), v) for m, v in state._metadata.items()
    )
    fastsd.save(prefixed, path)
    for options in ({"prefix": "model."}, {"rename": {"model.": ""}}):
        other = make()
        fastsd.load_into(other, path, **options)
        assert_same(plain(other), plain(found))


@pytest.mark.parametrize("own", [(), (1,), (3,), (1, 1)])
@pytest.mark.parametrize("loaded", [(), (1,), (3,), (1, 1)])
def test_0_dim_against_1_dim(own, loaded, path):
    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(own))

    _, result = assert_as_with_torch(Scalar, {"scale": torch.rand(loaded)}, path)
    is_fit = own == loaded or (own, loaded) == ((), (1,))
    assert (result[0] is RuntimeError) != is_fit
    result = fastsd.load_into(Scalar(), path, ignore_mismatched_sizes=True)
    assert result.missing_keys == ([] if is_fit else ["scale"])


def test_a_lazy_module_takes_its_shapes_from_the_file(path):
    found, _ = assert_as_with_torch(make_lazy, state_of(make_initialised), path)
    assert found[0].weight.shape == (3, 4)
    fastsd.load_into(make_lazy(), path, ignore_mismatched_sizes=True)


def test_a_parameter_that_is_none(path):
    make = seeded(lambda: nn.Linear(3, 2, bias=False))
    state = nn.Linear(3, 2).state_dict()
    assert_as_with_torch(make, state, path)
    assert_as_with_torch(make, state, path, strict=False)


def test_hooks_may_change_what_is_missing(path):
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 2))
        model.register_load_state_dict_post_hook(lambda _, keys: keys.missing_keys.clear())
        return model

    state = make().state_dict()
    del state["0.bias"]
    _, result = assert_as_with_torch(make, state, path)
    assert result.missing_keys == []


# ---- Methods with another signature ----


class Old(nn.Linear):
    def load_state_dict(self, state_dict, strict=True):
        return super().load_state_dict(state_dict, strict), "old"


class Lenient(nn.Linear):
    def load_state_dict(self, state_dict, strict=False, **options):
        return super().load_state_dict(state_dict, strict, **options)


class Bare(nn.Linear):
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict, strict=False)


@pytest.mark.parametrize("kind", [Old, Lenient, Bare])
@pytest.mark.parametrize(
    "options", [{}, {"strict": True}, {"strict": False}, {"assign": True}, {"assign": False}]
)
def test_a_method_of_the_modules_own_decides(kind, options, path):
    state = nn.Linear(3, 2).state_dict()
    del state["bias"]
    make = seeded(lambda: kind(3, 2))
    is_taken = kind is Lenient or not options or (kind is Old and "strict" in options)
    if is_taken:
        assert_as_with_torch(make, state, path, **options)
        return
    fastsd.save(state, path)
    (name,) = options
    with pytest.raises(fastsd.UnsupportedError, match=f"{kind.__name__}.* takes no .*'{name}'"):
        fastsd.load_into(make(), path, **options)
    with pytest.raises(TypeError, match=name):
        make().load_state_dict(state, **options)


# ---- Sizes that do not match ----


def other_head():
    state = state_of(lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 9)))
    state["extra"] = torch.ones(1)
    return state


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_mismatched_sizes_are_left_as_they_are(strict, assign, path):
    state = other_head()
    del state["extra"]
    fastsd.save(state, path)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    before = {name: raw(tensor) for name, tensor in model.state_dict().items()}
    seen = []
    model.register_load_state_dict_post_hook(lambda _, keys: seen.extend(keys.missing_keys))
    result = fastsd.load_into(
        model, path, strict=strict, assign=assign, ignore_mismatched_sizes=True
    )
    assert type(result) is type(model.load_state_dict(model.state_dict()))
    assert result.missing_keys == ["1.weight", "1.bias"]
    assert result.unexpected_keys == []
    assert seen[:2] == ["1.weight", "1.bias"]
    assert len(model._load_state_dict_post_hooks) == 1
    after = {name: raw(tensor) for name, tensor in model.state_dict().items()}
    assert [name for name in after if after[name] == before[name]] == ["1.weight", "1.bias"]
    assert after["0.weight"] == raw(state["0.weight"])


def test_strictness_about_all_else_stays(path):
    state = other_head()
    del state["0.bias"]
    fastsd.save(state, path)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with pytest.raises(RuntimeError) as caught:
        fastsd.load_into(model, path, ignore_mismatched_sizes=True)
    assert str(caught.value) == (
        "Error(s) in loading state_dict for Sequential:\n"
        '\tMissing key(s) in state_dict: "0.bias". \n'
        '\tUnexpected key(s) in state_dict: "extra". '
    )
    assert not model._load_state_dict_post_hooks
    result = fastsd.load_into(model, path, strict=False, ignore_mismatched_sizes=True)
    assert result.missing_keys == ["0.bias", "1.weight", "1.bias"]
    assert result.unexpected_keys == ["extra"]
    with pytest.raises(RuntimeError, match=r"size mismatch for 1\.weight"):
        fastsd.load_into(model, path, strict=False)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_nothing_is_left_out_where_sizes_match(kind, path):
    state = state_of(MODULES[kind])
    fastsd.save(state, path)
    model = seeded(MODULES[kind])()
    result = fastsd.load_into(model, path, ignore_mismatched_sizes=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same(dict(model.state_dict()), dict(state))


def test_mismatched_sizes_keep_the_versions(path):
    state = nn.BatchNorm1d(3).state_dict()
    del state["num_batches_tracked"]
    fastsd.save(state, path)
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        fastsd.load_into(nn.BatchNorm1d(2), path, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("strict", [False, True])
def test_mismatched_sizes_in_a_mapping(strict, path):
    fastsd.save({"a": torch.ones(2), "b": torch.ones(3)}, path)
    target = {"b": torch.zeros(4), "a": torch.zeros(2)}
    result = fastsd.load_into(target, path, strict=strict, ignore_mismatched_sizes=True)
    assert result == (["b"], [])
    assert_same(target, {"b": torch.zeros(4), "a": torch.ones(2)})
    target["c"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match='Missing key\\(s\\): "c"'):
        fastsd.load_into(target, path, ignore_mismatched_sizes=True)


# ---- Wrappers, through names ----


WRAPPERS = {
    "": lambda module: module,
    "module.": nn.DataParallel,  # and DistributedDataParallel
    "_orig_mod.": torch.compile,
    "module._orig_mod.": lambda module: nn.DataParallel(torch.compile(module)),
}


def make_inner():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), Versioned())


@pytest.mark.parametrize("target", WRAPPERS)
@pytest.mark.parametrize("source", WRAPPERS)
def test_wrappers_are_taken_off_and_put_on(source, target, path):
    state = WRAPPERS[source](make_inner()).state_dict()
    fastsd.save(state, path)
    found = WRAPPERS[target](make_inner())
    result = fastsd.load_into(found, path, rename={source: target})
    assert str(result) == "<All keys matched successfully>"
    wanted = {target + name[len(source) :]: tensor for name, tensor in state.items()}
    assert_same(dict(found.state_dict()), wanted)


def test_a_wrapper_keeps_the_versions_of_what_it_wraps(path):
    state = nn.DataParallel(nn.BatchNorm1d(3)).state_dict()
    del state["module.num_batches_tracked"]
    fastsd.save(state, path)
    for options in ({"prefix": "module."}, {"rename": {"module.": ""}}):
        with pytest.raises(RuntimeError, match="num_batches_tracked"):
            fastsd.load_into(nn.BatchNorm1d(3), path, **options)
    fastsd.load_into(nn.BatchNorm1d(3), path, rename=lambda name: name.removeprefix("module."))


@pytest.mark.parametrize("options", [{}, {"assign": True}, {"mmap": False}])
def test_a_model_out_of_a_checkpoint(options, path):
    source = make_inner()
    fastsd.save({"epoch": 1, "model": source.state_dict(), "best": [torch.ones(1)]}, path)
    model = make_inner()
    fastsd.load_into(model, path, prefix="model.", **options)
    assert_same(model.state_dict(), source.state_dict())
    fastsd.load_into(model[0], path, prefix="model.0.", **options)
    result = fastsd.load_into(model, path, prefix="model.", select="1.*", strict=False, **options)
    assert result.missing_keys == ["0.weight", "0.bias", "2.weight"]


def test_the_error_of_a_part_is_that_of_torch(path):
    source = make_inner().state_dict()
    fastsd.save({"model": source}, path)
    found = outcome(lambda: fastsd.load_into(nn.Linear(9, 3), path, prefix="model.0."))
    state = {name[2:]: tensor for name, tensor in source.items() if name.startswith("0.")}
    assert found == outcome(lambda: nn.Linear(9, 3).load_state_dict(state))
    assert "size mismatch for weight" in found[1]


# ---- Optimizers and the like ----


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW([{"params": p, "lr": 0.1, "name": "all"}]),
    "capturable": lambda p: torch.optim.NAdam(p, foreach=False),
    "adagrad": torch.optim.Adagrad,
    "adafactor": torch.optim.Adafactor,
    "lbfgs": torch.optim.LBFGS,
}


def trained(make_optimizer, steps):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = make_optimizer(list(model.parameters()))
    train(model, optimizer, steps)
    return model, optimizer


def train(model, optimizer, steps):
    for step in range(steps):

        def closure(step=step):
            optimizer.zero_grad()
            loss = model(torch.full((5, 4), 1.0 + step)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("mmap", [None, True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers_go_on_as_with_torch(kind, mmap, path):
    _, source = trained(OPTIMIZERS[kind], 3)
    fastsd.save(source.state_dict(), path)
    found_model, found = trained(OPTIMIZERS[kind], 1)
    wanted_model, wanted = trained(OPTIMIZERS[kind], 1)
    assert fastsd.load_into(found, path, mmap=mmap) is None
    wanted.load_state_dict(through_torch(source.state_dict()))
    assert_same(found.state_dict(), wanted.state_dict())
    assert_same(found.state_dict(), source.state_dict())
    before = path.read_bytes()
    train(found_model, found, 2)
    train(wanted_model, wanted, 2)
    assert_same(found.state_dict(), wanted.state_dict())
    assert_same(found_model.state_dict(), wanted_model.state_dict())
    assert path.read_bytes() == before


def test_an_optimizer_that_does_not_fit(path):
    _, source = trained(OPTIMIZERS["adam"], 1)
    fastsd.save(source.state_dict(), path)

    def make():
        return torch.optim.Adam(nn.Linear(4, 3, bias=False).parameters())

    found = outcome(lambda: fastsd.load_into(make(), path))
    assert found == outcome(lambda: make().load_state_dict(source.state_dict()))
    assert found[0] is ValueError


def is_mapped(tensor, path):
    """Whether a tensor lies in a mapping of the file."""
    address = tensor.data_ptr()
    with open("/proc/self/maps") as maps:
        for line in maps:
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            if begin <= address < end:
                return str(path) in line
    return False


def test_what_an_optimizer_keeps_is_memory_of_its_own(path):
    _, source = trained(OPTIMIZERS["adam"], 1)
    fastsd.save(source.state_dict(), path)
    for mmap in (None, False, True):
        model, optimizer = trained(OPTIMIZERS["adam"], 0)
        fastsd.load_into(optimizer, path, mmap=mmap)
        moment = optimizer.state[model.weight]["exp_avg"]
        assert is_mapped(moment, path) == (mmap is True)
    model, _ = trained(OPTIMIZERS["adam"], 0)
    fastsd.save(model.state_dict(), path)
    fastsd.load_into(model, path)
    assert not is_mapped(model.weight, path)
    fastsd.load_into(model, path, assign=True)
    assert is_mapped(model.weight, path)


SCHEDULERS = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "plateau": torch.optim.lr_scheduler.ReduceLROnPlateau,
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, total_iters=3),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        ],
        [3],
    ),
}


def make_scheduler(kind, steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1, momentum=0.9)
    scheduler = SCHEDULERS[kind](optimizer)
    for step in range(steps):
        optimizer.step()
        scheduler.step(*[math.sin(step)] if kind == "plateau" else [])
    return scheduler


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers(kind, path):
    state = make_scheduler(kind, 5).state_dict()
    fastsd.save(state, path)
    found, wanted = make_scheduler(kind, 0), make_scheduler(kind, 0)
    assert fastsd.load_into(found, path) is None
    wanted.load_state_dict(through_torch(state))
    assert found.state_dict() == wanted.state_dict()
    assert found.last_epoch == 5


def test_a_gradient_scaler(path):
    source = torch.amp.GradScaler("cpu", init_scale=8.0)
    source.scale(torch.ones(1))
    fastsd.save(source.state_dict(), path)
    found = torch.amp.GradScaler("cpu")
    assert fastsd.load_into(found, path) is None
    assert found.state_dict() == source.state_dict()
    assert found.get_scale() == 8.0


class Counter:
    """Something that is no module and has a state: a data loader, a metric."""

    def __init__(self, count):
        self.count = count

    def state_dict(self):
        return [self.count]

    def load_state_dict(self, state, strict=True):
        self.count = state[0], strict
        return self


def test_whatever_has_a_state(path):
    fastsd.save(Counter(torch.tensor(3)).state_dict(), path)
    counter = Counter(0)
    assert fastsd.load_into(counter, path) is counter
    assert counter.count == (torch.tensor(3), True)
    assert fastsd.load_into(counter, path, strict=False).count[1] is False
    with pytest.raises(fastsd.UnsupportedError, match=r"Counter.*takes no argument 'assign'"):
        fastsd.load_into(counter, path, assign=True)


class Table(dict):
    """A mapping with a method of its own."""

    def load_state_dict(self, state):
        self["loaded"] = state


def test_a_mapping_with_a_method_of_its_own(path):
    fastsd.save({"a": torch.ones(1)}, path)
    table = Table(a=torch.zeros(1))
    fastsd.load_into(table, path)
    assert table["a"] == 0
    assert table["loaded"]["a"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strict": False}, "SGD.*takes no argument 'strict'"),
        ({"strict": True}, "SGD.*takes no argument 'strict'"),
        ({"assign": True}, "SGD.*takes no argument 'assign'"),
        ({"ignore_mismatched_sizes": True}, "ignore_mismatched_sizes.* not for a SGD"),
        ({"prefix": "state."}, "for a SGD load the file"),
        ({"rename": {}}, "for a SGD load the file"),
        ({"select": "*"}, "for a SGD load the file"),
    ],
)
def test_options_that_an_optimizer_does_not_take(options, message, path):
    _, optimizer = trained(OPTIMIZERS["sgd"], 1)
    fastsd.save(optimizer.state_dict(), path)
    before = optimizer.state_dict()
    with pytest.raises(fastsd.UnsupportedError, match=message):
        fastsd.load_into(optimizer, path, **options)
    assert_same(optimizer.state_dict(), before)
