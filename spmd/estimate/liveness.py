"""Memory over the program, by liveness: which buffers one device holds at every instruction.

Buffers are reused as compilers reuse them: an elementwise result takes the place of an operand that
ends there, a loop's result that of its initial value, a donated argument that of its successor.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple

from sharding.spec import Layout
from spmd.estimate.fusion import ANY, Compiler, Held, Name, fusible, held, name
from spmd.estimate.latency import beside, delayed
from spmd.estimate.loops import carried, hoisted
from spmd.estimate.schedule import scheduled
from spmd.estimate.tiles import Sizes
from spmd.estimate.vmem import on_chip
from spmd.estimate.work import Line, lines
from spmd.partition.plan import Compute, Key, Move, ProgramPlan


class Buffer(NamedTuple):
    """Memory that one value takes, on one device.

    Attributes:
      key: the value and its layout.
      bytes: its size.
      start: number of the line that writes it; 0 for what is there from the start.
      end: number of the first line that does not need it any more.
      argument: index among the program's inputs, or -1.
      result: whether the program returns it.
    """

    key: Key
    bytes: int
    start: int
    end: int
    argument: int = -1
    result: bool = False


@dataclass(frozen=True)
class Profile:
    """Memory per device.

    Attributes:
      buffers: every buffer that the program holds at some time, but for what lies in the core's own
        memory.
      over: bytes held at every line.
      peak: the most that is held, in bytes.
      at: number of the line where that is.
    """

    buffers: tuple[Buffer, ...]
    over: tuple[int, ...]
    peak: int
    at: int

    def live(self, line: int) -> list[Buffer]:
        """Buffers held at a line, largest first."""
        found = [b for b in self.buffers if b.start <= line < b.end]
        return sorted(found, key=lambda b: -b.bytes)


def profile(
    plan: ProgramPlan, lines: tuple[Line, ...], donated: Sequence[bool], kept: Held,
    compiler: Compiler = ANY,
) -> Profile:  # fmt: skip
    """Memory over the lines of a plan.

    Args:
      donated: per input of the program, whether its buffer may be reused.
      kept: `held(plan, lines, compiler)`.
    """
    allocation = _Allocation(plan, lines, kept, donated, compiler)
    buffers = allocation.run()
    if compiler.chip is not None and compiler.chip.vmem_bytes:
        inside = _on_chip(buffers, allocation.offloaded, lines, kept, compiler.chip.vmem_bytes)
        buffers = [buffer for i, buffer in enumerate(buffers) if i not in inside]
    changes = [0] * (len(lines) + 2)
    for buffer in buffers:
        changes[buffer.start] += buffer.bytes
        changes[min(max(buffer.end, buffer.start + 1), len(lines) + 1)] -= buffer.bytes
    over, now = [], 0
    for change in changes[: max(len(lines), 1)]:
        now += change
        over.append(now)
    at = max(range(len(over)), key=over.__getitem__)
    return Profile(tuple(buffers), tuple(over), over[at], at)


def _on_chip(
    buffers: Sequence[Buffer], offloaded: AbstractSet[Name], lines: Sequence[Line], kept: Held,
    capacity: float,
) -> frozenset[int]:  # fmt: skip
    """Numbers of the temporaries that lie in the core's own memory."""
    readers = Counter(name(key) for line in lines for key in kept.reads[line.index])
    candidates = [
        i for i, buffer in enumerate(buffers)
        if buffer.argument < 0 and not buffer.result and name(buffer.key) not in offloaded
    ]  # fmt: skip
    temporaries = [buffers[i] for i in candidates]
    moved = [b.bytes * (1 + readers[name(b.key)]) for b in temporaries]
    return frozenset(candidates[i] for i in on_chip(temporaries, moved, len(lines), capacity))


# Steps of a reshard whose result has the size of their operand, and takes its place.
_IN_PLACE = frozenset(("addend", "all_reduce", "permute", "slice"))


