"""Sums of partial values: how many addends will share one reduction.

The gradients of three projections of one input are three products and their sum. Each product
alone would rather avoid its reduction; the three together need only one, of the sum.
"""

from sharding.program import Op, Program, Value
from sharding.rule import Kind


class Addends:
    """Counts, for a value that an operation reduces, the addends of the sum it ends up in."""

    def __init__(self, program: Program):
        self.program = program
        self.counted: dict[int, int] = {}

    def sharing(self, value: Value) -> int:
        """Number of reduced values, this one included, that are summed before the sum is used by
        anything that is not linear; 1 where it is not summed with reduced values only."""
        total = self.count(value)
        while True:
            reader = self.only_reader(value)
            group = None if reader is None else _group(reader[0], reader[1])
            if reader is None or group is None:
                return max(1, total)
            counts = [self.count(reader[0].inputs[i]) for i in group]
            if not all(counts):
                return max(1, total)
            total = sum(counts)
            value = reader[0].outputs[0]

    def count(self, value: Value) -> int:
        """Reduced values that make up `value` by linear operations alone; 0 where others do."""
        found = self.counted.get(value.id)
        if found is None:
            found = self.counted[value.id] = self._count(value)
        return found

    def _count(self, value: Value) -> int:
        op = value.op
        if op is None or op.control is not None or len(op.outputs) != 1:
            return 0
        if any(f.kind is Kind.REDUCE and f.monoid == "add" for f in op.rule.factors.values()):
            return 1
        for group in op.rule.linear:
            counts = [self.count(op.inputs[i]) for i in group]
            if all(counts):
                return sum(counts)
        return 0

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
