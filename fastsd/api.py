"""The public calls: save, load, load_into, open."""

from __future__ import annotations

import builtins
import os
from collections.abc import Mapping, MutableMapping
from typing import IO, Any, Literal

import torch
from torch.nn.modules.module import _IncompatibleKeys

from fastsd import _core, tree
from fastsd.archive import Archive, load_tensors
from fastsd.archive import verify as verify_archive
from fastsd.errors import ChecksumError, FormatError, UnsupportedError
from fastsd.files import encode_path, is_path, is_stream_path, open_source, write_stream
from fastsd.formats import fsd
from fastsd.placement import find_restore
from fastsd.tensors import CPU, Describer

PathOrFile = str | os.PathLike[str] | IO[bytes]
Verify = Literal["structure", "checksums"]


def save(
    obj: object,
    f: PathOrFile,
    pickle_module: Any = None,
    pickle_protocol: int | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    durable: bool = False,
    checksum: bool = True,
    format: str | None = None,
) -> None:
    """Saves an object to a file, in place of ``torch.save(obj, f)``.

    Args:
        obj: A tensor, or dicts, lists and other plain values with tensors in them: None, bool, int,
            float, complex, str, bytes, list, tuple, torch.Size, dict, OrderedDict, set, torch
            dtypes, devices, layouts and memory formats, numpy scalars and arrays. Nothing is
            pickled.
        f: A path, or a binary file object, which needs only ``write``: it is written from where it
            stands and, if it has ``flush``, flushed.
        pickle_module, pickle_protocol: Accepted for torch's sake; there is nothing to pickle.
        metadata: Strings to keep in the header, for `Archive.metadata`.
        durable: Return only when the file and its directory entry are on the device. Large files
            then bypass the page cache where the file system can.
        checksum: Record a CRC32C for each storage.
        format: None or "fsd".

    Tensors that overlap in memory are stored once and share a storage again after loading. Only
    bytes that some tensor can reach are written. Memory needed beyond the object: at most 64 MiB,
    the header (about 200 bytes a tensor, and the plain values as JSON), and copies of what lies on
    other devices.

    A file at that path is replaced all at once, and only when the new one is complete: it is
    untouched after any error, Ctrl-C included. Its permissions are kept; a symbolic link stays,
    what it points to is replaced.

    Raises UnsupportedError for what cannot be saved, AttributeError for an `f` without ``write``,
    OSError, and what the file object raises. Do not change the tensors
    meanwhile.
    """
    if format not in (None, "fsd"):
        raise ValueError(f"format must be None or 'fsd', not {format!r}")
    if not is_path(f) and not hasattr(f, "write"):
        raise AttributeError(
            "expected 'f' to be string, path, or a file-like object with a 'write' attribute"
        )
    plan = _make_plan(obj, metadata)
    if not is_path(f):
        write_stream(plan, f, durable=durable, checksum=checksum)
        return
    path = encode_path(f)
    if is_stream_path(path):
        with builtins.open(path, "wb") as stream:
            write_stream(plan, stream, durable=False, checksum=checksum)
    else:
        plan.write(path, durable, checksum)


def _make_plan(obj: object, metadata: Mapping[str, str] | None) -> _core.Plan:
    flat = tree.flatten(obj)
    describer = Describer()
    plan = _core.Plan(flat.names, flat.tensors, describer)
    sections: list[tuple[int, bytes]] = []
    if flat.tree is not None:
        sections.append((fsd.Section.TREE, flat.tree))
    if flat.state_metadata is not None:
        sections.append((fsd.Section.STATE_METADATA, flat.state_metadata))
    if metadata:
        sections.append((fsd.Section.METADATA, fsd.encode_metadata(dict(metadata))))
    plan.finish(fsd.ROOT_IS_ORDERED_DICT * flat.is_ordered, describer.devices, sections)
    return plan


def load(
    f: PathOrFile,
    map_location: Any = None,
    pickle_module: Any = None,
    *,
    weights_only: bool = True,
    mmap: bool | None = None,
    verify: Verify = "structure",
    **pickle_load_args: Any,
) -> Any:
    """Loads what `save` has saved, in place of ``torch.load(f)``.

    Args:
        f: A path of a file that is one archive, or a binary file object, which needs only ``read``.
            Of an object the archive that starts where it stands is read, and not a byte more. The
            object is left behind it or, after an error, where it stood, if it can seek.
        map_location: As for torch.load.
        pickle_module, weights_only, pickle_load_args: Accepted for torch's sake. Files hold no
            pickle, so that loading never runs code.
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
            "checksums": that, and every byte of the file against the recorded checksums.

    Returns the object, with the same nesting, types, key order and sharing of memory.

    Raises FormatError for a file that is damaged or not of this format, EmptyError (an EOFError)
    where there is nothing to read, ChecksumError, OSError, AttributeError for an `f` without
    ``read``, what a file object raises, and what torch raises where `map_location` cannot be met.
    """
    _check_verify(verify)
    unknown = pickle_load_args.keys() - {"encoding", "errors", "fix_imports", "buffers"}
    if unknown:
        raise TypeError(f"load() got an unexpected keyword argument {min(unknown)!r}")
    with open_source(f) as source:
        return _load(fsd.open_reader(source, mmap), map_location, verify)


