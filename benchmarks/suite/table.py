"""The results as tables, and what misses a bar.

`BARS` holds everything that is asked of `spmd.jit`, relative to other systems. A ratio is ours over
theirs: below 1 is better. Where both are zero there is none. Means are geometric, and of ratios
between 1/100 and 100: one program without any communication should not decide alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.suite.names import BY_HAND, OURS, PLANNING, SHARDY, SYSTEMS

_ROUNDING = 0.0005  # ratios are compared as printed, with three digits
_CUT = 100.0

Row = Mapping[str, Any]  # a `measure.Result`, as plain values
Entry = Mapping[str, Any]  # of one program and target, see `one.run`


def _total(row: Row) -> float | None:
    return sum(row["phases_s"].values()) or None


def _planning(row: Row) -> float | None:
    taken = sum(row["phases_s"].get(phase, 0.0) for phase in PLANNING)
    return taken or None


class Metric(NamedTuple):
    """Attributes:
    name: heading of the column.
    of: the number of one system, None when it is not known.
    """

    name: str
    of: Callable[[Row], float | None]


WIRE = Metric("wire", lambda row: row["wire_bytes"])
PEAK = Metric("peak", lambda row: row["peak_bytes"])
FLOPS = Metric("FLOPs", lambda row: row["flops"])
STEP = Metric("step", lambda row: row["step_s"])
ESTIMATE = Metric("estimated", lambda row: row["estimated_s"])
TOTAL = Metric("to executable", _total)
SHARE = Metric("planning", _planning)


class Bar(NamedTuple):
    """Something that ratios must not exceed.

    Attributes:
      metric: what is compared; `SHARE` with the own time to the executable.
      against: the system; `OURS` for `SHARE`.
      each: the most for any program; None when only the mean counts.
      mean: the most for the geometric mean over all programs of a target; None alike.
      targets: as `kind` names them.
    """

    metric: Metric
    against: str
    each: float | None
    mean: float | None
    targets: tuple[str, ...]


EVERYWHERE, MANY = ("cpu", "cpus", "tpu", "gpu", "gpus"), ("cpu", "cpus", "tpu", "gpus")
BARS = (
    Bar(WIRE, SHARDY, 1.0, 0.7, MANY),
    Bar(WIRE, BY_HAND, 1.05, None, MANY),
    Bar(PEAK, SHARDY, 1.0, 0.9, MANY),
    Bar(FLOPS, SHARDY, 1.0, None, MANY),
    Bar(STEP, SHARDY, 1.03, 0.85, ("cpu",)),
    Bar(STEP, SHARDY, 1.03, None, ("gpu",)),
    Bar(ESTIMATE, SHARDY, 1.0, 0.75, ("tpu",)),
    # Not on GPUs: whoever compiles first pays for tuning kernels that all of a process use.
    Bar(TOTAL, SHARDY, None, 1.0, ("cpu", "tpu")),
    Bar(SHARE, OURS, 0.2, None, EVERYWHERE),
)


class Miss(NamedTuple):
    """A ratio above its bar; `program` is "" for a mean."""

    bar: Bar
    program: str
    ratio: float

    def __str__(self) -> str:
        allowed = self.bar.mean if not self.program else self.bar.each
        who = self.program or "geometric mean"
        return f"{who}: {label(self.bar)} {number(self.ratio, 3)}, bar {allowed:.2f}"


def kind(target: str) -> str:
    """Of a target: "cpu", "gpu", "tpu", or "gpus" or "cpus" (several, compiled only)."""
    if target.startswith(("gpu:", "cpu:")):
        return target[:3] + "s"
    return target if target in ("cpu", "gpu") else "tpu"


def ratio(entry: Entry, metric: Metric, against: str) -> float | None:
    """Ours over theirs; inf where only theirs is zero, None where there is nothing to compare."""
    if metric is SHARE:
        ours, theirs = value(entry, SHARE, OURS), value(entry, TOTAL, OURS)
    else:
        ours, theirs = value(entry, metric, OURS), value(entry, metric, against)
    if ours is None or theirs is None or ours == theirs == 0:
        return None
    return ours / theirs if theirs else math.inf


def value(entry: Entry, metric: Metric, system: str) -> float | None:
    """The number of a system, None where it has none or has failed."""
    row = entry["systems"].get(system)
    return None if row is None or row["error"] else metric.of(row)


def mean(ratios: list[float]) -> float | None:
    """Geometric, of ratios cut to 1/100 .. 100."""
    cut = [min(max(r, 1 / _CUT), _CUT) for r in ratios]
    return statistics.geometric_mean(cut) if cut else None


def ratios(entries: Mapping[str, Entry], metric: Metric, against: str) -> dict[str, float]:
    """By program, those that there are."""
    found = {name: ratio(entry, metric, against) for name, entry in entries.items()}
    return {name: r for name, r in found.items() if r is not None}


def misses(target: str, entries: Mapping[str, Entry]) -> list[Miss]:
    """Everything above a bar, by bar; the worst first, and means before them."""
    found = []
    for bar in (b for b in BARS if kind(target) in b.targets):
        known = ratios(entries, bar.metric, bar.against)
        overall = mean(list(known.values()))
        if overall is not None and bar.mean is not None and overall >= bar.mean + _ROUNDING:
            found.append(Miss(bar, "", overall))
        if bar.each is not None:
            above = [Miss(bar, n, r) for n, r in known.items() if r >= bar.each + _ROUNDING]
            found += sorted(above, key=lambda miss: -miss.ratio)
    return found


def label(bar: Bar) -> str:
    return "planning/total" if bar.metric is SHARE else f"{bar.metric.name}/{bar.against}"


def errors(entries: Mapping[str, Entry]) -> list[str]:
    """What failed, as lines."""
    found = []
    for name, entry in entries.items():
        if entry.get("error"):
            found.append(f"{name}: {entry['error']}")
        rows = entry["systems"].items()
        found += [f"{name}, {system}: {row['error']}" for system, row in rows if row["error"]]
    return found


def too_large(entries: Mapping[str, Entry]) -> list[str]:
    """Which programs do not fit into the memory of a device, as lines."""
    return [
        f"{name}, {system}: needs {row['peak_bytes'] / 2**30:.2f} GiB, more than a device has"
        for name, entry in entries.items()
        for system, row in entry["systems"].items()
        if not row["fits"]
    ]


def columns(target: str) -> list[Bar]:
    """The ratios that the table of a target shows: those that have a bar."""
    return [bar for bar in BARS if kind(target) in bar.targets]


def cells(target: str, entries: Mapping[str, Entry]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row for each program with the geometric means as the last."""
    bars = columns(target)
    heads = ["program", *(f"MB {system}" for system in SYSTEMS), *map(label, bars)]
    rows = []
    for name, entry in entries.items():
        wires = (value(entry, WIRE, system) for system in SYSTEMS)
        sent = ["-" if w is None else f"{w / 1e6:.4g}" for w in wires]
        found = (ratio(entry, bar.metric, bar.against) for bar in bars)
        rows.append([name, *sent, *(number(r) for r in found)])
    means = (mean(list(ratios(entries, b.metric, b.against).values())) for b in bars)
    rows.append(["geometric mean", *[""] * len(SYSTEMS), *(number(m) for m in means)])
    return heads, rows


