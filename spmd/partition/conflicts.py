"""Mesh axes that two dims of one operation wanted, where what lost is gathered."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sharding.mesh import overlap, split_ref
from sharding.program import Op, describe
from sharding.propagation import Propagated
from sharding.provenance import Rejection
from sharding.spec import Layout
from spmd.partition.plan import Diagnostic, Move, ProgramPlan
from spmd.partition.ties import Ties
from spmd.partition.written import annotation_text

_GATHERS = ("all_gather", "all_to_all")


class _Conflict(NamedTuple):
    """A proposal that lost, the operation that then moved its value, and the wire bytes."""

    rejection: Rejection
    op: Op
    bytes: float


def conflicts(propagated: Propagated, plan: ProgramPlan, large: int) -> Iterator[Diagnostic]:
    """Of each operation whose operand is gathered since another dim has its axis.

    Where an annotation puts the operand there, the gather is what the user asked for (ZeRO-3
    gathers every parameter so): these are told together, one diagnostic per axis.
    """
    found = _found(propagated, plan, large)
    if not found:
        return
    ties = Ties(propagated)
    stated: dict[str, list[_Conflict]] = {}
    for conflict in found:
        source = propagated.program.values[conflict.rejection.source]
        meant = [a for a in conflict.rejection.axes if ties.meant_on(source, a)]
        if meant:
            stated.setdefault(split_ref(meant[0])[0], []).append(conflict)
        else:
            yield _inferred(propagated, plan, conflict)
    for axis, group in stated.items():
        yield _stated(propagated, axis, group)


def _found(propagated: Propagated, plan: ProgramPlan, large: int) -> list[_Conflict]:
    moves: dict[tuple[int, int], list[tuple[Move, int]]] = {}
    for move, trips in plan.moves():
        if move.reason is not None:
            moves.setdefault((move.reason.index, move.value.id), []).append((move, trips))
    found: dict[tuple[int, int], _Conflict] = {}
    for r in propagated.rejections:
        key = (propagated.links[r.link].op, r.source)
        if key not in moves or key in found or not _contested(r):
            continue
        wire = sum(
            trips * s.bytes for move, trips in moves[key] for s in move.plan.steps
            if s.kind in _GATHERS and any(overlap(a, b) for a in s.axes for b in r.axes)
        )
        op = moves[key][0][0].reason
        if wire >= large and op is not None:
            found[key] = _Conflict(r, op, wire)
    return list(found.values())


def _contested(r: Rejection) -> bool:
    """Whether another dim or another sharding got the axes, not an annotation or a size."""
    return "is used by another dim" in r.reason or r.reason.split(":")[0].isidentifier()


def _inferred(propagated: Propagated, plan: ProgramPlan, conflict: _Conflict) -> Diagnostic:
    r, op, wire = conflict
    source, value = (propagated.program.values[i] for i in (r.source, r.value))
    text = (
        f"{op.primitive.name} cannot put {'+'.join(r.axes)} on dim {r.dim} of {value} as {source} "
        f"does ({r.reason}): gathered, {wire:,.0f} B per device"
    )
    taken = {split_ref(a)[0] for v in (source, value) for a in propagated.of(v).layout.used}
    other = [(a, n) for a, n in propagated.mesh.axes if a not in taken and n > 1]
    dims = []
    for n, old in zip(source.shape, propagated.of(source).layout.dims, strict=True):
        kept = tuple(a for a in old if not any(overlap(a, b) for b in r.axes))
        free = [a for a, size in other if n % size == 0] if kept != old else []
        dims.append((*kept, *free[:1]))
    remedy = annotation_text(plan.program, source, Layout(tuple(dims)))
    return Diagnostic("conflict", describe(source), text, wire, op.source, remedy)


def _stated(propagated: Propagated, axis: str, group: Sequence[_Conflict]) -> Diagnostic:
    first = max(group, key=lambda c: c.bytes)
    source = propagated.program.values[first.rejection.source]
    wire, what = sum(c.bytes for c in group), describe(source)
    text = (
        f"annotations put it on {what} and on another dim of {first.op.primitive.name}"
        + (f", and so for {len(group) - 1} more operands" if len(group) > 1 else "")
        + f": gathered, {wire:,.0f} B per device"
    )
    remedy = f"meant so where memory is scarce (ZeRO-3); else leave {axis} out of {what}"
    return Diagnostic("conflict", axis, text, wire, first.op.source, remedy, stated=True)
