"""What a partitioned case shows about the primitive that its harness is for."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import spmd
from sharding.program import Op, Program, Value, build
from sharding.rule import REGISTRY, Dims, Kind
from spmd.collectives import summarize
from spmd.partition.plan import Compute
from tests.conformance.cases import Case, Place

# Groups of harnesses with the primitive that they are for, where the names differ.
PRIMITIVE = {
    "random_categorical": "random_bits",
    "random_randint": "random_bits",
    "random_uniform": "random_bits",
    "reduce_window_add": "reduce_window_sum",
    "reduce_window_mul": "reduce_window",
}


def missing_rules(program: Program) -> list[str]:
    """Names of the primitives that have no rule."""
    known = (REGISTRY.rules, REGISTRY.controls)
    return sorted(
        {op.primitive.name for op in program.ops() if not any(op.primitive in k for k in known)}
    )


def is_pointwise(program: Program) -> bool:
    """Nothing is reduced or moved: each element of a result is made on its own."""
    return all(
        op.control is None
        and op.rule.local is None
        and all(f.kind is Kind.PASS for f in op.rule.factors.values())
        for op in program.ops()
    )


def _may_exchange(op: Op) -> bool:
    """Whether its collectives could be taken for another's: those of control flow, of local
    functions (what has no operands needs its offset only), and of partial results."""
    if op.control is not None or (op.rule.local is not None and any(v.rank for v in op.inputs)):
        return True
    return any(f.kind is Kind.REDUCE for f in op.rule.factors.values())


def unstable_axis(program: Program) -> int | None:
    """The sorted dim, where the results are those of a sort that is not stable."""
    for op in program.ops():
        if op.params.get("is_stable") is False and "num_keys" in op.params:
            if op.params["num_keys"] < len(op.inputs) and program.body.outputs == op.outputs:
                return op.params["dimension"]
    return None


def own_ops(program: Program, group: str) -> list[Op]:
    """The equations that a harness of `group` is for: those of its primitive, or the only one."""
    ops = [op for op in program.ops() if op.control is not None or not op.rule.identity]
    name = PRIMITIVE.get(group, group)
    named = [op for op in ops if op.primitive.name.replace("-", "_") == name]
    return named or (ops if len(ops) == 1 else [])


def factor_text(op: Op, tensor: int, dim: int) -> str:
    """The kinds of the factors of a dim, such as `pass` or `reduce add`; operands come first."""
    rule, texts = op.rule, set()
    for name in rule.tensors[tensor][dim]:
        factor = rule.factors[name]
        own = rule.local is not None and (rule.local_when is None or name in rule.local_when)
        if factor.kind is Kind.PASS and own:
            texts.add("pass by own code")
        else:
            texts.add(f"{factor.kind.value} {factor.monoid}".strip())
    return " and ".join(sorted(texts)) or "size 1"


def of_case(part: spmd.Partitioned, group: str, case: Case) -> dict[str, Any]:
    """Collectives, gathers, and what became of the primitive, as data for the results file.

    `collectives` are all; `cost` counts by kind those that the primitive itself calls for, which
    leaves out what other equations need and what makes uneven arguments and results whole at the
    boundary. `gathers` are diagnostics that it was the reason of.
    """
    program = part.propagated.traced.program
    own = own_ops(program, group)
    found: dict[str, Any] = {
        "collectives": [
            [c.kind, "+".join(c.axes), c.count, c.bytes] for c in summarize(part.collectives)
        ],
    }
    if own and own[0].control is None:
        found["primitive"] = own[0].primitive.name
        found["rule"] = str(own[0].rule)
        found["alone"] = len(own) == 1 and not any(map(_may_exchange, _others(program, own)))
        found["even"] = all(_even(part, place) for place in case.places)
        found["factor"] = " x ".join(_place_text(program, own, place) for place in case.places)
        found["sharded"] = _sharded(part, own)
        found["gathers"] = _gathers(part, own)
        found["cost"] = _cost(part, own)
    return found


def _even(part: spmd.Partitioned, place: Place) -> bool:
    body = part.propagated.traced.program.body
    value = (body.inputs if place.side == "in" else body.outputs)[place.tensor]
    return value.shape[place.dim] % dict(part.options.mesh_shape.axes)[place.axis] == 0


def _cost(part: spmd.Partitioned, own: Sequence[Op]) -> dict[str, int]:
    """What its operands are moved by, what its local function sends, and what its partial results
    are reduced by: everything but the moves of others."""
    counts = Counter[str]()
    for record in part.collectives:
        counts[record.kind] += record.count
    for move, trips in part.plan.moves():
        if move.reason not in own and not move.src.partial:
            for step in move.plan.steps:
                counts[step.kind] -= trips
    return {kind: n for kind, n in sorted(counts.items()) if n > 0}


def _gathers(part: spmd.Partitioned, own: Sequence[Op]) -> int:
    names = tuple(f"{op.primitive.name} " for op in own)
    return sum(d.kind == "gather" and d.text.startswith(names) for d in part.diagnostics)


def _others(program: Program, own: Sequence[Op]) -> list[Op]:
    return [
        op for op in program.ops() if op not in own and (op.control or not op.rule.identity)
    ]


def _sharded(part: spmd.Partitioned, own: Sequence[Op]) -> bool:
    """Whether a mesh axis shards a factor of the primitive in the per-device program."""
    return any(
        isinstance(code, Compute) and code.op in own and any(code.assignment.axes.values())
        for code, _ in part.plan.body.walk()
    )


def _place_text(program: Program, own: Sequence[Op], place: Place) -> str:
    """The factor of a sharded dim in the primitive; `elsewhere` where it does not reach it."""
    if place.side == "in":
        value = program.body.inputs[place.tensor]
        reached = _forward(program, own, value, place.dim)
    else:
        reached = _backward(own, program.body.outputs[place.tensor], place.dim)
    found = next(iter(reached), None)
    if found is None:
        return "elsewhere"
    text = factor_text(*found)
    return text if place.side == "in" else f"result {text}"


Reached = Iterator[tuple[Op, int, int]]  # operands come first, then results


def _forward(program: Program, own: Sequence[Op], value: Value, dim: int) -> Reached:
    """Where a dim enters the primitive, through equations that pass it on."""
    for op, operand in program.readers[value.id]:
        if op in own:
            yield op, operand, dim
        elif not _may_exchange(op):
            factor = op.rule.operands[operand][dim]
            for out, d in _with_factor(factor, op.outputs, op.rule.results):
                yield from _forward(program, own, out, d)


def _backward(own: Sequence[Op], value: Value, dim: int) -> Reached:
    """Where a dim of a result leaves the primitive."""
    op = value.op
    if op is not None and op in own:
        yield op, len(op.inputs) + op.outputs.index(value), dim
    elif op is not None and not _may_exchange(op):
        factor = op.rule.results[op.outputs.index(value)][dim]
        for operand, d in _with_factor(factor, op.inputs, op.rule.operands):
            yield from _backward(own, operand, d)


def _with_factor(
    factor: tuple[str, ...], values: Sequence[Value], tensors: Sequence[Dims]
) -> Iterator[tuple[Value, int]]:
    for value, dims in zip(values, tensors, strict=True):
        yield from ((value, d) for d, names in enumerate(dims) if names and names == factor)


def program_of(closed: Any) -> Program:
    return build(closed)
