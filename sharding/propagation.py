"""Propagation: from the annotated values to a sharding for every value, to a fixed point.

Shardings are only ever refined. Rounds of user priority contain levels of op priority: what costs
nothing propagates before what costs a reduction, and what more of the program has before what less
of it has (`reach`). Every decision is kept (`provenance.Event`).
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sharding.collector import uncollected
from sharding.decide import FURTHEST, LEVELS, Case, Decider, State
from sharding.errors import SpecError
from sharding.mesh import MeshShape
from sharding.program import Program, Value, render
from sharding.project import extension
from sharding.provenance import Event, Rejection
from sharding.reach import Reach, furthest
from sharding.region import Port
from sharding.rule import Rule, edge_rule
from sharding.spec import DimSharding, Sharding, check_axes


class Link(NamedTuple):
    """A (canonical) rule over some values: an equation, or an edge across a region's boundary."""

    values: tuple[Value, ...]
    rule: Rule
    op: int


@dataclass(frozen=True)
class Propagated:
    """A program with a sharding for every value.

    Attributes:
      program: the program.
      mesh: names and sizes of the mesh axes.
      shardings: by value id.
      links: equations and edges, as `events` number them.
      events: every refinement, in order.
      rejections: every proposal that lost, with the reason.
      reach: the dims of the program, and how far each goes.
    """

    program: Program
    mesh: MeshShape
    shardings: tuple[Sharding, ...]
    links: tuple[Link, ...]
    events: tuple[Event, ...]
    rejections: tuple[Rejection, ...]
    reach: Reach

    def of(self, value: Value) -> Sharding:
        return self.shardings[value.id]

    def __str__(self) -> str:
        lines = render(self.program, lambda v: f" {self.shardings[v.id]}" if v.rank else "")
        return f"mesh {self.mesh.placed_text()}\n" + "\n".join(lines)


def propagate(
    program: Program,
    mesh: MeshShape,
    annotations: Sequence[tuple[Value, Sharding]] = (),
) -> Propagated:
    """Infers the sharding of every value.

    Args:
      program: from `sharding.program.build`.
      mesh: abstract; no device is needed.
      annotations: the user's shardings of values: arguments, results, and those inside.

    Raises:
      SpecError: an annotation names an axis that the mesh does not have.
    """
    problems = [p for v, s in annotations for p in check_axes(s, mesh, str(v))]
    if problems:
        raise SpecError(*problems)
    with uncollected():
        return _Propagation(program, mesh, annotations).run()


def make_links(program: Program) -> list[Link]:
    """Every equation, and every tie across a region's boundary, as a rule over values."""
    links: list[Link] = []
    for op in program.ops():
        if op.control is None:
            links.append(Link(op.inputs + op.outputs, op.rule.canonical, op.index))
            continue

        def edge(inner: Value, outer: Value, port: Port | None, index: int = op.index) -> None:
            if outer.rank:
                links.append(Link((inner, outer), _edge(inner, outer, port).canonical, index))

        for port in op.in_ports:
            edge(op.regions[port.region].inputs[port.inner], op.inputs[port.outer], port)
        for port in op.out_ports:
            edge(op.regions[port.region].outputs[port.inner], op.outputs[port.outer], port)
        for region, out, into in op.control.carries(op):
            body = op.regions[region]
            edge(body.inputs[into], body.outputs[out], None)
    return links


