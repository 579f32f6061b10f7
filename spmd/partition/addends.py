"""Sums of partial values: which addends can share one reduction.

The gradients of three projections of one input are three products and their sum. Each product
alone would rather avoid its reduction; the three together need only one, of the sum.
"""

from sharding.program import Op, Program, Value
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
            if not all(self.leaves(reader[0].inputs[i]) for i in group):
                return value, self.leaves(value)
            value = reader[0].outputs[0]

    def leaves(self, value: Value) -> tuple[Value, ...]:
        """Reduced values that make up `value` by linear operations alone; none where others do."""
        found = self.found.get(value.id)
        if found is None:
            found = self.found[value.id] = self._leaves(value)
        return found

    def _leaves(self, value: Value) -> tuple[Value, ...]:
        op = value.op
        if op is None or op.control is not None or len(op.outputs) != 1:
            return ()
        factors = op.rule.factors.values()
        if any(f.kind is Kind.REDUCE and f.monoid == "add" and f.size > 1 for f in factors):
            return (value,)
        for group in op.rule.linear:
            parts = [self.leaves(op.inputs[i]) for i in group]
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
    return next((group for group in op.rule.linear if operand in group), None)
