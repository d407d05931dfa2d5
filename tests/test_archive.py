"""`open`: a read-only mapping of a file's tensors, which are read when they are asked for."""

import gc
import io
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from same import PLAIN_DTYPES, assert_same, filled, raw, shares_storage, small_state
from torch import nn

import fastsd

ACCESS = pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])


@pytest.fixture
def archive_of(path):
    """Saves an object and opens the file; closes it in the end."""
    archives = []

    def save_and_open(obj, **options):
        fastsd.save(obj, path)
        archives.append(fastsd.open(path, **options))
        return archives[-1]

    yield save_and_open
    for archive in archives:
        archive.close()


# ---- A mapping ----


def test_it_is_a_mapping_in_the_order_of_the_file(archive_of):
    state = small_state()
    archive = archive_of(state)
    assert isinstance(archive, fastsd.Archive)
    assert isinstance(archive, Mapping)
    assert list(archive) == list(archive.keys()) == list(state)
    assert len(archive) == len(state)
    assert "weight" in archive
    assert "nothing" not in archive
    assert 3 not in archive
    assert archive.get("nothing") is None
    assert_same(dict(archive), dict(state))
    assert_same(dict(archive.items()), dict(state))


def test_it_cannot_be_changed(archive_of):
    archive = archive_of(small_state())
    with pytest.raises(TypeError):
        archive["weight"] = torch.ones(1)
    with pytest.raises(TypeError):
        del archive["weight"]


def test_an_unknown_name_is_a_key_error(archive_of):
    archive = archive_of(small_state())
    for ask in (archive.__getitem__, archive.info, archive.get_slice):
        with pytest.raises(KeyError, match="nothing"):
            ask("nothing")


def test_an_empty_archive(archive_of):
    archive = archive_of({})
    assert dict(archive) == {}
    assert archive.metadata == {}
    assert archive.verify() == fastsd.Verification(0, ())


def test_it_shows_what_it_is(archive_of, path):
    archive = archive_of(small_state())
    assert repr(archive) == f"<fastsd.Archive {str(path)!r}, 6 tensors>"
    archive.close()
    assert "closed" in repr(archive)


def test_names_in_a_nested_file_are_the_way_to_the_tensor(archive_of):
    ones = torch.ones(2)
    ones.scale = torch.tensor(0.5)
    obj = {
        "model": {"layer": [ones, (torch.zeros(1), 3)]},
        "model.layer.0": torch.arange(3),
        7: {None: torch.tensor(7)},
        "array": np.arange(2.0),
    }
    archive = archive_of(obj)
    assert list(archive) == [
        "model.layer.0",
        "model.layer.0.scale",
        "model.layer.1.0",
        "model.layer.0#2",
        "7.None",
        "array",
    ]
    assert archive["model.layer.0"].tolist() == [1.0, 1.0]
    assert archive["model.layer.0#2"].tolist() == [0, 1, 2]
    assert archive["array"].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("obj", [torch.ones(2), [torch.ones(2)], [[torch.ones(2)]]])
def test_every_tensor_has_a_name(obj, archive_of):
    archive = archive_of(obj)
    (name,) = archive
    assert archive[name].tolist() == [1.0, 1.0]


# ---- Tensors ----


@ACCESS
@pytest.mark.parametrize("dtype", PLAIN_DTYPES, ids=str)
def test_tensors_of_every_dtype(dtype, mmap, archive_of):
    tensor = filled((4, 6), dtype)
    state = {"whole": tensor, "view": tensor[1:, ::2].t(), "apart": filled((3,), dtype, seed=1)}
    archive = archive_of(state, mmap=mmap)
    assert archive.is_mapped == mmap
    assert_same(dict(archive), state)
    assert_same(archive.get_slice("whole")[1:, 2], tensor[1:, 2])


@ACCESS
def test_tensors_of_every_kind(mmap, archive_of):
    z = torch.tensor([1 + 2j, 3 - 4j])
    state = {
        "parameter": nn.Parameter(torch.rand(3)),
        "frozen": nn.Parameter(torch.rand(3), requires_grad=False),
        "leaf": torch.rand(3, requires_grad=True),
        "conj": z.conj(),
        "neg": z.conj().imag,
        "meta": torch.empty(3, 4, device="meta").t(),
        "empty": torch.empty(0, 3),
        "0-dim": torch.tensor(1.5),
        "expanded": torch.tensor(1.5).expand(3, 4),
    }
    archive = archive_of(state, mmap=mmap)
    assert_same(dict(archive), state)
    assert archive.get_slice("meta")[1:, 0].shape == (3,)
    assert archive.get_slice("meta")[1:, 0].is_meta
    assert_same(archive.get_slice("conj")[1:], state["conj"][1:])
    assert_same(archive.get_slice("neg")[1:], state["neg"][1:])
    assert_same(archive.get_slice("expanded")[1:, 2], state["expanded"][1:, 2])


