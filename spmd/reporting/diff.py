"""`ReportDiff`: what changes from one report to another."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from spmd.reporting import notebook, webpage
from spmd.reporting.terminal import collective, headline, more, place
from spmd.reporting.units import flops, percent, seconds, shortened, signed, size, table

if TYPE_CHECKING:
    from spmd.reporting.model import Finding, Report

_SHOWN = 8
_UNITS = {
    "bytes": size, "FLOP": flops, "s": seconds, "share": percent, "": lambda n: f"{n:,.0f}",
}  # fmt: skip


class Change(NamedTuple):
    """One number of both reports.

    Attributes:
      group: summary, operations, memory, communication or source line.
      name: what is counted, as both reports call it.
      unit: bytes, FLOP, s, share (0..1), or "" for a count.
      before, after: its values; 0 where a report does not have it.
    """

    group: str
    name: str
    unit: str
    before: float
    after: float

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def ratio(self) -> float | None:
        """`after` over `before`; None where there is no `before`."""
        return self.after / self.before if self.before else None

    def texts(self) -> tuple[str, str, str, str]:
        """Before, after, difference and relative difference, with units."""
        show = _UNITS[self.unit]
        relative = "new"
        if self.ratio is not None:
            far = self.ratio >= 10
            relative = f"x{self.ratio:,.0f}" if far else signed(percent(self.ratio - 1))
        if not self.difference:
            return show(self.before), show(self.after), "", "="
        return show(self.before), show(self.after), signed(show(self.difference)), relative


class Resharded(NamedTuple):
    """An argument or result that lies otherwise; "" where a report does not have it."""

    name: str
    before: str
    after: str


@dataclass(frozen=True, repr=False)
class ReportDiff:
    """The difference of two reports; prints as text.

    Attributes:
      before, after: what each report is of, on one line.
      changes: numbers of both; those of communication and source lines largest difference first.
      resharded: arguments and results whose shardings differ.
      appeared, gone: findings that only one of them has.
    """

    before: str
    after: str
    changes: tuple[Change, ...]
    resharded: tuple[Resharded, ...]
    appeared: tuple[Finding, ...]
    gone: tuple[Finding, ...]

    @staticmethod
    def of(a: Report, b: Report) -> ReportDiff:
        return ReportDiff(
            f"{a.name}: {headline(a)}", f"{b.name}: {headline(b)}", tuple(_changes(a, b)),
            tuple(_resharded(a, b)),
            tuple(f for f in b.findings if _told(f) not in set(map(_told, a.findings))),
            tuple(f for f in a.findings if _told(f) not in set(map(_told, b.findings))),
        )  # fmt: skip

    def group(self, name: str, only_different: bool = False) -> tuple[Change, ...]:
        """The changes of one group."""
        return tuple(
            c for c in self.changes if c.group == name and (c.difference or not only_different)
        )

    def to_json(self, indent: int | None = None) -> str:
        data = {**asdict(self), "changes": [c._asdict() for c in self.changes]}
        data["resharded"] = [r._asdict() for r in self.resharded]
        for side in ("appeared", "gone"):
            data[side] = [f._asdict() for f in getattr(self, side)]
        return json.dumps(data, indent=indent, allow_nan=False)

    def to_html(self) -> str:
        """One page that needs nothing else."""
        return webpage.diff_page(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_html()` to a file, or `to_json()` where its name ends in `.json`."""
        as_json = os.fspath(path).endswith(".json")
        with open(path, "w", encoding="utf-8") as file:
            file.write(self.to_json() if as_json else self.to_html())

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def __repr__(self) -> str:
        return f"<ReportDiff of {self.before!r} and {self.after!r}>"

    def _repr_html_(self) -> str:
        return notebook.diff_summary(self)


def _told(found: Finding) -> tuple[str, str, str]:
    """A finding without its numbers."""
    return found.kind, found.value, found.source


def _changes(a: Report, b: Report) -> Iterator[Change]:
    yield Change("summary", "devices", "", a.devices, b.devices)
    if a.machine or b.machine:
        yield Change("summary", "predicted step", "s", a.seconds, b.seconds)
        yield Change("summary", "exposed communication", "s", a.exposed, b.exposed)
        yield Change("summary", "utilisation", "share", a.utilisation, b.utilisation)
    yield Change("summary", "peak memory", "bytes", a.memory.peak, b.memory.peak)
    yield Change("summary", "sent", "bytes", a.wire_bytes, b.wire_bytes)
    if a.across or b.across:
        yield Change("summary", "sent over dcn", "bytes", a.network_bytes, b.network_bytes)
    yield from _pairs("operations", "FLOP", a.flops._asdict(), b.flops._asdict())
    yield from _pairs("memory", "bytes", a.memory.by_kind, b.memory.by_kind)
    yield from _wire("communication", a, b, collective)
    yield from _wire("source line", a, b, place)


def _wire(group: str, a: Report, b: Report, key: Any) -> list[Change]:
    sides = ({name: v[1] for name, v in r.totals(key).items()} for r in (a, b))
    return sorted(_pairs(group, "bytes", *sides), key=lambda c: (-abs(c.difference), c.name))


def _pairs(
    group: str, unit: str, a: Mapping[str, float], b: Mapping[str, float]
) -> Iterator[Change]:
    for name in dict.fromkeys((*a, *b)):
        yield Change(group, name, unit, a.get(name, 0), b.get(name, 0))


def _resharded(a: Report, b: Report) -> Iterator[Resharded]:
    for one, other in ((a.arguments, b.arguments), (a.results, b.results)):
        before, after = ({t.name: t.sharding for t in side} for side in (one, other))
        for name in dict.fromkeys((*before, *after)):
            if before.get(name) != after.get(name):
                yield Resharded(name, before.get(name, ""), after.get(name, ""))


def _lines(diff: ReportDiff) -> Iterator[str]:
    yield f"from  {diff.before}"
    yield f"to    {diff.after}"
    for group, title in (
        ("summary", "summary"), ("operations", "operations"), ("memory", "memory at the peak"),
        ("communication", "communication"), ("source line", "communication by source line"),
    ):  # fmt: skip
        found = diff.group(group, only_different=group in ("communication", "source line"))
        if found:
            yield title
        rows = [(shortened(c.name, 60), *c.texts()) for c in found[:_SHOWN]]
        yield from table(rows, right=(1, 2, 3, 4))
        yield from more(len(found), _SHOWN, "line")
    if diff.resharded:
        yield "shardings"
        rows = [(r.name, r.before or "none", "->", r.after or "none") for r in diff.resharded]
        yield from table(rows[:_SHOWN])
        yield from more(len(rows), _SHOWN, "tensor")
    for side, title in ((diff.appeared, "new findings"), (diff.gone, "findings that are gone")):
        if side:
            yield title
        yield from (f"  {f.kind}: {f.value}: {f.text}" for f in side[:_SHOWN])
        yield from more(len(side), _SHOWN, "finding")
