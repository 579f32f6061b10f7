"""How far the results of a program move when each of its operations rounds a little differently.

`1 - tanh(5)**2` keeps three of seven digits, and any other order of the same operations gives
others. How much that is for a program is measured on the unsharded one (Monte Carlo arithmetic,
D. S. Parker, UCLA CSD-970002, 1997), so that nothing else is forgiven.
"""

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sharding.program import Region, build

SAMPLES = 4
ULPS = 4  # about the error of XLA's elementary functions


def rounding(fun: Callable, args: Sequence[Any]) -> list[float]:
    """For each result: the largest change of an element, as a part of the largest element.

    Integers, and floating values that are whole numbers, count as exact: they do not round.
    """
    program = build(jax.make_jaxpr(fun)(*args))
    noise = _Noise()
    perturbed = jax.jit(_function(program.body, noise))

    def run(sample: int) -> list[Any]:
        noise.sample = sample
        return [_numbers(v) for v in perturbed(*jax.tree.leaves(tuple(args)))]

    want = run(0)
    changes = [0.0] * len(want)
    for sample in range(1, SAMPLES + 1):
        for i, (a, b) in enumerate(zip(run(sample), want, strict=True)):
            finite = np.isfinite(a) & np.isfinite(b)
            change = np.abs(a - b)[finite].max(initial=0)
            scale = np.abs(b[finite]).max(initial=0) or 1.0
            changes[i] = max(changes[i], float(change / scale))
    return changes


def _numbers(value: Any) -> Any:
    extended = jnp.issubdtype(value.dtype, jax.dtypes.extended)
    return np.zeros(()) if extended else np.asarray(value, np.float64)


class _Noise:
    """Multiplies what an operation computes by factors near 1, which differ by value and operation.

    Whole numbers and elements of the operands are left as they are, and equal results stay equal:
    the gradient of a maximum depends on it.

    Attributes:
      sample: other factors for each; 0 for none.
    """

    def __init__(self) -> None:
        self.sample = 0
        self.calls = count(1)

    def __call__(self, x: Any, operands: Sequence[Any]) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        call = next(self.calls)
        given = [v for v in operands if v.dtype == x.dtype]
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        # A callback, or XLA fuses what moves a value into every reader of it.
        return jax.pure_callback(lambda *values: self.moved(call, *values), shape, x, *given)

    def moved(self, call: int, x: Any, *operands: Any) -> Any:
        x = np.asarray(x)
        if not self.sample:
            return x
        values = np.abs(x).astype(np.float32)
        known = [np.abs(np.asarray(v)).astype(np.float32).ravel() for v in operands]
        with np.errstate(invalid="ignore"):
            exact = (values == np.round(values)) | ~np.isfinite(values)
        exact |= np.isin(values, np.concatenate([*known, [0]]))
        bits = values.view(np.uint32).ravel() + np.uint32(call + (self.sample << 20))
        for factor in (0x9E3779B1, 0x85EBCA6B):
            bits = (bits ^ (bits >> 15)) * np.uint32(factor)
        share = bits.reshape(x.shape) / 2.0**31 - 1  # from -1 to 1
        factors = 1 + ULPS * float(jnp.finfo(x.dtype).eps) * share
        return np.where(exact, x, (x.astype(np.float64) * factors).astype(x.dtype))


def _function(region: Region, noise: _Noise) -> Callable[..., list[Any]]:
    """The region, with `noise` on the results of every operation."""

    def run(*args: Any) -> list[Any]:
        known = {v.id: a for v, a in zip(region.inputs, args, strict=True)}
        known |= {v.id: v.const for v in region.consts}

        def read(value: Any) -> Any:
            return known[value.id] if value.id in known else value.const

        for op in region.ops:
            operands = [read(v) for v in op.inputs]
            if op.control is not None:
                bodies = [_function(r, noise) for r in op.regions]
                results = op.control.build(op.params, bodies, operands)
            else:
                params = op.primitive.get_bind_params(op.params)
                results = op.primitive.bind(*operands, **params)
                results = results if op.primitive.multiple_results else [results]
                results = [noise(r, operands) for r in results]
            known |= {v.id: r for v, r in zip(op.outputs, results, strict=True)}
        return [read(v) for v in region.outputs]

    return run
