"""Which axes shard which factors of an equation: the one place where results, operands and cost
meet.

Every mesh axis that an operand or the wanted result uses may go to a factor, to none, or stay
carried as partial. Among the legal assignments the one with the cheapest reshards and local work
is taken; results decide ties.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise, product
from math import prod
from typing import NamedTuple

from sharding.mesh import MeshShape, axes_size, axis_size, overlap
from sharding.project import to_dims, to_factors
from sharding.rule import Kind, Rule
from sharding.spec import Layout
from spmd import cost
from spmd.partition.placed import flops, legal, makes, needs
from spmd.partition.plan import Assignment, shards_of
from spmd.partition.reshard import local_bytes, plan
from spmd.partition.tensor import Tensor, can_carry, carriable

_CARRY = "(carried)"
_NONE = ""
_MAX_CANDIDATES = 512
_REDUCTIONS = ("all_reduce", "reduce_scatter", "slice")


def choose(
    rule: Rule, operands: tuple[Tensor, ...], results: tuple[Tensor, ...], mesh: MeshShape
) -> Assignment:
    """The cheapest legal assignment; memoised, since layers repeat."""
    return _choose(rule.canonical, operands, results, mesh)[0]


def costs(
    rule: Rule, operands: tuple[Tensor, ...], results: tuple[Tensor, ...], mesh: MeshShape
) -> tuple[Assignment, float]:
    """What `choose` chooses, and its cost: reshards and local work."""
    return _choose(rule.canonical, operands, results, mesh)


def weighed(
    rule: Rule, operands: Sequence[Tensor], results: Sequence[Tensor], mesh: MeshShape
) -> list[tuple[Assignment, float]]:
    """What `choose` chooses among: every legal assignment with its cost, the cheapest first."""
    found = dict.fromkeys(_candidates(rule, operands, results, mesh))
    costs = [(a, _cost(rule, a, operands, results, mesh, float("inf"))) for a in found]
    return sorted(costs, key=lambda pair: pair[1])


class Alternatives(NamedTuple):
    """What an equation costs when it makes its result whole, and when it leaves it partial.

    Attributes:
      alone: the cheapest way to the wanted result, reduction included.
      partial: the cheapest way to a partial result, its reduction left out.
      reduction: from that partial result to the wanted one.
      made: the layout of that partial result.
    """

    alone: float
    partial: float
    reduction: float
    made: Layout


def alternatives(
    rule: Rule, operands: tuple[Tensor, ...], result: Tensor, mesh: MeshShape
) -> Alternatives | None:
    """The two ways of an equation with one result; None where it cannot leave it partial."""
    return _alternatives(rule.canonical, operands, result, mesh)


@lru_cache(maxsize=1 << 16)
def _choose(
    rule: Rule, operands: tuple[Tensor, ...], results: tuple[Tensor, ...], mesh: MeshShape
) -> tuple[Assignment, float]:
    best, best_cost = None, float("inf")
    for assignment in _candidates(rule, operands, results, mesh):
        total = _cost(rule, assignment, operands, results, mesh, best_cost)
        if total < best_cost:
            best, best_cost = assignment, total
    assert best is not None, "the empty assignment is always legal"
    return best, best_cost


@lru_cache(maxsize=1 << 14)
def _alternatives(
    rule: Rule, operands: tuple[Tensor, ...], result: Tensor, mesh: MeshShape
) -> Alternatives | None:
    infinite = float("inf")
    alone = partial = reduction = infinite
    best = result.layouts[0]
    unread = result._replace(used=False)
    for assignment in _candidates(rule, operands, (result,), mesh):
        alone = min(alone, _cost(rule, assignment, operands, (result,), mesh, alone))
        (made,) = makes(rule, assignment, mesh)
        if made.partial:
            total = _cost(rule, assignment, operands, (unread,), mesh, partial)
            if total < partial:
                partial, best = total, made
                wanted = result.layouts[0]
                reduction = plan(made, wanted, result.shape, result.itemsize, mesh).cost
    return None if partial == infinite else Alternatives(alone, partial, reduction, best)


def _candidates(
    rule: Rule, operands: Sequence[Tensor], results: Sequence[Tensor], mesh: MeshShape
) -> Iterator[Assignment]:
    """Legal assignments, those that keep the wanted result first; of these, where it is decided
    what the result carries, those that do."""
    carried = results[0].carried if len(results) == 1 else None
    if carried is None:
        yield from _all_candidates(rule, operands, results, mesh, False)
        return
    found = list(_all_candidates(rule, operands, results, mesh, bool(carried)))
    yield from [a for a in found if a.carried == carried] or found


def _all_candidates(
    rule: Rule, operands: Sequence[Tensor], results: Sequence[Tensor], mesh: MeshShape, mixed: bool
) -> Iterator[Assignment]:
    options = _Options(rule)
    # A tie is decided by the order: carrying a partial value first, since later sums can share
    # its reduction, then what the result wants.
    for axis in carriable(rule, operands, mixed):
        options.factors.setdefault(axis, {})[_CARRY] = None
    for r, tensor in enumerate(results):
        options.note(to_factors(rule, len(operands) + r, tensor.layouts[0].dims, mesh), True)
    for i, tensor in enumerate(operands):
        for layout in tensor.layouts:
            options.note(to_factors(rule, i, layout.dims, mesh), False)
    for axis in options.displaced:
        for name in _refuges(rule, axis, mesh):
            options.offer(axis, name)
    axes = list(options.factors)
    for pruned in (True, False):
        found = False
        for combo in product(*options.choices(pruned)):
            assignment = _assemble(rule, axes, combo, options.order)
            carries = can_carry(rule, assignment.carried, operands, mixed) and _apart(assignment)
            assignment = _without_gathered(rule, assignment, operands, mesh)
            assignment = _where_whole(rule, assignment, operands, results, mesh)
            if carries and legal(rule, assignment.axes, mesh):
                found = True
                yield from (assignment, *options.swapped(assignment))
        if found:
            break  # else what the result wants cannot be had all at once: a part of it
    yield Assignment(())


def _without_gathered(
    rule: Rule, assignment: Assignment, operands: Sequence[Tensor], mesh: MeshShape
) -> Assignment:
    """Less the factors along which the operands are gathered rather than anything exchanged."""
    if not rule.picky:
        return assignment
    free = frozenset(
        i for i, tensor in enumerate(operands)
        if tensor.anywhere or not all(layout.used for layout in tensor.layouts)
    )  # fmt: skip
    whole = rule.gathers(shards_of(assignment, mesh), free)
    if not whole:
        return assignment
    return assignment._replace(factors=tuple(f for f in assignment.factors if f[0] not in whole))


def _where_whole(
    rule: Rule, assignment: Assignment, operands: Sequence[Tensor], results: Sequence[Tensor],
    mesh: MeshShape,
) -> Assignment:  # fmt: skip
    """Operands that are whole anyway along what is sharded stay so: each device takes its part of
    them, where others would have it from their neighbours."""
    if not rule.fetches:
        return assignment
    along = {t: dict[str, None]() for t in rule.fetches}
    for name, axes in assignment.factors:
        if rule.factors[name].kind is Kind.PERMUTE:
            for t, _ in rule.where[name]:
                along.get(t, {}).update(dict.fromkeys(axes))
    made = prod(results[0].shape)
    whole = tuple(
        t for t, axes in along.items() if axes and (
            _little(operands[t], made // axes_size(mesh, tuple(axes)))
            if operands[t].anywhere else _is_whole(operands[t], axes)
        )
    )  # fmt: skip
    return assignment._replace(whole=whole)


def _little(tensor: Tensor, elements: int) -> bool:
    """Whether what is made from nothing is no more, whole, than a device's part of the result."""
    return prod(tensor.shape) <= elements


