"""What an equation to be decided reads and makes, and which partial operands it can carry."""

from collections.abc import Sequence
from typing import NamedTuple

from sharding.rule import Kind, Rule
from sharding.spec import Layout

# Readers of a reshard that is paid for by others, or by all together.
FREE = 1 << 30


class Reader(NamedTuple):
    """An operation that reads a result: its (canonical) rule, which operand that is, and what is
    wanted of its own result."""

    rule: Rule
    operand: int
    shape: tuple[int, ...]
    itemsize: int
    wanted: Layout


class Tensor(NamedTuple):
    """An operand or result of the equation to be decided.

    Attributes:
      shape: global.
      itemsize: bytes per element.
      layouts: operand: layouts at hand, the first as it was made. result: the wanted one.
      readers: operand: how many operations are expected to read it in a layout, where more than
        one; they share the cost of bringing it there. result: readers of its reduction likewise.
      used: result: whether anything reads it.
      anywhere: operand: it is made from nothing, in any layout.
      carried: result: the axes over which its operation carries partial operands, where that is
        decided (`sums`): then a whole addend of a partial one becomes partial too.
      late: operand: what others needed of it they read long before, see `planner`.
      passed: result: all its readers, where nothing says where it should be: they may read it
        elsewhere, and make less of it.
    """

    shape: tuple[int, ...]
    itemsize: int
    layouts: tuple[Layout, ...]
    readers: tuple[tuple[Layout, int], ...] = ()
    used: bool = True
    anywhere: bool = False
    carried: tuple[str, ...] | None = None
    passed: tuple[Reader, ...] = ()
    late: bool = False

    def share(self, need: Layout) -> float:
        """The part of a reshard's cost that one reader bears."""
        return 1.0 / next((n for layout, n in self.readers if layout == need), 1)


def needs_whole(rule: Rule) -> bool:
    """Whether an operation has dims that must not be sharded."""
    return any(factor.kind is Kind.FIXED for factor in rule.factors.values())


def carriable(rule: Rule, operands: Sequence[Tensor], mixed: bool) -> list[str]:
    """Axes over which some linear group of operands is partial by add."""
    axes: dict[str, None] = {}
    for tensor in operands:
        for axis, monoid in tensor.layouts[0].partial:
            if monoid == "add" and linear_group(rule, (axis,), operands, mixed) is not None:
                axes[axis] = None
    return list(axes)


def linear_group(
    rule: Rule, carried: tuple[str, ...], operands: Sequence[Tensor], mixed: bool
) -> tuple[int, ...] | None:
    """The group of operands that carries all these axes; None where there is none.

    Args:
      mixed: one partial operand is enough; the others of its group become partial.
    """
    if not carried:
        return None
    enough = any if mixed else all
    for group in rule.linear:
        if enough(
            all((a, "add") in operands[i].layouts[0].partial for a in carried) for i in group
        ):
            return group
    return None


def can_carry(
    rule: Rule, carried: tuple[str, ...], operands: Sequence[Tensor], mixed: bool
) -> bool:
    """Whether there is such a group, or no need of one."""
    return not carried or linear_group(rule, carried, operands, mixed) is not None
