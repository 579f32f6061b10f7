"""What the stretches of a program have in common: dims, how often things happen, what they cost."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sharding.mesh import MeshShape, axis_size
from sharding.program import Op, Region, Value
from sharding.region import Port
from sharding.rule import Kind, Rule
from sharding.spec import Layout
from spmd.partition.again import of_nothing
from spmd.partition.choose import costs
from spmd.partition.linear import only_reader
from spmd.partition.loops import WORTH, inside, unchanged
from spmd.partition.placed import flops, forced, makes, needs
from spmd.partition.plan import UNKNOWN_STEPS, Assignment, steps
from spmd.partition.reshard import Plan, plan
from spmd.partition.scope import agree, whole
from spmd.partition.tensor import Tensor

# Operations that weigh as much as a byte on a link: a tenth of what a chip multiplies in its time.
FLOPS_PER_BYTE = 256.0
# In loops of more steps than this it counts how often something is sent, and not only how much:
# each time a device waits for the others, for as long as this many bytes take (5 us on TPU v5p).
STEPS, LATENCY = 32, 1 << 19
# Operations between a sum and what it is added to.
_FEW = 4
# Off: what runs beside computation counts like all that is sent. Counted for less, gathers stay
# that each hide, where all of them do not.
HIDDEN = "hidden_transfers"
# What it counts for a loop to bring somewhere what could be there before it.
RATHER = 1.01


def work(rule: Rule, assignment: Assignment, mesh: MeshShape) -> float:
    """Of a product, in bytes on a link; what is elementwise is done beside it."""
    if rule.flops == 1:
        return 0.0
    return flops(rule, assignment, mesh) / FLOPS_PER_BYTE


def waited(found: Plan, waits: Mapping[str, float]) -> float:
    """The cost of a reshard, less what is hidden of it.

    Args:
      waits: see `Traits`.
    """
    return found.cost - sum((1 - waits.get(step.kind, 1.0)) * step.bytes for step in found.steps)


def as_tensors(values: Iterable[Value], layouts: Iterable[Layout]) -> tuple[Tensor, ...]:
    """Values in layouts, as the choice of an assignment is asked about them."""
    return tuple(
        Tensor(v.shape, v.itemsize, (layout,), anywhere=of_nothing(v))
        for v, layout in zip(values, layouts, strict=True)
    )


def lying(planner: Any, value: Value) -> Layout:
    """Where a value is wanted; constants are whole.

    Args:
      planner: `planner._Planner`.
    """
    return planner.wanted(value) if value.const is None else whole(value)


def delay(runs: float) -> float:
    """What it costs that something is sent so often, in bytes on a link."""
    return runs * LATENCY if runs > STEPS else 0.0


class Way(NamedTuple):
    """How an equation runs.

    Attributes:
      work: of a product, in bytes on a link.
      brought: what brings its results to where they are wanted.
      needs: layouts of its operands, by number.
      sends: whether that sends anything.
    """

    work: float
    brought: float
    needs: tuple[int, ...]
    sends: bool

    @property
    def cost(self) -> float:
        return self.work + self.brought


class Flow(NamedTuple):
    """A value as it is called across the boundary of a region, or in a loop's next step.

    Attributes:
      port: None for what a loop carries.
      inward: whether it flows into the region.
    """

    target: Value
    port: Port | None = None
    inward: bool = False


class Surroundings:
    """What the stretches of a program have in common. Layouts go by their numbers here: the same
    few are asked about again and again.

    Args:
      planner: `planner._Planner`.

    Attributes:
      layouts: by number.
      having: the values, by id, that have a dim of the program.
    """

    def __init__(self, planner: Any):
        self.planner, self.mesh = planner, planner.mesh
        self.program = planner.propagated.program
        self.waits = planner.traits.waits if planner.on(HIDDEN) else {}
        self.trips: dict[int, int] = {}  # of equations, by index
        self.made: dict[int, int] = {}  # how often values are
        self.flows: dict[int, list[Flow]] = {}
        self.near: dict[int, list[Value]] = {}
        self.alike: dict[int, list[Value]] = {}  # names of one operand in several regions
        # What stays the same in all steps of a loop, as it is called outside: it may be brought
        # somewhere once, before the first, see `loops`.
        self.outside: dict[int, Value] = {}
        self.held: set[int] = set()  # values of regions that know axes by name
        self._count(self.program.body, 1)
        self.given = {v.id for v in self.program.body.inputs}
        self.ends = self.given | {v.id for v in self.program.body.outputs}
        dim = planner.propagated.reach.dim
        self._dims = [tuple(dim(v, d) for d in range(v.rank)) for v in self.program.values]
        self.having = defaultdict[int, set[int]](set)
        for i, dims in enumerate(self._dims):
            for found in dims:
                self.having[found].add(i)
        self._nothing: dict[int, bool] = {}
        self.layouts: list[Layout] = []
        self._numbers: dict[Layout, int] = {}
        self._kind_of: dict[int, int] = {}  # by equation, of those that are alike the same
        self._kinds: dict[Hashable, int] = {}
        self._ways: dict[tuple[int, ...], Way] = {}
        self._brought: dict[tuple[int, int, int], float] = {}

    def dims(self, value: Value) -> tuple[int, ...]:
        """The dims of the program that those of a value are."""
        return self._dims[value.id]

    def number(self, layout: Layout) -> int:
        """A layout's number: its place in `layouts`."""
        found = self._numbers.setdefault(layout, len(self.layouts))
        if found == len(self.layouts):
            self.layouts.append(layout)
        return found

    def of_nothing(self, value: Value) -> bool:
        """Whether it is made anywhere."""
        found = self._nothing.get(value.id)
        if found is None:
            found = self._nothing[value.id] = of_nothing(value)
        return found

    def way(self, op: Op, operands: Sequence[int], results: Sequence[int]) -> Way:
        """How an equation runs once where its operands lie so, and its results are wanted so;
        worked out once for all that are alike."""
        kind = self._kind_of.get(op.index)
        if kind is None:
            sizes = ((v.shape, v.itemsize, self.of_nothing(v)) for v in (*op.inputs, *op.outputs))
            kind = self._kinds.setdefault((op.rule.canonical, *sizes), len(self._kinds))
            self._kind_of[op.index] = kind
        key = (kind, *operands, *results)
        found = self._ways.get(key)
        if found is None:
            found = self._ways[key] = self._way(op, operands, results)
        return found

    def _way(self, op: Op, operands: Sequence[int], results: Sequence[int]) -> Way:
        lie, wanted = ([self.layouts[at] for at in numbers] for numbers in (operands, results))
        ins = as_tensors(op.inputs, lie)
        if op.rule.early and agree(op, lie, wanted[0]):
            assignment = forced(op.rule, wanted[0], self.mesh)
        else:
            assignment, _ = costs(op.rule, ins, as_tensors(op.outputs, wanted), self.mesh)
        made = [*zip(makes(op.rule, assignment, self.mesh), wanted, op.outputs, strict=True)]
        brought = sum(self.moving(*each) for each in made)
        sends = any(self.sends(*each) for each in made)
        needed = map(self.number, needs(op.rule, assignment, ins, self.mesh))
        return Way(work(op.rule, assignment, self.mesh), brought, (*needed,), sends)

    def sent(self, op: Op) -> float:
        """What all runs of an equation send of its operands and results, as they are wanted."""
        operands = [self.number(lying(self.planner, v)) for v in op.inputs]
        results = [self.number(self.planner.wanted(v)) for v in op.outputs]
        way = self.way(op, operands, results)
        return self.trips[op.index] * (way.brought + self.read(op, operands, way))

    def read(self, op: Op, operands: Sequence[int], way: Way) -> float:
        """What it costs to bring operands to where an equation needs them."""
        reads = zip(operands, way.needs, op.inputs, strict=True)
        return sum(self.moving(self.layouts[a], self.layouts[b], v) for a, b, v in reads)

    def often(self, value: Value) -> float:
        """How often a value is brought from one layout to another: what stays the same in a loop
        once before it, though rather by another layout there than by a pass over the loop."""
        inside = value
        while value.id in self.outside:
            value = self.outside[value.id]
        return self.made[value.id] * (1.0 if value is inside else RATHER)

    def runs(self, op: Op, operands: Sequence[int], way: Way) -> float:
        """What all runs of an equation cost, what it reads not counted: as often as it runs, or
        what it takes from is gathered once before a loop."""
        trips = self.trips[op.index]
        waits = way.sends and not self.added(op)
        found = trips * way.cost + (delay(trips) if waits else 0.0)
        if op.rule.flops or not way.brought:
            return found
        lie = [(v, at) for v, at in zip(op.inputs, operands, strict=True) if self.layouts[at].used]
        if not all(v.id in self.outside for v, _ in lie):
            return found
        return min(found, sum(self.bringing(at, self.number(whole(v)), v) for v, at in lie))

    def added(self, op: Op) -> bool:
        """Whether what an equation makes is only added to something: a loop that only adds it up
        reduces it once, after its last step."""
        for _ in range(_FEW if self.planner.on("loop_sums") else 0):
            found = only_reader(self.program, op.outputs[0]) if len(op.outputs) == 1 else None
            if found is None or not found[0].rule.linear:
                return False
            op = found[0]
            if any(len(group) > 1 for group in op.rule.linear):
                return True
        return False

    def bringing(self, src: int, dst: int, value: Value) -> float:
        """What it costs to bring a value from one layout to another, as often as it is done."""
        if src == dst:
            return 0.0
        found = self._brought.get((src, dst, value.id))
        if found is None:
            times, way = self.often(value), (self.layouts[src], self.layouts[dst], value)
            waits = delay(times)
            found = times * self.moving(*way) + (waits if waits and self.sends(*way) else 0.0)
            self._brought[src, dst, value.id] = found
        return found

    def sends(self, src: Layout, dst: Layout, value: Value) -> bool:
        """Whether bringing it there takes a collective, and not only a slice."""
        if src == dst or self.of_nothing(value):
            return False
        return plan(src, dst, value.shape, value.itemsize, self.mesh).bytes > 0

    def moving(self, src: Layout, dst: Layout, value: Value) -> float:
        """What it costs to bring a value from one layout to another."""
        if src == dst or self.of_nothing(value):
            return 0.0
        found = plan(src, dst, value.shape, value.itemsize, self.mesh)
        return waited(found, self.waits)

    def _count(self, region: Region, trips: int) -> None:
        self.made.update((v.id, trips) for v in (*region.inputs, *region.consts))
        for op in region.ops:
            self.made.update((v.id, trips) for v in op.outputs)
            self.trips[op.index] = trips
            if op.control is None:
                continue
            inner = steps(op, UNKNOWN_STEPS)
            for body in op.regions:
                self._count(body, trips * inner)
            if self.planner.on("loop_invariants") and inner - 1 > WORTH:
                self.outside |= {value.id: op.inputs[port.outer] for port, value in unchanged(op)}
            for names in inside(op).values():  # they all have to see it in one layout
                self.alike.update((v.id, names) for v in names if len(names) > 1)
            for source, flow in _flows(op):
                self.flows.setdefault(source.id, []).append(flow)
                self.near.setdefault(source.id, []).append(flow.target)
                self.near.setdefault(flow.target.id, []).append(source)
                if op.control.manual(op.params) is not None:
                    self.held |= {source.id, flow.target.id}

    def others(self, op: Op, axis: str, taken: bool) -> list[int]:
        """Dims of the program that an operation could have an axis on instead.

        Args:
          taken: also those that have it already, in some of its operands.
        """
        shards, found = axis_size(self.mesh, axis), {}
        values = (*op.inputs, *op.outputs)
        layouts = [lying(self.planner, v) for v in values]
        for name, factor in op.rule.factors.items():
            where = op.rule.where[name]
            has = [axis in layouts[t].dims[d] for t, d in where]
            free = not all(has) if taken else not any(has)
            even = factor.size and factor.size % shards == 0
            if free and factor.kind is Kind.PASS and even and len({t for t, _ in where}) > 1:
                t, d = where[0]
                found[self.dims(values[t])[d]] = None
        return list(found)


def _flows(op: Op) -> Iterator[tuple[Value, Flow]]:
    assert op.control is not None
    for port in op.in_ports:
        inner = op.regions[port.region].inputs[port.inner]
        yield op.inputs[port.outer], Flow(inner, port, inward=True)
    for port in op.out_ports:
        yield op.regions[port.region].outputs[port.inner], Flow(op.outputs[port.outer], port)
    for region, out, into in op.control.carries(op):
        yield op.regions[region].outputs[out], Flow(op.regions[region].inputs[into])
