"""Walks the propagated program and writes the plan: a decision per op, a move per reshard.

Values keep every layout they were brought into, so that the same value is resharded the same way
once per region. Partial values stay partial until something needs them whole.
"""

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence

from sharding.mesh import MeshShape, axes_size, refine, refine_refs
from sharding.program import Op, Region, Value
from sharding.propagation import Propagated
from sharding.region import Port
from sharding.spec import Layout
from spmd.partition import diagnose
from spmd.partition.again import again, from_nothing
from spmd.partition.broadcasts import late_broadcasts
from spmd.partition.choose import Alternatives, alternatives, choose
from spmd.partition.flattened import follow_flattened
from spmd.partition.gathers import shared
from spmd.partition.loops import improved
from spmd.partition.placed import expected, forced, makes, needs
from spmd.partition.plan import (
    Assignment,
    Compute,
    Diagnostic,
    Key,
    Move,
    ProgramPlan,
    RegionPlan,
)
from spmd.partition.regions import plan_regions
from spmd.partition.reshard import plan
from spmd.partition.sums import settle
from spmd.partition.tensor import FREE, Reader, Tensor, needs_whole

_LONG = 32  # equations from one reader to the next, of layers some fifty


def make_plan(
    propagated: Propagated, in_layouts: Sequence[Layout], out_layouts: Sequence[Layout],
    without: Collection[str] = (), assumed: Mapping[int, Layout] | None = None,
) -> ProgramPlan:  # fmt: skip
    """The partitioned program as data.

    Args:
      propagated: a sharding for every value.
      in_layouts: boundary layouts of the arguments, on the mesh of `propagated`.
      out_layouts: the same for the results.
      without: names of passes that are off.
      assumed: layouts of values inside of regions, by id, in place of those propagated.
    """
    used = {a for s in set(propagated.shardings) for d in s.dims for a in d.axes}
    refs = {a for a in used.union(*(x.used for x in (assumed or {}).values())) if ":" in a}
    while True:
        mesh = refine(propagated.mesh, refs)
        planner = _Planner(propagated, mesh, without)
        planner.assume(assumed or {})
        ins = [planner.refine(layout) for layout in in_layouts]
        outs = [planner.refine(layout) for layout in out_layouts]
        body = planner.region(propagated.program.body, mesh, ins, outs)
        more = _sub_axes(body)
        if not more:
            found = ProgramPlan(propagated.program, mesh, body, tuple(planner.diagnostics))
            return late_broadcasts(found) if planner.on("late_broadcasts") else found
        assert not more <= refs, f"parts of axes that are no parts of one another: {sorted(more)}"
        refs |= more


def _sub_axes(body: RegionPlan) -> set[str]:
    """Sub-axes that a plan uses and that are no axes of its mesh: a decision split an axis that
    propagation had not split, so the plan has to be made again on a finer mesh."""
    known = {a for a, _ in (*body.mesh.axes, *body.mesh.manual)}
    layouts = {key.layout for instruction, _ in body.walk() if isinstance(instruction, Compute)
               for key in (*instruction.operands, *instruction.results)}  # fmt: skip
    return {a for layout in layouts for a in layout.used if ":" in a and a not in known}


