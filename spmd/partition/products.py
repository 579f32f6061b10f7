"""Products that are transposed, for a compiler that would rather transpose what they are of.

XLA for CPUs makes of a transposed product one of its operands, swapped, which its library of matrix
products then reads against the grain: at up to twice the time. A product that is kept apart from
its transposition is left as it is.
"""

from dataclasses import replace

from sharding.program import Value
from spmd.partition.linear import multiplies, only_reader, transposes
from spmd.partition.plan import Compute, Move, ProgramPlan, RegionPlan, rewritten


def keep_products(plan: ProgramPlan) -> ProgramPlan:
    """The plan with every product that is only transposed kept apart from that."""

    def transposed(value: Value) -> bool:
        reader = only_reader(plan.program, value)
        return reader is not None and transposes(reader[0])

    def change(found: Move | Compute, body: RegionPlan) -> Move | Compute:
        if isinstance(found, Compute) and multiplies(found.op):
            return replace(found, apart=transposed(found.op.outputs[0]))
        return found

    return rewritten(plan, change)
