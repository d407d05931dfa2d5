"""A document as text: lines that describe, and tables, for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from fastsd.bench.results import Document, ModelInfo, Result, Times, format_size

NUMBERS = ("first", "call", "p50", "p90", "p99", "GB/s", "of limit")
_LOADS = ("contender", "format", "device", "cache", *NUMBERS, "limit", "notes")
_SAVES = ("contender", "format", "device", *(n for n in NUMBERS if n != "call"), "limit", "notes")
_LIMITS = ("limit", "GB/s", "how")
_LEGEND = (
    "Times in ms: first, the first load or save of a process; p50 to p99, those after it. A load to"
    " the CPU ends when every byte has been touched, to a GPU when that has synchronized; call is"
    " when the call returned (p50). A save ends when the call returns. GB/s: bytes of the weights"
    " over p50."
)


class Table(NamedTuple):
    """Texts in columns; those of ``NUMBERS`` are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]


def list_tables(document: Document) -> Iterator[Table]:
    """The tables, each model's together: loads, saves, limits."""
    for model in document.models:
        measured = [r for r in document.results if r.model == model.name and r.status == "measured"]
        loads = [_list_load(result) for result in measured if result.work == "load"]
        saves = [_list_save(result) for result in measured if result.work == "save"]
        if loads:
            yield Table(f"{model.name}: loading, {_describe(model)}", _LOADS, loads)
        if saves:
            yield Table(f"{model.name}: saving", _SAVES, saves)
        limits = [[n.name, _number(n.gb_per_s), n.how] for n in model.limits]
        yield Table(f"{model.name}: what the machine does at best", _LIMITS, limits)


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
    who = [result.contender, result.format, result.device, result.cache]
    call = _number(result.call.p50) if result.call else ""
    return [*who, _number(result.first), call, *_list_rest(result)]


def _list_save(result: Result) -> list[str]:
    who = [result.contender, result.format, result.device]
    return [*who, _number(result.first), *_list_rest(result)]


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
