"""What `spmd.check` found: frozen, and clear as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sharding.mesh import MeshShape
from sharding.op import Op
from sharding.program import Value, describe, type_text
from spmd.checking.compare import Difference
from spmd.checking.shards import coordinates
from spmd.partition.plan import Compute, Key, Move

SHOWN = 10  # rows of a list in the text


@dataclass(frozen=True)
class Divergence:
    """One instruction of the plan whose result is not that of the unsharded program.

    Attributes:
      instruction: of the plan: a `Compute` (an equation) or a `Move` (a reshard).
      key: the value that differs, and its layout.
      where: the loops, branches and calls around it, outermost first.
      difference: how much differs; indices are those of the whole value.
      device: position in the mesh, row-major, of the device that holds the worst element.
      mesh: axes and sizes.
      together: it differs when the whole program runs, though not on its own.
    """

    instruction: Compute | Move
    key: Key
    where: tuple[str, ...]
    difference: Difference
    device: int
    mesh: MeshShape
    together: bool = False

    @property
    def op(self) -> Op | None:
        """The equation; of a reshard the one that needs it, at the boundary the one before it."""
        if isinstance(self.instruction, Compute):
            return self.instruction.op
        return self.instruction.reason or self.instruction.value.op

    @property
    def operation(self) -> str:
        """Name of the primitive, or the collectives of a reshard: `all_reduce(tensor)`."""
        if isinstance(self.instruction, Compute):
            return self.instruction.op.primitive.name
        steps = self.instruction.plan.steps
        return " then ".join(f"{s.kind}({'+'.join(s.axes)})" for s in steps) or "reshard"

    @property
    def source(self) -> str:
        """`file.py:line (function)`, or the empty string."""
        return self.op.source if self.op is not None else ""

    @property
    def error(self) -> float:
        """Largest difference, relative to the largest element."""
        return self.difference.error

    @property
    def rule(self) -> str:
        """How dims become factors, and which axes shard them; of a reshard the two layouts."""
        if isinstance(self.instruction, Move):
            return f"{self.instruction.src} to {self.instruction.dst}"
        if self.instruction.rule is None:
            return "an equation with regions; every operation in them is right by itself"
        factors = ", ".join(
            f"{name} over {'+'.join(axes)}"
            for name, axes in self.instruction.assignment.factors if axes
        )  # fmt: skip
        carried = self.instruction.assignment.carried
        sums = f"; sums over {'+'.join(carried)} are still to be made" if carried else ""
        return f"{self.instruction.rule}; {factors or 'nothing sharded'}{sums}"

    @property
    def title(self) -> str:
        at = f" at {self.source}" if self.source else ""
        if isinstance(self.instruction, Compute):
            return f"{self.operation}{at}"
        reason = self.instruction.reason
        needed = f", needed by {reason.primitive.name}{at}" if reason else ", at the boundary"
        return f"{self.operation} of {describe(self.instruction.value)}{needed}"

    def __str__(self) -> str:
        rows = [self.title]
        rows += [f"  in     {place}" for place in self.where]
        rows += [f"  rule   {self.rule}"]
        if isinstance(self.instruction, Compute):
            reads = ", ".join(map(_typed, self.instruction.operands))
            rows += [f"  reads  {reads}"] if reads else []
        rows += [f"  makes  {_typed(self.key)}", f"  {self._numbers()}"]
        return "\n".join(rows)

    def _numbers(self) -> str:
        found = self.difference
        at = f"at {list(found.at)} on device {coordinates(self.device, self.mesh)}"
        values = f"{found.got} instead of {found.want}"
        if not found.wrong:
            return f"differs by {found.error:.1e} of the largest element: {values} {at}"
        kind = "differs" if self.together else "wrong"
        return f"{kind:6} {found.wrong:,} of {found.total:,} elements; the worst {at}: {values}"


@dataclass(frozen=True)
class ResultDifference:
    """A result of the partitioned program that is not that of the unsharded one.

    Attributes:
      name: `result['loss']`
      difference: `wrong` is 0 where it is rounding alone.
    """

    name: str
    difference: Difference

    def __str__(self) -> str:
        found = self.difference
        return (
            f"{self.name}: {found.wrong:,} of {found.total:,} elements wrong, by up to "
            f"{found.error:.1e} of the largest; {found.got} instead of {found.want} "
            f"at {list(found.at)}"
        )


@dataclass(frozen=True)
class CheckReport:
    """What `spmd.check` found.

    Attributes:
      partitioned: the program that was checked.
      results: results that differ by more than rounding.
      first: the first operation that is wrong, in the order in which the program runs; None where
        every operation is right.
      rounding: operations whose result depends on the mesh within rounding, the largest relative
        error first; each once, with its largest error of all iterations.
      operations: how many were compared, each run of a loop's body counted.
      faithful: whether the program that was partitioned, evaluated equation by equation, gives what
        `jax.jit` gives.
    """

    partitioned: Any
    results: tuple[ResultDifference, ...]
    first: Divergence | None
    rounding: tuple[Divergence, ...]
    operations: int
    faithful: bool = True

    @cached_property
    def ok(self) -> bool:
        """Every result and every operation is right within rounding."""
        return not self.results and self.first is None and self.faithful

    def __str__(self) -> str:
        mesh = self.partitioned.plan.mesh
        if self.ok:
            lines = [f"ok: {self.operations:,} operations on {mesh} give what they give unsharded"]
        else:
            lines = [self.summary, *self.details]
        if self.rounding:
            lines.append(f"{len(self.rounding)} depend on the mesh within rounding")
            rows: dict[str, list[float]] = {}
            for found in self.rounding:
                rows.setdefault(found.title, []).append(found.error)
            lines += [
                f"  {errors[0]:.1e}  {title}" + f" ({len(errors)} times)" * (len(errors) > 1)
                for title, errors in [*rows.items()][:SHOWN]
            ]
            lines += [f"  and {len(rows) - SHOWN} more lines"] * (len(rows) > SHOWN)
        return "\n".join(lines)

    @property
    def summary(self) -> str:
        """Which results differ, one to a line."""
        if not self.results:
            return "the results agree, and an operation is wrong"
        return "\n".join(
            ["the partitioned program does not give what the unsharded one gives"]
            + [f"  {found}" for found in self.results[:SHOWN]]
            + [f"  and {len(self.results) - SHOWN} more"] * (len(self.results) > SHOWN)
        )

    @property
    def details(self) -> Sequence[str]:
        """What is to blame."""
        if not self.faithful:
            return ["the traced program differs from what jax.jit runs, before any partitioning"]
        if self.first is None:
            return ["no operation differs: the fault is in how the program is compiled as a whole"]
        if self.first.together:
            return [
                "every operation is right on its own; in the whole program the first that differs:",
                str(self.first),
            ]
        return [f"first operation that is wrong: {self.first}"]


def _typed(key: Key) -> str:
    value: Value = key.value
    if value.const is not None and not value.rank:
        return str(value.const)
    return f"{value} {type_text(value)} {key.layout}"


def place(op: Op, region: int, run: int) -> str:
    """`scan at model.py:12 (loss), iteration 3`; iterations count from 0."""
    text = f"{op.primitive.name} at {op.source}" if op.source else op.primitive.name
    control: Any = op.control
    if control.exclusive:
        return f"{text}, branch {region}"
    if len(op.regions) > 1:
        text += f", region {region}"
    return f"{text}, iteration {run}" if control.carries(op) or run else text
