"""The same call through torch and through fastsd: the same results, types, errors and warnings."""

import argparse
import enum
import io
import pickle
import random
import re
import warnings
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from same import STORAGES, assert_same, filled, small_state
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastsd

SPARSE = [
    torch.sparse_coo,
    torch.sparse_csr,
    torch.sparse_csc,
    torch.sparse_bsr,
    torch.sparse_bsc,
]
LIBRARIES = {"torch": torch, "fastsd": fastsd}


class Outcome(NamedTuple):
    """What a call came to: a value or an error, and what it warned of."""

    value: object
    error: Exception | None
    warnings: list


def attempt(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            value, error = call(), None
        except Exception as raised:
            value, error = None, raised
    return Outcome(value, error, [(w.category, w.message.args[0]) for w in caught])


def save_to_bytes(library, obj, **options):
    file = io.BytesIO()
    library.save(obj, file, **options)
    return file.getvalue()


def through(library, obj, save=None, **load):
    return library.load(io.BytesIO(save_to_bytes(library, obj, **(save or {}))), **load)


def assert_alike(obj, save=None, **load):
    """Fails unless both libraries make the same of an object; gives what fastsd makes."""
    calls = [partial(through, library, obj, save, **load) for library in LIBRARIES.values()]
    outcomes = [attempt(call) for call in calls]
    assert_same_outcome(*outcomes)
    return outcomes[1].value


def assert_same_outcome(wanted, found):
    if found.error and not wanted.error:
        raise found.error
    assert type(found.error) is type(wanted.error), wanted.error
    assert reason(found.error) == reason(wanted.error)
    assert kinds_and_reasons(found.warnings) == kinds_and_reasons(wanted.warnings)
    assert_same(found.value, wanted.value)


def kinds_and_reasons(caught):
    # Torch says that typed storages are deprecated once a process, to whoever is the first.
    return [(kind, reason(text)) for kind, text in caught if "TypedStorage is dep" not in text]


def reason(message):
    """A message without what each library says in its own words: where, and what to do about it."""
    text = str(message)
    unpickler = re.search(r"(Unsupported|Trying|Can only|must be).*", text)
    if isinstance(message, pickle.UnpicklingError) and unpickler:
        text = unpickler[0]
    text = text.split("\n\nCheck the documentation")[0].strip()
    text = re.sub(r"0x[0-9a-f]+", "0x", text).removeprefix("<_io.BytesIO object at 0x>: ")
    return text.replace("fastsd.load", "torch.load")


# ---- Objects of many classes ----


class Color(enum.Enum):
    RED = 1
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1


class Mode(enum.Flag):
    READ = 1
    WRITE = 2


Point = namedtuple("Point", ["x", "y"])


class Sample(NamedTuple):
    image: torch.Tensor
    label: int = 0


@dataclass
class Config:
    rate: float
    sizes: list = field(default_factory=list)


@dataclass(frozen=True)
class Frozen:
    name: str


class Slotted:
    __slots__ = ("other", "weight")

    def __init__(self, weight):
        self.weight = weight


class SlotsAndDict(Slotted):
    def __init__(self, weight):
        super().__init__(weight)
        self.extra = [weight]


class WithState:
    def __init__(self, weight):
        self.weight = weight

    def __getstate__(self):
        return {"kept": self.weight}

    def __setstate__(self, state):
        self.weight = state["kept"]
        self.restored = True


class Reduced:
    def __init__(self, number):
        self.number = number

    def __reduce__(self):
        return (Reduced, (self.number,), {"extra": 1})


class MyDict(dict):
    pass


class MyList(list):
    pass


class MyStr(str):
    __slots__ = ()


class MyInt(int):
    pass


def run_a_loop():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).sum().backward()
        optimizer.step()
        scheduler.step()
    return model, optimizer, scheduler


def make_checkpoint(args):
    model, optimizer, scheduler = run_a_loop()
    return {
        "epoch": 3,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "loss": torch.tensor(0.25),
        "best": float("inf"),
        "args": args,
    }


def make_several_models():
    models = {f"model{i}": nn.Linear(2, 3).state_dict() for i in range(2)}
    optimizers = []
    for kind in (torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad):
        parameter = nn.Parameter(torch.ones(3))
        parameter.grad = torch.ones(3)
        optimizer = kind([{"params": [parameter], "lr": 0.5}], lr=0.1)
        optimizer.step()
        optimizers.append(optimizer.state_dict())
    return {**models, "optimizers": optimizers}


