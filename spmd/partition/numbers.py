"""Which values of a plan are one and the same, as far as compilers see it.

They make equal instructions once, also those of calls and of layers that are made again, and bring
what stays the same out of loops. Values that may be one have one number: those that equal
computations make of equal operands, whatever of their parameters cannot be compared.
"""

from collections.abc import Hashable, Mapping
from typing import Any

from sharding.program import Value
from spmd.partition.plan import UNKNOWN_STEPS, Compute, ProgramPlan, RegionPlan, steps


class Numbers:
    """Numbers of the values of a plan.

    Attributes:
      levels: per number in how many loops its value changes; 0: in none.
    """

    def __init__(self, plan: ProgramPlan):
        self.levels: list[int] = []
        self._numbers: dict[int, int] = {}  # by the ids of values
        self._known: dict[Hashable, int] = {}
        self._region(plan.body, 0)

    def of(self, value: Value) -> int:
        """The number of a value."""
        found = self._numbers.get(value.id)
        if found is None:  # an argument or a constant
            scalar = value.const is not None and not value.rank
            what = (str(value.dtype), str(value.const)) if scalar else value.id
            found = self._numbers[value.id] = self._one(what, 0)
        return found

    def level(self, value: Value) -> int:
        """In how many loops a value changes."""
        return self.levels[self.of(value)]

    def _one(self, what: Hashable, level: int) -> int:
        found = self._known.setdefault(what, len(self.levels))
        if found == len(self.levels):
            self.levels.append(level)
        return found

    def _region(self, body: RegionPlan, loops: int) -> None:
        for each in body.code:
            if isinstance(each, Compute):
                (self._inside if each.regions else self._made)(each, loops)

    def _made(self, one: Compute, loops: int) -> None:
        """What an equation makes of its operands."""
        op, operands = one.op, tuple(self.of(key.value) for key in one.operands)
        if op.control is None and op.rule.identity:
            self._numbers.update(zip((v.id for v in op.outputs), operands, strict=True))
            return
        level = max((self.levels[number] for number in operands), default=0)
        what = (op.primitive, _comparable(op.params), operands)
        for i, value in enumerate(op.outputs):
            self._numbers[value.id] = self._one((*what, i), level)

    def _inside(self, one: Compute, loops: int) -> None:
        """What an equation with regions makes: a call what its region does, in its place."""
        op, control = one.op, one.op.control
        assert control is not None
        carried = {(r, into): out for r, out, into in control.carries(op)}
        loop = steps(op, UNKNOWN_STEPS) != 1
        inputs = {}
        for port in op.in_ports:
            value = one.regions[port.region].region.inputs[port.inner]
            outer = self.of(one.operands[port.outer].value)
            changes = loop and (port.stacked or (port.region, port.inner) in carried)
            inputs[value.id] = outer
            self._numbers[value.id] = self._one(("step", value.id), loops + 1) if changes else outer
        self._regions(one, loops + loop)
        while loop and (same := self._unchanged(one, carried, inputs)):
            self._numbers.update(same)  # what leaves a step as it came
            self._regions(one, loops + 1)
        self._made(one, loops)
        if not loop and not control.exclusive:
            for port in op.out_ports:
                made = one.regions[port.region].region.outputs[port.inner]
                if not port.stacked:
                    self._numbers[op.outputs[port.outer].id] = self.of(made)

    def _regions(self, one: Compute, loops: int) -> None:
        for region in one.regions:
            self._region(region, loops)

    def _unchanged(
        self, one: Compute, carried: Mapping[tuple[int, int], int], inputs: Mapping[int, int]
    ) -> dict[int, int]:
        """Inputs of a loop's steps that are their own outputs, with the numbers outside."""
        found = {}
        for (r, into), out in carried.items():
            region = one.regions[r].region
            value = region.inputs[into]
            same = self.of(region.outputs[out]) == self.of(value)
            if same and value.id in inputs and self.of(value) != inputs[value.id]:
                found[value.id] = inputs[value.id]
        return found


def _comparable(params: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Parameters that are equal where they say the same: not functions and programs."""
    return tuple((name, x) for name, x in sorted(params.items()) if _by_value(x))


def _by_value(x: Any) -> bool:
    if isinstance(x, tuple):
        return all(map(_by_value, x))
    return type(x).__hash__ not in (None, object.__hash__)
