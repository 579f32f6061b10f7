"""Sums of partial values: which addends can share one reduction.

The gradients of three projections of one input are three products and their sum. Each product
alone would rather avoid its reduction; the three together need only one, of the sum.
"""

from collections.abc import Iterator

from sharding.program import Op, Program, Value, value_bytes
from sharding.rule import Kind


class Addends:
    """Finds, for a value that an operation reduces, the sum it ends up in."""

    def __init__(self, program: Program):
        self.program = program
        self.found: dict[int, tuple[Value, ...]] = {}

    def group(self, value: Value) -> tuple[Value, tuple[Value, ...]]:
        """The sum that `value` ends up in before anything that is not linear uses it, and the
        reduced values it is the sum of: `value` alone where others are added that are not."""
        while True:
            reader = self.only_reader(value)
            group = None if reader is None else _group(reader[0], reader[1])
            if reader is None or group is None:
                return value, self.leaves(value)
            if not all(self.added(reader[0].inputs[i]) for i in group):
                return value, self.leaves(value)
            value = reader[0].outputs[0]

    def leaves(self, value: Value) -> tuple[Value, ...]:
        """Reduced values that make up `value` by linear operations alone; none where others do."""
        found = self.found.get(value.id)
        if found is None:
            found = self.found[value.id] = self._leaves(value)
        return found

    def added(self, value: Value) -> tuple[Value, ...]:
        """`leaves` of an operand of a sum; none where others read it too, who may need it whole."""
        return self.leaves(value) if self.program.uses[value.id] == 1 else ()

    def _leaves(self, value: Value) -> tuple[Value, ...]:
        op = value.op
        if op is None or op.control is not None or len(op.outputs) != 1:
            return ()
        if reduces(op):
            return (value,)
        for group in linear_groups(op):
            parts = [self.added(op.inputs[i]) for i in group]
            if all(parts):
                return tuple(leaf for part in parts for leaf in part)
        return ()

    def only_reader(self, value: Value) -> tuple[Op, int] | None:
        """The one operation that reads the value, and at which operand."""
        readers = self.program.readers[value.id]
        if self.program.uses[value.id] != 1 or len(readers) != 1:
            return None
        return readers[0] if readers[0][0].control is None else None


def _group(op: Op, operand: int) -> tuple[int, ...] | None:
    """The operands in which the operation is linear together with this one."""
    if len(op.outputs) != 1 or op.rule.annotation is not None:
        return None
    return next((group for group in linear_groups(op) if operand in group), None)


def reduces(op: Op) -> bool:
    """Whether an operation sums over a dim."""
    factors = op.rule.factors.values()
    return any(f.kind is Kind.REDUCE and f.monoid == "add" and f.size > 1 for f in factors)


def linear_groups(op: Op) -> Iterator[tuple[int, ...]]:
    """Operands whose sums may be taken after an operation instead of before it: it is linear in
    them, and its result is no larger."""
    size = value_bytes(op.outputs[0])
    for group in op.rule.linear:
        if all(size <= value_bytes(op.inputs[i]) for i in group):
            yield group
