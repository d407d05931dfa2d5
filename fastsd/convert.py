"""One checkpoint from any format that can be read to any that can be written: `convert`."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastsd import _core, compare, pickled, shards, to_safetensors
from fastsd.cast import Caster
from fastsd.content import Changes, Content, Source, open_source, read_content
from fastsd.errors import FastsdError, FormatError, UnsupportedError
from fastsd.files import encode_path, is_stream_path
from fastsd.formats import fsd
from fastsd.saving import Format, make_plan, plan_pickled, write
from fastsd.transform import drop_keys
from fastsd.tree import flatten
from fastsd.upload import check_dtype

_SUFFIXES: dict[str, Format] = {
    ".fsd": "fsd",
    ".safetensors": "safetensors",
    **dict.fromkeys((".pth", ".pt", ".bin", ".ckpt"), "pth"),
}


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


class _Target(NamedTuple):
    """Where to write, and how: arguments of `convert`."""

    path: str
    format: Format
    metadata: dict[str, str]
    max_shard_size: int | None
    lossy: bool


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
    max_shard_size: int | None = None,
    trust: bool = False,
    verify: bool = False,
    lossy: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Converts a checkpoint. Nothing is unpickled for it unless that is the only way.

    Args:
        source: Whatever `load` reads (a file of any format, a directory or index of shards), or a
            directory of torch.distributed.checkpoint.
        target: A path, which is replaced as `save` does, all at once; it may be that of the source.
            With ``max_shard_size`` a directory, whose files do not replace any of the source's.
        to: The format. None: as the target's suffix says (.fsd; .safetensors; .pth, .pt, .bin and
            .ckpt for "pth").
        pick: The part to take: keys on the way to it, joined by dots, or "auto" for the weights of
            the layouts that are known (see `fastsd.layouts`). None takes all of it, or for
            safetensors, which holds flat dictionaries only, "auto" where that is needed. Of a
            module its state_dict is taken.
        strip_prefix: What keys lose at their start, of the dictionary that is taken.
        dtype: Floating point tensors are cast to this; float8 and narrower, and numpy arrays, stay
            as they are.
        drop_optimizer: Leave out the state of optimizers, schedulers and gradient scalers.
        metadata: In place of the source's own; None keeps those.
        max_shard_size: Write several files of at most so many bytes each, and an index, by
            huggingface_hub's rules; for flat dictionaries of tensors.
        trust: Where it has to be, unpickle without restrictions, so that the source may run any
            code.
        verify: Read both sides again and compare everything, tensors bit by bit; what was cast,
            with what the cast made.
        lossy: Leave out what the target cannot hold, and report it, rather than raise an error.
        progress: Called with numbers of bytes of the source as they are done, which are all of them
            in the end. What it raises stops the conversion, and nothing is left of it.

    A pickle that is more than plain data goes from "pth" to "fsd" and back as it is: the stream and
    the storages, bit for bit. Of other storages the bytes that no tensor reaches are not kept, save
    for "pth"; for safetensors arrays become tensors, and all tensors row-major.

    Memory: what lies in files that can be mapped is read piece by piece, and cast to nameless files
    beside the target, so that some 100 MiB are enough whatever the size; sources that torch has to
    read (files of before 1.6, tar files, checkpoints of torch.distributed.checkpoint, trusted
    pickles) are loaded whole.

    Raises what `load` and `save` raise: UnsupportedError, which names each key, for what the target
    cannot hold, pickle.UnpicklingError for what needs ``trust``; TruncatedError or FormatError for
    a source that changed meanwhile; ValueError for a target that would overwrite a part of the
    source; and ChecksumError if what was verified differs.
    """
    path, where = os.fspath(source), os.fspath(target)
    format = to or _find_format(where, max_shard_size)
    if dtype is not None:
        check_dtype(dtype)
    changes = Changes(pick, strip_prefix, drop_optimizer)
    nbytes = size_of(path)
    steps = _Progress(progress, nbytes, 1 + (dtype is not None) + verify)
    try:
        with open_source(path, trust=trust) as opened:
            stamps = _stamp(opened.files)
            content = read_content(opened, format, changes, carries=dtype is None, trust=trust)
            own, lost = _choose_metadata(metadata, opened.readers, format)
            how = _Target(where, format, own, max_shard_size, lossy)
            content = _leave_out(content, how, lost)
            verified = _convert(content, opened, how, steps, dtype=dtype, verify=verify)
            _check_unchanged(opened, stamps)
    except FastsdError as error:
        error.path = error.path or path
        raise
    steps.finish()
    count = _count_tensors(content)
    layout = content.layout, content.picked, content.dropped
    return Report(path, where, nbytes, size_of(where), count, *layout, verified)


