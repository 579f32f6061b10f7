"""`saved_gathers`: what loops gather again and again is gathered once, while it fits.

Weights of layers that a loop runs over, fully sharded, are gathered slice by slice, forward and
again on the way back, so that no more than a layer is whole at a time; a loop over microbatches
around that does so for each of them. A stack that is gathered before the first of those loops is
sent once: at most half of the bytes, for memory that lasts from the first loop to the last. Which
of the two is right depends on how much memory there is, so that the pass does nothing unless it is
told (`memory_limit` of `spmd.jit`). It leaves alone what an operation needs whole, which is told
where it is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from sharding.mesh import MeshShape
from sharding.program import Value
from sharding.spec import Layout
from spmd.partition.diagnose import gather
from spmd.partition.plan import Compute, Key, Move, ProgramPlan, RegionPlan
from spmd.partition.reshard import plan as route

Assumed = Mapping[int, Layout]


class Gather(NamedTuple):
    """A value that loops gather, whole or piece by piece.

    Attributes:
      value: that loops run over, or read in each step.
      assumed: the layout of each piece that is gathered, by the id of its value in a region.
      saved: wire bytes per device that one gather before all loops saves.
      held: bytes that the whole value takes on a device.
    """

    value: Value
    assumed: dict[int, Layout]
    saved: float
    held: int


def save_gathers(
    plan: ProgramPlan,
    anew: Callable[[Assumed], ProgramPlan],
    peak: Callable[[ProgramPlan], int],
    limit: int,
) -> ProgramPlan:
    """The plan with as many stacks gathered once as fit, those that save most for their memory
    first.

    Args:
      anew: plans the program with layouts assumed.
      peak: predicted bytes of a plan on a device.
      limit: the most that it may be.
    """
    found = sorted(gathers(plan), key=lambda each: (round(each.held / each.saved, 2), each.held))

    def planned(chosen: Sequence[Gather]) -> ProgramPlan | None:
        """With these; None where that does not fit."""
        other = anew({value: x for each in chosen for value, x in each.assumed.items()})
        return other if peak(other) <= limit else None

    best, low, high = plan, 0, len(found)
    while low < high:  # the longest prefix that fits
        count = (low + high + 1) // 2
        other = planned(found[:count])
        low, high = (low, count - 1) if other is None else (count, high)
        best = other if other is not None and sent(other) < sent(best) else best
    chosen = found[:low]
    for each in found[low + 1 :]:  # what is smaller than the first that does not
        if each.held < limit - peak(best) and (other := planned([*chosen, each])) is not None:
            chosen, best = [*chosen, each], min(best, other, key=sent)
    return best


def sent(plan: ProgramPlan) -> float:
    """Wire bytes per device of all that moves, loops as often as they run."""
    return sum(n * i.plan.bytes for i, n in plan.body.walk() if isinstance(i, Move))


def gathers(plan: ProgramPlan) -> Iterator[Gather]:
    """Values that loops gather, whole or by slices, for more bytes than the whole takes once."""
    index = _Index({})
    here, loops = index.of(plan.body)
    pieces: dict[int, list[_Piece]] = {}
    for loop in loops:
        for value in {key.value.id: key.value for key in loop.operands}.values():
            moves = [(move, 1) for move in here.get(value.id, ())]
            known = pieces.setdefault(value.id, [_Piece(value, 0, moves)])
            known.extend(_inside(loop, value, 1, 0, index))
    made = _made(plan)
    for number, found in pieces.items():
        each = _gather(made[number], found, plan.mesh) if number in made else None
        if each is not None:
            yield each


class _Index(NamedTuple):
    """Of every region, what moves in it by the id of the value, and which equations have regions;
    each is walked once."""

    known: dict[int, tuple[dict[int, list[Move]], list[Compute]]]

    def of(self, region: RegionPlan) -> tuple[dict[int, list[Move]], list[Compute]]:
        found = self.known.get(id(region))
        if found is None:
            moves: dict[int, list[Move]] = {}
            for i in region.code:
                if isinstance(i, Move) and i.plan.bytes:
                    moves.setdefault(i.value.id, []).append(i)
            loops = [i for i in region.code if isinstance(i, Compute) and i.regions]
            found = self.known[id(region)] = (moves, loops)
        return found


def _made(plan: ProgramPlan) -> dict[int, Key]:
    """Values of the program in the layout that they are made in, by id."""
    body = plan.body
    pairs = zip(body.region.inputs, body.inputs, strict=True)
    found = {value.id: Key(value, layout) for value, layout in pairs}
    for instruction in body.code:
        if isinstance(instruction, Compute):
            for key in instruction.results:
                found.setdefault(key.value.id, key)
    return found


class _Piece(NamedTuple):
    """What a region sees of a value: it, or a slice of it along its leading dims.

    Attributes:
      name: what it is called there.
      cut: how many of its leading dims loops run over.
      moves: of it there, with how often they run.
    """

    name: Value
    cut: int
    moves: list[tuple[Move, int]]


def _inside(
    instruction: Compute, value: Value, runs: int, cut: int, index: _Index
) -> Iterator[_Piece]:
    """What the regions of an equation see of an operand that they do not change, and what regions
    inside of them do.

    Args:
      runs: how often the equation does.
      cut: dims that loops around it have run over already.
    """
    op = instruction.op
    if op.control is None:
        return
    into = {(region, into) for region, _, into in op.control.carries(op)}
    carried = {port.outer for port in op.in_ports if (port.region, port.inner) in into}
    runs *= op.control.trips(op)
    for port in op.in_ports:
        if op.inputs[port.outer] is not value or any(port.lead) or port.outer in carried:
            continue
        name = op.regions[port.region].inputs[port.inner]
        moves, loops = index.of(instruction.regions[port.region])
        less = cut + port.stacked
        yield _Piece(name, less, [(move, runs) for move in moves.get(name.id, ())])
        for each in loops:
            yield from _inside(each, name, runs, less, index)


def _gather(key: Key, pieces: list[_Piece], mesh: MeshShape) -> Gather | None:
    """The gather of a whole value in place of those of its pieces, where that is one and sends
    less."""
    moves = [each for piece in pieces for each in piece.moves]
    wanted = {_whole(move.dst, piece) for piece in pieces for move, _ in piece.moves}
    if len(wanted) != 1:
        return None
    (whole,) = wanted
    kinds = {step.kind for move, _ in moves for step in move.plan.steps}
    told = (gather(m.reason, m.value, m.plan, mesh) for m, _ in moves if m.reason is not None)
    if kinds != {"all_gather"} or whole.partial or any(told):
        return None
    value = key.value
    once = route(key.layout, whole, value.shape, value.itemsize, mesh).bytes
    saved = sum(runs * move.plan.bytes for move, runs in moves) - once
    if saved <= 0:
        return None
    inside = [piece for piece in pieces if piece.name is not value]
    assumed = {piece.name.id: Layout(whole.dims[piece.cut :]) for piece in inside}
    return Gather(value, assumed, saved, Key(value, whole).local_bytes(mesh))


def _whole(layout: Layout, piece: _Piece) -> Layout:
    """Of the value, where its piece has this layout."""
    return Layout(((),) * piece.cut + layout.dims, layout.partial)
