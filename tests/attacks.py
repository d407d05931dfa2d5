"""Files made to do harm: what the rows of tests/test_attacks.py are made of. Nothing here runs them."""

import io
import json
import os
import pickle
import struct
import zipfile

SIGNATURE = b"\x80\x02"  # protocol 2, which torch writes
CANARY = "canary"


class Exploit:
    """Pickled, it makes a directory where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (CANARY,)


EXPLOIT = pickle.dumps(Exploit(), 2)

# ---- Pickles, put together by hand ----


def number(n):
    data = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def name(dotted):
    module, _, last = dotted.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"


def call(dotted, *args):
    return name(dotted) + b"(" + b"".join(args) + b"tR"


def stream(*parts):
    return SIGNATURE + b"".join(parts) + b"."


def tensor(shape=(1,), stride=(1,), *, offset=0, key="0", count=1, kind="Float"):
    storage = b"(" + text("storage") + name(f"torch.{kind}Storage") + text(key) + text("cpu")
    storage += number(count) + b"tQ"
    hooks = call("collections.OrderedDict")
    rest = storage, number(offset), numbers(shape), numbers(stride), b"\x89", hooks
    return call("torch._utils._rebuild_tensor_v2", *rest)


# ---- Containers ----


def zipped(pickled, records=None, method=zipfile.ZIP_STORED, folder="archive/"):
    """A file as torch.save writes it; by default with one storage of four bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr(folder + "data.pkl", pickled)
        for record, content in (records or {"data/0": bytes(4)}).items():
            archive.writestr(folder + record, content)
    return bytearray(file.getvalue())


def central(data, record):
    """Where the directory of a zip file has its entry of a record."""
    at = data.find(b"PK\1\2")
    while data[at + 46 : at + 46 + data[at + 28]] != record.encode():
        at = data.index(b"PK\1\2", at + 1)
    return at


def with_directory(record, field, form, value):
    """A torch file, of which the directory says something else."""
    data = zipped(stream(tensor()))
    struct.pack_into(form, data, central(data, "archive/" + record) + field, value)
    return data


def overlapping(count=1000):
    """Many records of the directory that share one run of bytes: the zip bomb without nesting."""
    data = zipped(stream(b"N"), {"data/000": bytes(1000)})
    begin = data.index(b"PK\1\2")
    at = central(data, "archive/data/000")
    entry = data[at : data.index(b"PK\5\6")]
    entries = b"".join(entry.replace(b"data/000", b"data/%03d" % i) for i in range(count))
    grown = bytearray(data[:at] + entries)
    end = struct.pack(
        "<4s4H2IH", b"PK\5\6", 0, 0, count + 1, count + 1, len(grown) - begin, begin, 0
    )
    return grown + end


def safetensors(header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(begin, end, dtype="U8", shape=None):
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
