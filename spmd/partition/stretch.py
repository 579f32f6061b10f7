"""A stretch of a program in which a mesh axis could shard another dim, and where it is less.

Which equations run with the axis on the other dim is a minimum cut:

    source -> e          work of e, and bringing its results to where they are wanted
    e -> sink            the same with the axis on the other dim
    e -> read'(v)        infinite: e there reads v there
    read'(v) -> sink     what that costs, once for all readers, where v is made there
    read'(v) -> made(v)  what it costs more where v is made here: the all-to-all
    source -> read(v), made(v) -> read(v), read(v) -> e    the same the other way round

Equations on the source's side have it on the other dim. Arguments, results and what is annotated
stay. Across the boundary of a region a value is read as it lies on the other side.
"""

import math
from collections import deque
from collections.abc import Hashable, Iterator
from math import prod

from sharding.mesh import axes_size, overlap
from sharding.program import Op, Value
from sharding.rule import Kind
from sharding.spec import Layout
from spmd.partition.around import STEPS, Flow, Surroundings, Way, lying
from spmd.partition.cut import Edge, source_side

# Equations that are decided together; further ones stay as they are.
WINDOW = 4096
# Readers of a value that are too many to go on from all of them at once.
MANY = 16

_SOURCE, _SINK = "source", "sink"


# A value, by id, in the layout, by number, that readers need who have the axis on the other dim, or
# where it was.
_Read = tuple[int, int, bool]
_Reads = dict[_Read, list[Hashable]]
# No layout: that of a value that cannot have the axis on the other dim.
_NOWHERE = -1


