"""save(format="pth"): what torch.save writes, byte for byte, for torch.load and for zip readers."""

import io
import mmap
import os
import warnings
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from same import assert_same, filled, small_state

import fastsd
from fastsd import pickled
from fastsd.saving import make_plan

BIG = filled((3 << 20,), torch.uint8)  # more than a window

OBJECTS = {
    "flat": small_state(),
    "nested": {"model": small_state(), "step": 3, "betas": (0.9, 0.99), "none": None},
    "a number": 5,
    "an empty tensor": torch.empty(0),
    "empty ones first": [torch.empty(0), torch.empty(0), torch.ones(2)],
    "empty ones last": [torch.ones(2), torch.empty(0), torch.empty(0)],
    "empty ones between": [torch.ones(2), torch.empty(0), torch.empty(0), torch.ones(3)],
    "views": {"all": BIG, "part": BIG[5:10], "again": BIG},
    "of several windows": [filled((700_001 * i,), torch.uint8) for i in range(9)],
    "many": [torch.full((i % 50,), i) for i in range(500)],
    "a module": torch.nn.Linear(3, 4),
    "sparse": torch.eye(5).to_sparse(),
    "meta": torch.ones(3, device="meta"),
}


def without_id(data):
    """The bytes of a file without those that tell it from others; fails if it is no sound one."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    assert archive.testzip() is None
    last = archive.infolist()[-1]
    assert last.filename.endswith("/.data/serialization_id")
    number = archive.read(last)
    assert len(number) == 40
    assert number.isdigit()
    assert data.count(number) == 1
    crc = last.CRC.to_bytes(4, "little")
    return data.replace(number, b"#" * 40).replace(crc, b"CRC#")


def saved_by(save, obj, target, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of what is experimental
        save(obj, target, **options)
    return target.getvalue() if isinstance(target, io.BytesIO) else target.read_bytes()


@pytest.mark.parametrize("obj", OBJECTS.values(), ids=OBJECTS)
@pytest.mark.parametrize("name", ["x.pth", "no_suffix", "a.b.ckpt", "é.pth"])
def test_a_file_is_that_of_torch(obj, name, tmp_path):
    found = saved_by(fastsd.save, obj, tmp_path / name, format="pth")
    assert without_id(found) == without_id(saved_by(torch.save, obj, tmp_path / name))


@pytest.mark.parametrize("obj", OBJECTS.values(), ids=OBJECTS)
def test_a_stream_is_that_of_torch(obj):
    found = saved_by(fastsd.save, obj, io.BytesIO(), format="pth")
    assert without_id(found) == without_id(saved_by(torch.save, obj, io.BytesIO()))
    again = saved_by(fastsd.save, obj, io.BytesIO(), format="pth")
    if not isinstance(obj, torch.nn.Module):
        assert found == again


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 300_000), max_size=30), data=st.data())
def test_records_of_any_size_are_those_of_torch(sizes, data):
    obj = {data.draw(st.text(max_size=20)): torch.empty(n, dtype=torch.uint8) for n in sizes}
    found = saved_by(fastsd.save, obj, io.BytesIO(), format="pth")
    assert without_id(found) == without_id(saved_by(torch.save, obj, io.BytesIO()))


@pytest.mark.parametrize("how", [{"mmap": True}, {"weights_only": True}, {"map_location": "meta"}])
def test_torch_loads_it(how, tmp_path):
    fastsd.save(small_state(), tmp_path / "x.pth", format="pth")
    torch.save(small_state(), tmp_path / "y.pth")
    assert_same(torch.load(tmp_path / "x.pth", **how), torch.load(tmp_path / "y.pth", **how))


def test_storages_lie_at_multiples_of_64_bytes(tmp_path):
    path = tmp_path / "x.pth"
    fastsd.save([torch.full((i,), i) for i in range(100)], path, format="pth")
    reader = torch._C.PyTorchFileReader(str(path))
    offsets = [reader.get_record_offset(f"data/{i}") for i in range(100)]
    assert all(offset % 64 == 0 for offset in offsets)
    assert offsets == sorted(set(offsets))


@pytest.mark.parametrize("align_bytes", [64, 4096])
def test_torchs_own_alignment_is_kept(align_bytes):
    config = pytest.importorskip("torch.utils.serialization").config
    with config.patch({"save.storage_alignment": align_bytes}):
        found = saved_by(fastsd.save, OBJECTS["views"], io.BytesIO(), format="pth")
        wanted = saved_by(torch.save, OBJECTS["views"], io.BytesIO())
    assert without_id(found) == without_id(wanted)


def test_the_byte_order_comes_last_where_torch_has_it_there():
    def save(obj, f, **options):
        return torch.save(obj, f, _disable_byteorder_record=True)

    how = {"format": "pth", "_disable_byteorder_record": True}
    found = saved_by(fastsd.save, OBJECTS["flat"], io.BytesIO(), **how)
    assert without_id(found) == without_id(saved_by(save, OBJECTS["flat"], io.BytesIO()))


def test_different_contents_have_different_ids():
    files = [saved_by(fastsd.save, torch.tensor([i]), io.BytesIO(), format="pth") for i in (1, 2)]
    ids = [
        zipfile.ZipFile(io.BytesIO(data)).read("archive/.data/serialization_id") for data in files
    ]
    assert ids[0] != ids[1]


def test_durable_files_are_the_same(tmp_path):
    obj = [filled((n,), torch.uint8) for n in (100, 0, 9 << 20, 5, 24 << 20, 12345, 1 << 20)]
    saved = [
        saved_by(fastsd.save, obj, tmp_path / "x.pth", format="pth", durable=durable)
        for durable in (False, True)
    ]
    assert saved[0] == saved[1]
    assert without_id(saved[0])


def test_a_stream_and_its_storages_are_laid_out_without_unpickling(tmp_path):
    parts = pickled.dump(OBJECTS["nested"], None, None)
    plan = pickled.plan_zip(pickled.wrap_stream(parts.stream), parts.storages, "x")
    plan.write(os.fsencode(tmp_path / "x.pth"), False, True).commit(False)
    found = (tmp_path / "x.pth").read_bytes()
    wanted = saved_by(torch.save, OBJECTS["nested"], tmp_path / "x.pth")
    assert without_id(found) == without_id(wanted)


# ---- More than 32 bits can say ----


class PlanFile(io.RawIOBase):
    """The file of a plan, of which only what is read is made."""

    def __init__(self, plan):
        self.plan = plan
        self.at = 0
        plan.prepare(True)

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=os.SEEK_SET):
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.plan.file_bytes}[whence]
        self.at = base + offset
        return self.at

    def tell(self):
        return self.at

    def readinto(self, target):
        n = max(0, min(len(target), self.plan.file_bytes - self.at))
        self.plan.gather(self.at, memoryview(target)[:n])
        self.at += n
        return n


@pytest.mark.slow
def test_storages_of_more_than_4_gib():
    zeros = mmap.mmap(-1, (4 << 30) + 7)  # which take no memory as long as they are only read
    zeros.madvise(mmap.MADV_HUGEPAGE)
    large = torch.frombuffer(zeros, dtype=torch.uint8)
    plan = make_plan([torch.ones(3), large, torch.ones(5)], "pth", None)
    file = PlanFile(plan)
    archive = zipfile.ZipFile(file)
    infos = {info.filename: info for info in archive.infolist()}
    assert infos["archive/data/1"].file_size == (4 << 30) + 7
    assert infos["archive/data/2"].header_offset > 4 << 30
    assert archive.read("archive/data/2") == torch.ones(5).numpy().tobytes()
    assert archive.read("archive/version") == b"3\n"
    file.seek(0)
    reader = torch._C.PyTorchFileReader(file)
    assert reader.get_record_offset("data/2") % 64 == 0
    assert reader.get_record("data/2") == torch.ones(5).numpy().tobytes()


def test_more_than_65535_records(tmp_path):
    path = tmp_path / "x.pth"
    count = 66_000
    storage = torch.ones(1).untyped_storage()
    parts = pickled.dump(torch.ones(1), None, None)
    storages = {str(i): storage for i in range(count)}
    pickled.plan_zip(parts.records, storages, "x").write(os.fsencode(path), False, True).commit(
        False
    )
    archive = zipfile.ZipFile(path)
    assert len(archive.namelist()) == count + len(parts.records) + 2
    assert archive.read("x/data/65999") == bytes(storage)
    assert_same(torch.load(path), torch.ones(1))


# ---- What is refused ----


def test_metadata_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'pth' has no place for metadata"):
        fastsd.save({}, tmp_path / "x.pth", format="pth", metadata={"a": "b"})
    assert os.listdir(tmp_path) == []


def test_what_torch_refuses_is_refused_alike(tmp_path):
    shared = torch.arange(4, dtype=torch.int32)
    obj = [shared, shared.view(torch.float32)]
    with pytest.raises(RuntimeError, match="view the same data as different types"):
        fastsd.save(obj, tmp_path / "x.pth", format="pth")
    assert os.listdir(tmp_path) == []