def make_shared():
    inner, tensor = [1, {2: 3}], torch.arange(4.0)
    parameter = nn.Parameter(torch.ones(2))
    return {
        "lists": (inner, inner),
        "dicts": [inner[1]],
        "tensors": [tensor, tensor, tensor.view(2, 2), tensor[1:]],
        "parameters": [parameter, parameter, parameter.data],
    }


def make_recursive():
    loop = {"weight": torch.ones(2)}
    loop["itself"] = loop
    loop["list"] = [loop]
    return loop


def make_recursive_list():
    loop = [torch.ones(2)]
    loop.append((loop, loop))
    return loop


SETS = {"weights": {1, 2, 3}, "names": frozenset({"a", "b"}), "nested": {(1, (2.5, None))}}

PLAIN = {
    "checkpoint": lambda: make_checkpoint({"lr": 0.1}),
    "several models": make_several_models,
    "state_dict": small_state,
    "shared": make_shared,
    "sets": lambda: SETS["weights"],
    "rng": lambda: {
        "torch": torch.get_rng_state(),
        "generator": torch.Generator().manual_seed(3).get_state(),
        "python": random.getstate(),
    },
    "integer keys": lambda: {0: torch.ones(1), -1: {2**70: "big"}, True: 1, None: 2},
    "tuple keys": lambda: {(1, "a"): torch.ones(1), 2.5: 3},
    "tensor": lambda: torch.arange(6.0).view(2, 3),
    "no tensor": lambda: {"int": 123, "text": "world", "float": 3.14, "bool": False},
    "string": lambda: "foo",
    "none": lambda: None,
    "bytes": lambda: [b"\xc5\xbc\0", bytearray(b"abc")],
    "complex": lambda: 1.5 - 2j,
    "sizes": lambda: [torch.Size([1, 2]), torch.ones(2, 3).shape],
    "dtypes": lambda: [torch.float8_e4m3fn, torch.bfloat16, torch.uint16, torch.complex32],
    "devices": lambda: [torch.device("cpu"), torch.device("cuda:1"), torch.device("meta")],
    "layouts": lambda: [torch.strided, torch.sparse_csr],
    "parameter": lambda: nn.Parameter(torch.ones(2)),
    "frozen parameter": lambda: nn.Parameter(torch.ones(2), requires_grad=False),
    "buffer": lambda: nn.Buffer(torch.ones(2)),
    "no leaf": lambda: torch.ones(2, requires_grad=True) * 2,
    "gradient": lambda: torch.ones(2, requires_grad=True),
    "conjugate": lambda: filled(3, torch.complex64).conj(),
    "negative": lambda: torch._neg_view(filled(3, torch.float32)),
    "both": lambda: torch._neg_view(filled(3, torch.complex64).conj()),
    "scalars": lambda: [torch.tensor(1), torch.tensor(True), torch.tensor(1j)],
    "meta": lambda: [torch.empty(3, 4, device="meta"), torch.empty(10**6, 10**6, device="meta")],
    "attributes": lambda: with_attributes(torch.zeros(3), note="foo", pi=3.14, more=[1]),
    "attributes of a parameter": lambda: with_attributes(nn.Parameter(torch.zeros(3)), note="foo"),
    "dtype views": lambda: [torch.arange(3).to(torch.uint32), torch.ones(3).to(torch.float8_e5m2)],
    "counter of tensors": lambda: OrderedDict([("b", torch.ones(1)), ("a", torch.zeros(1))]),
}
OBJECTS = {
    "checkpoint with a namespace": lambda: make_checkpoint(argparse.Namespace(lr=0.1, layers=[1])),
    "checkpoint with a dataclass": lambda: make_checkpoint(Config(0.1, [torch.ones(2)])),
    "frozen dataclass": lambda: Frozen("x"),
    "enums": lambda: [Color.RED, Color.BLUE, Level.LOW, Mode.READ | Mode.WRITE],
    "enum keys": lambda: {Color.RED: torch.ones(2)},
    "named tuples": lambda: [Point(1, torch.ones(2)), Sample(torch.ones(2)), {"p": Point(1, 2)}],
    "slots": lambda: [Slotted(torch.ones(2)), SlotsAndDict(torch.ones(3))],
    "state": lambda: WithState(torch.ones(2)),
    "reduced": lambda: Reduced(4),
    "subclasses": lambda: [MyDict(a=1), MyList([torch.ones(2)]), MyStr("text"), MyInt(7)],
    "collections": lambda: [Counter("aab"), defaultdict(list, a=[1]), deque([1, 2], maxlen=3)],
    "library values": lambda: [Path("a/b"), Decimal("1.5"), Fraction(1, 3), range(3), slice(1, 2)],
    "times": lambda: datetime(2026, 1, 2, tzinfo=timezone.utc),
    "functions": lambda: [run_a_loop, partial(filled, 3), torch.nn.functional.relu, len],
    "classes": lambda: [Config, nn.Linear, torch.Tensor, int],
    "modules as values": lambda: {"model": nn.Linear(2, 3), "epoch": 3},
    "ellipsis": lambda: [..., NotImplemented],
    "recursive dict": make_recursive,
    "recursive list": make_recursive_list,
    "numpy rng": lambda: [np.random.RandomState(0).get_state(), np.random.default_rng(0)],
    "object array": lambda: np.array([1, "a", None, torch.ones(2)], dtype=object),
    "optimizer": lambda: run_a_loop()[1],
    "scheduler": lambda: torch.optim.lr_scheduler.StepLR(run_a_loop()[1], 3),
    "generator": lambda: torch.Generator().manual_seed(5),
}


