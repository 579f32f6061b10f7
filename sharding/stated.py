"""What the program itself says about where data lies: annotations, and regions of `shard_map`."""

from collections.abc import Iterator
from contextlib import contextmanager

from sharding.annotate import AxisRules, rank_problem, resolve
from sharding.errors import MeshError, Problem, SpecError
from sharding.mesh import MeshShape, split_ref
from sharding.program import Op, Program, Value
from sharding.spec import DimSharding, Sharding, fitted


def annotations_in(
    program: Program, mesh: MeshShape, rules: AxisRules
) -> list[tuple[Value, Sharding]]:
    """What `shard` and `with_sharding_constraint` inside the program say, and where regions with
    manual axes want their operands and leave their results.

    Raises:
      SpecError: all annotations that do not fit, each with its source line.
      MeshError: a region is manual on another mesh.
    """
    found: list[tuple[Value, Sharding]] = []
    problems: list[Problem] = []
    for op in program.ops():
        if op.control is not None:
            found += _at_manual_region(op, mesh)
            continue
        spec = op.rule.annotation
        if spec is None:
            continue
        value = op.outputs[0]
        what = f"the annotation at {op.source or 'an unknown line'}"
        too_long = rank_problem(spec, value.rank, what, value.shape)
        if too_long is not None:
            problems.append(too_long)
            continue
        own = op.scope.axis_rules
        sharding, bad = resolve(spec, value.rank, mesh, rules if own is None else own, what)
        problems += bad or _manual_axes(op, sharding, what)
        found.append((value, fitted(sharding, value.shape, mesh)))
    if problems:
        raise SpecError(*problems)
    return found


def _at_manual_region(op: Op, mesh: MeshShape) -> list[tuple[Value, Sharding]]:
    """Operands and results lie on the axes that the region's specs name, and on no other manual
    axis; further axes may follow."""
    control = op.control
    manual = control.manual(op.params) if control is not None else None
    if manual is None:
        return []
    if not manual.mesh.like(mesh):
        raise MeshError(_other_mesh(op, manual.mesh, mesh))
    found = []
    ports = [(op.inputs, port) for port in op.in_ports] + [(op.outputs, p) for p in op.out_ports]
    for values, port in ports:
        pinned = manual.axes.difference(*port.lead)
        dims = tuple(DimSharding(axes, open=True) for axes in port.lead)
        found.append((values[port.outer], Sharding(dims, (), tuple(pinned))))
    return found


def _manual_axes(op: Op, sharding: Sharding, what: str) -> list[Problem]:
    """Annotations with axes that are manual where they stand."""
    manual = op.scope.manual
    if manual is None:
        return []
    used = sorted({split_ref(a)[0] for d in sharding.dims for a in d.axes} & manual.axes)
    if not used:
        return []
    return [
        Problem(
            f"{what} names {', '.join(used)}",
            "it is inside of a jax.shard_map that is manual over "
            f"{', '.join(sorted(manual.axes))}: arrays are local there",
            "leave these axes out of it, or move it outside of the shard_map",
        )
    ]


@contextmanager
def one_mesh(mesh: MeshShape) -> Iterator[None]:
    """Turns what JAX says of a `shard_map` over another mesh, while tracing, into our own error.

    Raises:
      MeshError: it did.
    """
    try:
        yield
    except ValueError as error:
        if "should match the mesh passed to shard_map" not in str(error):
            raise
        raise MeshError(
            Problem(
                f"a jax.shard_map is over another mesh than the program around it: {error}",
                f"the program is partitioned over {mesh} with axes of type Auto; jax.make_mesh "
                "makes Explicit ones where it is not told",
                "leave mesh out of the shard_map, or make the mesh with "
                "axis_types=(jax.sharding.AxisType.Auto,) * number_of_axes",
            )
        ) from None


def _other_mesh(op: Op, mine: MeshShape, mesh: MeshShape) -> Problem:
    return Problem(
        f"the {op.primitive.name} at {op.source or 'an unknown line'} is over the mesh {mine}",
        f"the program around it is partitioned over {mesh}, and its devices take part in both",
        "give both the same mesh, or leave mesh out of the inner one",
    )
