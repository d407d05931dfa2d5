"""What torch itself has to read: files of before 1.6, tar files, TorchScript; plain pickles."""

import argparse
import gzip
import io
import os
import pickle
import struct
import tarfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from same import assert_same, small_state
from test_like_torch import LIBRARIES, PLAIN, TENSORS, assert_same_outcome, attempt
from test_pickled import call, glob, integer, integers, text, tup
from torch import nn

import fastsd
from fastsd import FastsdError, FormatError, NamesError, TruncatedError, UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore")  # of what torch deprecates, mostly


def save(obj):
    """What torch.save wrote before release 1.6."""
    file = io.BytesIO()
    torch.save(obj, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


class Exploit:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.fixture
def nothing_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not os.path.exists("executed")


# ---- Files of before 1.6 ----

NAMES = [name for name in PLAIN if name != "dtype views"]  # torch cannot read its own


@pytest.mark.parametrize("weights_only", [None, True, False])
@pytest.mark.parametrize("name", [*NAMES, "torch.sparse_coo", "quantized", "views", "uncoalesced"])
def test_old_files(name, weights_only):
    data = save((PLAIN | TENSORS)[name]())
    outcomes = [
        attempt(lambda load=library.load: load(io.BytesIO(data), weights_only=weights_only))
        for library in LIBRARIES.values()
    ]
    assert_same_outcome(*outcomes)


def test_old_files_in_every_way_to_load(path):
    state = {"m.a": torch.arange(5.0), "m.b": torch.ones(2, dtype=torch.bfloat16), "n": 3}
    path.write_bytes(save(state))
    for mmap in (None, True, False):
        assert_same(fastsd.load(path, mmap=mmap), state)
    assert_same(fastsd.load(path, prefix="m.", select="a"), OrderedDict(a=state["m.a"]))
    with pytest.raises(NamesError):
        fastsd.load(path, prefix="x.")
    assert fastsd.load(path, map_location="meta")["m.a"].device.type == "meta"
    filled_in = {"m.a": torch.zeros(5), "m.b": torch.zeros(2)}
    fastsd.load_into(filled_in, path, select="m.*")
    assert_same(filled_in["m.a"], state["m.a"])
    with fastsd.open(path) as archive:
        assert list(archive) == ["m.a", "m.b"]
        assert archive.get_slice("m.a")[1:3].tolist() == [1, 2]
    assert fastsd.get_unsafe_globals_in_checkpoint(path) == []
    for load in (fastsd.load, lambda f, **how: fastsd.load_into({}, f, **how)):
        with pytest.raises(fastsd.ChecksumError, match="no checksums"):
            load(path, verify="checksums")


def test_several_old_files_in_one():
    file = io.BytesIO(b"before" + save(small_state()) + save([1]) + save(torch.ones(2)))
    file.seek(6)
    assert_same(fastsd.load(file), small_state())
    assert fastsd.load(file) == [1]
    assert torch.equal(fastsd.load(file), torch.ones(2))


class OnlyRead:
    def __init__(self, data):
        self.read = io.BytesIO(data).read


def test_old_files_from_streams(tmp_path):
    assert_same(fastsd.load(OnlyRead(save(small_state()))), small_state())
    with gzip.open(tmp_path / "x", "wb") as file:
        file.write(save(small_state()))
    with gzip.open(tmp_path / "x") as file:
        assert_same(fastsd.load(file), small_state())


def test_classes_that_are_not_allowed(path):
    path.write_bytes(save({"args": argparse.Namespace(a=1), "w": torch.ones(1)}))
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace") as caught:
        fastsd.load(path)
    assert str(caught.value).startswith(f"{path}: Weights only load failed")
    assert fastsd.get_unsafe_globals_in_checkpoint(path) == ["argparse.Namespace"]
    assert fastsd.load(path, weights_only=False)["args"].a == 1
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert fastsd.load(path)["args"].a == 1


@pytest.mark.usefixtures("nothing_executed")
def test_nothing_is_executed(path):
    shard = path.with_name("model.bin")
    index = path.with_name("model.bin.index.json")
    index.write_text('{"weight_map": {"a": "model.bin"}}')
    file = io.BytesIO()
    torch.save({"a": Exploit()}, file)
    for data in (save({"a": Exploit()}), pickle.dumps({"a": Exploit()}), file.getvalue()):
        path.write_bytes(data)
        shard.write_bytes(data)
        for place in (path, index, path.parent, io.BytesIO(data)):
            for load in (fastsd.load, lambda f: fastsd.load_into({}, f)):
                with pytest.raises((FormatError, pickle.UnpicklingError)):
                    load(place)
        try:
            names = list(fastsd.open(path))
        except (FormatError, pickle.UnpicklingError):
            continue
        assert names == []


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_file_that_was_cut(weights_only, path):
    data = save({"a": torch.arange(600.0).view(20, 30), "n": [1, "x"]})
    for nbytes in range(1, len(data), 31):
        path.write_bytes(data[:nbytes])
        kind = TruncatedError if nbytes > 31 or not weights_only else FormatError
        with pytest.raises(kind) as caught:
            fastsd.load(path, weights_only=weights_only)
        assert str(path) in str(caught.value)


def old_file(body):
    """A file with an object of its own; see test_pickled."""
    before = save(0).split(pickle.dumps(0, 2))[0]
    return before + b"\x80\x02" + body + b"." + pickle.dumps([], 2)


def test_the_files_of_this_test_are_well_formed():
    assert fastsd.load(io.BytesIO(old_file(b"K\7"))) == 7


def test_what_would_end_the_process(path):
    deep = old_file(b"(" * 9 + b")" + b"\x85" * 200_000 + b"q\0}h\0K\1s")
    wide = old_file(b"}(" + b")" + b"\x86".join(b"2" for _ in range(60)) + b"\x86" + b"K\1u")
    for data in (deep, wide):
        path.write_bytes(data)
        with pytest.raises((FormatError, pickle.UnpicklingError), match=str(path)):
            fastsd.load(path)


def test_sparse_tensors_are_checked(path):
    good = torch.sparse_coo_tensor([[1]], [1.0], (3,))
    data = save([good])
    one, fifty = (struct.pack("<QQ", 1, value) for value in (1, 50))
    assert data.count(one) == 1
    path.write_bytes(data.replace(one, fifty))
    with pytest.raises(FormatError, match="size is inconsistent with indices"):
        fastsd.load(path)
    path.write_bytes(data)
    assert_same(fastsd.load(path), [good])


def test_sizes_that_are_not_so(path):
    storage = (
        tup(
            text("storage"),
            glob("torch.FloatStorage"),
            text("0"),
            text("cpu"),
            integer(2**50),
            b"N",
        )
        + b"Q"
    )
    hooks = glob("collections.OrderedDict") + b")R"
    tensor = call(
        "torch._utils._rebuild_tensor_v2",
        storage,
        integer(0),
        integers(1),
        integers(1),
        b"\x89",
        hooks,
    )
    path.write_bytes(old_file(tensor))
    with pytest.raises(FormatError, match="it is damaged"):
        fastsd.load(path)


def test_errors_of_a_map_location_are_its_own(path):
    path.write_bytes(save(small_state()))
    with pytest.raises(ZeroDivisionError):
        fastsd.load(path, map_location=lambda storage, place: 1 / 0)
    if not torch.cuda.is_available():
        wanted = attempt(lambda: torch.load(path, map_location=lambda storage, _: storage.cuda()))
        found = attempt(lambda: fastsd.load(path, map_location=lambda storage, _: storage.cuda()))
        assert type(found.error) is type(wanted.error)
    with pytest.raises(RuntimeError, match=f"{path}: .*nowhere"):
        fastsd.load(path, map_location="nowhere")


# ---- Tar files ----


def tar_file():
    """As torch wrote them in 2016: one tensor of three floats."""
    pickles = lambda *values: b"".join(pickle.dumps(value, 2) for value in values)  # noqa: E731
    storages = pickles(1, ("s", "cpu", torch.FloatStorage))
    storages += struct.pack("<q3f", 3, 1.5, 2.5, 3.5) + pickles([])
    tensors = pickles(1, ("7", "s", torch.FloatTensor))
    tensors += struct.pack("<iiqqq", 1, 0, 3, 1, 0)
    main = b"\x80\x02}X\1\0\0\0wX\1\0\0\x007Qs."
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in {"storages": storages, "tensors": tensors, "pickle": main}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def test_tar_files(path):
    path.write_bytes(tar_file())
    wanted = attempt(lambda: torch.load(path, weights_only=False))
    found = attempt(lambda: fastsd.load(path, weights_only=False))
    if wanted.error is None:
        assert_same(found.value, wanted.value)
    else:
        assert isinstance(found.error, (FastsdError, type(wanted.error)))
    with pytest.raises(RuntimeError, match=f"{path}: Cannot use ``weights_only=True``"):
        fastsd.load(path)


def test_a_tar_file_that_torch_did_not_write(path):
    with tarfile.open(path, "w") as tar:
        tar.add(__file__, "../../outside")
    with pytest.raises(FastsdError, match=str(path)):
        fastsd.load(path, weights_only=False)


# ---- TorchScript ----


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 3)), path)
    return path


