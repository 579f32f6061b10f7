"""Dims that the mesh does not divide, are smaller than it, or empty: padding is never read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import spmd
from sharding import P, shard
from tests.oracle import check, make_mesh

pytestmark = pytest.mark.filterwarnings("ignore::sharding.ShardingWarning")

MESH = make_mesh(x=8)
NEGATIVE = -jnp.arange(1.0, 8.0)[:, None] * jnp.arange(1.0, 4.0)

REDUCTIONS = {
    "sum": jnp.sum, "prod": jnp.prod, "max": jnp.max, "min": jnp.min, "argmax": jnp.argmax,
    "argmin": jnp.argmin, "mean": jnp.mean, "logsumexp": jax.nn.logsumexp,
    "all": lambda x, a: jnp.all(x < 0, a), "any": lambda x, a: jnp.any(x > 0, a),
}  # fmt: skip


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_of_seven_rows_on_eight_devices(name: str, sign: float) -> None:
    check(lambda x: REDUCTIONS[name](shard(x, "x", None), 0), (sign * NEGATIVE,), MESH)


def test_infinities_and_nans_in_padding_do_not_leak() -> None:
    def f(x, w):
        return jnp.log(shard(x, None, "x")) @ w, jnp.exp(1 / shard(x, None, "x")).sum()

    check(f, (-NEGATIVE, jnp.ones((3, 5))), MESH)


def test_top_k_of_negative_rows() -> None:
    x = -jnp.arange(1.0, 32.0)
    for mesh in (make_mesh(x=2), MESH):
        check(lambda x: lax.top_k(shard(x, "x"), 3), (x,), mesh)
        check(lambda x: lax.top_k(shard(x[::-1], "x"), 3), (x,), mesh)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 4), (3, 1)])
def test_empty_and_tiny_dims(shape: tuple[int, int]) -> None:
    def f(x):
        x = shard(x * 2, "x", None)
        return x, x.sum(0), jnp.concatenate([x, x], 1)

    check(f, (jnp.ones(shape),), MESH, (P("x"),))


def test_array_without_elements_whose_other_dim_is_sharded_at_the_boundary() -> None:
    mesh = make_mesh(x=2)
    x = np.zeros((0, 6, 2), np.float32)
    for given in (P(None, None, "x"), P(None, "x")):
        for wanted in (P(None, None, "x"), P("x"), None):
            check(lambda x: jnp.concatenate([x, x * 2], 1), (x,), mesh, (given,), wanted)
        placed = jax.device_put(x, jax.NamedSharding(mesh, given))
        f = spmd.jit(lambda x: x * 2, mesh=mesh, in_shardings=given, out_shardings=given)
        assert np.asarray(f(f(placed))).shape == x.shape
        assert np.asarray(spmd.jit(lambda x: x * 2, mesh=mesh)(placed)).shape == x.shape


def test_permutations_along_axes_out_of_mesh_order() -> None:
    mesh = make_mesh(x=2, y=2, z=2)
    v = jnp.arange(4.0 * 6 * 5).reshape(4, 6, 5)
    for given, wanted in [
        (P("x", "z", "y"), P("z", "y")),
        (P("x", "y", "z"), P("y", "z", "x")),
        (P("x", "y", "z"), P("z", "x", "y")),
        (P(("x", "y"), "z"), P(("z", "x"), "y")),
    ]:
        check(lambda v, given=given: shard(v, given) + 1, (v,), mesh, None, wanted)


def test_one_update_outside_of_the_shard_is_dropped() -> None:
    x = jnp.arange(7.0)[:, None]
    mesh = make_mesh(y=2)
    for i in range(-1, 9):
        at = jnp.array([i])
        check(lambda x, at: x.at[at].set(2.0, mode="drop"), (x, at), mesh, None, P("y"))


def test_boolean_products_and_complex_maxima() -> None:
    a = jnp.arange(64).reshape(8, 8) % 3 == 0
    check(lambda a, b: jnp.matmul(a, b), (a, a.T), MESH, (P(None, "x"), P("x")))
    z = jnp.arange(21.0).reshape(7, 3) * (1 - 2j)
    check(lambda z: (z.max(0), z.min(0), z.sum(0), z.prod(0)), (z,), MESH, (P("x"),))


def test_partial_values_meet_zero_and_infinity() -> None:
    x = jnp.array([3.0, -1, -1, -1, 1, 1, 1, 1])[:, None]
    check(lambda x: jnp.sum(x, 0) / 0.0, (x,), MESH, (P("x"),))
    check(lambda x: jnp.sum(x, 0) / 4.0 - 1.0, (x,), MESH, (P("x"),))


def test_a_dim_smaller_than_its_axis_is_merged_and_reduced() -> None:
    def f(x):
        flat = jnp.reshape(x, (48,))
        return jnp.sum(jnp.maximum(flat, flat), 0, keepdims=True)

    check(f, (jnp.arange(48.0).reshape(4, 12),), MESH, (P("x"),))
