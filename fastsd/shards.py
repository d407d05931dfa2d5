"""Large state_dicts in several files, with an index, by Hugging Face's convention."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from fastsd import _core
from fastsd.errors import UnsupportedError
from fastsd.saving import Format, make_plan


class Names(NamedTuple):
    """The name of a shard, of the only file with nothing in place of the suffix, and the index."""

    pattern: str
    index_file: str


NAMES: dict[str, Names] = {
    "fsd": Names("model{suffix}.fsd", "model.fsd.index.json"),
    "pth": Names("pytorch_model{suffix}.bin", "pytorch_model.bin.index.json"),
    "safetensors": Names("model{suffix}.safetensors", "model.safetensors.index.json"),
}


class ShardPlan(NamedTuple):
    """Which tensors go to which file, in the dictionary's order; and the bytes of all of them."""

    files: dict[str, list[str]]
    total_bytes: int


def plan_shards(
    state_dict: Mapping[str, torch.Tensor], format: Format, max_shard_bytes: int
) -> ShardPlan:
    """Splits a state_dict by huggingface_hub's rules.

    A file has at most so many bytes of tensors, or a single tensor that has more. Tensors of one
    storage stay together. Raises UnsupportedError for a value that is no tensor, and
    ModuleNotFoundError without huggingface_hub.
    """
    try:
        from huggingface_hub import split_torch_state_dict_into_shards
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "splitting into shards needs huggingface_hub: pip install 'fastsd[hub]'"
        ) from error
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be positive, not {max_shard_bytes}")
    others = list(find_problems(state_dict))
    if others:
        raise UnsupportedError(f"only tensors can be split into shards, not what is under {others}")
    pattern = NAMES[format].pattern
    split = split_torch_state_dict_into_shards(
        dict(state_dict), filename_pattern=pattern, max_shard_size=max_shard_bytes
    )
    if not split.filename_to_tensors:
        return ShardPlan({pattern.format(suffix=""): []}, 0)
    files: dict[str, list[str]] = {file: [] for file in sorted(split.filename_to_tensors)}
    for name in state_dict:
        files[split.tensor_to_filename[name]].append(name)
    return ShardPlan(files, int(split.metadata["total_size"]))


def find_problems(state_dict: Mapping[Any, Any]) -> dict[Any, str]:
    """The keys that cannot go to shards, and why."""
    found = {}
    for key, value in state_dict.items():
        if not isinstance(key, str):
            found[key] = f"is a key of type {type(key).__name__}, not str"
        elif not isinstance(value, torch.Tensor):
            found[key] = f"is a {type(value).__name__}, no tensor, and cannot go to a shard"
    return found


def list_targets(format: Format, shards: ShardPlan) -> list[str]:
    """The files that are written, or removed because they would hide what is."""
    names = NAMES[format]
    return [*shards.files, names.index_file, names.pattern.format(suffix="")]


def write_sharded(
    state_dict: Mapping[str, torch.Tensor],
    directory: str | os.PathLike[str],
    format: Format,
    max_shard_bytes: int,
    *,
    metadata: Mapping[str, str] | None = None,
    durable: bool = False,
    checksum: bool = True,
    lossy: bool = False,
    mapped: Sequence[_core.MappedFile] = (),
    on_written: Callable[[int], None] | None = None,
) -> list[str]:
    """Writes a state_dict to files of at most ``max_shard_bytes`` each, and their index.

    Each shard is a dictionary of the same type, with the same `_metadata` and ``metadata``. One
    that fits a single file has no index. All files are written before the first gets its name, so
    that an error leaves what was there; the index comes last. One that an earlier save left goes
    before shards of the same names are replaced: a directory whose save was killed in between has
    no index, and is refused, rather than showing shards of both.
    What an earlier save under these names would show in its place goes then: its index, or its
    only file. Other arguments as for `saving.make_plan` and `saving.write`. Returns the files'
    names. Raises what `plan_shards` and `fastsd.save` raise.
    """
    shards = plan_shards(state_dict, format, max_shard_bytes)
    os.makedirs(directory, exist_ok=True)
    weight_map: dict[str, str] = {}
    pending: list[_core.PendingFile] = []
    done = 0
    for file, names in shards.files.items():
        path = os.fsencode(os.path.join(directory, file))
        plan = make_plan(select(state_dict, names), format, path, metadata, lossy=lossy)
        pending.append(plan.write(path, durable, checksum, mapped, _add_to(done, on_written)))
        done += plan.file_bytes
        if on_written is not None:
            on_written(done)
        # safetensors' readers look for every name of the index in its file.
        left_out = {names[i] for i, _ in plan.tied} if format == "safetensors" else set()
        weight_map |= {name: file for name in names if name not in left_out}
    index = os.path.join(directory, NAMES[format].index_file)
    only = os.path.join(directory, NAMES[format].pattern.format(suffix=""))
    is_alone = len(shards.files) == 1
    if not is_alone:
        content = {"metadata": {"total_size": shards.total_bytes}, "weight_map": weight_map}
        data = json.dumps(content, indent=2).encode() + b"\n"
        pending.append(_core.write_bytes(os.fsencode(index), data, durable))
    if not is_alone and any(os.path.exists(os.path.join(directory, file)) for file in shards.files):
        _remove(index)
    for pending_file in pending:
        pending_file.commit(durable)
    _remove(index if is_alone else only)
    return [*shards.files] if is_alone else [*shards.files, NAMES[format].index_file]


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _add_to(done: int, on_written: Callable[[int], None] | None) -> Callable[[int], None] | None:
    """Tells of the bytes of a file together with those before it."""
    return on_written and (lambda nbytes: on_written(done + nbytes))


def select(state_dict: Mapping[str, torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    """A part of a dictionary, with its type and attributes."""
    items = ((name, state_dict[name]) for name in names)
    if not isinstance(state_dict, OrderedDict):
        return dict(items)
    shard = OrderedDict(items)
    vars(shard).update(vars(state_dict))
    return shard
