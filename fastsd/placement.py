"""Where storages go: torch's rules for `map_location`."""

from __future__ import annotations

from typing import Any

import torch
from torch.serialization import _get_restore_location

from fastsd.archive import Restore
from fastsd.tensors import CPU

_STAY = {CPU, "meta"}  # a meta storage has no bytes to move, and torch leaves it where it is


def find_restore(map_location: Any, devices: list[str]) -> Restore | None:
    """What puts a storage, saved from one of ``devices``, where ``map_location`` says.

    None: every storage stays in CPU memory, where it is. ``map_location`` as for torch.load: None,
    a string, a torch.device, a dict from saved to wanted devices, or a callable of a CPU storage
    and the saved device. What it cannot place raises torch's own errors.
    """
    if map_location is None:
        stays = _STAY.issuperset(devices)
    else:
        stays = isinstance(map_location, (str, torch.device)) and str(map_location) == CPU
    if stays:
        return None
    restore: Restore = _get_restore_location(map_location)
    return restore
