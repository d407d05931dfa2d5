"""What `f` may be: paths and file objects of every kind, to save to and to load from."""

import bz2
import gc
import gzip
import io
import json
import lzma
import mmap
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections import OrderedDict
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mapped import lies_in, mapped_ranges
from same import assert_same, filled, medium_state, raw, small_state

import fastsd
from fastsd import _core, files


def archive_of(obj, **options):
    file = io.BytesIO()
    fastsd.save(obj, file, **options)
    return file.getvalue()


SMALL = archive_of(small_state())
FILE_BYTES_AT = 24  # docs/FORMAT.md, "The preamble"
ALIGNED = 64  # archives that start at a multiple are mapped


def count_descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def leave_no_descriptor():
    before = count_descriptors()
    yield
    if count_descriptors() > before:
        gc.collect()  # of a traceback, or of an error's
        assert count_descriptors() <= before


def outcome(call):
    """The type of what a call raises; None if it does not."""
    try:
        call()
    except Exception as error:
        return type(error)
    return None


# ---- Objects of one's own ----


class OnlyWrite:
    """Takes at most `limit` bytes at a time."""

    def __init__(self, limit=None):
        self.data = bytearray()
        self.limit = limit

    def write(self, data):
        part = bytes(data)[: self.limit]
        self.data += part
        return len(part)


class OnlyRead:
    """Gives at most `limit` bytes at a time, as `give` makes them."""

    def __init__(self, data, limit=None, give=bytes):
        self.file = io.BytesIO(data)
        self.limit = limit
        self.give = give

    def read(self, count=-1):
        return self.give(self.file.read(count if self.limit is None else min(count, self.limit)))


class Seekable(OnlyRead):
    """As objects of remote file systems are: with read, seek and tell of their own."""

    def seek(self, *place):
        return self.file.seek(*place)

    def tell(self):
        return self.file.tell()


class Fillable(Seekable):
    """Has `readinto` too, of which `calls` tells."""

    calls = 0

    def readinto(self, target):
        self.calls += 1
        with memoryview(target)[: self.limit] as part:
            return self.file.readinto(part)


class WithoutResult(OnlyWrite):
    def write(self, data):
        super().write(data)

    def flush(self):
        pass


def opener(*mode):
    return lambda path: open(path, *mode)


# ---- What can be saved to ----


@contextmanager
def member_of_zip(path):
    with zipfile.ZipFile(path, "w") as archive, archive.open("member", "w") as file:
        yield file


def read_member(path):
    with zipfile.ZipFile(path) as archive:
        return archive.read("member")


def packed_by(module):
    def write(path):
        return module.open(path, "wb")

    def read(path):
        with module.open(path) as file:
            return file.read()

    return write, read


# For each: what to save to, and what is read from the path later.
WRITERS = {
    "buffered": (opener("wb"), Path.read_bytes),
    "raw": (opener("wb", 0), Path.read_bytes),
    "both ways": (opener("w+b"), Path.read_bytes),
    "appending": (opener("ab"), Path.read_bytes),
    "gzip": packed_by(gzip),
    "bz2": packed_by(bz2),
    "lzma": packed_by(lzma),
    "zip member": (member_of_zip, read_member),
}


@pytest.mark.parametrize("name", WRITERS)
def test_archives_are_written_as_torch_writes_its_own(name, path):
    make, read = WRITERS[name]
    for save in (torch.save, fastsd.save):
        path.unlink(missing_ok=True)
        with make(path) as file:
            save(small_state(), file)
            file.write(b"more")
        with closing(io.BytesIO()) as memory:
            save(small_state(), memory)
            content = memory.getvalue()
        written = read(path)
        assert written.endswith(b"more")
        assert len(written) == len(content) + 4
    assert written == SMALL + b"more"


def test_what_is_saved_can_be_read_at_once(path):
    """Without closing the file: as with torch, it has been flushed."""
    for save, load in ((torch.save, torch.load), (fastsd.save, fastsd.load)):
        with open(path, "wb") as file:
            save(small_state(), file)
            assert_same(load(path), small_state())


@pytest.mark.parametrize("save", [torch.save, fastsd.save])
def test_an_object_that_returns_nothing_has_written_all(save):
    target = WithoutResult()
    save(small_state(), target)
    load = torch.load if save is torch.save else fastsd.load
    assert_same(load(io.BytesIO(target.data)), small_state())


@pytest.mark.parametrize("limit", [None, 1000, 7])
def test_an_object_needs_only_write_and_may_take_a_part(limit):
    target = OnlyWrite(limit)
    fastsd.save(small_state(), target)
    assert bytes(target.data) == SMALL


