"""Pass `transposed_sums`: a product that is only transposed is reduced after that.

    %4 [-, tensor] partial{data:add} = dot_general(...)
    %4 [data, tensor] = reduce_scatter(data)
    %5 [tensor, data] = transpose(%4)

becomes

    %4 [-, tensor] partial{data:add} = dot_general(...)
    %5 [tensor, -] partial{data:add} = transpose(%4)
    %5 [tensor, data] = reduce_scatter(data)

Gradients of weights are such products. XLA for TPUs makes one of a product and its transposition,
but not where a reduction parts them: then the weights, and an optimiser's state with them, are
copied into the order of the gradient, and back. XLA for CPUs transposes what it is told to, and
would transpose what other devices will have; for GPUs this was not measured.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from sharding.program import Program
from spmd.partition.linear import multiplies, only_reader, through, transposes
from spmd.partition.placed import forced
from spmd.partition.plan import Compute, Key, Move, ProgramPlan, RegionPlan
from spmd.partition.reshard import plan as reshard


def reduce_transposed(plan: ProgramPlan) -> ProgramPlan:
    """The plan with products that are only transposed reduced after that."""

    def region(body: RegionPlan) -> RegionPlan:
        late = dict(_early(plan.program, body.code))
        return replace(body, code=tuple(map(inside, _rewritten(plan.program, body, late))))

    def inside(one: Move | Compute) -> Move | Compute:
        if isinstance(one, Move):
            return one
        return replace(one, regions=tuple(map(region, one.regions)))

    return replace(plan, body=region(plan.body))


def _early(program: Program, code: Sequence[Move | Compute]) -> Iterator[tuple[int, Move]]:
    """Moves that reduce a product for its transposition, and for that alone; by its id."""
    moves = Counter(one.value.id for one in code if isinstance(one, Move))
    computed = Counter(one.op.index for one in code if isinstance(one, Compute))
    for one in code:
        if not isinstance(one, Move) or moves[one.value.id] > 1 or one.value.op is None:
            continue
        reader = only_reader(program, one.value)
        sums = {monoid for _, monoid in one.src.partial} == {"add"} and not one.dst.partial
        if reader is None or not sums or not multiplies(one.value.op):
            continue
        if transposes(reader[0]) and computed[reader[0].index] == 1:
            yield one.value.id, one


def _rewritten(
    program: Program, body: RegionPlan, late: Mapping[int, Move]
) -> Iterator[Move | Compute]:
    for one in body.code:
        if isinstance(one, Move):
            if one.value.id not in late:
                yield one
            continue
        move = late.get(one.operands[0].value.id) if len(one.operands) == 1 else None
        if move is None:
            yield one
            continue
        (value, made, _), op = one.results[0], one.op
        src = through(op, 0, move.src, body.mesh)
        carried = tuple(sorted(axis for axis, _ in src.partial))
        assignment = forced(op.rule, src, body.mesh)._replace(carried=carried)
        yield replace(
            one, assignment=assignment, operands=move.reads,
            results=(Key(value, src),), asked=(),
        )  # fmt: skip
        steps = reshard(src, made, value.shape, value.itemsize, body.mesh)
        reason = next((reader for reader, _ in program.readers[value.id]), None)
        yield Move(value, src, made, steps, reason)
