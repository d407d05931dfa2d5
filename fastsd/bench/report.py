"""A document as text: lines that describe, and tables, for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from fastsd.bench.results import Document, ModelInfo, Result, Times, format_size

FOLDING = ("notes", "how")
NUMBERS = ("first", "call", "p50", "p90", "p99", "GB/s", "of limit")
_LOADS = ("contender", "format", *NUMBERS, "limit", "notes")
_SAVES = ("contender", "format", *(n for n in NUMBERS if n != "call"), "limit", "notes")
# What a narrow terminal does without, in this order. Files of results have all.
_SPARE = ("p90", "p99", "limit")
_GAP, _NOTES_MIN = 2, 16
_LIMITS = ("limit", "GB/s", "how")
_LEGEND = (
    "Times in ms: first, the first load or save of a process; p50 to p99, those after it. A load to"
    " the CPU ends when every byte has been touched, to a GPU when that has synchronized; call is"
    " when the call returned (p50). A save ends when the call returns. GB/s: bytes of the weights"
    " over p50."
)


class Table(NamedTuple):
    """Texts in columns; those of ``NUMBERS`` are numbers, those of ``FOLDING`` may be long."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]


def list_tables(document: Document) -> Iterator[Table]:
    """The tables, each model's together: loads and saves, and limits."""
    for model in document.models:
        measured = [r for r in document.results if r.model == model.name and r.status == "measured"]
        for work, device, cache in dict.fromkeys((r.work, r.device, r.cache) for r in measured):
            rows = [r for r in measured if (r.work, r.device, r.cache) == (work, device, cache)]
            if work == "load":
                what = f"loading to {device}, {cache}: {_describe(model)}"
                yield Table(f"{model.name}: {what}", _LOADS, list(map(_list_load, rows)))
            else:
                yield Table(
                    f"{model.name}: saving from {device}", _SAVES, list(map(_list_save, rows))
                )
        limits = [[n.name, _number(n.gb_per_s), n.how] for n in model.limits]
        yield Table(f"{model.name}: what the machine does at best", _LIMITS, limits)


def fit(table: Table, width: int) -> Table:
    """The table without columns that are empty, and without some more if it is too wide."""
    kept = [i for i in range(len(table.columns)) if not all(row[i] == "" for row in table.rows)]
    for spare in _SPARE:
        widths = [max(len(row[i]) for row in (table.columns, *table.rows)) for i in kept]
        if table.columns[kept[-1]] in FOLDING:
            widths[-1] = min(widths[-1], _NOTES_MIN)
        if sum(widths) + _GAP * len(widths) > width and spare in table.columns:
            kept.remove(table.columns.index(spare))
    rows = [[row[i] for i in kept] for row in table.rows]
    return Table(table.title, tuple(table.columns[i] for i in kept), rows)


def describe_machine(document: Document) -> str:
    """One line on hardware and versions, to compare a result later."""
    parts = [f"{key} {value}" for key, value in document.machine.items()]
    return "; ".join(parts)


def list_remarks(document: Document) -> Iterator[str]:
    """What was not measured, each reason once, and what to know of the numbers."""
    reasons: dict[str, list[str]] = {}
    for result in document.results:
        if result.status != "measured":
            word = "failed" if result.status == "failed" else "not measured"
            cache = f" {result.cache}" if result.cache and result.status == "failed" else ""
            where = f"{result.work} to {result.device}" if result.work == "load" else "save"
            who = f"{result.contender} ({result.format}; {where}{cache})"
            who = result.contender if result.reason.endswith("not installed") else who
            reasons.setdefault(f"{word}: {result.reason}", []).append(who)
    for reason, names in reasons.items():
        yield f"{', '.join(dict.fromkeys(names))}: {reason}"
    yield from (f"{model.name}: {note}" for model in document.models for note in model.notes)
    yield _LEGEND
    yield f"All of it took {document.seconds:.0f} s."


def build_markdown(document: Document) -> str:
    """The same as a page of Markdown."""
    lines = ["# Loading and saving weights", "", describe_machine(document), ""]
    for table in list_tables(document):
        lines += [f"## {table.title}", "", *_build_rows(table), ""]
    lines += [f"- {_escape(remark)}" for remark in list_remarks(document)]
    return "\n".join(lines) + "\n"


def _build_rows(table: Table) -> Iterator[str]:
    yield _build_row(table.columns)
    yield _build_row(["---:" if column in NUMBERS else "---" for column in table.columns])
    yield from map(_build_row, table.rows)


def _build_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escape, cells))} |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _describe(model: ModelInfo) -> str:
    what = f"{model.tensors:,} tensors, {format_size(model.nbytes)}, {' and '.join(model.dtypes)}"
    return f"{what}, on {model.file_system}"


def _list_load(result: Result) -> list[str]:
    call = _number(result.call.p50) if result.call else ""
    first = _number(result.first)
    return [result.contender, result.format, first, call, *_list_rest(result)]


def _list_save(result: Result) -> list[str]:
    return [result.contender, result.format, _number(result.first), *_list_rest(result)]


def _list_rest(result: Result) -> list[str]:
    percent = "" if result.percent is None else f"{result.percent:.0f}%"
    speed = [_number(result.gb_per_s), percent, result.limit or ""]
    return [*_list_times(result.ready), *speed, "; ".join(result.notes)]


def _list_times(times: Times | None) -> Iterable[str]:
    return ("", "", "") if times is None else map(_number, (times.p50, times.p90, times.p99))


def _number(value: float | None) -> str:
    """Three digits, and no exponent."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
