"""`spmd.report` and `spmd.report_diff`, and what stages have of them."""

from typing import Any

from sharding.errors import ArgumentError, Problem
from spmd.hardware import Machine
from spmd.reporting import notebook
from spmd.reporting.build import build
from spmd.reporting.diff import ReportDiff
from spmd.reporting.model import Report
from spmd.target import compiler_of


class Reporting:
    """Mixin of the stages: what they report, and how notebooks show them."""

    def report(self, machine: Machine | str | None = None) -> Report:
        """What the program computes, moves and holds on one device; see `spmd.report`.

        Args:
          machine: on which times are predicted: `v5p:4x4x4`. None: no times.

        Raises:
          MeshError: there is no such machine, or the mesh does not fit it.
        """
        return _of_stage(self, machine)

    def _repr_html_(self) -> str:
        """A partitioned program's report; earlier stages as they print."""
        if _partitioned(self) is None:
            return notebook.preformatted(str(self))
        return self.report()._repr_html_()


def report(
    program: Any, *args: Any, machine: Machine | str | None = None, **kwargs: Any
) -> Report:
    """What a program computes, moves and holds on one device, without running it.

    Args:
      program: any stage of a program, where earlier ones are partitioned first; or what
        `spmd.jit` returned.
      args, kwargs: of the function, where that is what is given; `jax.ShapeDtypeStruct`s will do.
      machine: on which times are predicted: a `Machine` or its text, such as `v5p:4x4x4`. None:
        no times.

    Raises:
      ArgumentError: `program` is neither, or a stage is given arguments.
      MeshError: there is no such machine, or the mesh does not fit it.
    """
    if isinstance(program, Reporting):
        if args or kwargs:
            raise ArgumentError(_no_arguments(program))
        return program.report(machine)
    if not hasattr(program, "trace"):
        raise ArgumentError(_no_program(program))
    return program.trace(*args, **kwargs).report(machine)


def report_diff(before: Any, after: Any, machine: Machine | str | None = None) -> ReportDiff:
    """What changes from one program to another.

    Args:
      before, after: reports, or stages to report.
      machine: for stages, see `report`.

    Raises:
      ArgumentError: something else is given.
    """
    first, second = (
        r if isinstance(r, Report) else report(r, machine=machine) for r in (before, after)
    )
    return first.diff(second)


def _partitioned(stage: Any) -> Any:
    """The partitioned stage that this one is or was made from; None for those before it."""
    return stage if hasattr(stage, "plan") else getattr(stage, "partitioned", None)


def _of_stage(stage: Any, machine: Machine | str | None) -> Report:
    if _partitioned(stage) is None:
        stage = stage if hasattr(stage, "result") else stage.propagate()
        partitioned = stage.inspector.partitioned  # whatever it warns of or forbids is a finding
    else:
        partitioned = _partitioned(stage)
    traced = partitioned.propagated.traced
    return build(
        partitioned.plan, name=traced.fun_name,
        machine=Machine.parse(machine) if isinstance(machine, str) else machine,
        compiler=compiler_of(traced.options), donated=traced.donated,
        diagnostics=partitioned.diagnostics,
    )  # fmt: skip


def _no_arguments(program: Any) -> Problem:
    what = f"spmd.report was given a {type(program).__name__} and arguments"
    return Problem(what, "a stage is of a program that has its arguments already",
                   "pass the stage alone, and the machine as machine=")  # fmt: skip


def _no_program(program: Any) -> Problem:
    what = f"spmd.report was given a {type(program).__name__}"
    return Problem(what, "a report is of a partitioned program",
                   "pass a stage (Traced, Propagated, Partitioned, Lowered, Compiled), or the "
                   "function that spmd.jit returned and its arguments")  # fmt: skip
