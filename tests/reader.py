"""A second reader of .fsd files, made from docs/FORMAT.md alone; the tests hold the core to it."""
# ruff: noqa: PT018, SIM905 - an assertion holds the rules that belong together

import base64
import json
import math
from collections import OrderedDict, namedtuple
from struct import error, iter_unpack, unpack, unpack_from

File = namedtuple("File", "flags header sections storages tensors devices tree state metadata")
Storage = namedtuple("Storage", "offset bytes crc32c device flags data")
Tensor = namedtuple("Tensor", "name dtype shape stride start flags same_as storage")
Node = namedtuple("Node", "kind value")  # what a tree can say and the standard library cannot
NAMES = """bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 bfloat16 float32 float64
complex32 complex64 complex128 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz
float8_e8m0fnu float4_e2m1fn_x2 bits8 bits16 bits1x8 bits2x4 bits4x2 int1 int2 int3 int4 int5 int6
int7 uint1 uint2 uint3 uint4 uint5 uint6 uint7"""
SIZES = [1, 1, 1, 2, 2, 4, 4, 8, 8, 2, 2, 4, 8, 4, 8, 16, *[1] * 7, 2, *[1] * 17]
DTYPES = dict(enumerate(zip(NAMES.split(), SIZES, strict=True), 1))
KINDS = {"$tuple": tuple, "$set": set, "$frozenset": frozenset, "$OrderedDict": OrderedDict}
KINDS |= {"$dict": dict, "$bytes": lambda x: base64.b64decode(x, validate=True)}
KINDS |= {"$int": lambda x: int(x, 16), "$bytearray": lambda x: bytearray(KINDS["$bytes"](x))}
KINDS |= {"$float": lambda x: unpack(">d", bytes.fromhex(x))[0]}
KINDS |= {"$str": lambda x: KINDS["$bytes"](x).decode("utf-8", "surrogatepass")}
KINDS |= {"$complex": lambda x: complex(*map(KINDS["$float"], x))}
NODES = "tensor ndarray numpy Size return_type dtype layout memory_format device attributes".split()
BAD = AssertionError, AttributeError, LookupError, RuntimeError, TypeError, error
TABLE = range(256)
for _ in range(8):
    TABLE = [c >> 1 ^ (c & 1) * 0x82F63B78 for c in TABLE]


def crc32c(data, crc=0xFFFFFFFF):
    for byte in data:
        crc = crc >> 8 ^ TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def decode(text, tensors=0, plain=True):
    own = KINDS | {"$def": lambda x: own.setdefault(x[0] + 0, x[1]), "$ref": lambda k: own[k + 0]}

    def go(j, plain=False):  # plain: an object that stands for itself, whatever its keys are
        assert type(j) is not int or abs(j) < 2**53, j
        if type(j) is not dict:
            return [go(x) for x in j] if type(j) is list else j
        if plain or len(j) != 1 or min(j)[:1] != "$":
            return {k: go(v) for k, v in j.items()}
        kind, x = min(j), go(j[min(j)], plain=True)
        n = {"$tensor": [x], "$ndarray": x}.get(kind, [...])[0]
        assert n is ... or (type(n) is int and 0 <= n < tensors), (kind, n)
        x = tuple(x) if type(x) is list else x  # so that it can be in a set
        return own[kind](x) if kind in own else Node(NODES[NODES.index(kind[1:])], x)

    return go(json.loads(text.decode(), parse_constant=int), plain)  # int("NaN") raises


def check(data):
    magic, major, _, crc, header, size, flags, count, zero = unpack_from("<8sHHIQQIIQ", data)
    assert magic == b"\x8fFSD\r\n\x1a\n" and major == 1 and flags < 2**16 and not zero, flags
    assert header % 4096 == 0 < header <= min(size, 2**30) and size == len(data), len(data)
    assert crc == crc32c(data[:12] + bytes(4) + data[16:header]) and count <= 64, count
    parts, last, end, named, dimmed = dict.fromkeys(range(1, 6), b""), -1, 48 + 24 * count, 0, 0
    for kind, bits, at, n in iter_unpack("<IIQQ", data[48:end]):
        assert kind > last and bits < (2 if kind < 9 else 1), (kind, bits)
        assert at == end + -end % 8 and n <= header - at and not any(data[end:at]), (kind, at, n)
        parts[kind], last, end = data[at : at + n], kind, at + n
    assert header - end < 4096 and not any(data[end:header]) and not {6, 7} <= {*parts}, end
    devices = [n.rstrip(b"\0").decode() for (n,) in iter_unpack("32s", parts[5])]
    assert all(d and "\0" not in d for d in devices) and len(devices) < 65536, devices
    dims, end, storages, views = unpack(f"<{len(parts[3]) // 8}q", parts[3]), header, [], []
    for at, n, crc, device, bits, zero in iter_unpack("<QQIHHQ", parts[1]):
        found = b"" if bits & 2 else data[at : at + n]
        assert at == end + -end % 256 and n < 2**63 and not any(data[end:at]) and not zero, at
        assert devices[device] and bits < 4 and crc == (crc32c(found) if bits & 1 else 0), crc
        storages.append(Storage(at, n, crc, device, bits, found))
        end = at + n if n and not bits & 2 else end
    for at, dim, start, n, of, same, code, bits, rank, zero in iter_unpack("<3Q3I2H2I", parts[2]):
        assert at == named and dim == dimmed and n <= 65536 and rank <= 64 and not zero, named
        named, dimmed, (dtype, item) = named + n, dimmed + 2 * rank, DTYPES[code]
        name, s = parts[4][at:named].decode(), dims[dim:dimmed]
        reach = 1 + sum((s[i] - 1) * s[rank + i] for i in range(rank)) if all(s[:rank]) else 0
        assert min(s, default=0) >= 0 and (start + reach) * item <= storages[of].bytes, name
        assert math.prod(n for n in s[:rank] if n) * item < 2**63 and bits < 32, named
        views.append(Tensor(name, dtype, s[:rank], s[rank:], start, bits, same, of))
        assert views[same].same_as == same and views[same][1:] == views[-1][1:], named
    assert [named, dimmed, end] == [*map(len, (parts[4], dims, data))], (named, dimmed, end)
    assert {v.storage for v in views} == {*range(len(storages))}, "a storage that nothing views"
    assert len({v.name for v in views}) == len(views) <= 2**24, "a name twice"
    tree = decode(parts.get(6, b"null"), len(views), plain=False)
    state, metadata = decode(parts.get(7, b"{}")), decode(parts.get(8, b"{}"))
    assert type(state) is dict and {*map(type, metadata.values())} <= {str}, metadata
    return File(flags, header, parts, storages, views, devices, tree, state, metadata)


def read(data):
    try:
        return check(data)
    except BAD as fault:
        raise ValueError("not as docs/FORMAT.md has it") from fault
