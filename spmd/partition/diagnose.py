"""What the partitioner did that its user may not expect, in the user's terms."""

from collections.abc import Sequence

from sharding import _jax
from sharding.errors import GatherError, Problem
from sharding.mesh import MeshShape, axes_size
from sharding.program import Op, Program, Value, describe
from sharding.rule import Kind
from spmd.partition.plan import Diagnostic
from spmd.partition.reshard import Plan, Step

_ACCEPT = "keep it whole from the start, or accept this with on_gather='plan'"


def gather(op: Op, value: Value, plan: Plan, mesh: MeshShape) -> Diagnostic | None:
    """Of a move that gathers a dim because the operation has no distributed form along it, or none
    that sends less.

    None where no such dim is gathered.
    """
    places = [i for i, v in enumerate(op.inputs) if v is value]
    gathers = [s for s in plan.steps if s.kind == "all_gather"]
    if op.control is not None:
        looped = any(port.stacked and port.outer in places for port in op.in_ports)
        steps = [s for s in gathers if looped and s.dim == 0]
        free = list(range(1, value.rank))
    else:
        steps = [s for s in gathers if any(_needs_whole(op, i, s, mesh) for i in places)]
        free = _free(op, places[0])
    if not steps:
        return None if op.control is not None else _preferred(op, value, gathers, mesh)
    wire = sum(step.bytes for step in steps)
    dims = sorted({step.dim for step in steps})
    axes = "+".join(dict.fromkeys(a for step in steps for a in step.axes))
    text = (
        f"{op.primitive.name} needs {_dims(dims, value)} whole: gathered over {axes}, "
        f"{wire:,.0f} B per device"
    )
    return Diagnostic("gather", describe(value), text, wire, op.source, _remedy(free, value))


def _preferred(
    op: Op, value: Value, gathers: Sequence[Step], mesh: MeshShape
) -> Diagnostic | None:
    """Of a move that gathers a dim since what the operation would exchange is more."""
    place = next(i for i, v in enumerate(op.inputs) if v is value)
    free = frozenset(i for i, v in enumerate(op.inputs) if v is not value)
    for step in gathers:
        for name in op.rule.operands[place][step.dim]:
            said = op.rule.gathers({name: axes_size(mesh, step.axes)}, free).get(name)
            if said is None:
                continue
            text = (
                f"{op.primitive.name} gathers {_dims([step.dim], value)} over "
                f"{'+'.join(step.axes)}, {step.bytes:,.0f} B per device: {said.why}"
            )
            remedy = said.remedy or _remedy(_free(op, place, name), value)
            return Diagnostic("gather", describe(value), text, step.bytes, op.source, remedy)
    return None


def own_steps(program: Program) -> list[Diagnostic]:
    """Of loops that run in parts, see `sharding.own_steps`."""
    return [
        Diagnostic(
            "own steps", eqn.primitive.name,
            "its steps need nothing of one another: every device runs those of its own rows, in a "
            "shard_map", 0.0, _jax.source_of(eqn),
            "disable_passes=['own_steps'] leaves it one loop, which every device runs whole",
            stated=True,
        )
        for eqn in program.replaced
    ]  # fmt: skip


def _needs_whole(op: Op, operand: int, step: Step, mesh: MeshShape) -> bool:
    """Whether the operation has no distributed form along the gathered dim, or none over shards
    that are not even."""
    rule, shards = op.rule, axes_size(mesh, step.axes)
    return any(
        rule.factors[f].kind is Kind.FIXED
        or (f in rule.even and rule.factors[f].size % shards != 0)
        for f in rule.operands[operand][step.dim]
    )


def _free(op: Op, operand: int, searched: str = "") -> list[int]:
    """Dims of an operand along which the operation runs in parts."""
    rule = op.rule
    return [
        d for d, names in enumerate(rule.operands[operand])
        if names and searched not in names
        and all(rule.factors[f].kind is Kind.PASS for f in names)
    ]


def _remedy(free: Sequence[int], value: Value) -> str:
    free = [d for d in free if value.shape[d] > 1]
    if not free:
        return _ACCEPT
    return f"shard {_dims(free, value)} instead, along which it runs in parts"


def _dims(dims: Sequence[int], value: Value) -> str:
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
