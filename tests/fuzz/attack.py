"""Fuzz targets over the Python face: what loads a file that a stranger wrote.

A target is a function of bytes that raises AssertionError where a promise is broken. run_atheris.py
runs one for as long as one likes; tests/test_fuzz.py all of them over the inputs that are kept.
"""

import io
import json
import os
import pickle
import re
import sys
import tempfile
import threading
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

import fastsd
from fastsd import _core
from fastsd.formats.dcp import read_dcp

ROOT = Path(__file__).parents[2]

REFUSALS = fastsd.FastsdError, OSError, pickle.UnpicklingError
# What a call may take beyond a multiple of the file: slabs, and torch's own that come once.
MEMORY_FREE = 256 << 20
MEMORY_PER_BYTE = 2000

TARGETS = {}


def target(function):
    TARGETS[function.__name__.rstrip("_")] = function
    return function


@cache
def scratch():
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="fastsd-fuzz-", dir=shared if shared.is_dir() else None))


# ---- What no input may do ----

_watched = threading.local()
_FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen"),
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.putenv", "socket.connect", "socket.bind", "shutil.rmtree"),
)


def _watch(event, args):
    """Notes what a file has made the process do. It cannot raise: the code might catch it."""
    if not getattr(_watched, "is_on", False):
        return
    is_outside = (
        event == "open"
        and not isinstance(args[0], int)
        and not _may_open(os.fsdecode(args[0] or b""), args[1], args[2])
    )
    if event in _FORBIDDEN or is_outside:
        _watched.found.append((event, *map(str, args)))


def _may_open(path, mode, flags):
    """Whether a file may be opened: it is the attacker's own, or code that is imported late."""
    own = str(scratch())
    if path.startswith(own):
        return True
    is_written = flags & (os.O_WRONLY | os.O_RDWR) or (mode and set(mode) & set("wax+"))
    is_code = path.startswith((sys.prefix, sys.base_prefix, str(ROOT)))
    return (is_code or path.startswith("/proc/")) and (not is_written or "__pycache__" in path)


@cache
def start_watch():
    sys.addaudithook(_watch)


class Watch:
    """Within it, what is forbidden is noted; memory beyond what `size` bytes may take, too."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        start_watch()
        with suppress(OSError):  # where the system does not let us, less is noticed
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        self.before = _peak_bytes()
        _watched.found = []
        _watched.is_on = True

    def __exit__(self, *_):
        _watched.is_on = False
        assert not _watched.found, f"the file made the process do {_watched.found}"
        grown = _peak_bytes() - self.before
        limit = MEMORY_FREE + MEMORY_PER_BYTE * self.size
        assert grown <= limit, f"{self.size} bytes took {grown} bytes of memory"


def _peak_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    raise AssertionError("there is no VmHWM")


# ---- What any call may raise ----


def attempt(call, path):
    """The value in a list; an empty one: it was refused as it must be."""
    try:
        return [call()]
    except REFUSALS as error:
        if isinstance(error, fastsd.FastsdError):
            assert error.detail
            assert error.path, error
    except Exception as error:
        is_named = isinstance(error, (RuntimeError, ValueError)) and str(path) in str(error)
        assert is_named or _is_about_places(error), f"raises {type(error)}: {error}"
    return []


def _is_about_places(error):
    """Whether torch itself cannot place a storage on a device, of which `load` says that it raises
    what torch does."""
    place = error.__traceback__
    while place.tb_next is not None:
        place = place.tb_next
    module = place.tb_frame.f_globals["__name__"]
    return isinstance(error, RuntimeError) and module == "torch.serialization"


def attempt_legacy(call):
    """The same for a file in torch's legacy format, of which torch raises what it likes."""
    try:
        return [call()]
    except (MemoryError, SystemError):
        raise
    except Exception as error:
        assert not isinstance(error, fastsd.FastsdError) or error.path
        return []


def touch(obj, depth=0):
    """Reads every byte that an object's tensors have."""
    if isinstance(obj, torch.Tensor):
        if obj.device.type == "cpu" and obj.layout == torch.strided:
            torch.tensor([], dtype=torch.uint8).set_(obj.untyped_storage()).sum()
            assert obj.nelement() == 0 or obj.untyped_storage().nbytes() > 0
    elif isinstance(obj, (dict, list, tuple, set, frozenset)) and depth < 1000:
        for value in [*obj, *obj.values()] if isinstance(obj, dict) else obj:
            touch(value, depth + 1)


def load_and_touch(file, **options):
    touch(fastsd.load(file, **options))
    return True


def open_and_touch(file):
    with fastsd.open(file) as archive:
        for name in archive:
            archive.info(name)
            touch(archive[name])
    return True


def is_legacy(data):
    return data[:1] == b"\x80" or data[257:262] == b"ustar"


# ---- Targets ----


def seal(data):
    """The file with the checksum that its header should have, if it is an .fsd file; without those
    of its records, which 0 stands for, if it is a zip file."""
    if data[:4] == b"PK\3\4":
        return re.sub(rb"(?s)(PK\x03\x04.{10}|PK\x01\x02.{12}).{4}", rb"\1\0\0\0\0", data)
    header_bytes = int.from_bytes(data[16:24], "little")
    if data[:4] != b"\x8fFSD" or header_bytes > len(data):
        return data
    crc = _core.crc32c(data[:12] + bytes(4) + data[16:header_bytes])
    return data[:12] + crc.to_bytes(4, "little") + data[16:]


@target
def open_(data):
    """A file of any format, under a name that does not say which."""
    attack_file(data)
    sealed = seal(data)
    if sealed != data:
        attack_file(sealed)


