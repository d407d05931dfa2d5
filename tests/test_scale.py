"""Sizes that no test could fill: sparse files, long names, many dimensions, numbers beyond 32 bits
and beyond 53. What is opened costs what its header does; benchmarks/scale.py draws the curve."""

import io
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from same import assert_same
from test_bad_input import change
from test_format import Given, write

import fastsd

HERE = Path(__file__).parent
COUNT = 200_000
MEMORY_BYTES_MAX = 128 << 20  # about 400 bytes a tensor are needed
SCALE = HERE.parent / "benchmarks" / "scale.py"


def run(*args, **options):
    command = [sys.executable, "-W", "ignore", *map(str, args)]
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """100 GB with 200,000 tensors, of which only the header takes room."""
    path = tmp_path_factory.mktemp("scale") / "big.fsd"
    try:
        run(SCALE, "--write", path, COUNT)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the file system has no files of 100 GB: {error.stderr[-200:]}")
    yield path
    path.unlink()


def test_a_file_of_100_gb_opens_within_bounded_memory(big):
    assert big.stat().st_size > 99_000_000_000
    assert big.stat().st_blocks * 512 < 100 << 20
    measured = json.loads(run(SCALE, "--measure", big))
    assert measured["tensors"] == COUNT
    assert measured["memory_mib"] < MEMORY_BYTES_MAX >> 20


def test_any_part_of_it_is_read_alone(big):
    with fastsd.open(big) as archive:
        assert len(archive) == COUNT
        last = list(archive)[-1]
        info = archive.info(last)
        assert info.file_offset > 2**36
        assert info.file_offset + info.storage_nbytes == big.stat().st_size
        assert archive.get_slice(last)[-3:].tolist() == [0, 0, 0]
        assert not archive[last].any()
    with fastsd.open(big, mmap=False) as archive:
        assert archive.get_slice(last)[:2].tolist() == [0, 0]
    found = fastsd.load(big, select=[last])
    assert list(found) == [last]
    target = {last: torch.ones(info.shape)}
    fastsd.load_into(target, big, strict=False)
    assert not target[last].any()


# ---- Beyond 2^32 and 2^53 ----


def test_an_offset_beyond_32_bits_is_written_and_read(tmp_path):
    """A file of 4 GiB and a bit, most of which is a hole."""
    nbytes = (1 << 32) + 4096
    small = [
        Given(b"hole", "uint8", (256,), (1,), bytes(256)),
        Given(b"behind", "int64", (1,), (1,), b"\x2a" + bytes(7)),
    ]
    file = write(small)
    for record, number, field, value in (
        ("storage", 0, "bytes", nbytes),
        ("storage", 0, "flags", 0),
        ("storage", 0, "crc32c", 0),
        ("storage", 1, "offset", 4096 + nbytes),
        ("preamble", 0, "file_bytes", 4096 + nbytes + 8),
        ("dim", 0, "", nbytes),
    ):
        file = change(file, record, number, field, value)
    path = tmp_path / "x"
    with path.open("wb") as f:
        f.write(file[:4096])
        f.seek(4096 + nbytes)
        f.write(small[1].data)
    found = fastsd.load(path, mmap=True)
    assert found["behind"].tolist() == [42]
    assert found["hole"].shape == (nbytes,)
    with fastsd.open(path, mmap=False) as archive:
        assert archive["behind"].tolist() == [42]
        assert archive.get_slice("hole")[-2:].tolist() == [0, 0]
        assert archive.info("behind").file_offset == 4096 + nbytes


HUGE = [2**32, 2**32 + 1, 2**53, 2**53 + 1, 2**62 + 1, 2**63 - 1]


@pytest.mark.parametrize("size", HUGE)
def test_sizes_beyond_53_bits_are_kept(size, path):
    """Neither the tables nor JSON make floats of them."""
    obj = {
        "meta": torch.empty(size, dtype=torch.int8, device="meta"),
        "expanded": torch.tensor([1], dtype=torch.int8).expand(size),
        "stride": torch.empty(1, dtype=torch.int8).as_strided((1,), (size,)),
        "empty": torch.empty(size, 0, dtype=torch.int8),
        "values": [size, -size, torch.Size([size])],
    }
    fastsd.save(obj, path)
    for mmap in (True, False):
        found = fastsd.load(path, mmap=mmap)
        assert found["values"] == obj["values"]
        for name in ("meta", "expanded", "stride", "empty"):
            assert found[name].shape == obj[name].shape
            assert found[name].stride() == obj[name].stride()
    with fastsd.open(path) as archive:
        assert archive.info("meta").nbytes == size
        assert archive.info("expanded").shape == (size,)
        assert archive.get_slice("expanded")[size - 2 :].tolist() == [1, 1]


@pytest.mark.parametrize("size", HUGE[:-1])
def test_a_meta_tensor_starts_anywhere(size, path):
    whole = torch.empty(size + 1, dtype=torch.int8, device="meta")
    fastsd.save({"whole": whole, "last": whole[size:]}, path)
    found = fastsd.load(path)
    assert found["last"].storage_offset() in (0, size)
    assert found["last"].shape == (1,)


# ---- Names and dimensions ----


def test_names_of_64_kib(path):
    names = [f"{i:05d}".ljust(65536, "n") for i in range(50)] + ["é" * 32768, ""]
    fastsd.save({name: torch.tensor(i) for i, name in enumerate(names)}, path)
    found = fastsd.load(path, verify="checksums")
    assert list(found) == names
    assert [int(value) for value in found.values()] == list(range(len(names)))
    with fastsd.open(path) as archive:
        assert int(archive[names[-2]]) == len(names) - 2


def test_longer_names_are_kept_in_the_tree(path):
    state = {"n" * 65537: torch.ones(1), "m" * 10**6: torch.zeros(1)}
    fastsd.save(state, path)
    assert_same(fastsd.load(path), state)
    assert all(len(name) <= 65536 for name in fastsd.open(path))


@pytest.mark.parametrize("shape", [[1] * 64, [2] + [1] * 62 + [3], [1] * 32 + [0] + [1] * 31])
def test_64_dimensions(shape, path):
    obj = {"x": torch.arange(6.0).as_strided(shape, torch.empty(shape, device="meta").stride())}
    for format in ("fsd", "pth"):
        fastsd.save(obj, path, format=format)
        assert_same(fastsd.load(path), obj)
    assert fastsd.open(path)["x"].dim() == 64


def test_many_dictionaries_in_one_another_take_linear_memory():
    """A header of a million values, as of an optimizer of many parts."""
    obj = {"groups": [{"lr": 0.5, "betas": (0.9, 0.999), "n": i} for i in range(50_000)]}
    file = io.BytesIO()
    fastsd.save(obj, file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert fastsd.load(io.BytesIO(file.getvalue())) == obj
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < 100 * len(file.getvalue()) + (64 << 20)