def _is_whole(tensor: Tensor, along: Collection[str]) -> bool:
    """Whether a value is at hand without any of some axes."""
    return any(not any(overlap(a, b) for b in layout.used for a in along)
               for layout in tensor.layouts)  # fmt: skip


def _apart(assignment: Assignment) -> bool:
    """Whether no axis is used beside a part of itself: a layout at hand may be split further."""
    axes = [a for _, found in assignment.factors for a in found] + list(assignment.carried)
    parts = [a for a in axes if ":" in a]
    return not any(a != part and overlap(a, part) for part in parts for a in axes)


class _Options:
    """What every mesh axis may shard.

    Attributes:
      factors: axis -> factors it may go to, the preferred first.
      order: factor -> axes that may go to it, major to minor.
      wanted: (axis, factor) pairs of the wanted results.
      displaced: axes on dims that must be whole.
      beside: pairs of axes that share a factor somewhere, in the order of `order`.
    """

    def __init__(self, rule: Rule):
        self.rule = rule
        self.factors: dict[str, dict[str, None]] = {}
        self.order: dict[str, list[str]] = {}
        self.wanted: set[tuple[str, str]] = set()
        self.displaced: dict[str, None] = {}
        self.beside: set[frozenset[str]] = set()

    def offer(self, axis: str, name: str) -> None:
        self.factors.setdefault(axis, {})[name] = None
        if axis not in self.order.setdefault(name, []):
            self.order[name].append(axis)

    def note(self, found: Mapping[str, tuple[str, ...]], is_result: bool) -> None:
        """What the layout of one tensor means for the factors."""
        for name, axes in found.items():
            self.beside |= set(map(frozenset, pairwise(axes)))
            for axis in axes:
                if self.rule.factors[name].kind is Kind.FIXED:
                    self.displaced[axis] = None
                    continue
                self.offer(axis, name)
                if is_result:
                    self.wanted.add((axis, name))

    def swapped(self, assignment: Assignment) -> Iterator[Assignment]:
        """With two axes of a factor the other way round, where they come to it from two sides: to
        one of them it may be the shorter way."""
        for i, (name, axes) in enumerate(assignment.factors):
            if len(axes) == 2 and frozenset(axes) not in self.beside:
                other = (name, axes[::-1])
                factors = (*assignment.factors[:i], other, *assignment.factors[i + 1 :])
                yield assignment._replace(factors=factors)

    def choices(self, pruned: bool) -> list[list[str]]:
        """Per axis the factors to try, not too many in all.

        Args:
          pruned: without leaving an axis out, where that can only cost.
        """
        wanted = self.wanted if pruned else set()
        found = [_prune(axis, list(names), wanted) for axis, names in self.factors.items()]
        if prod(map(len, found)) > _MAX_CANDIDATES:
            found = [names[:2] for names in found]
        return found


