"""Makes the `Report` of a partitioned program, from its plan alone."""

import importlib.metadata
import re
from collections.abc import Sequence
from typing import Any

import jax

from sharding.mesh import MeshShape
from sharding.op import type_text
from sharding.program import describe
from spmd import cost
from spmd.estimate import liveness
from spmd.estimate.fusion import ANY, Compiler
from spmd.estimate.timeline import Span, Timeline, timeline
from spmd.estimate.work import Line
from spmd.hardware import Machine
from spmd.partition.plan import Compute, Diagnostic, Key, Move, ProgramPlan
from spmd.reporting.model import (
    Buffer,
    Communication,
    Finding,
    Flops,
    Memory,
    Report,
    Row,
    Tensor,
)  # fmt: skip

# Buffers below this share of the peak are left out, and so are all but the largest.
_SMALL, _MOST = 1 / 1000, 4000


def build(
    plan: ProgramPlan, *, name: str = "", machine: Machine | None = None,
    compiler: Compiler = ANY, donated: Sequence[bool] = (), diagnostics: Sequence[Diagnostic] = (),
) -> Report:  # fmt: skip
    """The report of a plan.

    Args:
      name: of the function.
      machine: on which times are predicted; None: no times.
      compiler: where no machine is given, what it is compiled by.
      donated: per input of the program, whether its buffer may be reused.
      diagnostics: of the partitioned stage.

    Raises:
      MeshError: the mesh does not fit the machine.
    """
    if machine is not None:
        compiler = Compiler.of(machine.chip)
    found, kept, profile = liveness.ordered(plan, donated, compiler)
    times = timeline(plan, found, kept, machine) if machine is not None else None
    spans = times.spans if times is not None else (Span(),) * len(found)
    flops = _flops(found)
    seconds = times.seconds if times is not None else 0.0
    return Report(
        name=name,
        mesh=_mesh(plan.mesh),
        across=dict(plan.mesh.across),
        machine=str(machine) if machine is not None else "",
        devices=plan.mesh.size,
        seconds=seconds,
        exposed=sum(span.exposed * line.trips for span, line in zip(spans, found, strict=True)),
        utilisation=_utilisation(flops, times),
        flops=flops,
        memory=_memory(plan, found, profile, machine),
        communication=_communication(found, spans, plan.mesh),
        arguments=_arguments(plan),
        results=tuple(_tensor(k, "result", plan.mesh) for k in plan.body.outputs),
        rows=_rows(found, spans),
        findings=tuple(
            Finding(d.kind, d.value, d.text, d.bytes, d.source, d.remedy)
            for d in sorted(diagnostics, key=lambda d: -d.bytes)
        ),
        versions={"jax": jax.__version__, "spmd-compiler": _version()},
    )


def _version() -> str:
    try:
        return importlib.metadata.version("spmd-compiler")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # run from a checkout


def _mesh(mesh: MeshShape) -> dict[str, int]:
    return dict(mesh.axes)


def _flops(found: Sequence[Line]) -> Flops:
    sums = [0.0] * 4
    for line in found:
        for i, x in enumerate(line.flops):
            sums[i] += x * line.trips
    return Flops(*sums)


def _utilisation(flops: Flops, times: Timeline | None) -> float:
    """Model FLOPs utilisation: what is computed a second time does not count."""
    if times is None or not times.seconds:
        return 0.0
    return flops.useful / (times.seconds * times.machine.chip.flops[0][1])


def _communication(
    found: Sequence[Line], spans: Sequence[Span], mesh: MeshShape
) -> tuple[Communication, ...]:
    merged: dict[tuple[str, tuple[str, ...], str, str, str], list[float]] = {}
    for line, span in zip(found, spans, strict=True):
        total = line.bytes
        for wire in line.wires:
            if not line.trips:
                continue
            op = line.op
            key = (wire.kind, wire.axes, line.source, op.module if op else "",
                   op.primitive.name if op else "")  # fmt: skip
            share = wire.bytes / total if total else 1 / len(line.wires)
            sums = merged.setdefault(key, [0.0] * 5)
            far = cost.network_bytes(wire.kind, wire.axes, wire.bytes, mesh)
            values = (wire.count, wire.bytes, far, span.wire * share, span.exposed * share)
            for i, x in enumerate(values):
                sums[i] += x * line.trips
    records = [
        Communication(*key, int(n), size, far, seconds, exposed)
        for key, (n, size, far, seconds, exposed) in merged.items()
    ]
    return tuple(sorted(records, key=lambda c: (-c.seconds, -c.bytes, c[:5])))