def _check_verify(verify: str) -> None:
    if verify not in ("structure", "checksums"):
        raise ValueError(f"verify must be 'structure' or 'checksums', not {verify!r}")


def _load(reader: _core.Reader, map_location: Any, verify: Verify) -> Any:
    if verify == "checksums":
        report = verify_archive(reader)
        if report.unchecked:
            raise ChecksumError(
                f"there is nothing to check {len(report.unchecked)} tensors against: "
                "they were saved with checksum=False",
                path=reader.name,
                tensors=report.unchecked,
            )
    restore = find_restore(map_location, reader.devices)
    try:
        return _restore(reader, load_tensors(reader, restore))
    except FormatError as error:
        error.path = reader.name
        raise


def _restore(reader: _core.Reader, tensors: dict[str, torch.Tensor]) -> Any:
    """The object that was saved, from its tensors."""
    fsd.decode_metadata(reader)  # for open() to give, but damaged is damaged
    text = reader.section(fsd.Section.TREE)
    if text is not None:
        return tree.restore_tree(text, list(tensors.values()))
    is_ordered = bool(reader.file_flags & fsd.ROOT_IS_ORDERED_DICT)
    return tree.restore_flat(tensors, is_ordered, reader.section(fsd.Section.STATE_METADATA))


def load_into(
    module_or_mapping: torch.nn.Module | MutableMapping[str, torch.Tensor],
    f: PathOrFile,
    *,
    strict: bool = True,
    assign: bool = False,
    mmap: bool | None = None,
) -> Any:
    """Loads a saved state_dict into an existing module, or into a mapping of tensors.

    The same as ``module.load_state_dict(fastsd.load(f), strict, assign)``: torch decides on keys,
    shapes and hooks, and gives its own errors. What is not in the page cache yet is read
    ahead of the copy; no more memory is needed than the page cache. With ``mmap=False`` all
    tensors are first read into memory of their own; with None the file is mapped, except with
    ``assign=True`` on file systems where `load` would not map either.

    Args:
        strict: Missing and unexpected keys are errors.
        assign: Put the loaded tensors in place of the module's, rather than copying into those.

    Returns a named tuple of ``missing_keys`` and ``unexpected_keys``. Raises what `load` and
    ``load_state_dict`` raise, and UnsupportedError if the file does not hold a dictionary.
    """
    is_mapped = True if mmap is None and not assign else mmap
    with open_source(f) as source:
        reader = fsd.open_reader(source, is_mapped)
    # What is copied goes where the target is; what is assigned, where load() would put it.
    state = _load(reader, None if assign else CPU, "structure")
    if not isinstance(state, dict):
        raise UnsupportedError(f"holds a {type(state).__name__}, no state_dict", path=reader.name)
    if assign:
        return _load_state(module_or_mapping, state, strict, assign)
    prefetch = _core.Prefetch(reader)
    try:
        return _load_state(module_or_mapping, state, strict, assign)
    finally:
        prefetch.stop()


def _load_state(target: Any, state: dict[str, Any], strict: bool, assign: bool) -> Any:
    if isinstance(target, torch.nn.Module):
        return target.load_state_dict(state, strict=strict, assign=assign)
    if isinstance(target, MutableMapping):
        return _load_into_mapping(target, state, strict, assign)
    raise UnsupportedError(
        f"cannot load into a {type(target).__name__}: pass a module or a mapping"
    )


def _load_into_mapping(
    target: MutableMapping[str, torch.Tensor], state: dict[str, Any], strict: bool, assign: bool
) -> _IncompatibleKeys:
    """What Module.load_state_dict does, for a mapping; keys and shapes are checked before
    copying."""
    missing = [key for key in target if key not in state]
    unexpected = [key for key in state if key not in target]
    common = [key for key in target if key in state]
    problems = []
    if strict and unexpected:
        problems.append("Unexpected key(s): " + ", ".join(f'"{key}"' for key in unexpected) + ".")
    if strict and missing:
        problems.append("Missing key(s): " + ", ".join(f'"{key}"' for key in missing) + ".")
    for key in common:
        if not (isinstance(target[key], torch.Tensor) and isinstance(state[key], torch.Tensor)):
            problems.append(f"{key} is no tensor in the file and in the mapping.")
            continue
        wanted, found = target[key].shape, state[key].shape
        if wanted != found:
            problems.append(
                f"size mismatch for {key}: {found} in the file, {wanted} in the mapping."
            )
    if problems:
        raise RuntimeError("Error(s) in loading into a mapping:\n\t" + "\n\t".join(problems))
    with torch.no_grad():
        for key in common:
            if assign:
                target[key] = state[key]
            else:
                target[key].copy_(state[key])
    return _IncompatibleKeys(missing, unexpected)


def open(f: PathOrFile, device: torch.device | str = CPU, *, mmap: bool | None = None) -> Archive:
    """Opens a file as a read-only mapping of its tensors, which are read when they are asked for.

    ``device`` is where they are put then; ``mmap`` as for `load`. Nested files are mappings too:
    their names are the keys on the way, joined by dots. Of a file object that cannot be mapped and
    is no regular file everything is read at once; tensors are copies then. Raises what `load`
    raises.
    """
    with open_source(f) as source:
        return fsd.open_archive(source, mmap, device)
