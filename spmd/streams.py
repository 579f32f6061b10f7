"""`streams`: what leads from collective to collective runs in two parts, one beside the other.

In a layer whose weights are sharded over `tensor`, everything waits for one sum after the other:
the way forward is a chain. Where examples or positions do not meet between those sums, half of them
can be computed while the sum of the other half is on its way:

    a device   attention of A | attention of B | feed-forward of A | feed-forward of B
    its links                 | sum of A       | sum of B          | sum of A ...

Nothing is sent twice, and no product is another one. Parts of a batch that overlap so are known
from Domino (arXiv 2409.15241) and, by hand, from serving; Wang et al. (ASPLOS 2023) decompose
products into rings of permutes instead.

Which dim can be divided so follows from the rules: one that a collective leaves as it is, followed
through every equation that computes its elements each on its own. Others (attention along a
sequence, a loss, gradients of weights) are computed whole, from both parts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from spmd.chips import Chip
from spmd.estimate.work import flops, rate, wires
from spmd.partition.linear import multiplies
from spmd.partition.parts import part_of, parts_of, with_parts
from spmd.partition.plan import PART, Compute, Key, Move, Parts, ProgramPlan, RegionPlan
from spmd.partition.scatters import scattered

COUNT = 2
# Seconds that a collective takes at least for parts of it to be worth starting.
_LEAST = 2e-5


class _Stream(NamedTuple):
    """Instructions of a region that can run in parts.

    Attributes:
      parts: of each instruction, by its place.
      wire: seconds of their collectives that the compiler runs beside computation.
      products: seconds of their products.
      joined: seconds to write and read again what others read whole, or have made whole.
      links: how many of those collectives there are, one after the other; the last of a step of a
        loop has the first of the next after it.
    """

    parts: Mapping[int, Parts]
    wire: float
    products: float
    joined: float
    links: int

    @property
    def gain(self) -> float:
        """Seconds that it saves: at best, all of one part's collectives are hidden. Not those of a
        product alone, which takes longer in halves than by as much as is hidden."""
        return min(self.wire, self.products) / COUNT - self.joined if self.links > 1 else 0.0


def in_streams(plan: ProgramPlan, chip: Chip) -> ProgramPlan:
    """The plan with instructions in parts where that hides collectives.

    What a loop stacks in parts costs nothing where another loop takes it so. Whether one does shows
    when that is decided; so all is decided both ways, and what saves more is kept.
    """
    together: dict[int, Any] = {}
    tries = [_Streams(plan, chip, stacks, together) for stacks in (True, False)]
    made = [(each.region(plan.body, {}, 1)[0], each.gain) for each in tries]
    body, gain = max(made, key=lambda pair: pair[1])
    return replace(plan, body=body) if gain > 0 else plan


def streams(plan: ProgramPlan) -> bool:
    """Whether anything of a plan runs in parts."""
    return any(one.parts is not None for one, _ in plan.body.walk())


class _Chain(NamedTuple):
    """Values that come of products, and those that products are made of. What comes of none can be
    early, as weights are gathered, and what leads to none late, as their gradients are summed.

    Attributes:
      ties: what the step of a loop leaves to the next one, by the input that it becomes.
    """

    made: frozenset[Key] = frozenset()
    asked: frozenset[Key] = frozenset()
    ties: Mapping[Key, Key] = {}

    def inside(self, one: Compute, body: RegionPlan) -> _Chain:
        """Of the inputs and outputs of an instruction's region."""
        inputs, outputs, control = _inputs(body), body.outputs, one.op.control
        assert control is not None
        comes = {one.operands[p.outer]: inputs[p.inner] for p in one.op.in_ports}
        goes = {one.results[p.outer]: outputs[p.inner] for p in one.op.out_ports}
        ties = {inputs[inner]: outputs[out] for _, out, inner in control.carries(one.op)}
        if not control.counted:  # a call: of the loop that it is in
            found = ((comes.get(key), goes.get(out)) for key, out in self.ties.items())
            ties |= {key: out for key, out in found if key is not None and out is not None}
        return _Chain(
            frozenset(key for outer, key in comes.items() if outer in self.made),
            frozenset(key for outer, key in goes.items() if outer in self.asked),
            ties,
        )


