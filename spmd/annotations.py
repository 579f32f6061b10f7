"""Every annotation of a traced program, from the call and from inside, resolved on the mesh."""

from typing import Any

import jax

from sharding.annotate import Spec, rank_problem, resolve, spec_of
from sharding.errors import Problem, SpecError, merged
from sharding.program import Program, Value
from sharding.propagation import annotations_in
from sharding.spec import Sharding
from spmd.arguments import Arguments, broadcast, output_names
from spmd.options import Options

Annotations = tuple[tuple[Value, Sharding], ...]


def resolve_all(
    program: Program, arguments: Arguments, out_tree: Any, options: Options
) -> tuple[Annotations, tuple[Sharding | None, ...]]:
    """Annotations by value, and per flat result what `out_shardings` says of it.

    Raises:
      SpecError: with everything that does not fit.
    """
    problems: list[Problem] = []
    annotations = _given_inputs(program, arguments, options, problems)
    out_specs = _given_outputs(program, out_tree, options, problems)
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
    # A value annotated inside that is also a result keeps the one given inside; the boundary
    # reshards.
    inside = {v.id for v, _ in inner}
    every = (*inner, *((v, s) for v, s in annotations if v.id not in inside))
    return every, tuple(out_specs)


def given_entries(arguments: Arguments, options: Options) -> list[Any]:
    """Per flat argument, its entry of `in_shardings`, or None."""
    given: list[Any] = [None] * len(arguments.leaves)
    if options.in_shardings is not None:
        args, _ = jax.tree.unflatten(arguments.tree, arguments.leaves)
        prefix = options.in_shardings
        prefix = tuple(prefix) if isinstance(prefix, list) else prefix
        entries = broadcast(prefix, args, "in_shardings")
        given[: len(entries)] = entries
    return given


def _given_inputs(
    program: Program, arguments: Arguments, options: Options, problems: list[Problem]
) -> list[tuple[Value, Sharding]]:
    given = given_entries(arguments, options)
    found = []
    values = program.body.inputs
    for value, entry, own in zip(values, given, arguments.specs, strict=True):
        spec = spec_of(entry, value.rank) if entry is not None else own
        sharding = _resolved(value, spec, options, problems)
        if sharding is not None:
            found.append((value, sharding))
    return found


def _given_outputs(
    program: Program, out_tree: Any, options: Options, problems: list[Problem]
) -> list[Sharding | None]:
    values = program.body.outputs
    if options.out_shardings is None:
        return [None] * len(values)
    skeleton = jax.tree.unflatten(out_tree, range(len(values)))
    entries = broadcast(options.out_shardings, skeleton, "out_shardings")
    names = output_names(out_tree)
    return [
        _resolved(value, spec_of(entry, value.rank), options, problems, name)
        for value, entry, name in zip(values, entries, names, strict=True)
    ]


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
    return sharding
