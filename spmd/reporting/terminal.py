"""A report as text for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from sharding.mesh import MeshShape
from spmd.reporting.units import (
    flops,
    percent,
    plural,
    seconds,
    shortened,
    size,
    table,
)  # fmt: skip

if TYPE_CHECKING:
    from spmd.reporting.model import Communication, Report

_BUFFERS, _SOURCES, _FINDINGS = 5, 8, 6  # lines of each that are shown
_WIDTH = 60
_Table = tuple[list[tuple[str, ...]], Sequence[int]]  # rows, columns aligned to the right


def report_text(report: Report) -> str:
    """About 40 lines: summary, operations, memory, communication, findings."""
    parts = (_summary(report), _flops(report), _memory(report), _communication(report),
             _findings(report))  # fmt: skip
    return "\n".join(line for part in parts for line in part)


def headline(report: Report) -> str:
    """The summary on one line."""
    found = [mesh_text(report)]
    if report.machine:
        found += [f"on {report.machine}", f"{seconds(report.seconds)} predicted"]
    found += [f"{size(report.memory.peak)} peak", f"{size(report.wire_bytes)} sent"]
    return ", ".join(found)


def mesh_text(report: Report) -> str:
    shape = MeshShape(tuple(report.mesh.items()), across=tuple(report.across.items()))
    return shape.placed_text().replace(", ", " ") if report.mesh else "one device"


def _summary(report: Report) -> Iterator[str]:
    yield f"{report.name}, per device and call"
    rows = [("mesh", f"{mesh_text(report)} ({plural(report.devices, 'device')})")]
    if report.machine:
        exposed = report.exposed / report.seconds if report.seconds else 0.0
        rows += [
            ("machine", report.machine),
            ("predicted step", seconds(report.seconds)),
            ("utilisation", f"{percent(report.utilisation)} of the peak FLOP/s"),
            ("exposed", f"{seconds(report.exposed)} of communication ({percent(exposed)})"),
        ]
    else:
        rows.append(("machine", "none given: times are not predicted"))
    yield from table(rows)


def _flops(report: Report) -> Iterator[str]:
    found = report.flops
    yield f"operations  {flops(found.total)}"
    rows = [
        (name, flops(n), percent(n / found.total if found.total else 0.0))
        for name, n in found._asdict().items()
    ]
    yield from table(rows, right=(1, 2))


def _memory(report: Report) -> Iterator[str]:
    memory = report.memory
    of = ""
    if memory.capacity:
        of = f" of {size(memory.capacity)} ({percent(memory.peak / memory.capacity)})"
    yield f"peak memory  {size(memory.peak)}{of}"
    if memory.capacity and memory.peak > memory.capacity:
        yield f"  does not fit: {size(memory.peak - memory.capacity)} too much"
    rows = [(kind, size(n), percent(n / max(memory.peak, 1))) for kind, n in memory.by_kind.items()]
    yield from table(rows, right=(1, 2))
    live = memory.live(memory.at)
    if live:
        yield "  largest buffers at the peak"
        rows = [(size(b.bytes), b.sharding, shortened(b.name, _WIDTH)) for b in live[:_BUFFERS]]
        yield from table(rows, right=(0,), indent="    ")


def _communication(report: Report) -> Iterator[str]:
    if not report.communication:
        yield "communication  none"
        return
    far = f", {size(report.network_bytes)} of it over dcn" if report.across else ""
    yield f"communication  {size(report.wire_bytes)} sent{far}"
    timed = bool(report.machine)
    by_kind = report.totals(collective)
    yield from table(*_collectives(by_kind.items(), timed, _over_network(report, collective)))
    by_source = report.totals(place)
    yield "  by source line"
    found = islice(by_source.items(), _SOURCES)
    far = _over_network(report, place)
    yield from table(*_collectives(found, timed, far), indent="    ")
    yield from more(len(by_source), _SOURCES, "source line", "    ")


def collective(found: Communication) -> str:
    """`all_reduce(data+tensor)`."""
    return f"{found.kind}({'+'.join(found.axes)})"


def place(found: Communication) -> str:
    return found.source or "boundary of the program"


def _collectives(
    found: Iterable[Any], timed: bool, over_network: Mapping[Any, float] | None
) -> _Table:
    rows = []
    for name, (n, sent, spent, exposed) in found:
        row = (shortened(name, _WIDTH), f"x{n:,}", size(sent))
        if over_network is not None:
            row = (*row, f"{size(over_network[name])} over dcn")
        rows.append((*row, seconds(spent), f"exposed {seconds(exposed)}") if timed else row)
    return rows, (1, 2, 3, 4)


def _over_network(report: Report, by: Callable[[Communication], str]) -> dict[str, float] | None:
    """Bytes between slices or nodes by a function of the record; None where there is one."""
    if not report.across:
        return None
    found: dict[str, float] = {}
    for c in report.communication:
        found[by(c)] = found.get(by(c), 0.0) + c.network
    return found


def more(count: int, shown: int, what: str, indent: str = "  ") -> Iterator[str]:
    if count > shown:
        yield f"{indent}... {plural(count - shown, 'more ' + what)}"


def _findings(report: Report) -> Iterator[str]:
    if not report.findings:
        yield "findings  none"
        return
    yield f"findings  {len(report.findings)}"
    for found in report.findings[:_FINDINGS]:
        cost = f" ({size(found.bytes)})" if found.bytes else ""
        yield f"  {found.kind}: {found.value}: {found.text}{cost}"
        if found.source:
            yield f"    at {found.source}"
        if found.remedy:
            yield f"    {found.remedy}"
    yield from more(len(report.findings), _FINDINGS, "finding")
