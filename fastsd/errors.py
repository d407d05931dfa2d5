"""What can go wrong, beside the errors of the operating system (which stay ``OSError``).

FastsdError
├── FormatError            the bytes break a rule of the format, or are of another format
│   ├── TruncatedError     the file ends before what its header promises
│   │   └── EmptyError     there is nothing to read; an EOFError, too, as torch.load raises
│   ├── VersionError       written by a newer release, in a way that this one cannot read
│   └── LimitError         larger than a named limit of the format
├── ChecksumError          stored bytes are not what was written
├── DeviceError            a GPU, or what drives it, failed; a RuntimeError, too
├── NamesError             prefix, select or rename does not fit the names in the file
└── UnsupportedError       an object that cannot be saved, or a target that cannot be loaded into
"""

from __future__ import annotations


class FastsdError(Exception):
    """Base of all errors that fastsd raises itself.

    ``path`` is the file, or what was passed for one; empty where none is involved.
    """

    def __init__(self, detail: str, *, path: str = "") -> None:
        super().__init__(detail)
        self.detail = detail
        self.path = path

    def __str__(self) -> str:
        return f"{self.path}: {self.detail}" if self.path else self.detail


class FormatError(FastsdError):
    """The bytes break a rule of the format, or are of another format."""


class TruncatedError(FormatError):
    """The file ends before what its header promises: a download or copy that did not finish."""


class EmptyError(TruncatedError, EOFError):
    """There is nothing to read: the file is empty, or a file object is at its end."""


class VersionError(FormatError):
    """The file was written by a newer release, in a way that this one cannot read."""


class LimitError(FormatError):
    """Something is larger than a named limit of the format."""


class ChecksumError(FastsdError):
    """Stored bytes are not what was written. ``tensors`` names those that are affected."""

    def __init__(self, detail: str, *, path: str = "", tensors: tuple[str, ...] = ()) -> None:
        super().__init__(detail, path=path)
        self.tensors = tensors


class DeviceError(FastsdError, RuntimeError):
    """A GPU, or what drives it, failed; a RuntimeError, too."""


class NamesError(FastsdError, KeyError):
    """``prefix`` or ``select`` finds no name in the file, or ``rename`` makes two names one."""


class UnsupportedError(FastsdError, TypeError):
    """An object that cannot be saved, or a target that cannot be loaded into."""


class NotPlainError(UnsupportedError):
    """An object that the plain tree cannot hold. Private: `save` then pickles it."""