def _inputs(body: RegionPlan) -> list[Key]:
    return [Key(value, lies) for value, lies in zip(body.region.inputs, body.inputs, strict=True)]


class _Streams:
    """Decides for the regions of a program, in order.

    Attributes:
      stacks: whether loops may stack in parts.
      together: what runs in parts together, of each region by its id, once that is found.
      gain: seconds saved so far.
      known: of `wires`.
    """

    def __init__(self, plan: ProgramPlan, chip: Chip, stacks: bool, together: dict[int, Any]):
        self.whole, self.chip, self.stacks, self.together = plan.mesh, chip, stacks, together
        self.gain = 0.0
        self.known: dict[Any, Any] = {}

    def region(
        self, body: RegionPlan, given: Mapping[Key, int], trips: int,
        around: Compute | None = None, chain: _Chain | None = None,
    ) -> tuple[RegionPlan, Mapping[Key, int]]:
        """A region with instructions in parts, and the dims along which values in it lie in parts.

        Args:
          given: those of its inputs.
          trips: how often it runs.
          around: the loop or call that it belongs to.
          chain: of its inputs and outputs.
        """
        search = _Search(body, given, self, around, chain or _Chain())
        parts = dict(search.run())
        self.gain += trips * search.saved
        lie, passed, code = dict(given), {*given}, []
        for i, one in enumerate(body.code):
            if i in parts:
                one = replace(one, parts=parts[i])
                if isinstance(one, Move) and search.gathers_alone:
                    one = scattered(one, body.mesh)
            elif isinstance(one, Compute) and one.regions:
                one = self.control(one, lie, trips, search.chain)
            if one.parts is not None:
                dims = zip(one.writes, one.parts.results, strict=True)
                lie |= {key: dim for key, dim in dims if dim is not None}
                passed |= {*one.writes} if i not in parts else set()
            code.append(one)
        whole = {k for one in code if one.parts is None for k in one.reads if k in passed & {*lie}}
        self.gain -= trips * sum(map(search.twice, whole))
        return replace(body, code=tuple(code)), lie

    def control(
        self, one: Compute, lie: Mapping[Key, int], trips: int, chain: _Chain
    ) -> Compute:
        """A loop, call or branch with its regions in parts."""
        control = one.op.control
        assert control is not None
        inner = trips * control.trips(one.op)
        if not control.trees:
            return replace(one, regions=tuple(self.region(r, {}, inner)[0] for r in one.regions))
        (before,), saved = one.regions, self.gain
        inside = chain.inside(one, before)
        dims = [
            None if key not in lie or (p.stacked and not lie[key]) else lie[key]
            for p in one.op.in_ports for key in (one.operands[p.outer],)
        ]  # fmt: skip
        body, made = self.region(before, self._given(one, before, dims), inner, one, inside)
        carries = {i: made.get(body.outputs[out]) for _, out, i in control.carries(one.op)}
        if any(dims[i] != dim for i, dim in carries.items()):
            dims, self.gain = [carries.get(i, dim) for i, dim in enumerate(dims)], saved
            body, made = self.region(before, self._given(one, before, dims), inner, one, inside)
        results = []
        for port in one.op.out_ports:
            dim = made.get(body.outputs[port.inner])
            results.append(dim + 1 if port.stacked and dim is not None else dim)
        for _, out, i in control.carries(one.op):
            results[out] = dims[i]
        if not any(dim is not None for dim in (*dims, *results)):
            return replace(one, regions=(body,))
        return replace(one, regions=(body,), parts=Parts(COUNT, tuple(dims), tuple(results)))

    def _given(
        self, one: Compute, body: RegionPlan, dims: Sequence[int | None]
    ) -> Mapping[Key, int]:
        """Inputs of a region that come in parts, of the dims of operands."""
        inputs, given = _inputs(body), {}
        for port in one.op.in_ports:
            dim = dims[port.outer]
            if dim is not None:
                given[inputs[port.inner]] = dim - 1 if port.stacked else dim
        return given


