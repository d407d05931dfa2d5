"""fastsd: the fastest safe way to keep PyTorch weights in a file."""

from fastsd.api import get_unsafe_globals_in_checkpoint, load, load_into, open, save
from fastsd.archive import Archive, TensorInfo, TensorSlice, Verification
from fastsd.convert import Report, convert
from fastsd.errors import (
    ChecksumError,
    DeviceError,
    EmptyError,
    FastsdError,
    FormatError,
    LimitError,
    NamesError,
    TruncatedError,
    UnsupportedError,
    VersionError,
)

__version__ = "0.1.0"

__all__ = [
    "Archive",
    "ChecksumError",
    "DeviceError",
    "EmptyError",
    "FastsdError",
    "FormatError",
    "LimitError",
    "NamesError",
    "Report",
    "TensorInfo",
    "TensorSlice",
    "TruncatedError",
    "UnsupportedError",
    "Verification",
    "VersionError",
    "convert",
    "get_unsafe_globals_in_checkpoint",
    "load",
    "load_into",
    "open",
    "save",
]
