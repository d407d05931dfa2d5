"""From measurements to the table: medians, ratios, and what they were meant to reach."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from pytest_benchmark.stats import Stats

Entry = dict[str, Any]
OTHERS_PERCENT_MAX = 8
CONTENDERS = ("fastsd", "torch", "torch-mmap", "safetensors")


@dataclass(frozen=True)
class Row:
    """One kind of work on one dictionary, and how many times faster than others it should be."""

    group: str
    case: str
    work: str
    torch: str  # the contender that "against torch" means here
    torch_target: float | None = None
    safetensors_target: float | None = None
    against: str = ""  # the group of the others' work, where it is not the row's own
    ours: str = "fastsd"  # the contender that is held against the others

    def contender(self, column: str) -> str:
        """Return the contender that a column stands for in this row."""
        return self.ours if column == "fastsd" else column


_THEIRS = "fastsd-safetensors"
ROWS = (
    Row("load", "big", "load call", "torch-mmap", 100, 30),
    Row("load", "20000", "load call", "torch-mmap", 100, 25),
    Row("load", "10", "load call", "torch-mmap", 25, 6),
    Row("load", "big", "load call, torch's file", "torch-mmap", 30, ours="fastsd-pt"),
    Row("load", "big", "load call, safetensors' file", "torch-mmap", None, 20, ours=_THEIRS),
    Row("touch", "big", "load + touch", "torch", 6, 1.1),
    Row("into", "big", "load_into", "torch", 3, 1.05),
    Row("assign", "big", "load_into assign / copy", "torch", None, 20, against="into"),
    Row("assign", "big", "load_into assign", "torch-mmap"),
    Row("save", "big", "save", "torch", 2, 1.0),
    Row("save", "1000", "save", "torch", 6, 4),
    Row("save", "20000", "save", "torch", 25, 20),
    Row("durable", "big", "durable save", "torch", 1.5, 1.5),
    Row("load", "adamw", "load call", "torch-mmap", 50),
    Row("save", "adamw", "save", "torch", 2),
    Row("load", "module", "load call", "torch-mmap", 1),
    Row("save", "module", "save", "torch", 1),
    Row("load", "1000", "load call", "torch-mmap"),
    Row("load", "1000", "load call, torch's file", "torch-mmap", ours="fastsd-pt"),
    Row("load", "1000", "load call, safetensors' file", "torch-mmap", ours=_THEIRS),
    Row("load", "20000", "load call, torch's file", "torch-mmap", ours="fastsd-pt"),
    Row("load", "20000", "load call, safetensors' file", "torch-mmap", ours=_THEIRS),
    Row("load", "adamw", "load call, torch's file", "torch-mmap", ours="fastsd-pt"),
    Row("touch", "1000", "load + touch", "torch"),
    Row("into", "1000", "load_into", "torch"),
    Row("assign", "1000", "load_into assign", "torch-mmap"),
    Row("save", "10", "save", "torch"),
    Row("durable", "1000", "durable save", "torch"),
)

# The bare limit, what it is called, and the work of fastsd to hold against it: (group, contender).
LIMIT_ROWS = (
    ("memcpy", "memory to memory, all cores", None),
    ("mmap-touch", "map one file, touch every byte", ("touch", "fastsd")),
    ("pread", "parallel pread into memory already there", ("into", "fastsd")),
    ("fill", "load_state_dict of tensors in memory", ("into", "fastsd")),
    ("assign", "load_state_dict(assign=True) of tensors in memory", ("assign", "fastsd")),
    ("write", "one big buffered write", ("save", "fastsd")),
    ("write-fsync", "one big buffered write, fsync", ("durable", "fastsd")),
    ("write-direct", "one big direct write, fsync", ("durable", "fastsd")),
)
CONVERSIONS = (
    ("pt-fsd", "torch's file to .fsd"),
    ("fsd-pt", ".fsd to torch's file"),
    ("pt-safetensors", "torch's file to safetensors"),
    ("safetensors-fsd", "safetensors to .fsd"),
)
CONVERSION_TARGET = 0.9
OTHER_WAYS = (
    ("fastsd-read", "fastsd.load(mmap=False), touch every byte"),
    ("fastsd-verify", 'fastsd.load(verify="checksums"), touch every byte'),
)


class Results:
    """The medians of a run, in seconds, found by place, group, case and contender."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.machine: dict[str, Any] = document["machine_info"]
        self.places: dict[str, str] = {}
        self.titles: dict[str, str] = {}
        self.bytes: dict[str, int] = {}
        self._medians: dict[tuple[str, str, str, str], float] = {}
        for entry in document["benchmarks"]:
            info = entry["extra_info"]
            self.places[info["place"]] = info["file_system"]
            self.titles[info["case"]] = info["title"]
            self.bytes[info["case"]] = info["bytes"]
            key = (info["place"], info["group"], info["case"], info["contender"])
            self._medians[key] = median(entry["stats"]["data"])

    def seconds(self, place: str, group: str, case: str, contender: str) -> float | None:
        """Return a median, or None where that was not measured."""
        return self._medians.get((place, group, case, contender))

    def row_seconds(self, place: str, row: Row, contender: str) -> float | None:
        """Return the median that a row shows for a contender."""
        group = row.group if contender == "fastsd" else row.against or row.group
        return self.seconds(place, group, row.case, row.contender(contender))

    def ratio(self, place: str, row: Row, contender: str) -> float | None:
        """Return how many times faster than ``contender`` fastsd is."""
        ours = self.row_seconds(place, row, "fastsd")
        theirs = self.row_seconds(place, row, contender)
        return theirs / ours if ours and theirs else None

    def has(self, row: Row) -> bool:
        """Tell whether any of the row was measured."""
        return any(
            self.seconds(place, row.group, row.case, row.contender(contender))
            for place in self.places
            for contender in CONTENDERS
        )


