"""Pass `moved_axes`: a mesh axis shards another dim for a stretch of the program.

Attention with its sequence sharded needs all keys and values on every device; with its heads
sharded it needs nothing. So does a product along a sharded dim, or a transform. Between them and
the rest an all-to-all brings the axis from the one dim to the other and back (DeepSpeed Ulysses,
arXiv 2309.14509, for attention), where others would gather, and do all that follows on every
device. What propagation found is only a start here: from every operation that cannot keep an axis
where it is, the stretch in which another dim could have it is cut where that is least (`stretch`).

What a cut does not see (sums that loops reduce once, what is at hand) the finished plan has: the
one with moved axes is kept where it costs clearly less than the one without (`make_plan`).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sharding.mesh import MeshShape
from sharding.program import Op, Value
from sharding.region import Port
from sharding.spec import Layout
from spmd.partition.around import Surroundings, as_tensors, delay, lying, waited, work
from spmd.partition.choose import costs
from spmd.partition.placed import makes, needs
from spmd.partition.plan import UNKNOWN_STEPS, Diagnostic, Move, ProgramPlan, RegionPlan
from spmd.partition.stretch import WINDOW, Stretch

# What a program has to save, as a part of what it sends; and what it may send for less work.
WORTH, MOST = 0.2, 1.5
# What an equation sends, as a part of what any does, for a stretch to begin there.
LEAST = 1 / 64
# The same once more, where others have moved.
AGAIN = 1 / 8
# Equations that are looked at, for each of the program: many starts may see the same ones.
LOOKS = 16

# Off: axes come to no dim that they shard already of another operand. A layer of FSDP between its
# products, say, by its hidden dim, since its weights are; but such stretches see less of what else
# is at hand, so that a plan with them that is no better is made without.
TAKEN = "taken_dims"

# How often axes are looked for that cannot stay: others may not where some have moved.
ROUNDS = 2

_KIND = "moved"  # of diagnostics


class Moved(NamedTuple):
    """What the pass did.

    Attributes:
      told: an entry per axis.
      taken: whether one came to a dim that it shards of another operand, see `TAKEN`.
      before: what was wanted after the first look, where some moved in the second; else None.
    """

    told: tuple[Diagnostic, ...] = ()
    taken: bool = False
    before: "Wanted | None" = None


class Wanted(NamedTuple):
    """Layouts that are wanted on a mesh.

    Attributes:
      mesh: which one.
      layouts: by value id.
      leave: of values that leave their regions otherwise, by id.
      moved: what the pass did until then.
    """

    mesh: MeshShape
    layouts: list[Layout]
    leave: dict[int, Layout]
    moved: Moved


class _Start(NamedTuple):
    """Where an axis cannot stay.

    Attributes:
      op: an operation that could have it on another dim.
      at: what cannot keep it: that operation, or the loop around it.
      port: where the loop runs over the dim that the axis shards; None: it is no loop.
    """

    op: Op
    axis: str
    at: Op
    port: Port | None = None


def move_axes(planner: Any) -> Moved:
    """Changes the layouts that are wanted.

    Args:
      planner: `planner._Planner`.
    """
    found, search, before = Moved(), None, None
    for _ in range(ROUNDS):
        ops = planner.propagated.program.ops()
        starts = [start for op in ops for start in _starts(planner, op)]
        if starts and search is None:
            search = _Search(planner)
        if search is None or not search.go(starts):
            break
        found = search.found()._replace(before=before)
        before = Wanted(planner.mesh, [*planner.layouts], {**planner.leave}, found)
    return found


class _Search:
    """Stretches that are less, from one start after the other.

    Args:
      planner: `planner._Planner`.
    """

    def __init__(self, planner: Any):
        self.planner, self.around = planner, Surroundings(planner)
        self.looks = LOOKS * (len(self.around.trips) + WINDOW)
        self.seen: set[tuple[int, str, int]] = set()  # equations that were part of a stretch
        self.moved: dict[str, tuple[Op, set[int]]] = {}
        self.taken = False
        self.most = 0.0  # that any equation sends since an axis cannot stay

    def found(self) -> Moved:
        told = (_told(axis, first, len(places)) for axis, (first, places) in self.moved.items())
        return Moved((*told,), self.taken)

    def go(self, starts: list[_Start]) -> bool:
        """Whether anything had better be elsewhere, of what begins where axes cannot stay."""
        around, moved = self.around, False
        self.seen.clear()
        least = AGAIN if self.moved else LEAST
        starts.sort(key=lambda start: start.port is not None)  # loops see more, and take more looks
        sent = {start: _sent(around, start) for start in starts}
        self.most = max(self.most, *sent.values(), 0.0)
        for start in starts:
            op, axis = start.op, start.axis
            if sent[start] < least * self.most or self.looks < 0:
                continue
            others = around.others(op, axis, taken=self.planner.on(TAKEN))
            dims = [dim for dim in others if (op.index, axis, dim) not in self.seen]
            if not dims or start not in _starts(self.planner, start.at):
                continue
            moved = self.look(start, dims) or moved
        return moved

    def look(self, start: _Start, dims: Sequence[int]) -> bool:
        """Whether the best of the stretches in which an axis has another dim is less."""
        op, axis, sure = start.op, start.axis, start.port is not None
        stretches = [Stretch(self.around, op, axis, dim, sure) for dim in dims]
        self.seen |= {(i, axis, stretch.dim) for stretch in stretches for i in stretch.ops}
        self.looks -= sum(len(stretch.ops) for stretch in stretches)
        best = max(stretches, key=lambda stretch: stretch.gain)
        if best.gain <= 0:
            return False
        self.taken |= best.dim not in self.around.others(op, axis, taken=False)
        self.moved.setdefault(axis, (start.at, set()))[1].update(best.move())
        return True


def _told(axis: str, first: Op, count: int) -> Diagnostic:
    text = (
        f"shards another dim of what {count} operations read and make, the first around "
        f"{first.primitive.name}: all-to-alls take it there and back, for less than gathers or "
        "sums would send"
    )
    remedy = "annotate what should stay, or disable_passes=['moved_axes']"
    return Diagnostic(_KIND, axis, text, 0.0, first.source, remedy, stated=True)


def moves(plan: ProgramPlan) -> bool:
    """Whether an axis shards another dim anywhere in a plan."""
    return any(told.kind == _KIND for told in plan.diagnostics)


def spent(body: RegionPlan, waits: Mapping[str, float], delays: bool = False) -> float:
    """What a plan moves and multiplies, in bytes on a link.

    Args:
      waits: see `Traits`.
      delays: whether it counts how often something is sent in loops of many steps.
    """
    return sum(_spent(body, waits, delays))


def cheaper(moved: RegionPlan, other: RegionPlan, waits: Mapping[str, float]) -> bool:
    """Whether a plan with axes on other dims is better than the one without: it takes some of what
    that waits for, or multiplies, to be worth it, and it must not send much more.

    Args:
      waits: see `Traits`.
    """
    (after, works), (before, worked) = _spent(moved, waits), _spent(other, waits)
    return after + works < before + worked - WORTH * before and after < MOST * before


def _spent(
    body: RegionPlan, waits: Mapping[str, float], delays: bool = True
) -> tuple[float, float]:
    """What a plan moves, and what it multiplies.

    Args:
      delays: whether it counts how often something is sent in loops of many steps.
    """
    moves = works = 0.0
    for one, runs in body.walk(unknown=UNKNOWN_STEPS):
        if isinstance(one, Move):
            moves += runs * waited(one.plan, waits)
            moves += delay(runs) if delays and one.plan.bytes else 0.0
        elif one.rule is not None:
            works += runs * work(one.rule, one.assignment, body.mesh)
    return moves, works


def _starts(planner: Any, op: Op) -> list[_Start]:
    if op.control is None:
        return [_Start(op, axis, op) for axis in _contested(planner, op)]
    return list(_scanned(planner, op))


def _sent(around: Surroundings, start: _Start) -> float:
    """What is sent since the axis cannot stay."""
    if start.port is None:
        return around.sent(start.op)
    value = start.at.inputs[start.port.outer]
    need = around.planner.need(start.at, start.port.outer)
    return around.trips[start.at.index] * around.moving(lying(around.planner, value), need, value)


def _scanned(planner: Any, op: Op) -> Iterator[_Start]:
    """Axes on the dim that a loop runs over: every step needs its slice on all devices."""
    if op.scope.manual is not None:
        return
    for port in op.in_ports:
        value = op.inputs[port.outer]
        first = lying(planner, value).dims[0] if port.stacked else ()
        if not first:
            continue
        reader = _reader(planner, op.regions[port.region].inputs[port.inner])
        if reader is not None:
            yield from (_Start(reader, axis, op, port) for axis in first)


def _reader(planner: Any, value: Value) -> Op | None:
    """An operation that reads a value, itself or in a region that is passed it."""
    readers = planner.propagated.program.readers[value.id]
    for op, _ in readers:
        if op.control is None and not op.rule.elementary:
            return op
    inside = (op.regions[port.region].inputs[port.inner]
              for op, i in readers if op.control is not None
              for port in op.in_ports if port.outer == i)  # fmt: skip
    return next(filter(None, (_reader(planner, v) for v in inside)), None)


def _contested(planner: Any, op: Op) -> list[str]:
    """Axes that an operation cannot keep where propagation left them: an operand is gathered or
    exchanged, or one of several alone is summed along a dim that they shard, or one device has what
    is taken from it."""
    rule = op.rule
    if op.control is not None or rule.early or rule.elementary or not op.outputs:
        return []
    if rule.annotation is not None or op.scope.manual is not None:
        return []
    layouts = [lying(planner, v) for v in op.inputs]
    if not any(layout.used for layout in layouts):
        return []
    operands = as_tensors(op.inputs, layouts)
    results = as_tensors(op.outputs, map(planner.wanted, op.outputs))
    assignment, _ = costs(rule, operands, results, planner.mesh)
    needed = needs(rule, assignment, operands, planner.mesh)
    lost = {a for layout, need in zip(layouts, needed, strict=True)
            for was, now in zip(layout.dims, need.dims, strict=True) for a in {*was} - {*now}}
    if sum(v.rank > 0 for v in op.inputs) > 1 or not rule.flops:
        for made in makes(rule, assignment, planner.mesh):
            summed = [a for a, _ in made.partial]
            lost |= {a for a in summed if sum(a in layout.used for layout in layouts) == 1}
    return [axis for axis, _ in planner.mesh.axes if axis in lost]
