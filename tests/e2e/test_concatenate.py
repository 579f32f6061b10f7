"""Joining sharded arrays along the sharded dim: values, and how many blocks every device sends."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding import P
from tests.oracle import check, kinds, make_mesh


def arrays(count: int, rows: int, dtype: Any = np.float32) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(count)
    return tuple(rng.integers(-99, 99, (rows, 3)).astype(dtype) for _ in range(count))


def joined(*xs: Any) -> Any:
    return jnp.concatenate(xs)


@pytest.mark.parametrize("dtype", [np.float32, np.int8, bool])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_every_device_sends_its_block_of_every_operand_once(count: int, dtype: Any) -> None:
    xs = arrays(count, 16, dtype)
    found = check(joined, xs, make_mesh(d=8), (P("d"),) * count, P("d"))
    rounds = min(count, 7)  # of eight, one is with itself
    assert kinds(found) == {("permute", ("d",)): (rounds, rounds * xs[0].nbytes / 8)}


@pytest.mark.parametrize("axes", [("x", "d"), ("d", "x")])
def test_over_two_axes(axes: tuple[str, str]) -> None:
    xs, rows = arrays(2, 16), P(axes)
    found = check(joined, xs, make_mesh(x=2, d=4), (rows, rows), rows)
    assert kinds(found) == {("permute", ("x", "d")): (2, 2 * xs[0].nbytes / 8)}


@pytest.mark.parametrize("count, rows", [(3, 16), (2, 17), (5, 8)])
def test_what_does_not_come_out_even(count: int, rows: int) -> None:
    xs = arrays(count, rows)
    check(joined, xs, make_mesh(d=8), None, P("d") if count * rows % 8 == 0 else None)


def test_operands_of_several_sizes() -> None:
    xs = (*arrays(2, 16), *arrays(1, 8))
    check(joined, xs, make_mesh(d=8), (P("d"),) * 3, P("d"))


def test_two_views_of_a_batch() -> None:
    """As contrastive losses join them; the way back takes them apart."""

    def loss(x: Any, y: Any) -> Any:
        z = jnp.concatenate([x, y])
        return (jnp.tanh(z) * jnp.arange(len(z))[:, None]).sum()

    xs = arrays(2, 16)
    check(jax.grad(loss, (0, 1)), xs, make_mesh(d=8), (P("d"),) * 2, (P("d"),) * 2)
