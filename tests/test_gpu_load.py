"""Loading to GPUs, over the stub driver; torch.load to the CPU is the oracle."""

import io
import multiprocessing
import os
import re
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from same import assert_same
from torch import nn

import fastsd
from fastsd import _core, gpu


def make_state():
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(40_000, generator=generator)
    return {
        "weight": random[:12_000].clone().view(100, 120),
        "half": random.to(torch.bfloat16),
        "numbers": torch.arange(1000),
        "flags": torch.tensor([True, False, True]),
        "transposed": random[:600].clone().view(20, 30).t(),
        "scalar": torch.tensor(7.0),
        "empty": torch.empty(0, 3),
        "parameter": nn.Parameter(random[:10].clone()),
        "large": torch.arange(3_000_000, dtype=torch.float32),
    }


def make_tree():
    state = make_state()
    base = torch.arange(100.0)
    return {
        "model": state,
        "tied": [base, base, base[10:20], base.view(10, 10)],
        "array": np.arange(5),
        "meta": torch.empty(3, device="meta"),
        "epoch": 3,
    }


def save_as(obj, folder, format):
    path = folder / f"x.{format}"
    if format == "safetensors":
        flat = {name: tensor.detach().contiguous() for name, tensor in obj.items()}
        safetensors.torch.save_file(flat, path)
    elif format == "pth":
        torch.save(obj, path)
    else:
        fastsd.save(obj, path)
    return path


FORMATS = ["fsd", "pth", "safetensors"]


@pytest.fixture
def torch_moves(stub_gpu, monkeypatch):
    """What torch itself moves to a GPU gets there, too: to host memory."""
    monkeypatch.setattr(torch.UntypedStorage, "to", lambda self, **_: self.clone())
    return stub_gpu


# ---- Bytes ----


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mmap", [None, False])
def test_every_byte_arrives(stub_gpu, tmp_path, format, mmap):
    stub_gpu.set("copy_delay_us", 100)
    path = save_as(make_state(), tmp_path, format)
    loaded = fastsd.load(path, map_location="cuda:1", mmap=mmap)
    expected = fastsd.load(path, mmap=mmap)
    assert_same(loaded, expected)
    assert stub_gpu.devices == {"cuda:1"}
    assert stub_gpu.get("bytes") == sum(t.untyped_storage().nbytes() for t in expected.values())


@pytest.mark.parametrize("format", ["fsd", "pth"])
def test_trees_keep_what_they_have(stub_gpu, tmp_path, format):
    path = save_as(make_tree(), tmp_path, format)
    loaded = fastsd.load(path, map_location="cuda", weights_only=False)
    assert_same(loaded, fastsd.load(path, weights_only=False))
    first, second, part, square = loaded["tied"]
    assert first is second
    assert part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
    assert square.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
    assert isinstance(loaded["array"], np.ndarray)
    assert loaded["meta"].is_meta


def test_file_objects(stub_gpu, tmp_path):
    stream = io.BytesIO(b"before")
    stream.seek(6)
    fastsd.save(make_state(), stream)
    stream.seek(6)
    assert_same(fastsd.load(stream, map_location="cuda"), make_state())
    path = save_as(make_state(), tmp_path, "fsd")
    with open(path, "rb") as file:
        assert_same(fastsd.load(file, map_location="cuda"), make_state())


def test_only_what_is_chosen_is_read(stub_gpu, tmp_path):
    path = save_as(
        {"a": torch.ones(1000), "b": torch.zeros(3000), "c": torch.ones(10)}, tmp_path, "fsd"
    )
    loaded = fastsd.load(path, map_location="cuda", select=["c", "a"])
    assert list(loaded) == ["a", "c"]
    assert stub_gpu.get("bytes") == 4040
    assert sorted(size for size, _ in stub_gpu.allocated) == [40, 4000]


def test_nothing_is_read_through_the_mapping(stub_gpu, tmp_path, monkeypatch):
    """A file that is cut after it has been opened is an error then, and no signal."""
    path = save_as({"a": torch.ones(1_000_000), "b": torch.ones(10)}, tmp_path, "fsd")
    allocate = stub_gpu.allocate

    def cut(sizes, device):
        os.truncate(path, 10_000)
        return allocate(sizes, device)

    monkeypatch.setattr(gpu, "allocate", cut)
    with pytest.raises(fastsd.TruncatedError, match=r"x\.fsd"):
        fastsd.load(path, map_location="cuda", mmap=True)


