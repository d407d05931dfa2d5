"""A document as a picture: bars of GB/s, beside the limit that binds each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastsd.bench.report import describe_machine
from fastsd.bench.results import Document, ModelInfo, Result

_OURS, _OTHERS, _INK = "#2f6fbd", "#b9c0c8", "#24292f"
_WIDTH_INCHES, _DPI = 9.0, 110


def draw(document: Document, path: Path) -> None:
    """Writes a picture, of the kind that the suffix names. Raises ModuleNotFoundError without
    matplotlib, and ValueError where nothing was measured."""
    from matplotlib.figure import Figure

    panels = list(_list_panels(document))
    if not panels:
        raise ValueError("nothing was measured that could be drawn")
    heights = [len(rows) + 1.5 for _, rows in panels]
    figure = Figure(figsize=(_WIDTH_INCHES, 0.27 * sum(heights) + 0.8), layout="constrained")
    grid = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)
    for (title, rows), axes in zip(panels, grid[:, 0], strict=True):
        _draw_panel(axes, title, rows, document)
    figure.supxlabel(f"GB/s\n{describe_machine(document)}", fontsize=6, color=_INK, wrap=True)
    figure.savefig(path, dpi=_DPI, facecolor="white")


def _list_panels(document: Document) -> list[tuple[str, list[Result]]]:
    found: dict[str, list[Result]] = {}
    for result in document.results:
        if result.gb_per_s is not None:
            how = f"{result.work} {result.device} {result.cache}".strip()
            found.setdefault(f"{result.model}: {how}", []).append(result)
    return list(found.items())


def _draw_panel(axes: Any, title: str, rows: list[Result], document: Document) -> None:
    rates = [row.gb_per_s for row in rows]
    colours = [_OURS if row.contender == "fastsd" else _OTHERS for row in rows]
    axes.barh(range(len(rows)), rates, color=colours)
    axes.set_yticks(range(len(rows)), [f"{r.contender} ({r.format})" for r in rows], fontsize=7)
    for y, rate in enumerate(rates):
        axes.text(rate, y, f" {rate:.3g}", va="center", fontsize=7, color=_INK)
    models = {model.name: model for model in document.models}
    limit = _find_rate(models[rows[0].model], rows[0].limit)
    if limit is not None:
        axes.axvline(limit, color=_INK, linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1.12 * max([*filter(None, rates), limit or 0.0]))
    axes.set_title(title, fontsize=8, loc="left", color=_INK)
    axes.tick_params(axis="x", labelsize=7)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def _find_rate(model: ModelInfo, name: str | None) -> float | None:
    return next((limit.gb_per_s for limit in model.limits if limit.name == name), None)