class Stretch:
    """Equations around one that could have an axis on another dim, and by itself had better.

    Args:
      sure: to be decided whether that one had better or not, since a loop around it has.

    Attributes:
      ops: by index; none where the first one had not.
      gain: what is saved by those that do, in bytes on a link.
    """

    def __init__(
        self, around: Surroundings, start: Op, axis: str, dim: int, sure: bool = False
    ):  # fmt: skip
        self.around, self.planner, self.mesh = around, around.planner, around.mesh
        self.start, self.axis, self.dim = start, axis, dim
        self.ops: dict[int, Op] = {}
        self.values: dict[int, Value] = {}  # that no equation of the stretch makes
        self._members = around.having[dim]
        self._layouts: dict[int, tuple[int, int]] = {}
        self._large = max(prod(v.shape) * v.itemsize for v in (*start.inputs, *start.outputs))
        self.gain, self._there = 0.0, set[Hashable]()
        better = sure or self._alone(start, True) < self._alone(start, False)
        if better and self._movable(start):
            self._collect(start)
            self._decide()

    def move(self) -> set[int]:
        """Wants the axis on the other dim, where that is less; of which equations."""
        made = [v for op in self.ops.values() for v in op.outputs]
        for value in (*made, *self.values.values()):
            moves = self.moves(value)
            for flow in self.around.flows.get(value.id, ()):
                if value.op is None or flow.inward or self.moves(flow.target) == moves:
                    continue
                self.planner.leave[value.id] = self._flowing(value, flow, not moves)
            if moves:
                self.planner.layouts[value.id] = self.around.layouts[self.layouts(value)[1]]
        return self.ops.keys() & self._there

    def moves(self, value: Value) -> bool:
        """Whether the axis is to shard the other dim of a value."""
        return self.has(value) and self.node(value) in self._there

    def has(self, value: Value) -> bool:
        """Whether it is decided here where a value is."""
        if not self.member(value):
            return False
        if value.op is not None and value.op.control is None:
            return value.op.index in self.ops
        return value.id in self.values

    def member(self, value: Value) -> bool:
        """Whether a value has the other dim."""
        return value.id in self._members

    def node(self, value: Value) -> int:
        """The node of what makes a value: the equation's index, or less than 0."""
        made = value.op is not None and value.op.control is None
        return value.op.index if made and value.op else -1 - value.id

    def layouts(self, value: Value) -> tuple[int, int]:
        """Where a value is wanted, and with the axis on the other dim, or `_NOWHERE`; by number."""
        found = self._layouts.get(value.id)
        if found is None:
            here, number = lying(self.planner, value), self.around.number
            other = self._other(value, here)
            found = (number(here), _NOWHERE if other is None else number(other))
            self._layouts[value.id] = found
        return found

    def _other(self, value: Value, here: Layout) -> Layout | None:
        dims = [d for d, dim in enumerate(self.around.dims(value)) if dim == self.dim]
        if here.partial or len(dims) > 1:
            return None
        if not dims:
            return here
        (d,) = dims
        if self.axis in here.dims[d]:
            return here
        if any(a != self.axis and overlap(a, self.axis) for a in here.used):
            return None
        axes = [tuple(a for a in found if a != self.axis) for found in here.dims]
        axes[d] += (self.axis,)
        shards, last = axes_size(self.mesh, axes[d]), d == value.rank - 1
        if value.shape[d] % shards or (last and self._narrow(value, shards)):
            return None
        return Layout(tuple(axes))

    def _narrow(self, value: Value, shards: int) -> bool:
        """Whether too little of rows would be on each device, of a value that is worth a thought:
        the segment sums of a graph would run over all edges on every device of a TPU."""
        lanes = self.planner.traits.lanes
        small = prod(value.shape) * value.itemsize * lanes <= self._large
        return value.shape[-1] < lanes * shards and not small

    def _collect(self, start: Op) -> None:
        """Equations that the dim goes through, those next to the first one first; through the
        readers of what many read one after the other, each with what is made of it."""
        queue: deque[Op | Value] = deque((start,))
        later: deque[Op | Value] = deque()
        seen: set[int] = set()
        while (queue or later) and len(self.ops) < WINDOW:
            at = queue.popleft() if queue else later.popleft()
            if isinstance(at, Op):
                if at.index not in self.ops:
                    self.ops[at.index] = at
                    queue += filter(self.member, (*at.inputs, *at.outputs))
            elif at.id not in seen:
                seen.add(at.id)
                if at.op is not None and at.op.control is None:
                    queue.append(at.op)
                else:
                    self.values[at.id] = at
                readers = self.around.program.readers[at.id]
                into = later if len(readers) > MANY else queue
                into += [op for op, _ in readers if op.control is None]
                queue += filter(self.member, self.around.near.get(at.id, ()))
                queue += filter(self.member, self.around.alike.get(at.id, ()))

    def _decide(self) -> None:
        edges = list(self._edges())
        self._there = source_side(edges, _SOURCE, _SINK)
        before = sum(c for a, _, c in edges if a == _SOURCE)
        after = sum(c for a, b, c in edges if a in self._there and b not in self._there)
        self.gain = before - after

    # --- what it costs ----------------------------------------------------------------------------

    def _edges(self) -> Iterator[Edge]:
        reads: _Reads = {}
        for i, op in self.ops.items():
            movable = self._movable(op)
            for there in (False, True)[: 1 + movable]:
                operands, way = self._way(op, there)
                price = self.around.runs(op, operands, way)
                yield (i, _SINK, price) if there else (_SOURCE, i, price)
                for value, need in zip(op.inputs, way.needs, strict=True):
                    if value.rank:
                        reads.setdefault((value.id, need, there), []).append(i)
            if not movable:
                yield i, _SINK, math.inf
            for value in op.outputs:
                yield from self._leaves(value, reads)
        for value in self.values.values():
            if value.id in self.around.given or self.layouts(value)[1] == _NOWHERE:
                yield self.node(value), _SINK, math.inf
            for other in self.around.alike.get(value.id, ()):
                yield self.node(value), self.node(other) if self.has(other) else _SINK, math.inf
            yield from self._leaves(value, reads)
        for read, readers in reads.items():
            yield from self._read(read, readers)

    def _alone(self, op: Op, there: bool) -> float:
        """What an equation costs where all that it reads and makes has the axis on the one dim."""
        operands, way = self._way(op, there)
        return way.cost + self.around.read(op, operands, way)

    def _way(self, op: Op, there: bool) -> tuple[list[int], Way]:
        """Where its operands lie then, and how it runs."""
        operands = [self._at(v, there) for v in op.inputs]
        return operands, self.around.way(op, operands, [self._at(v, there) for v in op.outputs])

    def _movable(self, op: Op) -> bool:
        rule = op.rule
        if rule.elementary or op.scope.manual is not None:
            return False
        if rule.annotation is not None and not rule.annotation.all_open:
            return False
        if self.around.trips[op.index] > STEPS and self._exchanges(op):
            return False
        return all(self.layouts(v)[1] != _NOWHERE for v in (*op.inputs, *op.outputs))

    def _exchanges(self, op: Op) -> bool:
        """Whether an operation would send along the dim by itself, as a roll or a sort does."""
        rule = op.rule
        dims = [self.around.dims(v) for v in op.inputs]
        along = {name for name, where in rule.where.items() for t, d in where
                 if t < len(dims) and dims[t][d] == self.dim}  # fmt: skip
        special = rule.local_when if rule.flops and rule.local_when else frozenset[str]()
        kinds = {name: rule.factors[name].kind for name in along}
        return any(kind is Kind.PERMUTE or (kind is Kind.PASS and name in special)
                   for name, kind in kinds.items())  # fmt: skip

    def _at(self, value: Value, there: bool) -> int:
        here, other = self._layouts.get(value.id) or self.layouts(value)
        return other if there and other != _NOWHERE else here

    def _read(self, read: _Read, readers: list[Hashable]) -> Iterator[Edge]:
        """Bringing a value to its readers that have the axis on the one dim, or on the other."""
        number, need, there = read
        value = self.around.program.values[number]
        made = self.node(value)
        moved = stays = self.around.bringing(self._at(value, False), need, value)
        if self.has(value):
            moved = self.around.bringing(self._at(value, True), need, value)
        if there:
            yield read, _SINK, moved
            yield from [(reader, read, math.inf) for reader in readers]
            yield read, made, max(stays - moved, 0.0)
        else:
            yield _SOURCE, read, stays
            yield from [(read, reader, math.inf) for reader in readers]
            yield made, read, max(moved - stays, 0.0)

    def _leaves(self, value: Value, reads: _Reads) -> Iterator[Edge]:
        """Bringing a value to what is not decided here, and across the boundaries of regions."""
        if not self.has(value):
            return
        node, (here, other) = self.node(value), self.layouts(value)
        other = here if other == _NOWHERE else other
        readers = self.around.program.readers[value.id]
        outside = any(op.control is None and op.index not in self.ops for op, _ in readers)
        if value.id in self.around.held:
            yield node, _SINK, math.inf
            return
        if value.id in self.around.ends or outside:
            yield node, _SINK, self.around.bringing(other, here, value)
        for flow in self.around.flows.get(value.id, ()):
            decided = self.has(flow.target)
            reader = self.node(flow.target) if decided else _SINK
            for there in (False, True)[: 1 + decided]:
                need = self.around.number(self._flowing(value, flow, there))
                reads.setdefault((value.id, need, there), []).append(reader)

    def _flowing(self, value: Value, flow: Flow, there: bool) -> Layout:
        """The layout in which a value crosses a boundary, for its name on the other side."""
        layout, port = self.around.layouts[self._at(flow.target, there)], flow.port
        if port is None:
            return layout
        if flow.inward:
            return self.planner.outside(layout, port)
        return Layout(layout.dims[1:]) if port.stacked else layout
