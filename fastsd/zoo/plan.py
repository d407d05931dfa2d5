"""Plans: what is in a zoo, what becomes of it, and what cannot be done, before anything is."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from fastsd.zoo.recognise import CHECKPOINT_SUFFIXES, Form, recognise_file
from fastsd.zoo.trees import Listing, Piece, Tree, is_remote, open_tree

Format = Literal["fsd", "pth", "safetensors"]
FORMATS: tuple[Format, ...] = get_args(Format)

# What a worker needs whatever it converts: torch itself, and what convert is bounded to.
_WORKER_BYTES = 512 << 20
_INDEX_BYTES_MAX = 256 << 20
_INDEX = re.compile(r"(?P<stem>.+?)(\.safetensors|\.bin|\.fsd|\.pth|\.pt)?\.index(\.[\w-]+)?\.json")
# Names that mean one model to Hugging Face's libraries, whatever is behind the first dot.
_SAME_MODEL = {"pytorch_model": "model"}
_SAFE_FIRST = ("model", "diffusion_pytorch_model", "adapter_model")


@dataclass(frozen=True)
class Options:
    """How to convert: what `fastsd.convert` takes, with the dtype by name ("bfloat16").

    ``keep_suffix`` makes x.pth.fsd of x.pth, not x.fsd.
    """

    to: Format = "fsd"
    pick: str | None = None
    strip_prefix: str | None = None
    dtype: str | None = None
    drop_optimizer: bool = False
    metadata: dict[str, str] | None = None
    max_shard_size: int | None = None
    lossy: bool = False
    verify: bool = False
    trust: bool = False
    keep_suffix: bool = False

    def to_json(self) -> dict[str, Any]:
        """What decides what is in the target: a later run with the same need not do it again."""
        return {key: value for key, value in asdict(self).items() if key != "trust"}


@dataclass(frozen=True)
class PlanItem:
    """One conversion, with everything that a process elsewhere needs to do it.

    ``name`` is that of the file, index or directory, from the root ``root``; ``target`` a local
    path; ``pieces`` all files to be read. An item with a ``problem`` cannot be converted. ``note``
    is what the user should know about the choice. ``trusted`` lets it run code while it is read.
    """

    name: str
    root: str
    target: str
    form: Form
    pieces: tuple[Piece, ...]
    options: Options
    note: str = ""
    problem: str = ""
    trusted: bool = False
    scratch: str = ""

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def memory(self) -> int:
        """An estimate of what converting takes: all of it for what cannot be mapped."""
        return _WORKER_BYTES + (0 if self.form.is_mapped else self.nbytes)

    @property
    def disk(self) -> int:
        """What has to be fetched."""
        return self.nbytes if is_remote(self.root) else 0


@dataclass
class Plan:
    """``others`` is how many files are no checkpoints and are left alone, with ``others_nbytes``.
    ``refused`` are names that are not looked into, with the reason."""

    root: str
    out: str
    options: Options
    items: list[PlanItem] = field(default_factory=list)
    others: int = 0
    others_nbytes: int = 0
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self.items)


def plan_zoo(root: str | os.PathLike[str], out: str | os.PathLike[str], options: Options) -> Plan:
    """What there is to convert below ``root``, a directory or an fsspec URL, into ``out``.

    Reads the beginning of every file, the table of contents of zip files, and the indexes of
    sharded checkpoints; writes nothing. Targets mirror the tree, with the suffix of the format.
    ``out`` may lie in ``root``; it is left out then. Raises OSError, and ImportError for a URL
    without fsspec.
    """
    root, out = os.fspath(root), os.path.abspath(out)
    tree = open_tree(root, exclude=out)
    listing = tree.list()
    planner = _Planner(Plan(root, out, options, refused=listing.refused), tree, listing)
    planner.take_directories()
    planner.take_indexes()
    planner.leave_duplicates()
    planner.take_files()
    plan = planner.plan
    plan.items = sorted(_find_collisions(plan.items), key=lambda item: item.name)
    return plan


class _Planner:
    """Takes files out of a listing, one kind of checkpoint after the other."""

    def __init__(self, plan: Plan, tree: Tree, listing: Listing) -> None:
        self.plan = plan
        self._tree = tree
        self._listing = listing
        # What links lead to has the links' names.
        hidden = {real for real in listing.links.values() if real not in listing.links}
        self._left = {n: p for n, p in listing.pieces.items() if n not in hidden}
        self._notes: dict[str, str] = {}

    def take_directories(self) -> None:
        """Those of torch.distributed.checkpoint; what is in them is theirs alone."""
        for name in [n for n in self._left if PurePosixPath(n).name == ".metadata"]:
            folder = PurePosixPath(name).parent
            shards = [
                n for n in self._left if n.endswith(".distcp") and PurePosixPath(n).parent == folder
            ]
            if shards:
                self._take(str(folder), Form.DCP, [name, *shards])
            else:
                self._leave(name)

    def take_indexes(self) -> None:
        """Sharded checkpoints; their shards are no items of their own."""
        for name in [n for n in self._left if _INDEX.fullmatch(PurePosixPath(n).name)]:
            shards = self._read_index(name)
            if shards is None:
                self._leave(name)
                continue
            folder = PurePosixPath(name).parent
            problem = next(filter(None, (_check_name(shard) for shard in shards)), "")
            paths = [] if problem else [str(folder / shard) for shard in shards]
            missing = [path for path in paths if path not in self._listing.pieces]
            if missing:
                reason = self._listing.refused.get(missing[0], "it is missing")
                problem = f"the index names {missing[0]}: {reason}"
            self._take(name, Form.SHARDED, [name, *(p for p in paths if p not in missing)], problem)

    def _read_index(self, name: str) -> list[str] | None:
        """The names of the shards; None for a file that is no index."""
        if self._left[name].nbytes > _INDEX_BYTES_MAX:
            return None
        try:
            with self._tree.open(name) as file:
                shards = json.load(file)["weight_map"].values()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None
        return list(dict.fromkeys(map(str, shards)))

    def leave_duplicates(self) -> None:
        """Of a model that is there twice the safetensors are taken, not the pickles."""
        taken = {item.name: item for item in self.plan.items}
        by_model: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
        for name in (*self._left, *taken):
            model = _name_model(name)
            if model is not None:
                folder = str(PurePosixPath(name).parent)
                suffix = ".safetensors" if ".safetensors" in PurePosixPath(name).name else ".bin"
                by_model[folder, model].setdefault(suffix, name)
        for found in by_model.values():
            if len(found) < 2:
                continue
            safe, other = found[".safetensors"], found[".bin"]
            note = f"{PurePosixPath(other).name} is taken for the same model and left"
            if other in self._left:
                self._leave(other)
            else:
                self.plan.items.remove(taken[other])
                self.plan.others += len(taken[other].pieces)
                self.plan.others_nbytes += taken[other].nbytes
            if safe in taken:
                at = self.plan.items.index(taken[safe])
                self.plan.items[at] = replace(taken[safe], note=note)
            else:
                self._notes[safe] = note

    def take_files(self) -> None:
        for name in list(self._left):
            try:
                with self._tree.open(name) as file:
                    form = recognise_file(name, file)
            except OSError as error:
                self._take(name, Form.UNKNOWN, [name], f"cannot be read: {error}")
                continue
            if form is None:
                self._leave(name)
            else:
                self._take(name, form, [name])

    def _take(self, name: str, form: Form, paths: Iterable[str], problem: str = "") -> None:
        pieces = [self._listing.pieces[path] for path in paths]
        for piece in pieces:
            self._left.pop(piece.name, None)
        plan = self.plan
        # The zoo itself may be a directory of torch.distributed.checkpoint.
        own_name = os.path.basename(os.path.abspath(plan.root)) if name == "." else name
        target = _name_target(own_name, form, plan.options)
        self.plan.items.append(
            PlanItem(
                name=name,
                root=plan.root if is_remote(plan.root) else os.path.abspath(plan.root),
                target=str(Path(plan.out, target)),
                form=form,
                pieces=tuple(pieces),
                options=plan.options,
                note=self._notes.get(name, ""),
                problem=problem,
            )
        )

    def _leave(self, name: str) -> None:
        self.plan.others += 1
        self.plan.others_nbytes += self._left.pop(name).nbytes


def _check_name(shard: str) -> str:
    """What is wrong with the name of a shard; empty if nothing is."""
    path = PurePosixPath(shard)
    if path.is_absolute() or ".." in path.parts or "\\" in shard or "\0" in shard or not path.name:
        return f"the index names a file outside its directory: {shard!r}"
    return ""


def _name_model(name: str) -> str | None:
    """What a file with a name of Hugging Face's libraries holds; None for any other name."""
    file = PurePosixPath(name).name
    match = _INDEX.fullmatch(file)
    stem, suffix = (match["stem"], "") if match else os.path.splitext(file)
    if suffix not in ("", ".safetensors", ".bin"):
        return None
    first, dot, variant = stem.partition(".")
    first = _SAME_MODEL.get(first, first)
    return f"{first}{dot}{variant}" if first in _SAFE_FIRST else None