def test_sockets_and_anonymous_memory_take_archives():
    one, other = socket.socketpair()
    with one, other, one.makefile("wb", 0) as target, other.makefile("rb") as source:
        writing = threading.Thread(target=fastsd.save, args=(medium_state(), target))
        writing.start()
        assert_same(fastsd.load(source), medium_state())
        writing.join()
    with mmap.mmap(-1, len(SMALL) + 10) as memory:
        fastsd.save(small_state(), memory)
        assert memory.tell() == len(SMALL)
        memory.seek(0)
        assert_same(fastsd.load(memory), small_state())
        assert memory.tell() == len(SMALL)


class Changed(OnlyWrite):
    """Returns `result` for what it is given; keeps what it was given, too."""

    def __init__(self, result):
        super().__init__()
        self.result = result
        self.kept = []

    def write(self, data):
        self.kept.append(data)
        return self.result(len(data))


@pytest.mark.parametrize("result", [lambda n: n + 1, lambda n: -1, lambda n: 0])
def test_an_impossible_count_is_an_error_and_no_endless_loop(result):
    with pytest.raises((ValueError, OSError), match="write"):
        fastsd.save(small_state(), Changed(result))


def test_memory_that_an_object_keeps_is_not_changed_behind_its_back():
    """The memory that `write` is given is used again: to look at it later is an error."""
    target = Changed(lambda n: n)
    fastsd.save(small_state(), target)
    for kept in target.kept:
        with pytest.raises(ValueError, match="released"):
            bytes(kept)


def test_a_full_pipe_that_does_not_block_is_an_error():
    source, target = os.pipe()
    os.set_blocking(target, False)
    with open(target, "wb", 0) as file, pytest.raises(BlockingIOError):
        fastsd.save(medium_state(), file)
    os.close(source)


def test_the_null_device_takes_everything():
    fastsd.save(medium_state(), os.devnull)
    with open(os.devnull, "wb") as file:
        fastsd.save(medium_state(), file)


def test_nothing_is_padded_before_an_archive(path):
    with open(path, "wb") as file:
        file.write(b"abc")
        fastsd.save(small_state(), file)
    assert path.read_bytes() == b"abc" + SMALL


# ---- What can be loaded from ----

BEHIND = b"what follows"


@contextmanager
def spooled(data, path):
    with tempfile.SpooledTemporaryFile() as file:
        file.write(data)
        file.seek(0)
        yield file
        assert not file._rolled  # to ask for a descriptor puts it on the disk


@contextmanager
def temporary(data, path):
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        yield file


@contextmanager
def piped(data, path):
    source, target = os.pipe()
    with open(source, "rb") as reader:
        with open(target, "wb") as writer:
            writer.write(data)
        yield reader


@contextmanager
def through_socket(data, path):
    one, other = socket.socketpair()
    with one, other, other.makefile("rb") as source:
        one.sendall(data)  # and stays open: whoever reads on waits for ever
        yield source