# ---- map_location ----


def test_a_dict_spreads_a_file(stub_gpu, tmp_path):
    state = make_state()
    path = save_as(state, tmp_path, "fsd")
    loaded = fastsd.load(path, map_location={"cpu": "cuda:1"})
    assert_same(loaded, state)
    assert stub_gpu.devices == {"cuda:1"}
    assert_same(fastsd.load(path, map_location={"cuda:0": "cuda:1"}), state)
    assert stub_gpu.get("bytes") == sum(size for size, _ in stub_gpu.allocated)


@pytest.mark.parametrize("mmap", [None, False])
@pytest.mark.parametrize("format", FORMATS)
def test_a_callable_spreads_a_file(stub_gpu, tmp_path, format, mmap):
    def place(storage, location):
        assert location == "cpu"
        if storage.nbytes() > 100_000:
            return storage.cuda(1)
        if storage.nbytes() > 5_000:
            return storage.to(device="cuda:0")
        return storage if storage.nbytes() > 50 else None

    path = save_as(make_state(), tmp_path, format)
    assert_same(fastsd.load(path, map_location=place, mmap=mmap), fastsd.load(path))
    assert stub_gpu.devices == {"cuda:0", "cuda:1"}
    assert stub_gpu.get("copies") > 0


def _check_size(storage, moved):
    assert moved.nbytes() == len(moved) == storage.nbytes()
    return moved


CALLABLES = {
    "copies": lambda storage: torch.UntypedStorage(storage.nbytes()).copy_(storage),
    "looks": lambda storage: storage if bytes(storage.cuda()) == bytes(storage) else None,
    "returns": lambda storage: storage.cuda(1).cpu(),
    "measures": lambda storage: _check_size(storage, storage.cuda()),
    "cuts": lambda storage: storage.cuda()[:],
    "edits": lambda storage: _turn(storage.cuda()),
}


def _turn(storage):
    storage.byteswap(torch.float32)
    return storage


@pytest.mark.parametrize("which", CALLABLES)
@pytest.mark.parametrize("format", ["fsd", "pth"])
@pytest.mark.parametrize("mmap", [None, False])
def test_a_callable_may_do_anything(torch_moves, tmp_path, which, format, mmap):
    """It is called once for each storage, and sees what torch.load would show it."""
    state = {"a": torch.arange(10.0), "b": torch.arange(5.0)}
    path = save_as(state, tmp_path, format)
    torch.save(state, tmp_path / "oracle")
    calls = []

    def place(storage, location):
        calls.append(storage.nbytes())
        return CALLABLES[which](storage)

    loaded = fastsd.load(path, map_location=place, mmap=mmap)
    assert sorted(calls) == [20, 40]
    assert_same(loaded, torch.load(tmp_path / "oracle", map_location=place))


@pytest.mark.parametrize("format", FORMATS)
def test_a_callable_with_casts_and_checksums(stub_gpu, tmp_path, format):
    path = save_as(make_state(), tmp_path, format)
    options = {} if format == "safetensors" else {"verify": "checksums"}
    loaded = fastsd.load(
        path, map_location=lambda storage, _: storage.cuda(1), dtype=torch.float16, **options
    )
    for name, expected in fastsd.load(path).items():
        cast = expected.half() if expected.is_floating_point() else expected
        assert torch.equal(loaded[name], cast), name
    assert stub_gpu.devices == {"cuda:1"}


def test_places_are_found_without_reading(stub_gpu, tmp_path, monkeypatch):
    path = save_as({"a": torch.ones(1000)}, tmp_path, "fsd")
    monkeypatch.setattr(
        "fastsd.storages._ask", lambda *_: pytest.fail("a storage was read to be asked for")
    )
    for location in ("cuda", {"cpu": "cuda:1"}, {"cuda:0": "cpu", "cpu": "cpu"}):
        fastsd.load(path, map_location=location, mmap=False)


