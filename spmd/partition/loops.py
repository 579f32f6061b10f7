"""What a loop would do in each of its steps and can do once: two passes over a planned loop.

`loop_sums`: what the steps add up stays a partial sum, and is reduced after the last one.
`loop_invariants`: what every step brings into the same place is brought there before the first.

Both are tried on the plan of the loop and kept where it costs less, in bytes and repeated work.
Memory that they take has to be worth it: a copy of all weights, whole, is not, if it saves a gather
in a few steps.
"""

from collections.abc import Callable, Iterator
from typing import Any

from sharding.program import Op, Value
from sharding.region import Port
from sharding.spec import Layout
from spmd import cost
from spmd.partition.choose import cheapest
from spmd.partition.linear import linear_groups, only_reader, reduces, through
from spmd.partition.placed import flops
from spmd.partition.plan import UNKNOWN_STEPS, Key, Move, RegionPlan, steps
from spmd.partition.regions import Given, Planned, plan_regions
from spmd.partition.reshard import plan

# Link bytes that a byte of memory has to save.
WORTH = 16.0


def improved(planner: Any, scope: Any, op: Op, found: Planned) -> Planned:
    """The plan of a loop after the passes that are on; of anything else, as it is.

    Args:
      planner, scope: as for `regions.plan_regions`.
    """
    trips = steps(op, UNKNOWN_STEPS)
    if trips < 2:
        return found
    if planner.on("loop_sums"):
        given = dict(_sums(planner, op, trips))
        inside = _assumed(planner, op, given) | dict(_stacked(planner, op, found, trips))
        found = _better(planner, scope, op, found, given, inside, trips)
    if planner.on("loop_invariants"):
        moved = found = _tried(planner, scope, op, found, trips, _moved)
        found = _tried(planner, scope, op, found, trips, _sharded)
        if found is not moved:  # of all that are whole now, some are cut again in every step
            found = _tried(planner, scope, op, found, trips, _moved)
    return found


def _tried(
    planner: Any, scope: Any, op: Op, found: Planned, trips: int,
    way: Callable[..., Layout | None],
) -> Planned:  # fmt: skip
    """The cheaper of a plan, and the one with what stays the same brought elsewhere before."""
    given = dict(_invariants(planner, op, found, trips, way))
    return _better(planner, scope, op, found, given, {}, trips)


def _better(
    planner: Any, scope: Any, op: Op, found: Planned, given: Given, assumed: dict[int, Layout],
    trips: int,
) -> Planned:  # fmt: skip
    """The cheaper of a plan, and the one with further layouts given, and assumed inside."""
    if not given and not assumed:
        return found
    before = planner.assume(assumed)
    other = plan_regions(planner, scope, op, {**found.given, **given})
    if _total(planner, scope, op, other, trips) < _total(planner, scope, op, found, trips):
        return other
    planner.assume(before, only=True)
    return found


def _total(planner: Any, scope: Any, op: Op, planned: Planned, trips: int) -> float:
    """Of all steps, of what brings operands to the loop, and results to where they are wanted."""
    inside = sum(_region_cost(region, trips) for region in planned.regions)
    boundary = planned.boundary
    entering = sum(
        cheapest(scope.tensor(op.inputs[i], op), need, scope.mesh)
        for i, need in boundary.reads.items() if op.inputs[i].rank
    )  # fmt: skip
    leaving = sum(
        plan(made, planner.wanted(v).reduced(), v.shape, v.itemsize, scope.mesh).cost
        for v, made in ((op.outputs[i], layout) for i, layout in boundary.made.items())
        if planner.uses[v.id]
    )
    return inside + entering + leaving


def _region_cost(region: RegionPlan, trips: int) -> float:
    total = 0.0
    for found, runs in region.walk(trips, UNKNOWN_STEPS):
        if isinstance(found, Move):
            total += runs * found.plan.cost
        elif found.rule is not None:
            total += runs * cost.compute(flops(found.rule, found.assignment, region.mesh), 0)
    return total


def inside(op: Op) -> dict[int, list[Value]]:
    """Operand -> what the regions of an equation call it."""
    found: dict[int, list[Value]] = {}
    for port in op.in_ports:
        found.setdefault(port.outer, []).append(op.regions[port.region].inputs[port.inner])
    return found


