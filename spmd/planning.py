"""The plan of a propagated program for the devices of its mesh, within their memory."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sharding.collector import uncollected
from sharding.propagation import Propagated
from sharding.spec import Layout
from spmd.estimate import liveness
from spmd.options import Options
from spmd.partition.moved import moves, spent
from spmd.partition.plan import ProgramPlan
from spmd.partition.planner import make_plan
from spmd.partition.saved import save_gathers, sent
from spmd.regather import regathered
from spmd.target import compiler_of, suited, traits

# Passes that send less for memory, as they are given up where there is none.
_FOR_MEMORY = (("loop_invariants",), ("loop_sums",), ("loop_invariants", "loop_sums"))


def make_suited_plan(
    propagated: Propagated, in_layouts: Sequence[Layout], out_layouts: Sequence[Layout],
    donated: Sequence[bool], options: Options,
) -> ProgramPlan:  # fmt: skip
    """The partitioned program as data, as the compiler for the mesh's chip takes it best: that
    which sends least of those that fit into `memory_limit`, or the smallest where none does.

    Args:
      propagated: a sharding for every value.
      in_layouts: boundary layouts of the arguments, on the mesh of `propagated`.
      out_layouts: the same for the results.
      donated: per argument, whether the results may take its memory.
    """

    planning = _Planning(propagated, in_layouts, out_layouts, donated, options)
    with uncollected():
        plan, limit = planning.planned(), options.memory_limit
        if limit is None:
            return plan
        if planning.peak(plan) > limit:
            return planning.smaller(plan, limit)
        if not options.on("saved_gathers"):
            return plan
        return save_gathers(plan, planning.planned, planning.peak, limit)


class _Planning(NamedTuple):
    """Plans of one program; see `make_suited_plan`."""

    propagated: Propagated
    in_layouts: Sequence[Layout]
    out_layouts: Sequence[Layout]
    donated: Sequence[bool]
    options: Options

    def planned(
        self, assumed: Mapping[int, Layout] | None = None, without: Sequence[str] = ()
    ) -> ProgramPlan:
        off = (*self.options.disable_passes, *without)
        made = make_plan(
            self.propagated, self.in_layouts, self.out_layouts, off, assumed, traits(self.options)
        )
        return suited(made, self.options)

    def ordered(self, plan: ProgramPlan) -> liveness.Ordered:
        return liveness.ordered(plan, self.donated, compiler_of(self.options))

    def peak(self, plan: ProgramPlan) -> int:
        return peak_bytes(plan, self.donated, self.options)

    def smaller(self, plan: ProgramPlan, limit: int) -> ProgramPlan:
        """Of the ways to hold less the one that fits and sends least, or that holds least."""
        plans, ways = [plan], _FOR_MEMORY
        if moves(plan):
            ways = (*ways, *((*way, "moved_axes") for way in ((), *_FOR_MEMORY)))
        for without in ways:
            other = self.planned(without=without)
            plans += [other] if all(other.body != each.body for each in plans) else []
        found = [(each, self.ordered(each)) for each in plans]
        for each, order in [*found] if self.options.on("regathers") else ():
            if each is plan or all(other.memory.peak > limit for _, other in found):
                found.append(regathered(each, order, self.ordered, limit))
        fits = [each for each, order in found if order.memory.peak <= limit]
        return min(fits, key=sent) if fits else min(found, key=lambda pair: pair[1].memory.peak)[0]


def weight(
    plan: ProgramPlan, donated: Sequence[bool], options: Options
) -> tuple[int, float]:  # fmt: skip
    """Of two plans the lesser is better: the bytes that are missing for it in `memory_limit`, and
    what it moves and multiplies, in bytes on a link."""
    limit = options.memory_limit
    over = 0 if limit is None else max(peak_bytes(plan, donated, options) - limit, 0)
    return over, spent(plan.body, traits(options).waits)


def peak_bytes(plan: ProgramPlan, donated: Sequence[bool], options: Options) -> int:
    """Predicted peak bytes of a plan, per device."""
    return liveness.peak_bytes(plan, donated, compiler_of(options))
