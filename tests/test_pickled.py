"""Files with a pickle: what may be loaded from them, by whom, and what a hostile one can do."""

import pickle
import re
import struct
import subprocess
import sys
import threading
import warnings
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from same import assert_same, shares_storage, through_memory
from torch import nn
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals, safe_globals

import fastsd
from fastsd import pickled
from fastsd.names import NameRules
from fastsd.saving import plan_pickled

Point = namedtuple("Point", ["x", "y"])


class Thing:
    def __init__(self, weight):
        self.weight = weight


class Exploit:
    """Calls a function when it is unpickled; ``calls`` tells that it did."""

    calls = ()

    def __reduce__(self):
        return (exploit, ())


def exploit():
    Exploit.calls = (*Exploit.calls, "run")


@pytest.fixture(autouse=True)
def nothing_was_run(monkeypatch):
    monkeypatch.setattr(Exploit, "calls", ())


@pytest.fixture(autouse=True)
def leave_safe_globals():
    """No test leaves anything allowed behind."""
    before = get_safe_globals()
    yield
    clear_safe_globals()
    add_safe_globals(before)


@pytest.fixture
def thing(path):
    fastsd.save({"thing": Thing(torch.ones(2)), "weight": torch.zeros(3)}, path)
    return path


# ---- What may be loaded ----


def test_weights_only_is_the_default(thing):
    for options in ({}, {"weights_only": None}, {"weights_only": True}):
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            fastsd.load(thing, **options)
    assert isinstance(fastsd.load(thing, weights_only=False)["thing"], Thing)


def test_the_error_names_the_file_what_is_missing_and_what_can_be_done(thing):
    with pytest.raises(pickle.UnpicklingError) as caught:
        fastsd.load(thing)
    message = str(caught.value)
    assert message.startswith(str(thing))
    assert "GLOBAL test_pickled.Thing was not an allowed global" in message
    assert "torch.serialization.add_safe_globals([test_pickled.Thing])" in message
    assert "weights_only=False` to `fastsd.load`" in message
    assert "torch.load" not in message


def test_what_is_declared_safe_may_be_loaded(thing):
    with safe_globals([Thing]):
        assert fastsd.load(thing)["thing"].weight.tolist() == [1, 1]
    with pytest.raises(pickle.UnpicklingError):
        fastsd.load(thing)
    add_safe_globals([(Thing, "test_pickled.Thing")])
    assert isinstance(fastsd.load(thing)["thing"], Thing)
    clear_safe_globals()
    with pytest.raises(pickle.UnpicklingError):
        fastsd.load(thing)


def test_what_is_missing_can_be_asked_for(thing, tmp_path):
    torch.save({"thing": Thing(torch.ones(2)), "weight": torch.zeros(3)}, tmp_path / "x.pt")
    wanted = torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "x.pt")
    assert fastsd.get_unsafe_globals_in_checkpoint(thing) == wanted == ["test_pickled.Thing"]
    with safe_globals([Thing]):
        assert fastsd.get_unsafe_globals_in_checkpoint(thing) == []
    fastsd.save({"plain": torch.ones(2)}, thing)
    assert fastsd.get_unsafe_globals_in_checkpoint(thing) == []


def test_a_blocked_module_stays_blocked(path):
    import os

    fastsd.save(os.execv, path)
    with safe_globals([os.execv]), pytest.raises(pickle.UnpicklingError, match="is blocked") as e:
        fastsd.load(path)
    assert "add_safe_globals" not in str(e.value)


def test_nothing_is_run(path):
    fastsd.save([torch.ones(2), Exploit()], path)
    with pytest.raises(pickle.UnpicklingError, match=r"test_pickled\.exploit"):
        fastsd.load(path)
    with pytest.raises(pickle.UnpicklingError):
        fastsd.load_into({}, path)
    with fastsd.open(path) as archive:
        assert {name: tensor.tolist() for name, tensor in archive.items()} == {"0": [1, 1]}
    assert Exploit.calls == ()
    fastsd.load(path, weights_only=False)
    assert Exploit.calls == ("run",)


