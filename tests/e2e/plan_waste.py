"""Communication that a cheaper legal plan plainly avoids, found in a plan."""

from collections import Counter

from sharding.spec import Layout
from spmd.partition.plan import Compute, Key, Move, ProgramPlan, RegionPlan
from spmd.partition.reshard import plan as cheapest_plan


def waste(plan: ProgramPlan) -> list[str]:
    """What is wrong with a plan, one line each:

    - a value is moved and nobody reads it there;
    - the same value is moved to the same layout twice;
    - a move is dearer than the cheapest from where the value already is;
    - something is sent although nothing is sharded.
    """
    found: list[str] = []
    _region(plan.body, found)
    # an argument whose dim does not divide is whole at the boundary, and cut where it is read
    made = (
        layout for i, _ in plan.body.walk()
        for layout in ([i.dst] if isinstance(i, Move) else [key.layout for key in i.results])
    )
    sharded = any(any(layout.dims) for layout in (*plan.body.inputs, *made))
    if not sharded and any(move.plan.bytes for move, _ in plan.moves()):
        found.append("nothing is sharded, and yet something is sent")
    return found


def _region(region: RegionPlan, found: list[str]) -> None:
    read = Counter(_keys(region))
    at_hand: dict[int, list[Layout]] = {}
    for value, layout in zip(region.region.inputs, region.inputs, strict=True):
        at_hand.setdefault(value.id, []).append(layout)
    for instruction in region.code:
        if isinstance(instruction, Compute):
            for key in instruction.results:
                at_hand.setdefault(key.value.id, []).append(key.layout)
            for inner in instruction.regions:
                _region(inner, found)
            continue
        value, itemsize = instruction.value, instruction.value.itemsize
        what = f"{value} to {instruction.dst}"
        if not instruction.plan.steps:
            continue
        if not read[value.id, instruction.dst]:
            found.append(f"{what} is never read")
        layouts = at_hand.setdefault(value.id, [instruction.src])
        if instruction.dst in layouts:
            found.append(f"{what} is there already")
        partial = set(instruction.dst.partial)  # a whole value can become a sum, and nothing else
        usable = [a for a in layouts if all(m == "add" for _, m in partial - set(a.partial))]
        best = min(
            cheapest_plan(a, instruction.dst, value.shape, itemsize, region.mesh).cost
            for a in usable
        )
        if instruction.plan.cost > best * (1 + 1e-9):
            found.append(f"{what} costs {instruction.plan.cost}, and could cost {best}")
        layouts.append(instruction.dst)


def _keys(region: RegionPlan) -> list[tuple[int, Layout]]:
    """Every read of a value in a layout."""
    keys: list[Key] = list(region.outputs)
    for instruction in region.code:
        if isinstance(instruction, Move):
            keys.append(Key(instruction.value, instruction.src))
        else:
            keys += instruction.operands
    return [(key.value.id, key.layout) for key in keys]
