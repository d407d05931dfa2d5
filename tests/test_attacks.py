"""The attack table: one numbered row for each abuse, and the answer to it. docs/SECURITY.md says
what is promised; here each promise is tried.

A row is made in a folder of its own and loaded there, in a process of its own: mapped, read, and to
a GPU, which is that of the stub driver.
Whatever the answer is: the canary is not hatched, no file but those of the row is there after it,
memory stays within the size of the file and a bound, and time within a limit.
"""

import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from attacks import (
    CANARY,
    EXPLOIT,
    SIGNATURE,
    Exploit,
    call,
    entry,
    name,
    number,
    numbers,
    overlapping,
    safetensors,
    stream,
    tensor,
    text,
    with_directory,
    zipped,
)
from test_bad_input import BAD_JSON, BYTES, SMALL_FILE, TENSORS, T, change, with_tree
from test_format import Given, write

import fastsd

HERE = Path(__file__).parent
CPU_SECONDS_MAX = 20  # no measurement: far beyond what any row takes
# docs/SECURITY.md, "Memory": beyond the bytes of the file.
FIXED_BYTES = 64 << 20
FACTOR = 100

Row = namedtuple("Row", "what files answer message call", defaults=["", "load"])
ATTACKS = []


def row(what, files, answer, message="", call="load"):
    """`files`: the bytes of `x`, or a function that makes whatever it likes in the folder.
    `answer`: the name of the exception, or "accepted"."""
    ATTACKS.append(Row(what, files, answer, message, call))


def numpy_array(dtype, shape):
    return with_tree({"$ndarray": [1, dtype, shape]})


# ---- Code ----

row("torch file: a pickle that calls os.mkdir", zipped(EXPLOIT), "UnpicklingError", "posix.mkdir")
row(
    ".fsd: the same pickle, in the section for it",
    write(TENSORS, [(9, 0, EXPLOIT)]),
    "UnpicklingError",
    "posix.mkdir",
)
row("a bare pickle that calls os.mkdir", EXPLOIT, "FormatError", "may run any code")


def legacy(folder):
    torch.save(Exploit(), folder / "x", _use_new_zipfile_serialization=False)


def tarred(folder):
    (folder / "pickle").write_bytes(EXPLOIT)
    with tarfile.open(folder / "x", "w") as archive:
        for part in ("storages", "tensors", "pickle"):
            archive.add(folder / "pickle", part)
    (folder / "pickle").unlink()


def dcp(folder):
    (folder / "x").mkdir()
    (folder / "x" / ".metadata").write_bytes(EXPLOIT)


row("torch before 1.6: a pickle that calls os.mkdir", legacy, "UnpicklingError", "Weights only")
row("a tar file of torch before 0.1.2: the same", tarred, "RuntimeError", "legacy .tar")
row("torch.distributed.checkpoint: .metadata calls os.mkdir", dcp, "FormatError", "mkdir", "dcp")
row(
    "a TorchScript archive, which holds code",
    zipped(stream(b"N"), {"constants.pkl": b"", "code/__torch__.py": b"", "version": b"3"}),
    "RuntimeError",
    "TorchScript",
)
row(
    "a download under torch's own name: torch.hub.load_state_dict_from_url",
    zipped(stream(call("torch.hub.load_state_dict_from_url", text("http://127.0.0.1/")))),
    "UnpicklingError",
    "Weights only load failed",
)
row(
    "eval, by its name in Python 2",
    zipped(stream(call("__builtin__.eval", text("1")))),
    "UnpicklingError",
    "eval",
)
row(
    "a global that is an attribute of one that is allowed",
    zipped(stream(name("torch._utils.os.system"))),
    "UnpicklingError",
    "Weights only load failed",
)
row("an opcode that imports by number (EXT1)", zipped(stream(b"\x82\x01")), "UnpicklingError")
row("an object of a class (INST)", zipped(stream(b"(ios\nsystem\n")), "UnpicklingError")
row("a second pickle behind the first", zipped(stream(b"N") + EXPLOIT), "accepted")
row("numpy's objects in a tree", with_tree({"$numpy": ["|O", "AAAAAAAAAAA="]}), "FormatError")
row("an import by a dtype's name", with_tree({"$dtype": "onnx"}), "FormatError", "onnx")
row("a class by a named tuple's name", with_tree({"$return_type": ["os", [1]]}), "FormatError")
row(
    "an attribute that is the class of a tensor",
    with_tree({"$attributes": [T, {"__class__": 1}]}),
    "FormatError",
    "__class__",
)
row(
    "an attribute that is the memory of a tensor",
    with_tree({"$attributes": [T, {"data": BYTES}]}),
    "FormatError",
    "data",
)

