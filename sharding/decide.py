"""What one equation decides: which of its tensors' shardings are extended, and what is refused.

A pure function of the equation's rule and of what is known of its tensors. Layers that repeat ask
the same again: every answer is kept.
"""

from collections.abc import Sequence
from math import gcd, prod
from typing import Any, NamedTuple

from sharding.mesh import MeshShape, axes_size, axis_size, split_axis
from sharding.project import Axes, clashes, expressible, extension, to_dims, to_factors
from sharding.resolve import Proposal, apart, rank, reason, tied
from sharding.rule import Kind, Rule

LEVELS = (
    "pointwise, reshape, transpose and data-flow edges",
    "passing factors, of each axis of the arguments along the dim that reaches furthest",
    "passing factors of every operation",
    "reduced factors; minor dims where several are made one",
    "broadcasts forward",
)
FURTHEST, REDUCE, JOINED, BROADCAST, KEPT = 1, 3, 3, 4, 4
SCATTERED = "the shards would not be contiguous"
# Elements of rows that are taken from others, from which on they keep their axes. What is made of
# them is then done in parts, and gradients are reduced in every step of a loop: with 6 FLOPs and 8
# bytes per row and parameter that pays from some thousand rows (tokens) on, of which each has more.
WORTH_KEEPING = 1 << 16


class State(NamedTuple):
    """What is known of one value.

    Attributes:
      dims: mesh axes per dim, major to minor.
      open: whether a dim may take further ones, per dim.
      reserved: axes that an annotation of the value wants, or keeps from it.
    """

    dims: tuple[Axes, ...]
    open: tuple[bool, ...]
    reserved: Axes = ()


class Case(NamedTuple):
    """An equation, or an edge across a region's boundary, apart from where in the program it is.

    Attributes:
      rule: canonical.
      shapes: of its tensors.
      same: per tensor the first one that is the same value.
      reach: per factor how far it reaches, in the order of the equation's factors: 0 is least.
      first: per factor the axes that go along its dim first, see `reach.furthest`.
    """

    rule: Rule
    shapes: tuple[tuple[int, ...], ...]
    same: tuple[int, ...]
    reach: tuple[int, ...]
    first: tuple[Axes, ...]


class Extension(NamedTuple):
    """Dim `dim` of tensor `tensor` takes `taken`, after which its axes are `axes`."""

    tensor: int
    dim: int
    axes: Axes
    taken: Axes
    proposal: Proposal


class Refusal(NamedTuple):
    """Dim `dim` of tensor `tensor` does not take what is proposed, or not all of it."""

    tensor: int
    dim: int
    proposal: Proposal
    why: str


class Decision(NamedTuple):
    """What an equation decides.

    Attributes:
      contested: whether two proposals want the same axis on one tensor, and wait; then whether
        nothing but their order would tell them apart. None: none do.
    """

    extensions: tuple[Extension, ...]
    refusals: tuple[Refusal, ...]
    contested: bool | None


class Decider:
    """Decides for equations; remembers what it has decided.

    Args:
      mesh: of the axes.
      first: axes that have a dim along which they go first.
    """

    def __init__(self, mesh: MeshShape, first: Axes):
        self._mesh, self._first = mesh, first
        self._states: dict[State, int] = {}
        self._cases: dict[tuple[Any, ...], int] = {}
        self.states: list[State] = []
        self.cases: list[Case] = []
        self._known: dict[tuple[int, ...], Decision] = {}

    def state(self, state: State) -> int:
        """The number of a state: its index in `states`."""
        number = self._states.setdefault(state, len(self.states))
        if number == len(self.states):
            self.states.append(state)
        return number

    def case(self, case: Case) -> int:
        """The number of a case: its index in `cases`."""
        number = self._cases.setdefault((id(case.rule), *case[1:]), len(self.cases))
        if number == len(self.cases):
            self.cases.append(case)  # which keeps the rule alive, so that its id stays its own
        return number

    def decide(self, case: int, states: Sequence[int], level: int, now: bool) -> Decision:
        """What an equation decides.

        Args:
          case: its number.
          states: those of its tensors, as numbers.
          level: index in `LEVELS`.
          now: whether the stronger of two that want the same axis gets it, or both wait.
        """
        key = (case, level, now, *states)
        found = self._known.get(key)
        if found is None:
            known = [self.states[number] for number in states]
            found = _Deciding(self.cases[case], known, level, self._mesh, self._first).run(now)
            self._known[key] = found
        return found


