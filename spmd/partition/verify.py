"""The verifier between stages: shapes, axes used once, no partial value read as a whole one.

Always on in tests (`SPMD_VERIFY=1`); cheap enough to leave on.
"""

import os
from collections.abc import Collection, Iterable
from typing import Any

import jax

from sharding.errors import Problem, VerificationError
from sharding.mesh import MeshShape
from sharding.program import Value, describe
from sharding.spec import Layout
from spmd.partition.owners import made_of, owned, owners_of, shared_with, without
from spmd.partition.placed import makes
from spmd.partition.plan import Compute, Key, Move, ProgramPlan, RegionPlan

ENABLED = os.environ.get("SPMD_VERIFY", "") not in ("", "0")


def verify(plan: ProgramPlan) -> None:
    """Checks a whole plan.

    Raises:
      VerificationError: with every violation found.
    """
    problems: list[Problem] = []
    _region(plan.body, problems, ())
    if problems:
        raise VerificationError(*problems)


def check_local_shape(key: Key, x: Any, instruction: Compute, mesh: MeshShape) -> None:
    """The array that was computed has the shape that its layout says, and the dtype of the value.

    Raises:
      VerificationError: it has not.
    """
    if not ENABLED:
        return
    expected = key.layout.local_shape(key.value.shape, mesh)
    # A primitive that hands back what it was given may hand back a literal.
    made = x if hasattr(x, "shape") else jax.typeof(x)
    if made.shape != expected or made.dtype != key.value.dtype:
        raise VerificationError(
            Problem(
                f"{describe(key.value)} is {made.dtype}{list(made.shape)} on each device",
                f"its layout {key.layout} of {key.value.dtype}{list(key.value.shape)} means "
                f"{list(expected)}; the rule of {instruction.op.primitive.name} is wrong",
                "report this as a defect, with the program",
            )
        )


def check_gather(
    instruction: Compute, x: Any, axes: tuple[str, ...], dim: int, mesh: MeshShape
) -> None:
    """What a `local` function gathers is a partial result, not a whole operand, which the plan
    would not report.

    Raises:
      VerificationError: it is as long as an operand along a dim of which each shard has a part.
    """
    if not ENABLED or not axes or x.shape[dim] < 2:
        return
    for key in instruction.operands:
        shape = key.layout.local_shape(key.value.shape, mesh)
        if x.shape == shape and set(axes) & set(key.layout.dims[dim]):
            raise VerificationError(
                Problem(
                    f"{instruction.op.primitive.name} gathers dim {dim} of {describe(key.value)}",
                    "its rule does not say so in `gathers`, and the plan does not report it",
                    "report this as a defect, with the program",
                )
            )


def _region(region: RegionPlan, problems: list[Problem], sums: Collection[int]) -> None:
    """`sums`: ids of the inputs and outputs that a loop carries as sums."""
    mesh = region.mesh
    known: set[Key] = set()
    read = {v.id for i in region.code for v in _read(i)}
    for value, layout in zip(region.region.inputs, region.inputs, strict=True):
        known.add(Key(value, layout))
        _layout(value, layout, mesh, problems)
        if layout.partial and value.id not in sums and value.id in read:
            problems.append(_leak(value, layout, "enters a region"))

    def readable(key: Key) -> bool:
        return key.value.const is not None or key in known

    for instruction in region.code:
        if isinstance(instruction, Move):
            problems += [_unknown(k, None) for k in instruction.reads if not readable(k)]
            _move(instruction, problems)
            known.update(instruction.writes)
            continue
        for key in instruction.operands:
            if not readable(key):
                problems.append(_unknown(key, instruction))
        for key in instruction.results:
            _layout(key.value, key.layout, mesh, problems)
            known.add(key)
        if instruction.op.control is None and not instruction.op.rule.elementary:
            _compute(instruction, mesh, problems)
        for i, inner in enumerate(instruction.regions):
            _region(inner, problems, _sums(instruction, i))
    for key in region.outputs:
        if key.layout.partial and key.value.id not in sums:
            problems.append(_leak(key.value, key.layout, "leaves a region"))
        if not readable(key):
            problems.append(_unknown(key, None))


def _read(instruction: Move | Compute) -> Iterable[Value]:
    if isinstance(instruction, Move):
        return (instruction.value,)
    return (key.value for key in instruction.operands)


