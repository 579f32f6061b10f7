"""Diagnostics of a whole plan, the dearest first, and `strict`, which makes errors of them.

Only what costs a device `LARGE` bytes or more is told: biases and scalars are never worth an
annotation. Gathers and uneven boundaries, which are found while planning, are told at any size.
"""

from collections.abc import Iterator, Sequence

from sharding.errors import Problem, StrictError
from sharding.mesh import axes_size, split_ref
from sharding.op import Op, Value
from sharding.program import Program, describe
from sharding.propagation import Propagated
from sharding.spec import Layout
from spmd.partition.conflicts import conflicts
from spmd.partition.linear import only_reader
from spmd.partition.plan import Compute, Diagnostic, Key, Move, ProgramPlan, RegionPlan, steps
from spmd.partition.replicated import Layouts, layouts_of, replicated
from spmd.partition.written import annotation_text

LARGE = 1 << 20  # bytes, per device: held for nothing, or sent per call
OVER_LIMIT = "over limit"
PADDING = 1 / 8  # the part of a dim's places that may be padding without a word


def diagnose(
    propagated: Propagated, plan: ProgramPlan, boundary: Sequence[Diagnostic] = ()
) -> tuple[Diagnostic, ...]:
    """Everything that a user may not expect of a plan, by bytes."""
    layouts = layouts_of(plan)
    found = [
        *boundary, *plan.diagnostics, *replicated(propagated, plan, layouts, LARGE),
        *_padded(plan, layouts), *_reduced_early(plan), *_unused(propagated, plan, layouts),
        *conflicts(propagated, plan, LARGE),
    ]
    return tuple(sorted(found, key=lambda d: -d.bytes))


def forbid_waste(diagnostics: Sequence[Diagnostic]) -> None:
    """Raises StrictError with every diagnostic of `LARGE` bytes or more, and with a limit of memory
    that is exceeded at all."""
    problems = [
        Problem(
            f"{d.kind}: {d.value}: {d.text}"
            + (f" at {d.source}" if d.source and d.source not in d.value else ""),
            "strict=True accepts no program above memory_limit"
            if d.kind == OVER_LIMIT
            else f"strict=True accepts nothing that costs a device {LARGE:,} B or more",
            d.remedy or "annotate it with axes that divide its dims, or pad it",
        )
        for d in diagnostics
        if (d.bytes >= LARGE and not d.stated) or d.kind == OVER_LIMIT
    ]
    if problems:
        raise StrictError(*problems)


