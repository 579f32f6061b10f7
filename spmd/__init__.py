"""The partitioner and runtime: `spmd.jit`, its stages, and what they report."""

from spmd.collectives import Collective as Collective
from spmd.compiled import Compiled as Compiled
from spmd.compiled import Lowered as Lowered
from spmd.dispatch import Function as Function
from spmd.dispatch import jit as jit
from spmd.partition.plan import Diagnostic as Diagnostic
from spmd.stages import Partitioned as Partitioned
from spmd.stages import Propagated as Propagated
from spmd.stages import Traced as Traced

__all__ = [
    "Collective", "Compiled", "Diagnostic", "Function", "Lowered", "Partitioned", "Propagated",
    "Traced", "jit",
]  # fmt: skip
