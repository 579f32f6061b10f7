"""What `spmd.check` takes for rounding, how it compares each dtype, and what it accepts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import spmd
from sharding.errors import ArgumentError, MeshError
from spmd.partition import apply
from tests.e2e.test_check import MESH, X, found, partition
from tests.oracle import P, make_mesh


def test_rounding_is_listed_by_size_and_is_no_error():
    big = np.random.default_rng(0).normal(size=(8, 4096)).astype(np.float32)

    def f(x):
        return x.sum(1), (x[:, :2048] * 1e-3).sum(), x * 2

    report = spmd.check(f, big, mesh=make_mesh(tensor=8), in_shardings=(P(None, "tensor"),))
    assert report.ok and report.rounding
    errors = [r.error for r in report.rounding]
    assert errors == sorted(errors, reverse=True) and 0 < errors[0] < 1e-5
    assert {r.operation for r in report.rounding} == {"reduce_sum"}
    assert "depend on the mesh within rounding" in str(report)


def test_what_cancels_in_a_sum_is_rounding():
    half = np.random.default_rng(0).normal(size=2048).astype(np.float32) * 1e3
    x = np.concatenate([half, -half[::-1]])
    report = spmd.check(jnp.sum, x, mesh=make_mesh(tensor=8), in_shardings=(P("tensor"),))
    assert report.ok, str(report)


def test_rounding_that_a_chaotic_loop_grows_is_no_error():
    def chaotic(x):
        step = lambda c, _: (jnp.sin(3 * c + c.mean(0)), None)  # noqa: E731
        return lax.scan(step, x, None, length=12)[0]

    x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    report = spmd.check(chaotic, x, mesh=make_mesh(tensor=8), in_shardings=(P("tensor"),))
    assert report.ok, str(report)


def values(dtype) -> np.ndarray:
    drawn = np.random.default_rng(0).integers(-9, 9, (8, 6))
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return (drawn + 1j * drawn[::-1]).astype(dtype)
    return drawn.astype(dtype)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64", "bfloat16", "float16"])
def test_every_dtype_is_compared_on_its_own_terms(dtype, monkeypatch):
    x = values(jnp.dtype(dtype))

    def f(x):
        return x.any(0) if dtype == "bool" else (x.sum(0), x * 2)

    options = {"mesh": make_mesh(tensor=4), "in_shardings": (P("tensor"),)}
    assert spmd.check(f, x, **options).ok
    monkeypatch.setitem(apply._APPLY, "all_reduce", lambda step, x, *rest: x)
    report = spmd.check(f, x, raise_on_error=False, **options)
    assert report.first.operation == "all_reduce(tensor)"


def test_an_integer_that_is_one_off_is_wrong():
    partitioned = partition(lambda x: x * 1000 + 7, values(np.int32), specs=(P("tensor"),))
    (add,) = [c for c, _ in partitioned.plan.body.walk() if c.op.primitive.name == "add"]
    add.op.rule = dataclasses.replace(
        add.op.rule, local=lambda ctx, op, *xs: [ctx.bind(*xs)[0] + 1], always=True
    )
    report = found(partitioned, values(np.int32))
    assert report.first.op is add.op and report.first.difference.wrong == 2 * 48


def test_nan_and_infinity_are_values_like_others():
    x = X.copy()
    x[0, 0], x[1, 1], x[2, 2] = np.nan, np.inf, -np.inf

    def f(x):
        return jnp.log(x), x.sum(1), x.max(0), jnp.where(jnp.isnan(x), 0, x) @ x.T

    assert spmd.check(f, x, mesh=make_mesh(**MESH), in_shardings=(P("data", "tensor"),)).ok


def test_random_keys_are_compared_by_their_bits():
    keys = jax.random.split(jax.random.key(0), 8)

    def f(keys):
        more = jax.vmap(jax.random.split)(keys)
        return more, jax.vmap(lambda k: jax.random.normal(k, (4,)))(more[:, 0])

    assert spmd.check(f, keys, mesh=make_mesh(tensor=4), in_shardings=(P("tensor"),)).ok


def test_shard_map_is_compared_as_a_whole():
    mesh = make_mesh(**MESH)

    @jax.shard_map(mesh=mesh, in_specs=P("tensor"), out_specs=P())
    def total(x):
        return lax.psum(x.sum(), "tensor")

    report = spmd.check(
        lambda x: lax.scan(lambda c, _: (c + total(jnp.sin(x)), None), 0.0, None, length=2)[0],
        np.arange(8.0, dtype=np.float32), mesh=mesh,
    )  # fmt: skip
    assert report.ok


def test_prints_and_callbacks_do_not_stand_in_the_way(capfd):
    def f(x):
        jax.debug.print("sum {}", x.sum())
        doubled = jax.pure_callback(lambda x: 2 * x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        return lax.scan(lambda c, y: (c + y.sum(), jax.debug.print("{}", c)), 0.0, doubled)[0]

    assert spmd.check(f, X, mesh=make_mesh(**MESH), in_shardings=(P("data"),)).ok
    jax.effects_barrier()
    capfd.readouterr()


def test_any_callable_mesh_and_arguments():
    def f(x, n, *, scale, mode="sin"):
        return getattr(jnp, mode)(x) * scale * n

    by_names = spmd.check(f, X, 3, mesh=MESH, in_shardings=P("data"), static_argnums=1,
                          static_argnames="mode", scale=2.0, mode="cos")  # fmt: skip
    assert by_names.ok and by_names.partitioned.plan.mesh.size == 8
    jitted = spmd.jit(lambda x: x + 1, mesh=make_mesh(**MESH), in_shardings=P("data"),
                      donate_argnums=0)  # fmt: skip
    x = jax.device_put(X, jax.sharding.NamedSharding(make_mesh(**MESH), P("data")))
    assert spmd.check(jitted, x).ok and not x.is_deleted()
    assert spmd.check(jitted, x, mesh={"data": 4}).partitioned.plan.mesh.size == 4
    with pytest.raises(ArgumentError, match="in_shardings for a function that spmd.jit returned"):
        spmd.check(jitted, x, in_shardings=P())


def test_explicit_axes():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"))  # of type Explicit

    def resharded(x):
        return jnp.sin(jax.sharding.reshard(x * 2, P(None, "tensor"))).sum(0)

    for f in (lambda x: jnp.cos(x).sum(0), resharded):
        assert spmd.check(f, X, mesh=mesh, in_shardings=P("data")).ok


def test_too_few_devices():
    with pytest.raises(MeshError) as caught:
        spmd.check(jnp.sin, X, mesh={"data": 16})
    assert str(caught.value) == (
        "the mesh data=16 has 16 devices\n  why: a check runs the program, and JAX has 8\n"
        "  fix: call spmd.simulate.simulate(16) before the first use of JAX"
    )