# ---- Reading outside of the file ----

row("torch: a view beyond its storage", zipped(stream(tensor([2**40]))), "RuntimeError", "x: ")
row("torch: an offset beyond it", zipped(stream(tensor(offset=5))), "RuntimeError", "x: ")
row("torch: a view that is a bit longer", zipped(stream(tensor([2]))), "RuntimeError", "x: ")
row("torch: an offset below 0", zipped(stream(tensor(offset=-1))), "RuntimeError", "offset -1")
row("torch: a stride below 0", zipped(stream(tensor([100], [-1]))), "RuntimeError", "overflow")
row(
    "torch: sizes and strides whose sum wraps",
    zipped(stream(tensor([2**32 + 1, 2], [2**32, 1]))),
    "RuntimeError",
    "overflow",
)
row(
    "torch: a storage larger than its record",
    zipped(stream(tensor(count=2**60))),
    "UnpicklingError",
    "which has 4",
)
row(
    "torch: a storage that is a path",
    zipped(stream(tensor(key="../../../etc/hostname"))),
    "UnpicklingError",
    "is not in the file",
)
row(
    "torch: a sparse tensor with an index beyond it",
    zipped(
        stream(
            call(
                "torch._utils._rebuild_sparse_tensor",
                call("torch.serialization._get_layout", text("torch.sparse_coo")),
                b"("
                + tensor([1, 1], [1, 1], key="1", kind="Long")
                + tensor()
                + call("torch.Size", numbers([2]))
                + b"\x89t",
            )
        ),
        {"data/0": bytes(4), "data/1": struct.pack("<q", 2**40)},
    ),
    "RuntimeError",
    "index",
)
row(
    "torch: a nested tensor with a part beyond its buffer",
    zipped(
        stream(
            call(
                "torch._utils._rebuild_nested_tensor",
                tensor(),
                tensor([1, 1], [1, 1], key="1", kind="Long"),
                tensor([1, 1], [1, 1], key="2", kind="Long"),
                tensor([1], [1], key="3", kind="Long"),
            )
        ),
        {"data/0": bytes(4), "data/1": struct.pack("<q", 2**20)}
        | {"data/2": struct.pack("<q", 1), "data/3": bytes(8)},
    ),
    "RuntimeError",
    "out of bounds",
)
row(
    "zip: a record beyond the end of the file",
    with_directory("data/0", 42, "<I", 2**31),
    "FormatError",
)
row("zip: a record larger than its place", with_directory("data/0", 20, "<I", 2**30), "FormatError")
row(
    "zip: names that climb out",
    zipped(stream(b"N"), {"../../up": b"x", "data/../../up": b"y"}),
    "accepted",
)
row(
    "safetensors: a tensor beyond the file",
    safetensors({"a": entry(0, 2**40)}, bytes(4)),
    "TruncatedError",
)
row(
    "safetensors: a shape larger than its bytes",
    safetensors({"a": entry(0, 4, "F32", [4])}, bytes(4)),
    "FormatError",
    "needs 16 bytes",
)
row("safetensors: offsets that go back", safetensors({"a": entry(4, 0)}, bytes(4)), "FormatError")
row(
    "safetensors: sizes whose product wraps",
    safetensors({"a": entry(0, 0, "U8", [2**33, 2**33])}),
    "FormatError",
    "63 bits",
)
row("safetensors: an offset of 2^64", safetensors({"a": entry(0, 2**64)}), "FormatError")
row(
    "safetensors: a hole, for what nobody looks at",
    safetensors({"a": entry(4, 8)}, bytes(8)),
    "FormatError",
    "hole",
)
row(
    "safetensors: two tensors over the same bytes",
    safetensors({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)),
    "FormatError",
    "in use",
)
row(
    ".fsd: a storage beyond the file",
    change(SMALL_FILE, "storage", 1, "bytes", 2**62),
    "FormatError",
)
row(".fsd: a view beyond its storage", change(SMALL_FILE, "dim", 0, "", 2**40), "FormatError")
row(
    ".fsd: a stride that makes the reach wrap",
    change(SMALL_FILE, "dim", 2, "", 2**62),
    "FormatError",
)
row(".fsd: a stride below 0", change(SMALL_FILE, "dim", 2, "", -1), "FormatError")
row(
    ".fsd: an offset that wraps",
    change(SMALL_FILE, "tensor", 0, "storage_offset", 2**62),
    "FormatError",
)
row(".fsd: overlapping storages", change(SMALL_FILE, "storage", 1, "offset", 4096), "FormatError")
row(
    ".fsd: a section beyond the header",
    change(SMALL_FILE, "section", 1, "bytes", 2**62),
    "FormatError",
)
row(
    ".fsd: an array over more bytes than its tensor has",
    numpy_array("<u1", [2**40]),
    "FormatError",
)