def _refuges(rule: Rule, axis: str, mesh: MeshShape) -> list[str]:
    """Factors that can take an axis from a dim that must be whole: an all-to-all there (and back)
    instead of a gather. The largest two; uneven ones would leave devices idle."""
    shards = axis_size(mesh, axis)
    free = [
        (factor.size, name) for name, factor in rule.factors.items()
        if factor.kind is Kind.PASS and factor.size and factor.size % shards == 0
        and len({t for t, _ in rule.where[name]}) > 1
    ]
    return [name for _, name in sorted(free, key=lambda f: -f[0])[:2]]


def _prune(axis: str, factors: list[str], wanted: set[tuple[str, str]]) -> list[str]:
    """Drops "no factor" where it can only cost: one factor, wanted by the result, no reduction."""
    if len(factors) == 1 and (axis, factors[0]) in wanted:
        return factors
    return [*factors, _NONE]


def _assemble(
    rule: Rule, axes: Sequence[str], combo: Sequence[str], order: dict[str, list[str]]
) -> Assignment:
    chosen = dict(zip(axes, combo, strict=True))
    factors = []
    for name, ordered in order.items():
        taken = tuple(a for a in ordered if chosen.get(a) == name)
        if taken:
            factors.append((name, taken))
    carried = tuple(sorted(a for a, name in chosen.items() if name == _CARRY))
    return Assignment(tuple(factors), carried)