def with_attributes(tensor, **attributes):
    vars(tensor).update(attributes)
    return tensor


@pytest.mark.parametrize("weights_only", [None, True, False])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_objects(name, weights_only):
    assert_alike(PLAIN[name](), weights_only=weights_only)


@pytest.mark.parametrize("weights_only", [None, True, False])
@pytest.mark.parametrize("name", OBJECTS)
def test_objects_of_other_classes(name, weights_only):
    assert_alike(OBJECTS[name](), weights_only=weights_only)


# ---- Tensors of all kinds ----


def sparse(layout, dtype=torch.float32):
    dense = torch.tensor([[0, 0, 1, 0], [2, 3, 0, 0]], dtype=dtype)
    blocks = {"blocksize": (1, 2)} if layout in (torch.sparse_bsr, torch.sparse_bsc) else {}
    return dense.to_sparse(layout=layout, **blocks)


def double(gradient):
    return 2 * gradient


def with_hook(tensor, hook=double):
    tensor.register_hook(hook)
    return tensor


def uncoalesced():
    return torch.sparse_coo_tensor([[0, 0, 1], [2, 2, 0]], [1.0, 2.0, 3.0], (2, 3))


def quantized(channels=False):
    values = torch.arange(6.0).view(2, 3)
    if not channels:
        return torch.quantize_per_tensor(values, 0.5, 3, torch.qint8)
    scales, points = torch.tensor([0.5, 0.25], dtype=torch.double), torch.tensor([0, 3])
    return torch.quantize_per_channel(values, scales, points, 0, torch.quint8)


def nested(layout):
    parts = [torch.arange(3.0), torch.arange(2.0)]
    return torch.nested.nested_tensor(parts, layout=layout)


def views_of_a_storage():
    whole = torch.arange(24.0)
    return [whole, whole.view(4, 6).T, whole[3:9], whole[::5], whole[:0], whole.expand(2, 24)]


TENSORS = {
    **{f"{layout}": partial(sparse, layout) for layout in SPARSE},
    "integers in coo": lambda: sparse(torch.sparse_coo, torch.int64),
    "uncoalesced": uncoalesced,
    "hybrid": lambda: torch.eye(3).unsqueeze(-1).expand(3, 3, 2).to_sparse(2),
    "sparse that requires grad": lambda: sparse(torch.sparse_coo).requires_grad_(),
    "sparse without elements": lambda: torch.zeros(2, 3).to_sparse(),
    "sparse parameter": lambda: nn.Parameter(sparse(torch.sparse_csr)),
    "two of one sparse": lambda: [t := uncoalesced(), t],
    "quantized": quantized,
    "quantized per channel": lambda: quantized(channels=True),
    "view of a quantized": lambda: quantized()[1:],
    "quantized parameter": lambda: nn.Parameter(quantized(), requires_grad=False),
    "nested strided": lambda: nested(torch.strided),
    "nested jagged": lambda: nested(torch.jagged),
    "hooks": lambda: with_hook(torch.ones(2, requires_grad=True)),
    "hooks of parameters": lambda: [with_hook(nn.Parameter(torch.ones(2)))],
    "hooks in a state_dict": lambda: {"a": with_hook(torch.ones(2, requires_grad=True))},
    "hooks that need no warning": lambda: with_hook(
        torch.ones(2, requires_grad=True), torch.utils.hooks.unserializable_hook(double)
    ),
    "hooks beside a sparse tensor": lambda: [
        with_hook(torch.ones(2, requires_grad=True)),
        uncoalesced(),
    ],
    "mkldnn": lambda: torch.ones(2, 3).to_mkldnn(),
    "zero tensor": lambda: torch._efficientzerotensor((4, 5)),
    "functional": lambda: torch._to_functional_tensor(torch.ones(2)),
    "views": views_of_a_storage,
    "views beside a sparse tensor": lambda: [*views_of_a_storage(), uncoalesced()],
    "with attributes and sparse": lambda: with_attributes(uncoalesced(), note=[1]),
}