class _Allocation:
    """Walks the lines once forward; buffers end where their last reader is."""

    def __init__(
        self, plan: ProgramPlan, lines: tuple[Line, ...], kept: Held, donated: Sequence[bool],
        compiler: Compiler,
    ):  # fmt: skip
        self.plan, self.lines, self.kept, self.donated = plan, lines, kept, donated
        self.compiler = compiler
        self.makers = {name(key): line for line in lines for key in kept.writes[line.index]}
        self.sizes = Sizes(lines, compiler.tiled)
        self.vmem = compiler.chip.vmem_bytes if compiler.chip else 0.0
        self.in_place = _IN_PLACE - compiler.beside
        self.hoisted = hoisted(lines) if compiler.hoists else {}
        self.after = _after(lines)
        self.ends = self._ends()
        self.buffers: dict[Name, Buffer] = {}
        self.done: list[Buffer] = []
        self.along: dict[int, Line] = {}  # line -> the contraction that it is computed with
        # Buffers that stand in another one's place: they cost nothing of their own.
        self.aliases: set[Name] = set()
        self.offloaded = self._offloaded()
        self.laid_out: set[Name] = set()  # arguments that are copied for convolutions

    def run(self) -> list[Buffer]:
        self.arguments()
        for line in self.lines:
            writes = self.kept.writes[line.index]
            if writes:
                self.turn(line)
                self.write(line, writes)
            self.enter(line)
        for found in map(self.kept.memory_of, self.plan.body.outputs):
            if found in self.buffers:
                self.buffers[found] = self.buffers[found]._replace(result=True)
        return [*self.done, *self.buffers.values()]

    def arguments(self) -> None:
        region, count = self.plan.body, len(self.lines) + 1
        for i, (value, layout) in enumerate(zip(region.region.inputs, region.inputs, strict=True)):
            key = Key(value, layout)
            free = i < len(self.donated) and self.donated[i]
            end = self.ends.get(name(key), 0) if free else count
            size = self.sizes.argument(key, region.mesh)
            self.buffers[name(key)] = Buffer(key, size, 0, end, i)
        for value in region.region.consts:
            key = Key(value, Layout(((),) * value.rank))
            size = self.sizes.argument(key, region.mesh)
            self.buffers.setdefault(name(key), Buffer(key, size, 0, count))

    def _ends(self) -> Mapping[Name, int]:
        """Where a value is needed last: after its last reader, or where its region ends."""
        ends: dict[Name, int] = {}
        first = {
            name(key): line.index for line in reversed(self.lines)
            if self.kept.writes[line.index] for key in self.kept.reads[line.index]
        }  # fmt: skip
        for line, reads in zip(self.lines, self.kept.reads, strict=True):
            for key in reads:
                ends[name(key)] = max(ends.get(name(key), 0), self.after[line.index])
        for line in self.lines:
            if beside(line, self.compiler):  # the operand is read until somebody has the result
                done = min((first.get(name(key), 0) for key in line.writes), default=0)
                for key in self.kept.reads[line.index]:
                    ends[name(key)] = max(ends[name(key)], done)
        for line in self.lines:
            found = line.instruction
            for region in found.regions if isinstance(found, Compute) else ():
                for key in region.outputs:
                    ends[self.kept.memory_of(key)] = self.after[line.index]
        for key in self.plan.body.outputs:
            ends[self.kept.memory_of(key)] = len(self.lines) + 1
        return ends

    def _offloaded(self) -> frozenset[Name]:
        """What SparseCores read or write: it is not in the core's own memory."""
        kinds = self.compiler.chip.offloaded if self.compiler.chip else frozenset()
        moves = (line for line in self.lines if isinstance(line.instruction, Move)
                 and any(wire.kind in kinds for wire in line.wires))  # fmt: skip
        return frozenset(
            self.kept.memory_of(key) for line in moves for key in (*line.reads, *line.writes)
        )

    def write(self, line: Line, writes: Sequence[Key]) -> None:
        maker, late = self.computed_with(line), self.written_late(line)
        free, initial = self.ending(line), carried(line)
        if maker is not None:  # it takes the place of the contraction's result alone
            self.along[line.index] = maker
            free = [b for b in free if name(b.key) in map(name, maker.writes)]
        start = late or (line.index if maker is None else maker.index)
        for key in writes:
            size = self.sizes.of(key, line.mesh)
            end = max(self.ends.get(name(key), 0), line.index + 1)
            fit = [b for b in free if b.bytes == size or name(b.key) in self.aliases]
            if initial is not None:
                start_of = initial.get(name(key))
                fit = [b for b in fit if start_of and name(b.key) == self.kept.memory_of(start_of)]
            if not fit:
                self.buffers[name(key)] = Buffer(key, size, start, end)
                continue
            place = fit[0]
            free.remove(place)
            if name(place.key) in self.aliases:
                size = 0
                self.aliases.add(name(key))
            old = self.buffers.pop(name(place.key))
            self.done.append(old._replace(end=line.index))
            self.buffers[name(key)] = Buffer(key, size, line.index, end, old.argument)

    def computed_with(self, line: Line) -> Line | None:
        """The contraction of which a line is computed, element by element, as its result leaves
        the matrix units: the line's own result is there as early, beside the operands."""
        if not self.compiler.into_dots or not fusible(line):
            return None
        reads = map(name, self.kept.reads[line.index])
        makers = [self.makers[found] for found in reads if found in self.makers]
        last = max(makers, key=lambda maker: maker.index, default=None)
        if last is not None and not last.contracts:  # what is made of that in turn leaves with it
            last = self.along.get(last.index)
        if last is None or last.parent != line.parent or not last.contracts:
            return None
        between = self.lines[last.index + 1 : line.index]
        return None if any(other.contracts or _regions(other) for other in between) else last

    def written_late(self, line: Line) -> int:
        """The line whose pass writes what a sum goes over, see `Held.sums`; 0: its own."""
        found = [self.makers[s].index for k in line.writes for s in self.kept.sums.get(name(k), ())]
        last = max((self.ends.get(name(k), 0) for k in line.writes), default=0) - 1
        return max(line.index, min(*found, last)) if found else 0

    def ending(self, line: Line) -> list[Buffer]:
        """Buffers that a result of the line may take over: operands that end there, of operations
        that work in place."""
        found = line.instruction
        if isinstance(found, Move):
            in_place = all(step.kind in self.in_place for step in found.plan.steps)
        else:
            in_place = fusible(line) or bool(found.regions) or not found.op.rule.flops
        if not in_place:
            return []
        return [
            self.buffers[name(key)]
            for key in self.kept.reads[line.index]
            if name(key) in self.buffers and self.ends.get(name(key)) == self.after[line.index]
            and self.buffers[name(key)].end <= self.after[line.index]
        ]

    def lay_out(self, line: Line) -> None:
        """Slices for a halo are cut in the layout of the convolution that needs it: an argument is
        copied to that first."""
        if not line.contracts or not line.wires:
            return
        for key in line.reads:
            found = self.buffers.get(name(key))
            if found and found.argument >= 0 and not found.start and name(key) not in self.laid_out:
                self.laid_out.add(name(key))
                size = self.sizes.of(key, line.mesh) if self.sizes.moved(key, line.mesh) else 0
                self.done.append(Buffer(key, size, line.index, self.ends[name(key)]))

    def turn(self, line: Line) -> None:
        """Collectives beside computation leave their results with dims in the order of the program,
        as arguments come. An argument that meets one whose dims are turned is copied to that order,
        while the collective runs; a donated one that fits the core's own memory through that, into
        its own place."""
        turned = self.kept.turned[line.index]
        movers = [m for m in map(self.makers.get, turned) if m and beside(m, self.compiler)]
        if not movers or not fusible(line):
            return
        start, size = min(m.index for m in movers), self.sizes.of(line.writes[0], line.mesh)
        for key in self.kept.reads[line.index]:
            found = self.buffers.get(name(key))
            if not found or found.argument < 0 or found.bytes != size or name(key) in turned:
                continue
            if found.end > len(self.lines) or size > self.vmem:
                self.done.append(Buffer(key, size, start, line.index + 1))

    def enter(self, line: Line) -> None:
        """What a region sees of the outside is outside already."""
        found = line.instruction
        self.lay_out(line)
        for key, size in self.hoisted.get(line.index, ()):
            self.done.append(Buffer(key, size, line.index, self.after[line.index]))
        for region in found.regions if isinstance(found, Compute) else ():
            for value, layout in zip(region.region.inputs, region.inputs, strict=True):
                key = Key(value, layout)
                self.buffers[name(key)] = Buffer(
                    key, 0, line.index, self.ends.get(name(key), line.index + 1)
                )
                self.aliases.add(name(key))