class _Deciding:
    """One decision being made.

    Attributes:
      dims: axes per dim of the tensors, as they are extended.
      factors: axes per factor, per tensor.
    """

    def __init__(
        self, case: Case, states: Sequence[State], level: int, mesh: MeshShape, first: Axes
    ):
        self.case, self.rule, self.states = case, case.rule, states
        self.level, self.mesh, self.first = level, mesh, first
        self.dims = [state.dims for state in states]
        self.factors = [
            to_factors(case.rule, t, dims, mesh) if any(dims) else {}
            for t, dims in enumerate(self.dims)
        ]
        self.extensions: list[Extension] = []
        self.refusals: list[Refusal] = []

    def run(self, now: bool) -> Decision:
        best = self.proposals()
        clashing: list[tuple[Proposal, Proposal, int]] = []
        if not apart(best):
            best = self.weighed(best)
            clashing = self.clashing(best)
        late = self.late(best)
        contested = None
        if now:  # but for what a stronger one wants, which has its turn later
            waiting = {(q.factor, t) for p, q, t in clashing if p.factor in late}
        else:
            waiting = {(x.factor, t) for p, q, t in clashing for x in (p, q)}
            if clashing:
                contested = any(tied(p, q) for p, q, _ in clashing)
        for proposal in best:
            if proposal.factor in late or proposal.kind is Kind.REDUCE and self.level < REDUCE:
                continue
            for t, d in self.rule.where[proposal.factor]:
                if t != proposal.tensor and (proposal.factor, t) not in waiting:
                    self.push(proposal, t, d)
        if self.level == KEPT and self.rule.keeps:
            self.keep()
        return Decision(tuple(self.extensions), tuple(self.refusals), contested)

    def proposals(self) -> list[Proposal]:
        """The winning proposal of every factor, strongest first."""
        operands = len(self.rule.operands)
        best: dict[str, Proposal] = {}
        spread = self.rule.spread if self.level < BROADCAST else ()
        for t, found in enumerate(self.factors):
            for name, axes in found.items() if t not in spread else ():
                kind = self.rule.factors[name].kind
                if kind is Kind.FIXED:
                    continue
                new = Proposal(name, kind, axes, t, t >= operands, prod(self.case.shapes[t]))
                old = best.get(name)
                if old is None:
                    best[name] = new
                elif old.axes != new.axes:
                    best[name] = self.stronger(old, new)
        return sorted(best.values(), key=rank) if len(best) > 1 else list(best.values())

    def keep(self) -> None:
        """Rows that are taken get the axes of those that they are taken from."""
        for name, into in self.rule.keeps.items():
            for t, _ in self.rule.where[name]:
                axes = self.factors[t].get(name, ())
                for r, d in self.rule.where[into] if axes else ():
                    dims = self.dims[self.case.same[r]]
                    used, shape = self.used(r), self.case.shapes[r]
                    free = not dims[d] and self.states[r].open[d] and prod(shape) >= WORTH_KEEPING
                    even = shape[d] % axes_size(self.mesh, axes) == 0
                    if r != t and free and even and not any(clashes(a, used) for a in axes):
                        found = Proposal(name, Kind.PASS, axes, t, t >= len(self.rule.operands),
                                         prod(self.case.shapes[t]))  # fmt: skip
                        self.factors[r][into] = axes
                        self.extend(found, r, d, axes)

    def stronger(self, old: Proposal, new: Proposal) -> Proposal:
        """The longer of two that agree; by policy where they do not."""
        if extension(old.axes, new.axes, self.mesh) is not None:
            return new
        if extension(new.axes, old.axes, self.mesh) is not None:
            return old
        winner, loser = sorted((old, new), key=rank)
        d = self.dim(loser.factor, winner.tensor)
        self.refusals.append(Refusal(winner.tensor, d, loser, reason(winner, loser)))
        return winner

    def weighed(self, best: list[Proposal]) -> list[Proposal]:
        """Proposals that want one axis, the strongest first: for those that reach furthest the
        results count, which would have to move back."""
        order = dict(zip(self.rule.factors, self.case.reach, strict=True))
        furthest = max(order[p.factor] for p in best)
        results = sum(prod(shape) for shape in self.case.shapes[len(self.rule.operands) :])
        found = [
            p._replace(elements=p.elements + results) if order[p.factor] == furthest else p
            for p in best
        ]
        return sorted(found, key=rank)

    def clashing(self, best: list[Proposal]) -> list[tuple[Proposal, Proposal, int]]:
        """Pairs, the stronger first, that want one of the same axes on a tensor. Those of factors
        that are reduced count at every level: what they want must not be taken unseen."""
        found = []
        for i, q in enumerate(best):
            for p in best[:i]:
                if not any(clashes(axis, p.axes) for axis in q.axes):
                    continue
                for t in {t for t, _ in self.rule.where[q.factor]}.intersection(
                    t for t, _ in self.rule.where[p.factor]
                ):
                    if all(self.wants(t, x) for x in (p, q)):
                        found.append((p, q, t))
        return found

    def wants(self, t: int, p: Proposal) -> bool:
        """Whether a proposal would extend a tensor, were it alone."""
        if t == p.tensor or not self.states[t].open[self.dim(p.factor, t)]:
            return False
        current = self.factors[t].get(p.factor, ())
        more = extension(current, p.axes, self.mesh)
        return bool(more) and bool(self.takeable(p, t, current, more)[0])

    def late(self, best: list[Proposal]) -> set[str]:
        """Factors whose proposals count, but do not go anywhere yet."""
        if self.level != FURTHEST or self.rule.early:
            return set()
        mine = dict(zip(self.rule.factors, self.case.first, strict=True))
        return {
            p.factor for p in best
            if any(axis not in mine[p.factor] and clashes(axis, p.axes) for axis in self.first)
        }

    def push(self, proposal: Proposal, t: int, d: int) -> None:
        """Extends dim `d` of tensor `t` towards the proposal, as far as it is legal."""
        current = self.factors[t].get(proposal.factor, ())
        more = extension(current, proposal.axes, self.mesh)
        if more is None:
            why = f"it is sharded over {'+'.join(current)}"
        elif not more or self.elsewhere(proposal, t, more) or self.kept(proposal.factor, more):
            return
        elif not self.states[t].open[d]:
            why = "the dim is closed by an annotation"
        else:
            taken, why = self.takeable(proposal, t, current, more)
            if taken:
                self.factors[t][proposal.factor] = current + taken
                self.extend(proposal, t, d, taken)
            if why == SCATTERED and self.rule.tensors[t][d][0] in self.rule.alone:
                if self.level < JOINED or self.joined(proposal, t, d, more[len(taken) :]):
                    why = ""
        if why:
            self.refusals.append(Refusal(t, d, proposal, why))

    def joined(self, proposal: Proposal, t: int, d: int, more: Axes) -> bool:
        """Extends a dim that is several dims of an operand in one by axes of a minor one of these,
        after those of the major ones. The operand then has them on its major dims for the
        operation, after an all-to-all; else they would be gathered, and what follows repeated.

        Not the other way round: an operand that is whole is cut in place.
        """
        dims, operands = self.dims[self.case.same[t]], len(self.rule.operands)
        used = self.used(t)
        if proposal.tensor >= operands or t < operands or any(clashes(a, used) for a in more):
            return False
        taken = self.divided(t, d, more[0]) if len(more) == 1 else more
        new = (*dims[:d], (*dims[d], *taken), *dims[d + 1 :])
        found = to_factors(self.rule, t, new, self.mesh)
        if not self.expressed(proposal.tensor, t, d, found, new):
            return False
        self.factors[t] = found
        self.extend(proposal, t, d, taken)
        return True

    def divided(self, t: int, d: int, axis: str) -> Axes:
        """An axis as far as it fits into the major factors of a dim; the rest, its major part, is
        where it was."""
        for name in self.rule.tensors[t][d]:
            if name in self.rule.alone:
                continue
            size, shards = self.rule.factors[name].size, axis_size(self.mesh, axis)
            room = size // axes_size(self.mesh, self.factors[t].get(name, ()))
            if room > 1:
                fits = gcd(room, shards)
                parts = split_axis(self.mesh, axis, shards // fits) if 1 < fits < shards else None
                return parts[::-1] if parts else (axis,)
        return (axis,)

    def expressed(
        self, source: int, t: int, d: int, found: dict[str, Axes], new: tuple[Axes, ...]
    ) -> bool:
        """Whether axes of factors say all of the dims `new` of a tensor, those of `d` by factors
        that pass to the tensor `source` too."""
        names = set(found).intersection(self.rule.tensors[t][d])
        passing = all(self.rule.factors[name].kind is Kind.PASS for name in names)
        theirs = {name for name in names if any(u == source for u, _ in self.rule.where[name])}
        return passing and names == theirs and to_dims(self.rule, t, found, self.mesh) == new

    def kept(self, factor: str, more: Axes) -> bool:
        """Whether rows that are taken have these axes from those that they are taken from: neither
        these nor what says which ones are taken can have them there too."""
        if self.level < KEPT:
            return False
        sources = [n for n, into in self.rule.keeps.items() if into == factor]
        mine = [found.get(name, ())[: len(more)] for name in sources for found in self.factors]
        return more in mine

    def elsewhere(self, proposal: Proposal, t: int, more: Axes) -> bool:
        """Whether a tensor has axes on a part of what is one dim on it, or where they come from."""
        tensors, where = self.rule.tensors, self.rule.where[proposal.factor]
        kin = {n for u, d in where if u in (t, proposal.tensor) for n in tensors[u][d]}
        if len(kin) == 1:
            return False
        mine = tuple(a for name in kin for a in self.factors[t].get(name, ()))
        return all(clashes(axis, mine) for axis in more)

    def extend(self, proposal: Proposal, t: int, d: int, taken: Axes) -> None:
        axes = to_dims(self.rule, t, self.factors[t], self.mesh)[d]
        first = self.case.same[t]
        dims = self.dims[first]
        self.dims[first] = (*dims[:d], axes, *dims[d + 1 :])
        self.extensions.append(Extension(t, d, axes, taken, proposal))

    def takeable(
        self, proposal: Proposal, t: int, current: Axes, more: Axes
    ) -> tuple[Axes, str]:
        """The prefix of `more` that the tensor can take, and why not the rest."""
        used = self.used(t)
        size = self.limit(proposal.factor, t)
        factors = self.factors[t]
        taken: Axes = ()
        for axis in more:
            if clashes(axis, used + taken):
                return taken, f"{axis} is used by another dim, or kept for one"
            trial = current + taken + (axis,)
            if axes_size(self.mesh, trial) > size:
                return taken, f"{axes_size(self.mesh, trial)} shards of {size} elements"
            if not expressible(self.rule, t, {**factors, proposal.factor: trial}, self.mesh):
                return taken, SCATTERED
            taken += (axis,)
        return taken, ""

    def used(self, t: int) -> Axes:
        """Axes that a tensor has on its dims, or that annotations keep."""
        dims = self.dims[self.case.same[t]]
        return tuple(a for axes in dims for a in axes) + self.states[t].reserved

    def limit(self, factor: str, t: int) -> int:
        """The most shards that a tensor takes along a factor."""
        size, kind, _ = self.rule.factors[factor]
        return size if kind is not Kind.PERMUTE else self.case.shapes[t][self.dim(factor, t)]

    def dim(self, factor: str, t: int) -> int:
        """The dim of a tensor that a factor is part of."""
        return next(d for u, d in self.rule.where[factor] if u == t)