def test_storages_are_not_marked_for_ever(stub_gpu, tmp_path):
    path = save_as({"a": torch.ones(3)}, tmp_path, "fsd")
    loaded = fastsd.load(path, map_location=lambda storage, location: storage)
    assert "to" not in vars(loaded["a"].untyped_storage())
    torch.save({"a": torch.ones(3), "other": os.path}, tmp_path / "y.pth", pickle_module=Pickler)
    loaded = fastsd.load(tmp_path / "y.pth", weights_only=False)
    assert "to" not in vars(loaded["a"].untyped_storage())


class Pickler:
    """A pickle module that can take modules of Python."""

    __name__ = "pickler"

    class Pickler(__import__("pickle").Pickler):
        def reducer_override(self, obj):
            return (__import__, (obj.__name__,)) if type(obj) is type(os) else NotImplemented


# ---- Pickles ----


class Box:
    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("format", ["fsd", "pth"])
def test_pickled_objects(stub_gpu, tmp_path, format):
    path = save_as({"box": Box(torch.arange(5000.0)), "b": torch.ones(3)}, tmp_path, format)
    loaded = fastsd.load(path, map_location="cuda:0", weights_only=False)
    assert torch.equal(loaded["box"].tensor, torch.arange(5000.0))
    assert torch.equal(loaded["b"], torch.ones(3))
    assert stub_gpu.get("bytes") == 20_012
    assert stub_gpu.devices == {"cuda:0"}


def save_big_endian(obj, folder, *, says_so=True):
    """As torch.save does on such a machine."""
    torch.save(obj, folder / "little.pth")
    path = folder / "big.pth"
    with zipfile.ZipFile(folder / "little.pth") as little, zipfile.ZipFile(path, "w") as big:
        for name in little.namelist():
            data = little.read(name)
            if "/data/" in name:
                data = np.frombuffer(data, dtype=np.float32).byteswap().tobytes()
            if not name.endswith("/byteorder"):
                big.writestr(name, data)
            elif says_so:
                big.writestr(name, b"big")
    return path


@pytest.mark.parametrize("says_so", [True, False])
@pytest.mark.parametrize("mmap", [None, False])
def test_what_is_turned_around_in_memory(torch_moves, tmp_path, says_so, mmap):
    path = save_big_endian({"a": torch.arange(10.0)}, tmp_path, says_so=says_so)
    order = torch.serialization.LoadEndianness.BIG
    torch.serialization.set_default_load_endianness(None if says_so else order)
    try:
        loaded = fastsd.load(path, map_location="cuda", mmap=mmap)
    finally:
        torch.serialization.set_default_load_endianness(None)
    assert torch.equal(loaded["a"], torch.arange(10.0))


# ---- On the way ----


@pytest.mark.parametrize("where", ["cpu", "cuda:0", None])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mmap", [None, False])
def test_dtypes_are_cast(stub_gpu, tmp_path, where, format, mmap):
    path = save_as(make_state(), tmp_path, format)
    loaded = fastsd.load(path, map_location=where, dtype=torch.float16, mmap=mmap)
    for name, expected in fastsd.load(path).items():
        cast = expected.to(torch.float16) if expected.is_floating_point() else expected
        assert torch.equal(loaded[name], cast), name
        assert loaded[name].stride() == expected.stride()
        assert type(loaded[name]) is type(expected)
        items = expected.untyped_storage().nbytes() // expected.itemsize
        assert loaded[name].untyped_storage().nbytes() == items * loaded[name].itemsize


