"""Every annotation of a traced program, from the call and from inside, resolved on the mesh."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, NamedSharding

from sharding._jax import jit as _jit
from sharding.annotate import DimSpec, Spec, rank_problem, resolve, spec_of
from sharding.errors import ArgumentError, Problem, SpecError, merged
from sharding.mesh import MeshShape
from sharding.program import Program, Value
from sharding.spec import Sharding, fitted
from sharding.stated import annotations_in
from spmd.arguments import Arguments, broadcast, check_no_tuple_spec, output_names, spec_on
from spmd.devices import device_text, same_mesh
from spmd.options import Options, sharding_of

Annotations = tuple[tuple[Value, Sharding], ...]


class Annotated(NamedTuple):
    """Annotations of a program.

    Attributes:
      annotations: by value.
      out_specs: per flat result, what `out_shardings` says of it, or None.
      in_entries, out_entries: per input and per result of the program, its entry of `in_shardings`
        and `out_shardings`, or None.
    """

    annotations: Annotations
    out_specs: tuple[Sharding | None, ...]
    in_entries: tuple[Any, ...]
    out_entries: tuple[Any, ...]


def resolve_all(
    program: Program, arguments: Arguments, out_tree: Any, options: Options,
    captured: Sequence[Any] = (),
) -> Annotated:  # fmt: skip
    """Every annotation of a program.

    Args:
      captured: the arrays that come before the arguments among the program's inputs.

    Raises:
      SpecError: with everything that does not fit.
    """
    problems: list[Problem] = []
    count = len(captured)
    captives, inputs = program.body.inputs[:count], program.body.inputs[count:]
    in_entries = (None,) * count + tuple(given_entries(arguments, options))
    out_entries = _out_entries(program, out_tree, options)
    annotations = _of_captured(captives, captured, options)
    annotations += _given_inputs(inputs, arguments, in_entries[count:], options, problems)
    out_specs = _given_outputs(program, out_tree, out_entries, options, problems)
    taken = {v.id for v, _ in annotations}
    for value, given in zip(program.body.outputs, out_specs, strict=True):
        if given is not None and value.id not in taken:
            annotations.append((value, given))
            taken.add(value.id)
    inner: list[tuple[Value, Sharding]] = []
    try:
        inner = annotations_in(program, options.mesh_shape, options.axis_rules)
    except SpecError as error:
        problems += error.problems
    if problems:
        raise SpecError(*merged(problems))
    inner += _of_types(program, options.mesh_shape, {v.id for v, _ in inner})
    # A value annotated inside that is also a result keeps the one given inside; the boundary
    # reshards.
    inside = {v.id for v, _ in inner}
    every = (*inner, *((v, s) for v, s in annotations if v.id not in inside))
    return Annotated(every, out_specs, in_entries, out_entries)


def given_entries(arguments: Arguments, options: Options) -> list[Any]:
    """Per flat argument, its entry of `in_shardings`, or None."""
    given: list[Any] = [None] * len(arguments.leaves)
    if options.in_shardings is not None:
        args, _ = jax.tree.unflatten(arguments.tree, arguments.leaves)
        prefix = options.in_shardings
        if type(prefix) is tuple and len(prefix) != len(args):
            check_no_tuple_spec(prefix, "in_shardings")
            raise ArgumentError(_miscounted(len(prefix), len(args), arguments.keywords))
        entries = broadcast(prefix, args, "in_shardings")
        given[: len(entries)] = entries
    return given


def _of_captured(
    values: Sequence[Value], captured: Sequence[Any], options: Options
) -> list[tuple[Value, Sharding]]:
    found = []
    for value, x in zip(values, captured, strict=True):
        spec = spec_on(options.mesh_shape, _jit.committed_sharding(x), value.rank)
        if spec is not None:
            found.append((value, resolve(spec, value.rank, options.mesh_shape, (), str(value))[0]))
    return found


def _given_inputs(
    values: Sequence[Value], arguments: Arguments, entries: Sequence[Any], options: Options,
    problems: list[Problem],
) -> list[tuple[Value, Sharding]]:  # fmt: skip
    found = []
    for value, entry, own in zip(values, entries, arguments.specs, strict=True):
        if entry is None:
            sharding = _resolved(value, own, options, problems)
        else:
            sharding = _entry(value, entry, options, problems, "in_shardings")
        if sharding is not None:
            found.append((value, sharding))
    return found


def _out_entries(program: Program, out_tree: Any, options: Options) -> tuple[Any, ...]:
    count = len(program.body.outputs)
    if options.out_shardings is None:
        return (None,) * count
    skeleton = jax.tree.unflatten(out_tree, range(count))
    return tuple(broadcast(options.out_shardings, skeleton, "out_shardings"))


def _given_outputs(
    program: Program, out_tree: Any, entries: Sequence[Any], options: Options,
    problems: list[Problem],
) -> tuple[Sharding | None, ...]:  # fmt: skip
    values, names = program.body.outputs, output_names(out_tree)
    return tuple(
        _entry(value, entry, options, problems, "out_shardings", name)
        for value, entry, name in zip(values, entries, names, strict=True)
    )


def _of_types(program: Program, mesh: MeshShape, taken: set[int]) -> list[tuple[Value, Sharding]]:
    """Where a program of Explicit axes says by its types that values lie."""
    found = []
    for op in program.ops():
        for value in op.outputs:
            spec = _jit.explicit_spec(value.aval)
            given = None if spec is None or value.id in taken else spec_of(spec, value.rank)
            if given is not None:
                dims = tuple(DimSpec(d.names, not d.names) for d in given.dims)
                sharding, _ = resolve(Spec(dims), value.rank, mesh, (), str(value))
                found.append((value, sharding))
    return found


def _entry(
    value: Value, entry: Any, options: Options, problems: list[Problem], where: str, name: str = ""
) -> Sharding | None:
    """The `Sharding` that an entry of `in_shardings` or `out_shardings` means."""
    given = sharding_of(entry)
    if given is None:
        return None
    problem = _misplaced(given, name or str(value), options.mesh, where)
    if problem is not None:
        problems.append(problem)
        return None
    return _resolved(value, spec_of(given, value.rank), options, problems, name)


def _resolved(
    value: Value, spec: Spec | None, options: Options, problems: list[Problem], name: str = ""
) -> Sharding | None:
    if spec is None:
        return None
    what = name or str(value)
    too_long = rank_problem(spec, value.rank, what, value.shape)
    if too_long is not None:
        problems.append(too_long)
        return None
    sharding, bad = resolve(spec, value.rank, options.mesh_shape, options.axis_rules, what)
    problems += bad
    return fitted(sharding, value.shape, options.mesh_shape)


def _misplaced(given: Any, name: str, mesh: Any, where: str) -> Problem | None:
    """What is wrong with a sharding that names devices, or partial values."""
    spec = given.spec if isinstance(given, NamedSharding) else given
    if getattr(spec, "unreduced", None) or getattr(spec, "reduced", None):
        return Problem(
            f"{where} of {name} is {spec}",
            "arguments and results are whole values: partial ones exist inside of a program only",
            f"leave `unreduced` and `reduced` out of {where}",
        )
    if isinstance(given, NamedSharding):
        if given.mesh.empty or same_mesh(given.mesh, mesh):
            return None
        theirs, ours = (_mesh_text(m) for m in (given.mesh, mesh))
    elif isinstance(given, jax.sharding.Sharding) and not isinstance(mesh, AbstractMesh):
        if given.device_set == set(mesh.devices.flat):
            return None
        theirs, ours = device_text(given.device_set), _mesh_text(mesh)
    else:
        return None
    return Problem(
        f"{where} of {name} is a sharding over {theirs}",
        f"spmd.jit runs over {ours}: one program runs on one list of devices",
        "make the shardings from the mesh that spmd.jit is given, or write "
        f"{spec_of(given, 0)} without a mesh"
        if isinstance(given, NamedSharding)
        else "give a PartitionSpec, or a NamedSharding of the mesh",
    )


def _mesh_text(mesh: Any) -> str:
    shape = MeshShape.of(mesh)
    if isinstance(mesh, AbstractMesh):
        return f"the mesh {shape}"
    ids = [d.id for d in mesh.devices.flat]
    shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
    return f"the mesh {shape} of devices {shown}"


def _miscounted(entries: int, count: int, keywords: Sequence[str]) -> Problem:
    by_keyword = ", ".join(keywords)
    return Problem(
        f"in_shardings has {entries} entr{'y' if entries == 1 else 'ies'}, and {count} argument"
        f"{'' if count == 1 else 's'} came by position"
        + (f" ({by_keyword} by keyword)" if keywords else ""),
        "in_shardings says where positional arguments lie, static ones not counted; keyword "
        "arguments are inferred",
        f"pass {by_keyword} by position"
        if keywords and entries > count
        else "give in_shardings one entry per positional argument, or one for all of them",
    )
