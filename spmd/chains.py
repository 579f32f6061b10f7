"""Chains of collectives in a region, and what can run in parts beside them: see `streams`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sharding.mesh import MeshShape, axes_size
from spmd.chips import Chip
from spmd.estimate.matrix import arithmetic
from spmd.estimate.work import contracts, flops, wires
from spmd.partition.parts import part_of, parts_of, with_parts
from spmd.partition.plan import PART, Compute, Key, Move, Parts, RegionPlan

COUNT = 2
# Seconds that a part of a collective takes at least for it to be worth starting, and that a stream
# has to save.
_LEAST = 2e-5
# How often the instructions of a region are looked at, at most: streams along further dims and of
# further layers are not searched for then.
_LOOKS = 3


@dataclass
class Setting:
    """What all regions of a program have in common.

    Attributes:
      whole: the mesh of the program.
      stacks: whether loops may stack in parts.
      together: what runs in parts together, of each region by its id, once that is found.
      known: of `wires`.
    """

    chip: Chip
    whole: MeshShape
    stacks: bool
    together: dict[int, list[dict[int, Parts]]]
    known: dict[Any, Any] = field(default_factory=dict)


class Stream(NamedTuple):
    """Instructions of a region that can run in parts.

    Attributes:
      parts: of each instruction, by its place.
      wire: seconds of their collectives that the compiler runs beside computation.
      products: seconds of their products.
      spent: seconds to write and read again what others read whole, or have made whole, what is
        added up, and the weights of products that wait for memory.
      links: how many of those collectives there are, one after the other; the last of a step of a
        loop has the first of the next after it.
    """

    parts: Mapping[int, Parts]
    wire: float
    products: float
    spent: float
    links: int

    @property
    def gain(self) -> float:
        """Seconds that it saves: at best, all of one part's collectives are hidden. Not those of a
        product alone, which takes longer in halves than by as much as is hidden."""
        return min(self.wire, self.products) / COUNT - self.spent if self.links > 1 else 0.0


class Chain(NamedTuple):
    """Values that come of products, and those that products are made of. What comes of none can be
    early, as weights are gathered, and what leads to none late, as their gradients are summed.

    Attributes:
      ties: what the step of a loop leaves to the next one, by the input that it becomes.
    """

    made: frozenset[Key] = frozenset()
    asked: frozenset[Key] = frozenset()
    ties: Mapping[Key, Key] = {}

    def inside(self, one: Compute, body: RegionPlan) -> Chain:
        """Of the inputs and outputs of an instruction's region."""
        inputs, outputs, control = inputs_of(body), body.outputs, one.op.control
        assert control is not None
        comes = {one.operands[p.outer]: inputs[p.inner] for p in one.op.in_ports}
        goes = {one.results[p.outer]: outputs[p.inner] for p in one.op.out_ports}
        ties = {inputs[inner]: outputs[out] for _, out, inner in control.carries(one.op)}
        if not control.counted:  # a call: of the loop that it is in
            found = ((comes.get(key), goes.get(out)) for key, out in self.ties.items())
            ties |= {key: out for key, out in found if key is not None and out is not None}
        return Chain(
            frozenset(key for outer, key in comes.items() if outer in self.made),
            frozenset(key for outer, key in goes.items() if outer in self.asked),
            ties,
        )


def inputs_of(body: RegionPlan) -> list[Key]:
    return [Key(value, lies) for value, lies in zip(body.region.inputs, body.inputs, strict=True)]


