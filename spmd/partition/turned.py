"""Pass `turned_scatters`: a dim whose shards are an odd number of tiles is scattered as the first.

    %4 [-, tensor] = reduce_scatter(tensor) of bf16[4096, 5120], 640 columns for each of 8 devices

XLA for TPUs keeps numbers of 16 bits in pairs of tiles of 128 columns. Where a device gets an odd
number of tiles, it makes an all-reduce of the reduce-scatter, which sends twice as much, and cuts
out a part (libtpu 0.0.42, all chips). With the dim in front there are no tiles along it: a product
is written in that order, and what a device keeps of it is turned back. Of others everything would
be copied, gradients of weights among them, whose order is that of the optimiser's state.
"""

from dataclasses import replace

from sharding.mesh import MeshShape, axes_size
from sharding.program import Value
from spmd.partition.linear import multiplies
from spmd.partition.plan import Compute, Move, ProgramPlan, RegionPlan, rewritten
from spmd.partition.reshard import Plan, Step

_COLUMNS = 128  # of a tile
_PAIRED = 2  # bytes of numbers that lie in pairs of tiles


def turn_scatters(plan: ProgramPlan) -> ProgramPlan:
    """The plan with reduce-scatters turned that the compiler makes all-reduces of otherwise."""

    def change(found: Move | Compute, body: RegionPlan) -> Move | Compute:
        if not isinstance(found, Move) or not _paired(found.value):
            return found
        steps = tuple(
            step._replace(turned=step.kind == "reduce_scatter" and _odd(found, step, body.mesh))
            for step in found.plan.steps
        )
        return replace(found, plan=Plan(steps, found.plan.cost))

    return rewritten(plan, change)


def _paired(value: Value) -> bool:
    """Whether a product is written in pairs of tiles."""
    product = value.op is not None and multiplies(value.op)
    return product and value.itemsize == _PAIRED and value.rank > 1


def _odd(move: Move, step: Step, mesh: MeshShape) -> bool:
    """Whether every device gets an odd number of tiles."""
    size, devices = move.value.shape[step.dim], axes_size(mesh, step.after.dims[step.dim])
    tiles, rest = divmod(-(-size // devices), _COLUMNS)
    return step.dim == move.value.rank - 1 and rest == 0 and tiles % 2 == 1