# ---- Storages ----


def storages_that_share():
    tensor = torch.arange(6.0)
    return [tensor, tensor.storage(), tensor.untyped_storage(), tensor[2:], tensor.storage()]


STORED = {
    "untyped": lambda: torch.arange(4.0).untyped_storage(),
    "typed": lambda: torch.arange(4.0).storage(),
    "of each class": lambda: [torch.DoubleStorage([1, 2]), torch.BoolStorage([True])],
    "quantized": lambda: quantized().storage(),
    "untyped slices": lambda: [(s := torch.arange(6).untyped_storage()), s[8:24]],
    "empty": lambda: [torch.UntypedStorage(0), torch.FloatStorage()],
    "twice": lambda: [(s := torch.arange(3.0).untyped_storage()), s, {"again": s}],
    "beside a tensor": lambda: [(t := torch.arange(6.0)), t.storage(), t[2:], t.storage()],
    "of another type": lambda: [(t := torch.arange(6.0)), t.untyped_storage()],
    "of a part": lambda: [(t := torch.arange(6.0)), t.reshape(-1)[1:4].storage()],
    "meta": lambda: torch.UntypedStorage(16, device="meta"),
    "meta, typed": lambda: torch.empty(3, device="meta").storage(),
    "empty of several dtypes": lambda: [
        torch.tensor([], dtype=torch.int64),
        torch.TypedStorage(wrap_storage=torch.UntypedStorage(0), dtype=torch.bool),
    ],
}


# ---- Subclasses ----


class Empty(torch.Tensor):
    pass


class WithoutFunction(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl


class WithSlots(torch.Tensor):
    __slots__ = ("elem",)

    @staticmethod
    def __new__(cls, elem):
        tensor = torch.Tensor._make_subclass(cls, elem.to("meta"))
        tensor.elem = elem
        return tensor


class WithGetState(WithSlots):
    def __getstate__(self):
        return ("marked", self.elem, vars(self))

    def __setstate__(self, state):
        _, self.elem, attributes = state
        vars(self).update(attributes, restored=True)


class WithReduce(torch.Tensor):
    def __reduce_ex__(self, protocol):
        return (WithReduce.make, (self.as_subclass(torch.Tensor), "made"))

    @staticmethod
    def make(tensor, note):
        return with_attributes(tensor.as_subclass(WithReduce), note=note)


class Two(torch.Tensor):
    """Two tensors behind one without memory."""

    @staticmethod
    def __new__(cls, first, second):
        return torch.Tensor._make_wrapper_subclass(
            cls, first.shape, dtype=first.dtype, device=first.device, strides=first.stride()
        )

    def __init__(self, first, second):
        self.first, self.second = first, second

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].first, args[0].second)
        raise NotImplementedError(func)


class MyParameter(nn.Parameter):
    pass


SUBCLASSES = {
    "empty": lambda: torch.ones(2).as_subclass(Empty),
    "empty without elements": Empty,
    "with attributes": lambda: with_attributes(torch.ones(2).as_subclass(Empty), note="bar"),
    "without a torch function": lambda: torch.ones(2).as_subclass(WithoutFunction),
    "slots": lambda: with_attributes(WithSlots(torch.ones(2)), note="bar"),
    "getstate": lambda: with_attributes(WithGetState(torch.ones(2)), note="bar"),
    "reduce": lambda: torch.ones(2).as_subclass(WithReduce),
    "two": lambda: Two(torch.ones(2), torch.zeros(2)),
    "parameter of two": lambda: nn.Parameter(Two(torch.ones(2), torch.zeros(2))),
    "two beside their parts": lambda: [(t := torch.ones(2)), Two(t, t), t.view(2, 1)],
    "my parameter": lambda: MyParameter(torch.ones(2)),
    "uninitialized": lambda: [nn.UninitializedParameter(), nn.UninitializedBuffer()],
    "state_dict": lambda: OrderedDict(a=torch.ones(2), b=torch.ones(2).as_subclass(Empty)),
}


