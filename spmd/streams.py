"""`streams`: what leads from collective to collective runs in two parts, one beside the other.

In a layer whose weights are sharded over `tensor`, everything waits for one sum after the other:
the way forward is a chain. Where examples or positions do not meet between those sums, half of them
can be computed while the sum of the other half is on its way:

    a device   attention of A | attention of B | feed-forward of A | feed-forward of B
    its links                 | sum of A       | sum of B          | sum of A ...

Nothing is sent twice, and no product is another one. Parts of a batch that overlap so are known
from Domino (arXiv 2409.15241) and, by hand, from serving; Wang et al. (ASPLOS 2023) decompose
products into rings of permutes instead.

Which dim can be divided so follows from the rules: one that a collective leaves as it is, followed
through every equation that computes its elements each on its own. What sums over it (gradients of
weights, a loss) is added up of both parts, in its dtype, as sums over devices are; what mixes its
elements otherwise (attention along a sequence) is computed whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from spmd.chains import COUNT, Chain, Search, Setting, inputs_of
from spmd.chips import Chip
from spmd.partition.plan import Compute, Key, Move, Parts, ProgramPlan, RegionPlan
from spmd.partition.scatters import scattered


def in_streams(plan: ProgramPlan, chip: Chip) -> ProgramPlan:
    """The plan with instructions in parts where that hides collectives.

    What a loop stacks in parts costs nothing where another loop takes it so. Whether one does shows
    when that is decided; so all is decided both ways, and what saves more is kept.
    """
    first = Setting(chip, plan.mesh, True, {})
    tries = [_Streams(setting) for setting in (first, replace(first, stacks=False))]
    made = [(each.region(plan.body, {}, 1)[0], each.gain) for each in tries]
    body, gain = max(made, key=lambda pair: pair[1])
    return replace(plan, body=body) if gain > 0 else plan


def streams(plan: ProgramPlan) -> bool:
    """Whether anything of a plan runs in parts."""
    return any(one.parts is not None for one, _ in plan.body.walk())


class _Streams:
    """Decides for the regions of a program, in order.

    Attributes:
      gain: seconds saved so far.
    """

    def __init__(self, setting: Setting):
        self.setting, self.gain = setting, 0.0

    def region(
        self, body: RegionPlan, given: Mapping[Key, int], trips: int,
        chain: Chain | None = None,
    ) -> tuple[RegionPlan, Mapping[Key, int]]:
        """A region with instructions in parts, and the dims along which values in it lie in parts.

        Args:
          given: those of its inputs.
          trips: how often it runs.
          chain: of the inputs and outputs of what it belongs to, a loop or a call.
        """
        search = Search(body, self.setting, chain)
        parts = dict(search.run())
        self.gain += trips * search.saved
        lie, passed, code = dict(given), {*given}, []  # passed: in parts, by other regions
        for i, one in enumerate(body.code):
            if i in parts:
                one = replace(one, parts=parts[i])
                if isinstance(one, Move) and self.setting.chip.gathers_alone:
                    one = scattered(one, body.mesh)
            elif isinstance(one, Compute) and one.regions:
                one = self.control(one, lie, trips, search.chain)
            if one.parts is not None:
                dims = zip(one.writes, one.parts.results, strict=True)
                lie |= {key: dim for key, dim in dims if dim is not None}
                passed |= {*one.writes} if i not in parts else set()
            code.append(one)
        passed &= lie.keys()
        whole = {key for one in code if one.parts is None for key in one.reads if key in passed}
        self.gain -= trips * sum(map(search.twice, whole))
        return replace(body, code=tuple(code)), lie

    def control(
        self, one: Compute, lie: Mapping[Key, int], trips: int, chain: Chain
    ) -> Compute:
        """A loop, call or branch with its regions in parts."""
        control = one.op.control
        assert control is not None
        inner = trips * control.trips(one.op)
        if not control.trees:
            return replace(one, regions=tuple(self.region(r, {}, inner)[0] for r in one.regions))
        (before,), saved = one.regions, self.gain
        inside = chain.inside(one, before)
        dims = self._taken(one, lie)
        body, made = self.region(before, self._given(one, before, dims), inner, inside)
        carries = {i: made.get(body.outputs[out]) for _, out, i in control.carries(one.op)}
        if any(dims[i] != dim for i, dim in carries.items()):
            dims, self.gain = [carries.get(i, dim) for i, dim in enumerate(dims)], saved
            body, made = self.region(before, self._given(one, before, dims), inner, inside)
        results = []
        for port in one.op.out_ports:
            dim = made.get(body.outputs[port.inner])
            results.append(dim + 1 if port.stacked and dim is not None else dim)
        for _, out, i in control.carries(one.op):
            results[out] = dims[i]
        if not any(dim is not None for dim in (*dims, *results)):
            return replace(one, regions=(body,))
        return replace(one, regions=(body,), parts=Parts(COUNT, tuple(dims), tuple(results)))

    def _taken(self, one: Compute, lie: Mapping[Key, int]) -> list[int | None]:
        """Dims along which operands of a loop or call come in parts. What a loop runs over is cut
        along another, and what is the same in all of its steps is joined before them."""
        assert one.op.control is not None
        carried = {inner for _, _, inner in one.op.control.carries(one.op)}
        dims: list[int | None] = []
        for port in one.op.in_ports:
            dim = lie.get(one.operands[port.outer])
            constant = one.op.control.counted and not port.stacked and port.inner not in carried
            dims.append(None if constant or (port.stacked and not dim) else dim)
        return dims

    def _given(
        self, one: Compute, body: RegionPlan, dims: Sequence[int | None]
    ) -> Mapping[Key, int]:
        """Inputs of a region that come in parts, of the dims of operands."""
        inputs, given = inputs_of(body), {}
        for port in one.op.in_ports:
            dim = dims[port.outer]
            if dim is not None:
                given[inputs[port.inner]] = dim - 1 if port.stacked else dim
        return given