def test_plain_files_are_not_unpickled_whatever_is_said(path):
    class Unpickling:
        def __getattr__(self, name):
            raise AssertionError(f"asked for {name}")

    state = {"weight": torch.ones(2), "nested": [1, {2}]}
    fastsd.save(state, path, pickle_module=Unpickling(), pickle_protocol=99)
    for options in (
        {"weights_only": False},
        {"pickle_module": Unpickling()},
        {"encoding": "bytes", "weights_only": False},
    ):
        assert_same(fastsd.load(path, **options), state)


def test_weights_only_and_a_pickle_module_exclude_each_other(path):
    for obj in ({"plain": 1}, Thing(1)):
        fastsd.save(obj, path)
        with pytest.raises(RuntimeError, match="explicit pickle_module"):
            fastsd.load(path, pickle_module=pickle, weights_only=True)


YES, NO = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def test_the_environment_can_force_weights_only(thing, monkeypatch):
    monkeypatch.setenv(YES, "1")
    for weights_only in (None, True, False):
        with pytest.raises(pickle.UnpicklingError):
            fastsd.load(thing, weights_only=weights_only)
    with pytest.raises(RuntimeError, match="explicit pickle_module"):
        fastsd.load(thing, pickle_module=pickle)


def test_the_environment_can_turn_the_default_off(thing, monkeypatch):
    monkeypatch.setenv(NO, "yes")
    with pytest.warns(UserWarning, match="forcing weights_only=False") as caught:
        assert isinstance(fastsd.load(thing)["thing"], Thing)
    assert caught[0].filename == __file__
    with pytest.raises(pickle.UnpicklingError):
        fastsd.load(thing, weights_only=True)


def test_the_environment_cannot_say_both(thing, monkeypatch):
    monkeypatch.setenv(YES, "1")
    monkeypatch.setenv(NO, "1")
    with pytest.raises(RuntimeError, match="both were set"):
        fastsd.load(thing)


def test_a_variable_that_says_no_says_nothing(thing, monkeypatch):
    monkeypatch.setenv(NO, "0")
    with pytest.raises(pickle.UnpicklingError):
        fastsd.load(thing)


# ---- With what it is pickled ----


class Recording:
    """A module to pickle with, which notes what it is asked for."""

    def __init__(self):
        self.asked = asked = []

        class Pickler(pickle.Pickler):
            def __init__(self, file, protocol):
                asked.append(protocol)
                super().__init__(file, protocol)

        class Unpickler(pickle.Unpickler):
            def __init__(self, file, **options):
                asked.append(options)
                super().__init__(file, **options)

        self.Pickler, self.Unpickler = Pickler, Unpickler
        self.__name__ = "recording"


def test_pickle_modules_are_used_and_get_their_arguments(path):
    module = Recording()
    fastsd.save(Thing(1), path, pickle_module=module, pickle_protocol=4)
    assert fastsd.load(path, pickle_module=module).weight == 1
    fastsd.load(path, None, module, weights_only=False, encoding="latin1", errors="ignore")
    fastsd.load(path, pickle_module=module, fix_imports=False)
    assert module.asked == [
        4,
        {"encoding": "utf-8"},
        {"encoding": "latin1", "errors": "ignore"},
        {"encoding": "utf-8", "fix_imports": False},
    ]


def test_arguments_of_the_unpickler_mean_nothing_with_weights_only(path):
    fastsd.save([torch.zeros(2, 2).to_sparse(), 1], path)
    with pytest.warns(UserWarning, match="only works if `weights_only=False`") as caught:
        fastsd.load(path, encoding="latin1")
    assert caught[0].filename == __file__


def test_an_argument_that_there_is_not_is_a_type_error(path):
    fastsd.save({}, path)
    with pytest.raises(TypeError, match="unexpected keyword argument 'weight_only'"):
        fastsd.load(path, weight_only=True)


