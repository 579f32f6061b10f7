"""How often a `while` of a compiled module runs its body.

XLA often states it (`known_trip_count` in the backend configuration). Where it does not, the count
follows from the loop: one carried value starts at a constant, changes by a constant, and is
compared with a constant. Constants may be carried through the loop unchanged, and additions and
comparisons may sit in fusions, so values are followed through both.
"""

from __future__ import annotations

import dataclasses
import operator
import re

from spmd.reporting.hlo_text import Computation, Instruction, Module

_KNOWN = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"')
_COPIES = ("copy", "copy-start", "copy-done", "optimization-barrier")
_TRANSPARENT = {"bitcast", "broadcast", "convert", "reshape", *_COPIES}
_ARITHMETIC = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "maximum": max,
    "minimum": min,
}
_FOLLOWED = {"tuple", "get-tuple-element", "compare", *_TRANSPARENT, *_ARITHMETIC}
_INTEGER_OR_TUPLE = re.compile(r"\(|(?:[su]\d+|pred)\[1?\]")
_FLIPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}


@dataclasses.dataclass(frozen=True)
class Carried:
    """Element `index` of the loop's carried tuple, plus a constant."""

    index: int
    offset: int = 0


@dataclasses.dataclass(frozen=True)
class Compare:
    """A comparison, `direction` being XLA's LT, LE, GT, GE, EQ or NE."""

    direction: str
    left: Value
    right: Value


# None is a value that is not known; a tuple may hold unknown elements
Value = int | Carried | Compare | tuple["Value", ...] | None


@dataclasses.dataclass(frozen=True)
class _CarriedTuple:
    """The parameter of a loop's body or condition; `constants` are its unchanging elements."""

    constants: dict[int, int]

    def element(self, index: int) -> Value:
        return self.constants.get(index, Carried(index))


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Times the body of `loop`, an instruction of `computation`, runs; None when unknown."""
    known = _KNOWN.search(loop.attributes)
    if known:
        return int(known.group(1))
    body = module.computations[loop.attribute("body") or ""]
    condition = module.computations[loop.attribute("condition") or ""]
    initial = _tuple(_Scope(module, computation, {}).value(loop.operands[0]))
    unchanged = {
        index: value
        for index, out in enumerate(_after(module, body, {}))
        if out == Carried(index) and isinstance(value := _at(initial, index), int)
    }
    step = _after(module, body, unchanged)
    test = _Scope(module, condition, {0: _CarriedTuple(unchanged)}).root()
    return _solve(test, initial, step) if isinstance(test, Compare) else None


def _after(module: Module, body: Computation, constants: dict[int, int]) -> tuple[Value, ...]:
    """The carried tuple after one iteration, in terms of the tuple before it."""
    return _tuple(_Scope(module, body, {0: _CarriedTuple(constants)}).root())


def _solve(test: Compare, initial: tuple[Value, ...], step: tuple[Value, ...]) -> int | None:
    """Iterations until `test` fails, for a counter that moves by a constant."""
    direction, counter, limit = test.direction, test.left, test.right
    if isinstance(counter, int):
        direction, counter, limit = _FLIPPED.get(direction, ""), limit, counter
    if not isinstance(counter, Carried) or not isinstance(limit, int):
        return None
    start, after = _at(initial, counter.index), _at(step, counter.index)
    if not isinstance(start, int) or not isinstance(after, Carried):
        return None
    if after.index != counter.index:
        return None
    return _iterations(direction, start + counter.offset, limit, after.offset)


def _iterations(direction: str, start: int, limit: int, step: int) -> int | None:
    """Values `start, start + step, ...` for which `value <direction> limit` holds in a row."""
    distance = limit - start
    if direction in ("GT", "GE"):
        direction, distance, step = {"GT": "LT", "GE": "LE"}[direction], -distance, -step
    if direction == "NE":
        reached = step != 0 and distance % step == 0 and distance // step >= 0
        return distance // step if reached else None
    if direction == "LE":
        direction, distance = "LT", distance + 1
    if direction != "LT":
        return None
    if distance <= 0:
        return 0
    return -(-distance // step) if step > 0 else None


class _Scope:
    """Values of a computation's instructions, given those of its parameters by number."""

    def __init__(self, module: Module, computation: Computation, arguments: dict) -> None:
        self._module, self._computation, self._arguments = module, computation, arguments
        self._known: dict[str, Value] = {}

    def root(self) -> Value:
        return self.value(self._computation.root.name)

    def value(self, name: str) -> Value:
        if name not in self._known:
            instruction = self._computation.instructions[name]
            # arrays are not followed: a loop counts in integers
            integer = _INTEGER_OR_TUPLE.match(instruction.type)
            self._known[name] = self._evaluate(instruction) if integer else None
        return self._known[name]

    def _evaluate(self, instruction: Instruction) -> Value:
        opcode = instruction.opcode
        if opcode == "constant":
            text = instruction.arguments.strip()
            return int(text) if re.fullmatch(r"-?\d+", text) else None
        if opcode == "parameter":
            return self._arguments.get(int(instruction.arguments))
        if opcode in ("fusion", "call"):
            called = instruction.attribute("calls") or instruction.attribute("to_apply") or ""
            arguments = dict(enumerate(map(self.value, instruction.operands)))
            return _Scope(self._module, self._module.computations[called], arguments).root()
        if opcode in _FOLLOWED:
            return _apply(instruction, [self.value(name) for name in instruction.operands])
        return None


def _apply(instruction: Instruction, operands: list[Value]) -> Value:
    opcode = instruction.opcode
    if opcode == "tuple":
        return tuple(operands)
    if opcode == "get-tuple-element":
        return _element(operands[0], int(instruction.attribute("index") or 0))
    if opcode == "compare":
        return Compare(instruction.attribute("direction") or "", operands[0], operands[1])
    return operands[0] if opcode in _TRANSPARENT else _arithmetic(opcode, operands)


def _arithmetic(opcode: str, operands: list[Value]) -> Value:
    left, right = operands
    if isinstance(left, int) and isinstance(right, int):
        return _ARITHMETIC[opcode](left, right)
    if opcode == "add" and isinstance(left, int):
        left, right = right, left
    if opcode in ("add", "subtract") and isinstance(left, Carried) and isinstance(right, int):
        return Carried(left.index, _ARITHMETIC[opcode](left.offset, right))
    return None


def _element(value: object, index: int) -> Value:
    if isinstance(value, _CarriedTuple):
        return value.element(index)
    return _at(_tuple(value), index)


def _tuple(value: object) -> tuple[Value, ...]:
    return value if isinstance(value, tuple) else ()


def _at(values: tuple[Value, ...], index: int) -> Value:
    return values[index] if index < len(values) else None
