"""Reductions in two steps, for compilers that do better with those.

XLA for TPUs turns a reduce-scatter among *all* devices into an all-reduce, which sends twice as
much, and a slice. Among some of the devices it keeps one. So it is done among the devices that are
far apart in the mesh's order, and then, of what is left, among those that are near: together they
send what one would. And for v5e it starts gathers ahead, and waits for whatever reduces: there an
all-reduce that something could run beside is a reduce-scatter and a gather (`streams`).

It keeps numbers of 16 bits in pairs of tiles, of 8 rows and 128 columns. Where a device gets an odd
number of tiles along the columns, an all-reduce is made of that reduce-scatter, too: 5,120 columns
over 8 devices. So rows are scattered, and the parts exchanged for columns, where that sends enough
less to put them in order (libtpu 0.0.42, all chips).
"""

from collections.abc import Iterator
from dataclasses import replace
from math import isqrt

from sharding.mesh import MeshShape, axes_size
from sharding.spec import Layout
from spmd import cost
from spmd.chips import Chip
from spmd.partition.plan import Compute, Move, ProgramPlan, RegionPlan, rewritten
from spmd.partition.reshard import Plan, Step, local_bytes

_PAIRED, _TILE = 2, (8, 128)  # bytes of numbers that lie in pairs of tiles; rows and columns
_SORTED = 8e-6  # seconds in which an exchange puts in order what one device sends


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


def by_rows(plan: ProgramPlan, chip: Chip) -> ProgramPlan:
    """The plan with large reduce-scatters of an odd number of tiles for every device by rows."""

    def change(found: Move | Compute, body: RegionPlan) -> Move | Compute:
        if not isinstance(found, Move) or found.value.itemsize != _PAIRED:
            return found
        steps = tuple(s for step in found.plan.steps for s in _rows(found, step, body.mesh, chip))
        return replace(found, plan=Plan(steps, found.plan.cost))

    return rewritten(plan, change)


def _rows(move: Move, step: Step, mesh: MeshShape, chip: Chip) -> Iterator[Step]:
    devices = axes_size(mesh, step.axes)
    large = chip.ring_seconds(step.bytes) > _SORTED * devices
    shape, columns, after = move.value.shape, move.value.rank - 1, step.after
    others = [d for d in range(columns) if _even(shape[d], (*after.dims[d], *step.axes), mesh)]
    if move.parts is not None:
        others = [d for d in others if {d, columns}.isdisjoint(move.parts.operands)]
    odd = step.kind == "reduce_scatter" and step.dim == columns and not step.parts
    if not (large and odd and others) or not _odd_tiles(shape[columns], after.dims[columns], mesh):
        yield step
        return
    rows, dims = others[-1], list(after.dims)
    dims[rows], dims[columns] = (*dims[rows], *step.axes), dims[columns][: -len(step.axes)]
    between = Layout(tuple(dims), after.partial)
    yield step._replace(dim=rows, to_dim=rows, after=between)
    size = local_bytes(between, shape, move.value.itemsize, mesh)
    sent = cost.all_to_all(size, devices)
    yield Step("all_to_all", step.axes, rows, columns, "", after, sent)


def _even(size: int, axes: tuple[str, ...], mesh: MeshShape) -> bool:
    """Whether every device gets whole pairs of tiles of rows."""
    return size % (2 * _TILE[0] * axes_size(mesh, axes)) == 0


def _odd_tiles(size: int, axes: tuple[str, ...], mesh: MeshShape) -> bool:
    """Whether every device gets an odd number of tiles of columns."""
    shard, rest = divmod(size, axes_size(mesh, axes))
    return rest == 0 and shard % (2 * _TILE[1]) == _TILE[1]


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
