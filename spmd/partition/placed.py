"""Where the tensors of an equation lie when mesh axes shard its factors.

What follows from the declaration of a rule alone is worked out once for all layers that repeat.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from sharding.mesh import MeshShape, axes_size
from sharding.project import expressible, to_dims, to_factors
from sharding.rule import Kind, Rule
from sharding.spec import Layout
from spmd.partition.plan import Assignment
from spmd.partition.tensor import Tensor, linear_group


class _Placed(NamedTuple):
    """Layouts of operands, those that are carried as partial not counted, and of results; points
    of the iteration space on one device."""

    operands: tuple[Layout, ...]
    results: tuple[Layout, ...]
    points: float


def needs(
    rule: Rule, assignment: Assignment, operands: Sequence[Tensor], mesh: MeshShape
) -> tuple[Layout, ...]:
    """The layout that every operand must have under an assignment."""
    found = _placed(rule.canonical, assignment, mesh).operands
    if not assignment.carried:
        return found
    group = linear_group(rule, assignment.carried, operands, False)
    group = group or linear_group(rule, assignment.carried, operands, True) or ()
    carried = tuple((a, "add") for a in assignment.carried)
    return tuple(
        Layout(layout.dims, carried) if i in group else layout for i, layout in enumerate(found)
    )


def makes(rule: Rule, assignment: Assignment, mesh: MeshShape) -> tuple[Layout, ...]:
    """The layout that every result has under an assignment: partial over reduced factors."""
    return _placed(rule.canonical, assignment, mesh).results


def flops(rule: Rule, assignment: Assignment, mesh: MeshShape) -> float:
    """Floating-point operations of one device, those on padding included."""
    return _placed(rule.canonical, assignment, mesh).points * rule.flops


@lru_cache(maxsize=1 << 16)
def _placed(rule: Rule, assignment: Assignment, mesh: MeshShape) -> _Placed:
    partial = [(a, "add") for a in assignment.carried]
    for name, axes in assignment.factors:
        factor = rule.factors[name]
        if factor.kind is Kind.REDUCE:
            partial += [(a, factor.monoid) for a in axes]
    rest = {n: a for n, a in assignment.factors if rule.factors[n].kind is not Kind.PERMUTE}
    dims = [to_dims(rule, t, rest if t in assignment.whole else assignment.axes, mesh)
            for t in range(len(rule.tensors))]  # fmt: skip
    first = len(rule.operands)
    return _Placed(
        tuple(map(Layout, dims[:first])),
        tuple(Layout(found, tuple(sorted(partial))) for found in dims[first:]),
        _points(rule, assignment.axes, mesh),
    )


def _points(rule: Rule, factors: Mapping[str, tuple[str, ...]], mesh: MeshShape) -> float:
    count = 1.0
    for name, factor in rule.factors.items():
        if factor.kind is not Kind.FIXED:
            count *= -(-factor.size // axes_size(mesh, factors.get(name, ())))
    return count


def expected(
    rule: Rule, operand: int, operands: Sequence[Layout], results: Sequence[Layout],
    mesh: MeshShape,
) -> Layout:  # fmt: skip
    """The layout that an equation is likely to need of an operand: results decide the passing
    factors, operands the reduced ones."""
    return _expected(rule.canonical, operand, tuple(operands), tuple(results), mesh)


@lru_cache(maxsize=1 << 16)
def _expected(
    rule: Rule, operand: int, operands: tuple[Layout, ...], results: tuple[Layout, ...],
    mesh: MeshShape,
) -> Layout:  # fmt: skip
    factors: dict[str, tuple[str, ...]] = {}
    for r, layout in enumerate(results):
        factors.update(to_factors(rule, len(operands) + r, layout.dims, mesh))
    taken = {a for axes in factors.values() for a in axes}
    for i, layout in enumerate(operands):
        for name, axes in to_factors(rule, i, layout.dims, mesh).items():
            if rule.factors[name].kind is Kind.REDUCE and taken.isdisjoint(axes):
                factors.setdefault(name, axes)
    return Layout(to_dims(rule, operand, factors, mesh))


def forced(rule: Rule, result: Layout, mesh: MeshShape) -> Assignment:
    """The assignment that makes exactly `result`: for annotations, and values made from nothing."""
    return _forced(rule.canonical, result.dims, mesh)


@lru_cache(maxsize=1 << 16)
def _forced(rule: Rule, dims: tuple[tuple[str, ...], ...], mesh: MeshShape) -> Assignment:
    factors = to_factors(rule, len(rule.operands), dims, mesh)
    found = {n: a for n, a in factors.items() if rule.factors[n].kind is not Kind.FIXED}
    return Assignment(tuple(found.items()) if legal(rule, found, mesh) else ())


def legal(rule: Rule, factors: Mapping[str, tuple[str, ...]], mesh: MeshShape) -> bool:
    """Whether every tensor can lie so: dims in even shards where they must be, and contiguous; and
    no factor is rather left whole, see `Rule.gathers`."""
    if rule.picky and rule.gathers({n: axes_size(mesh, a) for n, a in factors.items() if a}):
        return False
    if rule.simple:
        return True
    for name, axes in factors.items():
        if name in rule.even and rule.factors[name].size % axes_size(mesh, axes):
            return False
    return all(expressible(rule, t, factors, mesh) for t in range(len(rule.tensors)))
