"""What another annotation would change: the program propagated and planned again with it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sharding.mesh import MeshShape
from sharding.program import Value
from sharding.spec import Layout, Sharding
from spmd import cost
from spmd.estimate.work import lines, totals
from spmd.partition.plan import ProgramPlan


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


def measure(partitioned: Any) -> Measured:
    """Of a `Partitioned` stage."""
    found = lines(partitioned.plan)
    rows = [
        (f"{kind}({'+'.join(axes)})", count, wire)
        for (kind, axes), (count, wire) in totals(found).items()
    ]
    rows.sort(key=lambda row: -row[2])
    work = sum(line.trips * line.flops.total for line in found)
    return Measured(sum(row[2] for row in rows), partitioned.peak_memory, work, tuple(rows))


def link_bytes(plan: ProgramPlan) -> float:
    """What a plan sends and computes on one device, in the planner's unit."""
    found = lines(plan)
    sent = sum(
        x.trips * cost.priced(wire.kind, wire.axes, wire.bytes, plan.mesh)
        for x in found for wire in x.wires
    )  # fmt: skip
    return sent + sum(x.trips * cost.compute(x.flops.total, 0) for x in found)


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
