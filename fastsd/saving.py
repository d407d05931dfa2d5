"""From an object to the plan of a file in one of the formats, and from a plan to the file."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, Literal, NamedTuple, get_args

from fastsd import _core, pickled, tree
from fastsd.errors import NotPlainError, UnsupportedError
from fastsd.files import is_stream_path, write_stream
from fastsd.formats import fsd
from fastsd.placement import asks_packages, skips_data
from fastsd.tensors import Describer, warn_of_hooks
from fastsd.to_safetensors import plan_safetensors

Format = Literal["fsd", "pth", "safetensors"]


class Pickling(NamedTuple):
    """How to pickle what has to be: torch.save's arguments."""

    pickle_module: Any = None
    pickle_protocol: int | None = None
    without_byteorder: bool = False

    def dump(self, obj: object) -> pickled.Pickled:
        """Pickles an object; raises what torch.save raises."""
        module, protocol, without_byteorder = self
        return pickled.dump(obj, module, protocol, without_byteorder=without_byteorder)


def make_plan(
    obj: object,
    format: Format,
    path: bytes | None,
    metadata: Mapping[str, str] | None = None,
    how: Pickling | None = None,
    *,
    lossy: bool = False,
) -> _core.Plan:
    """Lays out a file. ``path`` is where it goes, None for a file object; ``lossy`` as for
    `plan_safetensors`. Raises what `fastsd.save` raises for an object that the format cannot hold.
    """
    how = how or Pickling()
    if format == "fsd":
        return _plan_fsd(obj, metadata, how)
    if format == "safetensors":
        return plan_safetensors(obj, metadata, lossy=lossy)
    if format not in get_args(Format):
        known = ", ".join(map(repr, get_args(Format)))
        raise ValueError(f"format must be None or one of {known}, not {format!r}")
    return plan_pickled(how.dump(obj), format, path, metadata)


def write(
    plan: _core.Plan,
    f: bytes | IO[bytes],
    *,
    durable: bool = False,
    checksum: bool = True,
    mapped: Sequence[_core.MappedFile] = (),
    on_written: Callable[[int], None] | None = None,
) -> None:
    """Writes a plan to a path, as `encode_path` gives it, or to a file object.

    ``mapped`` are mapped files, which nobody may have changed in memory, that the plan writes from:
    see `_core.Plan.write`, also for ``on_written``, which is told of files only.
    """
    if not isinstance(f, bytes):
        write_stream(plan, f, durable=durable, checksum=checksum, mapped=mapped)
    elif is_stream_path(f):
        with builtins.open(f, "wb") as stream:
            write_stream(plan, stream, durable=False, checksum=checksum, mapped=mapped)
    else:
        plan.write(f, durable, checksum, mapped, on_written).commit(durable)


def _plan_fsd(obj: object, metadata: Mapping[str, str] | None, how: Pickling) -> _core.Plan:
    sections = _encode_metadata(metadata)
    if not (skips_data() or asks_packages()):
        try:
            return _plan_plain(obj, sections)
        except NotPlainError:
            pass
        except UnsupportedError:
            how.dump(obj)  # where torch refuses, its error
            raise
    return _plan_sections(how.dump(obj), sections)


def _plan_plain(obj: object, sections: list[tuple[fsd.Section, bytes]]) -> _core.Plan:
    flat = tree.flatten(obj)
    describer = Describer()
    plan = _core.Plan(flat.names, flat.tensors, describer)
    sections = list(sections)
    if flat.tree is not None:
        sections.append((fsd.Section.TREE, flat.tree))
    if flat.state_metadata is not None:
        sections.append((fsd.Section.STATE_METADATA, flat.state_metadata))
    plan.finish(fsd.ROOT_IS_ORDERED_DICT * flat.is_ordered, describer.devices, sections)
    warn_of_hooks(flat.tensors)
    return plan


def plan_pickled(
    parts: pickled.Pickled, format: Format, path: bytes | None, metadata: Mapping[str, str] | None
) -> _core.Plan:
    """Lays out a pickle as it is, for "fsd" or "pth"; ``path`` and errors as for `make_plan`."""
    if format == "fsd":
        return _plan_sections(parts, _encode_metadata(metadata))
    if metadata:
        raise ValueError("the format 'pth' has no place for metadata")
    return pickled.plan_zip(parts.records, parts.storages, pickled.find_archive_name(path))


def _encode_metadata(metadata: Mapping[str, str] | None) -> list[tuple[fsd.Section, bytes]]:
    return [(fsd.Section.METADATA, fsd.encode_metadata(dict(metadata)))] if metadata else []


def _plan_sections(parts: pickled.Pickled, sections: list[tuple[fsd.Section, bytes]]) -> _core.Plan:
    describer = Describer()
    plan = _core.Plan(list(parts.storages), list(parts.storages.values()), describer)
    plan.finish(0, describer.devices, [*sections, (fsd.Section.PICKLE, parts.stream)])
    return plan