def test_errors_of_pickling_come_through_and_leave_no_file(path):
    with pytest.raises((AttributeError, pickle.PicklingError)):
        fastsd.save([torch.ones(2), lambda: 0], path)
    with pytest.raises(ValueError, match="protocol"):
        fastsd.save(Thing(1), path, pickle_protocol=99)
    assert not path.exists()


# ---- What is kept ----


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("mmap", [None, True, False])
def test_storages_are_shared_as_they_were(mmap, path):
    whole = torch.arange(12.0)
    parts = {"first": whole[:4], "last": whole[8:], "storage": whole.storage()}
    fastsd.save([parts, Thing(whole.view(3, 4)), whole], path)
    loaded, thing, again = fastsd.load(path, weights_only=False, mmap=mmap)
    assert shares_storage(loaded["first"], loaded["last"], thing.weight, again)
    assert loaded["storage"].data_ptr() == again.data_ptr()
    again[0] = 7
    assert loaded["first"][0] == thing.weight[0, 0] == 7


def test_storages_of_the_file_are_mapped_and_private(path):
    fastsd.save(nn.Linear(4, 4), path)
    before = path.read_bytes()
    model = fastsd.load(path, weights_only=False)
    with torch.no_grad():
        model.weight.fill_(3)
    assert path.read_bytes() == before
    assert str(path) in Path("/proc/self/maps").read_text()
    torch.optim.SGD(model.parameters(), lr=1.0).step()


def test_objects_keep_their_identity(path):
    shared, parameter = Thing(None), nn.Parameter(torch.ones(2))
    shared.weight = [parameter, shared]
    loaded = through_memory([shared, parameter, shared], weights_only=False)
    assert loaded[0] is loaded[2] is loaded[0].weight[1]
    assert loaded[1] is loaded[0].weight[0]


def test_storages_that_overlap_in_memory_are_stored_once(path):
    memory = bytearray(1 << 16)
    first = torch.frombuffer(memory, dtype=torch.float32)
    second = torch.frombuffer(memory, dtype=torch.float32, offset=1 << 15)
    fastsd.save(Thing([first, second]), path)
    assert path.stat().st_size < 1.5 * len(memory)
    one, other = fastsd.load(path, weights_only=False).weight
    assert (one.numel(), other.numel()) == (1 << 14, 1 << 13)
    assert one.untyped_storage().nbytes() == 1 << 16
    assert other.untyped_storage().nbytes() == 1 << 15
    one[1 << 13] = 5
    assert other[0] == 5


def test_the_whole_storage_is_kept_where_a_pickle_is_needed(path):
    big = torch.zeros(1 << 16)
    fastsd.save(Thing(big[:2]), path)
    assert fastsd.load(path, weights_only=False).weight.untyped_storage().nbytes() == 1 << 18


def test_damage_is_found(path):
    fastsd.save(Thing(torch.ones(100)), path)
    fastsd.load(path, weights_only=False, verify="checksums")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    fastsd.load(path, weights_only=False)
    with pytest.raises(fastsd.ChecksumError):
        fastsd.load(path, weights_only=False, verify="checksums")


