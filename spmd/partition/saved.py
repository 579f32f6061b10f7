"""`saved_gathers`: what the loops over layers gather in each pass is gathered once, while it fits.

Weights of layers that a loop runs over, fully sharded, are gathered slice by slice, forward and
again on the way back, so that no more than a layer is whole at a time. A stack that is gathered
before the first of those loops is sent once: half of the bytes, for memory that lasts from the
first loop to the last. Which of the two is right depends on how much memory there is, so that the
pass does nothing unless it is told (`memory_limit` of `spmd.jit`). It sees loops of the program
itself, not those inside of others, such as of microbatches; and leaves alone what an operation
needs whole, which is told where it is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from sharding.mesh import MeshShape
from sharding.program import Op, Value
from sharding.spec import Layout
from spmd.partition.diagnose import gather
from spmd.partition.plan import Compute, Key, Move, ProgramPlan, RegionPlan
from spmd.partition.reshard import plan as route

Assumed = Mapping[int, Layout]


class Gather(NamedTuple):
    """A value that loops gather, piece by piece.

    Attributes:
      value: the stack of all pieces.
      assumed: the layout of each piece that is gathered, by the id of its value in a region.
      saved: wire bytes per device that one gather before all loops saves.
      held: bytes that the whole stack takes on a device.
    """

    value: Value
    assumed: dict[int, Layout]
    saved: float
    held: int


def save_gathers(
    plan: ProgramPlan,
    again: Callable[[Assumed], ProgramPlan],
    peak: Callable[[ProgramPlan], int],
    limit: int,
) -> ProgramPlan:
    """The plan with as many stacks gathered once as fit, those that save most for their memory
    first.

    Args:
      again: plans the program with layouts assumed.
      peak: predicted bytes of a plan on a device.
      limit: the most that it may be.
    """
    found = sorted(gathers(plan), key=lambda each: (round(each.held / each.saved, 2), each.held))

    def planned(chosen: Sequence[Gather]) -> ProgramPlan | None:
        """With these; None where that does not fit."""
        other = again({value: x for each in chosen for value, x in each.assumed.items()})
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
    """Values whose pieces loops gather for more bytes than the whole takes once."""
    found: dict[int, list[_Piece]] = {}
    values: dict[int, Key] = {}
    for instruction in plan.body.code:
        if isinstance(instruction, Compute):
            for place, piece in _taken(instruction):
                key = instruction.operands[place]
                values.setdefault(key.value.id, key)
                found.setdefault(key.value.id, []).append(piece)
    for number, pieces in found.items():
        each = _gather(values[number], pieces, plan.mesh)
        if each is not None:
            yield each


class _Piece(NamedTuple):
    """What a loop of the program sees of a value: in its region, and wherever that passes it on."""

    names: list[Value]
    moves: list[tuple[Move, int]]  # with how often they run


def _taken(instruction: Compute) -> Iterator[tuple[int, _Piece]]:
    """By operand, the slices that a loop takes of it."""
    op = instruction.op
    if op.control is None or not op.control.counted or len(instruction.regions) != 1:
        return
    for port in op.in_ports:
        if port.stacked:
            piece = _Piece([], [])
            inner = op.regions[port.region].inputs[port.inner]
            _follow(inner, instruction.regions[port.region], op.control.trips(op), piece)
            yield port.outer, piece


def _follow(value: Value, region: RegionPlan, runs: int, piece: _Piece) -> None:
    """Collects where a region moves a value, and the regions that it passes the same value to."""
    piece.names.append(value)
    for instruction in region.code:
        if isinstance(instruction, Move):
            if instruction.value is value and instruction.plan.bytes:
                piece.moves.append((instruction, runs))
            continue
        op = instruction.op
        if op.control is None or not instruction.regions:
            continue
        for inner, into in _passed(op, value):
            more = op.control.trips(op) if op.control.counted else 1
            _follow(inner, instruction.regions[into], runs * more, piece)


def _passed(op: Op, value: Value) -> Iterator[tuple[Value, int]]:
    """(input, region) of what regions see of a value as it is."""
    assert op.control is not None
    carried = {(region, into) for region, _, into in op.control.carries(op)}
    for port in op.in_ports:
        same = not (port.stacked or any(port.lead) or (port.region, port.inner) in carried)
        if same and op.inputs[port.outer] is value:
            yield op.regions[port.region].inputs[port.inner], port.region


def _gather(key: Key, pieces: list[_Piece], mesh: MeshShape) -> Gather | None:
    """The gather of a whole value in place of those of its pieces, where that is one and sends
    less."""
    moves = [each for piece in pieces for each in piece.moves]
    wanted = {move.dst for move, _ in moves}
    if len(wanted) != 1:
        return None
    (layout,) = wanted
    kinds = {step.kind for move, _ in moves for step in move.plan.steps}
    told = (gather(m.reason, m.value, m.plan, mesh) for m, _ in moves if m.reason is not None)
    if kinds != {"all_gather"} or layout.partial or any(told):
        return None
    value, whole = key.value, Layout(((), *layout.dims))
    once = route(key.layout, whole, value.shape, value.itemsize, mesh).bytes
    saved = sum(runs * move.plan.bytes for move, runs in moves) - once
    if saved <= 0:
        return None
    assumed = {name.id: layout for piece in pieces for name in piece.names}
    return Gather(value, assumed, saved, Key(value, whole).local_bytes(mesh))
