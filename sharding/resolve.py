"""Conflict policy: which proposal goes first when two want the same axis or the same factor.

A policy is a tuple of small pure functions; the first that tells two proposals apart decides, and
its name is the reason that the loser is recorded with.
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

from sharding.rule import Kind


class Proposal(NamedTuple):
    """Axes for a factor, from one tensor of an equation.

    Attributes:
      factor, kind: of the rule.
      axes: proposed, major to minor.
      tensor: index of the source; results are numbered after operands.
      is_result: whether the source is a result.
      elements: global number of elements of the source; and of the results, of the factor that
        reaches furthest: there they would have to be moved back, see `reach.Reach`.
    """

    factor: str
    kind: Kind
    axes: tuple[str, ...]
    tensor: int
    is_result: bool
    elements: int


Strategy = Callable[[Proposal], object]


def passing_before_reduced(p: Proposal) -> object:
    """Sharding a passing factor costs no reduction."""
    return p.kind is not Kind.PASS


def larger_source_first(p: Proposal) -> object:
    """The loser is gathered: let it be the smaller tensor."""
    return -p.elements


def results_before_operands(p: Proposal) -> object:
    """Results decide factors: a reshard of an operand is one collective, of a result two."""
    return not p.is_result


def position(p: Proposal) -> object:
    """Only to be deterministic."""
    return (p.tensor, p.factor)


POLICY: tuple[Strategy, ...] = (
    passing_before_reduced,
    larger_source_first,
    results_before_operands,
    position,
)


def rank(proposal: Proposal) -> tuple[object, ...]:
    """Sort key: the smaller goes first."""
    return tuple(strategy(proposal) for strategy in POLICY)


def apart(proposals: Collection[Proposal]) -> bool:
    """Whether no two want the same axis, or parts of one."""
    names = [axis.partition(":")[0] for p in proposals for axis in {*p.axes}]
    return len(proposals) < 2 or len(names) == len(set(names))


def tied(a: Proposal, b: Proposal) -> bool:
    """Whether nothing but their order decides."""
    return rank(a)[:-1] == rank(b)[:-1]


def reason(winner: Proposal, loser: Proposal) -> str:
    """Name and meaning of the strategy that decided."""
    for strategy in POLICY:
        if strategy(winner) != strategy(loser):
            return f"{strategy.__name__}: {strategy.__doc__}"
    return position.__name__