def index_of(file, content=None):
    def make(folder):
        directory = folder / "x"
        directory.mkdir()
        (folder / "outside").write_bytes(safetensors({"a": entry(0, 1)}, b"\1"))
        if content is not None:
            (directory / file).write_bytes(content)
        index = {"weight_map": {"a": file}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    return make


def linked(folder):
    index_of("inside")(folder)
    (folder / "x" / "inside").symlink_to(folder / "outside")


def linked_model(folder):
    index_of("inside")(folder)
    (folder / "x" / "model.safetensors.index.json").unlink()
    (folder / "x" / "model.safetensors").symlink_to(folder / "outside")


row("an index that names ../outside", index_of("../outside"), "FormatError", "outside of its dir")
row("an index that names /etc/hostname", index_of("/etc/hostname"), "FormatError", "outside of its")
row("an index that names a link to a file outside", linked, "FormatError", "leads out of")
row("a model that is a link to a file outside", linked_model, "FormatError", "leads out of")
row(
    "an index that names a name with a zero byte", index_of("a\0b"), "FormatError", "outside of its"
)
row(
    "an index that names itself",
    index_of("model.safetensors.index.json"),
    "FormatError",
    "only torch reads",
)
row(
    "an index that names a pickle",
    index_of("pickle", EXPLOIT),
    "FormatError",
    "only torch reads",
)
row("an index that names a device", index_of("/dev/zero"), "FormatError", "outside of its")
row(
    "a pipe that nobody writes to",
    lambda folder: os.mkfifo(folder / "x"),
    "UnsupportedError",
    "regular file",
)
row(
    "a link to /dev/zero",
    lambda folder: (folder / "x").symlink_to("/dev/zero"),
    "UnsupportedError",
    "regular file",
)

# ---- Memory ----

row(
    "a zip bomb: a storage of 64 MiB, deflated to 64 KiB",
    zipped(stream(tensor(count=2**24)), {"data/0": bytes(1 << 26)}, zipfile.ZIP_DEFLATED),
    "UnsupportedError",
    "compressed",
)
row("a zip bomb: records that overlap", overlapping(), "FormatError")
row(
    "zip: a count of records that is a lie",
    zipped(stream(b"N"))[:-14] + b"\xe8\3\xe8\3" + zipped(stream(b"N"))[-10:],
    "FormatError",
    "too few for its 1000 records",
)
row(
    "torch: a bytearray of 2^36 bytes",
    zipped(stream(call("builtins.bytearray", number(2**36)))),
    "UnpicklingError",
    "memory",
)
row(
    "torch: a storage of 2^36 bytes that has none",
    zipped(stream(call("torch.storage.UntypedStorage", number(2**36)))),
    "UnpicklingError",
    "memory",
)
row(
    "torch: a tensor of 2^36 elements that has no storage",
    zipped(stream(call("torch.Tensor", call("torch.Size", numbers([2**36]))))),
    "UnpicklingError",
    "memory",
)
row(
    "torch: the same, called by torch's own function",
    zipped(
        stream(
            call(
                "torch._tensor._rebuild_from_type_v2",
                name("torch.Tensor"),
                name("torch.Tensor"),
                numbers([2**36]),
                b"N",
            )
        )
    ),
    "UnpicklingError",
    "memory",
)
row(
    "torch: a text of 2^32 bytes that ends",
    zipped(SIGNATURE + b"X\xff\xff\xff\xff."),
    "UnpicklingError",
)
row(
    "torch: a number of 2^31 bytes (LONG4)",
    zipped(SIGNATURE + b"\x8b\xff\xff\xff\x7f."),
    "UnpicklingError",
)
row("torch: number 2^32 - 1 in the memo", zipped(stream(b"Nr\xff\xff\xff\xff")), "accepted")
row("torch: an expanded tensor of 2^40 elements", zipped(stream(tensor([2**40], [0]))), "accepted")
row("safetensors: a header of 2^63 bytes", safetensors({}, length=2**63), "FormatError")
row(
    "safetensors: a header of 100 MB that is not there",
    safetensors({}, length=10**8),
    "TruncatedError",
)
row(
    ".fsd: a header of 2^63 bytes",
    change(SMALL_FILE, "preamble", 0, "header_bytes", 2**63),
    "LimitError",
    "limit",
)
row(
    ".fsd: a header of 1 GiB that is not there",
    change(SMALL_FILE, "preamble", 0, "header_bytes", 2**30),
    "FormatError",
)
row(
    ".fsd: a file of 2^62 bytes",
    change(SMALL_FILE, "preamble", 0, "file_bytes", 2**62),
    "TruncatedError",
)
row(
    ".fsd: a name of 2^32 bytes",
    change(SMALL_FILE, "tensor", 0, "name_bytes", 2**32 - 1),
    "LimitError",
    "limit",
)
row(
    ".fsd: 2^32 dimensions",
    change(SMALL_FILE, "tensor", 0, "rank", 2**32 - 1),
    "LimitError",
    "limit",
)
row(".fsd: a bytearray of 2^40", with_tree({"$bytearray": 2**40}), "FormatError")
row(
    ".fsd: a numpy text of 2^31 characters",
    with_tree({"$numpy": ["<U500000000", "AAAA"]}),
    "FormatError",
)
row(
    ".fsd: definitions that double: 2^60 elements",
    with_tree([{"$def": [i, [{"$ref": i - 1}] * 2 if i else [1]]} for i in range(60)]),
    "accepted",
)
row("a million lists, a byte each", zipped(stream(b"]" * 200_000)), "accepted")


def sparse_hole(folder):
    nbytes = 1 << 40
    file = write([Given(b"x", "uint8", (256,), (1,), bytes(256))])
    for record, field, value in (
        ("preamble", "file_bytes", 4096 + nbytes),
        ("storage", "bytes", nbytes),
        ("dim", "", nbytes),
    ):
        file = change(file, record, 0, field, value)
    (folder / "x").write_bytes(file)
    try:
        os.truncate(folder / "x", 4096 + nbytes)
    except OSError:
        pytest.skip("the file system has no files of 1 TiB")


row(".fsd: a hole of 1 TiB", sparse_hole, "OSError")

# ---- Time, and the stack ----


def hash_bomb(kind):
    doubled = [{"$def": [i, {"$tuple": [{"$ref": i - 1}] * 2 if i else [1]}]} for i in range(60)]
    return with_tree([*doubled, {kind: [{"$ref": 59}]}])


def tuple_bomb():
    doubled = (b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
    return zipped(stream(b"K\1\x85q\0", *doubled, b"}h\x3cK\1s"))


row("torch: tuples that double, as a key", tuple_bomb(), "UnpicklingError", "nested too deeply")
row(
    "torch: tuples in tuples, 100,000 deep, as a key",
    zipped(stream(b"}", b")" + b"\x85" * 100_000, b"K\1s")),
    "UnpicklingError",
    "nested too deeply",
)
row("torch: 100,000 lists in lists", zipped(stream(b"]" * 100_000, b"a" * 99_999)), "accepted")
row("torch: 100,000 marks", zipped(stream(b"(" * 100_000)), "UnpicklingError")
row(".fsd: tuples that double, in a set", hash_bomb("$set"), "FormatError")
row(".fsd: tuples that double, in a frozenset", hash_bomb("$frozenset"), "FormatError")
for kind in ("arrays", "objects", "tuples", "attributes", "definitions"):
    row(
        f".fsd: JSON, deep {kind}",
        with_tree(BAD_JSON[f"deep {kind}"]),
        "FormatError",
        "nested|Recursion|deep",
    )
row(".fsd: a number of a million digits", with_tree(b"1" * 1_000_000), "FormatError", "digits")
row(".fsd: an $int of a million digits", with_tree({"$int": "0x" + "f" * 1_000_000}), "accepted")
row(
    ".fsd: a dtype that divides by zero",
    with_tree({"$numpy": ["<M8[s/0]", "AAAAAAAAAAA="]}),
    "FormatError",
)
row(
    "safetensors: JSON, a million arrays deep",
    safetensors(b'{"a":{"more":' + b"[" * 1_000_000),
    "FormatError",
    "nested too deeply",
)
row(
    "safetensors: 50,000 tensors of one name",
    safetensors(
        b"{%s}" % b",".join([b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'] * 50_000)
    ),
    "FormatError",
    "two tensors are named a",
)
row(
    "safetensors: a size of a million digits",
    safetensors(b'{"a":{"dtype":"U8","shape":[1%s],"data_offsets":[0,1]}}' % (b"0" * 1_000_000)),
    "FormatError",
    "64 bits",
)
row("safetensors: spaces for 10 MB", safetensors(b"{" + b" " * 10_000_000 + b"}"), "accepted")


def deep_index(folder):
    (folder / "x").mkdir()
    (folder / "x" / "model.safetensors.index.json").write_bytes(b"[" * 1_000_000)


row("an index, a million arrays deep", deep_index, "FormatError", "no JSON")

# ---- Two meanings for one file ----

row(
    "safetensors: a name twice",
    safetensors(b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 1)).encode(),) * 2), b"x"),
    "FormatError",
    "two tensors are named a",
)
row(
    "safetensors: a name twice, once escaped",
    safetensors(b'{"a":%s,"\\u0061":%s}' % ((json.dumps(entry(0, 1)).encode(),) * 2), b"x"),
    "FormatError",
    "two tensors are named a",
)
row(".fsd: a name twice", write([TENSORS[0], TENSORS[0]]), "FormatError", "floats")
row(
    "zip: a record twice",
    zipped(stream(b"N"), {"data/0": b"a", "data/1": b"b"}).replace(b"data/1", b"data/0"),
    "FormatError",
    "two zip records are named",
)
row(
    "zip: a local header that says otherwise",
    zipped(stream(b"N"), {"data/0": b"a"}).replace(b"data/0", b"data/1", 1),
    "FormatError",
)
row(
    "zip: two pickles",
    zipped(stream(b"N"), {"12345678": EXPLOIT}, folder="a/").replace(b"a/12345678", b"b/data.pkl"),
    "FormatError",
    "two records data.pkl",
)
row("zip: a second archive behind the first", zipped(stream(b"N")) + zipped(EXPLOIT), "FormatError")
row(
    "zip: a second archive in the comment",
    zipped(stream(b"N"))[:-2] + struct.pack("<H", len(zipped(EXPLOIT))) + zipped(EXPLOIT),
    "FormatError",
)
row("zip: encrypted", with_directory("data/0", 8, "<H", 1), "UnsupportedError", "encrypted")
row(
    "an .fsd file with a zip file behind it",
    SMALL_FILE + zipped(EXPLOIT),
    "FormatError",
    "accounts for",
)
row(
    "a safetensors file with a zip file behind it",
    safetensors({}) + zipped(EXPLOIT),
    "FormatError",
    "accounts for",
)