# ---- Modules ----


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", self.embedding.weight.data[:2])
        self.register_buffer("unsaved", torch.ones(2), persistent=False)
        self.note = {"layers": [self.head]}


def note_the_call(module, *args):
    module.called = True


def with_hooks():
    model = nn.Linear(2, 3)
    model.register_forward_hook(note_the_call)
    model.register_forward_pre_hook(note_the_call)
    model.register_state_dict_pre_hook(note_the_call)
    return model


def weight_norm():
    return parametrizations.weight_norm(nn.Linear(2, 3))


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def parametrized():
    model = nn.Linear(2, 3)
    parametrize.register_parametrization(model, "weight", Twice())
    return model


def with_gradients():
    model = nn.Linear(2, 3)
    model(torch.ones(1, 2)).sum().backward()
    return model


MODULES = {
    "linear": lambda: nn.Linear(2, 3),
    "network": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.LSTM(2, 3)),
    "tied": Tied,
    "module without anything": nn.Module,
    "hooks": with_hooks,
    "gradients": with_gradients,
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8),
    "meta": lambda: nn.Linear(2, 3, device="meta"),
    "parametrized": parametrized,
    "weight norm": weight_norm,
    "containers": lambda: [nn.ModuleDict({"a": nn.ReLU()}), nn.ParameterList([torch.ones(2)])],
    "data parallel": lambda: nn.DataParallel(nn.Linear(2, 3)),
    "swa": lambda: torch.optim.swa_utils.AveragedModel(nn.Linear(2, 3)),
    "scripted": lambda: torch.jit.script(nn.Linear(2, 3)),
    "with a scripted part": lambda: nn.Sequential(torch.jit.script(nn.Linear(2, 3))),
    "loss": lambda: nn.CrossEntropyLoss(torch.ones(3)),
}

ALL = {
    f"{kind}: {name}": make
    for kind, cases in {
        "tensor": TENSORS,
        "storage": STORED,
        "subclass": SUBCLASSES,
        "module": MODULES,
    }.items()
    for name, make in cases.items()
}


@pytest.mark.filterwarnings("ignore")  # what both warn of is compared
@pytest.mark.parametrize("weights_only", [None, True, False])
@pytest.mark.parametrize("name", ALL)
def test_tensors_storages_subclasses_and_modules(name, weights_only):
    assert_alike(ALL[name](), weights_only=weights_only)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", [*OBJECTS, *ALL])
def test_every_protocol_of_pickle(name, protocol):
    obj = {**OBJECTS, **ALL}[name]()
    assert_alike(obj, {"pickle_protocol": protocol}, weights_only=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["tensor: uncoalesced", "subclass: empty", "module: linear"])
def test_every_protocol_of_pickle_with_weights_only(name, protocol):
    assert_alike(ALL[name](), {"pickle_protocol": protocol})


def test_lazy_modules_stay_lazy():
    model = nn.Sequential(nn.LazyConv2d(3, 2), nn.LazyBatchNorm2d())
    for library in LIBRARIES.values():
        loaded = through(library, model, weights_only=False)
        assert loaded[0].has_uninitialized_params()
        assert loaded(torch.ones(1, 2, 4, 4)).shape == (1, 3, 3, 3)
        assert (type(loaded[0]), type(loaded[1])) == (nn.Conv2d, nn.BatchNorm2d)


def test_the_state_of_a_lazy_module():
    state = assert_alike(nn.LazyLinear(3).state_dict(), weights_only=False)
    assert isinstance(state["weight"], nn.UninitializedParameter)


# ---- Where it lands ----


def keep(storage, location):
    return storage


def decline(storage, location):
    return None


def to_meta(storage, location):
    return torch.UntypedStorage(storage.nbytes(), device="meta")


def refuse(storage, location):
    raise KeyError(location)