def test_casting_larger_storages_than_the_slab(stub_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr("fastsd.storages._SLAB_BYTES", 4096)
    path = save_as(make_state(), tmp_path, "fsd")
    loaded = fastsd.load(path, map_location="cuda", dtype=torch.float64)
    for name, expected in make_state().items():
        cast = expected.double() if expected.is_floating_point() else expected
        assert torch.equal(loaded[name], cast), name
    weights = sum(
        t.untyped_storage().nbytes() for t in fastsd.load(path, dtype=torch.float64).values()
    )
    assert sum(size for size, _ in stub_gpu.allocated) == weights + 4096


def test_casting_keeps_what_is_tied(stub_gpu, tmp_path):
    base = torch.arange(100.0)
    path = save_as([base, base[3:7], base, torch.empty(3, device="meta")], tmp_path, "fsd")
    whole, part, same, meta = fastsd.load(path, map_location="cuda", dtype=torch.bfloat16)
    assert same is whole
    assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert torch.equal(part, torch.arange(3.0, 7.0).bfloat16())
    assert meta.is_meta
    assert meta.dtype == torch.bfloat16


def test_what_cannot_be_cast(stub_gpu, tmp_path):
    base = torch.arange(8.0)
    path = save_as([base, base.view(torch.int32)], tmp_path, "fsd")
    with pytest.raises(fastsd.UnsupportedError, match="shares memory"):
        fastsd.load(path, dtype=torch.float16)
    with pytest.raises(ValueError, match="dtype must be"):
        fastsd.load(path, dtype=torch.int8)
    path = save_as(Box(base), tmp_path, "fsd")
    with pytest.raises(fastsd.UnsupportedError, match="unpickled"):
        fastsd.load(path, dtype=torch.float16, weights_only=False)
    torch.save([base], tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(fastsd.UnsupportedError, match=r"old\.pth"):
        fastsd.load(tmp_path / "old.pth", dtype=torch.float16)


@pytest.mark.parametrize("format", ["fsd", "pth"])
def test_checksums_are_compared_on_the_way(stub_gpu, tmp_path, format, monkeypatch):
    path = save_as(make_state(), tmp_path, format)
    assert_same(fastsd.load(path, map_location="cuda", verify="checksums"), make_state())
    data = bytearray(path.read_bytes())
    at = data.index(np.arange(500, 520, dtype=np.int64).tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(fastsd.ChecksumError, match='"numbers"') as caught:
        fastsd.load(path, map_location="cuda", verify="checksums")
    assert caught.value.tensors == ("numbers",)


@pytest.mark.parametrize("where", ["cpu", "cuda", None])
@pytest.mark.parametrize("options", [{}, {"select": "numbers"}, {"dtype": torch.float16}])
def test_checksums_of_streams(stub_gpu, where, options):
    """Of all that came out of them, whatever is made of it."""
    stream = io.BytesIO()
    fastsd.save(make_state(), stream)
    stream.seek(0)
    loaded = fastsd.load(stream, map_location=where, verify="checksums", **options)
    assert torch.equal(loaded["numbers"], torch.arange(1000))
    data = bytearray(stream.getvalue())
    data[-4] ^= 1  # in what select leaves out
    with pytest.raises(fastsd.ChecksumError, match='"large"'):
        fastsd.load(io.BytesIO(data), map_location=where, verify="checksums", **options)


def test_what_was_checked_on_the_way_is_not_read_again(stub_gpu, tmp_path):
    path = save_as(make_state(), tmp_path, "fsd")
    passage = fastsd.upload.Passage(checks=True)
    with fastsd.api.open_any(path, None) as opened:
        reader = opened.readers[0]
        fastsd.placement.place_storages(reader, "cuda", None, passage)
        data = bytearray(path.read_bytes())
        data[-4] ^= 1
        path.write_bytes(data)
        assert fastsd.archive.verify([reader], passage).checked_nbytes > 12_000_000
        with pytest.raises(fastsd.ChecksumError):
            fastsd.archive.verify([reader])


def test_progress_is_told_of_every_byte(stub_gpu, tmp_path, capsys):
    path = save_as(make_state(), tmp_path, "fsd")
    assert_same(fastsd.load(path, map_location="cuda", progress=True), make_state())
    assert "x.fsd" in capsys.readouterr().err


def test_progress_without_rich(tmp_path, monkeypatch):
    path = save_as({"a": torch.ones(2)}, tmp_path, "fsd")
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    with pytest.raises(ImportError, match=re.escape("pip install fastsd[cli]")):
        fastsd.load(path, progress=True)


# ---- open ----


def test_slices_read_their_rows_only(stub_gpu, tmp_path):
    matrix = torch.arange(200_000.0).view(1000, 200)
    path = save_as({"m": matrix, "tied": [matrix[:2], matrix[:2]]}, tmp_path, "pth")
    path = save_as({"m": matrix.clone(), "n": torch.ones(3)}, tmp_path, "fsd")
    with fastsd.open(path, device="cuda:1") as archive:
        assert torch.equal(archive.get_slice("m")[100:110], matrix[100:110])
        assert stub_gpu.get("bytes") == 10 * 200 * 4
        assert torch.equal(archive["n"], torch.ones(3))
        assert torch.equal(archive.get_slice("m")[5, 7:9], matrix[5, 7:9])
        assert torch.equal(archive.get_slice("m")[3:3], matrix[3:3])
    assert stub_gpu.devices == {"cuda:1"}


def test_slices_with_gaps_take_no_memory_for_them(stub_gpu, tmp_path):
    matrix = torch.arange(2000.0).view(20, 100)
    path = save_as({"m": matrix}, tmp_path, "fsd")
    with fastsd.open(path, device="cuda") as archive, fastsd.open(path) as host:
        part = archive.get_slice("m")[:, 10:15]
        assert torch.equal(part, matrix[:, 10:15])
        assert part.is_contiguous()
        assert part.untyped_storage().nbytes() == 20 * 5 * 4
        assert host.get_slice("m")[:, 10:15].stride() == (100, 1)


def test_tied_tensors_of_an_archive_stay_tied(stub_gpu, tmp_path):
    base = torch.arange(100.0)
    path = save_as({"a": base, "b": base[10:20]}, tmp_path, "fsd")
    with fastsd.open(path, device="cuda") as archive:
        a, b = archive["a"], archive["b"]
        assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        assert torch.equal(b, base[10:20])


# ---- Into models ----


@pytest.fixture
def all_served(stub_gpu, monkeypatch):
    """CPU tensors stand for those on a GPU."""
    monkeypatch.setattr(gpu, "is_served", lambda device: True)
    return stub_gpu


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 300), nn.BatchNorm1d(300), nn.Linear(300, 64))
    model.append(nn.Linear(64, 64))
    model[3].weight = model[3].weight
    return model


@pytest.mark.parametrize("format", FORMATS)
def test_into_a_model(all_served, tmp_path, format):
    source, target = make_model(), make_model()
    for parameter in target.parameters():
        parameter.data.zero_()
    path = save_as(source.state_dict(), tmp_path, format)
    addresses = [p.data_ptr() for p in target.parameters()]
    result = fastsd.load_into(target, path)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same(dict(target.state_dict()), dict(source.state_dict()))
    assert addresses == [p.data_ptr() for p in target.parameters()]
    assert all(type(p) is nn.Parameter for p in target.parameters())
    nbytes = sum(t.nbytes for t in source.state_dict().values())
    assert all_served.get("bytes") == nbytes


def test_into_a_model_of_another_dtype(all_served, tmp_path):
    path = save_as(make_model().state_dict(), tmp_path, "fsd")
    target = make_model().to(torch.bfloat16)
    expected = make_model().to(torch.bfloat16)
    expected.load_state_dict(torch.load(save_as(make_model().state_dict(), tmp_path, "pth")))
    for parameter in target.parameters():
        parameter.data.zero_()
    fastsd.load_into(target, path)
    assert_same(dict(target.state_dict()), dict(expected.state_dict()))


def test_into_tensors_that_are_not_contiguous(all_served, tmp_path):
    path = save_as({"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5)}, tmp_path, "fsd")
    target = {"a": torch.zeros(4, 3).t(), "b": torch.zeros(5)}
    fastsd.load_into(target, path)
    assert torch.equal(target["a"], torch.arange(12.0).view(3, 4))
    assert torch.equal(target["b"], torch.ones(5))


def test_into_tied_and_overlapping_memory_the_last_counts(all_served, tmp_path):
    path = save_as(
        {"a": torch.full((10,), 1.0), "b": torch.full((10,), 2.0), "c": torch.full((4,), 3.0)},
        tmp_path,
        "fsd",
    )
    memory = torch.zeros(10)
    fastsd.load_into({"a": memory, "b": memory, "c": memory[3:7]}, path)
    assert memory.tolist() == [2, 2, 2, 3, 3, 3, 3, 2, 2, 2]


def test_strict_errors_are_torchs(all_served, tmp_path):
    state = make_model().state_dict()
    del state["0.bias"]
    state["more"] = torch.ones(2)
    path = save_as(state, tmp_path, "fsd")
    target, other = make_model(), make_model()
    with pytest.raises(RuntimeError) as theirs:
        other.load_state_dict(state)
    with pytest.raises(RuntimeError) as ours:
        fastsd.load_into(target, path)
    assert str(ours.value) == str(theirs.value)
    assert_same(dict(target.state_dict()), dict(other.state_dict()))


def test_modules_with_code_of_their_own_get_what_they_expect(all_served, tmp_path):
    class Doubling(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            super()._load_from_state_dict(state_dict, prefix, *args)
            with torch.no_grad():
                self.weight.mul_(2)

    source = nn.Linear(4, 4)
    path = save_as(source.state_dict(), tmp_path, "fsd")
    target = Doubling(4, 4)
    fastsd.load_into(target, path)
    assert torch.equal(target.weight, source.weight * 2)

    hooked = nn.Linear(4, 4)
    seen = []
    hooked.register_load_state_dict_post_hook(lambda module, _: seen.append(module.weight.clone()))
    fastsd.load_into(hooked, path)
    assert torch.equal(seen[0], source.weight)


def test_modules_whose_extra_state_looks_at_weights(all_served, tmp_path):
    class Looking(nn.Linear):
        def get_extra_state(self):
            return torch.tensor(1.0)

        def set_extra_state(self, state):
            self.seen = self.weight.detach().clone()

    source, target = Looking(3, 3), Looking(3, 3)
    fastsd.load_into(target, save_as(source.state_dict(), tmp_path, "fsd"))
    assert torch.equal(target.seen, source.weight)


def test_modules_with_a_method_of_their_own(all_served, tmp_path):
    source, target = nn.Linear(3, 3), nn.Linear(3, 3)
    load = target._load_from_state_dict

    def load_and_double(*args):
        load(*args)
        target.weight.data.mul_(2)

    target._load_from_state_dict = load_and_double
    fastsd.load_into(target, save_as(source.state_dict(), tmp_path, "fsd"))
    assert torch.equal(target.weight, source.weight * 2)


def test_modules_that_swap_their_parameters(all_served, tmp_path):
    source, target = nn.Linear(3, 3), nn.Linear(3, 3)
    path = save_as(source.state_dict(), tmp_path, "fsd")
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        fastsd.load_into(target, path)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_same(dict(target.state_dict()), dict(source.state_dict()))
    assert type(target.weight) is nn.Parameter


def test_into_under_inference_mode(all_served, tmp_path):
    source, target = nn.Linear(3, 3), nn.Linear(3, 3)
    path = save_as(source.state_dict(), tmp_path, "fsd")
    with torch.inference_mode():
        own = {"weight": torch.zeros(3, 3), "bias": torch.zeros(3)}
        fastsd.load_into(target, path)
        fastsd.load_into(own, path)
    assert_same(dict(target.state_dict()), dict(source.state_dict()))
    assert torch.equal(own["weight"], source.weight)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        fastsd.load_into(own, path)


def test_into_a_mapping_whose_keys_are_no_strings(all_served, tmp_path):
    target = {0: torch.zeros(3)}
    fastsd.load_into(target, save_as({0: torch.ones(3)}, tmp_path, "fsd"))
    assert target[0].tolist() == [1, 1, 1]


def test_views_of_as_many_bytes_from_the_same_place(all_served, tmp_path):
    path = save_as({"even": torch.full((4,), 1.0), "first": torch.full((4,), 2.0)}, tmp_path, "fsd")
    memory = torch.zeros(8)
    fastsd.load_into({"even": memory[::2], "first": memory[:4]}, path)
    assert memory.tolist() == [2, 2, 2, 2, 1, 0, 1, 0]


def test_what_torch_refuses_to_copy_into(all_served, tmp_path):
    """It says so for each tensor, and fills the others."""

    def make():
        module = nn.Module()
        module.register_buffer("a", torch.zeros(1).expand(4))
        module.register_buffer("b", torch.zeros(3))
        return module

    state = {"a": torch.ones(4), "b": torch.ones(3)}
    ours, theirs = make(), make()
    with pytest.raises(RuntimeError) as expected:
        theirs.load_state_dict(state)
    with pytest.raises(RuntimeError) as caught:
        fastsd.load_into(ours, save_as(state, tmp_path, "fsd"))
    assert str(caught.value) == str(expected.value)
    assert ours.b.tolist() == [1, 1, 1]


def test_autograd_knows_of_copies(all_served, tmp_path):
    path = save_as({"weight": torch.ones(3)}, tmp_path, "fsd")
    weight = torch.zeros(3, requires_grad=True)
    result = (weight * weight).sum()
    fastsd.load_into({"weight": weight}, path)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


class Doubled(torch.Tensor):
    """A subclass without memory of its own, as distributed and quantized tensors are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        assert func is torch.ops.aten.copy_.default
        args[0].inner.copy_(args[1] * 2)
        return args[0]

    __torch_function__ = torch._C._disabled_torch_function_impl


def test_subclasses_are_copied_into_by_their_own_code(all_served, tmp_path):
    module = nn.Module()
    module.register_buffer("a", Doubled(torch.zeros(4)))
    fastsd.load_into(module, save_as({"a": torch.ones(4)}, tmp_path, "fsd"))
    assert module.a.inner.tolist() == [2] * 4


def test_bytes_that_unpickling_has_changed(all_served, tmp_path):
    """In memory, in mapped pages: they are not those of the file."""
    path = save_big_endian({"a": torch.arange(10.0)}, tmp_path)
    target = {"a": torch.zeros(10)}
    fastsd.load_into(target, path)
    assert torch.equal(target["a"], torch.arange(10.0))

    tensor = torch.ones(4)
    torch.save({"box": Tripling(tensor), "a": tensor}, tmp_path / "x.pth")
    target = {"a": torch.zeros(4)}
    fastsd.load_into(target, tmp_path / "x.pth", strict=False, weights_only=False)
    assert target["a"].tolist() == [3] * 4


class Tripling:
    def __init__(self, tensor):
        self.tensor = tensor

    def __setstate__(self, state):
        self.tensor = state["tensor"].mul_(3)


# ---- Failures ----


def test_a_copy_that_fails(stub_gpu, tmp_path):
    path = save_as(make_state(), tmp_path, "fsd")
    stub_gpu.set("fail_copy", 3)
    with pytest.raises(fastsd.DeviceError, match=r"x\.fsd: cu.*CUDA_ERROR_ILLEGAL_ADDRESS"):
        fastsd.load(path, map_location="cuda")
    _core.release_pinned()
    stub_gpu.reset()
    assert_same(fastsd.load(path, map_location="cuda"), make_state())


FAILING = {
    "x.fsd": [
        lambda path: fastsd.load_into({"weight": torch.zeros(3)}, path),
        lambda path: fastsd.open(path, device="cuda")["weight"],
    ],
    "x.pth": [lambda path: fastsd.load(path, map_location="cuda", weights_only=False)],
}


@pytest.mark.parametrize(("name", "load"), [(n, load) for n in FAILING for load in FAILING[n]])
def test_errors_name_the_file(all_served, tmp_path, name, load):
    fastsd.save({"weight": torch.ones(3)}, tmp_path / "x.fsd")
    torch.save({"box": Box(torch.ones(3))}, tmp_path / "x.pth")
    all_served.set("fail_copy", 1)
    with pytest.raises(fastsd.DeviceError, match=re.escape(f"{name}: cu")):
        load(tmp_path / name)
    _core.release_pinned()


@pytest.mark.parametrize("options", [{}, {"mmap": False}, {"dtype": torch.float16}], ids=str)
def test_a_file_that_shrinks_meanwhile(stub_gpu, tmp_path, monkeypatch, options):
    """It is read and never touched through a mapping, which would end the process."""
    path = save_as({"a": torch.ones(5_000_000)}, tmp_path, "fsd")

    def allocate(sizes, device):  # once the header has been read
        os.truncate(path, 8_000_000)
        return stub_gpu.allocate(sizes, device)

    monkeypatch.setattr(gpu, "allocate", allocate)
    with pytest.raises(fastsd.TruncatedError, match=r"x\.fsd"):
        fastsd.load(path, map_location="cuda", **options)


def test_no_room_on_the_gpu(stub_gpu, tmp_path, monkeypatch):
    path = save_as(make_state(), tmp_path, "fsd")

    def refuse(sizes, device):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "allocate", refuse)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        fastsd.load(path, map_location="cuda")


def test_ctrl_c_frees_everything(stub_gpu, tmp_path, monkeypatch):
    path = save_as({"a": torch.ones(20_000_000)}, tmp_path, "fsd")
    stub_gpu.set("copy_delay_us", 100_000)
    gpu.set_pinned_memory(0)

    def interrupt(self, nbytes):
        def tell(done):
            raise KeyboardInterrupt

        return fastsd.progress.contextmanager(lambda: (yield tell))()

    monkeypatch.setattr(fastsd.upload.Passage, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fastsd.load(path, map_location="cuda")
    gpu.set_pinned_memory(512 << 20)
    assert stub_gpu.get("copies") < 10


def test_a_driver_that_is_not_there(tmp_path):
    _core.set_cuda_library("no-such-library.so")
    try:
        assert "no-such-library.so" in gpu.describe()["CUDA driver"]
        assert not gpu.is_served(torch.device("cuda"))
    finally:
        _core.set_cuda_library("")


# ---- Through torch ----


def test_other_accelerators_are_served_by_torch(stub_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "is_served", lambda device: False)
    monkeypatch.setattr("fastsd.upload._HOST_SLAB_BYTES", 5000)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    path = save_as(make_state(), tmp_path, "fsd")
    assert_same(fastsd.load(path, map_location="cuda"), make_state())
    assert_same(fastsd.load(path, map_location="cuda", verify="checksums"), make_state())
    assert stub_gpu.devices == {"cuda"}
    assert stub_gpu.get("copies") == 0


# ---- Pinned memory ----


def test_pinned_memory_is_bounded(stub_gpu, tmp_path):
    path = save_as({"a": torch.ones(20_000_000)}, tmp_path, "fsd")
    stub_gpu.set("copy_delay_us", 2000)
    gpu.set_pinned_memory(16 << 20)
    try:
        fastsd.load(path, map_location="cuda")
        assert stub_gpu.get("pinned_peak") <= 16 << 20
        assert gpu.describe()["pinned memory"] == "16 of 16 MiB"
    finally:
        gpu.set_pinned_memory(512 << 20)
    with pytest.raises(ValueError, match="negative"):
        gpu.set_pinned_memory(-1)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("0", 16 << 20),
        ("100000000", 100_000_000),
        (str(1 << 70), (1 << 64) - 1),
        ("-1", "FASTSD_PINNED_BYTES must be a number of bytes, not '-1'"),
        ("512M", "FASTSD_PINNED_BYTES must be a number of bytes, not '512M'"),
        ("", "FASTSD_PINNED_BYTES must be a number of bytes, not ''"),
    ],
)
def test_the_environment_sets_the_bound(monkeypatch, text, answer):
    monkeypatch.setenv("FASTSD_PINNED_BYTES", text)
    try:
        if isinstance(answer, int):
            gpu._apply_environment()
            assert _core.pinned_bytes_max() == answer
        else:
            with pytest.raises(ValueError, match=re.escape(answer)):
                gpu._apply_environment()
    finally:
        gpu.set_pinned_memory(512 << 20)


def _load_in_child(path, queue):
    try:
        fastsd.load(path, map_location="cuda")
    except fastsd.DeviceError as error:
        queue.put(str(error))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process(stub_gpu, tmp_path):
    path = save_as(make_state(), tmp_path, "fsd")
    fastsd.load(path, map_location="cuda")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_load_in_child, args=(path, queue))
    child.start()
    assert "forked" in queue.get(timeout=60)
    child.join()
    assert_same(fastsd.load(path, map_location="cuda"), make_state())