@contextmanager
def zipped(data, path, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("member", data)
    with zipfile.ZipFile(path) as archive, archive.open("member") as file:
        yield file


def in_file(open_it):
    def make(data, path):
        path.write_bytes(data)
        return open_it(path)

    return make


def unpacked_by(module):
    def make(data, path):
        with module.open(path, "wb") as file:
            file.write(data)
        return module.open(path, "rb")

    return make


@contextmanager
def mapped(data, path):
    path.write_bytes(data)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        yield memory


def of_memory(make):
    return lambda data, path: _as_context(make(data))


@contextmanager
def _as_context(value):
    yield value


READERS = {
    "buffered": in_file(opener("rb")),
    "raw": in_file(opener("rb", 0)),
    "both ways": in_file(opener("r+b")),
    "memory": of_memory(io.BytesIO),
    "buffered memory": of_memory(lambda data: io.BufferedReader(io.BytesIO(data))),
    "temporary": temporary,
    "spooled": spooled,
    "map": mapped,
    "gzip": unpacked_by(gzip),
    "bz2": unpacked_by(bz2),
    "lzma": unpacked_by(lzma),
    "zip member": zipped,
    "stored zip member": lambda data, path: zipped(data, path, zipfile.ZIP_STORED),
    "seekable": of_memory(Seekable),
    "fillable": of_memory(Fillable),
    "bytearrays": of_memory(lambda data: Seekable(data, give=bytearray)),
}
# These torch cannot load from.
MORE_READERS = {
    "memoryviews": of_memory(lambda data: Seekable(data, give=memoryview)),
    "a bit at a time": of_memory(lambda data: Seekable(data, limit=7)),
    "fillable a bit at a time": of_memory(lambda data: Fillable(data, limit=1000)),
    "only read": of_memory(OnlyRead),
    "only a bit at a time": of_memory(lambda data: OnlyRead(data, limit=777)),
    "pipe": piped,
    "socket": through_socket,
}
ALL_READERS = READERS | MORE_READERS


@pytest.mark.parametrize("name", READERS)
def test_archives_are_read_from_whatever_torch_reads_from(name, path):
    with closing(io.BytesIO()) as file:
        torch.save(small_state(), file)
        content = file.getvalue()
    with READERS[name](content, path) as file:
        wanted = torch.load(file)
    with READERS[name](SMALL, path) as file:
        assert_same(fastsd.load(file), wanted)


@pytest.mark.parametrize("name", MORE_READERS)
def test_torch_reads_less(name, path):
    """Or the list above is too short."""
    with closing(io.BytesIO()) as file:
        torch.save(small_state(), file)
        content = file.getvalue()
    with MORE_READERS[name](content, path) as file:
        assert outcome(lambda: torch.load(file)) is not None


@pytest.mark.parametrize("use_map", [None, True, False])
@pytest.mark.parametrize("name", ALL_READERS)
def test_just_the_archive_is_read_wherever_it_starts(name, use_map, path):
    for before in (b"", b"before", bytes(ALIGNED), bytes(4096)):
        with ALL_READERS[name](before + SMALL + BEHIND, path) as file:
            assert file.read(len(before)) == before or "bit at a time" in name
            while "bit at a time" in name and file.file.tell() < len(before):
                file.read(len(before) - file.file.tell())
            loaded = fastsd.load(file, mmap=use_map, verify="checksums")
            if hasattr(file, "tell") and name not in ("pipe", "socket"):
                assert file.tell() == len(before) + len(SMALL)
            assert file.read(3) == BEHIND[:3]
        assert_same(loaded, small_state())  # although the file is closed
        loaded["weight"].zero_()


@pytest.mark.parametrize("name", ALL_READERS)
def test_other_calls_take_all_of_them(name, path):
    for before in (b"", b"odd"):
        target = OrderedDict((k, torch.zeros_like(v)) for k, v in small_state().items())
        with ALL_READERS[name](before + SMALL, path) as file:
            file.read(len(before))
            fastsd.load_into(target, file)
        assert_same(target, small_state())
        with ALL_READERS[name](before + SMALL, path) as file:
            file.read(len(before))
            archive = fastsd.open(file)
        assert_same(OrderedDict(archive), small_state())
        assert archive.verify().unchecked == ()
        assert raw(archive.get_slice("weight")[1:, 2]) == raw(small_state()["weight"][1:, 2])


def test_tensors_of_an_open_stream_do_not_change_what_is_verified():
    archive = fastsd.open(io.BytesIO(archive_of(medium_state())))
    assert not archive.is_mapped
    archive["large0"].zero_()
    assert archive["large0"].any()
    archive.verify()


@pytest.mark.parametrize("mmap", [None, True, False])
def test_memory_files_stay_as_they_are(mmap):
    content = archive_of(medium_state())
    file = io.BytesIO(content)
    for tensor in fastsd.load(file, mmap=mmap).values():
        tensor.zero_()
    assert file.getvalue() == content
    file.seek(0)
    loaded = fastsd.load(file, mmap=mmap)
    file.seek(0)
    file.write(bytes(len(content)))  # no view of it is left that would forbid that
    file.truncate(10)
    assert_same(loaded, medium_state())


def test_readinto_is_used_where_there_is_one():
    file = Fillable(SMALL)
    fastsd.load(file)
    assert file.calls > 0


def test_a_pipe_may_deliver_in_its_own_time(tmp_path):
    content = archive_of(medium_state())
    source, target = os.pipe()

    def write():
        with open(target, "wb", 0) as file:
            file.write(content[:10])
            for begin in range(10, len(content), 1234567):
                file.write(content[begin : begin + 1234567])

    writing = threading.Thread(target=write)
    writing.start()
    with open(source, "rb", 0) as file:
        assert_same(fastsd.load(file), medium_state())
    writing.join()


def test_named_pipes(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(fastsd.UnsupportedError, match="not a regular file"):
        fastsd.load(fifo)
    with open(os.open(fifo, os.O_RDWR), "rb") as reader:  # or else opening it to write would wait
        fastsd.save(small_state(), fifo)
        assert_same(fastsd.load(reader), small_state())
    assert os.listdir(tmp_path) == ["fifo"]


def test_standard_input(path):
    path.write_bytes(b"x" + SMALL + SMALL)
    program = (
        "import sys, fastsd; f = sys.stdin.buffer; f.read(1);"
        "print(*fastsd.load(f)); print(*fastsd.load(f)); print(len(f.read()))"
    )
    wanted = (" ".join(small_state()) + "\n") * 2 + "0\n"
    command = [sys.executable, "-c", program]
    with open(path, "rb") as file:
        assert subprocess.check_output(command, stdin=file, text=True) == wanted
    found = subprocess.run(command, input=path.read_bytes(), stdout=subprocess.PIPE, check=True)
    assert found.stdout.decode() == wanted


# ---- What is mapped ----


@pytest.mark.parametrize("begin", [0, 1, 32, ALIGNED, 4095, 4096, 4096 + ALIGNED, 100001])
@pytest.mark.parametrize("buffering", [-1, 0])
def test_archives_in_real_files_are_mapped_where_that_is_aligned(begin, buffering, path):
    path.write_bytes(bytes(begin) + SMALL + BEHIND)
    with open(path, "rb", buffering) as file:
        file.seek(begin)
        loaded = fastsd.load(file)
        assert file.tell() == begin + len(SMALL)
        file.seek(begin)
        forced = fastsd.load(file, mmap=True)  # what cannot be mapped is read
        file.seek(begin)
        archive = fastsd.open(file)
        file.seek(begin)
        read = fastsd.load(file, mmap=False)
    is_mapped = begin % ALIGNED == 0
    assert archive.is_mapped == is_mapped
    ranges = mapped_ranges(path)
    assert lies_in(loaded["weight"], ranges) == lies_in(forced["weight"], ranges) == is_mapped
    assert not lies_in(read["weight"], ranges)
    assert all(tensor.data_ptr() % ALIGNED == 0 for tensor in (*loaded.values(), *read.values()))
    path.unlink()
    assert_same(loaded, small_state())
    del loaded, forced, archive
    gc.collect()
    assert mapped_ranges(path) == []


def test_a_file_that_may_be_written_to_is_mapped_on_request_only(path):
    """To save to it again would change the tensors."""
    with open(path, "w+b") as file:
        fastsd.save(small_state(), file)
        file.seek(0)
        loaded = fastsd.load(file)
        file.seek(0)
        requested = fastsd.load(file, mmap=True)
        assert not lies_in(loaded["weight"], mapped_ranges(path))
        assert lies_in(requested["weight"], mapped_ranges(path))
        file.seek(0)
        file.write(bytes(len(SMALL)))
        file.flush()
        assert_same(loaded, small_state())
        assert not requested["weight"].any()


def test_files_in_memory_file_systems_are_mapped():
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("there is no /dev/shm")
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as named:
        named.write(SMALL)
        named.flush()
        with open(named.name, "rb") as file:
            loaded = fastsd.load(file)
        assert lies_in(loaded["weight"], mapped_ranges(named.name))


class Lending:
    """Reads through `change`; whatever else is asked for, the file inside gives."""

    def __init__(self, file, change):
        self.inside = file
        self.change = change

    def read(self, count=-1):
        return self.change(self.inside.read(count))

    def __getattr__(self, name):
        return getattr(self.inside, name)


def test_what_read_gives_counts_and_not_whose_descriptor_is_lent(path):
    flip = bytes.maketrans(bytes(range(256)), bytes(range(255, -1, -1)))
    path.write_bytes(SMALL.translate(flip) + BEHIND)
    with open(path, "rb") as inside:
        file = Lending(inside, lambda data: data.translate(flip))
        assert_same(fastsd.load(file), small_state())
        assert inside.read() == BEHIND
    path.write_bytes(SMALL)
    with open(path, "rb") as inside:  # and it may be the same
        loaded = fastsd.load(Lending(inside, bytes))
    assert lies_in(loaded["weight"], mapped_ranges(path))


def test_archives_that_are_not_compressed_are_found_by_offsets_of_the_content(path):
    """A gzip file of level 0 holds the content as it is, but not where the object stands."""
    with gzip.open(path, "wb", 0) as file:
        file.write(SMALL + SMALL)
    with gzip.open(path) as file:
        assert_same(fastsd.load(file), small_state())
        assert_same(fastsd.load(file), small_state())
        assert file.read() == b""


# ---- Several archives in one file ----


@st.composite
def sequences(draw):
    """Archives and what lies before each."""
    sizes = st.integers(0, 300) | st.sampled_from([0, 64, 4096 - len(SMALL) % 4096])
    numbers = st.lists(st.integers(0, 200), max_size=4)
    parts = draw(st.lists(st.tuples(sizes, numbers), min_size=1, max_size=4))
    return [
        (b"\xa5" * size, [filled((n,), torch.int16, seed=n) for n in counts])
        for size, counts in parts
    ]


@given(sequences(), st.sampled_from(sorted(ALL_READERS)), st.sampled_from([None, True, False]))
def test_any_sequence_of_archives_comes_back(parts, name, use_map):
    content = b"".join(before + archive_of(tensors) for before, tensors in parts)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        with ALL_READERS[name](content, path) as file:
            begin = 0
            for before, tensors in parts:
                left = len(before)
                while left:
                    left -= len(file.read(left))
                begin += len(before)
                loaded = fastsd.load(file, mmap=use_map, verify="checksums")
                assert_same(loaded, tensors)
                assert all(tensor.data_ptr() % ALIGNED == 0 for tensor in loaded if len(tensor))
                begin += len(archive_of(tensors))
                if isinstance(file, (io.BytesIO, io.FileIO)):
                    assert file.tell() == begin
            if name != "socket":
                with pytest.raises(fastsd.EmptyError):
                    fastsd.load(file)


@pytest.mark.parametrize(
    "make", [io.BytesIO, tempfile.TemporaryFile, tempfile.SpooledTemporaryFile]
)
def test_several_archives_may_be_saved_to_one_file(make):
    objects = [small_state(), [1, 2], medium_state(), {}, torch.ones(3)]
    with make() as file:
        file.write(b"before")
        for obj in objects:
            fastsd.save(obj, file)
            file.write(b"between")
        file.seek(0)
        assert file.read(6) == b"before"
        for obj in objects:
            assert_same(fastsd.load(file), obj)
            assert file.read(7) == b"between"


@pytest.mark.parametrize("name", ALL_READERS)
def test_pickled_objects_and_parts_of_archives_come_from_all_of_them_too(name, path):
    pickled, state = torch.eye(3).to_sparse(), small_state()
    content = archive_of(pickled) + archive_of(state) + archive_of(state)
    with ALL_READERS[name](content, path) as file:
        assert torch.equal(fastsd.load(file).to_dense(), torch.eye(3))
        assert_same(fastsd.load(file, select="bias"), OrderedDict(bias=state["bias"]))
        assert_same(fastsd.load(file), state)


def test_the_end_of_a_file_is_an_end_of_file_error():
    """As torch.load has it, and as loops that read several objects expect."""
    for save, load, options in (
        (torch.save, torch.load, {"_use_new_zipfile_serialization": False}),
        (fastsd.save, fastsd.load, {}),
    ):
        file = io.BytesIO()
        for number in range(3):
            save(torch.tensor(number), file, **options)
        file.seek(0)
        assert [int(load(file)) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(EOFError):
            load(file)


def test_an_empty_file_is_an_end_of_file_error(path):
    path.touch()
    assert outcome(lambda: torch.load(path)) is EOFError
    with pytest.raises(fastsd.EmptyError, match="empty") as caught:
        fastsd.load(path)
    assert isinstance(caught.value, EOFError)
    assert caught.value.path == str(path)


def test_a_path_is_one_archive_and_a_file_object_may_hold_more(path):
    path.write_bytes(SMALL + SMALL)
    with pytest.raises(fastsd.FormatError, match="its header accounts for"):
        fastsd.load(path)
    with open(path, "rb") as file:
        fastsd.load(file)
        fastsd.load(file)


def test_offsets_count_from_the_start_of_the_file(path):
    begin = 4096
    content = bytes(begin) + SMALL
    path.write_bytes(content)
    for make in (opener("rb"), lambda path: io.BytesIO(content)):
        with make(path) as file:
            file.seek(begin)
            info = fastsd.open(file).info("weight")
        assert content[info.file_offset :][: info.nbytes] == raw(small_state()["weight"])
    damaged = bytearray(content)
    damaged[info.file_offset] ^= 1
    path.write_bytes(damaged)
    for make in (opener("rb"), lambda path: io.BytesIO(damaged)):
        with make(path) as file:
            file.seek(begin)
            with pytest.raises(fastsd.ChecksumError, match=f"bytes {info.file_offset} to"):
                fastsd.load(file, verify="checksums")


@pytest.mark.parametrize("name", ["buffered", "memory", "only read"])
def test_errors_say_where_the_archive_starts(name, path):
    damaged = bytearray(SMALL)
    damaged[100] ^= 1
    for content in (damaged, SMALL[:5000], b"nothing like it" * 100):
        for begin in (0, ALIGNED):
            with ALL_READERS[name](bytes(begin) + content, path) as file:
                file.read(begin)
                with pytest.raises(fastsd.FormatError) as caught:
                    fastsd.load(file)
            known = name != "only read" and begin > 0
            assert (f"in the archive that starts at byte {begin}" in str(caught.value)) == known


# ---- Errors ----


@pytest.mark.parametrize("target", [None, 5, object(), b"bytes".decode, ["list"]])
def test_what_is_no_file_gives_the_errors_of_torch(target):
    for call in (fastsd.save, torch.save):
        with pytest.raises(AttributeError, match="a file-like object with a 'write' attribute"):
            call({}, target)
    assert outcome(lambda: torch.load(target)) is AttributeError
    for call in (fastsd.load, fastsd.open):
        with pytest.raises(AttributeError, match="'read' attribute"):
            call(target)


class Broken:
    """Its `read` and `write` are no functions."""

    read = write = seek = tell = 3


def closed(make):
    def build(path):
        path.write_bytes(SMALL)
        with make(path) as file:
            pass
        return file

    return build


FAILING = {
    "write-only": opener("wb"),
    "closed": closed(opener("rb")),
    "closed memory": closed(lambda path: io.BytesIO(SMALL)),
    "no function": lambda path: Broken(),
}


@pytest.mark.parametrize("name", FAILING)
def test_errors_of_reading_are_those_of_torch(name, path):
    with suppress(AttributeError), closing(FAILING[name](path)) as file:
        wanted = outcome(lambda: torch.load(file))
        found = outcome(lambda: fastsd.load(file))
        if name == "no function":
            assert found is TypeError  # torch looks for `seek` and calls that
        else:
            assert found is wanted is not None


TEXT_OR_READ_ONLY = {
    "text": opener("w"),
    "text in memory": lambda path: io.StringIO(),
    "read-only": lambda path: opener("rb")(os.devnull),
    "closed": closed(opener("wb")),
    "closed memory": closed(lambda path: io.BytesIO()),
    "full": lambda path: opener("wb")("/dev/full"),
}


@pytest.mark.parametrize("name", TEXT_OR_READ_ONLY)
def test_errors_of_writing_are_those_of_torch(name, path):
    outcomes = []
    for save in (torch.save, fastsd.save):
        file = TEXT_OR_READ_ONLY[name](path)
        outcomes.append(outcome(lambda save=save, file=file: save(small_state(), file)))
        with suppress(OSError):  # of /dev/full
            file.close()
    assert outcomes[0] is outcomes[1] is not None


@pytest.mark.parametrize("path", ["", b""])
def test_an_empty_path_is_that_of_no_file(path):
    for call in (lambda: fastsd.load(path), lambda: fastsd.save({}, path)):
        with pytest.raises(FileNotFoundError) as caught:
            call()
        assert caught.value.filename == path
    assert outcome(lambda: torch.load("")) is FileNotFoundError


@pytest.mark.parametrize("name", ["missing", "no/folder/x", ".", "nul\0x"])
def test_paths_that_cannot_be_read_give_the_errors_of_torch(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = outcome(lambda: torch.load(name))
    assert wanted is not None
    for given_path in (name, Path(name), os.fsencode(name)):
        assert outcome(lambda p=given_path: fastsd.load(p)) is wanted


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_text_files_are_a_type_error(encoding, path):
    path.write_bytes(SMALL)
    with open(path, encoding=encoding) as file, pytest.raises(TypeError, match="binary"):
        fastsd.load(file)
    with pytest.raises(TypeError, match="binary"):
        fastsd.load(io.StringIO("text"))
    with pytest.raises(TypeError, match="binary"):
        fastsd.load(OnlyRead(b"text" * 100, give=bytes.decode))


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: OnlyRead(SMALL, give=lambda data: data + b"more"), ValueError),
        (lambda: OnlyRead(SMALL, give=lambda data: None), BlockingIOError),
        (lambda: OnlyRead(SMALL, give=list), TypeError),
        (lambda: OnlyRead(SMALL, give=lambda data: data[:1000] and 1 / 0), ZeroDivisionError),
    ],
)
def test_impossible_results_of_read_are_errors(make, error):
    with pytest.raises(error):
        fastsd.load(make())


@pytest.mark.parametrize("result", [-1, 1 << 40, "x", None, 1.5])
def test_impossible_results_of_readinto_are_errors(result):
    class Wrong(Fillable):
        def readinto(self, target):
            return result

    with pytest.raises((ValueError, TypeError, BlockingIOError)):
        fastsd.load(Wrong(SMALL))


def test_errors_come_through_from_the_middle_of_a_file():
    class Failing(Seekable):
        def read(self, count=-1):
            if self.tell() > 4500:
                raise ConnectionResetError(104, "reset")
            return super().read(min(count, 100))

    file = Failing(archive_of(medium_state()))
    with pytest.raises(ConnectionResetError, match="reset"):
        fastsd.load(file)
    assert file.tell() == 0


@pytest.mark.parametrize("buffering", [-1, 0])
def test_a_pipe_without_data_that_does_not_block_is_an_error(buffering):
    source, target = os.pipe()
    os.set_blocking(source, False)
    with open(source, "rb", buffering) as file, pytest.raises(BlockingIOError):
        fastsd.load(file)
    os.close(target)


def test_errors_of_the_file_object_come_through():
    class Broken:
        def write(self, data):
            raise OSError(28, "full")

        def read(self, count):
            raise OSError(5, "broken")

    with pytest.raises(OSError, match="full"):
        fastsd.save(small_state(), Broken())
    with pytest.raises(OSError, match="broken"):
        fastsd.load(Broken())


# ---- Where a file object is left after an error ----


@pytest.mark.parametrize("name", ["buffered", "raw", "both ways", "memory", "gzip", "seekable"])
def test_after_an_error_a_file_object_is_where_it_was(name, path):
    damaged_header, damaged_data = bytearray(SMALL), bytearray(SMALL)
    damaged_header[100] ^= 1
    damaged_data[-1] ^= 1
    contents = [b"", b"short", b"of another format" * 99, damaged_header, damaged_data, SMALL[:-1]]
    for content in contents:
        with READERS[name](b"before" + bytes(content), path) as file:
            file.read(6)
            with pytest.raises(fastsd.FastsdError):
                fastsd.load(file, verify="checksums")
            assert file.tell() == 6
    with READERS[name](SMALL, path) as file:
        with pytest.raises(ZeroDivisionError):
            fastsd.load(file, map_location=lambda storage, place: 1 / 0)
        with pytest.raises(RuntimeError):
            fastsd.load(file, map_location="no device")
        assert_same(fastsd.load(file), small_state())


# ---- Sizes that are not so ----


def claiming(nbytes):
    """A header that promises a tensor of so many bytes, and 1000 of them."""
    file = bytearray(archive_of({"x": torch.zeros(1000, dtype=torch.uint8)}, checksum=False))
    (count,) = struct.unpack_from("<I", file, 36)
    places = {}
    for i in range(count):
        kind, _, at, _ = struct.unpack_from("<IIQQ", file, 48 + 24 * i)
        places[kind] = at
    struct.pack_into("<Q", file, places[1] + 8, nbytes)  # of the storage
    struct.pack_into("<q", file, places[3], nbytes)  # of the tensor
    struct.pack_into("<Q", file, FILE_BYTES_AT, 4096 + nbytes)
    struct.pack_into("<I", file, 12, 0)
    struct.pack_into("<I", file, 12, _core.crc32c(file[:4096]))
    return bytes(file)


def test_the_claims_are_good():
    assert fastsd.load(io.BytesIO(claiming(1000)))["x"].sum() == 0


class Counting(Seekable):
    given = 0

    def read(self, count=-1):
        data = super().read(count)
        self.given += len(data)
        return data


@pytest.mark.parametrize("nbytes", [1001, 1 << 33, 1 << 40, 1 << 50, (1 << 63) - 8192])
def test_more_promised_than_there_is(nbytes):
    file = claiming(nbytes)
    with pytest.raises(fastsd.TruncatedError, match=f"promises {4096 + nbytes}"):
        fastsd.load(io.BytesIO(file))
    # How much there is of a stream is known at its end, so that there must be memory for it all.
    errors = (fastsd.TruncatedError, MemoryError) if nbytes > 1 << 33 else fastsd.TruncatedError
    for make in (OnlyRead, Counting):
        with pytest.raises(errors):
            fastsd.load(make(file))


def test_a_damaged_header_asks_for_nothing_behind_it():
    for place in (FILE_BYTES_AT + 5, 100):
        file = bytearray(archive_of(medium_state()))
        (header_bytes,) = struct.unpack_from("<Q", file, 16)
        file[place] ^= 0x10
        counting = Counting(bytes(file))
        with pytest.raises(fastsd.FormatError, match="header is damaged"):
            fastsd.load(counting)
        assert counting.given == header_bytes
    counting = Counting(b"something else" * 1000)
    with pytest.raises(fastsd.FormatError):
        fastsd.load(counting)
    assert counting.given == 512  # by which other formats are told apart


@pytest.mark.parametrize("name", ["memory", "pipe", "gzip", "only read", "buffered"])
def test_a_truncated_stream_is_a_format_error(name, path):
    for nbytes in (0, 10, 47, 48, 100, 4096, len(SMALL) - 1):
        source = ALL_READERS[name](SMALL[:nbytes], path)
        with source as file, pytest.raises(fastsd.FormatError):
            fastsd.load(file)


# ---- Memory ----

MEASURED = """
import gc, io, json, sys, threading
import torch, fastsd

def used_bytes():
    with open("/proc/self/status") as status:
        fields = dict(line.split(":") for line in status)
    return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem"))

def measure(name, call):
    gc.collect()
    peak = start = used_bytes()
    done = threading.Event()
    def sample():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, used_bytes())
    thread = threading.Thread(target=sample)
    thread.start()
    result = call()
    done.set()
    thread.join()
    growth[name] = max(peak, used_bytes()) - start
    return result

class OnlyRead:
    def __init__(self, file):
        self.read = file.read

def rewound():
    memory.seek(0)
    return memory

growth = {}
state = {f"t{i}": torch.ones(4 << 20) for i in range(8)}
memory = io.BytesIO()
fastsd.save(state, memory)
with open(sys.argv[1], "wb") as file:
    file.write(b"odd")
    fastsd.save(state, file)
del state
fastsd.load(rewound())
measure("memory", lambda: fastsd.load(rewound()))
measure("memory, not mapped", lambda: fastsd.load(rewound(), mmap=False))
measure("memory, into", lambda: fastsd.load_into({}, rewound(), strict=False))
measure("only read", lambda: fastsd.load(OnlyRead(rewound())))
with open(sys.argv[1], "rb") as file:
    file.read(3)
    measure("odd offset", lambda: fastsd.load(file))
with open(sys.argv[1], "rb") as file:
    file.read(3)
    measure("open", lambda: fastsd.open(file)["t3"].sum())
loaded = fastsd.load(rewound())
before = used_bytes()
for i in range(7):
    del loaded[f"t{i}"]
growth["rest"] = used_bytes() - before
print(json.dumps(growth))
"""


@pytest.fixture(scope="module")
def growth(tmp_path_factory):
    """The most that each call adds to the memory of a process, for a state_dict of 128 MiB."""
    path = tmp_path_factory.mktemp("memory") / "x"
    run = subprocess.run(
        [sys.executable, "-c", MEASURED, str(path)], stdout=subprocess.PIPE, check=True
    )
    shutil.rmtree(path.parent)
    return json.loads(run.stdout)


@pytest.mark.parametrize(
    "call", ["memory", "memory, not mapped", "memory, into", "only read", "odd offset"]
)
def test_what_cannot_be_mapped_is_in_memory_once(call, growth):
    assert growth[call] < 148 << 20


def test_memory_is_measured(growth):
    assert growth["memory"] > 120 << 20


def test_opening_a_file_at_an_odd_offset_reads_what_is_asked_for(growth):
    assert growth["open"] < 30 << 20


def test_memory_of_dropped_tensors_is_given_back(growth):
    assert growth["rest"] < -(100 << 20)


def test_what_came_from_a_stream_is_handed_out_once():
    stream = io.BytesIO()
    fastsd.save({"a": torch.ones(1000)}, stream)
    stream.seek(0)
    with files.open_source(stream) as source:
        reader = source.open(None)
    first = reader.load(False, False)[0]
    with pytest.raises(fastsd.UnsupportedError, match="once"):
        reader.load(False, False)
    assert first["a"].sum() == 1000


def test_load_into_leaves_a_file_object_where_it_stood_after_an_error():
    stream = io.BytesIO(b"before")
    stream.seek(6)
    fastsd.save({"a": torch.ones(1)}, stream)
    stream.seek(6)
    with pytest.raises(RuntimeError, match="Missing key"):
        fastsd.load_into({"b": torch.ones(1)}, stream)
    assert stream.tell() == 6
    fastsd.load_into({"a": torch.ones(1)}, stream)
    assert stream.read() == b""
