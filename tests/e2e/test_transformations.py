"""Transformations of `spmd.jit`, and `spmd.jit` of transformations, against `jax.jit` in its place:
values, structure, dtypes and weak types.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import spmd
from sharding import shard
from tests.oracle import P, assert_close, kinds, make_mesh

pytestmark = pytest.mark.filterwarnings("ignore::sharding.errors.ShardingWarning")
MESH = make_mesh(x=2, y=4)
Jit = Callable[[Callable], Callable]


def arr(*shape: int) -> np.ndarray:
    return (np.random.default_rng(len(shape)).normal(size=shape) * 0.5).astype(np.float32)


PARAMS = {"w": arr(8, 12), "b": arr(12), "v": arr(12, 8)}
X, BATCH, VECTOR = arr(4, 8), arr(3, 4, 8), arr(6)


def model(p: Any, x: Any) -> Any:
    h = jnp.tanh(shard(x, "x", None) @ shard(p["w"], None, "y") + p["b"])
    return {"y": shard(h @ p["v"], "x", None), "n": jnp.sum(h, axis=1)}


def loss(p: Any, x: Any) -> Any:
    out = model(p, x)
    return (out["y"] ** 2).sum() + out["n"].sum()


def total(p: Any, x: Any) -> Any:
    """Of all gradients with the parameters themselves."""
    return partial(_total, loss)(p, x)


def _total(f: Callable, p: Any, x: Any) -> Any:
    g = jax.grad(f)(p, x)
    return sum(map(jnp.vdot, jax.tree.leaves(g), jax.tree.leaves(p)))


def scalar(v: Any) -> Any:
    return (jnp.outer(v, v) @ jnp.sin(v)).sum() + (v**3).sum()


def step(c: Any, x: Any) -> Any:
    return jnp.tanh(c + x), c.sum()


@jax.custom_vjp
def doubled(x: Any) -> Any:
    return jnp.sin(x)


doubled.defvjp(lambda x: (jnp.sin(x), x), lambda x, t: (2 * t * jnp.cos(x),))


@jax.custom_jvp
def tripled(x: Any) -> Any:
    return jnp.sin(x)


tripled.defjvp(lambda p, t: (tripled(*p), 3 * t[0] * jnp.cos(p[0])))


def compare(make: Callable[[Jit], Callable], args: Any) -> None:
    want = make(jax.jit)(*args)
    got = make(partial(spmd.jit, mesh=MESH))(*args)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert getattr(a, "weak_type", False) == getattr(b, "weak_type", False)
        if b.dtype == jax.dtypes.float0:
            assert a.dtype == b.dtype and a.shape == b.shape
        else:
            assert_close(a, b, 2e-5, "")


both = (PARAMS, X)
INSIDE: dict[str, tuple[Callable, Any]] = {
    "grad": (jax.grad(loss), both),
    "grad of all, with aux": (
        jax.grad(lambda p, x: (loss(p, x), model(p, x)), (0, 1), has_aux=True), both
    ),
    "value_and_grad": (jax.value_and_grad(loss), both),
    "hessian": (jax.hessian(scalar), (VECTOR,)),
    "jacrev": (jax.jacrev(model), both),
    "jacfwd": (jax.jacfwd(lambda x: model(PARAMS, x)), (X,)),
    "vmap": (jax.vmap(model, in_axes=(None, 0), out_axes={"y": 1, "n": 0}), (PARAMS, BATCH)),
    "vmap of grad": (jax.vmap(jax.grad(loss), in_axes=(None, 0)), (PARAMS, BATCH)),
    "grad of vmap": (
        jax.grad(lambda p, b: jax.vmap(loss, in_axes=(None, 0))(p, b).sum()), (PARAMS, BATCH)
    ),
    "linearize": (lambda p, x: jax.linearize(loss, p, x)[1](p, x), both),
    "linear_transpose": (
        lambda x, t: jax.linear_transpose(lambda x: x @ PARAMS["w"], x)(t), (X, arr(4, 12))
    ),
    "jvp": (lambda p, x: jax.jvp(model, (p, x), (p, x)), both),
    "vjp": (lambda p, x: jax.vjp(model, p, x)[1](model(p, x)), both),
    "checkpoint": (jax.grad(jax.checkpoint(loss)), both),
    "second order": (jax.grad(total), both),
    "Hessian-vector product": (
        lambda p, x: jax.jvp(jax.grad(lambda p: loss(p, x)), (p,), (p,))[1], both
    ),
    "custom rules": (
        lambda x: (
            jax.grad(lambda x: doubled(x).sum())(x), jax.jvp(tripled, (x,), (x,)),
            jax.vmap(doubled)(x), jax.grad(lambda x: tripled(x).sum())(x),
        ),
        (X,),
    ),
    "named_call": (jax.named_call(model, name="outer"), both),
    "weak types": (lambda s: (s * 2, jnp.arange(3, dtype=jnp.bfloat16) * s), (3.0,)),
}  # fmt: skip


@pytest.mark.parametrize("name", INSIDE)
def test_inside(name: str) -> None:
    f, args = INSIDE[name]
    compare(lambda jit: jit(f), args)


def with_rule(jit: Jit, x: Any) -> Any:
    """A custom rule made of programs."""
    f = jax.custom_vjp(jit(jnp.sin))
    backward = jit(lambda x, t: 2 * t * jnp.cos(x))
    f.defvjp(lambda x: (jit(jnp.sin)(x), x), lambda x, t: (backward(x, t),))
    g = jax.custom_jvp(jit(jnp.sin))
    g.defjvp(lambda p, t: (jit(jnp.sin)(*p), 3 * t[0] * jnp.cos(p[0])))
    return jax.grad(lambda x: f(x).sum())(x), jax.jvp(g, (x,), (x,))


def scanned(jit: Jit, x: Any, batch: Any) -> Any:
    return lax.scan(jit(step), x, batch)


OUTSIDE: dict[str, tuple[Callable[[Jit], Callable], Any]] = {
    "jit": (lambda jit: jax.jit(jit(model)), both),
    "grad": (lambda jit: jax.grad(jit(loss)), both),
    "grad of all, with aux": (
        lambda jit: jax.grad(jit(lambda p, x: (loss(p, x), model(p, x))), (0, 1), has_aux=True),
        both,
    ),
    "jit of grad": (lambda jit: jax.jit(jax.value_and_grad(jit(loss))), both),
    "grad of jit": (lambda jit: jax.grad(jax.jit(jit(loss))), both),
    "grad, integers among the arguments": (
        lambda jit: jax.grad(jit(lambda x, i: x[i].sum() * 2.0), (0, 1), allow_int=True),
        (X, np.int32(1)),
    ),
    "grad of a closure": (lambda jit: jax.grad(lambda p: jit(lambda x: loss(p, x))(X)), (PARAMS,)),
    "grad, keywords": (lambda jit: jax.grad(lambda p: jit(loss)(p, x=X)), (PARAMS,)),
    "hessian": (lambda jit: jax.hessian(jit(scalar)), (VECTOR,)),
    "jacrev": (lambda jit: jax.jacrev(jit(model)), both),
    "jacfwd": (lambda jit: jax.jacfwd(lambda x: jit(model)(PARAMS, x)), (X,)),
    "vmap": (
        lambda jit: jax.vmap(jit(model), in_axes=(None, 0), out_axes={"y": 1, "n": 0}),
        (PARAMS, BATCH),
    ),
    "jit of vmap": (lambda jit: jax.jit(jax.vmap(jit(model), in_axes=(None, 0))), (PARAMS, BATCH)),
    "vmap of a closure": (
        lambda jit: jax.vmap(lambda x: jit(lambda p: loss(p, x))(PARAMS)), (BATCH,)
    ),
    "vmap of keys": (
        lambda jit: lambda k: jax.random.key_data(jax.vmap(jit(jax.random.split))(k)),
        (jax.random.split(jax.random.key(0), 4),),
    ),
    "vmap of grad": (lambda jit: jax.vmap(jax.grad(jit(loss)), in_axes=(None, 0)), (PARAMS, BATCH)),
    "grad of vmap": (
        lambda jit: jax.grad(lambda p, b: jax.vmap(jit(loss), in_axes=(None, 0))(p, b).sum()),
        (PARAMS, BATCH),
    ),
    "jvp": (lambda jit: lambda p, x: jax.jvp(jit(model), (p, x), (p, x)), both),
    "vjp": (lambda jit: lambda p, x: jax.vjp(jit(model), p, x)[1](model(p, x)), both),
    "linearize": (
        lambda jit: lambda p, x: (
            jax.linearize(jit(model), p, x)[0], jax.linearize(jit(model), p, x)[1](p, x)
        ),
        both,
    ),
    "linear_transpose": (
        lambda jit: lambda t: jax.linear_transpose(jit(lambda x: x @ PARAMS["w"]), X)(t),
        (arr(4, 12),),
    ),
    "checkpoint": (lambda jit: jax.grad(jax.checkpoint(jit(loss))), both),
    "jit of checkpoint with a policy": (
        lambda jit: jax.jit(
            jax.grad(
                jax.checkpoint(jit(loss), policy=jax.checkpoint_policies.dots_saveable)
            )
        ),
        both,
    ),
    "second order": (lambda jit: jax.grad(partial(_total, jit(loss))), both),
    "Hessian-vector product": (
        lambda jit: lambda p, x: jax.jvp(jax.grad(lambda p: jit(loss)(p, x)), (p,), (p,))[1], both
    ),
    "scan": (lambda jit: partial(scanned, jit), (X, BATCH)),
    "grad of scan, checkpointed": (
        lambda jit: jax.jit(
            jax.grad(lambda x, b: lax.scan(jax.checkpoint(jit(step)), x, b)[1].sum())
        ),
        (X, BATCH),
    ),
    "map, fori": (
        lambda jit: lambda b: (
            lax.map(jit(lambda c: c * 0.5 + c.sum()), b),
            lax.fori_loop(0, 3, jit(lambda i, c: c * 0.5 + i), b),
        ),
        (BATCH,),
    ),
    "while": (
        lambda jit: lambda x: lax.while_loop(
            jit(lambda c: jnp.abs(c).max() > 0.1), jit(lambda c: c * 0.5), x
        ),
        (X,),
    ),
    "cond": (
        lambda jit: lambda x: lax.cond(
            x.sum() > 0, jit(lambda c: c * 0.5), jit(lambda c: c + 1), x
        ),
        (X,),
    ),
    "custom rules inside": (
        lambda jit: lambda x: (
            jax.grad(jit(lambda x: doubled(x).sum()))(x), jax.jvp(jit(tripled), (x,), (x,))
        ),
        (X,),
    ),
    "custom rules around": (lambda jit: partial(with_rule, jit), (X,)),
    "named_call": (lambda jit: jax.named_call(jit(model), name="outer"), both),
    "eval_shape": (
        lambda jit: lambda p, x: jax.tree.map(
            lambda s: np.zeros(s.shape, s.dtype), jax.eval_shape(jit(model), p, x)
        ),
        both,
    ),
    "nested": (lambda jit: jit(lambda p, x: jit(model)(p, x)["y"] + 1), both),
    "grad of nested": (lambda jit: jax.grad(jit(lambda p, x: jit(loss)(p, x) * 2)), both),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_outside(name: str) -> None:
    make, args = OUTSIDE[name]
    compare(make, args)


def test_new_dim_of_vmap_lies_on_the_spmd_axis() -> None:
    """Inside and outside of the program; its annotations keep the axes of the other dims."""
    layer = lambda x, w: shard(jnp.tanh(x @ w), None, "y")  # noqa: E731
    f = jax.vmap(layer, in_axes=(0, None), spmd_axis_name="x")
    args = (arr(2, 4, 8), arr(8, 12))
    made = spmd.jit(f, mesh=MESH).trace(*args).propagate().partition()
    assert made.out_shardings.spec == P("x", None, "y")
    assert kinds(made) == {}
    of = jax.vmap(spmd.jit(layer, mesh=MESH), in_axes=(0, None), spmd_axis_name="x")
    whole = spmd.jit(of, mesh=MESH).trace(*args).propagate().partition()
    assert whole.out_shardings.spec == P("x", None, "y")
    want = np.tanh(args[0] @ args[1])
    for g in (spmd.jit(f, mesh=MESH), of, jax.jit(of)):
        np.testing.assert_allclose(g(*args), want, 1e-5, 1e-6)


@pytest.mark.parametrize("outer_rules", [(), (("rows", "y"),)])
def test_nested_programs_keep_their_axis_rules(outer_rules: Any) -> None:
    """`rows` means x inside, whatever it means around; in the gradient too."""
    inner = spmd.jit(
        lambda h: shard(jnp.sin(h), "rows", None), mesh=MESH, axis_rules=[("rows", "x")]
    )

    def outer(h: Any) -> Any:
        h = shard(h * 2, "rows", None) if outer_rules else h * 2
        return inner(h)

    function = spmd.jit(outer, mesh=MESH, axis_rules=outer_rules)
    made = function.trace(arr(8, 4)).propagate().partition()
    assert made.out_shardings.spec == P("x")
    assert made.in_shardings[0].spec == (P("y") if outer_rules else P("x"))
    np.testing.assert_allclose(function(arr(8, 4)), np.sin(arr(8, 4) * 2), 1e-5)
    got = jax.jit(jax.grad(lambda h: function(h).sum()))(arr(8, 4))
    np.testing.assert_allclose(got, 2 * np.cos(arr(8, 4) * 2), 1e-5)
