"""Products that are transposed, for a compiler that would rather transpose what they are of.

XLA for CPUs makes of a transposed product one of its operands, swapped, which its library of matrix
products then reads against the grain: at up to twice the time. A product that is kept apart from
its transposition is left as it is.
"""

from dataclasses import replace

from sharding.program import Op, Value
from spmd.partition.plan import Compute, Move, ProgramPlan, RegionPlan, rewritten


def keep_products(plan: ProgramPlan) -> ProgramPlan:
    """The plan with every product that is only transposed kept apart from that."""
    uses, readers = plan.program.uses, plan.program.readers

    def transposed(value: Value) -> bool:
        reads = readers[value.id]
        return uses[value.id] == len(reads) == 1 and _transposes(reads[0][0])

    def change(found: Move | Compute, body: RegionPlan) -> Move | Compute:
        if isinstance(found, Compute) and _multiplies(found.op):
            return replace(found, apart=transposed(found.op.outputs[0]))
        return found

    return rewritten(plan, change)


def _multiplies(op: Op) -> bool:
    return op.control is None and len(op.outputs) == 1 and op.rule.flops > 1


def _transposes(op: Op) -> bool:
    """Whether an operation gives its operand's dims in another order, and nothing else."""
    if op.control is not None or len(op.inputs) != 1 or len(op.outputs) != 1:
        return False
    (before,), (after,) = op.rule.operands, op.rule.results
    return before != after and sorted(before) == sorted(after)
