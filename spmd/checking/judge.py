"""Walks a plan beside the unsharded program, and finds the first instruction that is wrong.

Every instruction is run on its own, on the operands of the unsharded program; then what it makes is
compared on every device. The bodies of loops, branches and calls are walked once for each time that
they ran, with what entered them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np

from sharding.op import Op
from sharding.rule import Kind
from sharding.spec import Layout
from spmd.checking import shards
from spmd.checking.alone import Alone, Instruction, whole, writes
from spmd.checking.compare import (
    Tolerance,
    difference,
    largest,
    magnitude,
    tolerance_of,
)
from spmd.checking.report import Divergence, place
from spmd.checking.unsharded import Call, Unsharded, Words, silent
from spmd.partition.plan import Compute, Key, Move, ProgramPlan, RegionPlan

Place = tuple[str, ...]


class Judge:
    """Compares a plan with its program, instruction by instruction.

    Attributes:
      rounding: by instruction, the largest difference within rounding.
      operations: how many results were compared.
    """

    def __init__(self, plan: ProgramPlan, mesh: Any, tolerance: Tolerance, iterations: int | None):
        self.plan, self.tolerance = plan, tolerance
        self.oracle, self.alone = Unsharded(iterations), Alone(mesh)
        self.rounding: dict[int, Divergence] = {}
        self.operations = 0

    def first(self, inputs: Sequence[np.ndarray]) -> Divergence | None:
        """The first instruction that is wrong by itself."""
        return self._region(self.plan.body, inputs, ())

    def first_together(self, inputs: Sequence[np.ndarray]) -> Divergence | None:
        """The first value at the top of the program that is wrong when the whole program runs."""
        values, _ = self.oracle.values(self.plan.program.body, inputs)
        noisy, _ = self.oracle.values(self.plan.program.body, inputs, noise=True)
        made = iter(self.alone.together(self.plan, inputs))
        for one in self.plan.body.code:
            for key in writes(one):
                want = whole(key, values)
                size = rounding_size(want, whole(key, noisy), self.tolerance)
                found = self._compared(one, key, next(made), want, size, ())
                if found is not None and found.difference.wrong:
                    return replace(found, together=True)
        return None

    def outputs(self, inputs: Sequence[np.ndarray], noise: bool = False) -> list[np.ndarray]:
        """Results of the program, equation by equation; with `noise` as if rounded differently."""
        body = self.plan.program.body
        values, _ = self.oracle.values(body, inputs, noise)
        return [whole(Key(value, Layout(())), values) for value in body.outputs]

    def _region(
        self, region: RegionPlan, inputs: Sequence[np.ndarray], where: Place
    ) -> Divergence | None:
        values, calls = self.oracle.values(region.region, inputs)
        chosen = [one for one in region.code if _judged(one)]
        made = self.alone.results(region, values, chosen)
        want = self.oracle.alone(region.region, values, lambda op: not _runs_once(op))
        sizes = _Sizes(self.oracle, region, values, self.tolerance)
        by_instruction = {id(one): shards_ for one, shards_ in zip(chosen, made, strict=True)}
        for one in region.code:
            if isinstance(one, Compute):
                found = self._calls(one, [c for c in calls if c.op is one.op], where)
                if found is not None:
                    return found
            results = {} if isinstance(one, Move) else _by_value(one, want.get(one.op.index, ()))
            for key, got in by_instruction.get(id(one), {}).items():
                expected = results.get(key.value.id)
                expected = whole(key, values) if expected is None else expected
                self.operations += 1
                found = self._compared(one, key, got, expected, sizes.of(one, key, expected), where)
                if found is not None and found.difference.wrong:
                    size = sizes.of_rounding(one, key, expected)
                    found = self._compared(one, key, got, expected, size, where)
                if found is not None and found.difference.wrong:
                    return found
                self._note(one, found)
        return None

    def _calls(self, one: Compute, calls: Sequence[Call], where: Place) -> Divergence | None:
        runs = [0] * len(one.regions)
        for call in calls:
            at = place(one.op, call.region, runs[call.region])
            runs[call.region] += 1
            found = self._region(one.regions[call.region], call.inputs, (*where, at))
            if found is not None:
                return found
        return None

    def _compared(
        self, one: Instruction, key: Key, got: np.ndarray, want: np.ndarray, size: Any, where: Place
    ) -> Divergence | None:
        """Every device's part of a value, sums made where it is partial, against the whole one."""
        mesh, value = self.plan.mesh, key.value
        layout = shards.words_layout(key.layout, value)
        got = shards.whole_parts(got, layout, mesh)
        layout = layout.reduced()
        want_parts = shards.split(want, layout, mesh)
        if isinstance(size, np.ndarray):
            size = shards.split(size, layout, mesh)
        inside = shards.inside(want.shape, layout, mesh)
        tolerance = 0.0 if _copies(one) else tolerance_of(want.dtype, self.tolerance)
        found = difference(got, want_parts, tolerance, inside, size)
        if found is None:
            return None
        at = shards.global_index(found.at[0], found.at[1:], want.shape, layout, mesh)
        return Divergence(one, key, where, found._replace(at=at), found.at[0], mesh)

    def _note(self, one: Instruction, found: Divergence | None) -> None:
        # The addends of a reshard are made up: its rounding is that of the operation that sums.
        before = self.rounding.get(id(one))
        if isinstance(one, Move):
            return
        if found is not None and (before is None or found.error > before.error):
            self.rounding[id(one)] = found