class _Search:
    """Streams of one region.

    Attributes:
      around: places of the instructions that make or read a value.
      waits: seconds of moves whose collectives the compiler runs beside computation, by place.
      ties: see `_Chain`.
      free: outputs that stay in parts at no cost.
    """

    def __init__(
        self, body: RegionPlan, given: Mapping[Key, int], streams: _Streams,
        around: Compute | None, chain: _Chain,
    ):  # fmt: skip
        self.body, self.given, self.streams, self.chip = body, given, streams, streams.chip
        self.around: dict[Key, dict[int, None]] = {}
        for i, one in enumerate(body.code):
            for key in (*one.reads, *one.writes):
                self.around.setdefault(key, {})[i] = None
        self.leaving, self.saved = {*body.outputs}, 0.0
        self.ties, self.free = chain.ties, set()
        if around is not None and around.op.control is not None:
            if streams.stacks:
                self.free = self.leaving - {*self.ties.values()}
        self.chain, links = self._linked(chain)
        found = ((i, self._wire(one)) for i, one in enumerate(body.code) if i in links)
        # In a `jax.shard_map` collectives are the user's.
        least = _LEAST * COUNT if not body.mesh.manual else float("inf")
        self.waits = {i: seconds for i, seconds in found if seconds > least}

    def _linked(self, chain: _Chain) -> tuple[_Chain, set[int]]:
        """Values, and places of instructions, between products: of this region, of those around it
        and of other steps of a loop."""
        made, asked = {*self.ties, *chain.made}, {*self.ties.values(), *chain.asked}
        after, before = set(), set()
        for i, one in enumerate(self.body.code):
            if self._multiplies(one) or not made.isdisjoint(one.reads):
                made.update(one.writes)
                after.add(i)
        for i, one in reversed([*enumerate(self.body.code)]):
            if self._multiplies(one) or not asked.isdisjoint(one.writes):
                asked.update(one.reads)
                before.add(i)
        return _Chain(frozenset(made), frozenset(asked), self.ties), after & before

    def run(self) -> Iterator[tuple[int, Parts]]:
        """Places of instructions, and their parts; the stream that saves most first."""
        taken: set[int] = set()
        streams = sorted(self._streams(), key=lambda stream: -stream.gain)
        for stream in streams:
            if stream.gain > _LEAST and taken.isdisjoint(stream.parts):
                taken.update(stream.parts)
                self.saved += stream.gain
                yield from stream.parts.items()

    def _streams(self) -> Iterator[_Stream]:
        """One for each set of instructions that would run in parts together."""
        together = self.streams.together
        if id(self.body) not in together:
            together[id(self.body)] = [*self._together()]
        yield from map(self._judged, together[id(self.body)])

    def _together(self) -> Iterator[dict[int, Parts]]:
        known: set[tuple[int, int | None]] = set()
        for place in self.waits:
            (key,) = self.body.code[place].writes
            for dim in range(key.value.rank):
                if (place, dim) not in known:
                    found = self._closure(key, dim)
                    known |= {(i, parts.results[0]) for i, parts in found.items()}
                    yield self._independent(found)

    def _closure(self, start: Key, dim: int) -> dict[int, Parts]:
        """All that can run in parts with those of a value along a dim."""
        dims, found = {start: dim}, {}
        queue, refused = deque((start,)), set()
        while queue:
            key = queue.popleft()
            for place in self.around[key]:
                if place in found or place in refused:
                    continue
                one = self.body.code[place]
                parts = self._parts(one, key, dims[key])
                tensors = [*_tensors(one, parts)] if parts else []
                if not parts or any(dims.get(k, d) != d for k, d in tensors):
                    refused.add(place)
                    continue
                found[place] = parts
                queue.extend(k for k, _ in tensors if k not in dims)
                dims.update((k, d) for k, d in tensors if d is not None)
        return found

    def _parts(self, one: Move | Compute, key: Key, dim: int) -> Parts | None:
        """As `parts_of`, but for equations that exchange something among the parts."""
        parts = parts_of(one, key, dim, COUNT, self.body.mesh)
        if parts is None or isinstance(one, Move):
            return parts
        fine = with_parts(self.body.mesh, COUNT)
        sent = wires(part_of(one, parts), fine, self.streams.known)
        return None if any(PART in wire.axes for wire in sent) else parts

    def _independent(self, found: Mapping[int, Parts]) -> dict[int, Parts]:
        """Without what needs all parts of something before: a sum of parts, or what was made of
        them whole. One part could not run beside the other's collectives any more."""
        dims = self._dims(found)
        kept: dict[int, Parts] = {}
        apart = {key for key, out in self.ties.items() if dims.get(key) == dims.get(out)}
        whole: set[Key] = set()  # of all parts
        for i, one in enumerate(self.body.code):
            parts = found.get(i)
            both = {*one.reads} if parts is None else _whole(one, parts)
            if parts is not None and whole.isdisjoint(one.reads) and apart.isdisjoint(both):
                kept[i] = parts
                sums = None in parts.results
                (whole if sums else apart).update(one.writes)
            elif not (whole.isdisjoint(one.reads) and apart.isdisjoint(one.reads)):
                whole.update(one.writes)
        return kept

    def _dims(self, found: Mapping[int, Parts]) -> dict[Key, int]:
        code = self.body.code
        return {key: dim for i, parts in found.items() for key, dim in _tensors(code[i], parts)}

    def _judged(self, found: Mapping[int, Parts]) -> _Stream:
        code, dims = self.body.code, self._dims(found)
        wire = sum(self.waits.get(i, 0.0) for i in found)
        products = sum(self._seconds(code[i]) for i in found)
        made = {key for i in found for key in code[i].writes}
        tied = {out for key, out in self.ties.items() if dims.get(key) == dims.get(out)}
        joined = 0.0
        for key in dims.keys() & made:
            whole = any(i not in found for i in self.around[key])
            leaves = key in self.leaving and key not in tied and key not in self.free
            joined += self.twice(key) if whole or leaves else 0.0
        for key, out in self.ties.items():
            if out in tied and any(i not in found for i in self.around.get(key, ())):
                joined += self.twice(key)
        links = sum(i in self.waits for i in found) + bool(tied & made)
        return _Stream(found, wire, products, joined, links)

    def twice(self, key: Key) -> float:
        """Seconds to write a value and to read it again."""
        return 2 * key.local_bytes(self.body.mesh) / self.chip.hbm_bandwidth

    def _wire(self, one: Move | Compute) -> float:
        """Seconds of a move's collectives, of a ring in both directions; 0 where the device waits
        for them anyway."""
        if not isinstance(one, Move):
            return 0.0
        size = 0.0
        for step in one.plan.steps:
            if step.kind in self.chip.overlaps:
                size += step.bytes
            elif step.kind == "all_reduce" and self.gathers_alone:
                size += step.bytes / 2  # see `scattered`
            elif step.bytes:
                return 0.0
        return size / (2 * self.chip.link_bandwidth)

    @property
    def gathers_alone(self) -> bool:
        """Whether gathers run beside computation, and all-reduces do not."""
        return "all_gather" in self.chip.overlaps and "all_reduce" not in self.chip.overlaps

    @staticmethod
    def _multiplies(one: Move | Compute) -> bool:
        return isinstance(one, Compute) and (
            bool(one.regions) or (multiplies(one.op) and len(one.operands) > 1)
        )

    def _seconds(self, one: Move | Compute) -> float:
        if not isinstance(one, Compute) or one.regions or not self._multiplies(one):
            return 0.0
        work = flops(one, self.body.mesh, self.streams.whole).total / rate(one, self.chip)
        size = sum(key.local_bytes(self.body.mesh) for key in (*one.reads, *one.writes))
        return max(work, size / self.chip.hbm_bandwidth)


def _whole(one: Move | Compute, parts: Parts) -> set[Key]:
    """What every part of an instruction reads all of."""
    return {key for key, dim in zip(one.reads, parts.operands, strict=True) if dim is None}


def _tensors(one: Move | Compute, parts: Parts) -> Iterator[tuple[Key, int]]:
    for keys, dims in ((one.reads, parts.operands), (one.writes, parts.results)):
        for key, dim in zip(keys, dims, strict=True):
            if dim is not None:
                yield key, dim
