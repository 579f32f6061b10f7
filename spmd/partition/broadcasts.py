"""Pass `late_broadcasts`: what is cut from one shard stays with its owner until others need it.

One element of a sharded dim (`states[-1]`: what the last stage of a pipeline made) is on one
device, and would be sent to all of them. What is made of it, and of what all have, its owner can
make alone: all devices do the same work either way. It is sent later where less is sent, as a loss
is, or never, where it goes back to where it came from, as a gradient does. The cheapest choice for
all that is made of such elements is a minimum cut:

    source -> made(v)      infinite: v is cut from a shard, its owner has it
    made(v) -> read(v)     sending it to all, as often as it is made
    read(v) -> made(r)     infinite: the owner alone makes r, of what it alone has
    read(v) -> sink        infinite: a reader needs v everywhere

Values on the source's side stay with their owner. Works on the finished plan, through loops that
are counted, but not through what they carry.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from sharding.mesh import MeshShape
from sharding.program import Op, Value
from sharding.rule import sum_monoid
from sharding.spec import Layout
from spmd.partition.cut import Edge, source_side
from spmd.partition.owners import Owners, made_of, owned, sending, shared_with, without
from spmd.partition.plan import Assignment, Compute, Key, Move, ProgramPlan, RegionPlan, steps
from spmd.partition.reshard import Plan

# Values that are decided together: what is made of further ones is made everywhere.
WINDOW = 256
# Owners whose elements are looked at, one after the other; and instructions, over all of them.
GROUPS, WORK = 64, 1 << 16

_SOURCE, _SINK = "source", "sink"

Name = tuple[int, Layout]  # of a key


def late_broadcasts(found: ProgramPlan) -> ProgramPlan:
    """The plan with elements of sharded dims sent to all devices where that sends least."""
    graph, done = _Graph(found), set()
    while len(done) < min(GROUPS, max(1, WORK // max(1, len(graph.code)))):
        starts = [start for start in graph.starts() if start.owners not in done]
        if not starts:
            break
        owners = starts[0].owners
        done.add(owners)
        starts = [start for start in starts if start.owners == owners]
        change = _settled(_Late(graph, owners, starts), starts)
        if change is not None:
            found = replace(found, body=change.region(found.body))
            graph = _Graph(found)
    return found


class _Use(NamedTuple):
    """A reader of a key: an instruction, or the end of a region (None).

    Attributes:
      place: which of its operands, or of the region's outputs.
      within: the equation whose region this is in, and which of its regions; None: the program.
    """

    instruction: Compute | Move | None
    place: int
    within: tuple[Compute, int] | None


class _Start(NamedTuple):
    """An element cut from a shard, with what only rearranges or scales it before it is reduced.

    Attributes:
      owners: who has it.
      chain: it, and those values: as they are once all devices have them -> while they are partial.
      moves: the reductions that bring them to all.
    """

    owners: Owners
    chain: dict[Name, Name]
    moves: list[Move]


class _Graph:
    """Who makes and who reads the values of a plan, by value and layout."""

    def __init__(self, found: ProgramPlan):
        self.uses: dict[Name, list[_Use]] = {}
        self.values: dict[int, tuple[Value, MeshShape, int]] = {}  # with how often it is made
        self.code: list[tuple[Compute, MeshShape]] = []
        self._region(found.body, None, 1)

    def _region(self, body: RegionPlan, within: tuple[Compute, int] | None, trips: int) -> None:
        made = list(body.region.inputs)
        for one in body.code:
            self._note(one, one.reads, within)
            if isinstance(one, Compute):
                self.code.append((one, body.mesh))
                made += [key.value for key in one.results]
                inner = trips * steps(one.op)
                for i, region in enumerate(one.regions):
                    self._region(region, (one, i), inner)
        self._note(None, body.outputs, within)
        self.values.update((value.id, (value, body.mesh, trips)) for value in made)

    def _note(
        self, one: Compute | Move | None, reads: Sequence[Key], within: tuple[Compute, int] | None
    ) -> None:
        for i, (value, layout, _) in enumerate(reads):
            self.uses.setdefault((value.id, layout), []).append(_Use(one, i, within))

    def reader(self, name: Name) -> Op | None:
        """The first operation that reads a value; None at the end of a region."""
        ones = (use.instruction for use in self.uses.get(name, ()))
        found = (one.reason if isinstance(one, Move) else one.op for one in ones if one is not None)
        return next(found, None)

    def starts(self) -> Iterator[_Start]:
        """The elements that are cut from a shard, and reduced for nothing else than to have them
        everywhere."""
        for one, mesh in self.code:
            if one.rule is None or len(one.results) != 1 or not one.rule.owned:
                continue
            owners = owned(one.rule, one.assignment, len(one.operands), mesh)
            axes = frozenset(dict(owners))
            if owners and axes == {a for a, _ in one.results[0].layout.partial}:
                start = self._start(one.results[0], owners, axes)
                if start is not None and start.moves:
                    yield start

    def _start(self, first: Key, owners: Owners, axes: frozenset[str]) -> _Start | None:
        """The element; None where something reads it that adds to it while it is partial."""
        found, queue = _Start(owners, {}, []), [(first.value, first.layout)]
        while queue:
            value, layout = queue.pop()
            found.chain[value.id, without(layout, axes)] = (value.id, layout)
            for use in self.uses.get((value.id, layout), ()):
                one = use.instruction
                if isinstance(one, Move) and _only_reduces(one, axes):
                    found.moves.append(one)
                elif isinstance(one, Compute) and _only_carries(one, axes):
                    queue.append((one.results[0].value, one.results[0].layout))
                else:
                    return None
        return found


def _only_reduces(one: Move, axes: frozenset[str]) -> bool:
    steps = one.plan.steps
    return len(steps) == 1 and steps[0].kind == "all_reduce" and set(steps[0].axes) == axes


def _only_carries(one: Compute, axes: frozenset[str]) -> bool:
    """Whether an operation is linear in one partial operand, and the axes have no other work."""
    if one.rule is None or len(one.results) != 1 or axes != set(one.assignment.carried):
        return False
    partial = [key for key in one.operands if not axes.isdisjoint(key.layout.used)]
    return len(partial) == 1 and axes == {a for a, _ in one.results[0].layout.partial}


class _Late:
    """What is made of the elements that the same devices own, and what it costs to send that."""

    def __init__(self, graph: _Graph, owners: Owners, starts: Sequence[_Start]):
        self.graph, self.owners, self.axes = graph, owners, frozenset(dict(owners))
        self.chain = {whole: partial for start in starts for whole, partial in start.chain.items()}
        self.partial = set(self.chain.values())
        self.firsts = {next(iter(start.chain)) for start in starts}
        self.onward: dict[Name, list[Name] | None] = {}
        queue = deque(self.chain)
        while queue:
            name = queue.popleft()
            if name not in self.onward:
                more = self._onward(name) if len(self.onward) < WINDOW else None
                self.onward[name] = more
                queue += more or ()

    def edges(self) -> Iterator[Edge]:
        for name, more in self.onward.items():
            if name in self.firsts:
                yield _SOURCE, (name, "made"), math.inf
            yield (name, "made"), (name, "read"), self.cost(name)
            if more is None:
                yield (name, "read"), _SINK, math.inf
            for other in more or ():
                yield (name, "read"), (other, "made"), math.inf

    def cost(self, name: Name) -> float:
        """Of sending a value to all devices, as often as it is made."""
        value, mesh, trips = self.graph.values[name[0]]
        return trips * sending(value, name[1], self.owners, mesh).cost

    def _onward(self, name: Name) -> list[Name] | None:
        """What its owner makes of a value; None where a reader needs it everywhere."""
        uses = list(self.graph.uses.get(name, ()))
        if name in self.chain:
            partial = self.graph.uses.get(self.chain[name], ())
            uses += [use for use in partial if isinstance(use.instruction, Compute)]
        found: list[Name] = []
        for use in uses:
            more = self._made(use, name)
            if more is None or not all(sum_monoid(self.graph.values[i][0].dtype) for i, _ in more):
                return None
            found += more
        return found

    def _made(self, use: _Use, name: Name) -> list[Name] | None:
        """The same of one reader."""
        one = use.instruction
        if one is None:
            return _left(use)
        if isinstance(one, Move):
            busy = {a for step in one.plan.steps for a in step.axes} | one.dst.used
            return [(one.value.id, one.dst)] if self.axes.isdisjoint(busy) else None
        if one.op.control is not None:
            return _entered(one, use.place)
        if one.op.rule.elementary:
            return None
        keys = (*one.operands, *one.results)
        others = [key for key in keys if (key.value.id, key.layout) not in self.partial]
        if any(not self.axes.isdisjoint(a for a, _ in key.layout.partial) for key in others):
            return None  # a sum, or what another device has: it meets the value everywhere
        layouts = [without(key.layout, self.axes) for key in one.operands]
        layouts[use.place] = shared_with(layouts[use.place], self.owners)
        mesh = self.graph.values[name[0]][1]
        made = made_of(one.op.rule, _uncarried(one, self.axes), layouts, mesh)
        if not made:
            return None if made is None else []
        return [(v.id, without(layout, self.axes)) for v, layout, _ in one.results]


def _uncarried(one: Compute, axes: frozenset[str]) -> Assignment:
    carried = tuple(a for a in one.assignment.carried if a not in axes)
    return one.assignment._replace(carried=carried)


def _passable(one: Compute) -> bool:
    """Whether values that one device has may go through the regions of an equation: all devices
    run the same of them, equally often."""
    control = one.op.control
    assert control is not None
    if control.exclusive or control.manual(one.op.params) is not None:
        return False
    return control.counted or not control.carries(one.op)


def _entered(one: Compute, place: int) -> list[Name] | None:
    """What an operand of an equation is in its regions."""
    control = one.op.control
    if control is None or not _passable(one):
        return None
    carried = {(region, into) for region, _, into in control.carries(one.op)}
    ports = [port for port in one.op.in_ports if port.outer == place]
    if not ports or any((p.region, p.inner) in carried or any(p.lead) for p in ports):
        return None
    regions = [(one.regions[port.region], port.inner) for port in ports]
    return [(body.region.inputs[i].id, body.inputs[i]) for body, i in regions]


def _left(use: _Use) -> list[Name] | None:
    """What the output of a region is outside of it."""
    if use.within is None or not _passable(use.within[0]):
        return None
    one, region = use.within
    assert one.op.control is not None
    carried = {(r, out) for r, out, _ in one.op.control.carries(one.op)}
    ports = [p for p in one.op.out_ports if (p.region, p.inner) == (region, use.place)]
    if (region, use.place) in carried or any(any(port.lead) for port in ports):
        return None
    results = [one.results[port.outer] for port in ports]
    return [(key.value.id, key.layout) for key in results]


def _settled(late: _Late, starts: Sequence[_Start]) -> "_Change | None":
    """What stays with the owners, and what is sent to all; None where that saves nothing."""
    partial = source_side(late.edges(), _SOURCE, _SINK)
    held = {name for name in late.onward if (name, "made") in partial}
    sent = {name for name in held if (name, "read") not in partial}
    moves = [move for start in starts for move in start.moves]
    before = sum(move.plan.cost * late.graph.values[move.value.id][2] for move in moves)
    if sum(map(late.cost, sent)) >= before:
        return None
    return _Change(late, held, sent, frozenset(map(id, moves)))


class _Change:
    """Rewrites a plan: some values stay with their owners, and some of these are sent to all."""

    def __init__(self, late: _Late, held: set[Name], sent: set[Name], moves: frozenset[int]):
        self.graph, self.owners, self.axes = late.graph, late.owners, late.axes
        self.held, self.sent, self.dropped = held, sent, moves
        self.partial = {partial: whole for whole, partial in late.chain.items()}

    def region(self, body: RegionPlan) -> RegionPlan:
        pairs = zip(body.region.inputs, body.inputs, strict=True)
        inputs = [Key(value, layout) for value, layout in pairs]
        code: list[Move | Compute] = [move for key in inputs for move in self._sending(key, body)]
        for one in body.code:
            if id(one) not in self.dropped:
                code.append(self._changed(one))
                code += [move for key in one.writes for move in self._sending(key, body)]
        return replace(
            body, inputs=tuple(self._made(key).layout for key in inputs),
            outputs=tuple(map(self._read, body.outputs)), code=tuple(code),
        )  # fmt: skip

    def _name(self, key: Key) -> Name:
        name = (key.value.id, key.layout)
        return self.partial.get(name, name)

    def _made(self, key: Key) -> Key:
        """The key as it is made."""
        name = self._name(key)
        layout = shared_with(name[1], self.owners) if name in self.held else name[1]
        return Key(key.value, layout)

    def _read(self, key: Key) -> Key:
        """The key as it is read."""
        name = self._name(key)
        return Key(key.value, name[1]) if name in self.sent else self._made(key)

    def _sending(self, key: Key, body: RegionPlan) -> Iterator[Move]:
        name = self._name(key)
        if name in self.sent:
            steps = sending(key.value, name[1], self.owners, body.mesh)
            yield Move(key.value, self._made(key).layout, name[1], steps, self.graph.reader(name))

    def _changed(self, one: Move | Compute) -> Move | Compute:
        if isinstance(one, Move):
            src, dst = self._read(one.reads[0]).layout, self._made(one.writes[0]).layout
            if src == one.src:
                return one
            steps = tuple(
                step._replace(after=shared_with(step.after, self.owners)) for step in one.plan.steps
            )
            return replace(one, src=src, dst=dst, plan=Plan(steps, one.plan.cost))
        chained = any((key.value.id, key.layout) in self.partial for key in one.operands)
        return replace(
            one, assignment=_uncarried(one, self.axes) if chained else one.assignment,
            operands=tuple(map(self._read, one.operands)),
            results=tuple(map(self._made, one.results)),
            regions=tuple(map(self.region, one.regions)),
        )  # fmt: skip
