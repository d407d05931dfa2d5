"""Writes the first seeds of every target: small files of every kind, from the libraries themselves.

    python tests/fuzz/make_corpus.py FOLDER

What is in corpus/ is that and what libFuzzer has found since, minimised (see README.md).
"""

import io
import json
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import attack
import numpy as np
import safetensors.torch
import torch

import fastsd

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden"


def objects():
    w = torch.arange(12.0).view(3, 4)
    tied = {"a": w, "b": w.t(), "c": w[1:, ::2], "d": torch.tensor([], dtype=torch.int8)}
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    shared = [1]
    return {
        "flat": tied,
        "module": module.state_dict(),
        "checkpoint": {"model": module.state_dict(), "optim": optimizer.state_dict(), "step": 7},
        "parameter": OrderedDict(p=torch.nn.Parameter(w), q=w.conj(), z=torch.ones(2).cfloat()),
        "meta": {"m": torch.empty(5, 1 << 20, device="meta"), "é\n": torch.ones(1).half()},
        "dtypes": {str(i): torch.zeros(2, dtype=t) for i, t in enumerate(DTYPES)},
        "values": {
            "t": (1, -2, 1 << 70, 1.5, float("nan"), True, None, "ü\U0001f600", b"\0\xff"),
            "s": {1, "x"},
            "f": frozenset({2.0}),
            "by": bytearray(b"abc"),
            "c": 1 + 2j,
            "z": torch.Size([1, 2]),
            "dt": torch.float16,
            "dev": torch.device("cpu"),
            "lay": torch.strided,
            "twice": [shared, shared],
            "o": OrderedDict(a=[{}, ()]),
            1: {2: {3: torch.ones(1)}},
            ("k", 1): 0,
        },
    }


DTYPES = [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float64, torch.complex64]
NOT_PLAIN = {
    "sparse": {"x": torch.eye(2).to_sparse(), "y": torch.ones(2)},
    "csr": {"x": torch.eye(2).to_sparse_csr()},
    "array": {"n": np.arange(3), "s": np.float32(2), "y": torch.ones(2)},
}


def save_torch(obj, **options):
    file = io.BytesIO()
    torch.save(obj, file, **options)
    return file.getvalue()


def save_fsd(obj, **options):
    file = io.BytesIO()
    fastsd.save(obj, file, **options)
    return file.getvalue()


def tables_of(header):
    """An .fsd header as the target fsd_tables takes it."""
    flags, count = struct.unpack_from("<II", header, 32)
    parts = [struct.pack("<I", flags)]
    for i in range(count):
        kind, bits, at, size = struct.unpack_from("<IIQQ", header, 48 + 24 * i)
        parts.append(struct.pack("<BBH", kind, bits, size) + header[at : at + size])
    return b"".join(parts)


def stream_of(zip_bytes):
    with zipfile.ZipFile(io.BytesIO(zip_bytes)) as archive:
        name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
        return archive.read(name)


def header_of(file):
    """A safetensors header as the target takes it: with the size of the data behind it."""
    size = int.from_bytes(file[:8], "little")
    return file[8 : 8 + size] + struct.pack("<Q", len(file) - 8 - size)


def seeds(scratch):
    """(target, name, bytes) of each."""
    for name, obj in objects().items():
        fsd, pth = save_fsd(obj, metadata={"k": "v"}), save_torch(obj)
        stream = stream_of(pth)
        header = fsd[: int.from_bytes(fsd[16:24], "little")]
        yield "fsd_header", name, header.rstrip(b"\0")
        yield "fsd_tables", name, tables_of(header)
        yield "zip", name, pth
        yield "pickle", name, stream
        yield "nesting", name, stream
        for target in ("reader", "open"):
            yield target, f"{name}.fsd", fsd
            yield target, f"{name}.pth", pth
        yield "open", f"{name}.legacy", save_torch(obj, _use_new_zipfile_serialization=False)
        yield "pickle", f"{name}.plain", pickle.dumps(str(obj), 2)
    for name, obj in NOT_PLAIN.items():
        pth = save_torch(obj)
        for target in ("reader", "open"):
            yield target, f"{name}.fsd", save_fsd(obj)
            yield target, f"{name}.pth", pth
        yield "pickle", name, stream_of(pth)
        yield "nesting", name, stream_of(pth)
    state = {"a": torch.ones(2, 3), "b": torch.zeros(0), "ü\n": torch.ones(2).bfloat16()}
    files = {
        "safetensors": safetensors.torch.save(state, {"format": "pt"}),
        "tied": save_fsd({"x": state["a"], "y": state["a"]}, format="safetensors"),
        "module": save_fsd(objects()["module"], format="safetensors"),
        "empty": safetensors.torch.save({}),
    }
    for name, file in files.items():
        yield "safetensors", name, file
        yield "safetensors", f"{name}.header", header_of(file)
        yield "reader", f"{name}.safetensors", file
        yield "open", f"{name}.safetensors", file
    for golden in sorted(GOLDEN.glob("*.fsd")):
        yield "reader", golden.name, golden.read_bytes()
    plain_zip = io.BytesIO()
    with zipfile.ZipFile(plain_zip, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", stream_of(save_torch({})))
        archive.writestr("a/code/x.py", "x" * 100)
    yield "zip", "deflated", plain_zip.getvalue()
    for name, obj in objects().items():
        file = save_fsd({"x": [obj]})
        count = struct.unpack_from("<I", file, 36)[0]
        for i in range(count):
            kind, _, at, size = struct.unpack_from("<IIQQ", file, 48 + 24 * i)
            if kind == 6:  # the tree
                yield "tree", name, file[at : at + size]
                yield "json", name, file[at : at + size]
    yield "json", "numbers", b'[1,-2.5e-3,1E400,0.1,123456789012345678901,"\\ud83d\\ude00\\n"]'
    index = {"metadata": {"total_size": 4}, "weight_map": {"a": "1.safetensors", "b": "2.pth"}}
    yield "index", "index", json.dumps(index).encode()
    attack.save_dcp(scratch)
    yield "dcp", "metadata", (scratch / ".metadata").read_bytes()
    yield "chunks", "chunks", (scratch / "__0_0.distcp").read_bytes()


def main():
    folder = Path(sys.argv[1])
    scratch = folder / "scratch"
    for target, name, content in seeds(scratch):
        (folder / target).mkdir(parents=True, exist_ok=True)
        (folder / target / name).write_bytes(content)
    for file in scratch.iterdir():
        file.unlink()
    scratch.rmdir()


if __name__ == "__main__":
    main()
