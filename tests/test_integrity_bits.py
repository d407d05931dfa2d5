"""What verification finds: every bit that is not as it was written, and every block."""

import io
import mmap
import os
import random

import pytest
import reader
import torch
from same import assert_same

import fastsd
from fastsd import ChecksumError, FastsdError, FormatError

BLOCKS = [4 << 10, 64 << 10, 1 << 20]


@pytest.fixture
def file():
    """A file in memory, to be overwritten in place."""
    descriptor = os.memfd_create("fastsd-test")
    with open(descriptor, "r+b", buffering=0) as file:
        yield file


def write(file, data):
    os.ftruncate(file.fileno(), len(data))
    assert os.pwrite(file.fileno(), data, 0) == len(data)


def open_path(file):
    return fastsd.open(f"/proc/self/fd/{file.fileno()}", mmap=False)


def refusal(act):
    """The error that it raises, or None."""
    try:
        act()
    except FastsdError as error:
        return error
    return None


def verify(file):
    return refusal(lambda: open_path(file).verify())


def names_by_storage(content):
    """(begin, end, names) of each storage, by a second reader; the names are those of `open`, which
    has none for what only an unpickler finds."""
    archive = fastsd.open(io.BytesIO(content))
    infos = [archive.info(name) for name in archive]
    return [
        (s.offset, s.offset + len(s.data), tuple(t.name for t in infos if t.storage == i))
        for i, s in enumerate(reader.read(content).storages)
        if s.data
    ]


def named_by(places, differs):
    """The tensors whose bytes differ, as far as `differs(begin, end)` tells."""
    return {name for begin, end, names in places if differs(begin, end) for name in names}


def saved(obj, save=fastsd.save, **options):
    file = io.BytesIO()
    save(obj, file, **options)
    return file.getvalue()


# ---- Bits ----

TIED = torch.arange(6.0).reshape(2, 3)
TREE = {
    "weights": {"a": TIED, "tied": TIED, "part": TIED[1], "b": torch.arange(5, dtype=torch.int8)},
    "empty": torch.empty(0),
    "values": [1, 2.5, "three", (None, True), b"four"],
}
TREE_FILE = saved(TREE, metadata={"k": "v"})
STATE_FILE = saved({"a": TIED, "моя": torch.ones(3, dtype=torch.bfloat16)}, metadata={"k": "v"})
PICKLE_FILE = saved({"sparse": torch.eye(2).to_sparse(), "b": TIED})


@pytest.mark.parametrize(
    "content", [TREE_FILE, STATE_FILE, PICKLE_FILE], ids=["tree", "flat", "pickle"]
)
def test_every_flipped_bit_is_found(content, file):
    """Of the preamble, the tables, the names, the JSON, the pickle, the padding and the data; those
    of the header by whoever opens the file."""
    places = names_by_storage(content)
    found = {"header": 0, "padding": 0, "data": 0}
    write(file, content)
    for bit in range(8 * len(content)):
        at = bit // 8
        os.pwrite(file.fileno(), bytes([content[at] ^ 1 << bit % 8]), at)
        named = named_by(places, lambda begin, end, at=at: begin <= at < end)
        is_data = any(begin <= at < end for begin, end, _ in places)
        part = "header" if at < places[0][0] else "data" if is_data else "padding"
        found[part] += 1
        error = refusal(lambda: open_path(file)) if part == "header" else verify(file)
        if part == "data":
            assert isinstance(error, ChecksumError), bit
            assert set(error.tensors) == named
            assert all(f'"{name}"' in error.detail for name in named)
        else:
            assert isinstance(error, FormatError), bit
            assert not isinstance(error, ChecksumError), bit
        os.pwrite(file.fileno(), content[at : at + 1], at)
    assert verify(file) is None
    assert found["header"] == 8 * 4096
    assert found["data"] == 8 * sum(end - begin for begin, end, _ in places)
    assert sum(found.values()) == 8 * len(content)
    assert found["padding"] > 0


# Records of torch's files that nobody reads.
IDLE = ("/version", "/.format_version", "/.storage_alignment", "/.data/serialization_id")


def test_every_flipped_bit_of_a_torch_file_is_found_or_changes_nothing(file):
    """CRC-32 covers data and pickle, and the directory of a zip file says most things twice. What
    is left are times, attributes, padding, and records that are not read."""
    state = {"a": TIED, "b": torch.arange(5, dtype=torch.int8), "values": [1, "two"]}
    content = saved(state, torch.save)
    write(file, content)
    idle = set()
    for bit in range(8 * len(content)):
        at = bit // 8
        os.pwrite(file.fileno(), bytes([content[at] ^ 1 << bit % 8]), at)
        if verify(file) is None:
            idle.add(at)
            assert_same(fastsd.load(open_again(file)), state)
        os.pwrite(file.fileno(), content[at : at + 1], at)
    assert verify(file) is None
    for begin, end in covered(content):
        assert idle.isdisjoint(range(begin, end))
    assert len(idle) < len(content) / 2


def open_again(file):
    return f"/proc/self/fd/{file.fileno()}"


def covered(content):
    """Where in a torch file the records lie that are read, by the standard library."""
    import zipfile

    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for record in archive.infolist():
            if not record.filename.endswith(IDLE):
                own = int.from_bytes(content[record.header_offset + 26 :][:2], "little")
                extra = int.from_bytes(content[record.header_offset + 28 :][:2], "little")
                begin = record.header_offset + 30 + own + extra
                yield record.header_offset + 30, record.header_offset + 30 + own  # the name
                yield begin, begin + record.file_size


