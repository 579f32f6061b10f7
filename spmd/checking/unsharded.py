"""The oracle: the program evaluated equation by equation, whole, on one device.

It keeps the result of every equation, and what enters the body of a loop, branch or call each time
that it runs.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sharding import _jax
from sharding.program import Op, Region, Value
from spmd.checking.shards import from_words, on_host, to_words
from spmd.partition.interpret import constant

# Parameters that hold shardings: whole values have none.
_SHARDING_PARAMS = ("sharding", "out_sharding")

Words = Mapping[int, np.ndarray]  # by id of the value


class Call(NamedTuple):
    """One run of a region: of which equation, which of its regions, and what entered."""

    op: Op
    region: int
    inputs: list[np.ndarray]


def opaque(op: Op) -> bool:
    """Whether it is a `jax.shard_map`, or has one inside: the mesh is part of its meaning, and it
    runs as it is."""
    control = op.control
    if control is not None and control.manual(op.params) is not None:
        return True
    return any(opaque(inner) for region in op.regions for inner in region.ops)


def silent(op: Op) -> bool:
    """Whether running it again changes nothing but what is printed."""
    if op.regions:
        return all(silent(inner) for region in op.regions for inner in region.ops)
    return not op.eqn.effects or not op.outputs


def options() -> dict[str, Any]:
    """Compiler options for programs that run once: compiling takes most of the time."""
    if jax.default_backend() != "cpu":
        return {}
    return {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Unsharded:
    """Evaluates regions of a program; each is compiled once.

    Args:
      iterations: of how many runs of a region what enters it is kept; None: all.
    """

    def __init__(self, iterations: int | None = None):
        self.iterations = iterations
        self._calls: list[Call] = []
        self._runs: Counter[tuple[int, int]] = Counter()
        self._made: dict[tuple[str, int, int], Any] = {}

    def values(
        self, region: Region, inputs: Sequence[np.ndarray], noise: bool = False
    ) -> tuple[Words, list[Call]]:
        """Every value of a region, and the runs of the regions in it, in the order they ran.

        Args:
          noise: every float is rounded differently, by one unit in the last place; no runs.
        """
        self._calls, self._runs = [], Counter()
        found = {v.id: x for v, x in zip(region.inputs, inputs, strict=True)}
        for i, ops in enumerate(_groups(region)):
            run = self._once((f"values {noise}", id(region), i), partial(self._chain, ops, noise))
            made_here = {v.id for op in ops for v in op.outputs}
            read = {v.id for op in ops for v in op.inputs if v.const is None} - made_here
            made = run({k: found[k] for k in sorted(read)})
            jax.block_until_ready(made)
            jax.effects_barrier()
            found |= {k: np.asarray(x) for k, x in made.items()}
        return found, self._calls

    def alone(
        self, region: Region, values: Words, chosen: Callable[[Op], bool], kind: str = "alone",
        noise: bool = False,
    ) -> Mapping[int, list[np.ndarray]]:  # fmt: skip
        """By index of an equation its results, each equation on its own given these `values`.

        Args:
          kind: names the choice: of each kind one program is kept.
          noise: as above, inside of equations with regions.
        """
        found: dict[int, list[np.ndarray]] = {}
        for i, ops in enumerate(_groups(region)):
            ops = [op for op in ops if chosen(op)]
            if not ops:
                continue
            run = self._once((kind, id(region), i), partial(_alone, ops, noise))
            read = {v.id: values[v.id] for op in ops for v in op.inputs if v.const is None}
            made = run(read)
            found |= {k: [np.asarray(x) for x in xs] for k, xs in made.items()}
        return found

    def _once(self, key: tuple[str, int, int], fun: Callable) -> Any:
        if key not in self._made:
            self._made[key] = jax.jit(lambda xs: fun(xs), compiler_options=options())
        return self._made[key]

    def _chain(self, ops: Sequence[Op], noise: bool, words: Any) -> Any:
        env = dict(zip(words, _noisy(words.values()), strict=True)) if noise else dict(words)
        for op in ops:
            if not op.outputs and op.eqn.effects:
                continue  # prints again, and makes nothing
            record = None if opaque(op) or noise else partial(self._record, op)
            results = bind(op, [_read(env, v) for v in op.inputs], record, noise)
            results = _noisy(results) if noise else results
            env |= {v.id: to_words(x) for v, x in zip(op.outputs, results, strict=True)}
        return {v.id: env[v.id] for op in ops for v in op.outputs if v.id in env}

    def _record(self, op: Op, region: int, *inputs: Any) -> None:
        self._runs[op.index, region] += 1
        if self.iterations is None or self._runs[op.index, region] <= self.iterations:
            self._calls.append(Call(op, region, [np.array(x) for x in inputs]))


def evaluate(
    region: Region, args: Sequence[Any], noise: bool = False, watch: Any = None
) -> list[Any]:
    """Results of a region at global shapes; traceable.

    Args:
      watch: (region, words by id of each value) -> None is called after the last equation, and of
        regions inside likewise, each time that they run. With it annotations stay.
    """
    args = _noisy(args) if noise else args
    env: dict[int, Any] = {v.id: to_words(x) for v, x in zip(region.inputs, args, strict=True)}
    for op in region.ops:
        results = bind(op, [_read(env, v) for v in op.inputs], None, noise, watch)
        results = _noisy(results) if noise else results
        env |= {v.id: to_words(x) for v, x in zip(op.outputs, results, strict=True)}
    if watch is not None:
        watch(region, env)
    return [_read(env, v) for v in region.outputs]


def bind(
    op: Op, operands: Sequence[Any], record: Any = None, noise: bool = False, watch: Any = None
) -> list[Any]:
    """Results of one equation on whole operands, as if nothing had been annotated.

    Args:
      record: (region, *inputs) -> None is called, in order, each time that a region of it runs.
      noise: floats inside of its regions are rounded differently.
      watch: of `evaluate`, for its regions; with it annotations stay.
    """

    def body(i: int, *args: Any) -> list[Any]:
        if record is not None:
            jax.debug.callback(partial(record, i), *map(to_words, args), ordered=True)
        return evaluate(op.regions[i], args, noise, watch)

    with _jax.equation_context(op.eqn):
        if op.control is not None and op.control.manual(op.params) is None:
            bodies = [partial(body, i) for i in range(len(op.regions))]
            return list(op.control.build(op.params, bodies, operands))
        annotation = op.control is None and op.rule.identity
        if annotation and watch is None:
            return list(operands)
        dropped = () if annotation else _SHARDING_PARAMS
        params = {k: None if k in dropped else v for k, v in op.params.items()}
        out = op.primitive.bind(*operands, **op.primitive.get_bind_params(params))
        return list(out) if op.primitive.multiple_results else [out]


def _alone(ops: Sequence[Op], noise: bool, words: Any) -> Any:
    return {
        op.index: [
            to_words(x) for x in bind(op, [_read(words, v) for v in op.inputs], None, noise)
        ]
        for op in ops
    }


def _noisy(arrays: Iterable[Any]) -> list[Any]:
    """Every third float one unit in the last place up, the others down."""

    def moved(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.inexact) or not x.size:
            return x
        eps = jnp.finfo(x.dtype).eps
        third = jnp.arange(x.size).reshape(x.shape) % 3 == 0
        return x * jnp.where(third, 1 + eps, 1 - eps).astype(x.dtype)

    return [moved(x) for x in arrays]


def _read(env: Mapping[int, Any], value: Value) -> Any:
    if value.const is not None and value.id not in env:
        return constant(value)
    return from_words(env[value.id], value.dtype)


def _groups(region: Region) -> list[list[Op]]:
    """The equations in runs that one program can hold: each opaque one needs devices of its own."""
    groups: list[list[Op]] = [[]]
    for op in region.ops:
        if opaque(op):
            groups += [[op], []]
        else:
            groups[-1].append(op)
    return [group for group in groups if group]


def host_inputs(values: Sequence[Value], arrays: Sequence[Any]) -> list[np.ndarray]:
    """Arguments of a program on the host."""
    return [on_host(x, v.dtype) for v, x in zip(values, arrays, strict=True)]
