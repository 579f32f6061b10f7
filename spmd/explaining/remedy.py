"""Which annotation would remove a collective: found by trying, never by guessing.

Candidates come from the two shardings that the collective reconciles. Each is propagated and
planned; the cheapest program without the collective wins. Bounded in number and in time.
"""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from sharding.explain import History
from sharding.mesh import axes_size
from sharding.op import Value
from sharding.project import to_dims, to_factors
from sharding.rule import Kind
from sharding.spec import Layout, Sharding
from spmd.explaining.explanation import Remedy
from spmd.explaining.trial import closed, link_bytes, measure, on_users_axes, with_annotations
from spmd.partition.plan import Move, ProgramPlan
from spmd.partition.written import annotation_text

SMALL = 2000  # operations; each candidate plans the whole program
CANDIDATES = 12
SECONDS = 5.0


class Candidate(NamedTuple):
    """An annotation to be tried: of a value, or None to leave it open; and how to write it."""

    value: Value
    sharding: Sharding | None
    text: str


def find_remedy(
    stage: Any, partitioned: Any, history: History, move: Move
) -> tuple[Remedy | None, str]:
    """The annotation that removes a move, and what was tried.

    Args:
      stage: `spmd.Propagated`, as annotated.
      partitioned: what it became.
    """
    plan = partitioned.plan
    size = sum(1 for _ in plan.program.ops())
    if size > SMALL:
        return None, f"no annotation was tried: {size:,} operations, over {SMALL:,}"
    best, best_cost, tried, end = None, float("inf"), 0, time.monotonic() + SECONDS
    for candidate in _candidates(stage, plan, history, move):
        if tried == CANDIDATES or time.monotonic() > end:
            break
        tried += 1
        other = with_annotations(stage, {candidate.value: candidate.sharding})
        total = link_bytes(other.plan)
        if total < best_cost and not _has(other.plan, move):
            best, best_cost = (candidate, other), total
    count = f"{tried} annotation{'' if tried == 1 else 's'} tried"
    if best is None:
        return None, f"{count}, none removes it" if tried else "no annotation to try"
    (candidate, other), before, after = best, measure(partitioned), measure(best[1])
    remedy = Remedy(
        candidate.text, after.wire_bytes - before.wire_bytes,
        after.peak_memory - before.peak_memory, after.flops - before.flops,
        best_cost < link_bytes(plan),
    )  # fmt: skip
    return remedy, f"{count}, each planned as a whole program"


def _has(plan: ProgramPlan, move: Move) -> bool:
    """Whether a plan still has the collectives of a move, for the same reader."""
    kinds = {(s.kind, s.axes) for s in move.plan.steps if s.bytes}
    return any(
        other.value is move.value and other.reason is move.reason
        and kinds & {(s.kind, s.axes) for s in other.plan.steps}
        for other, _ in plan.moves()
    )


def _candidates(
    stage: Any, plan: ProgramPlan, history: History, move: Move
) -> Iterator[Candidate]:
    """Without repetitions, and without what is so already."""
    mesh = stage.result.mesh
    seen: set[tuple[int, Sharding | None]] = set()
    annotated = {v.id for v, _ in stage.traced.annotations}

    def offer(value: Value, layout: Layout) -> Iterator[Candidate]:
        if not value.rank or value.const is not None or not on_users_axes(layout, mesh):
            return
        if layout.reduced() != stage.result.of(value).layout and _fits(layout, value, mesh):
            yield Candidate(value, closed(layout), annotation_text(plan.program, value, layout))

    found = [offer(value, layout) for value, layout in _layouts(plan, history, move)]
    found.append(_without(stage, history, move, annotated))
    for candidates in found:
        for candidate in candidates:
            if (candidate.value.id, candidate.sharding) not in seen:
                seen.add((candidate.value.id, candidate.sharding))
                yield candidate


def _layouts(
    plan: ProgramPlan, history: History, move: Move
) -> Iterator[tuple[Value, Layout]]:
    """Values in layouts that could make a move needless."""
    value, src, dst = move.value, move.src, move.dst
    yield value, dst
    yield value, src
    yield from _scattered(value, move, plan)
    op = move.reason
    if op is not None and op.control is None:
        rule, count = op.rule, len(op.inputs)
        for i in (i for i, v in enumerate(op.inputs) if v is value):
            factors = to_factors(rule, i, src.dims, plan.mesh)
            for t, other in enumerate((*op.inputs, *op.outputs)):
                fixed = any(rule.factors[f].kind is Kind.FIXED for f in factors)
                if other is not value and not fixed:
                    dims = to_dims(rule, t, factors, plan.mesh)
                    given = dims if t >= count else _kept(dims, history.propagated.of(other))
                    yield other, Layout(given)
    for root, axes in _roots(history, move):
        dims = history.propagated.of(root).layout.dims
        yield root, Layout(tuple(tuple(a for a in d if a not in axes) for d in dims))


def _kept(dims: tuple, sharding: Sharding) -> tuple:
    """The dims of an operand, with its own axes where the factors say nothing."""
    used = {a for d in dims for a in d}
    return tuple(
        new or tuple(a for a in old.axes if a not in used)
        for new, old in zip(dims, sharding.dims, strict=True)
    )


def _scattered(value: Value, move: Move, plan: ProgramPlan) -> Iterator[tuple[Value, Layout]]:
    """A partial value with its axes on a dim: half the bytes of an all-reduce."""
    axes = tuple(a for a, _ in move.src.partial if a not in dict(move.dst.partial))
    if not axes:
        return
    for d in sorted(range(value.rank), key=lambda d: -value.shape[d])[:2]:
        dims = move.dst.reduced().dims
        more = tuple(a for a in axes if a not in move.dst.used)
        new = (*dims[:d], (*dims[d], *more), *dims[d + 1 :])
        if more and value.shape[d] % axes_size(plan.mesh, new[d]) == 0:
            yield value, Layout(new)


def _roots(history: History, move: Move) -> Iterator[tuple[Value, set[str]]]:
    """Annotated values that the axes of a move come from."""
    axes = {a for s in move.plan.steps for a in s.axes}
    near = [move.value]
    for op in (move.value.op, move.reason):
        near += [*op.inputs, *op.outputs] if op is not None else []
    for value in near:
        for d in range(value.rank):
            for i in history.events.get((value.id, d), ()):
                for axis in axes.intersection(history.propagated.events[i].axes):
                    event = history.propagated.events[history.path(i, axis)[0]]
                    yield history.propagated.program.values[event.value], {axis}


def _without(
    stage: Any, history: History, move: Move, annotated: set[int]
) -> Iterator[Candidate]:
    """Annotations left out: those of the value, and those that its axes come from."""
    roots = [move.value, *(root for root, _ in _roots(history, move))]
    for root in roots:
        if root.id in annotated:
            site, source = history.site(root)
            at = f" at {source}" if source else ""
            yield Candidate(root, None, f"{root} left open, without {site}{at}")


def _fits(layout: Layout, value: Value, mesh: Any) -> bool:
    return all(
        axes_size(mesh, axes) <= n for axes, n in zip(layout.dims, value.shape, strict=True)
    )