# ---- Blocks ----


def make_state(nbytes=(1 << 20, 1 << 20, 700_001, 64 << 10, 64 << 10, 4096, 4096, 5)):
    """Random bytes, so that no two blocks are the same."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"t{i}": torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator)
        for i, n in enumerate(nbytes)
    }


def swap(content, at, nbytes, other):
    changed = bytearray(content)
    changed[at : at + nbytes] = content[other : other + nbytes]
    changed[other : other + nbytes] = content[at : at + nbytes]
    return changed


def zero(content, at, nbytes, _):
    return content[:at] + bytes(nbytes) + content[at + nbytes :]


def drop(content, at, nbytes, _):
    """As where a write was lost: what is behind moves up, and the length is made right."""
    return (content[:at] + content[at + nbytes :]).ljust(len(content), b"\0")


def repeat(content, at, nbytes, _):
    """What is behind moves down, and the length is made right."""
    return (content[: at + nbytes] + content[at:])[: len(content)]


def replace(content, at, nbytes, other):
    """A block of another place, as of a disk that wrote to the wrong one."""
    changed = bytearray(content)
    changed[at : at + nbytes] = content[other : other + nbytes]
    return changed


DAMAGE = [swap, zero, drop, repeat, replace]


@pytest.mark.parametrize("nbytes", BLOCKS)
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_every_damaged_block_is_found_and_named(damage, nbytes, file):
    content = saved(make_state())
    places = names_by_storage(content)
    generator = random.Random(nbytes)
    starts = range(0, len(content) - nbytes, nbytes)
    if damage in (drop, repeat):
        starts = starts[:: max(1, len(starts) // 100)]  # each writes the rest of the file anew
    count = 0
    with mmap_of(file, len(content)) as memory:
        memory[:] = content
        for at in starts:
            other = generator.choice([start for start in starts if start != at])
            changed = bytes(damage(content, at, nbytes, other))
            if changed == content:
                continue
            memory[:] = changed
            assert_named(verify(file), content, changed, places)
            memory[:] = content
            count += 1
        assert verify(file) is None
    assert count >= min(len(starts) - 1, 2)


def mmap_of(file, nbytes):
    os.ftruncate(file.fileno(), nbytes)
    return mmap.mmap(file.fileno(), nbytes)


def assert_named(error, content, changed, places):
    """Damage is found; and of the data, exactly those that differ are named."""
    assert isinstance(error, FastsdError)
    if content[:4096] != changed[:4096]:
        return
    named = named_by(places, lambda begin, end: content[begin:end] != changed[begin:end])
    assert set(getattr(error, "tensors", ())) == named
    assert all(f'"{name}"' in error.detail for name in named)


def test_storages_of_one_size_that_change_places_are_found(file):
    content = saved(make_state([4096] * 6))
    places = names_by_storage(content)
    for i, (at, _, names) in enumerate(places):
        for other, _, others in places[i + 1 :]:
            write(file, bytes(swap(content, at, 4096, other)))
            assert set(verify(file).tensors) == {*names, *others}


@pytest.mark.parametrize("save", [fastsd.save, torch.save])
def test_damage_of_a_storage_that_is_read_in_parts_is_found(save, file):
    """By several threads, each with checksums of its own."""
    content = saved(make_state([9 << 20, 4096]), save)
    begin = content.index(bytes(make_state([9 << 20])["t0"][:64].tolist()))
    write(file, content)
    assert verify(file) is None
    edges = [0, 1, 4 << 20, (4 << 20) - 1, (8 << 20) + 1, (9 << 20) - 1]
    for at in [*edges, *random.Random(0).choices(range(9 << 20), k=20)]:
        byte = content[begin + at]
        os.pwrite(file.fileno(), bytes([byte ^ 1 << at % 8]), begin + at)
        error = verify(file)
        assert isinstance(error, ChecksumError)
        assert error.tensors == ("t0",)
        os.pwrite(file.fileno(), bytes([byte]), begin + at)
    assert verify(file) is None
    parts = bytes(swap(content, begin, 4 << 20, begin + (4 << 20)))
    write(file, parts)
    assert verify(file).tensors == ("t0",)


@pytest.mark.parametrize("nbytes", BLOCKS[:2])
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_blocks_of_a_torch_file_are_found(damage, nbytes, file):
    state = make_state()
    content = saved(state, torch.save)
    starts = range(0, len(content) - nbytes, nbytes)
    generator = random.Random(nbytes)
    count = 0
    for at in starts[:: max(1, len(starts) // 50)]:
        other = generator.choice([start for start in starts if start != at])
        changed = bytes(damage(content, at, nbytes, other))
        if changed == content:
            continue
        write(file, changed)
        count += 1
        if verify(file) is None:
            assert_same(fastsd.load(open_again(file)), state)
    assert count >= 2


def test_what_has_no_checksums_is_said_to_be_unchecked(file):
    """Of a file without them only the header is protected: a flipped bit of the data is not found,
    and the tensors are listed."""
    content = saved({"a": TIED}, checksum=False)
    write(file, content[:-1] + bytes([content[-1] ^ 1]))
    assert open_path(file).verify().unchecked == ("a",)
