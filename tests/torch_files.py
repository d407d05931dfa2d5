"""Torch's zip files, taken apart and put together again as other writers would."""

import io
import struct
import zipfile

import torch

ALIGN_BYTES = 64


def save(obj, **options):
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(obj, file, **options)
    return file.getvalue()


def unzip(data):
    """The records of a zip file, without the folder that they are in."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def zipped(records, folder="archive", align=ALIGN_BYTES, method=zipfile.ZIP_STORED, flags=0):
    """A zip file of records, each aligned as torch aligns them."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in records.items():
            entry = zipfile.ZipInfo(f"{folder}/{name}")
            entry.compress_type = method
            begin = file.tell() + 30 + len(entry.filename) + 4
            padding = -begin % align
            entry.extra = struct.pack("<HH", 0x4246, padding) + bytes(padding)
            archive.writestr(entry, data)
    data = bytearray(file.getvalue())
    for record in find_records(data) if flags else ():
        struct.pack_into("<H", data, record.central + 8, flags)
        struct.pack_into("<H", data, record.local + 6, flags)
    return bytes(data)


class Record:
    """Where a record and what is said of it lie in a zip file."""

    def __init__(self, data, central):
        (self.name_bytes,) = struct.unpack_from("<H", data, central + 28)
        self.central = central
        (self.local,) = struct.unpack_from("<I", data, central + 42)
        self.name = bytes(data[central + 46 : central + 46 + self.name_bytes]).decode()
        (self.nbytes,) = struct.unpack_from("<I", data, central + 20)
        own, extra = struct.unpack_from("<HH", data, self.local + 26)
        self.begin = self.local + 30 + own + extra


def find_records(data):
    found = []
    at = data.find(b"PK\1\2")
    while data[at : at + 4] == b"PK\1\2":
        found.append(Record(data, at))
        at += 46 + sum(struct.unpack_from("<HHH", data, at + 28))
    return found


def find_record(data, name):
    return next(record for record in find_records(data) if record.name.endswith(name))


def damage(data, at, change=1):
    """The bytes with one of them changed."""
    damaged = bytearray(data)
    damaged[at] ^= change
    return bytes(damaged)
