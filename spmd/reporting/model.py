"""`Report`: what a partitioned program computes, moves and holds, as data that JSON keeps.

All numbers are of one device and one call of the program; loops count as often as they run.
"""

import json
import os
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

from sharding.errors import ArgumentError, Problem
from spmd.reporting import notebook, schema, terminal, webpage
from spmd.reporting.diff import ReportDiff

FORMAT = 2  # of the JSON; a reader of another one says so


class Communication(NamedTuple):
    """Collectives of one kind over the same axes that one source line needs.

    Attributes:
      kind: all_reduce, all_gather, reduce_scatter, all_to_all, permute.
      axes: mesh axes, major to minor.
      source: `file.py:line (function)` of the operation that needs them.
      module: name stack of that operation.
      op: its primitive.
      count: how often they run.
      bytes: wire bytes by the ring model.
      network: of these, what goes over the network between slices or nodes.
      seconds: time on the links of the machine.
      exposed: the part of it that the device waits for.
    """

    kind: str
    axes: tuple[str, ...]
    source: str
    module: str
    op: str
    count: int
    bytes: float
    network: float
    seconds: float
    exposed: float


class Flops(NamedTuple):
    """Floating-point operations: `spmd.estimate.work.Flops` of all lines together."""

    useful: float
    replicated: float
    padded: float
    recomputed: float

    @property
    def total(self) -> float:
        return sum(self)


class Tensor(NamedTuple):
    """An argument or result.

    Attributes:
      name: as its user knows it: `params['w']`.
      kind: parameter, optimizer state, argument or result.
      dtype, shape: global.
      sharding: canonical text, `[data, -]`.
      bytes: on one device.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    sharding: str
    bytes: int


class Buffer(NamedTuple):
    """Memory of one value, see `Tensor`; `kind` may be activation or temporary too.

    Attributes:
      source: of the operation that writes it.
      start: row that writes it; 0 for what is there from the start.
      end: first row that does not need it any more.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    sharding: str
    bytes: int
    source: str
    start: int
    end: int


@dataclass(frozen=True)
class Memory:
    """Memory of one device.

    Attributes:
      peak: the most that is held at once, in bytes.
      capacity: of the machine's device; 0 where no machine was given.
      at: row where the peak is.
      by_kind: parameter, optimizer state, activation, ... -> bytes at the peak.
      buffers: what is held at any time, largest first; small ones are left out.
      over: bytes held at every row, those left out included.
    """

    peak: int
    capacity: int
    at: int
    by_kind: Mapping[str, int]
    buffers: tuple[Buffer, ...]
    over: tuple[int, ...]

    def live(self, row: int) -> tuple[Buffer, ...]:
        """Buffers held at a row, largest first."""
        return tuple(b for b in self.buffers if b.start <= row < b.end)


class Row(NamedTuple):
    """One instruction of the per-device program.

    Attributes:
      parent: row of the loop, call or branch that it is in; -1 at the top.
      op: primitive, or the collectives of a reshard: `all_gather(data)`.
      results: `result f32[64,256] [data, -]`, one per result.
      operands: the same for what it reads.
      module: name stack without transformations.
      source: `file.py:line (function)`.
      trips: how often it runs.
      flops, bytes: of all runs; bytes on links.
      seconds: of all runs, compute and exposed communication; of a region everything in it.
      exposed: of all runs.
    """

    parent: int
    op: str
    results: tuple[str, ...]
    operands: tuple[str, ...]
    module: str
    source: str
    trips: int
    flops: float
    bytes: float
    seconds: float
    exposed: float


class Finding(NamedTuple):
    """A diagnostic: see `spmd.Diagnostic`."""

    kind: str
    value: str
    text: str
    bytes: float
    source: str
    remedy: str


