"""The first operation of a program that makes a NaN or an infinity, by its source line.

The program runs once more, equation by equation, with each value's NaNs and infinities counted;
the counts alone leave it. So it can be partitioned as the program itself is, and needs little more
memory. Every run of a loop's body, a branch or a call is told apart.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sharding.op import Op, Region
from sharding.program import Program, Value, describe, type_text
from spmd.checking.report import place
from spmd.checking.unsharded import evaluate

SHOWN = 4  # operands in a text


class Counts(NamedTuple):
    """How many elements of a value are no number, and how many are infinite."""

    nan: int = 0
    inf: int = 0

    def __str__(self) -> str:
        parts = [f"{n:,} {name}" for n, name in zip(self, ("NaN", "infinite"), strict=True) if n]
        return " and ".join(parts) or "all finite"


@dataclass(frozen=True)
class Origin:
    """An operation that makes what is not finite from operands that are, or a NaN from infinities.

    Attributes:
      value: what it makes; an argument where that is not finite already.
      counts: of the value.
      operands: what it reads, with counts.
      where: the loops, branches and calls around it, outermost first.
      before: where infinities among the operands come from, if an operation made them.
    """

    value: Value
    counts: Counts
    operands: tuple[tuple[Value, Counts], ...] = ()
    where: tuple[str, ...] = ()
    before: "Origin | None" = None

    @property
    def op(self) -> Op | None:
        return self.value.op

    def __str__(self) -> str:
        total = f"{self.counts} of {int(np.prod(self.value.shape)):,} values"
        if self.op is None:
            return f"{describe(self.value)} {type_text(self.value)} holds {total}"
        at = f" at {self.op.source}" if self.op.source else ""
        rows = [f"{self.op.primitive.name}{at} makes {total}, {type_text(self.value)}"]
        rows += [f"  in     {self.op.module}"] if self.op.module else []
        rows += [f"  in     {one}" for one in self.where]
        for value, counts in self.operands[:SHOWN]:
            scalar = value.const is not None and not value.rank
            named = f"{value.const}" if scalar else f"{describe(value)}: {counts}"
            rows.append(f"  reads  {type_text(value)} {named}")
        if self.before is not None:
            rows += ["the infinities were made before:", str(self.before)]
        return "\n".join(rows)


@dataclass(eq=False)
class Run:
    """One run of a region: counts by value, and the runs of regions inside, in order.

    Attributes:
      around: the run and the equation that it is a part of.
    """

    region: Region
    counts: Mapping[int, Counts]
    inner: list["Run"] = field(default_factory=list)
    around: tuple["Run", Op] | None = None

    def of(self, value: Value) -> Counts:
        if value.const is not None and value.id not in self.counts:
            return _counted(value.const)
        return self.counts.get(value.id, Counts())

    def runs(self, op: Op, region: int) -> list["Run"]:
        """Those of one region of an equation."""
        return [one for one in self.inner if one.region is op.regions[region]]

    @property
    def where(self) -> tuple[str, ...]:
        """The loops, branches and calls around it, outermost first."""
        if self.around is None:
            return ()
        outer, op = self.around
        number = op.regions.index(self.region)
        return (*outer.where, place(op, number, outer.runs(op, number).index(self)))

    def entered(self, value: Value) -> tuple["Run", Value] | None:
        """Where one of the region's inputs came from: the run before, or outside."""
        if self.around is None or value not in self.region.inputs:
            return None
        outer, op = self.around
        number, at = op.regions.index(self.region), self.region.inputs.index(value)
        before = outer.runs(op, number)[: outer.runs(op, number).index(self)]
        control: Any = op.control
        for region, output, input in control.carries(op):
            if before and (region, input) == (number, at):
                return before[-1], self.region.outputs[output]
        port = next((p for p in op.in_ports if (p.region, p.inner) == (number, at)), None)
        return None if port is None else (outer, op.inputs[port.outer])


