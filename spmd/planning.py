"""The plan of a propagated program for the devices of its mesh, within their memory."""

from collections.abc import Mapping, Sequence

from sharding.collector import uncollected
from sharding.propagation import Propagated
from sharding.spec import Layout
from spmd.estimate import liveness
from spmd.options import Options
from spmd.partition.plan import ProgramPlan
from spmd.partition.planner import make_plan
from spmd.partition.saved import save_gathers, sent
from spmd.target import compiler_of, suited

# Passes that send less for memory, in the order in which they are given up where there is none.
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

    def planned(
        assumed: Mapping[int, Layout] | None = None, without: Sequence[str] = ()
    ) -> ProgramPlan:
        off = (*options.disable_passes, *without)
        return suited(make_plan(propagated, in_layouts, out_layouts, off, assumed), options)

    def peak(plan: ProgramPlan) -> int:
        return peak_bytes(plan, donated, options)

    with uncollected():
        plan, limit = planned(), options.memory_limit
        if limit is None:
            return plan
        if peak(plan) > limit:
            others = [planned(without=without) for without in _FOR_MEMORY]
            fitting = [other for other in others if peak(other) <= limit]
            return min(fitting, key=sent) if fitting else min([plan, *others], key=peak)
        return save_gathers(plan, planned, peak, limit) if options.on("saved_gathers") else plan


def peak_bytes(plan: ProgramPlan, donated: Sequence[bool], options: Options) -> int:
    """Predicted peak bytes of a plan, per device."""
    return liveness.peak_bytes(plan, donated, compiler_of(options.mesh))
