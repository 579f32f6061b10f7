"""How often loops run that count: of the equation alone, as `lax.while_loop` makes it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import spmd
from sharding import P
from sharding.rules.trips import trips_of_while
from spmd.testing import assert_collectives
from tests.oracle import make_mesh

X = jnp.ones(64)


def loop(holds: Callable[[Any], Any], onward: Callable[[Any], Any], start: Any) -> Any:
    """Carries a counter, and an array that is doubled."""

    def fun(x: Any) -> Any:
        state = lax.while_loop(
            lambda s: holds(s[0]), lambda s: (onward(s[0]), s[1] * 2.0), (start, x)
        )
        return state[1]

    return fun


def found(fun: Any) -> int:
    (eqn,) = [e for e in jax.make_jaxpr(fun)(X).eqns if e.primitive.name == "while"]
    return trips_of_while(eqn)


COUNTED = [
    loop(lambda i: i < 10, lambda i: i + 1, 0),
    loop(lambda i: i < 10, lambda i: i + 3, 1),
    loop(lambda i: i <= 10, lambda i: 3 + i, 1),
    loop(lambda i: 10 > i, lambda i: i + 4, -3),
    loop(lambda i: i > 0, lambda i: i - 1, 7),
    loop(lambda i: i >= 0, lambda i: i - 2, 7),
    loop(lambda i: i >= 1, lambda i: i + -3, 7),
    loop(lambda i: i + 1 < 10, lambda i: i + 1, 0),
    loop(lambda i: 2 < i - 1, lambda i: i - 1, 9),
    loop(lambda i: i < 0, lambda i: i + 1, 3),
    lambda x: lax.fori_loop(2, jnp.int32(12), lambda i, x: x * 2.0, x),
]


@pytest.mark.parametrize("fun", COUNTED)
def test_a_loop_that_counts_runs_as_often_as_it_is_told_to(fun: Any) -> None:
    assert 2.0 ** found(fun) == fun(X)[0]


UNCOUNTED = [
    loop(lambda i: i < 10, lambda i: i * 2, 1),
    loop(lambda i: (i < 10) & (i != 5), lambda i: i + 1, 0),
    loop(lambda i: i < 10.0, lambda i: i + 1.0, 0.0),
    loop(lambda i: i != 10, lambda i: i + 1, 0),
    loop(lambda i: i < 10, lambda i: 11 - i, 0),
    lambda x: lax.fori_loop(0, x[0].astype(int), lambda i, x: x * 2.0, x),
    lambda x: lax.while_loop(lambda s: s[0] < s[1], lambda s: (s[0] + 1, s[1] - 1, s[2]),
                             (0, 9, x))[2],
    lambda x: lax.while_loop(lambda s: s[0] < 5, lambda s: (s[1] + 1, s[0], s[2]), (0, 3, x))[2],
    loop(lambda i: i.astype(jnp.int8) < 100, lambda i: i + 1, 200),
    loop(lambda i: i < 1000, lambda i: (i + 1).astype(jnp.int8).astype(jnp.int32), 0),
    loop(lambda i: i < 250, lambda i: i + np.uint8(100), np.uint8(0)),
    loop(lambda i: i - np.uint32(1) < 5, lambda i: i + np.uint32(1), np.uint32(0)),
    loop(lambda i: i - np.int8(100) < 100, lambda i: i + np.int8(1), np.int8(-100)),
]  # fmt: skip


@pytest.mark.parametrize("fun", UNCOUNTED)
def test_nobody_knows_of_others(fun: Any) -> None:
    assert found(fun) == 1


def test_a_counter_that_leads_nowhere_is_not_believed() -> None:
    """It would run until the counter overflows."""
    assert found(loop(lambda i: i < 10, lambda i: i - 1, 0)) == 1


def test_collectives_count_as_often_as_the_loop_runs_in_plan_and_program() -> None:
    """The mean of what is sharded, in each step."""

    def fun(x: Any) -> Any:
        step = lambda s: (s[0] + 1, jnp.tanh(s[1] - s[1].mean()))  # noqa: E731
        return lax.while_loop(lambda s: s[0] < 5, step, (0, x))[1]

    stage = spmd.jit(fun, mesh=make_mesh(s=8), in_shardings=P("s"), out_shardings=P("s"))
    for source in ("program", "hlo"):
        assert_collectives(stage, X, all_reduce=5, others=0, source=source)