def _edge(inner: Value, outer: Value, port: Port | None) -> Rule:
    if port is None or not port.lead:
        return edge_rule(inner.shape, port is not None and port.stacked)
    shards = tuple(
        (n // max(local, 1) if axes else 0)
        for axes, n, local in zip(port.lead, outer.shape, inner.shape, strict=True)
    )
    return edge_rule(inner.shape, False, shards)


class _Propagation:
    """The working state: what is known of every value, as numbers of `Decider.states`."""

    def __init__(
        self, program: Program, mesh: MeshShape, annotations: Sequence[tuple[Value, Sharding]]
    ):
        self.program, self.mesh, self.annotations = program, mesh, annotations
        self.events: list[Event] = []
        self.rejections: dict[Rejection, None] = {}
        self.links = make_links(program)
        self.reach = Reach(program.values, self.links)
        self.first = furthest(program, annotations, self.reach)
        self.decider = Decider(mesh, tuple(self.first))
        self.cases = [self.decider.case(self.case(link)) for link in self.links]
        self.states = [
            self.decider.state(State(((),) * v.rank, (True,) * v.rank)) for v in program.values
        ]
        self.touching: list[list[int]] = [[] for _ in program.values]
        for i, link in enumerate(self.links):
            for value in link.values:
                if value.rank:
                    self.touching[value.id].append(i)
        self.queue: list[int] = []
        self.queued = bytearray(len(self.links))
        self.contested: dict[int, bool] = {}  # link -> whether only their order decides
        self.level = 0

    def case(self, link: Link) -> Case:
        """A link apart from where in the program it is."""
        rule, reach, ids = link.rule, self.reach, [v.id for v in link.values]
        dims = [reach.factor(link, name) if rule.where[name] else -1 for name in rule.factors]
        far = [reach.of(dim) if dim >= 0 else 0 for dim in dims]
        order = sorted({*far})
        return Case(
            rule,
            tuple(v.shape for v in link.values),
            tuple(map(ids.index, ids)),
            tuple(map(order.index, far)),
            tuple(tuple(a for a, first in self.first.items() if dim == first) for dim in dims),
        )

    def run(self) -> Propagated:
        self.reserve()
        for priority in sorted({d.priority for _, s in self.annotations for d in s.dims} | {0}):
            for value, sharding in self.annotations:
                self.annotate(value, sharding, priority)
            for self.level in range(len(LEVELS)):
                if self.level == FURTHEST and not self.first:
                    continue
                self.enqueue_all()
                self.settle()
        return Propagated(
            self.program, self.mesh, self.shardings(), tuple(self.links), tuple(self.events),
            tuple(self.rejections), self.reach,
        )  # fmt: skip

    def settle(self) -> None:
        """To a fixed point at this level. What nobody contests goes everywhere before the first
        contested dim is decided: its neighbours may know better than the equation itself. Those
        that the policy does not tell apart come last."""
        while True:
            while self.queue:
                index = heapq.heappop(self.queue)
                self.queued[index] = 0
                self.visit(index, decide=False)
            if not self.contested:
                return
            index = min(self.contested, key=lambda i: (self.contested[i], i))
            del self.contested[index]
            self.visit(index, decide=True)

    def known(self, value: Value) -> State:
        return self.decider.states[self.states[value.id]]

    def learn(self, value: Value, **more: Any) -> None:
        """Changes what is known of a value, by the names of `State`."""
        self.states[value.id] = self.decider.state(self.known(value)._replace(**more))

    def reserve(self) -> None:
        """Closed dims and axes that an annotation will want are out of reach from the start."""
        for value, sharding in self.annotations:
            wanted = tuple(a for d in sharding.dims for a in d.axes) + sharding.pinned
            _, is_open, reserved = self.known(value)
            pairs = zip(sharding.dims, is_open, strict=True)
            is_open = tuple(old and dim.open and not dim.priority for dim, old in pairs)
            self.learn(value, open=is_open, reserved=reserved + wanted)

    def annotate(self, value: Value, sharding: Sharding, priority: int) -> None:
        """Applies the dims of one annotation that have their turn now."""
        for d, dim in enumerate(sharding.dims):
            if dim.priority != priority:
                continue
            dims, is_open, _ = self.known(value)
            self.learn(value, open=(*is_open[:d], dim.open, *is_open[d + 1 :]))
            current = dims[d]
            more = extension(current, dim.axes, self.mesh) if value.shape[d] > 1 else ()
            if more:
                self.extend(value, d, current + more)
                self.events.append(Event(value.id, d, more, -1, -1, str(value), 0))

    def enqueue_all(self) -> None:
        sharded = [any(state.dims) for state in self.decider.states]
        for i, link in enumerate(self.links):
            if not self.queued[i] and self.active(link.rule):
                if any(sharded[self.states[v.id]] for v in link.values):
                    self.queued[i] = 1
                    self.queue.append(i)
        heapq.heapify(self.queue)

    def active(self, rule: Rule) -> bool:
        """Whether the rule has anything to say at this level."""
        return rule.early or self.level >= FURTHEST

    def visit(self, index: int, decide: bool) -> None:
        """Does what one link decides; two proposals that want the same axis on the same tensor
        wait, unless it is time to decide."""
        link = self.links[index]
        if not self.active(link.rule):
            return
        states = [self.states[v.id] for v in link.values]
        found = self.decider.decide(self.cases[index], states, self.level, decide)
        if found.contested is not None:
            self.contested[index] = found.contested or self.contested.get(index, False)
        for t, d, p, why in found.refusals:
            value, source = link.values[t].id, link.values[p.tensor].id
            self.rejections[Rejection(value, d, p.axes, index, source, why)] = None
        for t, d, axes, taken, p in found.extensions:
            value, source = link.values[t], link.values[p.tensor].id
            self.extend(value, d, axes)
            self.events.append(Event(value.id, d, taken, index, source, p.factor, self.level))

    def extend(self, value: Value, d: int, axes: tuple[str, ...]) -> None:
        dims = self.known(value).dims
        self.learn(value, dims=(*dims[:d], axes, *dims[d + 1 :]))
        for i in self.touching[value.id]:
            if not self.queued[i]:
                self.queued[i] = 1
                heapq.heappush(self.queue, i)

    def shardings(self) -> tuple[Sharding, ...]:
        """What is known of every value, at last."""
        each: dict[int, Sharding] = {}
        for number in {*self.states}:
            dims, is_open, _ = self.decider.states[number]
            each[number] = Sharding(tuple(map(DimSharding, dims, is_open)))
        return tuple(each[number] for number in self.states)