class _Planner:
    def __init__(self, propagated: Propagated, mesh: MeshShape, without: Collection[str]):
        self.propagated, self.mesh, self.without = propagated, mesh, without
        self.single = frozenset(name for name, size in propagated.mesh.axes if size == 1)
        self.uses = propagated.program.uses
        self.diagnostics: list[Diagnostic] = []
        refined = {s: self.refine(s.layout) for s in {*propagated.shardings}}
        self.layouts = [refined[s] for s in propagated.shardings]
        self.expected: dict[int, tuple[tuple[Layout, int], ...]] = {}
        self.alike: dict[int, tuple[tuple[Layout, int], ...]] = {}
        self.places: dict[int, list[int]] = {}  # of a value's readers in the program
        # Where sums are reduced, of all regions being planned: see `sums.Sums`.
        self.made: set[int] = set()
        self.carried: dict[int, tuple[str, ...]] = {}
        # Layouts that a pass wants, in place of those propagated.
        self.assumed: dict[int, Layout] = {}
        follow_flattened(self)

    def on(self, name: str) -> bool:
        """Whether a pass is on."""
        return name not in self.without

    def assume(self, layouts: Mapping[int, Layout], only: bool = False) -> dict[int, Layout]:
        """Wants other layouts of values, by id, in place of those propagated.

        Args:
          only: of these alone, and of no others any more.

        Returns:
          What was assumed before.
        """
        before = self.assumed
        if only or layouts:
            self.assumed = {**({} if only else before), **layouts}
            self.expected.clear()
            self.alike.clear()
        return before

    def refine(self, layout: Layout) -> Layout:
        """A layout on the user's mesh, on the refined mesh. Axes of one device are left out: XLA
        runs a collective among one device like any other."""
        single, refined = self.single, self.mesh is not self.propagated.mesh
        if not single and not refined:
            return layout
        dims = tuple(tuple(a for a in axes if a not in single) for axes in layout.dims)
        if refined and self.mesh != self.propagated.mesh:
            dims = tuple(refine_refs(self.propagated.mesh, self.mesh, axes) for axes in dims)
        return Layout(dims, tuple(p for p in layout.partial if p[0] not in single))

    def wanted(self, value: Value) -> Layout:
        """The propagated layout of a value, or the one that a pass assumes."""
        assumed = self.assumed.get(value.id) if self.assumed else None
        return self.layouts[value.id] if assumed is None else assumed

    def settle(self, region: Region) -> None:
        """Decides where the partial sums of a region are reduced."""
        if self.on("shared_sums"):
            sums = settle(self, region)
            for value in (v for op in region.ops for v in op.outputs):
                self.made.discard(value.id)
                self.carried.pop(value.id, None)
            self.made |= sums.made
            self.carried.update(sums.carried)

    def result(self, value: Value) -> Tensor:
        """What is wanted of a result."""
        wanted, carried = self.wanted(value), self.carried.get(value.id)
        # What is reduced later pays for it.
        later = value.id in self.made or bool(carried)
        return Tensor(
            value.shape, value.itemsize, (wanted,), ((wanted, FREE),) if later else (),
            used=self.uses[value.id] > 0, carried=carried, passed=self.passed(value, wanted),
        )  # fmt: skip

    def passed(self, value: Value, wanted: Layout) -> tuple[Reader, ...]:
        """Who reads the result of an operation that needs dims whole, where nothing says where it
        should be."""
        op, readers = value.op, self.propagated.program.readers[value.id]
        if op is None or op.control is not None or wanted.used or not needs_whole(op.rule):
            return ()
        plain = all(r.control is None and len(r.outputs) == 1 for r, _ in readers)
        if not plain or len(readers) != self.uses[value.id]:
            return ()
        outputs = [(r.rule.canonical, i, r.outputs[0]) for r, i in readers]
        return tuple(
            Reader(rule, i, out.shape, out.itemsize, self.wanted(out)) for rule, i, out in outputs
        )

    def leaving(self, value: Value) -> Layout:
        """The layout of a region's output: partial only where a pass assumes so."""
        return self.assumed.get(value.id, self.wanted(value).reduced())

    def alternatives(self, value: Value) -> Alternatives | None:
        """Of the operation that makes `value`, with every operand where it was propagated to."""
        op = value.op
        assert op is not None
        operands = tuple(
            Tensor(v.shape, v.itemsize, (self.wanted(v),), anywhere=from_nothing(v))
            for v in op.inputs
        )
        result = Tensor(value.shape, value.itemsize, (self.wanted(value),))
        return alternatives(op.rule, operands, result, self.mesh)

    def readers(self, value: Value) -> tuple[tuple[Layout, int], ...]:
        """In which layouts the readers of a value are expected to need it, where more than one."""
        found = self.expected.get(value.id)
        if found is None:
            found = self.counted(value)
            if self.on("shared_gathers"):
                found = shared(self, value, found)
            self.expected[value.id] = found
        return found

    def late(self, value: Value, op: Op) -> bool:
        """Whether others read a value too, all of those that come first long before an operation:
        what they needed of it would have to stay for so long."""
        if self.uses[value.id] < 2 or not value.rank:
            return False
        found = self.places.get(value.id)
        if found is None:
            readers = self.propagated.program.readers[value.id]
            found = self.places[value.id] = sorted(reader.index for reader, _ in readers)
        before = bisect_left(found, op.index)
        return before > 0 and op.index - found[before - 1] > _LONG

    def counted(self, value: Value) -> tuple[tuple[Layout, int], ...]:
        """In which layouts more than one reader needs a value, by what each has to make."""
        found = self.alike.get(value.id)
        if found is None:
            counts: dict[Layout, int] = {}
            for op, operand in self.propagated.program.readers[value.id]:
                need = self.need(op, operand)
                used = [a for dim in need.dims for a in dim]
                if len(used) > len(set(used)):
                    continue  # operands that are one value ask for an axis on two of its dims
                counts[need] = counts.get(need, 0) + 1
            found = tuple((need, n) for need, n in counts.items() if n > 1)
            self.alike[value.id] = found
        return found

    def need(self, op: Op, operand: int) -> Layout:
        if op.control is not None:
            port = next((p for p in op.in_ports if p.outer == operand), None)
            if port is None:
                return _whole(op.inputs[operand])
            value = op.regions[port.region].inputs[port.inner]
            return self.outside(self.at_boundary(value, port), port)
        wanted = [self.wanted(v) for v in (*op.inputs, *op.outputs)]
        count = len(op.inputs)
        return expected(op.rule, operand, wanted[:count], wanted[count:], self.mesh)

    def at_boundary(self, value: Value, port: Port) -> Layout:
        """The layout of a region's input or output: after manual axes, only even shards are parts
        of the outer value's shards."""
        layout = self.wanted(value).reduced()
        if not any(port.lead):
            return layout
        dims = tuple(
            axes if not lead or n % axes_size(self.mesh, axes) == 0 else ()
            for lead, axes, n in zip(port.lead, layout.dims, value.shape, strict=True)
        )
        return Layout(dims)

    def outside(self, inner: Layout, port: Port) -> Layout:
        """The layout of the outer value at a port."""
        return self.refine(Layout(port.outside(inner.dims), inner.partial))

    def region(
        self, region: Region, mesh: MeshShape, inputs: Sequence[Layout], outputs: Sequence[Layout]
    ) -> RegionPlan:
        scope = _Scope(self, region, mesh, inputs)
        for op in region.ops:
            if op.control is None:
                scope.compute(op)
            else:
                scope.control(op)
        keys = tuple(
            scope.read(value, layout, None)
            for value, layout in zip(region.outputs, outputs, strict=True)
        )
        return RegionPlan(region, mesh, tuple(inputs), keys, tuple(scope.code))


