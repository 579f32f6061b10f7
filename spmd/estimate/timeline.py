"""Time over the program, by roofline: when every instruction runs, and what communication hides.

One device computes one line after another. A collective of a kind that the chip's compiler makes
asynchronous (`Chip.overlaps`) runs beside that from the moment its value is there until somebody
needs the result; what is left to wait for then is exposed, and all of every other one. Links of
different mesh axes work at the same time. Of what moves in parts (`spmd/streams.py`) one part is
waited for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from spmd.chips import Chip
from spmd.estimate.fusion import Held, Name, name
from spmd.estimate.roofline import compute_seconds
from spmd.estimate.work import Line
from spmd.hardware import Machine, MachineLayout
from spmd.partition.plan import Move, ProgramPlan


class Span(NamedTuple):
    """What one run of a line takes, in seconds.

    Attributes:
      compute: of the arithmetic units or memory, whichever is slower.
      wire: of its collectives.
      exposed: the part of `wire` that the device waits for.
    """

    compute: float = 0.0
    wire: float = 0.0
    exposed: float = 0.0


@dataclass(frozen=True)
class Timeline:
    """Predicted time of a program on one device of a machine.

    Attributes:
      machine: the machine.
      seconds: of one call of the program.
      spans: per line, of one run of it.
    """

    machine: Machine
    seconds: float
    spans: tuple[Span, ...]


def timeline(
    plan: ProgramPlan, lines: tuple[Line, ...], kept: Held, machine: Machine
) -> Timeline:
    """Predicts when every line of a plan runs.

    Args:
      kept: `held(plan, lines)`: what is fused takes no memory traffic of its own.
      machine: with as many devices as the mesh.

    Raises:
      MeshError: the mesh does not fit the machine.
    """
    layout = machine.lay(plan.mesh)
    clock = _Clock(kept, machine.chip, layout)
    spans: list[Span] = [Span()] * len(lines)
    children: dict[int, list[Line]] = {}
    for line in lines:
        children.setdefault(line.parent, []).append(line)
    seconds = clock.run(children.get(-1, []), children, spans)
    return Timeline(machine, seconds, tuple(spans))


class _Done(NamedTuple):
    """When something is there, and the transfer that it was waiting for (-1: none)."""

    at: float
    transfer: int = -1


_START = _Done(0.0)


class _Region:
    """One run of a region: the time of the device, and what runs beside it."""

    def __init__(self, spans: list[Span]):
        self.spans = spans
        self.now = 0.0
        self.ready: dict[Name, _Done] = {}
        self.links: dict[str, _Done] = {}  # by mesh axis
        self.before: dict[int, int] = {}  # transfer -> the one that it waited for

    def transfer(self, line: Line, needed: _Done, seconds: float) -> _Done:
        """Starts as soon as its value is there and its links are free."""
        axes = {axis for wire in line.wires for axis in wire.axes}
        start = max(needed, *(self.links.get(axis, _START) for axis in axes))
        self.before[line.index] = start.transfer
        self.spans[line.index] = Span(0.0, seconds, 0.0)
        done = _Done(start.at + seconds, line.index)
        self.links.update(dict.fromkeys(axes, done))
        return done

    def wait(self, needed: _Done) -> None:
        """Until something is there. The transfers that kept it are exposed, the last one first,
        each for no longer than it takes."""
        left, transfer = needed.at - self.now, needed.transfer
        while left > 0 and transfer >= 0:
            span = self.spans[transfer]
            exposed = min(left, span.wire - span.exposed)
            self.spans[transfer] = span._replace(exposed=span.exposed + exposed)
            left -= exposed
            transfer = self.before[transfer]
        self.now = max(self.now, needed.at)


class _Clock:
    def __init__(self, kept: Held, chip: Chip, layout: MachineLayout):
        self.kept, self.chip, self.layout = kept, chip, layout

    def run(
        self, body: Sequence[Line], children: dict[int, list[Line]], spans: list[Span]
    ) -> float:
        """Seconds of one run of the lines of one region."""
        region = _Region(spans)
        for line in body:
            needed = max((region.ready.get(name(k), _START) for k in self.kept.reads[line.index]),
                         default=_START)  # fmt: skip
            if line.index in children:
                region.wait(needed)
                region.now += self.region(line, children, spans)
                done = _Done(region.now)
            elif line.wires and self.runs_beside(line):
                done = self.transfer(region, line, needed)
            elif line.wires:
                region.wait(needed)
                wire, seconds = self.wired(line), compute_seconds(line, self.kept, self.chip)
                spans[line.index] = Span(seconds, wire, wire)
                region.now += wire + seconds
                done = _Done(region.now)
            else:
                if self.kept.writes[line.index]:  # what is fused happens in its reader
                    region.wait(needed)
                seconds = compute_seconds(line, self.kept, self.chip)
                spans[line.index] = Span(seconds)
                region.now += seconds
                done = max(needed, _Done(region.now))
            for key in line.writes:
                region.ready[name(key)] = done
        region.wait(max(region.ready.values(), default=_START))  # a region ends as a whole
        return region.now

    def region(self, line: Line, children: dict[int, list[Line]], spans: list[Span]) -> float:
        """Seconds of all runs of a loop, call or branch, once."""
        inner = [child for child in children[line.index] if child.trips]
        if not inner:
            return 0.0
        return inner[0].trips / max(line.trips, 1) * self.run(inner, children, spans)

    def transfer(self, region: _Region, line: Line, needed: _Done) -> _Done:
        """When a move's value is there that is started; of one in parts, when what reads it can
        begin: the other parts come while the first is computed with."""
        seconds = self.wired(line)
        done = region.transfer(line, needed, seconds)
        count = 1 if line.instruction.parts is None else line.instruction.parts.count
        return done._replace(at=done.at - seconds * (1 - 1 / count))

    def runs_beside(self, line: Line) -> bool:
        """Whether its collectives are started, and waited for later."""
        reshard = isinstance(line.instruction, Move)
        return reshard and all(w.kind in self.chip.overlaps for w in line.wires)

    def wired(self, line: Line) -> float:
        """Seconds of the collectives of one run."""
        return sum(
            w.count * self.layout.wire_time(w.kind, w.axes, w.bytes / w.count)
            for w in line.wires if w.count
        )  # fmt: skip