def _name_target(name: str, form: Form, options: Options) -> str:
    path = PurePosixPath(name)
    match = _INDEX.fullmatch(path.name) if form is Form.SHARDED else None
    stem = match["stem"] if match else path.name
    if not (match or form is Form.DCP or options.keep_suffix):
        first, suffix = os.path.splitext(stem.removesuffix(".tar"))  # x.pth.tar is usual, too
        stem = first if suffix.lower() in CHECKPOINT_SUFFIXES else stem
    # Shards are written to a directory.
    suffix = f".{options.to}" if options.max_shard_size is None else ""
    return str(path.with_name(f"{stem}{suffix}"))


def _find_collisions(items: list[PlanItem]) -> list[PlanItem]:
    by_target: dict[str, list[PlanItem]] = defaultdict(list)
    for item in items:
        by_target[item.target].append(item)
    for item in items:
        # A directory of shards must not be one of other targets; a file cannot be.
        for folder in map(str, Path(item.target).parents):
            if folder in by_target:
                by_target[folder].append(item)

    def complain(item: PlanItem) -> PlanItem:
        others = [other.name for other in by_target[item.target] if other is not item]
        if not others or item.problem:
            return item
        what = f"{', '.join(others)} would be written to the same {Path(item.target).name}"
        return replace(item, problem=f"{what}: keep_suffix tells them apart")

    return [complain(item) for item in items]
