"""Indexing, sorting, cumulation and random numbers through `spmd.jit`: values and collectives."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import sharding.rules.data_flow  # noqa: F401 (registers its rules)
import spmd
from sharding import shard
from tests.oracle import P, check, kinds, make_mesh


def arr(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).integers(-9, 10, shape).astype(np.float32)


def ids(*shape: int, n: int) -> np.ndarray:
    """Indices of which some are negative or out of bounds."""
    return np.random.default_rng(n).integers(-3, n + 3, shape).astype(np.int32)


def moved(partitioned: spmd.Partitioned, kind: str) -> float:
    """Wire bytes of one kind of collective."""
    return sum(b for (k, _), (_, b) in kinds(partitioned).items() if k == kind)


UNEVEN = pytest.mark.filterwarnings("ignore::sharding.errors.ShardingWarning")


@UNEVEN
@pytest.mark.parametrize("vocabulary", [4096, 4099])
def test_sharded_embedding_is_never_gathered(vocabulary: int) -> None:
    """Forward: the looked-up rows are reduced; backward: no communication along the vocabulary,
    but for an uneven one at the boundary, which JAX wants whole."""

    def step(table, tokens, cotangent):
        table = shard(table, "y", None)
        out, vjp = jax.vjp(lambda t: jnp.take(t, tokens, axis=0, mode="clip"), table)
        return out, shard(vjp(cotangent)[0], "y", None)

    tokens = ids(8, 5, n=vocabulary)
    args = (arr(vocabulary, 16), tokens, arr(8, 5, 16))
    partitioned = check(step, args, make_mesh(x=2, y=4), (P("y"), P("x"), P("x")))
    found = kinds(partitioned)
    assert found["all_reduce", ("y",)] == (1, 2 * 4 * 5 * 16 * 4 * 3 / 4)
    if vocabulary % 4 == 0:  # tokens and cotangent, which are smaller than the table's gradient
        assert moved(partitioned, "all_gather") <= 8 * 5 * (16 + 1) * 4 / 2


@UNEVEN
@pytest.mark.parametrize("shape", [(8, 6), (7, 5)])
def test_random_values_are_those_of_the_seed(shape: tuple[int, int]) -> None:
    def draw(key):
        a, b, c, d = jax.random.split(key, 4)
        keys = jax.random.split(a, shape[0])
        return [
            shard(x, "y", "x")
            for x in (
                jax.random.uniform(a, shape),
                jax.random.normal(b, shape, jnp.bfloat16),
                jax.random.bernoulli(c, 0.3, shape),
                jax.random.randint(d, shape, -5, 90),
                jax.vmap(lambda k: jax.random.normal(k, shape[1:]))(keys),
                jax.random.truncated_normal(d, -1, 1, shape),
            )
        ] + [jax.random.permutation(a, shape[0]), jax.random.categorical(b, jnp.zeros(shape))]

    mesh = make_mesh(x=2, y=4)
    check(draw, (jax.random.key(5),), mesh, (None,))
    check(draw, (jax.random.PRNGKey(5),), mesh, (P("x"),))


def test_random_bits_need_no_collective() -> None:
    outs = (P("y", "x"), P("y"))
    made = check(
        lambda k: (jax.random.normal(k, (8, 6)), jax.random.split(k, 8)),
        (jax.random.key(1),), make_mesh(x=2, y=4), None, outs,
    )  # fmt: skip
    assert kinds(made) == {}


def test_cache_is_written_in_place() -> None:
    """A decoding step writes one position of a cache that is sharded along it."""

    def step(cache, new, at):
        return lax.dynamic_update_slice(cache, new, (0, at, 0))

    args = (arr(4, 16, 8), arr(4, 1, 8), np.int32(11))
    made = check(step, args, make_mesh(x=2, y=4), (P("x", "y"), P("x"), None), P("x", "y"))
    assert kinds(made) == {}


def test_sampling_gathers_only_winners() -> None:
    made = check(lambda x: lax.top_k(x, 4), (arr(4, 4096),), make_mesh(y=8), (P(None, "y"),))
    assert moved(made, "all_gather") <= 2 * 8 * 4 * 4 * 4


def test_cumsum_exchanges_one_slice() -> None:
    made = check(
        lambda x: lax.cumsum(x, axis=1, reverse=True), (arr(4, 4096),), make_mesh(y=8),
        (P(None, "y"),), P(None, "y"),
    )  # fmt: skip
    assert moved(made, "all_gather") <= 4 * 8 * 4


INDEXED = {
    "take_along_axis": lambda x, i: jnp.take_along_axis(x, i[:, : x.shape[1]] % x.shape[1], 1),
    "one_hot": lambda x, i: jnp.zeros_like(x).at[jnp.arange(i.shape[0]), i[:, 0]].set(1.0),
    "segment_sum": lambda x, i: jax.ops.segment_sum(x, i[:, 0], 5),
    "at_get": lambda x, i: x.at[i[:, 0], i[:, 1]].get(mode="fill", fill_value=2.0),
    "at_max": lambda x, i: x.at[i[:, 0]].max(x[::-1], mode="drop"),
    "at_mul": lambda x, i: x.at[:, i[0]].mul(2.0, mode="clip"),
    "argsort": lambda x, i: jnp.take_along_axis(x, jnp.argsort(x, 1), 1),
    "grad": lambda x, i: jax.grad(lambda x: jnp.sum(x[i[:, 0]] * x[:, i[0]][:, :1]))(x),
    "cumprod": lambda x, i: jnp.cumprod(1 + x / 50, 0) + lax.cummax(x, 1, reverse=True),
    "barrier": lambda x, i: lax.optimization_barrier((x * 2, i + 1, x.sum(0))),
}


@pytest.mark.parametrize("shape", [(8, 6), (7, 5)])
@pytest.mark.parametrize("name", INDEXED)
def test_program_agrees(name: str, shape: tuple[int, int]) -> None:
    indices = ids(shape[0], 6, n=shape[1])
    for dims in (("y", None), (None, "y"), ("x", "y"), (("y", "x"), None)):

        def fun(x, i, dims=dims):
            return INDEXED[name](shard(x + 1, *dims), i)

        check(fun, (arr(*shape), indices), make_mesh(x=2, y=4))
