"""What torch itself has to read: files of releases before 1.6, tar files, TorchScript archives; and
plain pickles, which are read only on trust."""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable
from typing import IO, Any

import torch
from torch import serialization

from fastsd import _core, pickled
from fastsd.errors import FastsdError, FormatError, TruncatedError, UnsupportedError
from fastsd.files import Source
from fastsd.formats import legacy

_PICKLES_BEFORE_THE_OBJECT = 3  # torch's magic number, its protocol, the machine
# What else an error has come through is a class, or a map_location, and that has its own to say.
_READING = {"torch", "fastsd", "tarfile", "contextlib", "collections"}
# Where torch says that there is no such device here, or that it will not do as it is asked to.
_NO_FAULT_OF_THE_FILE = (
    "deserialize object",
    "restore data location",
    "Cannot use",
    "map_location",
)


def load(source: Source, map_location: Any, how: pickled.Unpickling) -> Any:
    """The object that torch, or for a plain pickle Python, finds in it.

    Raises FormatError for a file that is damaged, and for a plain pickle that is not trusted;
    UnpicklingError for what the restricted unpickler does not allow; what torch.load raises where
    that is no fault of the file's, and what classes and a ``map_location`` raise.
    """
    is_restricted = pickled.is_restricted(how)
    read = _find_read(source, map_location, how, is_restricted)
    try:
        with source.open_stream() as stream:
            return read(stream)
    except (FastsdError, MemoryError, OSError):
        raise
    except Exception as error:
        if _READING.issuperset(name.partition(".")[0] for name in pickled.find_modules(error)):
            _raise_anew(error, source.name, is_restricted)
        raise


def _find_read(
    source: Source, map_location: Any, how: pickled.Unpickling, is_restricted: bool
) -> Callable[[IO[bytes]], Any]:
    first = source.peek()
    if legacy.is_plain_pickle(first):
        if is_restricted:
            raise FormatError(
                "it is a pickle that torch.save did not write, and reading it may run any code: "
                "pass weights_only=False only if you trust its source",
                path=source.name,
            )
        return lambda stream: (how.pickle_module or pickle).load(stream, **how.load_args)
    if not is_restricted:
        options = {"pickle_module": how.pickle_module, "weights_only": False, **how.load_args}
        return lambda stream: torch.load(stream, map_location, mmap=False, **options)
    if legacy.is_pickle(first):
        return lambda stream: _load_restricted(stream, map_location)
    return lambda stream: torch.load(stream, map_location, weights_only=True, mmap=False)


def _raise_anew(error: Exception, path: str, is_restricted: bool) -> None:
    """Raises an error of torch's with the file's name, as an error of the file's if it is one."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, EOFError) or "EOF" in text or "truncated" in text:
        raise TruncatedError(f"it was cut: {text}", path=path) from error
    if isinstance(error, pickle.UnpicklingError) and is_restricted:
        raise pickle.UnpicklingError(pickled.explain(path, str(error))) from None
    if isinstance(error, ImportError) or "Can't get attribute" in text:
        return  # a class that is not here
    if isinstance(error, RuntimeError) and any(part in text for part in _NO_FAULT_OF_THE_FILE):
        raise type(error)(f"{path}: {error}") from error
    raise FormatError(f"it is damaged: {text}", path=path) from error


def find_unsafe_globals(source: Source) -> list[str]:
    """See `pickled.find_unsafe_globals`. Raises UnsupportedError for what is not in pickles."""
    first = source.peek()
    if not legacy.is_pickle(first):
        raise UnsupportedError(
            "only torch can say what a file of this kind needs", path=source.name
        )
    try:
        with source.open_stream() as stream:
            for _ in range(0 if legacy.is_plain_pickle(first) else _PICKLES_BEFORE_THE_OBJECT):
                _read_pickle(stream)
            text = _read_pickle(stream)
    except (EOFError, pickle.UnpicklingError) as error:
        raise pickle.UnpicklingError(f"{source.name}: {error}") from None
    return pickled.find_unsafe_globals(text, source.name)


# ---- The restricted unpickler, over files of several pickles ----


def _load_restricted(stream: IO[bytes], map_location: Any) -> Any:
    """What torch.load does with a file of before 1.6, and the checks that it leaves out."""
    begin = stream.tell()
    while True:
        stream.seek(begin)
        sparse = pickled.SparseTensors()
        module = pickled.make_restricted_module(sparse.extend, _check_pickle)
        try:
            obj = serialization._legacy_load(stream, map_location, module, encoding="utf-8")
            sparse.check()  # now that their storages have been read
            return obj
        except pickled.ListClearedError:
            pass


def _check_pickle(file: IO[bytes]) -> None:
    """That the pickle that comes next ends, and is none that would end the process."""
    begin = file.tell()
    problem = _core.find_bad_nesting(_read_pickle(file))
    file.seek(begin)
    if problem:
        raise pickle.UnpicklingError(problem)


def _read_pickle(file: IO[bytes]) -> bytes:
    """The bytes of the pickle that comes next. Raises EOFError and UnpicklingError."""
    begin = file.tell()
    try:
        for _ in pickletools.genops(file):
            pass
    except Exception as error:
        if not file.read(1):
            raise EOFError(f"{error}") from None
        raise pickle.UnpicklingError(f"{error}") from None
    end = file.tell()
    file.seek(begin)
    return file.read(end - begin)
