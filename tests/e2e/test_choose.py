"""Which axes an operation's factors get, and in which order."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

import spmd
from sharding import MeshShape, P
from sharding.spec import Layout
from spmd.partition.choose import costs
from spmd.partition.tensor import Tensor
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


@pytest.mark.parametrize("take", [True, False])
def test_of_a_table_the_rows_that_are_taken_count(take: bool) -> None:
    """However long it is, where it is whole at hand. Of what is added to, all of it."""
    sharded, whole = Layout((("d",), ())), Layout(((), ()))

    def price(rows: int) -> float:
        table = jax.ShapeDtypeStruct((rows, WIDTH), jnp.float32)
        other = jax.ShapeDtypeStruct((256,) if take else table.shape, jnp.int32 if take else "f4")
        fun = (lambda t, i: t[i]) if take else (lambda t, y: t + y)
        stage = spmd.jit(fun, mesh=AbstractMesh((8,), ("d",))).trace(table, other)
        op = next(op for op in stage.program.ops() if op.primitive.name in ("gather", "add")
                  and op.inputs[0] is stage.program.body.inputs[0])  # fmt: skip
        lie = [(whole,), *((Layout(((),) * v.rank),) for v in op.inputs[1:])]
        operands = tuple(Tensor(v.shape, v.itemsize, at)
                         for v, at in zip(op.inputs, lie, strict=True))  # fmt: skip
        (out,) = op.outputs
        result = Tensor(out.shape, out.itemsize, (sharded if take else whole,))
        return costs(op.rule, operands, (result,), MeshShape((("d", 8),)))[1]

    assert (price(1 << 12) == price(1 << 20)) == take
