"""Stacks of loops, for a compiler that makes one array of zeros of all that they are written into.

A loop that stacks a result per step writes into an array that is zero before. XLA for TPUs leaves
the zeros out where it sees that all of them are overwritten, which it does in loops that count up,
and not in those that count down, as gradients do. But first it merges equal arrays: one loop that
counts down, and all stacks of its shape are filled with zeros. So the stacks of a loop get a shape
of their own where an earlier loop has some that are alike.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
from jax import lax

from sharding.program import Op
from spmd.partition.plan import Compute, Move, ProgramPlan, RegionPlan, rewritten


def own_stacks(plan: ProgramPlan) -> ProgramPlan:
    """The plan with the stacks of every loop kept apart from those of earlier ones."""
    seen: set[Any] = set()

    def change(found: Move | Compute, body: RegionPlan) -> Move | Compute:
        if not isinstance(found, Compute) or not found.regions:
            return found
        mine = set(_stacks(found, body))
        alike = not seen.isdisjoint(mine)
        seen.update(mine)
        return replace(found, apart=alike)

    return rewritten(plan, change)


def _stacks(loop: Compute, body: RegionPlan) -> Iterator[Any]:
    """Type and local shape of what a loop stacks."""
    for port in loop.op.out_ports:
        if port.stacked:
            value, layout, _ = loop.results[port.outer]
            yield value.dtype, layout.local_shape(value.shape, body.mesh)


def build_apart(
    op: Op, bodies: Sequence[Callable[..., Sequence[Any]]], operands: Sequence[Any]
) -> Sequence[Any]:
    """A loop whose stacks have a dim of one element more while they are made."""
    assert op.control is not None
    stacked = {(port.region, port.inner) for port in op.out_ports if port.stacked}
    outer = {port.outer for port in op.out_ports if port.stacked}

    def lifted(i: int) -> Callable[..., Sequence[Any]]:
        def body(*args: Any) -> Sequence[Any]:
            return [
                jax.tree.map(_lifted, x) if (i, place) in stacked else x
                for place, x in enumerate(bodies[i](*args))
            ]

        return body

    results = op.control.build(op.params, [lifted(i) for i in range(len(bodies))], operands)
    return [jax.tree.map(_lowered, x) if i in outer else x for i, x in enumerate(results)]


def _lifted(x: Any) -> Any:
    return lax.expand_dims(x, (0,))


def _lowered(x: Any) -> Any:
    return lax.squeeze(x, (1,))