@ACCESS
def test_tensors_that_shared_a_storage_share_it_again(mmap, archive_of):
    base = torch.arange(100)
    archive = archive_of({"base": base, "view": base[10:20], "other": torch.ones(2)}, mmap=mmap)
    view, whole = archive["view"], archive["base"]
    part = archive.get_slice("base")[12:30:3]
    assert shares_storage(whole, view, part)
    part.fill_(-1)
    assert view[2] == whole[12] == -1


@ACCESS
def test_edits_do_not_reach_the_file(mmap, archive_of, path):
    archive = archive_of(small_state(), mmap=mmap)
    before = path.read_bytes()
    archive["weight"].zero_()
    archive.get_slice("weight")[1].zero_()
    assert path.read_bytes() == before
    with fastsd.open(path, mmap=mmap) as other:
        assert_same(other["weight"], small_state()["weight"])
    archive.verify()


@ACCESS
def test_tensors_outlive_the_archive_and_the_file(mmap, archive_of, path):
    archive = archive_of(small_state(), mmap=mmap)
    tensor, part = archive["weight"], archive.get_slice("weight")[1:]
    archive.close()
    path.unlink()
    del archive
    gc.collect()
    assert_same(tensor, small_state()["weight"])
    assert_same(part, small_state()["weight"][1:])


@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
def test_tensors_go_to_the_device(device, archive_of):
    archive = archive_of(small_state(), device=device)
    assert archive["weight"].is_meta
    assert archive["weight"].shape == (3, 4)
    assert archive.get_slice("weight")[0].is_meta


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_tensors_go_to_a_gpu(archive_of):
    archive = archive_of(small_state(), device="cuda:0")
    assert archive["weight"].is_cuda
    assert_same(archive.get_slice("weight")[1:, 2].cpu(), small_state()["weight"][1:, 2].clone())


@ACCESS
def test_an_archive_serves_several_threads(mmap, archive_of):
    state = {f"t{i}": filled((1000, 50), torch.int16, seed=i) for i in range(20)}
    state["view"] = state["t0"][5:10]
    archive = archive_of(state, mmap=mmap)
    barrier = threading.Barrier(8)

    def read_all(_):
        barrier.wait()
        return dict(archive), {name: archive.get_slice(name)[2:9, ::3] for name in archive}

    with ThreadPoolExecutor(8) as pool:
        for whole, parts in pool.map(read_all, range(8)):
            assert_same(whole, state)
            assert {n: raw(t) for n, t in parts.items()} == {
                n: raw(t[2:9, ::3]) for n, t in state.items()
            }


# ---- Slices ----


def outcome(call):
    """What a call returns, or the kind of its error."""
    try:
        return call()
    except Exception as error:
        return type(error)


INDICES = [
    ...,
    (),
    0,
    -1,
    4,
    5,
    -6,
    None,
    slice(None),
    slice(1, 3),
    slice(None, None, 2),
    slice(-2, None),
    slice(3, 1),
    slice(100, 200),
    slice(None, None, -1),
    slice(None, None, 0),
    (1, 2),
    (1, 2, 3),
    (1, 2, 3, 0),
    (..., 2),
    (1, ...),
    (..., None, 1),
    (None, slice(2), None, ..., 0),
    (..., ...),
    (slice(None), slice(None, None, 3), slice(1, None, 2)),
    (slice(0), 1),
    np.int64(2),
    (np.int32(1), slice(np.int64(1), None)),
    "name",
    1.5,
    (1, "name"),
]
SHAPED = {
    "contiguous": filled((5, 4, 6), torch.int32),
    "transposed": filled((6, 4, 5), torch.int32).permute(2, 1, 0),
    "stepped": filled((10, 4, 12), torch.int32)[::2, :, ::2],
    "expanded": filled((5, 1, 6), torch.int32).expand(5, 4, 6),
    "overlapping": filled((40,), torch.int32).as_strided((5, 4, 6), (3, 2, 1)),
}


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    """The same shapes, alone and sharing a storage, mapped and read."""
    path = tmp_path_factory.mktemp("shaped") / "x.fsd"
    shared = {f"shared {name}": tensor[...] for name, tensor in SHAPED.items()}
    fastsd.save(SHAPED | shared, path)
    with fastsd.open(path, mmap=True) as mapped, fastsd.open(path, mmap=False) as read:
        yield [mapped, read]