def merge_laps(entries: Iterable[Entry]) -> list[Entry]:
    """Join the laps of each measurement into one entry of pytest-benchmark's own form."""
    merged: dict[str, Entry] = {}
    for entry in entries:
        name = entry["name"].replace(f"-lap{entry['extra_info'].pop('lap')}]", "]")
        first = merged.setdefault(name, entry)
        if first is not entry:
            first["stats"]["data"] += entry["stats"]["data"]
    for name, entry in merged.items():
        stats = Stats()  # type: ignore[no-untyped-call]
        stats.data = [float(f"{seconds:.6g}") for seconds in entry["stats"]["data"]]
        entry["stats"] |= stats.as_dict()  # type: ignore[no-untyped-call]
        entry["stats"]["data"] = stats.data
        entry["fullname"] = entry["fullname"].replace(entry["name"], name)
        entry["name"], entry["param"] = name, name.partition("[")[2].rstrip("]")
    return list(merged.values())


def format_ratio(ratio: float | None) -> str:
    """Write a ratio cut off, never rounded up: 1.049 is 1.04x."""
    if ratio is None:
        return "-"
    digits = 2 if ratio < 10 else 1 if ratio < 100 else 0
    return f"{math.floor(ratio * 10**digits) / 10**digits:.{digits}f}x"


def format_target(ratio: float | None, target: float | None) -> tuple[str, str]:
    """Write a target and whether it was reached."""
    if target is None or ratio is None:
        return "", ""
    return f"{target:g}x", "ok" if ratio >= target else "MISS"


def format_ms(seconds: float | None) -> str:
    """Write seconds as milliseconds with three digits that count."""
    if seconds is None:
        return "-"
    ms = seconds * 1e3
    return f"{ms:.3f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


HEADINGS = [
    "work",
    "dictionary",
    "where",
    "fastsd",
    "torch",
    "torch mmap",
    "safetensors",
    "x torch",
    "target",
    "",
    "x safetens.",
    "target",
    "",
]


def build_table(results: Results) -> list[list[str]]:
    """Return the table: headings, then two lines (tmpfs, disk) for each row, milliseconds."""
    quick = results.machine["quick"]  # targets are for the sizes of a whole run
    table = [HEADINGS]
    for row in filter(results.has, ROWS):
        for place, label in results.places.items():
            medians = [results.row_seconds(place, row, name) for name in CONTENDERS]
            # The column that the ratio is against carries a star.
            cells = [
                format_ms(seconds) + ("*" if name == row.torch else "")
                for name, seconds in zip(CONTENDERS, medians, strict=True)
            ]
            line = [row.work, results.titles[row.case], label, *cells]
            for ratio, target in (
                (results.ratio(place, row, row.torch), row.torch_target),
                (results.ratio(place, row, "safetensors"), row.safetensors_target),
            ):
                line += [format_ratio(ratio), *format_target(ratio, None if quick else target)]
            table.append(line)
    return table if len(table) > 1 else []


def build_limits(results: Results) -> list[list[str]]:
    """Return the bare limits, each with what fastsd takes for the same bytes."""
    table = [["bare limit", "where", "ms", "GB/s", "fastsd, same bytes", "ms", "of the limit"]]
    names = {row.group: row.work for row in ROWS}
    size = results.bytes.get("big", 0)
    for limit, title, work in LIMIT_ROWS:
        for place, label in results.places.items():
            bare = results.seconds(place, "limits", "big", limit)
            if bare is None:
                continue
            rate = "-" if limit == "assign" else f"{size / bare / 1e9:.2f}"  # it moves no bytes
            line = [title, label, format_ms(bare), rate, "", "", ""]
            ours = work and results.seconds(place, work[0], "big", work[1])
            if work and ours:
                share = f"{math.floor(100 * bare / ours)} %"
                line[4:] = [names[work[0]], format_ms(ours), share]
            table.append(line)
    return table if len(table) > 1 else []


