"""`Inspection`: the questions that every stage after tracing answers."""

from functools import cached_property
from typing import Any

from spmd.explaining.explanation import Explanation, Why, WhyNot
from spmd.explaining.inspector import Inspector
from spmd.explaining.why import why
from spmd.explaining.why_not import why_not
from spmd.hardware import Machine
from spmd.reporting.stage import Reporting


class Inspection(Reporting):
    """Mixin of the stages from `Propagated` to `Compiled`."""

    @cached_property
    def inspector(self) -> Inspector:
        """What the answers are read from. Made once for a program, whichever stage is asked."""
        earlier: Any = getattr(self, "partitioned", None)
        if earlier is not None:
            return earlier.inspector
        propagated: Any = getattr(self, "propagated", None)
        return Inspector(self) if propagated is None else Inspector(propagated, self)

    def explain(self, value: Any) -> Explanation:
        """Why a value is sharded as it is: the chain of rules from an annotation to it, what lost
        and what that costs, and where it lies on every device.

        Args:
          value: an argument path (`params['w']`), a name of the printed program (`%12`, `result`,
            `result[0]`), or a source line (`model.py:12`: all values made there).

        Raises:
          ArgumentError: there is no such value.
        """
        return self.inspector.explain(value)

    def why(self, collective: Any, machine: Machine | str | None = None) -> Why:
        """Why collectives are there: the two shardings that each reconciles, its bytes and time,
        and which annotation would remove it. Annotations are tried one by one, each on the whole
        program, for the dearest few.

        Args:
          collective: a record of `collectives`, a kind (`all_reduce`, `all_reduce(tensor)`), a
            value that is moved, or a source line.
          machine: on whose links times are predicted: a `Machine` or its text, such as
            `v5p:4x4x4`. None: on one link of 180 GB/s, whatever the axes.

        Raises:
          ArgumentError: there is no such collective.
          MeshError: there is no such machine, or the mesh does not fit it.
        """
        return why(self.inspector, collective, machine)

    def why_not(self, value: Any, spec: Any) -> WhyNot:
        """Why a value is not sharded in another way, and what changes when it is annotated so: the
        program is propagated and planned again.

        Args:
          value: as for `explain`; it names one array.
          spec: a PartitionSpec, or anything else that an annotation may be; or `[data, -]`.

        Raises:
          ArgumentError: `value` names no array, or several.
        """
        return why_not(self.inspector, value, spec)


def explain(stage: Any, value: Any) -> Explanation:
    """Why a value of a program is sharded as it is; see `Inspection.explain`.

    Args:
      stage: any stage of a program. One that is only traced is propagated.
      value: an argument path, a name of the printed program, or a source line.

    Raises:
      ArgumentError: there is no such value.
    """
    return (stage if isinstance(stage, Inspection) else stage.propagate()).explain(value)