def _sums(instruction: Compute, region: int) -> set[int]:
    """Inputs and outputs of a region that are partial alike from step to step, by add, or that one
    device has inside as it has them outside."""
    control = instruction.op.control
    found: set[int] = set()
    if control is None:
        return found
    carries = list(control.carries(instruction.op))
    for r, out, into in carries:
        body = instruction.regions[r]
        layout = body.inputs[into]
        alike = body.outputs[out].layout == layout and {m for _, m in layout.partial} == {"add"}
        if r == region and alike:
            found |= {body.region.inputs[into].id, body.outputs[out].value.id}
    if control.exclusive or (carries and not control.counted):
        return found  # devices may run different branches, or a loop unequally often
    carried = {(r, into) for r, _, into in carries}
    for port in instruction.op.in_ports:
        if (port.region, port.inner) in carried or any(port.lead):
            continue
        layout = instruction.regions[port.region].inputs[port.inner]
        held = instruction.operands[port.outer].layout.partial == layout.partial
        if port.region == region and held and len(owners_of(layout)) == len(layout.partial):
            found.add(instruction.regions[region].region.inputs[port.inner].id)
    carried = {(r, out) for r, out, _ in carries}
    for port in instruction.op.out_ports:
        if (port.region, port.inner) in carried:
            continue
        key = instruction.regions[port.region].outputs[port.inner]
        partial = instruction.results[port.outer].layout.partial
        if port.region == region and partial == key.layout.partial and not any(port.lead):
            found.add(key.value.id)
    return found


def _compute(instruction: Compute, mesh: MeshShape, problems: list[Problem]) -> None:
    """Results are partial exactly as the rule says; partial operands are carried linearly. What one
    device has of operands makes results that it has."""
    rule, assignment = instruction.op.rule, instruction.assignment
    layouts = [key.layout for key in instruction.operands]
    owners = made_of(rule, assignment, layouts, mesh)
    for i, (key, layout) in enumerate(
        zip(instruction.results, makes(rule, assignment, mesh), strict=True)
    ):
        if owners is None:
            problems.append(_leak(key.value, key.layout, "is made of what its owners alone have"))
        first = owned(rule, assignment, len(layouts) + i, mesh)
        made = shared_with(layout, owners or ())
        alone = shared_with(without(made, frozenset(dict(first))), first)
        if key.layout not in (made, alone):
            problems.append(_leak(key.value, key.layout, f"is made as {made}"))
    reduced = [without(x, frozenset(dict(owners_of(x)))) for x in layouts]
    partial = [i for i, layout in enumerate(reduced) if layout.partial]
    carried = {a for i in partial for a, _ in reduced[i].partial}
    if carried != set(instruction.assignment.carried):
        key = instruction.results[0]
        problems.append(_leak(key.value, key.layout, f"carries {carried}"))
    if partial and not any(tuple(partial) == tuple(sorted(g)) for g in rule.linear):
        key = instruction.operands[partial[0]]
        problems.append(
            _leak(key.value, key.layout, f"is read by {instruction.op.primitive.name}")
        )


def _move(move: Move, problems: list[Problem]) -> None:
    end = move.plan.steps[-1].after if move.plan.steps else move.src
    if end != move.dst:
        problems.append(_leak(move.value, move.dst, f"ends as {end}"))
    before, after = owners_of(move.src), owners_of(move.dst)
    lost, kept = set(dict(before)) - set(dict(after)), set(dict(before)) & set(dict(after))
    first = move.plan.steps[0] if move.plan.steps else None
    if lost and (first is None or first.kind != "owner" or set(first.axes) != lost):
        problems.append(_leak(move.value, move.src, "is sent without its owner"))
    if any(a in kept for step in move.plan.steps for a in step.axes):
        problems.append(_leak(move.value, move.src, "is moved along the axis of its owner"))


def _layout(value: Any, layout: Layout, mesh: MeshShape, problems: list[Problem]) -> None:
    used = [a for axes in layout.dims for a in axes] + [a for a, _ in layout.partial]
    if len(used) != len(set(used)) or not set(used) <= set(mesh.names):
        problems.append(_leak(value, layout, f"uses axes {used} of {mesh}"))
    if len(layout.dims) != value.rank:
        problems.append(_leak(value, layout, f"has rank {value.rank}"))


def _leak(value: Any, layout: Layout, how: str) -> Problem:
    return Problem(
        f"{describe(value)} with layout {layout} {how}",
        "the plan breaks its own rules",
        "report this as a defect, with the program",
    )


def _unknown(key: Key, instruction: Compute | None) -> Problem:
    where = f" by {instruction.op}" if instruction else ""
    return Problem(
        f"{describe(key.value)} is read{where} as {key.layout}",
        "nothing made it in that layout",
        "report this as a defect, with the program",
    )
