"""Pass `shared_sums`: where partial sums are reduced, by a minimum cut of what is linear in them.

A sum over a sharded dim is partial when it is made. It can be reduced there, or stay partial
through whatever is linear, as far as the first operation that is not: the gradients of three
projections of one input share one reduction, of their sum; those of a gate are reduced when they
have become as small as the gate. Every such value is made partial or whole, and a partial one is
reduced once if any reader needs it whole. The cheapest choice for all of them is a minimum cut:

    source -> made(s)      what it costs to make a sum whole at once, over making it partial
    made(v) -> read(v)     its reduction, where it is made partial and read whole
    read(v) -> made(r)     infinite: what is read partial makes its linear reader's result partial
    read(v) -> sink        infinite: some reader is not linear in it
    made(v) -> sink        work on a value that could be spread over the axes instead

Values on the source's side are made partial. A whole addend of a partial sum costs nothing: one
device has it, the others zero (`reshard`: addend, spread).
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from sharding.mesh import axes_size
from sharding.program import Op, Region, Value
from sharding.spec import Layout
from spmd import cost
from spmd.partition.choose import Alternatives
from spmd.partition.cut import Edge, source_side
from spmd.partition.linear import reduces
from spmd.partition.reshard import local_bytes, plan

# Values that are decided together: further ones are taken for readers that are not linear.
WINDOW = 256
# A partial value may become that many times larger on its way to something small.
GROWTH = 4

_SOURCE, _SINK = "source", "sink"


class Sums(NamedTuple):
    """What was decided for a region.

    Attributes:
      made: sums, by id, that are made partial, since they are reduced later.
      carried: results of operations that are linear in such sums -> axes over which they are made
        partial; () for those that read them reduced.
    """

    made: frozenset[int]
    carried: Mapping[int, tuple[str, ...]]


def settle(planner: Any, region: Region) -> Sums:
    """Decides where the partial sums of a region are reduced.

    Args:
      planner: `planner._Planner`.
    """
    made: set[int] = set()
    carried: dict[int, tuple[str, ...]] = {}
    for group in _groups(planner, region):
        partial = source_side(_edges(planner, group), _SOURCE, _SINK)
        for i, node in group.items():
            stays = (i, "made") in partial
            if node.ways is None:
                carried[i] = node.axes if stays else ()
            elif stays:
                made.add(i)
    return Sums(frozenset(made), carried)


class _Node(NamedTuple):
    """A value that is, or may stay, partial.

    Attributes:
      axes: over which.
      ways: of making it, where it is a sum over sharded elements.
    """

    value: Value
    axes: tuple[str, ...]
    ways: Alternatives | None = None

    def layout(self, wanted: Layout) -> Layout:
        """While it is partial: as it is wanted, but for these axes."""
        dims = tuple(tuple(a for a in dim if a not in self.axes) for dim in wanted.dims)
        return Layout(dims, tuple((a, "add") for a in self.axes))


_Group = dict[int, _Node]


def _groups(planner: Any, region: Region) -> list[_Group]:
    """Sums over the same axes and what may stay partial with them, by id; those that meet in one
    operation are one group. Sums that nothing can carry are left out."""
    found: dict[int, _Group] = {}
    for op in region.ops:
        node = _sum(planner, op)
        if node is None or op.outputs[0].id in found:
            continue
        group = {node.value.id: node}
        queue = deque((node,))
        while queue:
            node = queue.popleft()
            found[node.value.id] = group
            for near in _carriers(planner, node):
                at = found.get(near.value.id)
                if near.value.id in group or len(group) >= WINDOW:
                    continue
                if at is None:
                    group[near.value.id] = near
                    queue.append(near)
                elif next(iter(at.values())).axes == node.axes:
                    at.update(group)
                    found.update(dict.fromkeys(group, at))
                    group = at
    together = {id(group): group for group in found.values() if len(group) > 1}
    return list(together.values())


def _sum(planner: Any, op: Op) -> _Node | None:
    """The result of an operation that sums over a sharded dim."""
    if op.control is not None or len(op.outputs) != 1 or not reduces(op):
        return None
    (value,) = op.outputs
    if planner.wanted(value).partial or not planner.uses[value.id]:
        return None
    ways = planner.alternatives(value)
    if ways is None or any(monoid != "add" for _, monoid in ways.made.partial):
        return None
    return _Node(value, tuple(a for a, _ in ways.made.partial), ways)


def _carriers(planner: Any, node: _Node) -> Iterator[_Node]:
    """The results of what reads a partial value and is linear in it."""
    for op, operand in planner.propagated.program.readers[node.value.id]:
        if _carries(planner, op, operand, node):
            yield _Node(op.outputs[0], node.axes)


def _group(op: Op, operand: int) -> tuple[int, ...]:
    return next((g for g in op.rule.linear if operand in g), ())


def _carries(planner: Any, op: Op, operand: int, node: _Node) -> bool:
    """Whether an operation can make a partial result of a partial operand."""
    together, axes = _group(op, operand), frozenset(node.axes)
    if op.control is not None or len(op.outputs) != 1 or not together:
        return False
    (result,) = op.outputs
    if planner.wanted(result).partial or not planner.uses[result.id]:
        return False
    if op.rule.annotation is not None and not op.rule.annotation.all_open:
        return False
    if math.prod(result.shape) > GROWTH * math.prod(node.value.shape):
        return False
    for i, value in enumerate(op.inputs):
        if i in together and i != operand and not _spreads(planner, value, axes):
            return False
        if i not in together and not axes.isdisjoint(planner.wanted(value).used):
            return False  # the axes have other work there
    # the work that they could share is small, or there is none
    ends = planner.wanted(result).used | planner.wanted(op.inputs[operand]).used
    return op.rule.flops == 1 or axes.isdisjoint(ends)


def _spreads(planner: Any, value: Value, axes: frozenset[str]) -> bool:
    """Whether a whole addend becomes a partial one without a collective."""
    layout = planner.wanted(value)
    return all(
        axes.isdisjoint(dim) or (
            axes.issuperset(dim[-1:]) and size % axes_size(planner.mesh, dim) == 0
            and len(axes.intersection(dim)) == 1
        )
        for dim, size in zip(layout.dims, value.shape, strict=True)
    )  # fmt: skip


def _edges(planner: Any, group: _Group) -> Iterator[Edge]:
    for i, node in group.items():
        value, ways, wanted = node.value, node.ways, planner.wanted(node.value).reduced()
        layout = node.layout(wanted)
        reduction = plan(layout, wanted, value.shape, value.itemsize, planner.mesh).cost
        if ways is not None:
            yield _SOURCE, (i, "made"), max(ways.alone - ways.partial, 0.0)
        else:
            more = local_bytes(layout, value.shape, value.itemsize, planner.mesh)
            more -= local_bytes(wanted, value.shape, value.itemsize, planner.mesh)
            yield (i, "made"), _SINK, cost.compute(0, 2 * more)
        yield (i, "made"), (i, "read"), reduction
        linear = 0
        for op, operand in planner.propagated.program.readers[i]:
            if _reads_partial(op, operand, group):
                yield (i, "read"), (op.outputs[0].id, "made"), math.inf
                linear += 1
        if linear < planner.uses[i]:
            yield (i, "read"), _SINK, math.inf


def _reads_partial(op: Op, operand: int, group: _Group) -> bool:
    """Whether an operation may read a value of the group as it is; a product of two of them is
    linear in neither."""
    into = group.get(op.outputs[0].id) if len(op.outputs) == 1 else None
    together = _group(op, operand)
    others = (v.id for i, v in enumerate(op.inputs) if i not in together)
    linear = into is not None and into.ways is None and bool(together)
    return linear and group.keys().isdisjoint(others)