def _regions(line: Line) -> bool:
    return isinstance(line.instruction, Compute) and bool(line.instruction.regions)


def _after(lines: tuple[Line, ...]) -> list[int]:
    """Per line, the number of the first line after it and everything in its regions."""
    after = [line.index + 1 for line in lines]
    for line in reversed(lines):
        if line.parent >= 0:
            after[line.parent] = max(after[line.parent], after[line.index])
    return after


class Ordered(NamedTuple):
    """The lines of a plan in the order in which they run, what of it is held, and the memory."""

    lines: tuple[Line, ...]
    kept: Held
    memory: Profile


def ordered(
    plan: ProgramPlan, donated: Sequence[bool] = (), compiler: Compiler = ANY
) -> Ordered:
    """A plan in the order of the program, or in the one that `schedule` finds, where that holds
    less: compilers choose so too. What reads transfers then waits for them, see `latency`.

    Args:
      donated: as for `profile`.
    """
    found = lines(plan)
    kept = held(plan, found, compiler)
    program = Ordered(found, kept, profile(plan, found, donated, kept, compiler))
    found = scheduled(plan, found, kept)
    kept = held(plan, found, compiler)
    other = Ordered(found, kept, profile(plan, found, donated, kept, compiler))
    best = min(program, other, key=lambda order: order.memory.peak)
    found = delayed(best.lines, best.kept, compiler)
    if found is best.lines:
        return best
    kept = held(plan, found, compiler)
    return Ordered(found, kept, profile(plan, found, donated, kept, compiler))


def peak_bytes(
    plan: ProgramPlan, donated: Sequence[bool] = (), compiler: Compiler = ANY
) -> int:
    """Predicted peak bytes per device, arguments and results included, see `ordered`."""
    return ordered(plan, donated, compiler).memory.peak
