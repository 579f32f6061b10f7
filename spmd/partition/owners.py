"""Values that one device of an axis has: who makes them, and who reads them.

Along such an axis a layout is partial `at` the place of the owner. Any operation of such values,
and of values that are whole along the axis, makes another: all devices do the same work, and what
the others make is read by nobody. Rules say where values come to have an owner, and where only the
owner reads them (`Rule.owned`).
"""

from collections.abc import Sequence

import numpy as np

from sharding.mesh import MeshShape, axes_size, axis_size
from sharding.monoid import at, owner
from sharding.program import Value
from sharding.rule import Rule, sum_monoid
from sharding.spec import Layout
from spmd.partition.plan import Assignment
from spmd.partition.reshard import Plan, Step, plan

# axis -> place of the owner along it, sorted by axis.
Owners = tuple[tuple[str, int], ...]


def owners_of(layout: Layout) -> Owners:
    """The axes along which one device has the value."""
    found = ((axis, owner(monoid)) for axis, monoid in layout.partial)
    return tuple((axis, place) for axis, place in found if place is not None)


def shared_with(layout: Layout, owners: Owners) -> Layout:
    """The layout of a value that all have, once only its owner has it."""
    held = tuple((axis, at(place)) for axis, place in owners)
    return Layout(layout.dims, tuple(sorted((*layout.partial, *held))))


def owned(rule: Rule, assignment: Assignment, tensor: int, mesh: MeshShape) -> Owners:
    """Who makes a result, or reads an operand, alone; () where no one does."""
    for name, (place_of, place) in rule.owned.items():
        axes = assignment.axes.get(name, ())
        if place_of == tensor and axes:
            shards = axes_size(mesh, axes)
            index = place // -(-rule.factors[name].size // shards)
            if index < shards:
                sizes = [axis_size(mesh, axis) for axis in axes]
                places = np.unravel_index(index, sizes)
                return tuple(sorted(zip(axes, map(int, places), strict=True)))
    return ()


def made_of(
    rule: Rule, assignment: Assignment, operands: Sequence[Layout], mesh: MeshShape
) -> Owners | None:
    """Whose the results of an operation are, by its operands; None where it may not read them."""
    used = {a for _, axes in assignment.factors for a in axes} | set(assignment.carried)
    found: dict[str, int] = {}
    for i, layout in enumerate(operands):
        held = owners_of(layout)
        if held and held == owned(rule, assignment, i, mesh):
            continue
        for axis, place in held:
            if axis in used or found.setdefault(axis, place) != place:
                return None
    return None if found and rule.always else tuple(sorted(found.items()))


def without(layout: Layout, axes: frozenset[str]) -> Layout:
    """The layout with nothing partial over some axes."""
    return Layout(layout.dims, tuple((a, m) for a, m in layout.partial if a not in axes))


def sending(value: Value, layout: Layout, owners: Owners, mesh: MeshShape) -> Plan:
    """From its owner to all devices along the axes, where it has `layout`: others add zeros.

    Args:
      owners: along axes that the layout does not use.
    """
    monoid = sum_monoid(value.dtype)
    axes = tuple(axis for axis, _ in owners)
    addends = Layout(layout.dims, tuple(sorted((*layout.partial, *((a, monoid) for a in axes)))))
    zeros = Step("owner", axes, -1, -1, monoid, addends, 0.0)
    rest = plan(addends, layout, value.shape, value.itemsize, mesh)
    return Plan((zeros, *rest.steps), rest.cost)
