"""Zip files made to do harm: each a clear error, quickly, with nothing inflated or executed."""

import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from same import assert_same, small_state
from torch_files import damage, find_record, find_records, save, unzip, zipped

import fastsd
from fastsd import FastsdError, FormatError, TruncatedError, UnsupportedError

STATE = {"a": torch.arange(100.0), "b": torch.ones(300, dtype=torch.int16)}
DATA = save(STATE)
PLAIN = zipped(unzip(DATA))  # with sizes before the data, where torch puts them behind
TOP = 2**32 - 1


def change(data, at, code, *values):
    changed = bytearray(data)
    struct.pack_into(code, changed, at, *values)
    return bytes(changed)


def both(data, name, places, code, value):
    """A record with a field changed in the directory and in its own header."""
    record = find_record(data, name)
    return change(
        change(data, record.central + places[0], code, value), record.local + places[1], code, value
    )


def compressed(records=None):
    return zipped(records or unzip(DATA), method=zipfile.ZIP_DEFLATED)


def bomb():
    """Ten thousand times larger inside: a tensor of 100 MB."""
    return compressed({**unzip(DATA), "data/0": bytes(100 << 20)})


def nested_bomb():
    """Zip files in a zip file, of which each holds others."""
    inner = bytes(1 << 20)
    for _ in range(5):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for i in range(16):
                archive.writestr(f"{i}.zip", inner)
        inner = file.getvalue()
    return inner


def overlapping():
    """Two records that say they are at the same place."""
    first, second = find_record(DATA, "data/0"), find_record(DATA, "data/1")
    return change(DATA, second.central + 42, "<I", first.local)


def quoted_overlap():
    """A record that reaches into the next one, as in overlapping bombs."""
    record = find_record(DATA, "data/0")
    changed = both(DATA, "data/0", (20, 18), "<I", record.nbytes + 700)
    return both(changed, "data/0", (24, 22), "<I", record.nbytes + 700)


def with_name(data, old, new):
    assert len(old) == len(new)
    return data.replace(old.encode(), new.encode())


def disks():
    end = DATA.rfind(b"PK\5\6")
    return change(DATA, end + 4, "<HH", 1, 1)


def end_field(offset, code, *values):
    return change(DATA, DATA.rfind(b"PK\5\6") + offset, code, *values)


def zipped_some(name):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for each, data in unzip(DATA).items():
            kind = zipfile.ZIP_DEFLATED if each == name else zipfile.ZIP_STORED
            archive.writestr(f"archive/{each}", data, kind)
    return file.getvalue()


def two_folders():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for folder in "ab":
            for name, data in unzip(DATA).items():
                archive.writestr(f"{folder}/{name}", data)
    return file.getvalue()


