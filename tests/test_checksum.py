"""The core's checksums against others: zlib's CRC-32, and CRC32C by its definition."""

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsd import _core


@given(data=st.binary(max_size=3000), value=st.integers(0, 2**32 - 1))
def test_crc32_is_that_of_zlib(data, value):
    assert _core.crc32(data, value) == zlib.crc32(data, value)


def test_crc32_of_long_runs_is_that_of_zlib():
    data = bytes(range(251)) * 5000
    for begin, end in ((0, None), (1, None), (3, -7), (100, 90_001)):
        assert _core.crc32(data[begin:end]) == zlib.crc32(data[begin:end])
    assert _core.CRC32_IMPLEMENTATION in ("pclmulqdq", "armv8", "portable")


def crc32c_by_definition(data, value=0):
    """A bit at a time: the reflected polynomial of RFC 3720, appendix B.4."""
    state = value ^ 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (state & 1) * 0x82F63B78
    return state ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
        (
            bytes.fromhex(
                "01c00000" "00000000" "00000000" "00000000" "14000000" "00000400"
                "00000014" "00000018" "28000000" "00000000" "02000000" "00000000"
            ),
            0xD9963A56,
        ),
    ],
)  # fmt: skip
def test_crc32c_of_the_examples_of_rfc_3720(data, crc):
    assert _core.crc32c(data) == crc32c_by_definition(data) == crc


@given(data=st.binary(max_size=2000), begin=st.integers(0, 70), value=st.integers(0, 2**32 - 1))
def test_crc32c_is_as_defined_at_any_address(data, begin, value):
    part = memoryview(bytes(begin) + data)[begin:]
    assert _core.crc32c(part, value) == crc32c_by_definition(data, value)
    assert _core.crc32(part, value) == zlib.crc32(data, value)


@given(data=st.binary(max_size=2000), places=st.lists(st.integers(0, 2000)))
def test_crcs_of_parts_are_those_of_the_whole(data, places):
    ends = [*sorted(places), len(data)]
    for crc in (_core.crc32c, _core.crc32):
        value, begin = 0, 0
        for end in ends:
            value = crc(data[begin:end], value)
            begin = min(end, len(data))
        assert value == crc(data)