def _convert(
    content: Content,
    source: Source,
    target: _Target,
    steps: _Progress,
    *,
    dtype: torch.dtype | None,
    verify: bool,
) -> bool | None:
    mapped = [] if content.is_edited else source.mapped
    if dtype is not None:
        steps.start(size_of(source.path))
        caster = Caster(dtype, _directory_of(target.path), mapped, steps.advance)
        content = content._replace(obj=caster.cast(content.obj))
        mapped = [*mapped, *caster.mapped]
    _write(content, source, target, mapped, steps)
    if not verify:
        return None
    _verify(content, target, mapped, steps)
    return True


def _find_format(target: str, max_shard_size: int | None) -> Format:
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


def _directory_of(target: str) -> str:
    """Where temporary files for a target go: beside it. Raises FileNotFoundError."""
    if is_stream_path(os.fsencode(target)):
        return tempfile.gettempdir()
    directory = os.path.dirname(os.path.abspath(target))
    if not os.path.isdir(directory):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), target)
    return directory


class _Progress:
    """Tells of bytes of the source, over steps that each go through all of it."""

    def __init__(self, tell: Callable[[int], None] | None, nbytes: int, steps: int) -> None:
        self._tell = tell
        self._nbytes = nbytes
        self._steps = steps
        self._begun = 0
        self._total = 1
        self._done = 0
        self._told = 0

    def start(self, total: int) -> None:
        """The next step, of ``total`` bytes, or about as many."""
        self._begun += 1
        self._total, self._done = max(total, 1), 0
        self.reach(0)

    def reach(self, done: int) -> None:
        self._done = done
        share = min(done / self._total, 1.0)
        self._report(int(self._nbytes * (self._begun - 1 + share) / self._steps))

    def advance(self, nbytes: int) -> None:
        self.reach(self._done + nbytes)

    def finish(self) -> None:
        self._report(self._nbytes)

    def _report(self, nbytes: int) -> None:
        if self._tell is not None and nbytes > self._told:
            more, self._told = nbytes - self._told, nbytes
            self._tell(more)


# ---- What the target cannot hold ----


def _leave_out(content: Content, target: _Target, lost: list[str]) -> Content:
    """What the target can hold; ``lost`` are lines of what it cannot beside that. Raises
    UnsupportedError unless it may be lossy."""
    obj = content.obj
    if target.max_shard_size is not None:
        if not isinstance(obj, Mapping):
            raise UnsupportedError("only dictionaries of tensors can be split into shards")
        problems = shards.find_problems(obj)
        lost = [*lost, *(f"{key}: {problem}" for key, problem in problems.items())]
        obj = drop_keys(obj, problems.keys())
    if target.format == "safetensors":
        obj, more = to_safetensors.find_holdable(obj)
        lost = [*lost, *more]
    if lost and not target.lossy:
        raise UnsupportedError(
            f"the target, {target.format!r}, cannot hold all of it; lossy=True leaves this out:"
            + "".join(f"\n  {line}" for line in lost)
        )
    return content._replace(obj=obj, dropped=(*content.dropped, *lost))


def _choose_metadata(
    given: Mapping[str, str] | None, readers: list[_core.Reader], format: Format
) -> tuple[dict[str, str], list[str]]:
    """What was given; or of the source's own strings those that the target can hold, and a line for
    each of the others."""
    return (dict(given), []) if given is not None else _find_metadata(readers, format)