@pytest.mark.parametrize("weights_only", [None, True])
def test_torchscript_is_not_only_weights(weights_only, script):
    with pytest.raises(
        RuntimeError, match=f"{script}: Cannot use ``weights_only=True`` with Torch"
    ):
        fastsd.load(script, weights_only=weights_only)
    with pytest.raises(RuntimeError, match="Cannot use ``weights_only=True`` with Torch"):
        torch.load(script, weights_only=weights_only)


def test_torchscript_on_trust(script):
    wanted = torch.jit.load(script)
    for f in (script, io.BytesIO(script.read_bytes())):
        model = fastsd.load(f, weights_only=False)
        assert isinstance(model, torch.jit.ScriptModule)
        assert torch.equal(model(torch.ones(2)), wanted(torch.ones(2)))
    with pytest.raises(UnsupportedError, match="from a file that can seek"):
        fastsd.load(OnlyRead(script.read_bytes()), weights_only=False)


def test_torchscript_that_was_cut(script):
    data = script.read_bytes()
    for nbytes in range(1, len(data), 97):
        script.write_bytes(data[:nbytes])
        with pytest.raises(FormatError, match=str(script)):
            fastsd.load(script, weights_only=False)


# ---- Plain pickles ----


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_plain_pickles_on_trust(protocol, path):
    model = {"model": {"conv.w": np.arange(6.0).reshape(2, 3)}, "__author__": "zoo"}
    path.write_bytes(pickle.dumps(model, protocol))
    for options in ({}, {"weights_only": True}):
        with pytest.raises(FormatError, match="weights_only=False only if you trust") as caught:
            fastsd.load(path, **options)
        assert caught.value.path == str(path)
    assert_same(fastsd.load(path, weights_only=False), model)
    assert_same(fastsd.load(io.BytesIO(path.read_bytes()), weights_only=False), model)
    with pytest.raises(FormatError, match="trust"):
        fastsd.open(path)


def test_pickles_of_python_2(path):
    path.write_bytes(b"\x80\x02U\x03\xe4bcq\0.")
    assert fastsd.load(path, weights_only=False, encoding="latin1") == "äbc"
    assert fastsd.load(path, weights_only=False, encoding="bytes") == b"\xe4bc"
    assert fastsd.load(path, pickle_module=pickle, encoding="latin1") == "äbc"


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_pickle_that_was_cut(protocol, path):
    data = pickle.dumps({"a": np.arange(100), "b": "x" * 300}, protocol)
    for nbytes in range(3, len(data), 7):
        path.write_bytes(data[:nbytes])
        with pytest.raises(FormatError, match=str(path)):
            fastsd.load(path, weights_only=False)
