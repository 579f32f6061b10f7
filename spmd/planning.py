"""The plan of a propagated program for the devices of its mesh, within their memory."""

from collections.abc import Mapping, Sequence

from sharding.propagation import Propagated
from sharding.spec import Layout
from spmd.estimate import liveness
from spmd.options import Options
from spmd.partition.plan import ProgramPlan
from spmd.partition.planner import make_plan
from spmd.partition.saved import save_gathers
from spmd.target import compiler_of, suited


def make_suited_plan(
    propagated: Propagated, in_layouts: Sequence[Layout], out_layouts: Sequence[Layout],
    donated: Sequence[bool], options: Options,
) -> ProgramPlan:  # fmt: skip
    """The partitioned program as data, as the compiler for the mesh's chip takes it best.

    Args:
      propagated: a sharding for every value.
      in_layouts: boundary layouts of the arguments, on the mesh of `propagated`.
      out_layouts: the same for the results.
      donated: per argument, whether the results may take its memory.
    """

    def planned(assumed: Mapping[int, Layout] | None = None) -> ProgramPlan:
        found = make_plan(propagated, in_layouts, out_layouts, options.disable_passes, assumed)
        return suited(found, options)

    plan, limit = planned(), options.memory_limit
    if limit is None or not options.on("saved_gathers"):
        return plan
    return save_gathers(plan, planned, lambda plan: peak_bytes(plan, donated, options), limit)


def peak_bytes(plan: ProgramPlan, donated: Sequence[bool], options: Options) -> int:
    """Predicted peak bytes of a plan, per device."""
    return liveness.peak_bytes(plan, donated, compiler_of(options.mesh))