@pytest.mark.parametrize("name", SHAPED)
@pytest.mark.parametrize("index", INDICES, ids=repr)
def test_basic_indices_mean_what_they_mean_to_torch(index, name, shaped):
    wanted = outcome(lambda: SHAPED[name][index])
    for archive in shaped:
        for stored in (name, f"shared {name}"):
            part = outcome(lambda s=stored, a=archive: a.get_slice(s)[index])
            assert_same(part, wanted)


@pytest.mark.parametrize(
    "index",
    [
        [0, 1],
        ([0], [1]),
        torch.tensor([0, 1]),
        torch.tensor([True, False, True, False, True]),
        np.array([0, 1]),
        True,
        (slice(None), [0, 2]),
        (..., torch.tensor([1])),
        [],
    ],
    ids=repr,
)
def test_advanced_indices_are_a_type_error(index, shaped):
    for archive in shaped:
        with pytest.raises(TypeError, match="slice takes integers"):
            archive.get_slice("contiguous")[index]


@st.composite
def tensors_and_indices(draw):
    shape = draw(npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    tensor = filled(shape, draw(st.sampled_from([torch.uint8, torch.float32, torch.complex128])))
    tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
    index = draw(
        st.one_of(
            npst.basic_indices(tuple(tensor.shape), allow_newaxis=True, max_dims=6),
            st.tuples(*(st.slices(max(side, 1)) for side in tensor.shape)),
        )
    )
    return tensor, index


@given(tensors_and_indices(), st.booleans(), st.booleans())
def test_any_slice_of_any_tensor(tensor_and_index, mmap, is_shared):
    tensor, index = tensor_and_index
    file = io.BytesIO()
    fastsd.save({"t": tensor} | ({"again": tensor[...]} if is_shared else {}), file)
    file.seek(0)
    with fastsd.open(file, mmap=mmap) as archive:
        assert_same(outcome(lambda: archive.get_slice("t")[index]), outcome(lambda: tensor[index]))


def test_slices_are_those_of_safetensors(path, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    state = {name: tensor.contiguous() for name, tensor in small_state().items()}
    fastsd.save(state, path)
    safetensors.save_file(state, tmp_path / "x.safetensors")
    with (
        fastsd.open(path) as archive,
        safetensors.safe_open(tmp_path / "x.safetensors", "pt") as other,
    ):
        assert sorted(archive.keys()) == sorted(other.keys())
        for name in archive:
            found, wanted = archive.get_slice(name), other.get_slice(name)
            assert found.get_shape() == wanted.get_shape()
            assert_same(archive[name], other.get_tensor(name))
        found, wanted = archive.get_slice("weight"), other.get_slice("weight")
        for index in (slice(1, 3), (slice(None), 2), (..., slice(1, None)), 0, (-1, -1)):
            assert raw(found[index]) == raw(wanted[index])


def test_a_slice_of_a_mapped_file_is_a_view_of_it(archive_of, path):
    table = filled((1000, 1000), torch.float32)
    archive = archive_of({"table": table}, mmap=True)
    part = archive.get_slice("table")[100:300, ::2]
    assert_same(part, table[100:300, ::2])
    with open("/proc/self/maps") as maps:
        (line,) = (line for line in maps if line.endswith(f"{path}\n"))
    begin, end = (int(place, 16) for place in line.split()[0].split("-"))
    assert begin <= part.data_ptr() < end


def test_a_slice_of_a_file_that_is_read_takes_only_its_part(archive_of):
    table = filled((1000, 1000), torch.float32)
    archive = archive_of({"table": table}, mmap=False)
    part = archive.get_slice("table")[100:300]
    assert_same(part, table[100:300])
    assert part.untyped_storage().nbytes() == 200 * 1000 * 4
    assert archive.get_slice("table")[7, 7].untyped_storage().nbytes() == 4
    assert archive.get_slice("table")[5:5].untyped_storage().nbytes() == 0


def test_what_a_slice_knows_without_reading(archive_of):
    part = archive_of(small_state()).get_slice("weight")
    assert isinstance(part, fastsd.TensorSlice)
    assert part.shape == torch.Size([3, 4])
    assert part.dtype == torch.float32
    assert part.get_shape() == [3, 4]


# ---- Looking without reading ----


def test_info(archive_of, path):
    base = torch.arange(100, dtype=torch.int16)
    state = {
        "table": base.view(10, 10)[2:, 1::2],
        "item": base[99],
        "parameter": nn.Parameter(torch.ones(3)),
        "meta": torch.empty(2, 3, device="meta", dtype=torch.float64),
    }
    archive = archive_of(state)
    info = archive.info("table")
    assert isinstance(info, fastsd.TensorInfo)
    assert (info.name, info.dtype, info.shape) == ("table", torch.int16, torch.Size([8, 5]))
    assert (info.stride, info.nbytes, info.requires_grad) == ((10, 2), 80, False)
    assert (info.device, info.storage_offset) == ("cpu", 0)
    assert info.storage_nbytes == (100 - 21) * 2
    stored = path.read_bytes()[info.file_offset :][: info.storage_nbytes]
    assert fastsd._core.crc32c(stored) == info.crc32c
    item = archive.info("item")
    assert (item.storage, item.file_offset) == (info.storage, info.file_offset)
    assert (item.shape, item.storage_offset) == (torch.Size([]), 78)
    parameter = archive.info("parameter")
    assert parameter.requires_grad
    assert parameter.storage != info.storage
    meta = archive.info("meta")
    assert (meta.nbytes, meta.device, meta.crc32c) == (48, "meta", None)


def test_places_in_the_file_are_aligned(archive_of):
    archive = archive_of({f"t{i}": torch.ones(i, dtype=torch.uint8) for i in range(1, 50)})
    offsets = [archive.info(name).file_offset for name in archive]
    assert offsets[0] % 4096 == 0
    assert all(offset % 256 == 0 for offset in offsets)
    assert offsets == sorted(set(offsets))


def test_metadata_is_a_copy(archive_of, path):
    fastsd.save(small_state(), path, metadata={"a": "b"})
    with fastsd.open(path) as archive:
        archive.metadata["a"] = "c"
        assert archive.metadata == {"a": "b"}


# ---- Verification ----


def test_verification_says_how_much_it_has_read(archive_of):
    base = torch.arange(100)
    state = {"base": base, "view": base[5:], "other": torch.ones(3), "none": torch.empty(0)}
    report = archive_of(state).verify()
    assert report == fastsd.Verification(checked_nbytes=800 + 12, unchecked=())


def test_verification_names_what_has_no_checksum(path):
    fastsd.save(small_state() | {"m": torch.empty(2, device="meta")}, path, checksum=False)
    with fastsd.open(path) as archive:
        report = archive.verify()
    assert report.checked_nbytes == 0
    assert report.unchecked == ("weight", "bias", "half", "steps", "mask")


@ACCESS
def test_a_damaged_byte_is_found_and_the_tensors_are_named(mmap, path):
    base = torch.arange(1000)
    state = {"first": torch.ones(3), "whole": base, "view": base[10:20], "last": torch.ones(3)}
    fastsd.save(state, path)
    with fastsd.open(path, mmap=mmap) as archive:
        info = archive.info("whole")
        data = bytearray(path.read_bytes())
        data[info.file_offset + 5000] ^= 4
        with open(path, "r+b") as file:
            file.write(data)
        with pytest.raises(fastsd.ChecksumError, match='"whole", "view"') as caught:
            archive.verify()
        assert caught.value.tensors == ("whole", "view")
        assert caught.value.path == str(path)
    with pytest.raises(fastsd.ChecksumError):
        fastsd.load(path, mmap=mmap, verify="checksums")
    assert fastsd.load(path, mmap=mmap)["first"].tolist() == [1.0] * 3


# ---- Closing ----


def test_a_closed_archive_refuses_to_read(archive_of):
    archive = archive_of(small_state())
    part = archive.get_slice("weight")
    archive.close()
    archive.close()
    for ask in (
        lambda: archive["weight"],
        lambda: archive.info("weight"),
        lambda: archive.get_slice("weight"),
        lambda: part[0],
        lambda: archive.is_mapped,
        archive.verify,
    ):
        with pytest.raises(ValueError, match="closed"):
            ask()


def test_leaving_the_context_closes(path):
    fastsd.save(small_state(), path)
    with fastsd.open(path) as archive:
        assert_same(archive["weight"], small_state()["weight"])
    with pytest.raises(ValueError, match="closed"):
        archive["weight"]
