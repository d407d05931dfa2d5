"""The public calls: save, load, load_into, open."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from contextlib import ExitStack
from io import BytesIO
from typing import IO, Any, Literal

import torch

from fastsd import _core, pickled, through_torch
from fastsd.archive import Archive
from fastsd.archive import verify as verify_archive
from fastsd.deferred import Copies
from fastsd.errors import ChecksumError, UnsupportedError
from fastsd.files import Source, encode_path, is_path
from fastsd.formats import fsd
from fastsd.formats.detect import open_any
from fastsd.into import Target
from fastsd.names import NameRules, Rename, Select
from fastsd.progress import show_progress
from fastsd.restore import needs_unpickling, restore
from fastsd.saving import Format, Pickling, make_plan, write
from fastsd.tensors import CPU
from fastsd.upload import Passage

PathOrFile = str | os.PathLike[str] | IO[bytes]
Verify = Literal["structure", "checksums"]


def save(
    obj: object,
    f: PathOrFile,
    pickle_module: Any = None,
    pickle_protocol: int | None = None,
    _use_new_zipfile_serialization: bool = True,
    _disable_byteorder_record: bool = False,
    *,
    metadata: Mapping[str, str] | None = None,
    durable: bool = False,
    checksum: bool = True,
    format: Format | None = None,
) -> None:
    """Saves an object to a file, in place of ``torch.save(obj, f)``.

    Args:
        obj: What torch.save takes. Plain objects are not pickled: a tensor, or dicts, lists and
            other plain values with tensors in them: None, bool, int, float, complex, str, bytes,
            list, tuple, torch.Size, dict, OrderedDict, set, torch dtypes, devices, layouts and
            memory formats, numpy scalars and arrays. If anything else is in it (a module, a
            sparse or quantized tensor, a tensor subclass, a storage, an object of another class)
            all of it goes through torch's own pickling, with whole storages.
        f: A path, or a binary file object, which needs only ``write``: it is written from where it
            stands and, if it has ``flush``, flushed.
        pickle_module, pickle_protocol: As for torch.save, for what has to be pickled.
        _use_new_zipfile_serialization, _disable_byteorder_record: torch's. The second is for the
            format "pth"; the first means nothing here.
        metadata: Strings to keep in the header, for `Archive.metadata`. The format "pth" has no
            place for them.
        durable: Return only when the file and its directory entry are on the device. Large files
            then bypass the page cache where the file system can.
        checksum: Record a CRC32C for each storage. The format "pth" always has its own checksums,
            and "safetensors" has none.
        format: What to write, whatever the path is called. None stands for "fsd".
            "pth": what torch.save writes, byte for byte except for the serialization id, which is
            the same for the same bytes; all of ``obj`` is pickled, with whole storages.
            "safetensors": ``obj`` must be a dict or OrderedDict from str to dense tensors. Those
            that are not contiguous are stored as `contiguous()` makes them, those that are equal
            views of the same memory once, under the first name, and tied again by `load`; others
            that overlap are refused. Parameters and ``requires_grad`` are not kept. Metadata keys
            "fastsd.*", and "format" other than "pt", are refused.

    Tensors that overlap in memory are stored once and share a storage again after loading. Of
    plain objects only bytes that some tensor can reach are written. Memory needed beyond the
    object: at most 64 MiB, and the header (about 200 bytes a tensor, and the plain values as JSON
    or as the pickle).

    What lies on CUDA's GPUs is written once all that has been put into torch's current streams is
    done, and needs no more than that; up to 32 MiB stay pinned for the next save. For "safetensors"
    there are copies of the non-contiguous tensors that are being written, one for each of up to
    four threads. What lies on other devices, or on GPUs whose driver is older than CUDA 12, is
    copied to the host before.

    A file at that path is replaced all at once, and only when the new one is complete: it is
    untouched after any error, Ctrl-C included. Its permissions are kept; a symbolic link stays,
    what it points to is replaced.

    Raises UnsupportedError for what cannot be saved (for "safetensors" it names each key that is in
    the way), ValueError for metadata that the format cannot hold, LimitError for a header that
    readers of the format refuse, what pickling raises, AttributeError for an `f` without ``write``,
    OSError, DeviceError where a GPU fails, and what the file object raises. Do not change the
    tensors meanwhile.
    """
    if isinstance(pickle_module, Mapping):
        raise TypeError("pickle_module must be a module; metadata is passed by name: metadata=...")
    if not is_path(f) and not hasattr(f, "write"):
        raise AttributeError(
            "expected 'f' to be string, path, or a file-like object with a 'write' attribute"
        )
    path = encode_path(f) if is_path(f) else None
    file: Any = f if path is None else path
    how = Pickling(pickle_module, pickle_protocol, _disable_byteorder_record)
    plan = make_plan(obj, format or "fsd", path, metadata, how)
    write(plan, file, durable=durable, checksum=checksum)


def load(
    f: PathOrFile,
    map_location: Any = None,
    pickle_module: Any = None,
    *,
    weights_only: bool | None = None,
    mmap: bool | None = None,
    verify: Verify = "structure",
    prefix: str | None = None,
    rename: Rename | None = None,
    select: Select | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    **pickle_load_args: Any,
) -> Any:
    """Loads what `save` has saved, and files of other formats, in place of ``torch.load(f)``.

    Args:
        f: A path, or a binary file object, which needs only ``read``. What it holds is told by
            content: an .fsd file, a file of torch.save, a safetensors file; a path may also be that
            of a directory of shards, or of their index. Of an object the archive that starts where
            it stands is read and, if that is an .fsd one, not a byte more; others reach to the end.
            The object is left behind it or, after an error, where it stood, if it can seek.
        map_location: As for torch.load. What goes to GPUs is read from the file on its way there,
            in parallel, through pinned memory (`fastsd.gpu.set_pinned_memory`), whatever ``mmap``
            says, and is there when this returns.
        weights_only: As for torch.load, for files that hold a pickle; loading others never runs
            code, whatever it says. True, and None without a ``pickle_module``: torch's restricted
            unpickler, with what torch.serialization.add_safe_globals and safe_globals allow.
            False: anything, so that the file may run any code. The environment variables
            TORCH_FORCE_WEIGHTS_ONLY_LOAD and TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD count.
        pickle_module, pickle_load_args: As for torch.load, with ``weights_only=False``.
        mmap: True: tensors are views of the mapped file; nothing is read until it is used. They are
            writable, and what is written stays in this process. The file may be replaced or deleted
            meanwhile; to truncate or overwrite it in place would change or kill the process.
            False: tensors have memory of their own, read at once and in parallel.
            None: map, except on file systems where that is slow or unsafe (NFS, SMB, Lustre,
            FUSE...), and except file objects that are open for writing, too.
            What cannot be mapped is read, once, whatever this says: objects that are no regular
            file (io.BytesIO, pipes, compressed files...), and archives that do not start at a
            multiple of 64 bytes in their file.
        verify: How much to check before anything is returned. "structure": the whole header,
            against every rule of the format and its own checksum; no tensor data is read.
            "checksums": that, and every tensor's bytes, whatever is chosen of them, against the
            recorded checksums, which are CRC-32 in files of torch.save. A file without any is a
            ChecksumError.
        prefix: Only tensors whose names start with this; it is taken off.
        rename: What the tensors that are left are called: a function from name to name, or a dict
            from leading parts of names to what replaces them, of which the longest that fits is
            replaced, once. ``{"": "module."}`` puts a prefix on, ``{"_orig_mod.": ""}`` takes one
            off where there is one.
        select: Only tensors with these names, as they are once the prefix is off and before they
            are renamed: a function of a
            name, a name or a pattern (``*``, ``?``, ``[...]``; ``*`` matches dots too), or several
            of them. Each pattern must match something; a function need not.
        dtype: What floating point tensors of 16 bits and more become: torch.float16, bfloat16,
            float32 or float64. They are cast on the way, where they go, and have memory of their
            own. For files of plain data.
        progress: Show a bar on stderr while bytes are read; takes rich.

    Returns the object, with the same nesting, types, key order and sharing of memory.

    With any of ``prefix``, ``rename`` and ``select``, it is a flat dictionary of tensors, whose
    names are the keys on the way to them, joined by dots. Only these are made and read, with the
    storages they lie in; tensors that overlap still do; but a pickle is loaded whole first. Plain
    values are left out. The
    `_metadata` of a flat state_dict, or of the one in a nested file that the prefix leads to, is
    kept under the new names of the modules (module "m" goes with names "m."); not if ``rename`` is
    a function. What occurs twice in a nested object has the names of where it comes first.

    Raises FormatError for a file that is damaged or not of this format, EmptyError (an EOFError)
    where there is nothing to read, ChecksumError, OSError, AttributeError for an `f` without
    ``read``, what a file object raises, DeviceError for a GPU that fails, UnsupportedError for a
    ``dtype`` that cannot be had, NamesError (a KeyError) for a prefix or pattern that fits
    no name and for two names that become one, and what torch raises where `map_location` cannot be
    met, or a pickle not be loaded.
    """
    _check_verify(verify)
    unknown = pickle_load_args.keys() - {"encoding", "errors", "fix_imports", "buffers"}
    if unknown:
        raise TypeError(f"load() got an unexpected keyword argument {min(unknown)!r}")
    how = pickled.Unpickling(weights_only, pickle_module, pickle_load_args)
    how.check()
    rules = _make_rules(prefix, select, rename)
    passage = Passage(dtype, checks=verify == "checksums")
    with open_any(f, mmap) as opened:
        if opened.source is not None:
            if dtype is not None:
                detail = "dtype cannot be had of what torch reads"
                raise UnsupportedError(detail, path=opened.source.name)
            return _load_through_torch(opened.source, map_location, how, rules, verify)
        if not progress:
            return _load(opened.readers, map_location, how, rules, passage)
        with show_progress(opened.readers[0].name) as passage.progress:
            return _load(opened.readers, map_location, how, rules, passage)


def _load(
    readers: list[_core.Reader],
    map_location: Any,
    how: pickled.Unpickling,
    rules: NameRules | None,
    passage: Passage,
) -> Any:
    """What is in the files, verified: before a pickle is looked at, and before memory that a stream
    was read into is handed out; else along with the bytes that are read anyway."""
    if passage.checks and any(r.is_from_stream or needs_unpickling(r, how) for r in readers):
        _verify(readers, passage)
        passage.checks = False
    obj = restore(readers, map_location, how, rules, passage)[0]
    _verify(readers, passage)
    return obj


def _load_through_torch(
    source: Source,
    map_location: Any,
    how: pickled.Unpickling,
    rules: NameRules | None,
    verify: Verify = "structure",
) -> Any:
    if verify == "checksums":
        raise ChecksumError("there are no checksums in a file of this kind", path=source.name)
    obj = through_torch.load(source, map_location, how)
    return pickled.choose(obj, rules, source.name) if rules else obj


def _make_rules(
    prefix: str | None, select: Select | None, rename: Rename | None
) -> NameRules | None:
    is_all = prefix is None and select is None and rename is None
    return None if is_all else NameRules(prefix, select, rename)


def _check_verify(verify: str) -> None:
    if verify not in ("structure", "checksums"):
        raise ValueError(f"verify must be 'structure' or 'checksums', not {verify!r}")


def _verify(readers: list[_core.Reader], passage: Passage) -> None:
    if passage.checks:
        report = verify_archive(readers, passage)
        if report.unchecked:
            raise ChecksumError(
                f"there is nothing to check {len(report.unchecked)} tensors against: "
                "they were saved without checksums",
                path=readers[0].name,
                tensors=report.unchecked,
            )
    for reader in readers:
        fsd.decode_metadata(reader)  # for open() to give, but damaged is damaged


def load_into(
    target: torch.nn.Module | MutableMapping[str, torch.Tensor] | Any,
    f: PathOrFile,
    *,
    strict: bool | None = None,
    assign: bool | None = None,
    prefix: str | None = None,
    rename: Rename | None = None,
    select: Select | None = None,
    ignore_mismatched_sizes: bool = False,
    weights_only: bool | None = None,
    mmap: bool | None = None,
    verify: Verify = "structure",
    progress: bool = False,
) -> Any:
    """Loads a saved state_dict into something that exists: a module, an optimizer, a mapping...

    The same as ``target.load_state_dict(fastsd.load(f))``: torch decides on keys, shapes and hooks,
    and gives its own errors.

    Args:
        target: An nn.Module; a mapping from names to tensors, which are filled; or anything else
            with a ``load_state_dict``: optimizers, schedulers, gradient scalers...
        strict: Missing and unexpected keys are errors. None: as the target has it, which is True
            for modules and mappings.
        assign: Put the loaded tensors in place of the target's, rather than copying into those.
            None: as the target has it, which is False for modules and mappings.
        prefix, rename, select: As for `load`; for modules and mappings.
        ignore_mismatched_sizes: Tensors whose shapes differ from the target's are left out rather
            than being an error. They are among the ``missing_keys`` that are returned, and
            ``strict`` does not object to them. For modules (which are asked for their
            ``state_dict()`` first) and mappings.
        weights_only, verify, progress: As for `load`.
        mmap: As for `load`. None: modules and mappings, into which is copied, are filled from the
            mapped file even where `load` would read, as reading would need memory for the model a
            second time. With ``assign=True`` as for `load`. Other targets may keep what they are
            given (optimizers keep the tensors that need neither another dtype nor another device)
            and get memory of their own, as with ``mmap=False``. Tensors that a module takes as
            extra state are handed to it as they are.

    What is not in the page cache yet is read ahead of the copy. Parameters on GPUs are filled from
    the file, once torch has checked all of them; but a module that has hooks for loading, or code
    of its own, and what has to be unpickled, are left to torch's copies. Parameters stay where they
    are, whatever device was saved from, and so does an optimizer's state; with ``assign=True``, and
    for other targets, tensors go where they were saved from, as with `load`.

    Returns what the target's ``load_state_dict`` returns: for modules, and for mappings, a named
    tuple of ``missing_keys`` and ``unexpected_keys``. Raises what `load` and ``load_state_dict``
    raise, and UnsupportedError for a target without such a method, or one that does not take what
    is given here, and if the file does not hold a dictionary for a module or a mapping.
    """
    into = Target(
        target, strict=strict, assign=assign, ignore_mismatched_sizes=ignore_mismatched_sizes
    )
    rules = _make_rules(prefix, select, rename)
    if rules and not into.takes_tensors:
        raise UnsupportedError(
            "prefix, rename and select give tensors by name, for modules and mappings: for a "
            f"{type(target).__name__} load the file and pass the part to its load_state_dict()"
        )
    if mmap is None:
        mmap = True if into.copies else None if into.takes_tensors else False
    _check_verify(verify)
    how = pickled.Unpickling(weights_only)
    # What is copied goes where the target is; what is assigned, where load() would put it.
    map_location = CPU if into.moves else None
    with ExitStack() as stack:
        opened = stack.enter_context(open_any(f, mmap))
        if opened.source is not None:
            state = _load_through_torch(opened.source, map_location, how, rules, verify)
            return _fill(into, state, opened.source.name, [], None)
        readers = opened.readers
        _verify(readers, Passage(checks=verify == "checksums"))
        passage = Passage()
        if progress:
            passage.progress = stack.enter_context(show_progress(readers[0].name))
        state, numbers = restore(readers, map_location, how, rules, passage)
        sources = list(zip(readers, numbers, strict=True))
        # What an unpickler has made of a file's bytes need not be what is in the file.
        plain = [reader for reader in readers if not needs_unpickling(reader, how)]
        copies = Copies(plain, passage) if plain else None
        return _fill(into, state, readers[0].name, sources, copies)


def _fill(
    into: Target,
    state: Any,
    path: str,
    sources: list[tuple[_core.Reader, list[int] | None]],
    copies: Copies | None,
) -> Any:
    """Hands the state over, which is read meanwhile or, where it goes to GPUs, behind that."""
    if into.takes_tensors and not isinstance(state, dict):
        raise UnsupportedError(f"holds a {type(state).__name__}, no state_dict", path=path)
    if copies is not None and into.copies and into.can_defer():
        copies.defer(state)
        with copies:
            return into.load(state)
    with ExitStack() as stack:
        if into.copies:
            for reader, numbers in sources:
                stack.callback(_core.Prefetch(reader, numbers).stop)
        return into.load(state)


def open(f: PathOrFile, device: torch.device | str = CPU, *, mmap: bool | None = None) -> Archive:
    """Opens a file as a read-only mapping of its tensors, which are read when they are asked for.

    ``device`` is where they are put then, on a GPU straight from the file; ``mmap`` as for `load`.
    Nested files are mappings too: their names are the keys on the way, joined by dots. A pickle is
    not unpickled: the tensors that dictionaries, lists and tuples in it lead to are there, whatever
    else it holds; only of one that cannot be followed at all they are its storages, as bytes, under
    torch's keys. Of a file object that cannot be mapped and is no regular file everything is read
    at once; tensors are copies then; so is what only torch can read. Raises what `load` raises.
    """
    with open_any(f, mmap) as opened:
        if opened.source is not None:
            obj = _load_through_torch(opened.source, CPU, pickled.Unpickling(), None)
            path = opened.source.name
            return Archive([_rewrite(obj, path)], {}, device, legacy_path=path)
        return Archive(opened.readers, _merge_metadata(opened.readers), device)


def _merge_metadata(readers: list[_core.Reader]) -> dict[str, str]:
    merged: dict[str, str] = {}
    for reader in readers:
        merged.update(fsd.decode_metadata(reader))
    return merged


def _rewrite(obj: object, path: str) -> _core.Reader:
    """An archive in memory, of what torch had to load from a file."""
    stream = BytesIO()
    stream.name = path  # what messages call it
    write(make_plan(obj, "fsd", None), stream, checksum=False)
    stream.seek(0)
    with open_any(stream, None) as opened:
        return opened.readers[0]


def get_unsafe_globals_in_checkpoint(f: PathOrFile) -> list[str]:
    """The classes and functions that a file names and `load` would refuse with weights_only=True.

    In place of torch.serialization.get_unsafe_globals_in_checkpoint: names such as "package.Class",
    without those that are allowed now, sorted; none for a file without a pickle. Nothing is
    unpickled or imported. Raises UnpicklingError for a pickle that weights_only could not read
    anyway, and what `open` raises.
    """
    with open_any(f, None) as opened:
        if opened.source is not None:
            return through_torch.find_unsafe_globals(opened.source)
        readers = opened.readers
    return sorted({name for reader in readers for name in _find_unsafe_globals(reader)})


def _find_unsafe_globals(reader: _core.Reader) -> list[str]:
    stream = reader.section(fsd.Section.PICKLE)
    return [] if stream is None else pickled.find_unsafe_globals(stream, reader.name)