def number(found: float | None, digits: int = 2) -> str:
    return "-" if found is None else f"{found:.{digits}f}"


def notes(target: str, entries: Mapping[str, Entry]) -> Iterator[tuple[str, list[str]]]:
    """(heading, lines) of what is said below the table, where there is anything."""
    sections = (
        ("errors", errors(entries)),
        ("too large", too_large(entries)),
        ("misses", list(map(str, misses(target, entries)))),
    )
    return ((heading, lines) for heading, lines in sections if lines)


def show(console: Console, target: str, entries: Mapping[str, Entry]) -> None:
    """Prints the table of one target."""
    heads, rows = cells(target, entries)
    shown = Table(title=_title(target, entries), title_justify="left")
    for i, head in enumerate(heads):
        shown.add_column(head, justify="right" if i else "left", no_wrap=not i)
    for row in rows[:-1]:
        shown.add_row(*row)
    shown.add_section()
    shown.add_row(*rows[-1])
    console.print(shown)
    for heading, lines in notes(target, entries):
        console.print(f"{heading}:", style="red" if heading == "errors" else "yellow")
        for line in lines:
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def markdown(target: str, entries: Mapping[str, Entry]) -> str:
    """The same as Markdown."""
    heads, rows = cells(target, entries)
    lines = [f"### {_title(target, entries)}", "", _line(heads), _line(["---"] * len(heads))]
    lines += map(_line, rows)
    for heading, found in notes(target, entries):
        lines += ["", f"{heading.capitalize()}:", "", *(f"- {each}" for each in found)]
    return "\n".join(lines)


def _title(target: str, entries: Mapping[str, Entry]) -> str:
    versions = sorted({entry["versions"] for entry in entries.values() if "versions" in entry})
    return f"{target} ({'; '.join(versions)})" if versions else target


def _line(parts: list[str]) -> str:
    return f"| {' | '.join(part.replace('|', '/').replace(chr(10), ' ') for part in parts)} |"
