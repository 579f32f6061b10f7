"""Layouts as their user would write them: the annotations that explanations name."""

from sharding.annotate import DimSpec, Spec
from sharding.mesh import split_ref
from sharding.program import Program, Value, describe
from sharding.spec import Layout


def spec_text(layout: Layout) -> str:
    """`P('data', None)`; sub-axes by the name of their axis."""
    return str(Spec(tuple(DimSpec(tuple(split_ref(a)[0] for a in axes)) for axes in layout.dims)))


def annotation_text(program: Program, value: Value, layout: Layout) -> str:
    """How a user writes that a value lies in a layout."""
    spec = spec_text(layout)
    if any(value is v for v in program.body.inputs):
        return f"in_shardings {spec} for {value}"
    if any(value is v for v in program.body.outputs):
        at = f", made at {value.op.source}" if value.op is not None and value.op.source else ""
        return f"out_shardings {spec} for {value}{at}"
    what = describe(value) if value.op is not None else f"{value}, inside of its region"
    return f"shard(x, {spec[2:-1]}) on the {what}"
