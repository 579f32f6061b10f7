"""What `explain`, `why` and `why_not` return: plain data that prints.

Everything is a frozen dataclass of texts, numbers and tuples: `dataclasses.asdict` of it is JSON.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from sharding.explain import ValueHistory
from spmd.explaining.trial import Measured

_SHOWN = 6


@dataclass(frozen=True)
class Placed:
    """A value in one layout of the per-device program.

    Attributes:
      layout: canonical text.
      local_shape: on every device.
      bytes: held per device.
      made_by: the operation and its assignment of axes, or the collectives.
      wire_bytes: sent per device and call to bring it there.
    """

    layout: str
    local_shape: tuple[int, ...]
    bytes: int
    made_by: str
    wire_bytes: float

    def __str__(self) -> str:
        shape = ", ".join(map(str, self.local_shape))
        return f"{self.layout}: ({shape}), {self.bytes:,} B per device, {self.made_by}"


@dataclass(frozen=True)
class Alternative:
    """An assignment of axes to the named dims of the operation that makes a value.

    Attributes:
      axes: which axes shard which named dims.
      wire_bytes: of all reshards around the operation, per device and run.
      cost: what is compared: wire bytes, and local work as link bytes; a reshard that several
        readers share counts in part.
      chosen: whether the plan has it.
    """

    axes: str
    wire_bytes: float
    cost: float
    chosen: bool

    def __str__(self) -> str:
        verdict = "chosen" if self.chosen else "lost"
        return f"{verdict}: {self.axes}: {self.wire_bytes:,.0f} B sent, cost {self.cost:,.0f}"


@dataclass(frozen=True)
class ValueExplanation:
    """One value: its history, where it lies, and what else the planner weighed."""

    history: ValueHistory
    placed: tuple[Placed, ...]
    alternatives: tuple[Alternative, ...]

    def lines(self) -> Iterator[str]:
        yield from self.history.lines()
        if self.placed:
            yield "  on every device"
            yield from (f"    {placed}" for placed in self.placed)
        if len(self.alternatives) > 1:
            yield "  assignments of axes to named dims, by cost in link bytes"
            yield from (f"    {a}" for a in self.alternatives[:_SHOWN])
            if len(self.alternatives) > _SHOWN:
                yield f"    ... {len(self.alternatives) - _SHOWN} more lost"


@dataclass(frozen=True)
class Explanation:
    """The answer of `explain`.

    Attributes:
      asked: the question.
      values: every value that it names; one, but for source lines: of them the first 64.
      more: how many others the line makes.
    """

    asked: str
    values: tuple[ValueExplanation, ...]
    more: int = 0

    def __str__(self) -> str:
        lines = [line for value in self.values for line in value.lines()]
        if self.more:
            lines.append(f"... and {self.more:,} more values: ask for one by its name")
        return "\n".join(lines)


@dataclass(frozen=True)
class Remedy:
    """An annotation that removes a collective, as found by trying it.

    Attributes:
      annotation: what to write.
      wire_bytes, peak_memory, flops: how they change, per device and call.
      gains: whether the program as a whole gets cheaper by it.
    """

    annotation: str
    wire_bytes: float
    peak_memory: int
    flops: float
    gains: bool

    def __str__(self) -> str:
        changes = [f"{self.wire_bytes:+,.0f} B sent", f"{self.peak_memory:+,} B peak memory"]
        if self.flops:
            changes.append(f"{self.flops:+,.0f} FLOP")
        return f"{self.annotation}: {', '.join(changes)} per device"


@dataclass(frozen=True)
class Reconciled:
    """Collectives that bring one value from one sharding to another.

    Attributes:
      value: as its user knows it.
      steps: (kind(axes), wire bytes per device and call).
      count: how often they run per call.
      bytes: wire bytes per device and call.
      seconds: the same at the speed of a link.
      src, dst: layouts; equal where an operation communicates by itself.
      src_because, dst_because: why each is so.
      needed_by: the operation that needs `dst`, or the boundary of the program.
      source: its source line.
      remedy: the annotation that removes it, where one was found.
      tried: what was tried to find it.
    """

    value: str
    steps: tuple[tuple[str, float], ...]
    count: int
    bytes: float
    seconds: float
    src: str
    dst: str
    src_because: tuple[str, ...]
    dst_because: tuple[str, ...]
    needed_by: str
    source: str
    remedy: Remedy | None
    tried: str

    def lines(self) -> Iterator[str]:
        steps = " then ".join(name for name, _ in self.steps)
        times = f" x{self.count}" if self.count > 1 else ""
        at = f"  # {self.source}" if self.source else ""
        yield f"{steps}{times} of {self.value}: {self.bytes:,.0f} B, {time_text(self.seconds)}{at}"
        if self.src != self.dst:
            yield f"  from {self.src}"
            yield from (f"    {line}" for line in self.src_because)
            yield f"  to {self.dst}, for {self.needed_by}"
        else:
            yield f"  inside of {self.needed_by}, on {self.src}"
        yield from (f"    {line}" for line in self.dst_because)
        if self.remedy is not None:
            found = "removed by" if self.remedy.gains else "removed at a loss by"
            yield f"  {found} {self.remedy}"
        yield f"  {self.tried}"


@dataclass(frozen=True)
class Why:
    """The answer of `why`: the collectives that were asked for, dearest first."""

    asked: str
    collectives: tuple[Reconciled, ...]

    def __str__(self) -> str:
        return "\n".join(line for found in self.collectives for line in found.lines())


@dataclass(frozen=True)
class WhyNot:
    """The answer of `why_not`: what another sharding of a value would change.

    Attributes:
      value: as the program prints it.
      wanted, found: layouts.
      reasons: why propagation did not come to `wanted`.
      annotation: what to write.
      illegal: why the annotation cannot be; then nothing was tried.
      notes: what else would be done, such as padding.
      before, after: the program without and with the annotation.
    """

    value: str
    wanted: str
    found: str
    reasons: tuple[str, ...]
    annotation: str
    illegal: tuple[str, ...]
    notes: tuple[str, ...]
    before: Measured | None
    after: Measured | None

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        yield f"{self.value} is {self.found}, not {self.wanted}"
        yield from (f"  {reason}" for reason in self.reasons)
        for problem in self.illegal:
            yield from (f"  cannot be: {problem}".splitlines())
        if self.before is None or self.after is None:
            return
        yield f"  with {self.annotation}"
        yield f"    sent {_change(self.before.wire_bytes, self.after.wire_bytes)}"
        yield f"    peak memory {_change(self.before.peak_memory, self.after.peak_memory)}"
        if self.before.flops != self.after.flops:
            change = _change(self.before.flops, self.after.flops, "FLOP")
            yield f"    work {change}"
        before = {name: (n, b) for name, n, b in self.before.collectives}
        after = {name: (n, b) for name, n, b in self.after.collectives}
        for name in (*before, *(n for n in after if n not in before)):
            if before.get(name) != after.get(name):
                yield f"    {name}: {_rows(before.get(name))} -> {_rows(after.get(name))}"
        yield from (f"    {note}" for note in self.notes)


def time_text(seconds: float) -> str:
    """In a unit that leaves a short number."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def _rows(row: tuple[int, float] | None) -> str:
    return "none" if row is None else f"x{row[0]} {row[1]:,.0f} B"


def _change(before: float, after: float, unit: str = "B") -> str:
    return f"{before:,.0f} -> {after:,.0f} {unit} per device ({after - before:+,.0f})"
