"""One checkpoint from any format that can be read to any that can be written: `convert`."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from fastsd import _core, pickled
from fastsd.archive import Archive
from fastsd.errors import ChecksumError, NamesError, UnsupportedError
from fastsd.files import encode_path
from fastsd.formats import dcp, fsd
from fastsd.formats.detect import open_any
from fastsd.layouts import Layout
from fastsd.restore import restore, restore_partly, restore_through_torch
from fastsd.saving import Format, make_plan, plan_pickled, write
from fastsd.shards import write_sharded
from fastsd.tensors import CPU
from fastsd.transform import (
    Caster,
    arrays_to_tensors,
    describe,
    directory_of,
    drop_keys,
    find_opaque,
    pick_part,
    strip_prefix,
)
from fastsd.to_safetensors import FRAMEWORK, find_problems
from fastsd.tree import flatten

_SUFFIXES: dict[str, Format] = {
    ".fsd": "fsd",
    ".safetensors": "safetensors",
    **dict.fromkeys((".pth", ".pt", ".bin", ".ckpt"), "pth"),
}
_COMPARED_BYTES = 32 << 20  # of two tensors at a time


@dataclass(frozen=True)
class Report:
    """What one conversion did.

    ``source`` and ``target`` are paths, the bytes those of all their files. ``layout`` is what the
    source was recognised as ("flat", "lightning"...; "carried" for a pickle that nobody looked
    into), ``picked`` the key of the part that was taken, None for all of it. ``dropped`` says what
    of the source is not in the target, and why. ``verified``: None if it was not asked for.
    """

    source: str
    target: str
    source_nbytes: int
    target_nbytes: int
    tensors: int
    layout: str
    picked: str | None
    dropped: tuple[str, ...]
    verified: bool | None


class _Changes(NamedTuple):
    """What is to become of the object on the way."""

    pick: str | None
    strip_prefix: str | None
    dtype: torch.dtype | None
    drop_optimizer: bool


_NO_CHANGES = _Changes(None, None, None, False)


class _Content(NamedTuple):
    """What is to be written: an object, or a pickle as it is, with its storages."""

    obj: Any
    layout: str
    picked: str | None = None
    dropped: tuple[str, ...] = ()
    carried: pickled.Pickled | None = None

    def without(self, *what: str) -> _Content:
        """The same, and what is missing of it."""
        return self._replace(dropped=(*self.dropped, *what))


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: Format | None = None,
    pick: str | None = None,
    strip_prefix: str | None = None,
    dtype: torch.dtype | None = None,
    drop_optimizer: bool = False,
    metadata: Mapping[str, str] | None = None,
    max_shard_size: int | str | None = None,
    trust: bool = False,
    verify: bool = False,
    lossy: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Converts a checkpoint. Nothing is unpickled for it unless that is the only way.

    Args:
        source: Whatever `load` reads (a file of any format, a directory or index of shards), or a
            directory of torch.distributed.checkpoint.
        target: A path, which is replaced as `save` does; with ``max_shard_size`` a directory.
        to: The format. None: as the target's suffix says (.fsd; .safetensors; .pth, .pt, .bin and
            .ckpt for "pth").
        pick: The part to take: keys on the way to it, joined by dots, or "auto" for the weights of
            the layouts that are known (see `fastsd.layouts`). None takes all of it, or for
            safetensors, which holds flat dictionaries only, "auto" where that is needed. Of a
            module its state_dict is taken.
        strip_prefix: What keys lose at their start, of the dictionary that is taken.
        dtype: Floating point tensors are cast to this; float8 and narrower stay as they are.
        drop_optimizer: Leave out the state of optimizers, schedulers and gradient scalers.
        metadata: In place of the source's own; None keeps those.
        max_shard_size: Write several files of at most so many bytes ("5GB", as huggingface_hub
            reads it) and an index; for flat dictionaries of tensors.
        trust: Where it has to be, unpickle without restrictions, so that the source may run any
            code.
        verify: Read both sides again and compare every tensor, bit by bit.
        lossy: Leave out what the target cannot hold, and report it, rather than raise an error.
        progress: Called with numbers of bytes of the source as they are done.

    A pickle that is more than plain data goes from "pth" to "fsd" and back as it is: the stream and
    the storages, bit for bit. Memory: what lies in mapped files is written from there, and cast in
    nameless files beside the target, so that some 100 MiB are enough whatever the size; sources
    that torch has to read (files of before 1.6, tar files, checkpoints of
    torch.distributed.checkpoint, trusted pickles) are loaded whole.

    Raises what `load` and `save` raise: UnsupportedError, which names each key, for what the target
    cannot hold, pickle.UnpicklingError for what needs ``trust``; and ChecksumError if what was
    verified differs.
    """
    path, target = os.fspath(source), os.fspath(target)
    format_ = to or _find_format(target, max_shard_size)
    changes = _Changes(pick, strip_prefix, dtype, drop_optimizer)
    with _open(path, trust) as opened:
        content = _read(opened, path, format_, changes, trust)
        content = _drop_unheld(content, format_, path, lossy)
        own = _find_metadata(opened.readers, format_) if metadata is None else dict(metadata)
        if format_ == "pth" and own and lossy:
            names = ", ".join(own)
            content = content.without(f"metadata {names}: pth has no place for them")
            own = {}
        if dtype is not None:
            caster = Caster(dtype, directory_of(target), opened.readers)
            content = content._replace(obj=caster.cast(content.obj))
        _write(content, target, format_, own, max_shard_size, opened.readers, lossy)
        verified = _compare(content, target) if verify else None
    nbytes = size_of(path)
    if progress is not None:
        progress(nbytes)
    return Report(
        path,
        target,
        nbytes,
        size_of(target),
        _count_tensors(content),
        content.layout,
        content.picked,
        content.dropped,
        verified,
    )


