"""The core's CRC-32 against zlib's."""

import zlib

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
