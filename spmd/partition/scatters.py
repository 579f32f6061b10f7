"""Reduce-scatters in two parts, for a compiler that makes all-reduces of whole ones.

XLA for TPUs turns a reduce-scatter among *all* devices into an all-reduce, which sends twice as
much, and a slice. Among some of the devices it keeps one. So it is done among the devices that are
far apart in the mesh's order, and then, of what is left, among those that are near: together they
send what one would.
"""

from dataclasses import replace
from math import isqrt

from sharding.mesh import MeshShape, axes_size
from spmd.partition.plan import Compute, Move, ProgramPlan, RegionPlan, rewritten
from spmd.partition.reshard import Plan, Step


def split_scatters(plan: ProgramPlan) -> ProgramPlan:
    """The plan with every reduce-scatter among all devices of the mesh in two parts."""

    def change(found: Move | Compute, body: RegionPlan) -> Move | Compute:
        if not isinstance(found, Move):
            return found
        steps = tuple(_split(step, body.mesh) for step in found.plan.steps)
        return replace(found, plan=Plan(steps, found.plan.cost))

    return rewritten(plan, change)


def _split(step: Step, mesh: MeshShape) -> Step:
    size = axes_size(mesh, step.axes)
    if step.kind != "reduce_scatter" or size != mesh.size:
        return step
    first = next(n for n in range(isqrt(size), 0, -1) if size % n == 0)
    return step._replace(parts=(first, size // first)) if first > 1 else step
