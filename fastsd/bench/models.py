"""What is loaded: weights, given or made up, in a file of each format that somebody reads."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastsd.api import open as fastsd_open
from fastsd.api import save
from fastsd.bench.cache import sync_file
from fastsd.bench.machine import file_system
from fastsd.bench.process import ChildError, run_child
from fastsd.bench.results import format_size
from fastsd.convert import convert, size_of
from fastsd.errors import FastsdError
from fastsd.saving import Format

CONVERTED: tuple[Format, ...] = ("fsd", "safetensors", "pth")
PACKED = "flashpack"
_SUFFIXES = {
    ".fsd": "fsd",
    ".safetensors": "safetensors",
    **dict.fromkeys((".pth", ".pt", ".bin", ".ckpt"), "pth"),
}
# Random bits that repeat after so many bytes: more than any file system looks for repetitions in.
_NOISE_BYTES = 16 << 20


@dataclass(frozen=True)
class Synthetic:
    """Made-up weights: about the shapes of a decoder, exactly ``nbytes`` up to one element."""

    nbytes: int
    tensors: int = 300
    dtype: torch.dtype = torch.bfloat16


@dataclass
class Model:
    """Files of the same weights. ``lacking`` says why there is none of a format; ``reference`` is
    the one that all are compared with, by fastsd."""

    name: str
    folder: Path
    files: dict[str, Path] = field(default_factory=dict)
    lacking: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tensors: int = 0
    nbytes: int = 0
    dtypes: tuple[str, ...] = ()

    @property
    def reference(self) -> Path:
        return self.files["fsd"]

    @property
    def file_system(self) -> str:
        return file_system(self.folder)


@contextmanager
def open_models(
    sources: list[Path | Synthetic], work: Path | None, formats: set[str]
) -> Iterator[list[Model]]:
    """Makes the files of all models, in scratch folders that are gone afterwards.

    Folders are made in ``work``, or beside each given file, or here. Raises OSError, for too little
    room, too, and what `convert` raises for files that hold no weights.
    """
    scratch: list[Path] = []
    try:
        models = []
        for source in sources:
            parent = work or (Path.cwd() if isinstance(source, Synthetic) else source.parent)
            _check_room(parent, source, formats)
            folder = Path(tempfile.mkdtemp(prefix="fastsd-bench-", dir=parent))
            scratch.append(folder)
            models.append(_make_model(source, folder, formats))
        yield models
    finally:
        for folder in scratch:
            shutil.rmtree(folder, ignore_errors=True)


def _check_room(parent: Path, source: Path | Synthetic, formats: set[str]) -> None:
    if not parent.is_dir():
        number = errno.ENOTDIR if parent.exists() else errno.ENOENT
        raise OSError(number, os.strerror(number), str(parent))
    size = source.nbytes if isinstance(source, Synthetic) else size_of(str(source))
    need, free = size * (len(formats | {"fsd"}) + 1), shutil.disk_usage(parent).free
    if need > free:
        detail = (
            f"{format_size(free)} are free, and {format_size(need)} are needed for the weights in "
            "every format: name another place, or fewer contenders"
        )
        raise OSError(errno.ENOSPC, detail, str(parent))


def _make_model(source: Path | Synthetic, folder: Path, formats: set[str]) -> Model:
    if isinstance(source, Synthetic):
        model = Model(_name_synthetic(source), folder)
        path = folder / "model.fsd"
        save(make_state(source), path)
        model.files["fsd"] = path
    else:
        model = Model(str(source), folder)
        path = _find_weights(source, model)
    for format in CONVERTED:
        if format in formats | {"fsd"} and format not in model.files:
            _convert(model, path, format)
    if PACKED in formats:
        _pack(model)
    for path in model.files.values():
        sync_file(path)
    _describe(model)
    return model


def _name_synthetic(source: Synthetic) -> str:
    dtype = str(source.dtype).removeprefix("torch.")
    return f"synthetic {format_size(source.nbytes)}, {source.tensors} x {dtype}"


def make_state(source: Synthetic) -> dict[str, Tensor]:
    """Blocks of nine matrices and vectors, and vectors with what is left; all of random bits."""
    itemsize = source.dtype.itemsize
    total = max(source.nbytes // itemsize, source.tensors)
    blocks = (source.tensors - 1) // 9
    # A block has 4 w*w, 3 w*(8w/3) and 2 w: about 12 w*w numbers.
    width = int((total / (blocks * 12.0)) ** 0.5) if blocks else 0
    while blocks and blocks * sum(a * b for _, a, b in _list_block(width)) > total * 0.99:
        width -= 1
    if width < 1:
        blocks = 0
    shapes: dict[str, tuple[int, ...]] = {
        f"layers.{i}.{name}": (a, b) if b > 1 else (a,)
        for i in range(blocks)
        for name, a, b in _list_block(width)
    }
    rest = source.tensors - len(shapes)
    left = total - sum(torch.Size(shape).numel() for shape in shapes.values())
    for i in range(rest):
        shapes[f"rest.{i}"] = (left // rest + (left % rest if i == 0 else 0),)
    return _fill(shapes, source.dtype)


def _list_block(width: int) -> list[tuple[str, int, int]]:
    inner = max(1, width * 8 // 3)
    names = [(f"attention.{name}.weight", width, width) for name in "qkvo"]
    names += [(f"mlp.{name}.weight", inner, width) for name in ("gate", "up")]
    return [*names, ("mlp.down.weight", width, inner), ("norm_1", width, 1), ("norm_2", width, 1)]


def _fill(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.empty(_NOISE_BYTES // 8, dtype=torch.int64)
    noise.random_(-(2**63), None, generator=generator)
    noise = noise.view(torch.uint8)
    state, start = {}, 0
    for name, shape in shapes.items():
        tensor = torch.empty(shape, dtype=dtype)
        flat = tensor.flatten().view(torch.uint8)
        done = 0
        while done < len(flat):
            part = noise[start : start + len(flat) - done]
            flat[done : done + len(part)] = part
            done += len(part)
            start = (start + len(part)) % _NOISE_BYTES
        state[name] = tensor
    return state


def _find_weights(source: Path, model: Model) -> Path:
    """The file that all others are converted from: the one that was given, if it holds nothing but
    weights, so that every format can have all of it; otherwise a file of the weights in it."""
    given = _SUFFIXES.get(source.suffix)
    if given != "safetensors":
        path = model.folder / "model.safetensors"
        report = convert(source, path)
        model.files["safetensors"] = path
        if report.picked is not None or report.dropped:
            part = repr(report.picked) if report.picked else "what every format can hold"
            model.notes = (f"only {part} of the file",)
            return path
    # A link would do as well, were it not for limits, which are those of one file system.
    if given and source.is_file() and source.stat().st_dev == model.folder.stat().st_dev:
        model.files[given] = source
    return source


def _convert(model: Model, source: Path, format: Format) -> None:
    path = model.folder / f"model.{format}"
    try:
        convert(source, path, to=format)
    except FastsdError as error:
        if format == "fsd":
            raise
        model.lacking[format] = str(error)
    else:
        model.files[format] = path


def _pack(model: Model) -> None:
    path = model.folder / f"model.{PACKED}"
    try:
        list(run_child({"do": "pack", "reference": str(model.reference), "path": str(path)}))
    except ChildError as error:
        model.lacking[PACKED] = f"no file was made: {error}"
    else:
        model.files[PACKED] = path


def _describe(model: Model) -> None:
    with fastsd_open(model.reference) as archive:
        infos = [archive.info(name) for name in archive]
    storages = {info.storage: info.storage_nbytes for info in infos}
    model.tensors, model.nbytes = len(infos), sum(storages.values())
    model.dtypes = tuple(sorted({str(info.dtype).removeprefix("torch.") for info in infos}))
