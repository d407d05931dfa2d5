"""What a source has to give to a conversion: an object, or a pickle that is carried over."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from fastsd import _core, pickled, through_torch
from fastsd.api import get_unsafe_globals_in_checkpoint
from fastsd.formats import dcp, fsd
from fastsd.formats.detect import open_any
from fastsd.layouts import Layout
from fastsd.pieces import list_mapped
from fastsd.restore import restore, restore_partly
from fastsd.saving import Format
from fastsd.tensors import CPU
from fastsd.transform import (
    OpaqueError,
    arrays_to_tensors,
    describe,
    drop_keys,
    find_opaque,
    pick_part,
    strip_prefix,
)


class Changes(NamedTuple):
    """What is to become of the object on the way: arguments of `convert`."""

    pick: str | None = None
    strip_prefix: str | None = None
    drop_optimizer: bool = False


class Content(NamedTuple):
    """What is to be written: an object, or a pickle as it is, with its storages.

    ``is_edited``: memory that a file is mapped to may differ from the file.
    """

    obj: Any
    layout: str
    picked: str | None = None
    dropped: tuple[str, ...] = ()
    carried: pickled.Pickled | None = None
    is_edited: bool = False


class Source(NamedTuple):
    """A source that is open: readers, or a function that loads all of it."""

    path: str
    files: list[str]
    readers: list[_core.Reader]
    mapped: list[_core.MappedFile]
    load: Callable[[], Any] | None = None


@contextmanager
def open_source(path: str, *, trust: bool) -> Iterator[Source]:
    """Opens whatever can be converted. Raises what `fastsd.load` raises."""
    if os.path.isfile(os.path.join(path, dcp.METADATA_NAME)):
        files = [str(file) for file in Path(path).rglob("*") if file.is_file()]
        yield Source(path, files, [], [], lambda: dcp.read_dcp(path, trust))
        return
    with open_any(path, True) as opened:
        stream = opened.source
        if stream is None:
            files = [reader.name for reader in opened.readers]
            yield Source(path, files, opened.readers, list_mapped(opened.readers))
        else:
            how = pickled.Unpickling(weights_only=not trust)
            load = lambda: through_torch.load(stream, CPU, how)  # noqa: E731
            yield Source(path, [path], [], [], load)


def read_content(
    source: Source, format: Format, changes: Changes, *, carries: bool, trust: bool
) -> Content:
    """Reads what is to be written. ``carries``: a pickle may stay as it is.

    Raises NamesError, pickle.UnpicklingError for what needs ``trust``, and what `fastsd.load`
    raises.
    """
    readers = source.readers
    if source.load is None and all(reader.is_plain for reader in readers):
        return _change(_restore(readers, None), format, changes)
    if carries and changes == Changes() and len(readers) == 1:
        carried = _carry(readers[0], format)
        if carried is not None:
            return Content(None, "carried", carried=carried)
    content = _read_known(readers, format, changes)
    if content is not None:
        return content
    obj, is_edited = _unpickle(source, trust)
    return _change(obj, format, changes)._replace(is_edited=is_edited)


def _restore(readers: list[_core.Reader], weights_only: bool | None) -> Any:
    return restore(readers, CPU, pickled.Unpickling(weights_only))[0]


def _carry(reader: _core.Reader, format: Format) -> pickled.Pickled | None:
    """A pickle as it is; None if the format cannot hold it."""
    stream = reader.section(fsd.Section.PICKLE)
    order = reader.section(fsd.Section.BYTE_ORDER) or b"little"
    if stream is None or format == "safetensors" or (format == "fsd" and order != b"little"):
        return None
    storages = {k: tensor.untyped_storage() for k, tensor in reader.load_storages().items()}
    return pickled.Pickled(stream, storages, pickled.wrap_stream(stream, order.decode()))


def _read_known(readers: list[_core.Reader], format: Format, changes: Changes) -> Content | None:
    """What is taken of a pickle, if that is plain; None if it takes an unpickler."""
    partial = restore_partly(readers[0]) if len(readers) == 1 else None
    if partial is None:
        return None
    try:
        content = _change(partial, format, changes)
    except OpaqueError:
        return None
    return None if find_opaque(content.obj) else content


def _unpickle(source: Source, trust: bool) -> tuple[Any, bool]:
    """All of it, through torch's restricted unpickler or, where that refuses, on trust without
    restrictions; and whether memory that a file is mapped to may have been edited."""
    readers = source.readers
    is_swapped = any(map(_is_swapped, readers))
    try:
        if source.load is not None:
            return source.load(), False
        if not (trust and is_swapped):  # a second attempt would turn the bytes around again
            return _restore(readers, True), is_swapped
    except pickle.UnpicklingError as error:
        if not trust or source.load is not None:
            raise _explain(source, error) from error
    return _restore(readers, False), True  # by whatever code there is in it


def _is_swapped(reader: _core.Reader) -> bool:
    """Whether torch turns around the bytes of items as it unpickles, in memory."""
    return reader.section(fsd.Section.BYTE_ORDER) == b"big"


def _explain(source: Source, error: pickle.UnpicklingError) -> pickle.UnpicklingError:
    names: list[str] = []
    for path in source.files:
        with suppress(Exception):  # a pickle that cannot be walked
            names += get_unsafe_globals_in_checkpoint(path)
    wanted = f"it wants {', '.join(sorted(set(names)))}" if names else str(error)
    return pickle.UnpicklingError(
        f"{source.path}: cannot be unpickled safely: {wanted}. Pass trust=True only if you trust "
        "its source: it may then run any code"
    )


def _change(obj: Any, format: Format, changes: Changes) -> Content:
    """The part that is wanted, under its names; tensors are cast later."""
    layout = describe(obj)
    dropped: list[str] = []
    picked = _find_pick(layout, format, changes.pick)
    if changes.drop_optimizer and picked is None:
        obj = drop_keys(obj, layout.optimizer)
        dropped += [f"{key}: state of an optimizer" for key in layout.optimizer]
    if picked is not None:
        obj, left = pick_part(obj, picked)
        dropped += [f"{key}: not in {picked!r}" for key in left]
    if changes.strip_prefix:
        obj = strip_prefix(obj, changes.strip_prefix)
    if format == "safetensors":
        obj = arrays_to_tensors(obj)
    return Content(obj, layout.name, picked, tuple(dropped))


def _find_pick(layout: Layout, format: Format, pick: str | None) -> str | None:
    if pick not in (None, "auto"):
        return pick
    return layout.pick if pick == "auto" or format == "safetensors" else None