def _find_format(target: str, max_shard_size: int | str | None) -> Format:
    suffix = os.path.splitext(target)[1]
    if suffix in _SUFFIXES and max_shard_size is None:
        return _SUFFIXES[suffix]
    known = ", ".join(_SUFFIXES)
    raise ValueError(f"name the format with to=...: {target!r} does not end in one of {known}")


def size_of(path: str) -> int:
    """Bytes of a file, or of all files below a directory."""
    if not os.path.isdir(path):
        return os.path.getsize(path)
    found = (os.path.join(root, name) for root, _, names in os.walk(path) for name in names)
    return sum(map(os.path.getsize, found))


# ---- Reading ----


class _Source(NamedTuple):
    """A source that is open: readers, or a function that loads all of it."""

    readers: list[_core.Reader]
    load: Callable[[], Any] | None = None


@contextmanager
def _open(path: str, trust: bool) -> Iterator[_Source]:
    if os.path.isfile(os.path.join(path, dcp.METADATA_NAME)):
        yield _Source([], lambda: dcp.read_dcp(path, trust))
        return
    with open_any(path, True) as opened:
        stream = opened.source
        if stream is None:
            yield _Source(opened.readers)
        else:
            how = pickled.Unpickling(weights_only=not trust)
            yield _Source([], lambda: restore_through_torch(stream, CPU, how))


def _read(
    source: _Source, path: str, format: Format, changes: _Changes, trust: bool
) -> _Content:
    if source.load is not None:
        return _change(source.load(), path, format, changes)
    readers = source.readers
    if all(reader.is_plain for reader in readers):
        return _change(_restore(readers, None), path, format, changes)
    if changes == _NO_CHANGES and len(readers) == 1:
        carried = _carry(readers[0], format)
        if carried is not None:
            return _Content(None, "carried", carried=carried)
    return _read_pickle(readers, path, format, changes, trust)


def _restore(readers: list[_core.Reader], weights_only: bool | None) -> Any:
    return restore(readers, CPU, pickled.Unpickling(weights_only))[0]


def _carry(reader: _core.Reader, format: Format) -> pickled.Pickled | None:
    """A pickle as it is; None if the format cannot hold it."""
    stream = reader.section(fsd.Section.PICKLE)
    order = reader.section(fsd.Section.BYTE_ORDER) or b"little"
    if stream is None or format == "safetensors" or (format == "fsd" and order != b"little"):
        return None
    storages = reader.load_storages()
    return pickled.Pickled(stream, storages, pickled.wrap_stream(stream, order.decode()))


def _read_pickle(
    readers: list[_core.Reader], path: str, format: Format, changes: _Changes, trust: bool
) -> _Content:
    """What is taken of it may be plain; if it is not, torch's restricted unpickler may know it."""
    partial = restore_partly(readers[0]) if len(readers) == 1 else None
    if partial is not None:
        try:
            content = _change(partial, path, format, changes)
        except NamesError:
            content = _Content(None, "")  # perhaps in what is not known yet
        if content.obj is not None and not find_opaque(content.obj):
            return content
    try:
        obj = _restore(readers, True)
    except pickle.UnpicklingError:
        if not trust:
            raise
        obj = _restore(readers, False)
    return _change(obj, path, format, changes)


