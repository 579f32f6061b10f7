"""Control flow in a plan: layouts at the boundaries of its regions, and the plans of their bodies.

Layouts are those propagated there, unless a pass (`loops`) gives an operand another one.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sharding.program import Op, Value
from sharding.region import Port
from sharding.spec import Layout
from spmd.partition.plan import Diagnostic, RegionPlan

# Per operand of an equation with regions, the layout that its regions see it in.
Given = Mapping[int, Layout]


class Boundary(NamedTuple):
    """Layouts at the boundaries of an equation's regions.

    Attributes:
      reads: operand -> layout outside; those that no region takes are missing.
      made: result -> layout outside.
      inputs, outputs: per region, layouts inside.
    """

    reads: dict[int, Layout]
    made: dict[int, Layout]
    inputs: list[list[Layout]]
    outputs: list[list[Layout]]


class Planned(NamedTuple):
    """An equation with regions, planned with some layouts given."""

    given: Given
    boundary: Boundary
    regions: tuple[RegionPlan, ...]
    diagnostics: tuple[Diagnostic, ...]


def plan_regions(planner: Any, scope: Any, op: Op, given: Given) -> Planned:
    """Plans the regions of an equation. What they have to tell is kept aside, with the plan.

    Args:
      planner, scope: `planner._Planner`, and the `_Scope` that the equation is in.
    """
    found = _boundary(planner, op, given)
    manual = op.control.manual(op.params) if op.control is not None else None
    mesh = scope.mesh.without(manual.axes) if manual else scope.mesh
    told = len(planner.diagnostics)
    regions = tuple(
        planner.region(r, mesh, i, o)
        for r, i, o in zip(op.regions, found.inputs, found.outputs, strict=True)
    )
    diagnostics = tuple(planner.diagnostics[told:])
    del planner.diagnostics[told:]
    return Planned(given, found, regions, diagnostics)


def _boundary(planner: Any, op: Op, given: Given) -> Boundary:
    control = op.control
    assert control is not None
    inputs = [[planner.wanted(v) for v in r.inputs] for r in op.regions]
    outputs = [[planner.leaving(v) for v in r.outputs] for r in op.regions]
    reads = _ports(planner, op.in_ports, [r.inputs for r in op.regions], inputs, given)
    made = _ports(planner, op.out_ports, [r.outputs for r in op.regions], outputs, {
        port.outer: layout for port in op.out_ports
        if (layout := outputs[port.region][port.inner]).partial
    })  # fmt: skip
    for region, out, into in control.carries(op):
        outputs[region][out] = inputs[region][into]
    for port in op.out_ports:
        made[port.outer] = planner.outside(outputs[port.region][port.inner], port)
    return Boundary(reads, made, inputs, outputs)


def _ports(
    planner: Any, ports: Sequence[Port], values: Sequence[Sequence[Value]],
    layouts: list[list[Layout]], given: Given,
) -> dict[int, Layout]:  # fmt: skip
    """Layouts of outer values. `layouts` of inner ones are made to agree: what is passed once has,
    at all its ports, the layout of the first."""
    first: dict[int, Layout] = {}
    found: dict[int, Layout] = {}
    for port in ports:
        if port.outer not in first:
            inner = given.get(port.outer)
            if inner is None:
                inner = planner.at_boundary(values[port.region][port.inner], port)
            first[port.outer] = inner
            found[port.outer] = planner.outside(inner, port)
        layouts[port.region][port.inner] = first[port.outer]
    return found
