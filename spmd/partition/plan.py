"""The partitioned program as data: what is computed, at which layouts, and what moves between.

A plan is a list of instructions per region. It is made without tracing (`choose`, `planner`),
checked (`verify`), printed, and then carried out (`interpret`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from sharding.mesh import MeshShape, axes_size
from sharding.program import Op, Program, Region, Value, describe
from sharding.rule import Rule
from sharding.spec import Layout
from spmd.partition.reshard import Plan, local_bytes

# An axis that no mesh has: along it lie the parts of what one device has, see `Parts`.
PART = "%part"


class Assignment(NamedTuple):
    """Which mesh axes shard which factors of an equation.

    Attributes:
      factors: (factor, axes) pairs.
      carried: axes over which operands stay partial by add, and the results with them.
      whole: operands that are whole along PERMUTE factors, see `Rule.fetches`.
    """

    factors: tuple[tuple[str, tuple[str, ...]], ...]
    carried: tuple[str, ...] = ()
    whole: tuple[int, ...] = ()

    @property
    def axes(self) -> Mapping[str, tuple[str, ...]]:
        return dict(self.factors)


def shards_of(assignment: Assignment, mesh: MeshShape) -> dict[str, int]:
    """Number of shards per sharded factor."""
    return {name: axes_size(mesh, axes) for name, axes in assignment.factors if axes}


class Key(NamedTuple):
    """A value in one layout: what instructions read and write.

    Attributes:
      copy: 0; how often it was made before, where it is let go in between.
    """

    value: Value
    layout: Layout
    copy: int = 0

    def local_bytes(self, mesh: MeshShape) -> int:
        """Bytes on one device."""
        return local_bytes(self.layout, self.value.shape, self.value.itemsize, mesh)


class Parts(NamedTuple):
    """How an instruction runs in equal parts, one after the other: see `streams`.

    Attributes:
      count: how many there are.
      operands: per operand the dim that is divided; None: each part reads all of it.
      results: per result the same; None: the parts' results are addends of it, or it is whole.
      factor: of the equation, that those dims are; "" for a `Move`, and for a loop or a call, to
        which values come in parts and which leaves some so.
    """

    count: int
    operands: tuple[int | None, ...]
    results: tuple[int | None, ...]
    factor: str = ""


@dataclass(frozen=True)
class Move:
    """Reshards a value; `plan` may be empty of collectives (a local slice).

    Attributes:
      reason: the op that needs it; None at the program's boundary.
      copy: of the result, see `Key`.
      after: what has to be there before it starts.
      parts: of the value, each with collectives of its own; None: it is moved whole.
      group: of moves next to each other that are one collective (see `combined`); 0: it is alone.
    """

    value: Value
    src: Layout
    dst: Layout
    plan: Plan
    reason: Op | None
    copy: int = 0
    after: tuple[Key, ...] = ()
    parts: Parts | None = None
    group: int = 0

    @property
    def reads(self) -> tuple[Key, ...]:
        return Key(self.value, self.src), *self.after

    @property
    def writes(self) -> tuple[Key, ...]:
        return (Key(self.value, self.dst, self.copy),)


@dataclass(frozen=True)
class Compute:
    """One equation at local shapes, or a control-flow op around its planned regions.

    Attributes:
      unread: per result; empty: all are read.
      asked: operands and results that cost chose the assignment for (`choose.Tensor`s); empty
        where there was nothing to choose.
      apart: the compiler must not merge it with others: a product with what reads it (see
        `products`), what a loop stacks with what another does (see `stacks`).
      parts: in which the equation runs; None: whole.
    """

    op: Op
    assignment: Assignment
    operands: tuple[Key, ...]
    results: tuple[Key, ...]
    regions: tuple["RegionPlan", ...] = ()
    unread: tuple[bool, ...] = ()
    asked: tuple[Any, ...] = ()
    apart: bool = False
    parts: Parts | None = None

    @property
    def reads(self) -> tuple[Key, ...]:
        return self.operands

    @property
    def writes(self) -> tuple[Key, ...]:
        return self.results

    @property
    def rule(self) -> Rule | None:
        return None if self.op.control else self.op.rule


# What a loop is taken for when something is decided of whose steps nobody knows the number: solvers
# that iterate until an error is small take tens.
UNKNOWN_STEPS = 32


def steps(op: Op, unknown: int = 1) -> int:
    """How often the regions of an equation run.

    Args:
      unknown: of a loop of which nobody knows.
    """
    control = op.control
    if control is None:
        return 1
    told = control.trips(op)
    return told if told != 1 or control.counted or not control.carries(op) else unknown


@dataclass(frozen=True)
class RegionPlan:
    """Instructions of one region, the axes they may use, and the layouts at its boundary."""

    region: Region
    mesh: MeshShape
    inputs: tuple[Layout, ...]
    outputs: tuple[Key, ...]
    code: tuple[Move | Compute, ...]

    def walk(self, trips: int = 1, unknown: int = 1) -> Iterator[tuple[Move | Compute, int]]:
        """Every instruction with how often it runs, those of nested regions included.

        Args:
          trips: how often the region does.
          unknown: how often loops do of which nobody knows.
        """
        for instruction in self.code:
            yield instruction, trips
            if isinstance(instruction, Compute) and instruction.regions:
                inner = trips * steps(instruction.op, unknown)
                for region in instruction.regions:
                    yield from region.walk(inner, unknown)


@dataclass(frozen=True)
class Diagnostic:
    """Something the partitioner did that the user may not expect, or that annotations leave undone.

    Attributes:
      kind: boundary (uneven argument or result), gather (an operation needs a dim whole),
        replicated (a large value is whole everywhere), padded, reduced early (in each step of a
        loop), unused axis, conflict (two dims wanted one axis), over limit (of memory), moved (an
        axis shards another dim for a part of the program: nothing to mend), own steps (a loop runs
        in parts: the same).
      value: what it happened to, as its user knows it; an axis.
      text: what was done and what it costs.
      bytes: gather, reduced early, conflict: wire bytes per device and call; boundary: bytes held
        per device; over limit: what is missing; others: of those, the bytes held for nothing.
      source: source line of the operation.
      remedy: what avoids it.
      stated: the annotations themselves ask for it.
    """

    kind: str
    value: str
    text: str
    bytes: float = 0.0
    source: str = ""
    remedy: str = ""
    stated: bool = False

    def __str__(self) -> str:
        at = f" at {self.source}" if self.source and self.source not in self.value else ""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.kind}: {self.value}: {self.text}{at}{remedy}"


@dataclass(frozen=True)
class ProgramPlan:
    """A whole partitioned program.

    Attributes:
      program: what was partitioned.
      mesh: refined, so that every sub-axis is an axis of its own.
      body: the top-level region; its inputs and outputs are at boundary layouts.
      diagnostics: see `Diagnostic`.
    """

    program: Program
    mesh: MeshShape
    body: RegionPlan
    diagnostics: tuple[Diagnostic, ...] = field(default=())

    def moves(self) -> Iterator[tuple[Move, int]]:
        for instruction, trips in self.body.walk():
            if isinstance(instruction, Move) and instruction.plan.steps:
                yield instruction, trips

    def __str__(self) -> str:
        return f"mesh {self.mesh.placed_text()}\n" + "\n".join(_render(self.body, ""))


def rewritten(
    plan: ProgramPlan, change: Callable[[Move | Compute, RegionPlan], Move | Compute]
) -> ProgramPlan:
    """The plan with every instruction changed, those of nested regions after the one they are in.

    Args:
      change: (instruction, the region it is in) -> what takes its place.
    """

    def region(body: RegionPlan) -> RegionPlan:
        code = []
        for found in body.code:
            found = change(found, body)
            if isinstance(found, Compute):
                found = replace(found, regions=tuple(map(region, found.regions)))
            code.append(found)
        return replace(body, code=tuple(code))

    return replace(plan, body=region(plan.body))


def _render(body: RegionPlan, indent: str) -> Iterator[str]:
    for instruction in body.code:
        if isinstance(instruction, Move):
            steps = " then ".join(
                f"{s.kind}({'+'.join(s.axes)})" + (f" {s.bytes:,.0f} B" if s.bytes else "")
                for s in instruction.plan.steps
            )
            value = instruction.value
            how = "".join(f", after {key.value}" for key in instruction.after)
            how += _parts_text(instruction.parts)
            yield f"{indent}{value} {instruction.dst} = {steps} of {instruction.src}{how}" + (
                f"  # {describe(value)}" if value.name or value.op else ""
            )
            continue
        op = instruction.op
        left = ", ".join(f"{k.value} {k.layout}" for k in instruction.results)
        right = ", ".join(_operand(k) for k in instruction.operands)
        source = f"  # {op.source}" if op.source else ""
        how = _parts_text(instruction.parts)
        yield f"{indent}{left} = {op.primitive.name}({right}){how}{source}"
        for i, region in enumerate(instruction.regions):
            yield f"{indent}  region {i}:"
            yield from _render(region, indent + "    ")
    yield f"{indent}return {', '.join(_operand(k) for k in body.outputs)}"


def _parts_text(parts: Parts | None) -> str:
    return "" if parts is None else f", in {parts.count} parts"


def _operand(key: Key) -> str:
    if key.value.const is not None and key.value.rank == 0:
        return str(key.value.const)
    return f"{key.value} {key.layout}" if key.value.rank else str(key.value)
