"""Propagation: from the annotated values to a sharding for every value, to a fixed point.

Shardings are only ever refined. Rounds of user priority contain levels of op priority: what costs
nothing propagates before what costs a reduction, and what more of the program has before what less
of it has (`reach`). Every decision is kept (`provenance.Event`).
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from sharding.errors import SpecError
from sharding.mesh import MeshShape, axes_size
from sharding.program import Program, Value, render
from sharding.project import clashes, expressible, extension, to_dims, to_factors
from sharding.provenance import Event, Rejection
from sharding.reach import Reach, furthest
from sharding.region import Port
from sharding.resolve import Proposal, apart, rank, reason, tied
from sharding.rule import Kind, Rule, edge_rule
from sharding.spec import DimSharding, Sharding, check_axes

LEVELS = (
    "pointwise, reshape, transpose and data-flow edges",
    "passing factors, of each axis of the arguments along the dim that reaches furthest",
    "passing factors of every operation",
    "reduced factors",
    "broadcasts forward",
)
_FURTHEST, _PASS, _REDUCE, _BROADCAST = 1, 2, 3, 4


class Link(NamedTuple):
    """A rule over some values: an equation, or an edge across a region's boundary."""

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
    """

    program: Program
    mesh: MeshShape
    shardings: tuple[Sharding, ...]
    links: tuple[Link, ...]
    events: tuple[Event, ...]
    rejections: tuple[Rejection, ...]

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
    return _Propagation(program, mesh, annotations).run()


def make_links(program: Program) -> list[Link]:
    """Every equation, and every tie across a region's boundary, as a rule over values."""
    links: list[Link] = []
    for op in program.ops():
        if op.control is None:
            links.append(Link(op.inputs + op.outputs, op.rule, op.index))
            continue

        def edge(inner: Value, outer: Value, port: Port | None, index: int = op.index) -> None:
            if outer.rank:
                links.append(Link((inner, outer), _edge(inner, outer, port), index))

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
    """The working state: axes and openness per value and dim."""

    def __init__(
        self, program: Program, mesh: MeshShape, annotations: Sequence[tuple[Value, Sharding]]
    ):
        self.program, self.mesh, self.annotations = program, mesh, annotations
        count = len(program.values)
        self.dims: list[tuple[tuple[str, ...], ...]] = [((),) * v.rank for v in program.values]
        self.open: list[list[bool]] = [[True] * v.rank for v in program.values]
        self.reserved: list[tuple[str, ...]] = [()] * count
        self.events: list[Event] = []
        self.rejections: dict[Rejection, None] = {}
        self.links = make_links(program)
        self.reach = Reach(program.values, self.links)
        self.first = furthest(program, annotations, self.reach)
        self.touching: list[list[int]] = [[] for _ in range(count)]
        for i, link in enumerate(self.links):
            for value in link.values:
                if value.rank:
                    self.touching[value.id].append(i)
        self.queue: list[int] = []
        self.queued = bytearray(len(self.links))
        self.contested: dict[int, bool] = {}  # link -> whether only their order decides
        self.level = 0

    def run(self) -> Propagated:
        self.reserve()
        for priority in sorted({d.priority for _, s in self.annotations for d in s.dims} | {0}):
            for value, sharding in self.annotations:
                self.annotate(value, sharding, priority)
            for self.level in range(len(LEVELS)):
                if self.level == _FURTHEST and not self.first:
                    continue
                self.enqueue_all()
                self.settle()
        shardings = tuple(self.final(v) for v in self.program.values)
        return Propagated(
            self.program, self.mesh, shardings, tuple(self.links), tuple(self.events),
            tuple(self.rejections),
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

    def reserve(self) -> None:
        """Closed dims and axes that an annotation will want are out of reach from the start."""
        for value, sharding in self.annotations:
            wanted = tuple(a for d in sharding.dims for a in d.axes) + sharding.pinned
            self.reserved[value.id] += wanted
            for d, dim in enumerate(sharding.dims):
                if not dim.open or dim.priority:
                    self.open[value.id][d] = False

    def annotate(self, value: Value, sharding: Sharding, priority: int) -> None:
        """Applies the dims of one annotation that have their turn now."""
        for d, dim in enumerate(sharding.dims):
            if dim.priority != priority:
                continue
            self.open[value.id][d] = dim.open
            current = self.dims[value.id][d]
            more = extension(current, dim.axes, self.mesh) if value.shape[d] > 1 else ()
            if more:
                self.extend(value, d, current + more)
                self.events.append(Event(value.id, d, more, -1, -1, str(value), 0))

    def enqueue_all(self) -> None:
        for i, link in enumerate(self.links):
            if not self.queued[i] and self.active(link.rule):
                if any(any(self.dims[v.id]) for v in link.values):
                    self.queued[i] = 1
                    self.queue.append(i)
        heapq.heapify(self.queue)

    def active(self, rule: Rule) -> bool:
        """Whether the rule has anything to say at this level."""
        return rule.early or self.level >= _FURTHEST

    def visit(self, index: int, decide: bool) -> None:
        """Pushes what one link proposes; two proposals that want the same axis on the same tensor
        wait, unless it is time to decide."""
        link = self.links[index]
        rule = link.rule
        if not self.active(rule):
            return
        factors = [
            to_factors(rule, t, self.dims[v.id], self.mesh) if any(self.dims[v.id]) else {}
            for t, v in enumerate(link.values)
        ]
        best = self.proposals(index, factors)
        clashing: list[tuple[Proposal, Proposal, int]] = []
        if not apart(best):
            best = self.weighed(link, best)
            clashing = self.clashing(link, best, factors)
        late = self.late(link, best)
        if decide:  # but for what a stronger one wants, which has its turn later
            waiting = {(q.factor, t) for p, q, t in clashing if p.factor in late}
        else:
            waiting = {(x.factor, t) for p, q, t in clashing for x in (p, q)}
            for p, q, _ in clashing:
                self.contested[index] = tied(p, q) or self.contested.get(index, False)
        for proposal in best:
            if proposal.factor in late or proposal.kind is Kind.REDUCE and self.level < _REDUCE:
                continue
            for t, d in rule.where[proposal.factor]:
                if t != proposal.tensor and (proposal.factor, t) not in waiting:
                    self.push(index, proposal, t, d, factors)

    def clashing(
        self, link: Link, best: list[Proposal], factors: list[dict[str, tuple[str, ...]]]
    ) -> list[tuple[Proposal, Proposal, int]]:
        """Pairs, the stronger first, that want one of the same axes on a tensor. Those of factors
        that are reduced count at every level: what they want must not be taken unseen."""
        found = []
        for i, q in enumerate(best):
            for p in best[:i]:
                if not any(clashes(axis, p.axes) for axis in q.axes):
                    continue
                for t in {t for t, _ in link.rule.where[q.factor]}.intersection(
                    t for t, _ in link.rule.where[p.factor]
                ):
                    if all(self.wants(link, t, x, factors) for x in (p, q)):
                        found.append((p, q, t))
        return found

    def wants(
        self, link: Link, t: int, p: Proposal, factors: list[dict[str, tuple[str, ...]]]
    ) -> bool:
        """Whether a proposal would extend a tensor, were it alone."""
        d = next(d for u, d in link.rule.where[p.factor] if u == t)
        if t == p.tensor or not self.open[link.values[t].id][d]:
            return False
        current = factors[t].get(p.factor, ())
        more = extension(current, p.axes, self.mesh)
        if not more:
            return False
        return bool(self.takeable(link, p, t, current, more, factors[t])[0])

    def proposals(self, index: int, factors: list[dict[str, tuple[str, ...]]]) -> list[Proposal]:
        """The winning proposal of every factor, strongest first."""
        link = self.links[index]
        rule = link.rule
        operands = len(rule.operands)
        best: dict[str, Proposal] = {}
        spread = rule.spread if self.level < _BROADCAST else ()
        for t, found in enumerate(factors):
            for name, axes in found.items() if t not in spread else ():
                kind = rule.factors[name].kind
                if kind is Kind.FIXED:
                    continue
                elements = prod(link.values[t].shape)
                new = Proposal(name, kind, axes, t, t >= operands, elements)
                old = best.get(name)
                if old is None:
                    best[name] = new
                elif old.axes != new.axes:
                    best[name] = self.stronger(index, old, new)
        return sorted(best.values(), key=rank) if len(best) > 1 else list(best.values())

    def weighed(self, link: Link, best: list[Proposal]) -> list[Proposal]:
        """Proposals that want one axis, the strongest first: for those that reach furthest the
        results count, which would have to move back."""
        reach = [self.reach.of(self.reach.factor(link, p.factor)) for p in best]
        results = sum(prod(v.shape) for v in link.values[len(link.rule.operands) :])
        found = [
            p._replace(elements=p.elements + results) if far == max(reach) else p
            for p, far in zip(best, reach, strict=True)
        ]
        return sorted(found, key=rank)

    def late(self, link: Link, best: list[Proposal]) -> set[str]:
        """Factors whose proposals count, but do not go anywhere yet."""
        if self.level != _FURTHEST or link.rule.early:
            return set()
        found: set[str] = set()
        for p in best:
            dim = self.reach.factor(link, p.factor)
            if any(dim != first and clashes(axis, p.axes) for axis, first in self.first.items()):
                found.add(p.factor)
        return found

    def stronger(self, index: int, old: Proposal, new: Proposal) -> Proposal:
        """The longer of two that agree; by policy where they do not."""
        if extension(old.axes, new.axes, self.mesh) is not None:
            return new
        if extension(new.axes, old.axes, self.mesh) is not None:
            return old
        winner, loser = sorted((old, new), key=rank)
        rule = self.links[index].rule
        d = next(d for t, d in rule.where[loser.factor] if t == winner.tensor)
        target = self.links[index].values[winner.tensor]
        self.reject(index, loser, target, d, reason(winner, loser))
        return winner

    def push(
        self, index: int, proposal: Proposal, t: int, d: int,
        factors: list[dict[str, tuple[str, ...]]],
    ) -> None:  # fmt: skip
        """Extends dim `d` of tensor `t` towards the proposal, as far as it is legal."""
        link = self.links[index]
        rule, value = link.rule, link.values[t]
        current = factors[t].get(proposal.factor, ())
        more = extension(current, proposal.axes, self.mesh)
        if not more:
            if more is None:
                self.reject(index, proposal, value, d, f"it is sharded over {'+'.join(current)}")
            return
        if not self.open[value.id][d]:
            self.reject(index, proposal, value, d, "the dim is closed by an annotation")
            return
        taken, why = self.takeable(link, proposal, t, current, more, factors[t])
        if len(taken) < len(more):
            self.reject(index, proposal, value, d, why)
        if not taken:
            return
        factors[t][proposal.factor] = current + taken
        self.extend(value, d, to_dims(rule, t, factors[t], self.mesh)[d])
        source = link.values[proposal.tensor].id
        self.events.append(
            Event(value.id, d, taken, index, source, proposal.factor, self.level)
        )

    def takeable(
        self, link: Link, proposal: Proposal, t: int, current: tuple[str, ...],
        more: tuple[str, ...], factors: dict[str, tuple[str, ...]],
    ) -> tuple[tuple[str, ...], str]:  # fmt: skip
        """The prefix of `more` that the tensor can take, and why not the rest."""
        value = link.values[t]
        used = tuple(a for axes in self.dims[value.id] for a in axes) + self.reserved[value.id]
        size = self.limit(link, proposal.factor, t)
        taken: tuple[str, ...] = ()
        for axis in more:
            if clashes(axis, used + taken):
                return taken, f"{axis} is used by another dim, or kept for one"
            trial = current + taken + (axis,)
            if axes_size(self.mesh, trial) > size:
                return taken, f"{axes_size(self.mesh, trial)} shards of {size} elements"
            if not expressible(link.rule, t, {**factors, proposal.factor: trial}, self.mesh):
                return taken, "the shards would not be contiguous"
            taken += (axis,)
        return taken, ""

    def limit(self, link: Link, factor: str, t: int) -> int:
        """The most shards that a tensor takes along a factor."""
        size, kind, _ = link.rule.factors[factor]
        if kind is not Kind.PERMUTE:
            return size
        d = next(d for u, d in link.rule.where[factor] if u == t)
        return link.values[t].shape[d]

    def extend(self, value: Value, d: int, axes: tuple[str, ...]) -> None:
        dims = self.dims[value.id]
        self.dims[value.id] = (*dims[:d], axes, *dims[d + 1 :])
        for i in self.touching[value.id]:
            if not self.queued[i]:
                self.queued[i] = 1
                heapq.heappush(self.queue, i)

    def reject(self, index: int, p: Proposal, value: Value, d: int, why: str) -> None:
        source = self.links[index].values[p.tensor].id
        self.rejections[Rejection(value.id, d, p.axes, index, source, why)] = None

    def final(self, value: Value) -> Sharding:
        dims = zip(self.dims[value.id], self.open[value.id], strict=True)
        return Sharding(tuple(DimSharding(axes, is_open) for axes, is_open in dims))