class Search:
    """Streams of one region.

    Attributes:
      around: places of the instructions that make or read a value.
      waits: seconds of moves whose collectives the compiler runs beside computation, by place.
      ties: see `Chain`.
      free: outputs that stay in parts at no cost.
    """

    def __init__(
        self, body: RegionPlan, setting: Setting, chain: Chain | None = None
    ):
        self.body, self.setting, self.chip = body, setting, setting.chip
        self.around: dict[Key, dict[int, None]] = {}
        for i, one in enumerate(body.code):
            for key in (*one.reads, *one.writes):
                self.around.setdefault(key, {})[i] = None
        self.leaving, self.saved = {*body.outputs}, 0.0
        outer = chain or Chain()
        self.ties, self.free = outer.ties, set()
        if chain is not None and setting.stacks:
            self.free = self.leaving - {*self.ties.values()}
        self.chain, links = self._linked(outer)
        found = ((i, self._wire(one)) for i, one in enumerate(body.code) if i in links)
        # In a `jax.shard_map` collectives are the user's.
        least = _LEAST * COUNT if not body.mesh.manual else float("inf")
        self.waits = {i: seconds for i, seconds in found if seconds > least}

    def _linked(self, chain: Chain) -> tuple[Chain, set[int]]:
        """Values, and places of instructions, between products: of this region, of those around it
        and of other steps of a loop."""
        made, asked = {*self.ties, *chain.made}, {*self.ties.values(), *chain.asked}
        after, before = set(), set()
        for i, one in enumerate(self.body.code):
            if _multiplies(one) or not made.isdisjoint(one.reads):
                made.update(one.writes)
                after.add(i)
        for i, one in reversed([*enumerate(self.body.code)]):
            if _multiplies(one) or not asked.isdisjoint(one.writes):
                asked.update(one.reads)
                before.add(i)
        return Chain(frozenset(made), frozenset(asked), self.ties), after & before

    def run(self) -> Iterator[tuple[int, Parts]]:
        """Places of instructions, and their parts; the stream that saves most first."""
        taken: set[int] = set()
        streams = sorted(self._streams(), key=lambda stream: -stream.gain)
        for stream in streams:
            if stream.gain > _LEAST and taken.isdisjoint(stream.parts):
                taken.update(stream.parts)
                self.saved += stream.gain
                yield from stream.parts.items()

    def _streams(self) -> Iterator[Stream]:
        """One for each set of instructions that would run in parts together."""
        together = self.setting.together
        if id(self.body) not in together:
            together[id(self.body)] = [*self._together()]
        yield from map(self._judged, together[id(self.body)])

    def _together(self) -> Iterator[dict[int, Parts]]:
        """Along leading dims first: of activations they are the batch."""
        known: set[tuple[int, int | None]] = set()
        looks, code = 0, self.body.code
        for dim in range(max((code[i].writes[0].value.rank for i in self.waits), default=0)):
            for place in self.waits:
                (key,) = code[place].writes
                if (place, dim) in known or dim >= key.value.rank or looks > _LOOKS * len(code):
                    continue
                found = self._closure(key, dim)
                looks += len(found) + len(code) // 16
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
                dims.update(tensors)
        return found

    def _parts(self, one: Move | Compute, key: Key, dim: int) -> Parts | None:
        """As `parts_of`, but for equations that exchange something among the parts."""
        parts = parts_of(one, key, dim, COUNT, self.body.mesh)
        if parts is None or isinstance(one, Move) or one.op.rule.local is None:
            return parts
        fine = with_parts(self.body.mesh, COUNT)
        sent = wires(part_of(one, parts), fine, self.setting.known)
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

    def _judged(self, found: Mapping[int, Parts]) -> Stream:
        code, dims = self.body.code, self._dims(found)
        wire = sum(seconds for i, seconds in self.waits.items()
                   if i in found and not self._single(code[i], found[i]))  # fmt: skip
        products = sum(self._seconds(code[i]) for i in found)
        made = {key for i in found for key in code[i].writes}
        tied = {out for key, out in self.ties.items() if dims.get(key) == dims.get(out)}
        spent = sum(self._longer(code[i], parts) for i, parts in found.items())
        for key in made:
            whole = key not in dims or any(i not in found for i in self.around[key])
            leaves = key in self.leaving and key not in tied and key not in self.free
            spent += self.twice(key) if whole or leaves else 0.0
        for key, out in self.ties.items():
            if out in tied and any(i not in found for i in self.around.get(key, ())):
                spent += self.twice(key)
        links = sum(i in self.waits for i in found) + bool(tied & made)
        return Stream(found, wire, products, spent, links)

    def _single(self, one: Move | Compute, parts: Parts) -> bool:
        """Whether the parts of a sum are single examples, and it is a scatter and a gather, see
        `scattered`: XLA makes all-reduces of such scatters."""
        assert isinstance(one, Move)
        sums = any(step.kind == "all_reduce" for step in one.plan.steps)
        if not sums or not self.chip.gathers_alone:
            return False
        (dim,) = parts.results
        assert dim is not None
        shards = axes_size(self.body.mesh, one.dst.dims[dim])
        return one.value.shape[dim] // shards <= parts.count

    def twice(self, key: Key) -> float:
        """Seconds to write a value and to read it again."""
        return 2 * key.local_bytes(self.body.mesh) / self.chip.hbm_bandwidth

    def _wire(self, one: Move | Compute) -> float:
        """Seconds of a move's collectives; 0 where the device waits for them anyway."""
        if not isinstance(one, Move):
            return 0.0
        size = 0.0
        for step in one.plan.steps:
            if step.kind in self.chip.overlaps:
                size += step.bytes
            elif step.kind == "all_reduce" and self.chip.gathers_alone:
                size += step.bytes / 2  # see `scattered`
            elif step.bytes:
                return 0.0
        return self.chip.ring_seconds(size)

    def _seconds(self, one: Move | Compute, parts: Parts | None = None) -> float:
        """Of a product, of arithmetic or memory; of one part of it, if it is given."""
        if not contracts(one):
            return 0.0
        count = 1 if parts is None else parts.count
        keys = (*one.reads, *one.writes)
        dims = (0,) * len(keys) if parts is None else (*parts.operands, *parts.results)
        sizes = zip(keys, dims, strict=True)
        size = sum(k.local_bytes(self.body.mesh) / (1 if d is None else count) for k, d in sizes)
        mesh = self.body.mesh
        work = arithmetic(one, flops(one, mesh, self.setting.whole).total, mesh, self.chip)
        return max(work / count, size / self.chip.hbm_bandwidth)

    def _longer(self, one: Move | Compute, parts: Parts) -> float:
        """Seconds that all parts of a product take more than the whole: each reads the weights."""
        return parts.count * self._seconds(one, parts) - self._seconds(one)


def _multiplies(one: Move | Compute) -> bool:
    """Whether there are products in it, maybe in its regions."""
    return contracts(one) or (isinstance(one, Compute) and bool(one.regions))


def _whole(one: Move | Compute, parts: Parts) -> set[Key]:
    """What every part of an instruction reads all of."""
    return {key for key, dim in zip(one.reads, parts.operands, strict=True) if dim is None}


def _tensors(one: Move | Compute, parts: Parts) -> Iterator[tuple[Key, int]]:
    for keys, dims in ((one.reads, parts.operands), (one.writes, parts.results)):
        for key, dim in zip(keys, dims, strict=True):
            if dim is not None:
                yield key, dim
