"""What every instruction of a plan does on one device: operations, and bytes over links.

Read from the rules alone. Only a rule's `local` function may communicate in ways that the rule does
not say; it is traced once per kind of instruction, at local shapes, without devices.
"""

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple, TypeGuard

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from sharding.mesh import MeshShape, axes_size
from sharding.op import Op, Value
from sharding.rule import Kind
from spmd import collectives
from spmd.partition.local import LocalView
from spmd.partition.plan import Compute, Key, Move, ProgramPlan, RegionPlan
from spmd.partition.reshard import LOCAL


class Wire(NamedTuple):
    """One collective that an instruction runs.

    Attributes:
      kind: all_reduce, all_gather, reduce_scatter, all_to_all, permute.
      axes: mesh axes, major to minor.
      count: how often per run of the instruction.
      bytes: wire bytes per device of all of them, by the ring model.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: float


class Flops(NamedTuple):
    """Floating-point operations on one device, and why they are more than its share.

    Attributes:
      useful: the operations of the unsharded program over the number of devices.
      replicated: done by other devices too, along axes that shard nothing of the operation.
      padded: on the padding of dims that the axes do not divide.
      recomputed: done a second time, since remat did not keep the result.
    """

    useful: float = 0.0
    replicated: float = 0.0
    padded: float = 0.0
    recomputed: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)

    def times(self, factor: float) -> "Flops":
        return Flops(*(x * factor for x in self))


class Line(NamedTuple):
    """One instruction of the per-device program, and what one run of it does.

    Attributes:
      index: its number, in program order, as in `lines`.
      parent: number of the instruction in whose region it is; -1 at the top.
      instruction: `Compute` or `Move`.
      trips: how often it runs per call of the program; 0 in branches that are not the dearest.
      flops: of one run, on one device; of a loop or call: none of its own.
      wires: the collectives of one run.
      mesh: the mesh that its layouts are on.
    """

    index: int
    parent: int
    instruction: Compute | Move
    trips: int
    flops: Flops
    wires: tuple[Wire, ...]
    mesh: MeshShape

    @property
    def op(self) -> Op | None:
        """The equation that it is, or that it serves: the reader of what is moved, or its maker."""
        found = self.instruction
        return found.op if isinstance(found, Compute) else found.reason or found.value.op

    @property
    def source(self) -> str:
        return self.op.source if self.op is not None else ""

    @property
    def reads(self) -> tuple[Key, ...]:
        return self.instruction.reads

    @property
    def writes(self) -> tuple[Key, ...]:
        return self.instruction.writes

    @property
    def contracts(self) -> bool:
        return contracts(self.instruction)

    @property
    def bytes(self) -> float:
        """Wire bytes of one run."""
        return sum(w.bytes for w in self.wires)


def contracts(found: Move | Compute) -> TypeGuard[Compute]:
    """Whether the matrix units do the work: contractions and convolutions."""
    if not isinstance(found, Compute) or found.regions:
        return False
    return found.op.rule.flops > 1 and len(found.op.rule.operands) > 1


def lines(plan: ProgramPlan) -> tuple[Line, ...]:
    """Every instruction of a plan, those of regions after the instruction that they belong to."""
    found: list[Line] = []
    _region(plan.body, -1, 1, plan.mesh, found, {})
    return tuple(found)


def _region(
    region: RegionPlan, parent: int, trips: int, whole: MeshShape, found: list[Line], known: dict
) -> None:
    for instruction in region.code:
        index = len(found)
        if isinstance(instruction, Move):
            sent = _steps(instruction, region.mesh)
            found.append(Line(index, parent, instruction, trips, Flops(), sent, region.mesh))
            continue
        if not instruction.regions:
            sent = wires(instruction, region.mesh, known)
            work = flops(instruction, region.mesh, whole)
            found.append(Line(index, parent, instruction, trips, work, sent, region.mesh))
            continue
        found.append(Line(index, parent, instruction, trips, Flops(), (), region.mesh))
        _regions(instruction, index, trips, whole, found, known)


def _steps(move: Move, mesh: MeshShape) -> tuple[Wire, ...]:
    """The collectives of a reshard; one that moves nothing needs none."""
    count = 1 if move.parts is None else move.parts.count
    return tuple(
        Wire(s.kind, s.axes, count * max(len(s.parts), 1), s.bytes)
        for s in move.plan.steps
        if s.kind not in LOCAL and axes_size(mesh, s.axes) > 1 and 0 not in move.value.shape
    )


def _regions(
    instruction: Compute, index: int, trips: int, whole: MeshShape, found: list[Line], known: dict
) -> None:
    control = instruction.op.control
    assert control is not None
    inner = trips * control.trips(instruction.op)
    spans: list[tuple[int, int]] = []
    for region in instruction.regions:
        start = len(found)
        _region(region, index, inner, whole, found, known)
        spans.append((start, len(found)))
    if not control.exclusive:
        return
    dearest = max(spans, key=lambda span: _weight(found[slice(*span)]))
    for span in spans:
        if span != dearest:
            found[slice(*span)] = [line._replace(trips=0) for line in found[slice(*span)]]


def _weight(branch: list[Line]) -> tuple[float, float]:
    """Of branches the one that moves most counts, among equals the one that computes most."""
    wire = sum(line.bytes * line.trips for line in branch)
    return wire, sum(line.flops.total * line.trips for line in branch)


def flops(instruction: Compute, mesh: MeshShape, whole: MeshShape) -> Flops:
    """Operations of one run: the rule's per element of the iteration space, of which the padded
    local part is this device's."""
    rule, factors = instruction.op.rule, instruction.assignment.axes
    if rule.identity or not rule.flops:
        return Flops()
    size = local = shards = 1.0
    for name, factor in rule.factors.items():
        k = axes_size(mesh, factors.get(name, ()))
        if factor.kind is not Kind.FIXED:  # the rule's own count has what these run over
            size *= factor.size
            local *= -(-factor.size // k)
            shards *= k
    if not rule.factors:
        size = local = float(_elements(instruction))
    devices = max(whole.size / _manual(mesh), 1.0)
    even, share = size / shards, size / devices
    if instruction.op.recomputed:
        return Flops(0.0, 0.0, 0.0, local).times(rule.flops)
    return Flops(share, max(even - share, 0.0), max(local - even, 0.0)).times(rule.flops)


def _elements(instruction: Compute) -> int:
    return max((prod(k.value.shape) for k in instruction.results), default=0)


def _manual(mesh: MeshShape) -> int:
    """Devices among which a manual region is divided already: shapes in it are local to them."""
    return prod(size for _, size in mesh.manual) if mesh.manual else 1


def wires(instruction: Compute, mesh: MeshShape, known: dict) -> tuple[Wire, ...]:
    """Collectives of a rule's `local` function, or of a collective in a manual region.

    Args:
      known: what was found before, to which this is added.
    """
    op, assigned = instruction.op, instruction.assignment
    rule = op.rule
    sharded = any(axes for _, axes in assigned.factors)
    if not (rule.local and (sharded or rule.always)) and op.primitive not in collectives.KINDS:
        return ()
    key = _signature(instruction, mesh)
    if key not in known:
        known[key] = _traced(instruction, mesh)
    return known[key]


def _signature(instruction: Compute, mesh: MeshShape) -> Any:
    """Equal for instructions whose `local` functions do the same; unequal ones where unsure."""
    op = instruction.op
    sides = [(k.value.shape, str(k.value.dtype), k.layout, _literal(k.value))
             for k in (*instruction.operands, *instruction.results)]  # fmt: skip
    key = (op.primitive, instruction.assignment, tuple(sides), mesh, instruction.unread)
    try:
        params = tuple(sorted(op.params.items()))
        hash(params)
    except TypeError:
        return (op.index, key)
    return (params, key)


def _literal(value: Value) -> Any:
    return None if value.const is None or value.rank else str(value.const)


def _traced(instruction: Compute, mesh: MeshShape) -> tuple[Wire, ...]:
    sizes = {**dict(mesh.axes), **dict(mesh.manual)}
    names = tuple(sizes)
    whole = PartitionSpec()
    avals = [
        jax.ShapeDtypeStruct(k.layout.local_shape(k.value.shape, mesh), k.value.dtype)
        for k in instruction.operands
    ]
    constants = {i: k.value.const for i, k in enumerate(instruction.operands)
                 if k.value.const is not None and not k.value.rank}  # fmt: skip

    def run(*operands: Any) -> Any:
        given = [constants.get(i, x) for i, x in enumerate(operands)]
        return tuple(LocalView(instruction, mesh).run(given))

    abstract = AbstractMesh(tuple(sizes.values()), names)
    mapped = jax.shard_map(run, mesh=abstract, in_specs=(whole,) * len(avals),
                           out_specs=whole, check_vma=False)  # fmt: skip
    jaxpr = jax.make_jaxpr(mapped)(*avals).jaxpr
    return tuple(Wire(c.kind, c.axes, c.count, c.bytes)
                 for c in collectives.summarize(collectives.count(jaxpr, sizes)))  # fmt: skip


def totals(found: tuple[Line, ...]) -> Mapping[tuple[str, tuple[str, ...]], tuple[int, float]]:
    """(kind, axes) -> count and wire bytes per call of the program."""
    merged: dict[tuple[str, tuple[str, ...]], tuple[int, float]] = {}
    for line in found:
        for wire in line.wires:
            n, size = merged.get((wire.kind, wire.axes), (0, 0.0))
            merged[wire.kind, wire.axes] = (
                n + line.trips * wire.count, size + line.trips * wire.bytes
            )  # fmt: skip
    return {key: value for key, value in merged.items() if value[0]}
