"""Layouts: which framework a checkpoint comes from, and which of its keys holds the weights.

Told from names and kinds alone, so that nothing has to be unpickled to ask.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What stands under a key of a checkpoint, as far as it can be told without unpickling."""

    TENSOR = "tensor"
    MAPPING = "mapping"  # a dictionary, ordered or not, whatever is in it
    OBJECT = "object"  # of a class: a module, a configuration
    VALUE = "value"  # anything else: numbers, strings, lists, None


@dataclass(frozen=True)
class Layout:
    """What a checkpoint is, and where its weights are.

    ``name`` is "flat" for a state_dict, "nested" for dictionaries without a known name, and
    otherwise whose convention it is: "lightning", "mmengine", "timm", "ultralytics", "detectron2",
    or "training" for what everyone's own loop saves.

    ``pick`` is the key of the weights to take by default, None if they are not under one key.
    With ``is_module`` it holds a whole module, whose ``state_dict()`` they are. With
    ``is_average`` it holds a moving average, because there are no others.
    ``others`` are the keys of more weights: averages of the same, or of other networks.
    ``optimizer`` are the keys of optimizers, their schedules and gradient scalers.
    ``prefix`` is what all names of the weights start with and no model has by itself, such as
    "module." of DataParallel: what could be stripped.
    """

    name: str
    pick: str | None = None
    is_module: bool = False
    is_average: bool = False
    others: tuple[str, ...] = ()
    optimizer: tuple[str, ...] = ()
    prefix: str = ""

    @property
    def note(self) -> str:
        """What was chosen among several, or for want of others; empty if there was no choice."""
        if self.is_average:
            return f"there are no raw weights: the moving average in {self.pick!r} is taken"
        if self.pick is not None and self.others:
            others = ", ".join(map(repr, self.others))
            return f"{self.pick!r} is taken; there are also {others}"
        return ""


# Where weights are, in the order in which they are preferred; averages after all others.
_WEIGHTS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "network",
    "net",
    "params",
    "weights",
    "student",
    "generator",
    "netG",
    "G",
    "discriminator",
    "netD",
    "D",
)
_AVERAGES = (
    "state_dict_ema",
    "ema_state_dict",
    "model_ema_state_dict",
    "model_ema",
    "ema_model",
    "params_ema",
    "generator_ema",
    "g_ema",
    "G_ema",
    "ema",
    "teacher",
)
_OPTIMIZER_STARTS = ("optim", "lr_sched", "sched", "param_sched", "scaler", "amp")
_OPTIMIZER_KEYS = frozenset(
    ("opt", "opt_state", "opt_state_dict", "d_optim", "g_optim", "grad_scaler", "loss_scaler")
)
# What wrappers of modules put before every name.
_WRAPPERS = ("module.", "_orig_mod.", "_forward_module.", "_fsdp_wrapped_module.")


def kinds_of(checkpoint: Mapping[object, object], is_tensor: type) -> dict[str, Kind]:
    """The kinds of a loaded checkpoint's values, for `recognise`. Keys that are no strings are
    left out."""
    plain = (bool, int, float, complex, str, bytes, list, tuple, set, type(None))

    def kind_of(value: object) -> Kind:
        if isinstance(value, is_tensor):
            return Kind.TENSOR
        if isinstance(value, Mapping):
            return Kind.MAPPING
        return Kind.VALUE if isinstance(value, plain) else Kind.OBJECT

    return {key: kind_of(value) for key, value in checkpoint.items() if isinstance(key, str)}


def recognise(top_level: Mapping[str, Kind], names: Iterable[str] = ()) -> Layout:
    """The layout of a checkpoint with these keys.

    ``names`` are those of its tensors, as `fastsd.open` gives them: the keys on the way, joined by
    dots. They are only asked for `Layout.prefix`.
    """
    module = _find_module(top_level)
    if module is not None:
        return Layout(
            "ultralytics" if _is_ultralytics(top_level) else "training",
            module,
            is_module=True,
            is_average=module in _AVERAGES,
            others=tuple(
                k for k in ("model", "ema") if k != module and top_level.get(k) is Kind.OBJECT
            ),
            optimizer=_find_optimizer(top_level),
        )
    weights = [k for k in (*_WEIGHTS, *_AVERAGES) if top_level.get(k) is Kind.MAPPING]
    pick = weights[0] if weights else None
    name = _name(top_level, pick)
    return Layout(
        name,
        pick,
        is_average=pick in _AVERAGES,
        others=tuple(weights[1:]),
        # In a state_dict these are names of weights.
        optimizer=() if name == "flat" else _find_optimizer(top_level),
        prefix=_find_prefix(names, pick, _WRAPPERS + ("model.",) * (name == "lightning")),
    )


def _find_module(top_level: Mapping[str, Kind]) -> str | None:
    # Ultralytics keeps None as the model where the average is all that it has.
    return next((k for k in ("model", "ema") if top_level.get(k) is Kind.OBJECT), None)


def _is_ultralytics(top_level: Mapping[str, Kind]) -> bool:
    return "train_args" in top_level or {"best_fitness", "updates"} <= top_level.keys()


def _name(top_level: Mapping[str, Kind], pick: str | None) -> str:
    keys = top_level.keys()
    if pick is None:
        return "nested" if Kind.MAPPING in top_level.values() else "flat"
    if pick == "state_dict" and "pytorch-lightning_version" in keys:
        return "lightning"
    if "meta" in keys and pick in ("state_dict", "ema_state_dict"):
        return "mmengine"
    if "model" in keys and keys & {"__author__", "matching_heuristics", "iteration"}:
        return "detectron2"
    if keys & {"state_dict_ema", "model_ema"} or {"arch", "state_dict", "version"} <= keys:
        return "timm"
    return "training"


def _find_optimizer(top_level: Mapping[str, Kind]) -> tuple[str, ...]:
    return tuple(
        key
        for key, kind in top_level.items()
        if kind is not Kind.TENSOR
        and (key in _OPTIMIZER_KEYS or key.lower().startswith(_OPTIMIZER_STARTS))
    )


def _find_prefix(names: Iterable[str], pick: str | None, wrappers: tuple[str, ...]) -> str:
    inner = f"{pick}." if pick is not None else ""
    left = (n[len(inner) :] for n in names if n.startswith(inner))
    # The counter is what torch's averaged models have beside the module.
    common = _common_start([n for n in left if n != "n_averaged"])
    prefix = ""
    # Once each: the second "model." of "model.model.embed_tokens" is the model's own.
    while found := next((w for w in wrappers if common.startswith(w) and w not in prefix), None):
        prefix += found
        common = common[len(found) :]
    return prefix


def _common_start(names: list[str]) -> str:
    low, high = min(names, default=""), max(names, default="")
    differ = (i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b)
    return low[: next(differ, len(low))]
