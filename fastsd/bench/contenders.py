"""Those who take part: fastsd, torch, and all others that load the same weights.

Each is called as its own documentation says for "this file to that device", and reads its own
format. They are imported in the processes that measure them, never here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsd.api import load as fastsd_load
from fastsd.api import save as fastsd_save
from fastsd.bench.machine import find_version

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to load files of a format and, if ``save`` is given, to write them.

    ``package`` is what is installed by pip, ``modules`` what a process imports before the clock
    starts. ``load(path, device)`` returns tensors on that device; ``save(state, path)`` takes them
    where they are.
    """

    name: str
    format: str
    load: Callable[[str, str], State]
    package: str = "torch"
    modules: tuple[str, ...] = ("torch",)
    devices: tuple[str, ...] = ("cpu", "cuda")
    save: Callable[[dict[str, Tensor], str], object] | None = None

    @property
    def key(self) -> str:
        """The name and the format, which only together are unique."""
        return f"{self.name} {self.format}"

    def find_lack(self, device: str) -> str:
        """Why it cannot take part with a device, or ""."""
        version = find_version(self.package)
        if any(importlib.util.find_spec(name.partition(".")[0]) is None for name in self.modules):
            return f"{self.package} is not installed" if version is None else "it has no module"
        kind = torch.device(device).type
        return "" if kind in self.devices else f"it does not load to {kind}"


def _load_fastsd(path: str, device: str) -> State:
    loaded: State = fastsd_load(path, map_location=device)
    return loaded


def _load_torch(path: str, device: str) -> State:
    loaded: State = torch.load(path, map_location=device, weights_only=True)
    return loaded


def _load_torch_mapped(path: str, device: str) -> State:
    loaded: State = torch.load(path, map_location=device, weights_only=True, mmap=True)
    return loaded


def _load_safetensors(path: str, device: str) -> State:
    from safetensors.torch import load_file

    return load_file(path, device=device)


def _load_safetensors_pread(path: str, device: str) -> State:
    from safetensors.torch import load_file

    return load_file(path, device=device, backend="pread")


def _load_fastsafetensors(path: str, device: str) -> State:
    from fastsafetensors import fastsafe_open

    with fastsafe_open(path, device=device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def _load_instanttensor(path: str, device: str) -> State:
    from instanttensor import safe_open

    with safe_open(path, framework="pt", device=device) as file:
        return dict(file.tensors())


def _load_instanttensor_buffered(path: str, device: str) -> State:
    """Through the page cache, past which it reads by itself."""
    from instanttensor import BackendPolicy, safe_open

    with safe_open(path, framework="pt", device=device, backend=BackendPolicy.BUFFERED) as file:
        return dict(file.tensors())


def _load_flashpack(path: str, device: str) -> State:
    from flashpack.deserialization import iterate_from_flash_tensor, read_flashpack_file

    return dict(iterate_from_flash_tensor(*read_flashpack_file(path, device=device)))


def _load_runai(path: str, device: str) -> State:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(path, device=device)
        return dict(streamer.get_tensors())


def _save_safetensors(state: dict[str, Tensor], path: str) -> object:
    from safetensors.torch import save_file

    return save_file(state, path)


def pack_flashpack(state: dict[str, Tensor], path: str) -> None:
    """Writes flashpack's own format, which fastsd does not."""
    from flashpack import pack_to_file

    pack_to_file(state, path, None)


_SAFETENSORS: Any = {"package": "safetensors", "modules": ("safetensors.torch",)}
_INSTANTTENSOR: Any = {
    "package": "instanttensor",
    "modules": ("instanttensor",),
    "devices": ("cuda",),
}

# In the order of the table.
CONTENDERS = (
    Contender("fastsd", "fsd", _load_fastsd, "fastsd", ("fastsd",), save=fastsd_save),
    Contender("fastsd", "safetensors", _load_fastsd, "fastsd", ("fastsd",)),
    Contender("fastsd", "pth", _load_fastsd, "fastsd", ("fastsd",)),
    Contender("torch", "pth", _load_torch, save=torch.save),
    Contender("torch mmap", "pth", _load_torch_mapped),
    Contender(
        *("safetensors", "safetensors", _load_safetensors), **_SAFETENSORS, save=_save_safetensors
    ),
    Contender("safetensors pread", "safetensors", _load_safetensors_pread, **_SAFETENSORS),
    Contender(
        *("fastsafetensors", "safetensors", _load_fastsafetensors),
        package="fastsafetensors",
        modules=("fastsafetensors",),
    ),
    Contender("InstantTensor", "safetensors", _load_instanttensor, **_INSTANTTENSOR),
    Contender(
        *("InstantTensor buffered", "safetensors", _load_instanttensor_buffered), **_INSTANTTENSOR
    ),
    Contender(
        *("flashpack", "flashpack", _load_flashpack),
        package="flashpack",
        modules=("flashpack.deserialization",),
    ),
    Contender(
        *("runai streamer", "safetensors", _load_runai),
        package="runai-model-streamer",
        modules=("runai_model_streamer",),
    ),
)
# What the line on versions names, beside fastsd and torch.
PACKAGES = tuple(
    dict.fromkeys(c.package for c in CONTENDERS if c.package not in ("fastsd", "torch"))
)
NAMES = tuple(dict.fromkeys(contender.name for contender in CONTENDERS))


def find_contenders(names: Sequence[str]) -> tuple[Contender, ...]:
    """Those of these names, or all for none. Raises ValueError for a name that nobody has."""
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"no contender is called {unknown[0]!r}; there are: {', '.join(NAMES)}")
    return tuple(c for c in CONTENDERS if not names or c.name in names)


def find_contender(key: str) -> Contender:
    return next(contender for contender in CONTENDERS if contender.key == key)