def unchanged(op: Op) -> Iterator[tuple[Port, Value]]:
    """Operands that stay the same in all steps of a loop, as they are called there."""
    assert op.control is not None
    carried = {(region, into) for region, _, into in op.control.carries(op)}
    for port in op.in_ports:
        if (port.region, port.inner) not in carried and not port.stacked and not any(port.lead):
            yield port, op.regions[port.region].inputs[port.inner]


# --- sums ---------------------------------------------------------------------------------------


def _sums(planner: Any, op: Op, trips: int) -> Iterator[tuple[int, Layout]]:
    """Operands that a loop only adds to: the partial layouts of their sums."""
    names = inside(op)
    outer = {(port.region, port.inner): port.outer for port in op.in_ports}
    for region, out, into in op.control.carries(op) if op.control is not None else ():
        carry = op.regions[region].inputs[into]
        elsewhere = [v for v in names[outer[region, into]] if v is not carry]
        if any(planner.uses[v.id] for v in elsewhere):
            continue  # what a predicate reads is whole
        found = _partial_sum(planner, carry, op.regions[region].outputs[out])
        if found is None:
            continue
        layout, narrow = found
        reduced = planner.wanted(carry).reduced()
        once = plan(layout, reduced, carry.shape, carry.itemsize, planner.mesh).bytes
        more = _more_bytes(planner, carry, layout, reduced)
        if (trips * narrow / carry.itemsize - 1) * once > WORTH * more:
            yield outer[region, into], layout


def _partial_sum(planner: Any, carry: Value, result: Value) -> tuple[Layout, int] | None:
    """The partial layout that a carry and everything added to it can have, and the bytes of an
    element in which the addends would be reduced; None where there is no such layout, or something
    else reads the sum on the way."""
    value, layout, narrow = carry, None, carry.itemsize
    while value is not result:
        reader = only_reader(planner.propagated.program, value)
        if reader is None or len(reader[0].outputs) != 1 or reader[0].rule.annotation is not None:
            return None
        op, operand = reader
        group = next((g for g in linear_groups(op) if operand in g), None)
        if group is None or op.outputs[0].shape != carry.shape:
            return None
        for i in group:
            if i != operand:
                used_once = planner.uses[op.inputs[i].id] == 1
                added = made_partial(planner, op.inputs[i]) if used_once else None
                if added is None or layout not in (None, added):
                    return None
                layout = added
                narrow = min(narrow, *_widths(planner, op.inputs[i]))
        value = op.outputs[0]
        if layout is not None and through(op, operand, layout, planner.mesh) != layout:
            return None
    return None if layout is None else (layout, narrow)


def _widths(planner: Any, value: Value) -> Iterator[int]:
    """Bytes of an element, of what `made_partial` passes."""
    values = planner.propagated.program.values
    return (values[i].itemsize for i, _ in _made_on_the_way(planner, value))


def made_partial(planner: Any, value: Value) -> Layout | None:
    """The layout of a value that linear operations make of partial ones, were none reduced."""
    op = value.op
    if op is None:
        return None
    if op.control is not None:
        found = _inside(planner, value)
        layout = None if found is None else made_partial(planner, found[1])
        return None if layout is None or found is None else planner.outside(layout, found[0])
    if len(op.outputs) != 1 or op.rule.annotation is not None:
        return None
    if reduces(op):
        ways = planner.alternatives(value)
        return ways.made if ways is not None and ways.partial < ways.alone else None
    for group in linear_groups(op):
        if any(planner.uses[op.inputs[i].id] != 1 for i in group):
            continue
        made = {made_partial(planner, op.inputs[i]) for i in group}
        if len(made) == 1 and (layout := made.pop()) is not None:
            return through(op, group[0], layout, planner.mesh)
    return None


def _inside(planner: Any, value: Value) -> tuple[Port, Value] | None:
    """What a result of an equation with regions is called in them: the one output that it is."""
    op = value.op
    if op is None or op.control is None or op.control.exclusive:
        return None
    place = next(i for i, v in enumerate(op.outputs) if v is value)
    ports = [port for port in op.out_ports if port.outer == place]
    carried = {(region, out) for region, out, _ in op.control.carries(op)}
    if len(ports) != 1 or (ports[0].region, ports[0].inner) in carried or any(ports[0].lead):
        return None
    inner = op.regions[ports[0].region].outputs[ports[0].inner]
    return (ports[0], inner) if planner.uses[inner.id] == 1 and planner.uses[value.id] else None