HOSTILE = {
    "a compressed storage": (
        lambda: zipped_some("data/0"),
        UnsupportedError,
        "`archive/data/0` is compressed",
    ),
    "a compressed pickle": (
        lambda: zipped_some("data.pkl"),
        UnsupportedError,
        "`archive/data.pkl` is compressed",
    ),
    "a bomb": (bomb, UnsupportedError, "is compressed"),
    "bombs in bombs": (nested_bomb, FormatError, "has no data.pkl"),
    "a bomb as a pickle": (
        lambda: compressed({"data.pkl": bytes(50 << 20)}),
        UnsupportedError,
        "is compressed",
    ),
    "an encrypted record": (lambda: zipped(unzip(DATA), flags=1), UnsupportedError, "is encrypted"),
    "another method": (
        lambda: both(DATA, "data/0", (10, 8), "<H", 99),
        UnsupportedError,
        "is compressed",
    ),
    "two records at one place": (overlapping, FormatError, "data/[01]"),
    "a record that reaches into the next": (
        quoted_overlap,
        FormatError,
        "does not fit before byte",
    ),
    "a huge record": (
        lambda: both(
            both(DATA, "data/0", (20, 18), "<I", TOP - 1), "data/0", (24, 22), "<I", TOP - 1
        ),
        FormatError,
        "does not fit before",
    ),
    "a size that is said to be elsewhere, and is not": (
        lambda: both(both(DATA, "data/0", (20, 18), "<I", TOP), "data/0", (24, 22), "<I", TOP),
        FormatError,
        "lacks the 64-bit sizes",
    ),
    "sizes that differ": (
        lambda: both(DATA, "data/0", (24, 22), "<I", TOP - 1),
        FormatError,
        "is not compressed and takes",
    ),
    "a header that says something else": (
        lambda: change(PLAIN, find_record(PLAIN, "data/0").local + 18, "<I", 1),
        FormatError,
        "contradicts the zip directory",
    ),
    "a header with another name": (
        lambda: damage(DATA, find_record(DATA, "data/0").local + 34),
        FormatError,
        "is not that of",
    ),
    "no header where there should be one": (
        lambda: damage(DATA, find_record(DATA, "data/0").local),
        FormatError,
        "is not that of",
    ),
    "a record beyond the file": (
        lambda: change(DATA, find_record(DATA, "data/0").central + 42, "<I", TOP - 1),
        FormatError,
        "does not fit",
    ),
    "a record in the directory": (
        lambda: change(DATA, find_record(DATA, "data/0").central + 42, "<I", len(DATA) - 60),
        FormatError,
        "does not fit",
    ),
    "the same name twice": (
        lambda: with_name(zipped({**unzip(DATA), "data/2": b""}), "data/2", "data/1"),
        FormatError,
        "two zip records are named",
    ),
    "two pickles": (
        two_folders,
        FormatError,
        "two records data.pkl, in different folders",
    ),
    "no pickle": (lambda: zipped({"data/0": b"1234"}), FormatError, "has no data.pkl"),
    "nothing at all": (lambda: b"PK\5\6" + bytes(18), FormatError, None),
    "one of several disks": (disks, UnsupportedError, "one of several that belong together"),
    "more records than there are": (lambda: end_field(8, "<HH", 60, 60), FormatError, "records"),
    "a directory that starts elsewhere": (
        lambda: end_field(16, "<I", 5),
        FormatError,
        "zip directory.* 5",
    ),
    "a directory of another size": (
        lambda: end_field(12, "<I", 5),
        FormatError,
        "zip directory.* 5",
    ),
    "a comment that is longer": (
        lambda: end_field(20, "<H", 5),
        FormatError,
        "comment has 5 bytes; 0 follow",
    ),
    "something behind": (lambda: DATA + b"x", FormatError, "comment has 0 bytes; 1 follow"),
    "a version of the future": (
        lambda: zipped({**unzip(DATA), "version": b"99"}),
        fastsd.VersionError,
        "has version 99",
    ),
    "a version that is no number": (
        lambda: zipped({**unzip(DATA), "version": b"x"}),
        FormatError,
        "version .* is no number",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name, path):
    make, kind, message = HOSTILE[name]
    data = make()
    path.write_bytes(data)
    for call in (
        fastsd.load,
        fastsd.open,
        lambda f: fastsd.load(f, mmap=False, weights_only=False),
    ):
        with pytest.raises(kind, match=message) as caught:
            call(path)
        assert caught.value.path == str(path)
        assert len(caught.value.detail) < 500
    with pytest.raises(kind, match=message):
        fastsd.load(io.BytesIO(data))


def test_the_good_file_is_good():
    assert_same(fastsd.load(io.BytesIO(DATA)), STATE)
    assert_same(fastsd.load(io.BytesIO(zipped(unzip(DATA)))), STATE)


def test_names_that_are_paths_go_nowhere(path):
    records = {**unzip(DATA), "../../outside": b"x", "data/../../x": b"y", "/etc/x": b"z"}
    path.write_bytes(zipped(records))
    assert_same(fastsd.load(path), STATE)
    assert os.listdir(path.parent) == [path.name]


def test_what_is_claimed_takes_no_memory(tmp_path):
    """Of claims and bombs nothing is allocated: in a process that may take little."""
    for name, (make, _, _) in HOSTILE.items():
        (tmp_path / name).write_bytes(make())
    header = b'{"x":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (2**50, 2**50)
    (tmp_path / "claim").write_bytes(struct.pack("<Q", len(header)) + header)
    (tmp_path / "length").write_bytes(struct.pack("<Q", 99_999_999) + header)
    program = """
import os, resource, sys, fastsd
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for name in sorted(os.listdir(".")):
    try:
        fastsd.load(name)
    except fastsd.FastsdError:
        continue
    sys.exit(name)
print(peak() - before)
"""
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 8 << 10  # KiB


# ---- Cut short, or damaged ----


def files():
    state = {f"layer.{i}.weight": torch.full((10, 10), float(i)) for i in range(10)}
    safe = safetensors.torch.save(state)
    own = io.BytesIO()
    fastsd.save(state, own)
    return {"pth": save(state), "safetensors": safe, "fsd": own.getvalue()}


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("kind", files())
def test_files_cut_anywhere(kind, weights_only, path):
    data = files()[kind]
    for nbytes in range(1, len(data), 97):
        path.write_bytes(data[:nbytes])
        for mmap in (True, False):
            with pytest.raises(FormatError) as caught:
                fastsd.load(path, weights_only=weights_only, mmap=mmap)
            assert caught.value.path == str(path)
            assert isinstance(caught.value, TruncatedError) or nbytes < 9
        with pytest.raises(FormatError):
            fastsd.load(io.BytesIO(data[:nbytes]))


SMALL = save(small_state())
PLACES = sorted(
    {at for record in find_records(SMALL) for at in range(record.local, record.begin)}
    | set(range(find_records(SMALL)[0].central, len(SMALL)))
)


@given(st.lists(st.tuples(st.sampled_from(PLACES), st.integers(1, 255)), min_size=1, max_size=3))
def test_a_directory_that_was_changed_anywhere(changes):
    data = SMALL
    for at, bits in changes:
        data = damage(data, at, bits)
    try:
        found = fastsd.load(io.BytesIO(data))
    except FastsdError:
        return
    assert_same(found, small_state())


# ---- Nothing is executed ----


class Exploit:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_nothing_is_executed(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    for obj in (Exploit(), {"a": torch.ones(1), "b": Exploit()}, [Exploit()]):
        path.write_bytes(save(obj))
        for options in ({}, {"weights_only": True}, {"mmap": False}, {"select": "*"}):
            with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
                fastsd.load(path, **options)
        with pytest.raises(pickle.UnpicklingError):
            fastsd.load_into({}, path)
        with fastsd.open(path) as archive:
            dict(archive)
            archive.verify()
        assert fastsd.get_unsafe_globals_in_checkpoint(path) == [f"{os.name}.mkdir"]
    assert not os.path.exists("executed")
    fastsd.load(path, weights_only=False)
    assert os.path.exists("executed")  # on trust it is