# ---- Trying ----

TRY = """
import json, os, resource, sys
import torch, fastsd
from fastsd.formats.dcp import read_dcp
from stub_gpu import stubbed

def load_to_gpu():
    with stubbed():
        fastsd.load("x", map_location="cuda")

RUNS = {
    "load": [lambda: fastsd.load("x", map_location="cpu"),
             lambda: fastsd.load("x", map_location="cpu", mmap=False),
             load_to_gpu],
    "dcp": [lambda: read_dcp("x")],
}

def answer(run):
    try:
        run()
    except (MemoryError, OSError) as error:
        return "OSError", str(error)
    except Exception as error:
        return type(error).__name__, str(error)[:2000]
    return "accepted", ""

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) << 10

def attack(folder, call, cpu_seconds, bytes_max):
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + bytes_max,) * 2)
    open("/proc/self/clear_refs", "w").write("5")  # forgets the peak
    before = status("VmRSS")
    answers = [answer(run) for run in RUNS[call]]
    grown = status("VmHWM") - before
    for run in (lambda: fastsd.open("x").verify(), lambda: fastsd.load_into({}, "x")):
        answer(run)  # whatever it is
    return {"answers": answers, "grown": grown}

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        task = json.loads(line)
        result = attack(**task)
        print(json.dumps({"folder": task["folder"], **result}), flush=True)
        os._exit(0)
    _, ended = os.waitpid(pid, 0)
    if ended:
        print(json.dumps({"folder": json.loads(line)["folder"], "died": ended}), flush=True)
"""