def _cost(
    rule: Rule, assignment: Assignment, operands: Sequence[Tensor], results: Sequence[Tensor],
    mesh: MeshShape, limit: float,
) -> float:  # fmt: skip
    """Reshards of operands and (towards what is wanted) of results, and local work."""
    made = makes(rule, assignment, mesh)
    needed = needs(rule, assignment, operands, mesh)
    touched = _touched(rule, needed, made, operands, results, mesh)
    total = cost.compute(flops(rule, assignment, mesh), touched)
    if assignment.carried and rule.flops == 1:
        # Elementwise work on a value that stays partial is left out: a later sum may share the
        # reduction, and carrying must not lose to reducing here by a rounding of the work.
        total = 0.0
    for layout, tensor in zip(made, results, strict=True):
        if tensor.used:
            wanted = tensor.layouts[0]
            reshard = plan(layout, wanted, tensor.shape, tensor.itemsize, mesh)
            # A sum shares the reduction of its addends, not what else brings them into place.
            shared = layout.partial and all(s.kind in _REDUCTIONS for s in reshard.steps)
            brought = reshard.cost * (tensor.share(wanted) if shared else 1.0)
            total += min(brought, _passed_on(layout, tensor, brought, mesh))
        if total >= limit:
            return total
    for need, tensor in zip(needed, operands, strict=True):
        total += tensor.share(need) * cheapest(tensor, need, mesh)
        if tensor.late and need != tensor.layouts[0]:
            held = local_bytes(need, tensor.shape, tensor.itemsize, mesh)
            total += held / cost.HELD_PER_LINK_BYTE
        if total >= limit:
            return total
    return total


def _touched(
    rule: Rule, needed: Sequence[Layout], made: Sequence[Layout], operands: Sequence[Tensor],
    results: Sequence[Tensor], mesh: MeshShape,
) -> int:  # fmt: skip
    """Bytes that one device reads: of what rows are taken from, as many as they have."""
    read = [local_bytes(at, t.shape, t.itemsize, mesh)
            for at, t in zip(needed, operands, strict=True)]  # fmt: skip
    picks = not rule.flops and not rule.early and len(results) == 1
    if picks and results[0].shape != operands[0].shape:
        rows = local_bytes(made[0], results[0].shape, results[0].itemsize, mesh)
        read[0] = min(read[0], rows)
    return sum(read)


def _passed_on(layout: Layout, tensor: Tensor, brought: float, mesh: MeshShape) -> float:
    """What it costs to bring what the readers of a result make of it to where that is wanted, and
    not the result; `brought` for each that cannot read it where it is."""
    if layout.partial or not tensor.passed:
        return brought
    total = 0.0
    for rule, operand, shape, itemsize, wanted in tensor.passed:
        factors = to_factors(rule, operand, layout.dims, mesh)
        passes = all(rule.factors[name].kind is Kind.PASS for name in factors)
        if not passes or to_dims(rule, operand, factors, mesh) != layout.dims:
            return brought
        made = Layout(to_dims(rule, len(rule.operands), factors, mesh))
        total += plan(made, wanted, shape, itemsize, mesh).cost
    return total


def cheapest(tensor: Tensor, need: Layout, mesh: MeshShape) -> float:
    """Cost of the cheapest reshard from any layout at hand."""
    if need in tensor.layouts or tensor.anywhere:
        return 0.0
    return min(
        plan(layout, need, tensor.shape, tensor.itemsize, mesh).cost
        for layout in tensor.layouts
    )
