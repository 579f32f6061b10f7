"""Why a value is not sharded otherwise, and what it would cost: tried, not estimated."""

from collections.abc import Iterator
from typing import Any

from sharding.annotate import rank_problem, resolve, spec_of
from sharding.errors import ArgumentError, Problem, SpecError
from sharding.mesh import axes_size, overlap
from sharding.op import Value
from sharding.spec import Layout, Sharding, check_axes, fitted
from spmd.explaining.explanation import WhyNot
from spmd.explaining.inspector import Inspector
from spmd.explaining.trial import measure, with_annotations
from spmd.partition.written import annotation_text


def why_not(inspector: Inspector, asked: str | Value, spec: Any) -> WhyNot:
    """What another sharding of one value would change.

    Args:
      asked: the value.
      spec: a PartitionSpec, a NamedSharding, a tuple of entries, a `Sharding`, or its text
        (`[data, -]`); logical names are resolved by the program's axis rules.

    Raises:
      ArgumentError: `asked` names no value, or several.
      SpecError: `spec` is no spec.
    """
    value = _one(inspector, asked)
    wanted, problems = _resolved(inspector, value, spec)
    found = inspector.stage.result.of(value)
    if not problems and len(wanted.dims) == value.rank:
        wanted = fitted(wanted, value.shape, inspector.stage.result.mesh)
    layout = Layout(tuple(d.axes for d in wanted.dims))
    if not problems:
        problems += _impossible(inspector, value, layout)
    if problems:
        texts = tuple(map(str, problems))
        return WhyNot(
            str(value), str(spec), str(found.layout), (), "", texts, (), None, None
        )
    reasons = tuple(_reasons(inspector, value, layout))
    text = annotation_text(inspector.stage.traced.program, value, layout)
    before = measure(inspector.partitioned)
    other = with_annotations(inspector.stage, {value: wanted})
    given = {str(d) for d in inspector.partitioned.diagnostics}
    notes = tuple(str(d) for d in other.diagnostics if str(d) not in given)
    return WhyNot(
        str(value), str(layout), str(found.layout), reasons, text, (), notes, before,
        measure(other),
    )


def _one(inspector: Inspector, asked: str | Value) -> Value:
    found = [v for v in inspector.history.find(asked) if v.rank]
    if len(found) == 1:
        return found[0]
    names = ", ".join(map(str, found))
    fix = "ask for one of them by its name" if found else "ask for an array: a scalar has no dims"
    raise ArgumentError(
        Problem(
            f"{asked} names {len(found)} arrays" + (f": {names}" if found else ""),
            "one annotation is of one array",
            fix,
        )
    )


def _resolved(inspector: Inspector, value: Value, spec: Any) -> tuple[Sharding, list[Problem]]:
    """The annotation that a spec means; its problems."""
    options, mesh = inspector.stage.traced.options, inspector.stage.result.mesh
    try:
        if isinstance(spec, str):
            spec = Sharding.parse(spec)
        if isinstance(spec, Sharding):
            return spec, check_axes(spec, mesh, str(value))
        parsed = spec_of(spec, value.rank)
    except SpecError as error:
        return Sharding(()), list(error.problems)
    if parsed is None:
        return Sharding.open(value.rank), []
    too_long = rank_problem(parsed, value.rank, str(value), value.shape)
    if too_long is not None:
        return Sharding(()), [too_long]
    return resolve(parsed, value.rank, mesh, options.axis_rules, str(value))


def _impossible(inspector: Inspector, value: Value, layout: Layout) -> list[Problem]:
    """What no annotation can do."""
    if len(layout.dims) != value.rank:
        return [
            Problem(
                f"a spec of {len(layout.dims)} dims for {value}",
                f"it has shape {value.shape}",
                f"give {value.rank} entries",
            )
        ]
    mesh = inspector.stage.result.mesh
    return [
        Problem(
            f"dim {d} of {value} has size {n}, and {'+'.join(axes)} makes "
            f"{axes_size(mesh, axes)} shards",
            "some devices would have nothing but padding",
            "use fewer axes for it",
        )
        for d, (n, axes) in enumerate(zip(value.shape, layout.dims, strict=True))
        if axes_size(mesh, axes) > n
    ]


def _reasons(inspector: Inspector, value: Value, layout: Layout) -> Iterator[str]:
    """Per dim, why propagation did not come to a layout."""
    history = inspector.history
    sharding = inspector.stage.result.of(value)
    lost = inspector.paid(value, history.explain(value)).lost
    if sharding.layout == layout:
        yield "it is so already"
    for d, (have, want) in enumerate(zip(sharding.dims, layout.dims, strict=True)):
        missing = [a for a in want if a not in have.axes]
        for axis in have.axes:
            if axis not in want:
                yield from inspector.origin(value, d, axis)
        if not missing:
            continue
        said = [str(x) for x in lost if x.dim == d and _any_overlap(x.axes, missing)]
        yield from said
        if not have.open:
            yield f"dim {d} is {history.unsharded(value, d)}" if not have.axes else (
                f"dim {d} is closed by {history.site(value)[0]}"
            )
        elif not said:
            yield f"dim {d}: no rule brings {'+'.join(missing)} here"


def _any_overlap(some: Any, others: Any) -> bool:
    return any(overlap(a, b) for a in some for b in others)
