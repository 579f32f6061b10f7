"""Annotated dims with fewer elements than devices: heads of grouped queries, small microbatches.

They lie on the major part of their axes: no device has padding alone, and what follows is sharded
along the rest.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import spmd
from sharding import P, ShardingWarning, shard
from tests.oracle import check, kinds, make_mesh

BATCH, SEQ, MODEL, HEADS, WIDE = 2, 16, 32, 16, 4
F32 = 4
X = np.random.default_rng(0).standard_normal((BATCH, SEQ, MODEL)).astype(np.float32)


def grouped(q: Any, k: Any, v: Any) -> Any:
    q = q.reshape(*q.shape[:2], k.shape[2], -1, WIDE)
    scores = jax.nn.softmax(jnp.einsum("bskge,btke->bkgst", q, k), -1)
    return jnp.einsum("bkgst,btke->bskge", scores, v).reshape(BATCH, SEQ, HEADS, WIDE)


def repeated(q: Any, k: Any, v: Any) -> Any:
    k, v = (jnp.repeat(x, HEADS // x.shape[2], 2) for x in (k, v))
    scores = jax.nn.softmax(jnp.einsum("bshe,bthe->bhst", q, k), -1)
    return jnp.einsum("bhst,bthe->bshe", scores, v)


@pytest.mark.parametrize("attend", [grouped, repeated])
@pytest.mark.parametrize("few", [2, 4])
def test_keys_of_fewer_heads_than_devices(few: int, attend: Callable) -> None:
    """Queries lie on all 8 devices by their heads, keys on as many groups as they have heads: of
    them nothing is sent but the gradients, once within each group, and updated weights."""

    def layer(w: Any, x: Any) -> Any:
        q, k, v = (shard(jnp.einsum("bsd,dhe->bshe", x, w[n]), None, None, "tensor", None)
                   for n in "qkv")  # fmt: skip
        y = shard(attend(q, k, v), None, None, "tensor", None)
        return jnp.einsum("bshe,hed->bsd", y, w["o"])

    def step(w: Any, x: Any) -> Any:
        return jax.tree.map(jnp.subtract, w, jax.grad(lambda w: (layer(w, x) ** 2).mean())(w))

    shapes = {"q": (MODEL, HEADS, WIDE), "k": (MODEL, few, WIDE), "v": (MODEL, few, WIDE),
              "o": (HEADS, WIDE, MODEL)}  # fmt: skip
    rng = np.random.default_rng(1)
    w = {n: rng.standard_normal(s).astype(np.float32) / 4 for n, s in shapes.items()}
    specs = {"q": P(None, "tensor"), "k": P(), "v": P(), "o": P("tensor")}
    found = kinds(check(step, (w, X), make_mesh(tensor=8), (specs, P()), specs))
    each, rest = f"tensor:(1){few}", f"tensor:({few}){8 // few}"
    keys, groups = BATCH * SEQ * WIDE * F32, 8 // few
    assert found == {
        ("all_reduce", (each, rest)): (1, 2 * X.nbytes * 7 / 8),
        ("all_reduce", (rest,)): (2, 2 * 2 * keys * (groups - 1) / groups),
        ("all_gather", (each,)): (2, 2 * w["k"].nbytes * (few - 1) / few),
    }


def test_microbatches_of_fewer_rows_than_devices() -> None:
    """Two rows over data=2 and fsdp=4: each on the four devices of one `data`, of which each has a
    part of the weight, and multiplies its part of the row. For the gradient of that part the other
    row comes, and what is multiplied with it: less than the gradient."""

    def step(w: Any, x: Any) -> Any:
        def one(total: Any, rows: Any) -> Any:
            rows = shard(rows, ("data", "fsdp"), None)
            return total + jax.grad(lambda w: (jnp.tanh(rows @ w) ** 2).sum())(w), None

        return w - lax.scan(one, jnp.zeros_like(w), x.reshape(4, 2, -1))[0]

    w = np.random.default_rng(2).standard_normal((64, 64)).astype(np.float32) / 8
    x = np.random.default_rng(3).standard_normal((8, 64)).astype(np.float32)
    spec, mesh = P("fsdp"), make_mesh(data=2, fsdp=4)
    planned = check(step, (w, x), mesh, (spec, P()), spec)
    row = 64 * F32
    assert kinds(planned) == {
        ("all_reduce", ("fsdp",)): (4, 4 * 2 * row * 3 / 4),
        ("all_gather", ("data",)): (8, 4 * (row / 4 + row)),
    }


@pytest.mark.parametrize("axes", [{"a": 8}, {"a": 2, "b": 4}, {"a": 4, "b": 2}])
@pytest.mark.parametrize("size", [2, 3, 4, 6, 12])
def test_values_are_those_of_the_whole_program(size: int, axes: dict[str, int]) -> None:
    def f(x: Any) -> Any:
        y = shard(jnp.sin(x), tuple(axes), None)
        z = shard(jnp.cumsum(y, 0)[::-1] + y.mean(0), None, tuple(axes))
        return z @ y.T, lax.sort(shard(y, tuple(axes), None), dimension=0), jnp.argmax(y, 0)

    check(f, (np.linspace(-3, 3, size * 5, dtype=np.float32).reshape(size, 5),), make_mesh(**axes))


def test_arguments_and_results_on_a_part_of_an_axis_are_named() -> None:
    w = jnp.arange(64.0).reshape(16, 4)
    spec = P(None, "tensor")
    function = spmd.jit(
        lambda w: w * 2, mesh=make_mesh(tensor=8), in_shardings=(spec,), out_shardings=spec
    )
    with pytest.warns(ShardingWarning) as warned:
        out = function(w)
    assert [str(warning.message) for warning in warned] == [
        f"boundary: {name}: dim 1 of size 4 lies over tensor:(1)4, and arrays lie on whole axes: "
        "held whole at the boundary (256 B per device), 1 of 4 elements per device inside"
        for name in ("w", "result")
    ]
    np.testing.assert_array_equal(out, w * 2)
