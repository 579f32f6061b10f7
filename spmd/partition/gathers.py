"""Pass `shared_gathers`: in which layout the readers of a value need it, decided for all of them.

An operation that reads a sharded value may gather it, or move its other operands instead. What is
cheaper for one may be dearer for all: the gradients of three projections of one input gather that
input once, and not each the gradient that it is multiplied with. So the layouts that the readers
may share are compared by what all of them cost, each with its operands where they were propagated
to.
"""

from collections.abc import Iterator
from itertools import combinations
from typing import Any

from sharding.program import Op, Value
from sharding.rule import Kind
from sharding.spec import Layout
from spmd.partition.choose import costs
from spmd.partition.placed import needs
from spmd.partition.reshard import plan
from spmd.partition.tensor import FREE, Tensor

# Axes of a value; one sharded over more has too many subsets of them to try.
AXES = 4
# What sharing has to come to, of what readers move that do not share. They are estimated: what
# they find at hand when they are planned may be more.
WORTH = 0.95

Shares = tuple[tuple[Layout, int], ...]


def shared(planner: Any, value: Value, expected: Shares) -> Shares:
    """The layout that readers of a value share, as free for each of them.

    Args:
      planner: `planner._Planner`.
      expected: what the propagated layouts of the readers' results say; kept where no reader has a
        choice between operands.
    """
    found = planner.propagated.program.readers[value.id]
    readers = list(dict.fromkeys(op for op, _ in found if _chooses(op)))
    wanted = planner.wanted(value)
    if len(readers) < 2 or wanted.partial or not 0 < len(wanted.used) <= AXES:
        return expected
    apart = [_reading(planner, op, value, wanted)[0] for op in readers]
    alone = sum(apart)
    tried: list[tuple[float, Layout, list[tuple[float, bool]]]] = []
    for layout in _layouts(wanted, expected):
        moved = plan(wanted, layout, value.shape, value.itemsize, planner.mesh).cost
        if moved < alone:
            tried.append((moved, layout, [_reading(planner, op, value, layout) for op in readers]))
    # What every way costs, such as local work, is no reason for one of them.
    each = zip(apart, *([cost for cost, _ in ways] for _, _, ways in tried), strict=True)
    least = sum(map(min, each))
    best, chosen = WORTH * (alone - least), None
    for moved, layout, ways in tried:
        total = moved + sum(cost for cost, _ in ways) - least
        if total < best:
            best, chosen = total, (layout, sum(takes for _, takes in ways))
    if chosen is None or chosen[1] < 2:
        return expected
    return ((chosen[0], FREE),)  # decided for all: none is to find its part of it too dear


def _chooses(op: Op) -> bool:
    """Whether an operation may move either of two operands: it contracts them."""
    return (
        op.control is None and op.rule.annotation is None and len(op.inputs) > 1
        and any(factor.kind is Kind.REDUCE for factor in op.rule.factors.values())
    )  # fmt: skip


def _layouts(wanted: Layout, expected: Shares) -> Iterator[Layout]:
    """Those that may be shared: gathered over some axes, and those that results ask for."""
    for n in range(1, len(wanted.used) + 1):
        for gathered in combinations(sorted(wanted.used), n):
            dims = tuple(tuple(a for a in dim if a not in gathered) for dim in wanted.dims)
            yield Layout(dims)
    yield from (layout for layout, _ in expected if layout != wanted)


def _reading(planner: Any, op: Op, value: Value, layout: Layout) -> tuple[float, bool]:
    """What a reader costs when the value is at hand in a further layout; whether it takes it."""
    operands = tuple(
        _tensor(planner, op, v, (layout,) if v is value else None) for v in op.inputs
    )
    results = tuple(map(planner.result, op.outputs))
    assignment, cost = costs(op.rule, operands, results, planner.mesh)
    needed = needs(op.rule, assignment, operands, planner.mesh)
    return cost, any(
        v is value and need == layout for v, need in zip(op.inputs, needed, strict=True)
    )


def _tensor(
    planner: Any, op: Op, value: Value, further: tuple[Layout, ...] | None
) -> Tensor:
    """The value, also at hand in `further` layouts; others (None) may have readers that share, as
    was decided for them, or as is expected."""
    layouts = tuple(dict.fromkeys((planner.wanted(value), *(further or ()))))
    alike: Shares = ()
    if further is None and planner.uses[value.id] > 1:
        alike = planner.expected.get(value.id) or planner.counted(value)
    late = further is None and planner.late(value, op)
    return Tensor(value.shape, value.itemsize, layouts, alike, late=late)