def _assumed(planner: Any, op: Op, given: Given) -> dict[int, Layout]:
    """The values that stay partial inside of a loop, with their layouts."""
    found: dict[int, Layout] = {}
    for port in op.in_ports:
        layout = given.get(port.outer)
        value = op.regions[port.region].inputs[port.inner]
        while layout is not None and layout.partial and planner.uses[value.id]:
            found[value.id] = layout
            reader = only_reader(planner.propagated.program, value)
            if reader is None:
                break
            group = next(g for g in linear_groups(reader[0]) if reader[1] in g)
            for i in group:
                if i != reader[1]:
                    found.update(_made_on_the_way(planner, reader[0].inputs[i]))
            value = reader[0].outputs[0]
    return found


def _made_on_the_way(planner: Any, value: Value) -> Iterator[tuple[int, Layout]]:
    """The values that `made_partial` passes, with their layouts."""
    layout, op = made_partial(planner, value), value.op
    if layout is None or op is None:
        return
    yield value.id, layout
    if op.control is not None:
        found = _inside(planner, value)
        if found is not None:
            yield from _made_on_the_way(planner, found[1])
    elif not reduces(op):
        for group in linear_groups(op):
            for i in group:
                yield from _made_on_the_way(planner, op.inputs[i])


def _stacked(planner: Any, op: Op, found: Planned, trips: int) -> Iterator[tuple[int, Layout]]:
    """Values inside of a loop that stay partial, since what is made of all steps' is reduced to
    where it is wanted for less: to a layout that divides the steps."""
    for port in op.out_ports:
        value = op.outputs[port.outer]
        inside = _inside(planner, value) if port.stacked else None
        layout = None if inside is None else made_partial(planner, inside[1])
        if layout is None or inside is None:
            continue
        wanted, made = planner.wanted(value).reduced(), found.boundary.made[port.outer]
        there = found.boundary.outputs[port.region][port.inner]
        outer = planner.outside(layout, port)
        inner = inside[1]
        narrow = min(_widths(planner, inner))
        each = plan(layout, there, inner.shape, narrow, planner.mesh).bytes
        after = plan(made, wanted, value.shape, value.itemsize, planner.mesh).bytes
        once = plan(outer, wanted, value.shape, value.itemsize, planner.mesh).bytes
        if trips * each + after - once > WORTH * _more_bytes(planner, value, outer, made):
            yield from _made_on_the_way(planner, inner)


# --- invariants -----------------------------------------------------------------------------------


def _invariants(
    planner: Any, op: Op, found: Planned, trips: int, way: Callable[..., Layout | None]
) -> Iterator[tuple[int, Layout]]:
    """Operands that stay the same, with another layout that may be worth its memory."""
    for port, value in unchanged(op):
        region = found.regions[port.region]
        layout = way(region, value, region.inputs[port.inner], trips)
        if layout is None:
            continue
        moved = plan(region.inputs[port.inner], layout, value.shape, value.itemsize, planner.mesh)
        more = Key(value, layout).local_bytes(planner.mesh)
        if _needed_elsewhere(planner, op, port, layout):
            more = 0  # it is there after the loop, or was before
        if not moved.bytes or (trips - 1) * moved.bytes > WORTH * more:
            yield port.outer, layout


def _needed_elsewhere(planner: Any, op: Op, port: Port, layout: Layout) -> bool:
    """Whether something outside of a loop is expected to need what it is given, in that layout."""
    given, value = planner.outside(layout, port), op.inputs[port.outer]
    readers = planner.propagated.program.readers[value.id]
    return any(other is not op and planner.need(other, i) == given for other, i in readers)


def _moved(region: RegionPlan, value: Value, layout: Layout, trips: int) -> Layout | None:
    """Where the steps bring it to."""
    moves = [
        i for i in region.code
        if isinstance(i, Move) and i.value is value and i.plan.cost and not i.dst.partial
    ]
    return max(moves, key=lambda move: move.plan.cost).dst if moves else None


def _sharded(region: RegionPlan, value: Value, layout: Layout, trips: int) -> Layout | None:
    """Whole, where the steps rather move other values than gather this one: less in one step."""
    moving = trips * sum(i.plan.bytes for i in region.code if isinstance(i, Move))
    size = Key(value, Layout(((),) * value.rank)).local_bytes(region.mesh)
    return Layout(((),) * value.rank) if any(layout.dims) and moving > size else None


def _more_bytes(planner: Any, value: Value, layout: Layout, than: Layout) -> int:
    """Memory that a value takes in one layout more than in another."""
    taken = (Key(value, x).local_bytes(planner.mesh) for x in (layout, than))
    return max(next(taken) - next(taken), 0)