LOCATIONS = {
    **{repr(place): place for place in [None, "cpu", "meta", "cuda", "cuda:1", "xpu:0", "nowhere"]},
    **{repr(place): place for place in [b"cpu", torch.device("cpu"), torch.device("meta")]},
    **{repr(place): place for place in [{}, {"cpu": "meta"}, {"cpu": "cuda:0"}, {"x": "meta"}]},
    **{function.__name__: function for function in [keep, decline, to_meta, refuse]},
    "a number": 5,
}
PLACED = {
    "plain": small_state,
    "shared": make_shared,
    "views": views_of_a_storage,
    "meta": PLAIN["meta"],
    "arrays": lambda: {"array": np.arange(3.0), "tensor": torch.ones(2)},
    "sparse": uncoalesced,
    "quantized": quantized,
    "nested": lambda: nested(torch.strided),
    "storages": STORED["untyped slices"],
    "subclass": SUBCLASSES["with attributes"],
    "wrapper": SUBCLASSES["two"],
    "module": Tied,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("name", PLACED)
def test_map_location(name, location):
    assert_alike(PLACED[name](), map_location=LOCATIONS[location], weights_only=False)


@pytest.fixture
def registry(monkeypatch):
    """Packages that a test registers are forgotten after it."""
    known = list(torch.serialization._package_registry)
    monkeypatch.setattr(torch.serialization, "_package_registry", known)


@pytest.fixture
def device_tag(registry):
    """Storages in CPU memory say that they are on some device."""

    def register(tag):
        torch.serialization.register_package(-1, lambda storage: tag, lambda storage, place: None)

    return register


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("tag", ["cuda:0", "cuda:7", "mps", "nowhere:0"])
@pytest.mark.parametrize("name", ["plain", "views", "sparse", "module"])
def test_what_was_saved_on_a_device_that_is_absent(name, tag, location, device_tag, monkeypatch):
    device_tag(tag)
    obj = PLACED[name]()
    files = [save_to_bytes(library, obj) for library in LIBRARIES.values()]
    monkeypatch.undo()
    load = {"map_location": LOCATIONS[location], "weights_only": False}
    calls = [
        partial(library.load, io.BytesIO(file), **load)
        for library, file in zip(LIBRARIES.values(), files, strict=True)
    ]
    outcomes = [attempt(call) for call in calls]
    assert_same_outcome(*outcomes)
    needs_the_device = location in ("None", "{}", "decline", repr({"cpu": "meta"}))
    assert bool(outcomes[1].error) or not needs_the_device


@pytest.mark.parametrize("priority", [-1, 100])
@pytest.mark.parametrize("name", ["plain", "views", "sparse", "module"])
def test_a_registered_package_places_its_storages(name, priority, registry):
    asked = []

    def place(storage, location):
        if location == "vault":
            asked.append(storage.nbytes())
            return torch.UntypedStorage(storage.nbytes(), device="meta")
        return None

    def tag(storage):
        return "vault" if storage.device.type == "cpu" else None

    torch.serialization.register_package(priority, tag, place)
    assert_alike(PLACED[name](), weights_only=False)
    assert_alike(PLACED[name](), weights_only=False, map_location="vault")
    assert sum(asked) > 0
    assert len(asked) % 2 == 0  # by each library as often


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic():
    """With which new memory is filled, for one."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Traced(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


AMBIENCES = {
    "device": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "check of sparse tensors": torch.sparse.check_sparse_tensor_invariants,
    "function mode": Traced,
    "dispatch mode": Passing,
    "fake tensors": FakeTensorMode,
    "skip_data": torch.serialization.skip_data,
    "deterministic": deterministic,
    "default device": lambda: default_device("meta"),
    "default dtype": lambda: default_dtype(torch.float64),
}


def without_data(obj):
    """What is left where data may be anything: no more than shapes."""
    if isinstance(obj, torch.Tensor):
        shape = None if obj.is_nested else obj.shape
        return (type(obj), obj.dtype, shape, obj.layout, obj.device, obj.requires_grad)
    if isinstance(obj, nn.Module):
        return without_data(obj.state_dict())
    if isinstance(obj, STORAGES):
        return obj.nbytes()
    if isinstance(obj, dict):
        return {key: without_data(value) for key, value in obj.items()}
    return [without_data(value) for value in obj] if isinstance(obj, (list, tuple)) else obj


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("location", LOCATIONS.keys() - {"b'cpu'", "a number"})
@pytest.mark.parametrize("name", PLACED)
def test_map_location_with_fake_tensors(name, location):
    obj = PLACED[name]()
    outcomes = []
    for library in LIBRARIES.values():
        file = io.BytesIO(save_to_bytes(library, obj))
        with FakeTensorMode():
            load = partial(library.load, file, LOCATIONS[location], weights_only=False)
            outcome = attempt(load)
        error = outcome.error and type(outcome.error)(
            ""
        )  # each says in its own words what is wrong
        outcomes.append(outcome._replace(value=without_data(outcome.value), error=error))
    assert_same_outcome(*outcomes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ambience", AMBIENCES)
@pytest.mark.parametrize("name", PLACED)
def test_loading_in_an_ambience(name, ambience):
    if (name, ambience) == ("nested", "skip_data"):
        pytest.skip("the sizes of nested tensors are data")
    obj = PLACED[name]()
    files = [save_to_bytes(library, obj) for library in LIBRARIES.values()]
    outcomes = []
    for library, file in zip(LIBRARIES.values(), files, strict=True):
        with AMBIENCES[ambience]():
            load = partial(library.load, io.BytesIO(file), weights_only=False)
            outcomes.append(attempt(load))
    if ambience in ("skip_data", "fake tensors"):
        outcomes = [outcome._replace(value=without_data(outcome.value)) for outcome in outcomes]
    assert_same_outcome(*outcomes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ambience", AMBIENCES)
@pytest.mark.parametrize("name", PLACED)
def test_saving_in_an_ambience(name, ambience):
    if (name, ambience) == ("shared", "fake tensors"):
        pytest.skip("torch saves no parameters there that are not fake")
    obj = PLACED[name]()
    outcomes = []
    for library in LIBRARIES.values():
        with AMBIENCES[ambience]():
            file = attempt(partial(save_to_bytes, library, obj))
        outcomes.append(file)
        if file.error is None:
            loaded = attempt(partial(library.load, io.BytesIO(file.value), weights_only=False))
            outcomes[-1] = loaded._replace(warnings=file.warnings + loaded.warnings)
    assert_same_outcome(*outcomes)


# ---- What differs, on purpose: docs/LIKE_TORCH.md ----

MORE = {
    "numpy array": lambda: {"array": np.arange(3.0), "text": np.array(["a"])},
    "numpy scalar": lambda: np.float32(1.5),
    "numpy rng": lambda: np.random.RandomState(0).get_state(legacy=False),
    "frozenset": lambda: frozenset({1, 2}),
    "return type": lambda: torch.max(torch.ones(2, 3), 0),
    "memory format": lambda: torch.channels_last,
    "large integers": lambda: 1 << 3000,
}


@pytest.mark.parametrize("name", MORE)
def test_plain_objects_that_weights_only_does_not_know_in_torch(name):
    obj = MORE[name]()
    with pytest.raises((pickle.UnpicklingError, TypeError)):
        through(torch, obj)
    assert_same(through(fastsd, obj), obj)


def test_one_memory_as_several_dtypes():
    whole = torch.ones(4, dtype=torch.complex64)
    state = {"complex": whole, "real": torch.view_as_real(whole), "bits": whole.view(torch.int64)}
    with pytest.raises(RuntimeError, match="as different types"):
        save_to_bytes(torch, state)
    loaded = through(fastsd, state)
    assert_same(loaded, state)
    assert len({tensor.untyped_storage().data_ptr() for tensor in loaded.values()}) == 1


def test_parts_that_do_not_overlap_share_a_storage_only_where_there_is_a_pickle():
    whole = torch.arange(10.0)
    parts = [whole[:5], whole[5:]]
    for library, obj, sizes in [
        (torch, parts, [40, 40]),
        (fastsd, parts, [20, 20]),
        (fastsd, [*parts, Config(0.1)], [40, 40]),
    ]:
        loaded = through(library, obj, weights_only=False)
        assert [part.untyped_storage().nbytes() for part in loaded[:2]] == sizes
        assert torch.equal(torch.cat(loaded[:2]), whole)


@pytest.mark.parametrize("name", ["plain", "module"])
@pytest.mark.parametrize("mmap", [True, False])
def test_storages_cannot_grow(name, mmap, tmp_path):
    messages = []
    for library in LIBRARIES.values():
        library.save(PLACED[name](), tmp_path / "x")
        loaded = library.load(tmp_path / "x", weights_only=False, mmap=mmap)
        tensor = loaded["weight"] if name == "plain" else loaded.mask
        with pytest.raises(RuntimeError) as caught:
            tensor.resize_(1000)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