_PARAMETER = re.compile(r"\b(params?|parameters?|weights?|kernel|bias|embedding)\b")
_OPTIMIZER = re.compile(r"\b(opt|opt_state|optimizer|optimiser|mu|nu|momentum|velocity)\b")


def kind_of(name: str) -> str:
    """What an argument is, from its path: an optimiser's copy of a parameter is named like it, so
    the optimiser's own names count first."""
    if _OPTIMIZER.search(name):
        return "optimizer state"
    return "parameter" if _PARAMETER.search(name) else "argument"


def _arguments(plan: ProgramPlan) -> tuple[Tensor, ...]:
    pairs = zip(plan.body.region.inputs, plan.body.inputs, strict=True)
    return tuple(_tensor(Key(v, layout), kind_of(str(v)), plan.mesh) for v, layout in pairs)


def _tensor(key: Key, kind: str, mesh: MeshShape) -> Tensor:
    value = key.value
    return Tensor(str(value), kind, str(value.dtype), value.shape, str(key.layout),
                  key.local_bytes(mesh))  # fmt: skip


def _memory(
    plan: ProgramPlan, found: Sequence[Line], profile: liveness.Profile, machine: Machine | None
) -> Memory:
    backward = _read_backward(found)
    arguments = [kind_of(str(v)) for v in plan.body.region.inputs]
    by_kind: dict[str, int] = {}
    for held_there in profile.live(profile.at):
        if held_there.bytes:
            kind = _kind(held_there, arguments, backward)
            by_kind[kind] = by_kind.get(kind, 0) + held_there.bytes
    large = [b for b in profile.buffers if b.bytes and b.bytes >= profile.peak * _SMALL]
    large.sort(key=lambda b: (-b.bytes, b.start))
    return Memory(
        peak=profile.peak,
        capacity=int(machine.hbm_bytes) if machine is not None else 0,
        at=profile.at,
        by_kind=dict(sorted(by_kind.items(), key=lambda item: -item[1])),
        buffers=tuple(_buffer(b, arguments, backward) for b in large[:_MOST]),
        over=profile.over,
    )


def _read_backward(found: Sequence[Line]) -> set[int]:
    """Values that a backward pass reads: what it reads of the forward pass is an activation."""
    return {
        key.value.id for line in found
        if line.op is not None and "transpose(" in line.op.stack for key in line.reads
    }  # fmt: skip


def _buffer(
    held: liveness.Buffer, arguments: Sequence[str], backward: set[int]
) -> Buffer:  # fmt: skip
    value, layout, _ = held.key
    source = value.op.source if value.op is not None else ""
    return Buffer(
        describe(value), _kind(held, arguments, backward), str(value.dtype), value.shape,
        str(layout), held.bytes, source, held.start, max(held.end, held.start + 1),
    )  # fmt: skip


def _kind(held: liveness.Buffer, arguments: Sequence[str], backward: set[int]) -> str:
    """A donated argument's successor counts as what the argument was."""
    value = held.key.value
    op = value.op
    if held.argument >= 0:
        return arguments[held.argument]
    if op is None:
        return "result" if held.result else "constant"
    if not held.result and "transpose(" not in op.stack and value.id in backward:
        return "activation"
    return "result" if held.result else "temporary"


def _rows(found: Sequence[Line], spans: Sequence[Span]) -> tuple[Row, ...]:
    seconds = [
        (s.compute + s.exposed) * line.trips for line, s in zip(found, spans, strict=True)
    ]
    for line in reversed(found):
        if line.parent >= 0:
            seconds[line.parent] += seconds[line.index]
    return tuple(
        Row(
            line.parent, _op(line), tuple(map(_typed, line.writes)),
            tuple(map(_typed, line.reads)), line.op.module if line.op is not None else "",
            line.source, line.trips, line.flops.total * line.trips, line.bytes * line.trips,
            seconds[line.index], span.exposed * line.trips,
        )  # fmt: skip
        for line, span in zip(found, spans, strict=True)
    )


def _op(line: Line) -> str:
    found = line.instruction
    if isinstance(found, Move):
        return " then ".join(f"{s.kind}({'+'.join(s.axes)})" for s in found.plan.steps) or "copy"
    assert isinstance(found, Compute)
    return found.op.primitive.name


def _typed(key: Key) -> str:
    value: Any = key.value
    if value.const is not None and not value.rank:
        return str(value.const)
    return f"{value} {type_text(value)} {key.layout}"
