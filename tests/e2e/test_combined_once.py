"""Pass `combine_small` and what compilers make once: nothing more is sent for it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding import P, shard
from spmd.testing import collectives_of
from tests.oracle import check, make_mesh

RNG = np.random.default_rng(0)
ROWS = P("d")


def arr(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def gathered(x: Any) -> Any:
    return shard(jnp.sin(x), *[None] * x.ndim)


def remat(weights: Any, x: Any) -> Any:
    """Each layer's weights are gathered forward, and again on the way back."""

    def loss(weights: Any) -> Any:
        y = x
        for w in weights:
            y = jax.checkpoint(lambda y, w: jnp.tanh(y @ w))(y, w)
        return (y**2).mean()

    return jax.grad(loss)(weights)


def pulled(x: Any, m: Any) -> Any:
    """All bodies at places x with masses m on each: places and masses are gathered."""
    return x + ((x[None] - x[:, None]) * m[None, :, None]).sum(1) / 4096


def carried(step: Any) -> Any:
    return lambda x, m: jax.lax.fori_loop(0, 4, lambda i, c: step(*c), (x, m))


def stacked(xs: Any, m: Any) -> Any:
    """A slice of xs in each step, beside what is the same in all."""
    return jax.lax.scan(lambda c, x: (c + gathered(x).sum() * gathered(m).max(), None), 0.0, xs)[0]


def nested(xs: Any, m: Any) -> Any:
    """Inside of two loops: what changes in the outer one, and what changes in none."""

    def outer(c: Any, x: Any) -> tuple[Any, None]:
        inner = lambda i, c: c + gathered(x).sum() * gathered(m).max() + i  # noqa: E731
        return jax.lax.fori_loop(0, 3, inner, c), None

    return jax.lax.scan(outer, 0.0, xs)[0]


def once(xs: Any, m: Any) -> Any:
    """A loop of one step is none: what it begins with is also outside."""
    found = jax.lax.scan(lambda c, _: (c + gathered(c).max(), None), m, None, length=1)[0]
    return found + gathered(xs[0]).max() * gathered(m).max()


def forwarded(x: Any, m: Any) -> Any:
    """What a loop leaves as it came is gathered inside and after it."""
    step = jax.jit(lambda i, c: (pulled(*c), c[1]))
    x, kept = jax.lax.fori_loop(0, 4, step, (x, m))
    return x + gathered(kept).max() + gathered(x).max()


X, M, XS, WEIGHTS = arr(64, 3), arr(64), arr(4, 64), [arr(32, 32)] * 2
CARRY = (X, M), (ROWS, ROWS), (ROWS, ROWS)
SLICES = (XS, M), (P(None, "d"), ROWS), P()
PROGRAMS = {
    "layers made again": (remat, (WEIGHTS, arr(256, 32)), ([ROWS] * 2, ROWS), [ROWS] * 2),
    "the same twice": (lambda x: (jnp.cos(gathered(x)), gathered(x).sum(0)), (X,), (ROWS,), P()),
    "in a call": (lambda x: (gathered(x) * 2, jax.jit(gathered)(x).max()), (X,), (ROWS,), P()),
    "shared by loops": (
        lambda xs, m: stacked(xs, m) * stacked(xs[::-1], m), (XS, M), (P(None, "d"), ROWS), P()
    ),
    "carried through a call": (carried(jax.jit(lambda x, m: (pulled(x, m), m))), *CARRY),
    "carried through remat": (carried(jax.checkpoint(lambda x, m: (pulled(x, m), m))), *CARRY),
    "carried, annotated": (carried(lambda x, m: (pulled(x, m), shard(m, "d"))), *CARRY),
    "beside slices": (stacked, *SLICES),
    "nested loops": (nested, *SLICES),
    "a loop of one step": (once, *SLICES[:2], ROWS),
    "through a loop": (forwarded, (X, M), (ROWS, ROWS), ROWS),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_more_is_sent(name: str) -> None:
    fun, args, ins, outs = PROGRAMS[name]
    sent = []
    for off in ((), ("combine_small",)):
        planned = check(fun, args, make_mesh(d=8), ins, outs, disable_passes=off, tolerance=1e-4)
        sent.append(sum(c.bytes for c in collectives_of(planned.lower().compile(), source="hlo")))
    assert sent[0] == sent[1] > 0
