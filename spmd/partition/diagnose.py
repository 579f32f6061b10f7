"""What the partitioner did that its user may not expect, in the user's terms."""

from collections.abc import Sequence

from sharding.errors import GatherError, Problem
from sharding.program import Op, Value, describe
from sharding.rule import Kind
from spmd.partition.plan import Diagnostic
from spmd.partition.reshard import Plan


def gather(op: Op, value: Value, plan: Plan) -> Diagnostic | None:
    """Of a move that gathers a dim because the operation has no distributed form along it.

    None where no such dim is gathered.
    """
    rule = op.rule
    places = [i for i, v in enumerate(op.inputs) if v is value]

    def fixed(d: int) -> bool:
        return any(rule.factors[f].kind is Kind.FIXED for i in places for f in rule.operands[i][d])

    steps = [s for s in plan.steps if s.kind == "all_gather" and fixed(s.dim)]
    if not steps:
        return None
    wire = sum(step.bytes for step in steps)
    dims = sorted({step.dim for step in steps})
    axes = "+".join(dict.fromkeys(a for step in steps for a in step.axes))
    free = [
        d for d, names in enumerate(rule.operands[places[0]])
        if names and value.shape[d] > 1 and all(rule.factors[f].kind is Kind.PASS for f in names)
    ]
    remedy = (
        f"shard {_dims(free, value)} instead, along which it runs in parts"
        if free else "keep it whole from the start, or accept this with on_gather='plan'"
    )
    text = (
        f"{op.primitive.name} needs {_dims(dims, value)} whole: gathered over {axes}, "
        f"{wire:,.0f} B per device"
    )
    return Diagnostic("gather", describe(value), text, wire, op.source, remedy)


def _dims(dims: list[int], value: Value) -> str:
    """`dim 1 (of 32)`, or several of them."""
    return " and ".join(f"dim {d} (of {value.shape[d]})" for d in dims)


def forbid_gathers(diagnostics: Sequence[Diagnostic]) -> None:
    """Raises GatherError with every gather among the diagnostics."""
    problems = [
        Problem(
            f"{d.value}: {d.text}"
            + (f" at {d.source}" if d.source and d.source not in d.value else ""),
            'on_gather="error" lets no operation gather a sharded dim',
            d.remedy,
        )
        for d in diagnostics
        if d.kind == "gather"
    ]
    if problems:
        raise GatherError(*problems)