class _Scope:
    """One region being planned: which layouts of which values are at hand."""

    def __init__(
        self, planner: _Planner, region: Region, mesh: MeshShape, inputs: Sequence[Layout]
    ):
        self.planner, self.mesh = planner, mesh
        planner.settle(region)
        self.code: list[Move | Compute] = []
        self.at_hand: dict[int, list[Layout]] = {}
        for value, layout in zip(region.inputs, inputs, strict=True):
            self.at_hand[value.id] = [layout]
        self.at_hand |= {value.id: [_whole(value)] for value in region.consts}

    def layouts(self, value: Value) -> list[Layout]:
        return self.at_hand.get(value.id) or [_whole(value)]

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
        elif rule.early and _agree(op, operands, wanted[0]):
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
            kept = [
                _even(a.reduced(), v, self.mesh) for a, v in zip(kept, op.inputs, strict=True)
            ]
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
        self.planner.diagnostics += diagnose.own_gathers(op, assignment, needed, self.mesh)

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
        operands = tuple(
            self.read(v, reads.get(i, _whole(v)), op) for i, v in enumerate(op.inputs)
        )
        results = tuple(Key(v, made[i]) for i, v in enumerate(op.outputs))
        for value, layout, _ in results:
            self.at_hand[value.id] = [layout]
        self.code.append(Compute(op, Assignment(()), operands, results, found.regions))


def _passes(op: Op, operands: Sequence[Tensor]) -> bool:
    """Whether a partial sum goes through an annotation: through that of a cotangent, which nobody
    asked for. Where a user annotates one, it is reduced."""
    return op.rule.annotation.all_open and bool(operands[0].layouts[0].partial)


def _whole(value: Value) -> Layout:
    return Layout(((),) * value.rank)


def _even(layout: Layout, value: Value, mesh: MeshShape) -> Layout:
    """With dims whole that the axes do not divide."""
    pairs = zip(layout.dims, value.shape, strict=True)
    return Layout(tuple(() if n % axes_size(mesh, a) else a for a, n in pairs), layout.partial)


def _agree(op: Op, operands: Sequence[Tensor], wanted: Layout) -> bool:
    """Every operand of full shape already lies as the result should; others are scalars."""
    if wanted.partial:
        return False
    shape = op.outputs[0].shape
    for value, tensor in zip(op.inputs, operands, strict=True):
        if value.rank == 0:
            if tensor.layouts[0].partial:
                return False
        elif value.shape != shape or tensor.layouts[0] != wanted:
            return False
    return all(v.shape == shape for v in op.outputs)


