"""The partitioner and runtime: `spmd.jit`, its stages, and what they report."""

from spmd.ahead.compile import aot as aot
from spmd.ahead.result import Ahead as Ahead
from spmd.check import CheckError as CheckError
from spmd.check import check as check
from spmd.checking.report import CheckReport as CheckReport
from spmd.collectives import Collective as Collective
from spmd.compiled import Compiled as Compiled
from spmd.compiled import Lowered as Lowered
from spmd.dispatch import Function as Function
from spmd.dispatch import jit as jit
from spmd.explaining.inspection import explain as explain
from spmd.partition.plan import Diagnostic as Diagnostic
from spmd.reporting.diff import ReportDiff as ReportDiff
from spmd.reporting.model import Report as Report
from spmd.reporting.stage import report as report
from spmd.reporting.stage import report_diff as report_diff
from spmd.stages import Partitioned as Partitioned
from spmd.stages import Propagated as Propagated
from spmd.stages import Traced as Traced

__all__ = [
    "Ahead", "CheckError", "CheckReport", "Collective", "Compiled", "Diagnostic", "Function",
    "Lowered", "Partitioned", "Propagated", "Report", "ReportDiff", "Traced", "aot", "check",
    "explain", "jit", "report", "report_diff",
]  # fmt: skip