@dataclass(frozen=True, repr=False)
class Report:
    """Everything that is known about a partitioned program without running it; prints as text, and
    notebooks show it as tables and as a page.

    Attributes:
      name: of the function.
      mesh: axis name -> size.
      across: axis name -> how many slices or nodes lie along it, for those that cross the network.
      machine: `v5p:4x4x4`; "" where none was given: then times are 0.
      devices: of the mesh.
      seconds: predicted time of one call.
      exposed: seconds of it that wait for communication.
      utilisation: useful FLOPs over what the machine could do in `seconds`; 0..1.
      flops: operations, and why more than this device's share.
      memory: see `Memory`.
      communication: per kind, axes and source line, dearest first.
      arguments, results: with their shardings.
      rows: the program.
      findings: diagnostics, dearest first.
      versions: of the compiler and JAX.
    """

    name: str
    mesh: Mapping[str, int]
    across: Mapping[str, int]
    machine: str
    devices: int
    seconds: float
    exposed: float
    utilisation: float
    flops: Flops
    memory: Memory
    communication: tuple[Communication, ...]
    arguments: tuple[Tensor, ...]
    results: tuple[Tensor, ...]
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def wire_bytes(self) -> float:
        return sum(c.bytes for c in self.communication)

    @property
    def network_bytes(self) -> float:
        """Of `wire_bytes`, what goes over the network between slices or nodes."""
        return sum(c.network for c in self.communication)

    def totals(
        self, by: str | Callable[[Communication], Any] = "kind"
    ) -> dict[Any, tuple[int, float, float, float]]:
        """Communication merged by a field of it (`kind`, `axes`, `source`, ...) or by a function of
        the record: count, bytes, seconds, exposed seconds; dearest first."""
        key = by if callable(by) else attrgetter(by)
        merged: dict[Any, tuple[int, float, float, float]] = {}
        for c in self.communication:
            n, sent, spent, exposed = merged.get(key(c), (0, 0.0, 0.0, 0.0))
            merged[key(c)] = n + c.count, sent + c.bytes, spent + c.seconds, exposed + c.exposed
        return dict(sorted(merged.items(), key=lambda item: (-item[1][2], -item[1][1])))

    def diff(self, other: "Report") -> ReportDiff:
        """What changes from this report to `other`."""
        return ReportDiff.of(self, other)

    def to_html(self) -> str:
        """One page that needs nothing else: no network, no other file."""
        return webpage.page(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_html()` to a file, or `to_json()` where its name ends in `.json`."""
        as_json = os.fspath(path).endswith(".json")
        with open(path, "w", encoding="utf-8") as file:
            file.write(self.to_json() if as_json else self.to_html())

    def __str__(self) -> str:
        return terminal.report_text(self)

    def __repr__(self) -> str:
        return f"<Report of {self.name}: {terminal.headline(self)}>"

    def _repr_html_(self) -> str:
        return notebook.summary(self)

    def to_json(self, indent: int | None = None) -> str:
        """JSON text; tables as columns once and values in rows, so that it stays small."""
        data = asdict(self)
        for name, record in _TABLES.items():
            found = getattr(self, name)
            data[name] = {"columns": record._fields, "rows": [list(row) for row in found]}
        data["memory"]["buffers"] = {
            "columns": Buffer._fields, "rows": [list(b) for b in self.memory.buffers],
        }  # fmt: skip
        data["flops"] = self.flops._asdict()
        return json.dumps({"format": FORMAT, **data}, indent=indent, allow_nan=False)

    @staticmethod
    def from_json(written: str) -> "Report":
        """The report that `to_json` wrote.

        Raises:
          ArgumentError: the text is no report, or one of another format.
        """
        try:
            data = schema.load(written)
            if not isinstance(data, dict) or data.get("format") != FORMAT:
                found = data.get("format") if isinstance(data, dict) else type(data).__name__
                why = f"its format is {reprlib.repr(found)}, this version reads {FORMAT}"
                raise schema.SchemaError(why)
            return _checked(schema.convert(Report, data, "the report"))
        except schema.SchemaError as error:
            raise ArgumentError(_no_report(str(error))) from None


_TABLES: Mapping[str, Any] = {
    "communication": Communication, "arguments": Tensor, "results": Tensor, "rows": Row,
    "findings": Finding,
}  # fmt: skip


def _no_report(why: str) -> Problem:
    return Problem("a report to read", why, "write it with Report.to_json() of this version")


def _checked(report: Report) -> Report:
    """The report, if its parts fit together: pages and texts follow its numbers."""
    rows, memory = report.rows, report.memory
    if any(not -1 <= row.parent < i for i, row in enumerate(rows)):
        raise schema.SchemaError("a row comes before the one that it is in")
    if any(not 0 <= b.start < b.end <= len(rows) + 1 for b in memory.buffers):
        raise schema.SchemaError("a buffer lives at rows that are not there")
    if len(memory.over) != max(len(rows), 1) or not 0 <= memory.at < len(memory.over):
        raise schema.SchemaError("memory is of other rows than the program has")
    if report.devices < 1 or any(size < 1 for size in report.mesh.values()):
        raise schema.SchemaError("the mesh has an axis without a device")
    return report