def _padded(plan: ProgramPlan, layouts: Layouts) -> Iterator[Diagnostic]:
    """Dims whose shards are padding in large part; of dims of one size, the largest value."""
    worst: dict[tuple[int, tuple[str, ...]], tuple[float, Value, int, Layout]] = {}
    for value in plan.program.values:
        for layout in layouts.get(value.id, ()):
            for d, axes in enumerate(layout.dims):
                n, shards = value.shape[d], axes_size(plan.mesh, axes)
                places = -(-n // shards) * shards
                if n == places or places - n < PADDING * places:
                    continue
                held = Key(value, layout).local_bytes(plan.mesh)
                waste = held * (places - n) / places
                if waste >= LARGE and waste > worst.get((n, axes), (0.0,))[0]:
                    worst[n, axes] = (waste, value, d, layout)
    for (n, axes), (waste, value, d, layout) in worst.items():
        shards = axes_size(plan.mesh, axes)
        places = -(-n // shards) * shards
        text = (
            f"dim {d} of size {n} over {'+'.join(axes)} takes {places} places, "
            f"{100 * (places - n) / places:.0f}% of them padding: {waste:,.0f} B per device"
        )
        other = annotation_text(plan.program, value, _elsewhere(plan, value, d, layout))
        remedy = f"make its size a multiple of {shards}, or {other}"
        source = value.op.source if value.op is not None else ""
        yield Diagnostic("padded", describe(value), text, waste, source, remedy)


def _elsewhere(plan: ProgramPlan, value: Value, d: int, layout: Layout) -> Layout:
    """A layout with the axes of a dim on the largest free one that they divide, or on none."""
    axes = layout.dims[d]
    free = [
        i for i, n in enumerate(value.shape)
        if not layout.dims[i] and n % axes_size(plan.mesh, axes) == 0 and n > 1
    ]
    to = max(free, key=lambda i: value.shape[i], default=-1)
    dims = [() if i == d else axes if i == to else a for i, a in enumerate(layout.dims)]
    return Layout(tuple(dims))


def _reduced_early(plan: ProgramPlan) -> Iterator[Diagnostic]:
    """Addends of a loop's sum that are reduced in each of its steps."""
    for body, op, trips in _loops(plan.body, 1):
        inside = {v.id for inner in op.regions for v in inner.outputs}
        for move in body.code:
            if not isinstance(move, Move) or not move.src.partial:
                continue
            wire = sum(s.bytes for s in move.plan.steps if s.kind == "all_reduce")
            total = _accumulates(plan.program, move.value, inside)
            if total is None or wire * trips < LARGE or trips < 2:
                continue
            axes = tuple(a for s in move.plan.steps if s.kind == "all_reduce" for a in s.axes)
            text = (
                f"reduced over {'+'.join(axes)} in each of {trips:,} steps of a {op.primitive.name}"
                f" that only adds it up: {wire * trips:,.0f} B per device, {wire:,.0f} B were it "
                "reduced once"
            )
            layout = _scattered(plan, total, move.dst.reduced(), axes)
            remedy = (
                f"{annotation_text(plan.program, total, layout)}, so that each step sends half"
                if layout is not None
                else "return the addends of all steps, and add them up outside of the loop"
            )
            source = move.value.op.source if move.value.op is not None else ""
            yield Diagnostic(
                "reduced early", describe(move.value), text, wire * (trips - 1), source, remedy
            )


def _loops(region: RegionPlan, trips: int) -> Iterator[tuple[RegionPlan, Op, int]]:
    """Bodies that carry values from step to step: how often they run."""
    for instruction in region.code:
        if not isinstance(instruction, Compute) or not instruction.regions:
            continue
        control = instruction.op.control
        runs = trips * steps(instruction.op)
        for inner in instruction.regions:
            if control is not None and control.carries(instruction.op):
                yield inner, instruction.op, runs
            yield from _loops(inner, runs)


def _accumulates(program: Program, value: Value, outputs: set[int]) -> Value | None:
    """The output of a region that a value is only added to, and that nothing reads before the
    last step; None where there is none."""
    while value.id not in outputs:
        reader = only_reader(program, value)
        if reader is None or not any(reader[1] in group for group in reader[0].rule.linear):
            return None
        value = reader[0].outputs[0]
    op = value.op
    carried = op is not None and any(
        v.op is None and v.const is None and program.uses[v.id] == 1 for v in op.inputs
    )
    return value if carried and program.uses[value.id] == 1 else None


def _scattered(
    plan: ProgramPlan, value: Value, layout: Layout, axes: tuple[str, ...]
) -> Layout | None:
    """A layout with further axes on the largest dim that they divide."""
    for d in sorted(range(value.rank), key=lambda d: -value.shape[d]):
        dims = (*layout.dims[:d], (*layout.dims[d], *axes), *layout.dims[d + 1 :])
        if value.shape[d] % axes_size(plan.mesh, dims[d]) == 0:
            return Layout(dims)
    return None


def _unused(
    propagated: Propagated, plan: ProgramPlan, layouts: Layouts
) -> Iterator[Diagnostic]:
    """Axes of the mesh over which every device does the same."""
    used = {split_ref(a)[0] for every in layouts.values() for x in every for a in x.used}
    for op in plan.program.ops():
        manual = op.control.manual(op.params) if op.control is not None else None
        used |= manual.axes if manual is not None else set()
    body = plan.body
    pairs = list(zip(body.region.inputs, body.inputs, strict=True))
    keys = (*(Key(v, layout) for v, layout in pairs), *body.outputs)
    held = sum(key.local_bytes(plan.mesh) for key in keys)
    for axis, size in propagated.mesh.axes:
        cost = held * (size - 1) / size
        if axis in used or size == 1 or cost < LARGE:
            continue
        annotation = ""
        for value, layout in sorted(pairs, key=lambda p: -_size(p[0])):
            new = _scattered(plan, value, layout, (axis,))
            if new is not None:
                annotation = annotation_text(plan.program, value, new)
                break
        yield Diagnostic(
            "unused axis", axis,
            f"all {size} devices along it hold and do the same, {held:,} B of arguments and "
            "results",
            cost, "", annotation or "give it a dim of an argument that it divides, or size 1",
        )  # fmt: skip


def over_limit(peak: int, limit: int) -> Diagnostic:
    """The diagnostic of a program that is predicted not to fit into `memory_limit`."""
    return Diagnostic(
        OVER_LIMIT, "the program",
        f"its predicted peak is {peak:,} B per device, {peak - limit:,} B more than "
        f"memory_limit={limit:,}",
        float(peak - limit), "", "shard more of what `spmd.report` lists as largest, or recompute "
        "it with jax.checkpoint",
    )  # fmt: skip


def _size(value: Value) -> int:
    count = 1
    for n in value.shape:
        count *= n
    return count
