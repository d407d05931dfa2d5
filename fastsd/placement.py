"""Where storages go: torch's rules for `map_location`, and for its modes without data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.serialization import _get_restore_location

from fastsd import _core
from fastsd.errors import UnsupportedError
from fastsd.storages import place
from fastsd.tensors import CPU, Placed, Restore
from fastsd.upload import Passage

_STAY = {CPU, "meta"}  # a meta storage has no bytes to move, and torch leaves it where it is


def skips_data() -> bool:
    """Whether torch.serialization.skip_data is on in this thread."""
    state = getattr(torch.serialization, "_serialization_tls", None)
    return bool(getattr(state, "skip_data", False))


def fakes_tensors() -> bool:
    """Whether FakeTensorMode is on."""
    # Without any mode there is no fake one; asking that first saves 2.5 us of some 15.
    return torch._C._len_torch_dispatch_stack() > 0 and detect_fake_mode(None) is not None


def asks_packages() -> bool:
    """Whether a registered package comes before torch's own for storages in CPU memory.

    Then it is up to that package what they are tagged with and where they go; see
    torch.serialization.register_package, which keeps its list sorted.
    """
    return torch.serialization._package_registry[0][1] is not torch.serialization._cpu_tag


def _has_packages() -> bool:
    """Whether anybody has registered a package, which may do anything with storages."""
    restores = [entry[2] for entry in torch.serialization._package_registry]
    own = torch.serialization.__name__
    return any(getattr(getattr(f, "func", f), "__module__", "") != own for f in restores)


def find_restore(map_location: Any, devices: list[str]) -> Restore | None:
    """What puts a storage, saved from one of ``devices``, where ``map_location`` says.

    None: every storage stays in CPU memory, where it is. ``map_location`` as for torch.load: None,
    a string, a torch.device, a dict from saved to wanted devices, or a callable of a CPU storage
    and the saved device. What it cannot place raises torch's own errors. Under FakeTensorMode and
    torch.serialization.skip_data storages have the size that was saved and not the data.
    """
    if fakes_tensors():
        return _find_fake_restore(map_location)
    restore: Restore
    if skips_data():
        restore = _get_restore_location(map_location)
        return lambda storage, device: restore(torch.UntypedStorage(storage.nbytes()), device)
    if map_location is None:
        stays = _STAY.issuperset(devices)
    else:
        stays = isinstance(map_location, (str, torch.device)) and str(map_location) == CPU
    if stays and not asks_packages():
        return None
    restore = _get_restore_location(map_location)
    return restore


def place_storages(
    reader: _core.Reader, map_location: Any, numbers: Sequence[int] | None, passage: Passage
) -> Placed:
    """Storages of tensors, of all or those of ascending numbers, where ``map_location`` puts them,
    and cast. Raises what `find_restore` and `storages.place` raise."""
    restore = find_restore(map_location, reader.devices)
    if restore is None and passage.dtype is None:
        return Placed({}, {})
    if fakes_tensors() or skips_data():
        if passage.dtype is not None:
            detail = "dtype cannot be had under FakeTensorMode or torch.serialization.skip_data"
            raise UnsupportedError(detail)
        return Placed({}, {}, restore)
    asks_each = _has_packages() or (
        callable(map_location) and not isinstance(map_location, (dict, torch.device))
    )
    return place(reader, restore, numbers, passage, asks_each=asks_each)


def _find_fake_restore(map_location: Any) -> Restore:
    """Meta storages that say on which device they pretend to be."""

    def restore(storage: torch.UntypedStorage, device: str) -> torch.UntypedStorage:
        target: str | torch.device = device
        if isinstance(map_location, dict):
            target = map_location.get(device, device)
        elif isinstance(map_location, (str, torch.device)):
            target = map_location
        elif map_location is not None:
            raise RuntimeError("under FakeTensorMode map_location must name devices")
        fake = torch.UntypedStorage(storage.nbytes(), device="meta")
        fake._fake_device = torch.device(target)
        return fake

    return restore