class Watched:
    """A program that tells the counts of its values when it runs.

    `watched(*inputs)` takes the inputs of the program, is traceable, and has no results. Outside
    of it, after `jax.effects_barrier()`, `origin` reads what the last run told.
    """

    def __init__(self, program: Program):
        self.program = program
        self._told: list[Run] = []

    def __call__(self, *inputs: Any) -> tuple[()]:
        self._told.clear()
        evaluate(self.program.body, inputs, watch=self._watch)
        return ()

    def _watch(self, region: Region, words: Mapping[int, Any]) -> None:
        ids = [id for id, x in words.items() if jnp.issubdtype(x.dtype, jnp.inexact) and x.size]
        counts = [jnp.stack([jnp.isnan(words[i]).sum(), jnp.isinf(words[i]).sum()]) for i in ids]
        stacked = jnp.stack(counts) if counts else jnp.zeros((0, 2), int)
        jax.debug.callback(partial(self._tell, region, ids), stacked, ordered=True)

    def _tell(self, region: Region, ids: Sequence[int], counts: Any) -> None:
        """A region is done: what was told since of regions inside happened in this run."""
        found = {i: Counts(*map(int, row)) for i, row in zip(ids, np.asarray(counts), strict=True)}
        run = Run(region, found)
        ops = {id(inner): op for op in region.ops for inner in op.regions}
        run.inner = [one for one in self._told if id(one.region) in ops]
        for one in run.inner:
            one.around = run, ops[id(one.region)]
        self._told = [one for one in self._told if id(one.region) not in ops]
        self._told.append(run)

    @property
    def told(self) -> bool:
        """Whether this process was told; of several only one is."""
        return bool(self._told)

    def origin(self) -> Origin | None:
        """The first NaN of the last run; without one, where an infinity in a result comes from.
        None where all results are finite."""
        [run] = self._told
        found = _first(run, _is_new_nan)
        if found is not None:
            return found
        bad = next((v for v in self.program.body.outputs if any(run.of(v))), None)
        if bad is None:
            return None
        # Else it is a constant, and the first that reads it is to blame.
        return _source(run, bad) or _first(run, lambda made, read: any(made))


Test = Callable[[Counts, Sequence[Counts]], bool]


def _is_new_nan(made: Counts, read: Sequence[Counts]) -> bool:
    return made.nan > 0 and not any(one.nan for one in read)


def _is_new(made: Counts, read: Sequence[Counts]) -> bool:
    return any(made) and not any(map(any, read))


def _first(run: Run, test: Test) -> Origin | None:
    """The first argument or operation that passes, in the order in which they ran."""
    if run.around is None:
        for value in run.region.inputs:
            if test(run.of(value), ()):
                return Origin(value, run.of(value))
    for op in run.region.ops:
        found = _in_op(run, op, test)
        if found is not None:
            return found
    return None


def _in_op(run: Run, op: Op, test: Test) -> Origin | None:
    for inner in (one for i in range(len(op.regions)) for one in run.runs(op, i)):
        found = _first(inner, test)
        if found is not None:
            return found
    read = [run.of(v) for v in op.inputs]
    bad = next((v for v in op.outputs if test(run.of(v), read)), None)
    return None if bad is None else _made(run, op, bad)


def _made(run: Run, op: Op, value: Value) -> Origin:
    operands = tuple((v, run.of(v)) for v in op.inputs)
    infinite = next((v for v, counts in operands if counts.inf), None)
    before = None if infinite is None else _source(run, infinite)
    return Origin(value, run.of(value), operands, run.where, before)


def _source(run: Run, value: Value) -> Origin | None:
    """Where what is not finite in `value` was made, against the flow of the program; None where it
    is a constant."""
    while True:
        if value.op is None:
            entered = run.entered(value)
            if entered is None:
                return None if value.const is not None else Origin(value, run.of(value))
            run, value = entered
            continue
        found = _in_op(run, value.op, _is_new)
        if found is not None:
            return found
        bad = next((v for v in value.op.inputs if any(run.of(v))), None)
        if bad is None:
            return _made(run, value.op, value)
        value = bad


def _counted(const: Any) -> Counts:
    x = np.asarray(const)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return Counts()
    return Counts(int(np.isnan(x).sum()), int(np.isinf(x).sum()))
