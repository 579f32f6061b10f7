"""Which values are sums of others that can be reduced together."""

from typing import Any

import jax
import jax.numpy as jnp

from sharding.program import Program, build
from spmd.partition.addends import Addends

X = jnp.ones((8, 8))


def leaves(fun: Any) -> int:
    """Of how many reduced values the result of a function is the sum, and of nothing else."""
    program: Program = build(jax.make_jaxpr(fun)(X, X))
    return len(Addends(program).leaves(program.body.outputs[0]))


def test_sums_and_what_is_linear_in_them() -> None:
    assert leaves(lambda x, w: x @ w) == 1
    assert leaves(lambda x, w: x @ w + 2 * (w @ x).T) == 2
    assert leaves(lambda x, w: x @ w + w) == 0
    assert leaves(lambda x, w: jnp.tanh(x @ w) + w @ x) == 0


def test_a_sum_that_others_read_is_reduced_for_them() -> None:
    assert leaves(lambda x, w: (y := x @ w) + 2 * y) == 0
    assert leaves(lambda x, w: x @ w + (y := w @ x) + 2 * y) == 0


def test_nothing_is_reduced_after_it_was_enlarged() -> None:
    assert leaves(lambda x, w: jnp.broadcast_to(jnp.sum(x, 0), (8, 8)) + x @ w) == 0
    assert leaves(lambda x, w: jnp.sum(x, 0)[:4] + jnp.sum(w, 0)[4:]) == 2