def allowed_growth(folder):
    """Of the bytes that are there: a hole is none."""
    files = [path.stat() for path in Path(folder).rglob("*") if path.is_file()]
    return FIXED_BYTES + FACTOR * sum(min(s.st_size, 512 * s.st_blocks) for s in files)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What became of each row, by number; and what was in its folder before and after."""
    root = tmp_path_factory.mktemp("attacks")
    tasks, before = [], []
    for i, attack in enumerate(ATTACKS, 1):
        folder = root / f"A{i}"
        folder.mkdir()
        if callable(attack.files):
            attack.files(folder)
        else:
            (folder / "x").write_bytes(attack.files)
        before.append(sorted(map(str, folder.rglob("*"))))
        limit = 2 * allowed_growth(folder) + (512 << 20)
        tasks.append(
            {"folder": str(folder), "call": attack.call, "cpu_seconds": CPU_SECONDS_MAX}
            | {"bytes_max": limit}
        )
    lines = "".join(json.dumps(task) + "\n" for task in tasks)
    command = [sys.executable, "-W", "ignore", "-c", TRY]
    done = subprocess.run(
        command,
        input=lines,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(HERE)},  # for the stub driver
    )
    found = {result["folder"]: result for result in map(json.loads, done.stdout.splitlines())}
    after = [sorted(map(str, Path(task["folder"]).rglob("*"))) for task in tasks]
    return [
        (found.get(task["folder"], {"died": done.stderr}), *folders)
        for task, *folders in zip(tasks, before, after, strict=True)
    ]


@pytest.mark.parametrize(
    "number", range(len(ATTACKS)), ids=[f"A{i}: {a.what}" for i, a in enumerate(ATTACKS, 1)]
)
def test_attack(number, results):
    attack = ATTACKS[number]
    result, before, after = results[number]
    assert "died" not in result
    assert after == before
    folder = Path(before[0]).parent
    assert not list(folder.rglob(CANARY))
    assert result["grown"] <= allowed_growth(folder)
    for answer, message in result["answers"]:
        assert answer == attack.answer, message
        assert re.search(attack.message, message), message


def test_the_canary_hatches_where_code_runs(tmp_path, monkeypatch):
    """So that the rows cannot pass because the exploit is a dud."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(EXPLOIT)
    assert os.listdir() == [CANARY]
    (tmp_path / "x").write_bytes(zipped(EXPLOIT))
    os.rmdir(CANARY)
    fastsd.load(tmp_path / "x", weights_only=False)
    assert sorted(os.listdir()) == [CANARY, "x"]