# ---- Changing ----


def _change(obj: Any, path: str, format: Format, changes: _Changes) -> _Content:
    """The part that is wanted, under its names; tensors are cast later."""
    layout = describe(obj)
    dropped: list[str] = []
    picked = _find_pick(obj, layout, format, changes.pick)
    if changes.drop_optimizer and picked is None:
        obj = drop_keys(obj, layout.optimizer)
        dropped += [f"{key}: state of an optimizer" for key in layout.optimizer]
    if picked is not None:
        top = picked if picked in obj else picked.partition(".")[0]
        dropped += [f"{key}: not in {picked!r}" for key in obj if key != top]
        obj = pick_part(obj, picked, path)
    if changes.strip_prefix:
        obj = strip_prefix(obj, changes.strip_prefix, path)
    if format == "safetensors":
        obj = arrays_to_tensors(obj)
    return _Content(obj, layout.name, picked, tuple(map(str, dropped)))


def _find_pick(obj: Any, layout: Layout, format: Format, pick: str | None) -> str | None:
    if pick not in (None, "auto"):
        return pick
    return layout.pick if pick == "auto" or format == "safetensors" else None


def _drop_unheld(content: _Content, format: Format, path: str, lossy: bool) -> _Content:
    """Without what the target cannot hold, where that was asked for."""
    if not lossy or format != "safetensors" or not isinstance(content.obj, Mapping):
        return content
    problems = find_problems(content.obj)
    kept = drop_keys(content.obj, tuple(problems))
    return content._replace(obj=kept).without(*(f"{k}: {why}" for k, why in problems.items()))


def _find_metadata(readers: list[_core.Reader], format: Format) -> dict[str, str]:
    """The sources' own strings, without what safetensors files have to say."""
    merged: dict[str, str] = {}
    for reader in readers:
        merged.update(fsd.decode_metadata(reader))
    if format != "safetensors":
        for key, value in FRAMEWORK.items():
            if merged.get(key) == value:
                del merged[key]
    return merged


# ---- Writing ----


def _write(
    content: _Content,
    target: str,
    format: Format,
    metadata: dict[str, str],
    max_shard_size: int | str | None,
    readers: list[_core.Reader],
    lossy: bool,
) -> None:
    if max_shard_size is not None:
        write_sharded(
            content.obj, target, format, max_shard_size, metadata=metadata, lossy=lossy, dropped=readers
        )
        return
    path = encode_path(target)
    if content.carried is not None:
        plan = plan_pickled(content.carried, format, path, metadata)
    else:
        plan = make_plan(content.obj, format, path, metadata, lossy=lossy)
    write(plan, path, dropped=readers)


def _count_tensors(content: _Content) -> int:
    if content.carried is not None:
        return len(content.carried.storages)
    try:
        return len(flatten(content.obj).names)
    except UnsupportedError:
        return 0


# ---- Verifying ----


def _compare(content: _Content, target: str) -> bool:
    """Whether every tensor of the target has the bytes that were to be written.

    Raises ChecksumError for those that have not.
    """
    with open_any(target, True) as opened:
        if content.carried is not None:
            found = opened.readers[0].load_storages()
            wanted: Mapping[str, torch.Tensor] = content.carried.storages
        else:
            found = dict(Archive(opened.readers, {}))
            flat = flatten(content.obj)
            wanted = dict(zip(flat.names, flat.tensors, strict=True))
        different = [name for name in wanted if not _is_same(wanted[name], found.get(name))]
    if different or len(found) < len(wanted):
        raise ChecksumError(
            f"{len(different)} tensors are not as in the source: {', '.join(different[:10])}",
            path=target,
            tensors=tuple(different),
        )
    return True


def _is_same(wanted: Any, found: torch.Tensor | None) -> bool:
    tensor = torch.from_numpy(wanted) if isinstance(wanted, np.ndarray) else wanted
    if found is None or found.dtype != tensor.dtype or found.shape != tensor.shape:
        return False
    return all(
        torch.equal(a, b) for a, b in zip(_list_bytes(tensor), _list_bytes(found), strict=True)
    )


def _list_bytes(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The values as bytes, piece by piece."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    yield from flat.view(torch.uint8).split(_COMPARED_BYTES)
