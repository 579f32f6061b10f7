"""Reductions in two steps, for compilers that do better with those.

XLA for TPUs turns a reduce-scatter among *all* devices into an all-reduce, which sends twice as
much, and a slice. Among some of the devices it keeps one. So it is done among the devices that are
far apart in the mesh's order, and then, of what is left, among those that are near: together they
send what one would. And up to v5e it starts gathers ahead, and waits for whatever reduces: there an
all-reduce that something could run beside is a reduce-scatter and a gather (`streams`).
"""

from dataclasses import replace
from math import isqrt

from sharding.mesh import MeshShape, axes_size
from sharding.spec import Layout
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


def scattered(move: Move, mesh: MeshShape) -> Move:
    """An all-reduce as a reduce-scatter and an all-gather, which send as much: for a compiler that
    runs gathers beside computation, and all-reduces not. The same move where it is none, or where
    no dim is even, but for the one that its parts lie along."""
    if [step.kind for step in move.plan.steps] != ["all_reduce"]:
        return move
    (step,) = move.plan.steps
    if len(step.axes) > 1 or step.monoid != "add":
        return move
    parts = move.parts.operands if move.parts is not None else ()
    for dim, axes in enumerate(step.after.dims):
        held = (*axes, *step.axes)
        if dim in parts or move.value.shape[dim] % axes_size(mesh, held):
            continue
        dims = tuple(held if d == dim else a for d, a in enumerate(step.after.dims))
        half = step._replace(dim=dim, bytes=step.bytes / 2)
        first = half._replace(kind="reduce_scatter", after=Layout(dims, step.after.partial))
        steps = (first, half._replace(kind="all_gather", monoid=""))
        return replace(move, plan=Plan(steps, move.plan.cost))
    return move
