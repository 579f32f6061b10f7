"""Which operations are linear: what their partial operands can stay partial through."""

from collections.abc import Iterator
from math import prod

from sharding.mesh import MeshShape
from sharding.program import Op, Program, Value
from sharding.project import to_dims, to_factors
from sharding.rule import Kind
from sharding.spec import Layout


def reduces(op: Op) -> bool:
    """Whether an operation sums over a dim."""
    factors = op.rule.factors.values()
    return any(f.kind is Kind.REDUCE and f.monoid == "add" and f.size > 1 for f in factors)


def linear_groups(op: Op) -> Iterator[tuple[int, ...]]:
    """Operands whose sums may be taken after an operation instead of before it: it is linear in
    them, and its result has no more elements. These may be wider: what is made in half precision
    is added up in full."""
    size = prod(op.outputs[0].shape)
    for group in op.rule.linear:
        if all(size <= prod(op.inputs[i].shape) for i in group):
            yield group


def through(op: Op, operand: int, layout: Layout, mesh: MeshShape) -> Layout:
    """The layout of an operation's first result, of an operand's."""
    factors = to_factors(op.rule, operand, layout.dims, mesh)
    return Layout(to_dims(op.rule, len(op.inputs), factors, mesh), layout.partial)


def only_reader(program: Program, value: Value) -> tuple[Op, int] | None:
    """The one operation that reads a value, and at which operand; none that has regions."""
    readers = program.readers[value.id]
    if program.uses[value.id] != 1 or len(readers) != 1:
        return None
    return readers[0] if readers[0][0].control is None else None


def multiplies(op: Op) -> bool:
    """Whether an operation is a product that costs more than its elements."""
    return op.control is None and len(op.outputs) == 1 and op.rule.flops > 1


def transposes(op: Op) -> bool:
    """Whether an operation gives its operand's dims in another order, and nothing else."""
    if op.control is not None or len(op.inputs) != 1 or len(op.outputs) != 1:
        return False
    rule = op.rule
    (before,), (after,) = rule.operands, rule.results
    plain = rule.simple and all(f.kind is Kind.PASS for f in rule.factors.values())
    return plain and (0,) in rule.linear and before != after and sorted(before) == sorted(after)