# ---- Writing: what somebody has put where files are written ----


@pytest.mark.parametrize("hidden", [".fastsd-x.fsd.tmp", "x.fsd.tmp", "x.fsd.part"])
def test_links_in_the_place_of_temporary_files_are_not_followed(hidden, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    target = tmp_path / "x.fsd"
    (tmp_path / hidden).symlink_to(victim)
    source = tmp_path / "source.safetensors"
    source.write_bytes(safetensors({"a": entry(0, 1)}, b"\1"))
    fastsd.save({"a": torch.ones(1)}, target)
    fastsd.convert(source, target)
    assert victim.read_text() == "mine"
    assert fastsd.load(target)["a"].tolist() == [1]
    (tmp_path / hidden).unlink()


def test_names_in_a_file_are_no_paths_of_what_is_converted(tmp_path):
    (tmp_path / "out").mkdir()
    source = tmp_path / "source.safetensors"
    source.write_bytes(safetensors({"../../up": entry(0, 1), "/abs": entry(1, 2)}, b"\1\2"))
    fastsd.convert(source, tmp_path / "out" / "x.fsd")
    fastsd.convert(source, tmp_path / "out" / "x.pth", to="pth")
    assert sorted(os.listdir(tmp_path)) == ["out", "source.safetensors"]
    assert sorted(os.listdir(tmp_path / "out")) == ["x.fsd", "x.pth"]


# ---- The page ----


def test_the_page_has_the_bounds_of_this_table():
    page = (HERE.parent / "docs" / "SECURITY.md").read_text()
    assert f"{FIXED_BYTES >> 20} MiB, and {FACTOR} bytes for each byte" in page
    sources = "".join(
        path.read_text()
        for pattern in ("csrc/*.h", "csrc/*.cc", "fastsd/**/*.py")
        for path in HERE.parent.glob(pattern)
    )
    bounds = page.split("## Bounds")[1].split("##")[0]
    for constant in set(re.findall(r"`(k\w+|_\w+_MAX)`", bounds)):
        assert re.search(rf"\b{constant} = ", sources), constant
