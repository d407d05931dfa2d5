"""From opened files to the object that was saved, or to what is chosen of it."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from fastsd import _core, pickled, tree
from fastsd.archive import load_tensors
from fastsd.errors import FormatError, UnsupportedError
from fastsd.formats import fsd
from fastsd.names import Choice, NameRules
from fastsd.placement import place_storages
from fastsd.upload import Passage

Numbers = list[int] | None
"""Of the tensors in a file that were loaded; None: all."""


def restore(
    readers: Sequence[_core.Reader],
    map_location: Any,
    how: pickled.Unpickling,
    rules: NameRules | None = None,
    passage: Passage | None = None,
) -> tuple[Any, list[Numbers]]:
    """What is in the files, which are one archive, and of each the numbers of its tensors.

    Raises FormatError, NamesError, DeviceError, UnsupportedError for a `Passage.dtype` that cannot
    be had, and what torch raises for a pickle or a ``map_location``.
    """
    passage = passage or Passage()
    if rules is None or any(needs_unpickling(reader, how) for reader in readers):
        parts = [_restore_whole(reader, map_location, how, passage) for reader in readers]
        obj = _merge(parts, readers)
        chosen = pickled.choose(obj, rules, readers[0].name) if rules else obj
        return chosen, [None] * len(readers)
    names = [name for reader in readers for name in reader.names()]
    choices = _split(rules.choose(names, readers[0].name), readers)
    parts = [
        _restore_chosen(reader, map_location, choice, passage)
        for reader, choice in zip(readers, choices, strict=True)
    ]
    return _merge(parts, readers), [choice.numbers for choice in choices]


def restore_partly(reader: _core.Reader) -> Any:
    """What a pickle holds as far as it can be told without unpickling, with `tree.Opaque` in the
    place of the rest; None if nothing can be told. Raises FormatError."""
    text = reader.section(fsd.Section.TREE)
    if text is None:
        return None
    return tree.restore_partly(text, list(load_tensors(reader).values()))


def needs_unpickling(reader: _core.Reader, how: pickled.Unpickling) -> bool:
    """Whether an unpickler has to read it: a plain pickle only if another one than Python's is
    asked for, or with other arguments."""
    if not reader.is_plain or pickled.is_turned_by_default(reader):
        return True
    is_special = how.pickle_module is not None or bool(how.load_args)
    return is_special and reader.section(fsd.Section.PICKLE) is not None


def _merge(objects: list[Any], readers: Sequence[_core.Reader]) -> Any:
    """One dictionary of several; of one file what is in it, whatever that is."""
    if len(objects) == 1:
        return objects[0]
    merged: dict[Any, Any] = {}
    for obj, reader in zip(objects, readers, strict=True):
        if not isinstance(obj, dict):
            raise FormatError(f"a shard that holds a {type(obj).__name__}", path=reader.name)
        merged.update(obj)
    return merged


def _split(choice: Choice, readers: Sequence[_core.Reader]) -> list[Choice]:
    """A choice of the names of all files: the part of each."""
    parts = []
    first = 0
    for reader in readers:
        end = first + reader.tensor_count
        own = slice(bisect_left(choice.numbers, first), bisect_left(choice.numbers, end))
        numbers = [number - first for number in choice.numbers[own]]
        parts.append(replace(choice, numbers=numbers, names=choice.names[own]))
        first = end
    return parts


def _restore_whole(
    reader: _core.Reader, map_location: Any, how: pickled.Unpickling, passage: Passage
) -> Any:
    if needs_unpickling(reader, how):
        if passage.dtype is not None:
            raise UnsupportedError(
                "dtype is for files of plain data; this one has to be unpickled: load it, and cast "
                "what it holds, or have fastsd.convert do so",
                path=reader.name,
            )
        stream = reader.section(fsd.Section.PICKLE)
        assert stream is not None
        return pickled.load(reader, stream, map_location, how)
    with _naming(reader):
        return _restore_plain(reader, map_location, passage)


@contextmanager
def _naming(reader: _core.Reader) -> Iterator[None]:
    """Errors of the format name the file; those of a ``map_location`` are torch's own."""
    try:
        yield
    except FormatError as error:
        error.path = reader.name
        raise


def _restore_plain(reader: _core.Reader, map_location: Any, passage: Passage) -> Any:
    """The plain object that was saved."""
    text = reader.section(fsd.Section.TREE)
    if text is not None:
        return tree.restore_tree(text, list(_load(reader, map_location, None, passage).values()))
    metadata = tree.restore_metadata(reader.section(fsd.Section.STATE_METADATA))
    is_ordered = metadata is not None or bool(reader.file_flags & fsd.ROOT_IS_ORDERED_DICT)
    tensors = _load(reader, map_location, None, passage, is_ordered=is_ordered)
    return tree.restore_flat(tensors, metadata)


def _load(
    reader: _core.Reader,
    map_location: Any,
    numbers: Numbers,
    passage: Passage,
    *,
    is_ordered: bool = False,
) -> dict[str, torch.Tensor]:
    placed = place_storages(reader, map_location, numbers, passage)
    return load_tensors(reader, placed, numbers, is_ordered=is_ordered, passage=passage)


def _restore_chosen(
    reader: _core.Reader, map_location: Any, choice: Choice, passage: Passage
) -> dict[str, torch.Tensor]:
    """Chosen tensors under their new names, with the `_metadata` of their modules."""
    with _naming(reader):
        tensors = _load(reader, map_location, choice.numbers, passage)
    text = reader.section(fsd.Section.TREE)
    prefix = choice.rules.prefix
    if text is None:
        metadata = tree.restore_metadata(reader.section(fsd.Section.STATE_METADATA))
    else:
        metadata, prefix = tree.find_metadata(text, prefix, reader.tensor_count)
    metadata = choice.rules.rename_modules(metadata, prefix)
    is_ordered = metadata is not None or bool(reader.file_flags & fsd.ROOT_IS_ORDERED_DICT)
    by_name = zip(choice.names, tensors.values(), strict=True)
    return tree.restore_flat(OrderedDict(by_name) if is_ordered else dict(by_name), metadata)