def _find_metadata(readers: list[_core.Reader], format: Format) -> tuple[dict[str, str], list[str]]:
    """The sources' own strings that the target can hold, and lines of those that it cannot."""
    found: dict[str, str] = {}
    lost: list[str] = []
    for reader in readers:
        for key, value in fsd.decode_metadata(reader).items():
            if (key, value) in to_safetensors.FRAMEWORK.items():
                continue  # what every safetensors file says
            if format == "pth" or (
                format == "safetensors" and to_safetensors.is_reserved(key, value)
            ):
                lost.append(f"metadata {key!r}: the format has no place for it")
            elif found.setdefault(key, value) != value:
                lost.append(f"metadata {key!r} of {reader.name}: another file has another")
    return found, list(dict.fromkeys(lost))


# ---- Writing ----


def _write(
    content: Content,
    source: Source,
    target: _Target,
    mapped: list[_core.MappedFile],
    steps: _Progress,
) -> None:
    _refuse_overwriting(source, content.obj, target)
    if target.max_shard_size is not None:
        steps.start(size_of(source.path))
        shards.write_sharded(
            *(content.obj, target.path, target.format, target.max_shard_size),
            metadata=target.metadata,
            lossy=target.lossy,
            mapped=mapped,
            on_written=steps.reach,
        )
        return
    path = encode_path(target.path)
    plan = _make_plan(content, target, path)
    steps.start(plan.file_bytes)
    write(plan, path, mapped=mapped, on_written=steps.reach)


def _make_plan(content: Content, target: _Target, path: bytes) -> _core.Plan:
    if content.carried is not None:
        return plan_pickled(content.carried, target.format, path, target.metadata)
    try:
        args = content.obj, target.format, path, target.metadata
        return make_plan(*args, lossy=target.lossy)
    except (RuntimeError, KeyError) as error:
        # torch's, of memory that is viewed as several dtypes, or of a dtype that it does not save
        raise UnsupportedError(f"torch.save refuses it: {error}") from error


def _refuse_overwriting(source: Source, obj: Any, target: _Target) -> None:
    """A single file is replaced all at once, even the source; of several a part would be lost."""
    paths = [target.path]
    if target.max_shard_size is not None:
        plan = shards.plan_shards(obj, target.format, target.max_shard_size)
        names = shards.list_targets(target.format, plan)
        paths = [os.path.join(target.path, name) for name in names]
    elif len(source.files) == 1:
        return
    for path in filter(os.path.exists, paths):
        if any(os.path.samefile(path, file) for file in source.files):
            raise ValueError(f"{path} is a part of the source: choose another target")


def _stamp(files: list[str]) -> list[tuple[int, int, int]]:
    found = map(os.stat, files)
    return [(status.st_ino, status.st_size, status.st_mtime_ns) for status in found]


def _check_unchanged(source: Source, before: list[tuple[int, int, int]]) -> None:
    """Raises FormatError if somebody has written to the source. A file that was replaced stays as
    it was for those who have it open."""
    for file, old in zip(source.files, before, strict=True):
        if os.path.exists(file):
            (new,) = _stamp([file])
            if new[0] == old[0] and new != old:
                raise FormatError("changed while it was converted: convert it again", path=file)


def _count_tensors(content: Content) -> int:
    if content.carried is not None:
        return len(content.carried.storages)
    try:
        return len(flatten(content.obj).names)
    except UnsupportedError:
        return len(pickled.dump(content.obj, None, None).storages)


# ---- Verifying ----


def _verify(
    content: Content, target: _Target, mapped: list[_core.MappedFile], steps: _Progress
) -> None:
    written = list(_list_written(content, target))
    steps.start(sum(os.path.getsize(path) for path, _ in written))
    metadata = target.metadata
    if target.format == "safetensors":
        metadata = to_safetensors.FRAMEWORK | metadata
    for path, parts in written:
        compare.check_file(path, parts, metadata, mapped, steps.advance)


def _list_written(content: Content, target: _Target) -> Iterator[tuple[str, compare.Parts]]:
    """Each file, and what it should hold."""
    if content.carried is not None:
        yield target.path, compare.take_pickled(content.carried)
    elif target.max_shard_size is None:
        yield target.path, compare.take_apart(content.obj, target.format)
    else:
        plan = shards.plan_shards(content.obj, target.format, target.max_shard_size)
        for file, names in plan.files.items():
            shard = shards.select(content.obj, names)
            yield os.path.join(target.path, file), compare.take_apart(shard, target.format)
