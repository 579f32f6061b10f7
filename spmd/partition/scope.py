"""Plans one region: a decision per operation, a move per reshard, each layout made once.

Values keep every layout they were brought into, so that the same value is resharded the same way
once per region. Partial values stay partial until something needs them whole.
"""

from collections.abc import Sequence
from typing import Any

from sharding.mesh import MeshShape, axes_size
from sharding.program import Op, Region, Value
from sharding.spec import Layout
from spmd.partition import diagnose
from spmd.partition.again import again, from_nothing
from spmd.partition.choose import choose
from spmd.partition.loops import improved
from spmd.partition.placed import forced, makes, needs
from spmd.partition.plan import Assignment, Compute, Key, Move
from spmd.partition.regions import plan_regions
from spmd.partition.reshard import plan
from spmd.partition.tensor import Tensor


class Scope:
    """One region being planned: which layouts of which values are at hand.

    Args:
      planner: `planner._Planner`.
      inputs: layouts of the region's inputs.
    """

    def __init__(self, planner: Any, region: Region, mesh: MeshShape, inputs: Sequence[Layout]):
        self.planner, self.mesh = planner, mesh
        planner.settle(region)
        self.code: list[Move | Compute] = []
        self.at_hand: dict[int, list[Layout]] = {}
        for value, layout in zip(region.inputs, inputs, strict=True):
            self.at_hand[value.id] = [layout]
        self.at_hand |= {value.id: [whole(value)] for value in region.consts}

    def layouts(self, value: Value) -> list[Layout]:
        return self.at_hand.get(value.id) or [whole(value)]

    def tensor(self, value: Value, op: Op) -> Tensor:
        readers = self.planner.readers(value) if self.planner.uses[value.id] > 1 else ()
        return Tensor(
            value.shape, value.itemsize, tuple(self.layouts(value)), readers,
            anywhere=from_nothing(value), late=self.planner.late(value, op),
        )  # fmt: skip

    def compute(self, op: Op) -> None:
        rule = op.rule
        wanted = [self.planner.wanted(v) for v in op.outputs]
        operands = tuple(self.tensor(v, op) for v in op.inputs)
        results: tuple[Tensor, ...] = ()
        if rule.elementary:
            self.keep(op)
            return
        if (rule.annotation is not None and not _passes(op, operands)) or op.from_nothing:
            assignment = forced(rule, wanted[0], self.mesh)
        elif rule.early and agree(op, [tensor.layouts[0] for tensor in operands], wanted[0]):
            assignment = forced(rule, wanted[0], self.mesh)
        else:
            results = tuple(map(self.planner.result, op.outputs))
            assignment = choose(rule, operands, results, self.mesh)
        self.emit(op, assignment, operands, results)

    def keep(self, op: Op) -> None:
        """Every operand passes as it is. One that is read and not passed on is whole in what its
        readers see: it is reduced, and has no padding."""
        kept = [self.layouts(v)[0] for v in op.inputs]
        if not op.outputs:
            kept = [_even(a.reduced(), v, self.mesh) for a, v in zip(kept, op.inputs, strict=True)]
        reads = tuple(self.read(v, k, op) for v, k in zip(op.inputs, kept, strict=True))
        results = tuple(Key(v, k.layout) for v, k in zip(op.outputs, reads, strict=False))
        for value, layout, _ in results:
            self.at_hand.setdefault(value.id, []).append(layout)
        self.code.append(Compute(op, Assignment(()), reads, results))

    def emit(
        self, op: Op, assignment: Assignment, operands: Sequence[Tensor],
        chosen_for: tuple[Tensor, ...] = (),
    ) -> None:  # fmt: skip
        needed = needs(op.rule, assignment, operands, self.mesh)
        reads = tuple(self.read(v, n, op) for v, n in zip(op.inputs, needed, strict=True))
        made = makes(op.rule, assignment, self.mesh)
        results = tuple(Key(v, m) for v, m in zip(op.outputs, made, strict=True))
        for value, layout, _ in results:
            self.at_hand.setdefault(value.id, []).append(layout)
        unread = tuple(not self.planner.uses[v.id] for v in op.outputs)
        asked = (tuple(operands), chosen_for) if chosen_for else ()
        self.code.append(Compute(op, assignment, reads, results, (), unread, asked))

    def read(self, value: Value, need: Layout, op: Op | None) -> Key:
        """The value in a layout; emits the move when it is not at hand."""
        if value.const is not None and value.rank == 0 and not need.partial:
            return Key(value, need)
        layouts = self.layouts(value)
        if need in layouts:
            return Key(value, need)
        itemsize = value.itemsize
        options = [(plan(a, need, value.shape, itemsize, self.mesh), a) for a in layouts]
        best, src = min(options, key=lambda option: option[0].cost)
        made = need.reduced()
        anew = again(value, made, self.layouts, self.mesh) if made not in layouts else None
        if value.op is not None and anew is not None and (best.bytes or from_nothing(value)):
            self.emit(value.op, anew, [self.tensor(v, value.op) for v in value.op.inputs])
            return self.read(value, need, op)
        self.code.append(Move(value, src, need, best, op))
        self.at_hand.setdefault(value.id, [src]).append(need)
        if op is not None:
            found = diagnose.gather(op, value, best, self.mesh)
            self.planner.diagnostics += [found] if found else []
        return Key(value, need)

    def control(self, op: Op) -> None:
        """A control-flow op: layouts at the regions' boundaries are those propagated there, unless
        a pass over loops knows better."""
        planner = self.planner
        found = improved(planner, self, op, plan_regions(planner, self, op, {}))
        planner.diagnostics += found.diagnostics
        reads, made = found.boundary.reads, found.boundary.made
        operands = tuple(self.read(v, reads.get(i, whole(v)), op) for i, v in enumerate(op.inputs))
        results = tuple(Key(v, made[i]) for i, v in enumerate(op.outputs))
        for value, layout, _ in results:
            self.at_hand[value.id] = [layout]
        self.code.append(Compute(op, Assignment(()), operands, results, found.regions))


def _passes(op: Op, operands: Sequence[Tensor]) -> bool:
    """Whether a partial sum goes through an annotation: through that of a cotangent, which nobody
    asked for. Where a user annotates one, it is reduced."""
    return op.rule.annotation.all_open and bool(operands[0].layouts[0].partial)


def whole(value: Value) -> Layout:
    """Every dim on every device."""
    return Layout(((),) * value.rank)


def _even(layout: Layout, value: Value, mesh: MeshShape) -> Layout:
    """With dims whole that the axes do not divide."""
    pairs = zip(layout.dims, value.shape, strict=True)
    return Layout(tuple(() if n % axes_size(mesh, a) else a for a, n in pairs), layout.partial)


def agree(op: Op, operands: Sequence[Layout], wanted: Layout) -> bool:
    """Every operand of full shape already lies as the result should; others are scalars."""
    if wanted.partial:
        return False
    shape = op.outputs[0].shape
    for value, layout in zip(op.inputs, operands, strict=True):
        if value.rank == 0:
            if layout.partial:
                return False
        elif value.shape != shape or layout != wanted:
            return False
    return all(v.shape == shape for v in op.outputs)