def attack_file(data):
    path = scratch() / "file"
    path.write_bytes(data)
    stream = io.BytesIO(data)
    if is_legacy(data):
        with Watch(len(data)):
            attempt_legacy(lambda: load_and_touch(path))
            attempt_legacy(lambda: open_and_touch(path))
        return
    with Watch(len(data)):
        loaded = attempt(lambda: load_and_touch(path), path)
        assert attempt(lambda: load_and_touch(path, mmap=False), path) == loaded
        # Of a stream, what lies behind an .fsd archive is not looked at.
        assert attempt(lambda: load_and_touch(stream), stream) or not loaded, "a stream is refused"
        attempt(lambda: load_and_touch(path, verify="checksums"), path)
        attempt(lambda: fastsd.get_unsafe_globals_in_checkpoint(path), path)
        opened = attempt(lambda: open_and_touch(path), path)
        assert opened or not loaded or data[:1] != b"\x8f", "what is loaded can be opened"


@cache
def _file_for_trees():
    tensors = {str(i): torch.full([i % 3 + 1], i, dtype=torch.int16) for i in range(40)}
    file = io.BytesIO()
    fastsd.save([{}, tensors], file)
    return file.getvalue()


@target
def tree(data):
    """The tree of an .fsd file; all else in it is right."""
    file = _file_for_trees()
    count = int.from_bytes(file[36:40], "little")
    sections = {}
    for i in range(count):
        record = file[48 + 24 * i : 72 + 24 * i]
        at, size = (int.from_bytes(record[k : k + 8], "little") for k in (8, 16))
        sections[int.from_bytes(record[:4], "little")] = file[at : at + size]
    sections[6] = data
    attack_file(_with_sections(file, sections))


def _with_sections(file, sections):
    old_bytes = int.from_bytes(file[16:24], "little")
    table, content = b"", b""
    first = 48 + 24 * len(sections)
    places = {}
    for kind, part in sorted(sections.items()):
        places[kind] = first + len(content)
        fields = (kind, 4), (0, 4), (places[kind], 8), (len(part), 8)
        table += b"".join(value.to_bytes(n, "little") for value, n in fields)
        content += part + bytes(-len(part) % 8)
    header_bytes = (first + len(content) + 4095) // 4096 * 4096
    header = bytearray((file[:48] + table + content).ljust(header_bytes, b"\0"))
    header[16:24] = header_bytes.to_bytes(8, "little")
    header[24:32] = (len(file) - old_bytes + header_bytes).to_bytes(8, "little")
    for at in range(places[1], places[1] + len(sections[1]), 32):  # storages move with the header
        offset = int.from_bytes(header[at : at + 8], "little") - old_bytes + header_bytes
        header[at : at + 8] = offset.to_bytes(8, "little")
    return seal(bytes(header) + file[old_bytes:])


@target
def json_(data):
    """The core's JSON parser, beside Python's."""

    def unique(pairs):
        value = dict(pairs)
        if len(value) < len(pairs):
            raise ValueError("a name occurs twice")
        return value

    def result_of(call):
        try:
            return repr(call())
        except (ValueError, RecursionError):
            return None

    expected = result_of(
        lambda: json.loads(data.decode(), object_pairs_hook=unique, parse_constant=int)
    )
    with Watch(len(data)):
        found = result_of(lambda: _core.parse_json(data, [], None))
    assert found == expected, f"{found} where Python's json gives {expected}"
    result_of(lambda: _slow_decoder().decode(data.decode()))


@cache
def _slow_decoder():
    """Python's parser in Python, whose ways through a text are what atheris can see. It takes more
    than the grammar has, and nothing is made of what it says."""
    decoder = json.JSONDecoder()
    decoder.parse_string = json.decoder.py_scanstring
    decoder.scan_once = json.scanner.py_make_scanner(decoder)
    return decoder


@target
def index(data):
    """The index of a checkpoint in two files, which are as they must be."""
    folder = scratch() / "sharded"
    if not folder.exists():
        folder.mkdir()
        fastsd.save({"a": torch.ones(2)}, folder / "1.safetensors", format="safetensors")
        torch.save({"b": torch.ones(3)}, folder / "2.pth")
    path = folder / "model.safetensors.index.json"
    path.write_bytes(data)
    if data.lstrip()[:1] != b"{":
        return
    with Watch(len(data)):
        loaded = attempt(lambda: load_and_touch(folder), folder)
        assert attempt(lambda: load_and_touch(path), path) == loaded
        assert attempt(lambda: open_and_touch(folder), folder) == loaded


def save_dcp(folder):
    from torch.distributed import checkpoint

    state = {"w": torch.arange(6.0).view(2, 3), "n": {"s": 1}}
    here = os.getcwd()
    os.chdir(folder.parent)  # the path is written into the metadata, as it is given
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint.save(state, checkpoint_id=folder.name)
    finally:
        os.chdir(here)


def attack_dcp(name, data):
    folder = scratch() / "dcp"
    if not folder.exists():
        save_dcp(folder)
    path = folder / name
    original = path.read_bytes()
    path.write_bytes(data)
    try:
        with Watch(len(data)):
            for value in attempt(lambda: read_dcp(folder), folder):
                touch(value)
    finally:
        path.write_bytes(original)


@target
def dcp(data):
    """The `.metadata` of a distributed checkpoint."""
    attack_dcp(".metadata", data)


@target
def chunks(data):
    """The chunks of a distributed checkpoint."""
    attack_dcp("__0_0.distcp", data)
