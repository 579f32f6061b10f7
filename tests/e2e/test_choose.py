"""Which axes an operation's factors get, and in which order."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

import spmd
from sharding import P
from tests.oracle import check, kinds, make_mesh

ROWS, WIDTH, TOKENS = 1024, 64, 4096
PLACES = (P("data", "tensor"), P())  # of the cotangents of what is looked up, and of the tokens


def table_gradient(g: Any, tokens: Any) -> Any:
    """Of a table of embeddings, by the cotangents of what was looked up in it."""
    table = jnp.zeros((ROWS, WIDTH), g.dtype)
    return jax.vjp(lambda table: table[tokens], table)[1](g)[0]


def test_the_smaller_side_changes_the_order_of_axes() -> None:
    """Cotangents come with features over `tensor`, and `data` beside it after an all-to-all; the
    table wants them over `data` first. It is the smaller one that is brought into order."""
    shapes = (
        jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float32),
        jax.ShapeDtypeStruct((TOKENS,), jnp.int32),
    )
    planned = spmd.jit(
        table_gradient, mesh=AbstractMesh((4, 4), ("data", "tensor")), in_shardings=PLACES,
        out_shardings=P("tensor", "data"),
    ).trace(*shapes).propagate().partition()  # fmt: skip
    found = kinds(planned)
    table, tokens = ROWS * WIDTH * 4 // 16, TOKENS * WIDTH * 4 // 16
    assert found["all_to_all", ("data",)] == (1, tokens * 3 / 4)
    assert found["permute", ("data", "tensor")] == (1, table)
    assert planned.wire_bytes == tokens * 3 / 4 + table + 2 * table * 3 / 4


def test_its_values() -> None:
    rng = np.random.default_rng(0)
    g = rng.standard_normal((TOKENS, WIDTH), np.float32)
    tokens = rng.integers(0, ROWS, TOKENS, np.int32)
    check(table_gradient, (g, tokens), make_mesh(data=2, tensor=4), PLACES, P("tensor", "data"))


@pytest.mark.parametrize("fun", [
    lambda x: jnp.median(x, axis=0),
    lambda x: jnp.percentile(x, jnp.array([5.0, 95.0]), axis=0),
    lambda x: jnp.sort(x, axis=0)[-1],
])  # fmt: skip
def test_what_is_made_less_of_is_gathered_after_that(fun: Callable[[Any], Any]) -> None:
    """Columns that are sorted for a few of their rows: rows swap places with columns, and only the
    rows that are asked for go to all. Sorting whole columns everywhere would gather the array."""
    x = np.random.default_rng(0).standard_normal((512, 64), np.float32)
    planned = check(fun, (x,), make_mesh(y=8), (P("y"),), P())
    assert planned.wire_bytes < 2 * x.nbytes / 8
    found = kinds(planned)
    assert found["all_to_all", ("y",)] == (1, x.nbytes / 8 * 7 / 8)


def test_what_is_asked_for_whole_is_gathered_once() -> None:
    x = np.random.default_rng(0).standard_normal((512, 64), np.float32)
    planned = check(lambda x: jnp.sort(x, axis=0), (x,), make_mesh(y=8), (P("y"),), P())
    assert kinds(planned) == {("all_gather", ("y",)): (1, x.nbytes * 7 / 8)}