def build_conversions(results: Results) -> list[list[str]]:
    """Return what conversions take beside `cp` of a file with the same tensors."""
    table = [["convert", "where", "ms", "cp", "x cp", "target", ""]]
    for contender, title in CONVERSIONS:
        for place, label in results.places.items():
            seconds = results.seconds(place, "convert", "big", contender)
            copy = results.seconds(place, "convert", "big", "cp")
            if seconds is not None and copy is not None:
                target = None if results.machine["quick"] else CONVERSION_TARGET
                reached = format_target(copy / seconds, target)
                ratio = format_ratio(copy / seconds)
                table.append([title, label, format_ms(seconds), format_ms(copy), ratio, *reached])
    return table if len(table) > 1 else []


def build_other_ways(results: Results) -> list[list[str]]:
    """Return what fastsd's other ways of loading take."""
    table = [["other ways to load", "dictionary", "where", "ms", "GB/s"]]
    for contender, title in OTHER_WAYS:
        for case in ("big", "1000"):
            for place, label in results.places.items():
                seconds = results.seconds(place, "touch", case, contender)
                if seconds is not None:
                    rate = f"{results.bytes[case] / seconds / 1e9:.2f}"
                    table.append([title, results.titles[case], label, format_ms(seconds), rate])
    return table if len(table) > 1 else []


def is_number(cell: str) -> bool:
    """Tell whether a cell belongs to the right."""
    return cell[:1].isdigit() or cell == "-"


def align(table: list[list[str]]) -> str:
    """Write a table as lines of text."""
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    right = [any(is_number(line[c]) for line in table[1:]) for c in range(len(widths))]
    right[:2] = [False, False]
    lines = [
        "  ".join(
            f"{cell:>{width}}" if numbers else f"{cell:<{width}}"
            for cell, width, numbers in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in table
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def as_markdown(table: list[list[str]]) -> str:
    """Write a table as markdown, reached targets in words and missed ones in bold."""
    right = [any(is_number(line[c]) for line in table[1:]) for c in range(len(table[0]))]
    right[:2] = [False, False]
    rule = ["---:" if numbers else "---" for numbers in right]
    bold = [["**MISS**" if cell == "MISS" else cell for cell in line] for line in table]
    lines = [[cell.replace("*", r"\*") if cell[:1].isdigit() else cell for cell in b] for b in bold]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def describe_machine(results: Results) -> str:
    """Say in one line what was measured on, and with which releases."""
    m = results.machine
    return (
        f"{m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB, {m['system']} {m['kernel']}; "
        f"Python {m['python_version']}, torch {m['torch_version']}, "
        f"safetensors {m['safetensors_version']}, fastsd {m['fastsd_version']}"
    )


def describe_noise(results: Results) -> str:
    """Say how quiet the machine was: other programs distort what several threads do together."""
    percent = results.machine.get("others_percent", 0)
    text = f"Other programs and the system took {percent} % of the cores during the run."
    return text if percent <= OTHERS_PERCENT_MAX else f"{text} Too noisy: measure again."


NOTES = (
    "Medians in milliseconds; warm page cache; ratios are cut off, not rounded.",
    "`*` marks the torch column that `x torch` is against.",
    "`load_into assign / copy`: fastsd assigns the mapped tensors, the others copy, as by default.",
    "On tmpfs fsync does nothing, so a durable save there is a save.",
)


def build_tables(results: Results) -> list[list[list[str]]]:
    """Return all tables; those of which nothing was measured are empty."""
    builders = (build_table, build_conversions, build_limits, build_other_ways)
    return [build(results) for build in builders]


def build_text(results: Results) -> str:
    """Return what ``make bench`` prints."""
    tables = build_tables(results)
    parts = [describe_machine(results), *(align(table) for table in tables if table)]
    notes = [*(note.replace("`", "") for note in NOTES), describe_noise(results)]
    return "\n\n".join([*parts, "\n".join(notes)])


def build_markdown(results: Results, date: str) -> str:
    """Return the same as a markdown page."""
    tables = build_tables(results)
    parts = [f"# Measured on {date}", describe_machine(results)]
    parts += [as_markdown(table) for table in tables if table]
    notes = [f"- {note}" for note in (*NOTES, describe_noise(results))]
    return "\n\n".join([*parts, "\n".join(notes)]) + "\n"
