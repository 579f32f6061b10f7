"""Sums that stay partial with what is added to them: every addend counts once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding import P, shard
from tests.oracle import check, make_mesh

ROWS, COLUMNS = P("x"), P(None, "x")
A, B = np.arange(512, dtype=np.float32).reshape(2, 16, 16) / 2000
C = np.linspace(-1, 1, 16, dtype=np.float32)


def both(a: Any, b: Any, more: Any) -> Any:
    """Two sums, with something that is whole, or sharded, between them."""
    return jnp.sin((a.sum(0) + more) + b.sum(0))


ADDED = {
    "a number": lambda a, b, c: both(a, b, 0.5),
    "a number to a number": lambda a, b, c: jnp.sin((a.mean() + 0.5) + b.mean()) * c,
    "an array made of nothing": lambda a, b, c: both(a, b, jnp.full(16, 0.5)),
    "places": lambda a, b, c: both(a, b, jnp.arange(16.0)),
    "a constant": lambda a, b, c: both(a, b, np.cos(C)),
    "a whole array": lambda a, b, c: both(a, b, c),
    "what is sharded": lambda a, b, c: both(a, b, shard(jnp.cos(c), "x")),
    "one element": lambda a, b, c: both(a, b, c[3]),
    "a scaled sum": lambda a, b, c: both(a, b, 2 * (c - a.sum(0)) / 3),
    "what is selected": lambda a, b, c: both(a, b, jnp.where(c > 0, b.sum(0), 0.25)),
    "pieces": lambda a, b, c: both(a, b, jnp.concatenate([a.sum(0)[:8], c[8:]])),
    "what is padded": lambda a, b, c: both(a, b, jnp.pad(a.sum(0)[:8], (4, 4), constant_values=2)),
    "updates": lambda a, b, c: both(a, b, c.at[jnp.array([1, 5])].add(a.sum(0)[:2])),
    "a narrower sum": lambda a, b, c: both(a, b, (a.astype(jnp.bfloat16).sum(0)).astype(c.dtype)),
}


@pytest.mark.parametrize("out", [None, ROWS, P()])
@pytest.mark.parametrize("added", ADDED)
def test_every_addend_counts_once(added: str, out: Any) -> None:
    tolerance = 2e-2 if added == "a narrower sum" else 1e-5
    check(ADDED[added], (A, B, C), make_mesh(x=4), (ROWS, ROWS, P()), out, tolerance)


def test_gradients_of_gates() -> None:
    """What reads the outputs of an expert twice carries their sum both ways."""

    def loss(x: Any, up: Any, down: Any, gate: Any) -> Any:
        y = jnp.tanh(x @ up) @ down
        return jnp.sin((y * jax.nn.softmax(x @ gate)[:, :1]).sum(1)).sum()

    arrays = A, B, B.T, A[:, :4]
    specs = P(), COLUMNS, ROWS, P()
    check(jax.grad(loss, (0, 1, 2, 3)), arrays, make_mesh(x=4), specs)