class _Sizes:
    """What the rounding of an instruction's result is relative to."""

    def __init__(
        self, oracle: Unsharded, region: RegionPlan, values: Words, tolerance: Tolerance
    ):
        self.oracle, self.region, self.values = oracle, region, values
        self.tolerance = tolerance

    def of(self, one: Instruction, key: Key, want: np.ndarray) -> Any:
        """Of a reshard and an elementwise operation, each element's own size; an element that is
        small beside most others counts as one of the smaller quarter. Of what is summed the same,
        and of all others the largest element."""
        if isinstance(one, Move) or (one.rule is not None and (one.rule.early or self.summed(one))):
            sizes = magnitude(want)
            some = sizes[sizes > 0]
            return np.maximum(sizes, np.quantile(some, 0.25) if some.size else 0.0)
        return largest(want)

    def summed(self, one: Instruction) -> bool:
        rule = one.rule if isinstance(one, Compute) else None
        if rule is None:
            return False
        return any(f.kind is Kind.REDUCE and f.monoid == "add" for f in rule.factors.values())

    def of_rounding(self, one: Instruction, key: Key, want: np.ndarray) -> Any:
        """The same with what rounding may do besides: what cancels in a sum still rounds, and in
        the body of a loop rounding grows."""
        size = self.of(one, key, want)
        if isinstance(one, Move):
            return size
        if self.summed(one):
            return magnitude(_by_value(one, self._sums[one.op.index])[key.value.id]) + size
        if one.op.regions:
            noisy = _by_value(one, self._noisy[one.op.index])[key.value.id]
            return rounding_size(want, noisy, self.tolerance)
        return size

    @cached_property
    def _sums(self) -> Mapping[int, list[np.ndarray]]:
        """Sums of absolute values."""
        values = {
            k: np.abs(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x
            for k, x in self.values.items()
        }
        computes = [c for c in self.region.code if isinstance(c, Compute)]
        chosen = {c.op.index for c in computes if self.summed(c)}
        return self.oracle.alone(self.region.region, values, lambda op: op.index in chosen, "sums")

    @cached_property
    def _noisy(self) -> Mapping[int, list[np.ndarray]]:
        """Equations with regions where every operation inside rounds differently."""
        chosen = lambda op: bool(op.regions) and not _runs_once(op)  # noqa: E731
        return self.oracle.alone(self.region.region, self.values, chosen, "noisy", noise=True)


def rounding_size(want: np.ndarray, noisy: np.ndarray, tolerance: Tolerance) -> float:
    """What rounding is relative to in a value at the end of many operations: its largest element,
    or more where operations that round differently change it by more."""
    found = difference(noisy, want, 0.0)
    if found is None:
        return largest(want)
    if not jnp.issubdtype(want.dtype, jnp.inexact):
        return np.inf  # it flips where floats round differently
    allowed = 8 * found.error * (largest(want) or 1.0)
    return largest(want) + allowed / max(tolerance_of(want.dtype, tolerance), 1e-300)


def _by_value(one: Compute, results: Sequence[np.ndarray]) -> dict[int, np.ndarray]:
    return {v.id: x for v, x in zip(one.op.outputs, results, strict=False)}


def _copies(one: Instruction) -> bool:
    """Whether it moves elements and sums none."""
    return isinstance(one, Move) and one.src.partial == one.dst.partial


def _judged(one: Instruction) -> bool:
    return isinstance(one, Move) or not _runs_once(one.op)


def _runs_once(op: Op) -> bool:
    """What has effects, or nothing to compare, is not run again."""
    return not op.outputs or not silent(op)
