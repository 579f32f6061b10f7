"""Rules for users' own primitives, written as one line: `rule("b m k, b k n -> b m n")(my_p)`."""

from collections.abc import Callable
from typing import Any

from sharding.errors import Problem, RuleError
from sharding.rule import Dims, Factor, Kind, OpInfo, Rule, register


def rule(text: str, *, reduce: str = "add", fixed: str = "", replace: bool = False) -> Callable:
    """Registers the rule of a primitive from its dims.

    Args:
      text: operands and results, comma-separated, a name per dim; `(a b)` for a dim that merges
        two factors, `1` for a dim of size 1. Names that only operands have are reduced.
      reduce: monoid of the reduced names.
      fixed: names, space-separated, that must not be sharded.
      replace: allow a primitive that has a rule already.

    Returns:
      A decorator for the primitive, which it returns.

    Raises:
      RuleError: the text has no `->`; at trace time, when it does not fit the shapes.
    """
    sides = text.split("->")
    if len(sides) != 2:
        raise RuleError(
            Problem(
                f"rule {text!r}",
                "operands and results are told apart by '->'",
                'write it like "b m k, b k n -> b m n"',
            )
        )
    operands, results = (_parse_side(side) for side in sides)
    fixed_names = set(fixed.split())

    def build(op: OpInfo) -> Rule:
        sizes: dict[str, int] = {}
        avals = [*op.in_avals, *op.out_avals]
        for dims, aval in zip((*operands, *results), avals, strict=True):
            _bind_sizes(text, dims, aval.shape, sizes)
        passing = {n for dims in results for names in dims for n in names}
        factors = {
            name: Factor(size, Kind.FIXED)
            if name in fixed_names
            else Factor(size)
            if name in passing
            else Factor(size, Kind.REDUCE, reduce)
            for name, size in sizes.items()
        }
        return Rule(operands, results, factors)

    def decorate(primitive: Any) -> Any:
        register(primitive, replace=replace)(build)
        return primitive

    return decorate


def _parse_side(side: str) -> tuple[Dims, ...]:
    return tuple(_parse_dims(part) for part in side.split(","))


def _parse_dims(part: str) -> Dims:
    dims: list[tuple[str, ...]] = []
    group: list[str] | None = None
    for token in part.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            group = []
        elif token == ")" and group is not None:
            dims.append(tuple(group))
            group = None
        elif group is not None:
            group.append(token)
        else:
            dims.append(() if token == "1" else (token,))
    return tuple(dims)


def _bind_sizes(text: str, dims: Dims, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    if len(dims) != len(shape):
        raise RuleError(
            Problem(
                f"rule {text!r} has {len(dims)} dims for an array of shape {shape}",
                f"the array has {len(shape)} dims",
                "name every dim of every operand and result",
            )
        )
    for names, n in zip(dims, shape, strict=True):
        if len(names) == 1 and sizes.setdefault(names[0], n) != n:
            raise RuleError(
                Problem(
                    f"rule {text!r} calls dims of sizes {sizes[names[0]]} and {n} {names[0]!r}",
                    "one factor has one size",
                    "give the two dims different names",
                )
            )
    for names, n in zip(dims, shape, strict=True):
        unknown = [name for name in names if name not in sizes]
        known = 1
        for name in names:
            known *= sizes.get(name, 1)
        if len(names) > 1 and len(unknown) == 1 and n % known == 0:
            sizes[unknown[0]] = n // known
