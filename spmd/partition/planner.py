"""From a propagated program to its plan: what is wanted of every value, and by whom.

`scope.Scope` walks a region and decides its operations; what it asks of a value is answered here.
"""

from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

from sharding.mesh import MeshShape, axes_size, refine, refine_refs
from sharding.program import Op, Region, Value
from sharding.propagation import Propagated
from sharding.region import Port
from sharding.spec import Layout
from spmd.cost import ANY, Traits
from spmd.partition.again import from_nothing
from spmd.partition.around import HIDDEN
from spmd.partition.broadcasts import late_broadcasts
from spmd.partition.choose import Alternatives, alternatives
from spmd.partition.direct import direct_moves
from spmd.partition.flattened import follow_flattened
from spmd.partition.gathers import shared
from spmd.partition.moved import TAKEN, Moved, Wanted, cheaper, move_axes, spent
from spmd.partition.placed import expected
from spmd.partition.plan import (
    Compute,
    Diagnostic,
    Key,
    ProgramPlan,
    RegionPlan,
)
from spmd.partition.scope import Scope, whole
from spmd.partition.sums import settle
from spmd.partition.tensor import FREE, Reader, Tensor, needs_whole

_LONG = 32  # equations from one reader to the next, of layers some fifty


def make_plan(
    propagated: Propagated, in_layouts: Sequence[Layout], out_layouts: Sequence[Layout],
    without: Collection[str] = (), assumed: Mapping[int, Layout] | None = None,
    traits: Traits = ANY,
) -> ProgramPlan:  # fmt: skip
    """The partitioned program as data.

    Args:
      propagated: a sharding for every value.
      in_layouts: boundary layouts of the arguments, on the mesh of `propagated`.
      out_layouts: the same for the results.
      without: names of passes that are off.
      assumed: layouts of values inside of regions, by id, in place of those propagated.
      traits: of the chip and its compiler.
    """

    def planned(*off: str, wanted: Wanted | None = None) -> tuple[ProgramPlan, Moved]:
        off = (*without, *off)
        planner = partial(_Planner, propagated, without=off, traits=traits, begin=wanted)
        return _planned(planner, propagated, in_layouts, out_layouts, assumed or {})

    found, moved = planned()
    if moved.told:
        if moved.before is not None:
            both = (found, moved), planned(wanted=moved.before)
            found, moved = min(both, key=lambda one: spent(one[0].body, traits.waits, delays=True))
        other, _ = planned("moved_axes")
        less = [name for name, has in ((TAKEN, moved.taken), (HIDDEN, traits.waits)) if has]
        while not (better := cheaper(found.body, other.body, traits.waits)) and less:
            found, _ = planned(less.pop(0))
        found = found if better else other
    return found if "late_broadcasts" in without else late_broadcasts(found)


def _planned(
    make: "Callable[..., _Planner]", propagated: Propagated, in_layouts: Sequence[Layout],
    out_layouts: Sequence[Layout], assumed: Mapping[int, Layout],
) -> tuple[ProgramPlan, Moved]:  # fmt: skip
    """The plan, on a mesh as fine as it takes, and what `moved_axes` did for it.

    Args:
      make: of a mesh, what is wanted on it.
    """
    used = {a for s in set(propagated.shardings) for d in s.dims for a in d.axes}
    refs = {a for a in used.union(*(x.used for x in assumed.values())) if ":" in a}
    while True:
        mesh = refine(propagated.mesh, refs)
        planner = make(mesh=mesh)
        planner.assume(assumed)
        ins = [planner.refine(layout) for layout in in_layouts]
        outs = [planner.refine(layout) for layout in out_layouts]
        body = planner.region(propagated.program.body, mesh, ins, outs)
        more = _sub_axes(body)
        if not more:
            told = (*planner.moved.told, *planner.diagnostics)
            return ProgramPlan(propagated.program, mesh, body, told), planner.moved
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
    def __init__(
        self, propagated: Propagated, mesh: MeshShape, without: Collection[str],
        traits: Traits, begin: Wanted | None = None,
    ):  # fmt: skip
        self.traits = traits
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
        # Layouts in which values leave their regions, where they lie otherwise outside.
        self.leave: dict[int, Layout] = {}
        self.moved = Moved()
        if begin is not None and begin.mesh == mesh:
            self.layouts, self.leave, self.moved = [*begin.layouts], {**begin.leave}, begin.moved
            return
        follow_flattened(self)
        if self.on("moved_axes"):
            self.moved = move_axes(self)

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
        return self.assumed.get(value.id) or self.at_end(value)

    def at_end(self, value: Value) -> Layout:
        """Where a value lies as the input or output of a region."""
        return self.leave.get(value.id) or self.wanted(value).reduced()

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
                return whole(op.inputs[operand])
            value = op.regions[port.region].inputs[port.inner]
            return self.outside(self.at_boundary(value, port), port)
        wanted = [self.wanted(v) for v in (*op.inputs, *op.outputs)]
        count = len(op.inputs)
        return expected(op.rule, operand, wanted[:count], wanted[count:], self.mesh)

    def at_boundary(self, value: Value, port: Port) -> Layout:
        """The layout of a region's input or output: after manual axes, only even shards are parts
        of the outer value's shards."""
        layout = self.at_end(value)
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
        scope = Scope(self, region, mesh, inputs)
        for op in region.ops:
            if op.control is None:
                scope.compute(op)
            else:
                scope.control(op)
        keys = tuple(
            scope.read(value, layout, None)
            for value, layout in zip(region.outputs, outputs, strict=True)
        )
        code = scope.code
        if self.on("direct_moves"):
            given = map(Key, region.inputs, inputs)
            code = direct_moves(code, [*given], keys, mesh)
        return RegionPlan(region, mesh, tuple(inputs), keys, tuple(code))
