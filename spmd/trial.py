"""What another annotation would change: the program propagated and planned again with it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from sharding.mesh import MeshShape, axes_size
from sharding.program import Value
from sharding.rule import Kind
from sharding.spec import Layout, Sharding
from spmd import collectives, cost
from spmd.partition.plan import Compute, ProgramPlan

# Programs of more operations are compared by their plans alone: tracing them takes seconds.
SMALL = 2000


@dataclass(frozen=True)
class Measured:
    """What a partitioned program costs a device, per call.

    Attributes:
      wire_bytes: sent.
      peak_memory: predicted, in bytes.
      flops: of contractions and other operations, as the planner counts them.
      collectives: (kind(axes), count, wire bytes), dearest first.
    """

    wire_bytes: float
    peak_memory: int
    flops: float
    collectives: tuple[tuple[str, int, float], ...]

    @property
    def cost(self) -> float:
        """In link bytes, the planner's unit."""
        return self.wire_bytes + cost.compute(self.flops, 0)


def measure(partitioned: Any) -> Measured:
    """Of a `Partitioned` stage."""
    plan = partitioned.plan
    if sum(1 for _ in plan.program.ops()) <= SMALL:
        records = collectives.summarize(partitioned.collectives)
        rows = [(f"{c.kind}({'+'.join(c.axes)})", c.count, c.bytes) for c in records]
    else:
        rows = _planned(plan)
    wire = sum(row[2] for row in rows)
    return Measured(wire, partitioned.peak_memory, flops(plan), tuple(rows))


def _planned(plan: ProgramPlan) -> list[tuple[str, int, float]]:
    """Collectives of reshards; those inside of operations are left out."""
    found: dict[str, tuple[int, float]] = {}
    for move, trips in plan.moves():
        for step in move.plan.steps:
            if step.kind != "slice":
                name = f"{step.kind}({'+'.join(step.axes)})"
                count, wire = found.get(name, (0, 0.0))
                found[name] = (count + trips, wire + trips * step.bytes)
    return sorted(((n, c, b) for n, (c, b) in found.items()), key=lambda row: -row[2])


def flops(plan: ProgramPlan) -> float:
    """Work of one device per call: local iterations of every operation."""
    total = 0.0
    for instruction, trips in plan.body.walk():
        if isinstance(instruction, Compute) and instruction.rule is not None:
            rule, factors = instruction.rule, instruction.assignment.axes
            total += trips * rule.flops * prod(
                -(-factor.size // axes_size(plan.mesh, factors.get(name, ())))
                for name, factor in rule.factors.items()
                if factor.kind is not Kind.FIXED
            )
    return total


def with_annotations(stage: Any, changes: Mapping[Value, Sharding | None]) -> Any:
    """The `Partitioned` stage of the same program, with other annotations.

    Args:
      stage: `spmd.Propagated`.
      changes: value -> its annotation, in place of any that it has; None removes it.
    """
    traced = stage.traced
    kept = [(v, s) for v, s in traced.annotations if v not in changes]
    given = [(v, s) for v, s in changes.items() if s is not None]
    outs = [
        changes.get(v, s) if s is not None else s
        for v, s in zip(traced.program.body.outputs, traced.out_specs, strict=True)
    ]
    annotated = traced.annotated._replace(
        annotations=(*kept, *given), out_specs=tuple(outs)
    )
    lenient = replace(traced.options, on_gather="plan", strict=False)
    return replace(traced, annotated=annotated, options=lenient).propagate().partition()


def closed(layout: Layout) -> Sharding:
    """The annotation that says a layout: dims without axes are unsharded."""
    return Sharding.closed(*layout.reduced().dims)


def on_users_axes(layout: Layout, mesh: MeshShape) -> bool:
    """Whether an annotation can say a layout: sub-axes have no name there."""
    return all(a in mesh.names for axes in layout.dims for a in axes)
