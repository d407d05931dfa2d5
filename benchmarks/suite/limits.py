"""Bare limits: what the machine does when nobody keeps a format."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from fastsd.bench.limits import (
    PAGE_BYTES,
    copy_memory,
    map_and_touch,
    read_parallel,
    write_and_sync,
    write_at_once,
    write_direct,
)

__all__ = ["LIMITS", "PAGE_BYTES"]


def fill_model(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors that are in memory into a model: torch's own part of loading into one."""
    model.load_state_dict(state)


def assign_model(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Hand tensors that exist to a model: torch's own part of loading by assignment."""
    model.load_state_dict(state, assign=True)


# What each limit needs: "copy" (source, target), "write" (source, path), "read" (path, target),
# "map" (path, size), "model" or "meta" (model, dictionary).
LIMITS: dict[str, tuple[str, Callable[..., object]]] = {
    "memcpy": ("copy", copy_memory),
    "write": ("write", write_at_once),
    "write-fsync": ("write", write_and_sync),
    "write-direct": ("write", write_direct),
    "pread": ("read", read_parallel),
    "mmap-touch": ("map", map_and_touch),
    "fill": ("model", fill_model),
    "assign": ("meta", assign_model),
}