def test_many_threads_load_at_once(tmp_path):
    paths = [tmp_path / f"{i}.fsd" for i in range(4)]
    for i, path in enumerate(paths):
        sparse = torch.eye(i + 2).to_sparse()
        fastsd.save([nn.Parameter(torch.full((50,), float(i))), sparse, {i: Point(i, i)}], path)
    failures = []

    def load_all(seed):
        for i in range(40):
            number = (i + seed) % 4
            with safe_globals([]):
                try:
                    loaded = fastsd.load(paths[number])
                    assert loaded[0][0] == number
                    assert loaded[1].shape == (number + 2, number + 2)
                except Exception as error:
                    failures.append(error)

    add_safe_globals([Point])
    threads = [threading.Thread(target=load_all, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# ---- Without data ----


def test_saving_without_data(path):
    state = {"weight": torch.ones(1 << 20), "view": None, "sparse": torch.eye(3).to_sparse()}
    state["view"] = state["weight"][4:]
    with torch.serialization.skip_data():
        fastsd.save(state, path)
    loaded = fastsd.load(path)
    assert loaded["weight"].count_nonzero() == 0
    assert shares_storage(loaded["weight"], loaded["view"])
    assert loaded["sparse"].shape == (3, 3)


def test_fake_tensors_become_zeros(path):
    with torch._subclasses.fake_tensor.FakeTensorMode():
        tensor = torch.randn(2, 3)
        state = {"weight": tensor, "view": tensor.view(-1), "row": tensor[1]}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        fastsd.save(state, path)
    loaded = fastsd.load(path)
    assert_same(loaded["weight"], torch.zeros(2, 3))
    assert shares_storage(*loaded.values())
    assert not torch.serialization._serialization_tls.skip_data


def test_saving_without_data_in_an_ambience(path):
    with torch.serialization.skip_data(), torch.device("meta"):
        fastsd.save({"weight": torch.ones(3, device="cpu")}, path)
        assert fastsd.load(path)["weight"].shape == (3,)
    assert_same(fastsd.load(path), {"weight": torch.zeros(3)})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:.*quantized")
def test_what_cannot_be_saved_without_data_is_refused_as_by_torch(path):
    nested = torch.nested.nested_tensor([torch.ones(2)], layout=torch.strided)
    quantized = torch.quantize_per_tensor(torch.ones(2), 1, 0, torch.qint8)
    with torch.serialization.skip_data():
        for tensor in (nested, quantized):
            with pytest.raises(RuntimeError, match="under skip_data context manager"):
                fastsd.save(tensor, path)
        with pytest.warns(UserWarning, match="skip_data context manager is a no-op"):
            fastsd.save(torch.empty(2, device="meta"), path)


# ---- Hostile streams ----


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value):
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a\x09" + data


def glob(name):
    module, _, last = name.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def tup(*parts):
    return b"(" + b"".join(parts) + b"t"


def call(name, *parts):
    return glob(name) + tup(*parts) + b"R"


def storage(key="0", count=4, kind="torch.FloatStorage", place="cpu"):
    return tup(text("storage"), glob(kind), text(key), text(place), integer(count)) + b"Q"


def integers(*values):
    return tup(*map(integer, values))


def tensor(offset=0, size=(4,), stride=(1,), source=None):
    hooks = glob("collections.OrderedDict") + b")R"
    parts = integer(offset), integers(*size), integers(*stride), b"\x89", hooks
    return call("torch._utils._rebuild_tensor_v2", source or storage(), *parts)


def stream_of(body):
    return b"\x80\x02" + body + b"."


@pytest.fixture
def write(path, monkeypatch):
    """Writes a stream over four floats, of which everything else is as it must be."""

    def write_stream(stream, **storages):
        storages = storages or {"0": torch.ones(4).untyped_storage()}
        with monkeypatch.context() as patch:
            patch.setattr(pickled, "dump", lambda *args, **how: pickled.Pickled(stream, storages))
            fastsd.save(object(), path)
        return path

    return write_stream


def long(key, rank):
    """The one number of that storage, in so many dimensions."""
    return tensor(size=(1,) * rank, stride=(1,) * rank, source=storage(key, 1, "torch.LongStorage"))


def sparse(index_key):
    layout = call("torch.serialization._get_layout", text("torch.sparse_coo"))
    parts = tup(long(index_key, 2), tensor(size=(1,)), integers(3), b"\x88")
    return call("torch._utils._rebuild_sparse_tensor", layout, parts)


def legacy_sparse(index_key):
    parts = long(index_key, 2), tensor(size=(1,)), call("torch.Size", integers(3))
    return call("torch.sparse.FloatTensor", *parts)


def quantized(scale=b"G?\xf0\0\0\0\0\0\0", size=4):
    scheme = tup(glob("torch.per_tensor_affine"), scale, b"K\0")
    hooks = glob("collections.OrderedDict") + b")R"
    parts = integer(0), integers(size), integers(1), scheme, b"\x89", hooks
    return call("torch._utils._rebuild_qtensor", storage(kind="torch.QInt8Storage"), *parts)


def nested(size_key):
    parts = tensor(), long(size_key, 2), long("one", 2), long("zero", 1)
    return call("torch._utils._rebuild_nested_tensor", *parts)


DATA = {
    "0": torch.ones(4).untyped_storage(),
    "zero": torch.tensor([0]).untyped_storage(),
    "one": torch.tensor([1]).untyped_storage(),
    "fifty": torch.tensor([50]).untyped_storage(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("body", [tensor(), sparse("one"), legacy_sparse("one"), nested("one")])
def test_the_streams_of_this_file_are_well_formed(body, write):
    assert isinstance(fastsd.load(write(stream_of(body), **DATA)), torch.Tensor)
    one_byte_each = {"0": torch.ones(4, dtype=torch.int8).untyped_storage()}
    loaded = fastsd.load(write(stream_of(quantized()), **one_byte_each))
    assert loaded.int_repr().tolist() == [1, 1, 1, 1]


HOSTILE = {
    "more elements than there are": tensor(source=storage(count=5)),
    "far more elements": tensor(source=storage(count=2**61)),
    "elements that overflow": tensor(source=storage(count=2**63 - 1)),
    "a negative number of elements": tensor(source=storage(count=-1)),
    "a larger type": tensor(source=storage(kind="torch.DoubleStorage")),
    "an unknown key": tensor(source=storage("1")),
    "a key that is a path": tensor(source=storage("../0")),
    "no storage type": tensor(source=storage(kind="torch.Size")),
    "an unknown device": tensor(source=storage(place="nowhere")),
    "a size beyond the storage": tensor(size=(5,)),
    "a huge size": tensor(size=(2**62,)),
    "sizes that overflow": tensor(size=(2**62, 2**62), stride=(1, 1)),
    "a stride beyond the storage": tensor(stride=(2,)),
    "a negative stride": tensor(offset=3, stride=(-1,)),
    "a negative size": tensor(size=(-4,)),
    "an offset beyond the storage": tensor(offset=1),
    "a negative offset": tensor(offset=-1),
    "a stride too few": tensor(size=(2, 2)),
    "sizes that are no numbers": call(
        "torch._utils._rebuild_tensor_v2", storage(), b"K\0", tup(text("4")), integers(1), b"\x89N"
    ),
    "arguments too few": call("torch._utils._rebuild_tensor_v2", storage()),
    "a parameter of what is no tensor": call(
        "torch._utils._rebuild_parameter",
        glob("torch._utils._rebuild_parameter"),
        b"\x89",
        glob("collections.OrderedDict") + b")R",
    ),
    "a tensor of no storage": call("torch._utils._rebuild_tensor", b"N", b"K\0", b")", b")"),
    "the state of a tensor": glob("torch.Tensor") + b")R" + tup(storage(), integers(1)) + b"b",
    "a state beyond its storage": glob("torch.Tensor")
    + b")R"
    + tup(storage(), b"K\0", integers(9), integers(1))
    + b"b",
    "a persistent id that is a text": text("storage") + b"Q",
    "a persistent id that is a number": b"K\1Q",
    "an empty persistent id": b")Q",
    "a short persistent id": tup(text("storage"), glob("torch.FloatStorage")) + b"Q",
    "a persistent id of another kind": tup(text("module"), text("0")) + b"Q",
    "a persistent id of a list": b"]Q",
    "a function that is not allowed": call("os.system", text("true")),
    "a call of what is not a function": b"K\1)R",
    "getattr": call("builtins.getattr", glob("torch.Tensor"), text("__class__")),
    "a name that is no text": b"c\xff\n\xff\n",
    "a sparse tensor with an index beyond it": sparse("fifty"),
    "an old sparse tensor with an index beyond it": legacy_sparse("fifty"),
    "a quantized tensor beyond its storage": quantized(size=99),
    "a quantizer of another type": quantized(scale=text("1")),
    "a nested tensor of no sizes": call(
        "torch._utils._rebuild_nested_tensor", tensor(), tensor(), tensor(), tensor()
    ),
    "a nested tensor beyond its buffer": nested("fifty"),
    "nothing on the stack": b"",
    "a pop from nothing": b"\x85",
    "a mark too few": b"t",
    "an opcode that there is not": b"\xff",
    "a number of another protocol": b"\x95" + b"\xff" * 8,
    "a memo that is empty": b"h\0",
    "a giant memo": b"K\1r\xff\xff\xff\xff0j\xff\xff\xff\x7f",
    "a text longer than the stream": b"X\xff\xff\xff\xffabc",
    "a text of 64 bits": b"\x8d" + b"\xff" * 8 + b"abc",
    "bytes of 64 bits": b"\x8e" + b"\xff" * 8 + b"abc",
    "a text that is no UTF-8": b"X\x02\0\0\0\xff\xff",
    "an append to no list": b"}K\1a",
    "an item of no dict": b"]K\1K\2s",
    "a key that cannot be hashed": b"}]K\1s",
    "tuples without end as a key": b"}" + b"N" + b"\x85" * 100_000 + b"Ns",
    "tuples that double as a key": b"})" + b"q\0h\0\x86" * 60 + b"Ns",
    "tuples that double in a set": glob("builtins.set") + b"])" + b"q\0h\0\x86" * 60 + b"a\x85R",
    "many large keys": b"})" + b"q\0h\0\x86" * 15 + b"q\1Ns" + b"h\1Ns" * 400,
    "a name of a dtype": tensor(source=storage(kind="torch.float32")),
}


def test_tuples_that_only_look_hostile_are_loaded(write):
    wide = {tuple((i, (i,)) for i in range(60_000)): 1, "deep": ((((((1,),),),),),)}
    assert fastsd.load(write(pickle.dumps(wide, 2))) == wide


# As much as a hostile file may need beyond what importing torch does. Its own size is nothing.
GROWTH_MIB = 256
LOAD_ALL = """
import pickle, resource, sys, warnings
import fastsd
warnings.simplefilter("ignore")
for name in sys.argv[1:]:
    try:
        fastsd.load(name)
        sys.exit(f"{name} was loaded")
    except (pickle.UnpicklingError, fastsd.FastsdError, RuntimeError, ValueError):
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


def test_hostile_streams_take_no_memory(write, tmp_path):
    names = []
    for i, body in enumerate(HOSTILE.values()):
        names.append(str(write(stream_of(body), **DATA).rename(tmp_path / str(i))))
    base, peak = (
        subprocess.run([sys.executable, "-c", LOAD_ALL, *files], capture_output=True, text=True)
        for files in ([], names)
    )
    assert peak.stderr == ""
    assert int(peak.stdout) - int(base.stdout) < GROWTH_MIB


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_stream_is_refused_and_the_file_named(name, mmap, write):
    path = write(stream_of(HOSTILE[name]), **DATA)
    with pytest.raises((pickle.UnpicklingError, fastsd.FastsdError, RuntimeError, ValueError)) as e:
        fastsd.load(path, mmap=mmap)
    # What is all plain is not unpickled; of its devices torch speaks as of those of map_location.
    assert str(e.value).startswith(str(path) if name != "an unknown device" else "don't know how")
    if "index" in name:
        assert "size is inconsistent with indices" in str(e.value)


@pytest.mark.parametrize("cut", range(1, len(stream_of(tensor()))))
def test_a_stream_cut_at_any_place_is_refused(cut, write):
    path = write(stream_of(tensor())[:-cut])
    for call in (fastsd.load, fastsd.get_unsafe_globals_in_checkpoint):
        with pytest.raises(pickle.UnpicklingError, match=re.escape(str(path))):
            call(path)


def test_a_file_answers_for_its_own_tensors_only(write, path, tmp_path):
    torch.save([torch.eye(2).to_sparse()], tmp_path / "good.pt")
    bad = write(stream_of(tup(sparse("fifty"), b"\xff")), **DATA)
    with pytest.raises(pickle.UnpicklingError):
        fastsd.load(bad)
    with torch.sparse.check_sparse_tensor_invariants():
        torch.load(tmp_path / "good.pt")


def test_errors_of_what_the_user_passes_are_theirs(path):
    def refuse(storage, location):
        raise KeyError(location)

    fastsd.save([torch.eye(2).to_sparse()], path)
    with pytest.raises(KeyError, match="cpu"):
        fastsd.load(path, map_location=refuse)


@settings(max_examples=300)
@given(data=st.data())
def test_streams_that_were_changed_anywhere_are_loaded_or_refused(data, tmp_path_factory):
    body = data.draw(st.sampled_from(list(HOSTILE.values())))
    stream = bytearray(stream_of(body))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(stream) - 1))
        stream[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("changed") / "x.fsd"
    plan = plan_pickled(pickled.Pickled(bytes(stream), dict(DATA)), "fsd", None, None)
    plan.write(bytes(path), False, True).commit(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fastsd.load(path)
        except (pickle.UnpicklingError, fastsd.FastsdError, RuntimeError, ValueError) as error:
            message = str(error)
        else:
            message = str(path)
    assert str(path) in message or "restore data location" in message


# ---- What others do meanwhile ----


@pytest.mark.parametrize("others", ["fastsd", "torch"])
def test_sparse_tensors_are_checked_whatever_other_threads_load(others, write, tmp_path):
    bad = write(stream_of(tup(sparse("fifty"), tensor())), **DATA)
    good = tmp_path / "good"
    (fastsd if others == "fastsd" else torch).save([nn.Parameter(torch.ones(1)), {1}], good)
    loads = []

    def load_another(storage, location):
        if len(loads) < 5:
            loads.append(others)
            load = fastsd.load if others == "fastsd" else torch.load
            thread = threading.Thread(target=load, args=(good,))
            thread.start()
            thread.join()
        return storage

    with pytest.raises(RuntimeError, match="index"):
        fastsd.load(bad, map_location=load_another)
    assert loads


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, PermissionError])
def test_what_is_no_fault_of_the_file_is_not_put_down_to_it(error, write, monkeypatch):
    path = write(stream_of(tup(tensor(), sparse("one"))), **DATA)  # for torch to unpickle

    def fail(*args):
        raise error("none left")

    # In a frame of torch's own, as where it allocates for another device.
    source = "def rebuild(*args): fail()"
    exec(source, vars(torch._utils) | {"fail": fail}, names := {})
    monkeypatch.setattr(torch._utils, "_rebuild_tensor", names["rebuild"])
    with pytest.raises(error, match="none left"):
        fastsd.load(path)


def test_releases_of_torch_that_give_addresses():
    recorder = pickled._Recorder()
    storage = torch.arange(4.0).untyped_storage()
    recorder.write_record("data/0", storage.data_ptr(), storage.nbytes())
    recorder.write_record("data/1", 0, 0)
    assert recorder.storages["0"].tolist() == storage.tolist()
    assert recorder.storages["0"].data_ptr() != storage.data_ptr()
    assert recorder.storages["1"].nbytes() == 0


def test_load_into_takes_weights_only(path):
    fastsd.save({"w": torch.ones(2), "thing": Thing(1)}, path)
    target = {"w": torch.zeros(2)}
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        fastsd.load_into(target, path)
    fastsd.load_into(target, path, weights_only=False, select="w")
    assert target["w"].tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["builtins.set", "collections.Counter", "collections.OrderedDict"])
def test_containers_of_a_tuple_that_takes_long_to_hash(kind, write):
    shared = b"K\1" + b"q\1h\1\x86" * 16 + b"q\1"
    listed = b"](" + b"h\1" * 20_000 + b"e"
    if kind.endswith("OrderedDict"):
        listed = b"](" + b"](h\1K\1e" * 20_000 + b"e"
    path = write(stream_of(shared + call(kind, listed)))
    with pytest.raises(pickle.UnpicklingError, match="too large"):
        fastsd.load(path)


def test_names_of_what_is_nested_too_deeply():
    deep = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(fastsd.FormatError, match=r"x\.fsd: the object is nested too deeply"):
        pickled.choose(deep, NameRules(prefix="0."), "x.fsd")
