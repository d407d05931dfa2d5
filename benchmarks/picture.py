"""The picture of a run: how many times faster than torch and safetensors fastsd was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

from report import ROWS, Results, Row, describe_machine, format_ratio

INK, QUIET = "#24292f", "#8c959f"
TORCH, SAFETENSORS = "#e5633a", "#2f6fbd"
WIDTH_INCHES, DPI = 12.0, 100
BAR = 0.36
GROUPS = ("load", "touch", "into", "assign", "save", "durable")


def draw_picture(results: Results, path: Path) -> None:
    """Draw one panel a place, one pair of bars a row, and save it as PNG."""
    rows = sorted(filter(results.has, ROWS), key=lambda row: GROUPS.index(row.group))
    places = list(results.places)
    plt.switch_backend("Agg")
    with mpl.rc_context({"font.size": 10, "text.color": INK, "axes.labelcolor": INK}):
        figure, grid = plt.subplots(
            1,
            len(places),
            figsize=(WIDTH_INCHES, 1.6 + 0.52 * len(rows)),
            sharey=True,
            squeeze=False,
        )
        for axes, place in zip(grid[0], places, strict=True):
            draw_panel(axes, results, place, rows)
            axes.set_xlim(*find_span(results, rows))
        label_rows(grid[0][0], results, rows)
        figure.text(0.012, 0.012, describe_machine(results), color=QUIET, fontsize=8)
        figure.tight_layout(rect=(0, 0.025, 1, 1 - 0.4 / figure.get_figheight()))
        write_head(figure)
        figure.savefig(path, dpi=DPI, facecolor="white", metadata={"Software": None})
        plt.close(figure)


def write_head(figure: Any) -> None:
    """Write the title and the legend in one line above the panels."""
    y = 1 - 0.26 / figure.get_figheight()
    figure.text(0.012, y, "fastsd: times faster than", fontsize=15, weight="bold", va="center")
    handles = [
        Patch(color=TORCH, label="torch (load call and assign: against mmap=True)"),
        Patch(color=SAFETENSORS, label="safetensors"),
    ]
    figure.legend(
        handles=handles, loc="center left", bbox_to_anchor=(0.26, y), ncols=2, frameon=False
    )


def find_span(results: Results, rows: list[Row]) -> tuple[float, float]:
    """Return the ends of the axis, the same for all panels, with room for the numbers."""
    pairs = [(row, name) for row in rows for name in (row.torch, "safetensors")]
    found = [results.ratio(place, *pair) for place in results.places for pair in pairs]
    ratios = [ratio for ratio in found if ratio]
    return min([0.7, *ratios]) * 0.8, max([3.0, *ratios]) * 2.6


def draw_panel(axes: Any, results: Results, place: str, rows: list[Row]) -> None:
    """Draw the bars of one place; a bar starts at 1, where both are equally fast."""
    for index, row in enumerate(rows):
        for y, colour, name in (
            (index - BAR / 2, TORCH, row.torch),
            (index + BAR / 2, SAFETENSORS, "safetensors"),
        ):
            ratio = results.ratio(place, row, name)
            if ratio is not None:
                axes.barh(y, ratio - 1, BAR, left=1.0, color=colour, zorder=2)
                axes.text(max(ratio, 1) * 1.06, y, format_ratio(ratio), va="center", fontsize=8.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.axvline(1.0, color=INK, linewidth=1, zorder=3)
    axes.grid(axis="x", color="#eaeef2", zorder=0)
    axes.set_title(results.places[place], fontsize=11, loc="left", color=INK)
    axes.tick_params(colors=INK, length=0, which="both")
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def label_rows(axes: Any, results: Results, rows: list[Row]) -> None:
    """Name the rows, first on top, and part one kind of work from the next."""
    axes.set_yticks(range(len(rows)))
    axes.set_yticklabels([f"{row.work}\n{results.titles[row.case]}" for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    for index in range(1, len(rows)):
        if rows[index].group != rows[index - 1].group:
            for panel in axes.figure.axes:
                panel.axhline(index - 0.5, color="#d0d7de", linewidth=0.8, zorder=1)
