"""Large values that every device holds whole although an axis of the mesh could divide them."""

from collections.abc import Iterator, Mapping, Sequence

from sharding.program import Program, Value, describe, value_bytes
from sharding.propagation import Propagated
from sharding.rule import Kind
from sharding.spec import Layout
from spmd.partition.plan import Diagnostic, Move, ProgramPlan
from spmd.partition.ties import Node, Ties
from spmd.partition.written import annotation_text

Layouts = Mapping[int, list[Layout]]


def layouts_of(plan: ProgramPlan) -> dict[int, list[Layout]]:
    """By value id, every layout that a plan has a value in."""
    found: dict[int, list[Layout]] = {}
    inputs = zip(plan.body.region.inputs, plan.body.inputs, strict=True)
    for value, layout in inputs:
        found.setdefault(value.id, []).append(layout)
    for instruction, _ in plan.body.walk():
        if isinstance(instruction, Move):
            found.setdefault(instruction.value.id, []).append(instruction.dst)
            continue
        for key in instruction.results:
            found.setdefault(key.value.id, []).append(key.layout)
        for region in instruction.regions:
            for value, layout in zip(region.region.inputs, region.inputs, strict=True):
                found.setdefault(value.id, []).append(layout)
    return found


def replicated(
    propagated: Propagated, plan: ProgramPlan, layouts: Layouts, large: int
) -> list[Diagnostic]:
    """A diagnostic for each group of values that could be divided and are whole everywhere.

    A dim that an annotation leaves unsharded was meant so, and with it whatever elementwise
    operations tie to it. Of a chain of replicated values the first is told; of values that are
    tied together the largest, an argument before others.
    """
    whole = {
        v.id: v for v in propagated.program.values
        if v.rank and layouts.get(v.id) and value_bytes(v) >= large
        and _whole(layouts[v.id])
    }
    inputs = {v.id for v in propagated.program.body.inputs}
    first = [v for v in whole.values() if v.id in inputs or _begins(v, whole)]
    if not first:
        return []
    ties = Ties(propagated)
    groups: dict[Node, list[tuple[Value, int, str, int]]] = {}
    for value in first:
        for d, axis, size in _divisible(value, propagated, ties):
            if value_bytes(value) * (size - 1) // size >= large:
                groups.setdefault(ties.root((value.id, d)), []).append((value, d, axis, size))
                break
    return [_told(propagated.program, group, inputs) for group in groups.values()]


def _whole(layouts: Sequence[Layout]) -> bool:
    """Whether every device holds the same, and never a part. Addends differ."""
    return any(not x.partial for x in layouts) and not any(any(x.dims) for x in layouts)


def _begins(value: Value, whole: Mapping[int, Value]) -> bool:
    """Whether a value is whole for no other's sake, and cannot be made anew in parts."""
    op = value.op
    if op is None or op.control is not None or all(v.rank == 0 for v in op.inputs):
        return False
    if op.scope.manual is not None and op.scope.manual.full:
        return False
    return not any(v.id in whole for v in op.inputs)


def _divisible(
    value: Value, propagated: Propagated, ties: Ties
) -> Iterator[tuple[int, str, int]]:
    """(dim, axis, its size) that could divide a value evenly, the largest dims and axes first."""
    axes = sorted(((a, n) for a, n in propagated.mesh.axes if n > 1), key=lambda a: -a[1])
    for d in sorted(range(value.rank), key=lambda d: -value.shape[d]):
        if ties.meant_whole(value, d) or not _may_divide(value, d, propagated.program):
            continue
        for axis, size in axes:
            if value.shape[d] >= size and value.shape[d] % size == 0:
                yield d, axis, size


def _may_divide(value: Value, d: int, program: Program) -> bool:
    """Whether what makes and reads a value can work in parts along a dim."""
    op = value.op
    if op is not None and op.control is None:
        names = op.rule.results[op.outputs.index(value)][d]
        if not names or any(op.rule.factors[f].kind is Kind.FIXED for f in names):
            return False
    readers = [(r, i) for r, i in program.readers[value.id] if r.control is None]
    return not readers or any(
        r.rule.operands[i][d]
        and all(r.rule.factors[f].kind is not Kind.FIXED for f in r.rule.operands[i][d])
        for r, i in readers
    )


def _told(
    program: Program, group: list[tuple[Value, int, str, int]], inputs: set[int]
) -> Diagnostic:
    value, d, axis, size = max(group, key=lambda g: (g[0].id in inputs, value_bytes(g[0])))
    held = value_bytes(value)
    layout = Layout(tuple((axis,) if i == d else () for i in range(value.rank)))
    more = f", and {len(group) - 1} more tied to it" if len(group) > 1 else ""
    text = f"{held:,} B on every device{more}: no axis divides it, and {axis} could by {size}"
    remedy = (
        f"{annotation_text(program, value, layout)}; an annotation without axes says that it is "
        "meant to be whole"
    )
    source = value.op.source if value.op is not None else ""
    return Diagnostic(
        "replicated", describe(value), text, held * (size - 1) / size, source, remedy
    )
