"""How often a `while` loop runs that counts: `while i < n: ...; i += step`.

Loops that `jax.lax.fori_loop` makes of bounds that are numbers are scans, but not those that users
write themselves. What is done in each of their steps weighs as often as they run.
"""

from typing import Any, NamedTuple

import numpy as np

from sharding import _jax

p = _jax.primitives

# Predicate -> how many steps from the first count on hold, each of a size.
_STEPS = {
    p.lt_p: lambda first, bound, step: -((first - bound) // step),
    p.le_p: lambda first, bound, step: (bound - first) // step + 1,
    p.gt_p: lambda first, bound, step: -((bound - first) // -step),
    p.ge_p: lambda first, bound, step: (first - bound) // -step + 1,
}
_MIRRORED = {p.lt_p: p.gt_p, p.le_p: p.ge_p, p.gt_p: p.lt_p, p.ge_p: p.le_p}


class _Number(NamedTuple):
    """An integer.

    Attributes:
      carry: which carry it is, or None.
      plus: what is added to that, or the number.
    """

    carry: int | None
    plus: int


def trips_of_while(op: Any) -> int:
    """How often the body runs; 1 where that cannot be told from the equation.

    Args:
      op: an `Op`, or an equation of a jaxpr.
    """
    params = op.params
    consts = params["cond_nconsts"], params["body_nconsts"]
    given = _given(op)
    start = given[sum(consts) :]
    cond, body = params["cond_jaxpr"].jaxpr, params["body_jaxpr"].jaxpr
    before = _numbers(params["cond_jaxpr"], given[: consts[0]])
    after = _numbers(params["body_jaxpr"], given[consts[0] : sum(consts)])
    made = next((e for e in cond.eqns if cond.outvars[0] in e.outvars), None)
    if made is None or made.primitive not in _STEPS or made.outvars[0].aval.shape:
        return 1
    test, (left, right) = made.primitive, (before(v) for v in made.invars)
    if left is None or right is None:
        return 1
    if left.carry is None:
        test, left, right = _MIRRORED[test], right, left
    steps = [after(v) for v in body.outvars]

    def fixed(number: _Number) -> int | None:
        """What a number is in all steps."""
        if number.carry is None:
            return number.plus
        stays = steps[number.carry] == _Number(number.carry, 0)
        first = start[number.carry]
        return first + number.plus if stays and first is not None else None

    dtype = made.invars[0].aval.dtype
    return _count(test, left, fixed(right), steps, start, dtype)


def _count(
    test: Any, left: _Number, bound: int | None, steps: Any, start: Any, dtype: Any
) -> int:
    if left.carry is None or bound is None or start[left.carry] is None:
        return 1
    limits, step, first = np.iinfo(dtype), steps[left.carry], start[left.carry] + left.plus
    up = test in (p.lt_p, p.le_p)
    if step is None or step.carry != left.carry or (step.plus <= 0 if up else step.plus >= 0):
        return 1
    last = bound + step.plus
    if min(first, bound, last) < limits.min or max(first, bound, last) > limits.max:
        return 1  # it wraps around
    return max(_STEPS[test](first, bound, step.plus), 0)


def _numbers(closed: Any, consts: list[int | None]) -> Any:
    """variable -> the integer that it is; None: nobody knows."""
    jaxpr = closed.jaxpr
    known: dict[Any, _Number] = {}
    for var, value in zip(jaxpr.constvars, closed.consts, strict=True):
        if (number := _integer(value)) is not None:
            known[var] = _Number(None, number)
    for i, var in enumerate(jaxpr.invars):
        if i >= len(consts):
            known[var] = _Number(i - len(consts), 0)
        elif (number := consts[i]) is not None:
            known[var] = _Number(None, number)

    def read(var: Any) -> _Number | None:
        if isinstance(var, _jax.Literal):
            number = _integer(var.val)
            return None if number is None else _Number(None, number)
        return known.get(var)

    for eqn in jaxpr.eqns:
        found = [read(v) for v in eqn.invars]
        made = _sum(eqn, found)
        if made is not None:
            known[eqn.outvars[0]] = made
    return read


def _sum(eqn: Any, found: list[_Number | None]) -> _Number | None:
    if eqn.primitive in (p.add_p, p.sub_p) and None not in found:
        a, b = found
        assert a is not None and b is not None
        if eqn.primitive is p.sub_p:
            return _Number(a.carry, a.plus - b.plus) if b.carry is None else None
        if a.carry is None or b.carry is None:
            return _Number(a.carry if b.carry is None else b.carry, a.plus + b.plus)
    if eqn.primitive is p.convert_element_type_p:
        before, after = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
        return found[0] if np.can_cast(before, after) else None
    return None


def _given(op: Any) -> list[int | None]:
    """Of each operand the number that it is, if it is a literal one."""
    if hasattr(op, "inputs"):
        return [_integer(value.const) for value in op.inputs]
    return [_integer(v.val) if isinstance(v, _jax.Literal) else None for v in op.invars]


def _integer(value: Any) -> int | None:
    kind = getattr(getattr(value, "dtype", None), "kind", "i" if type(value) is int else "")
    return int(value) if kind in ("i", "u") and getattr(value, "shape", ()) == () else None
