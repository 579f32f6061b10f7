"""Control flow and calls against the unsharded program: values, and what must survive a rebuild."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import compute_on, pallas
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import mlir

import sharding
import spmd
from sharding.errors import ArgumentError, RuleError
from tests.oracle import P, check, kinds, make_mesh

pytestmark = pytest.mark.filterwarnings("ignore::sharding.errors.ShardingWarning")
Case = tuple[Callable, tuple[Any, ...], tuple[Any, ...]]


def arr(*shape: int) -> np.ndarray:
    return (np.random.default_rng(len(shape)).normal(size=shape) * 0.5).astype(np.float32)


def spd(n: int) -> np.ndarray:
    a = arr(n, n)
    return (a @ a.T + n * np.eye(n)).astype(np.float32)


def on(shape: tuple[int, ...], f: Callable, *spec: Any) -> Case:
    return f, (arr(*shape),), (P(*(spec or ("x", "y"))),)


def carried(c: Any, x: Any) -> Any:
    return jnp.sin(c) * 0.5 + x, (c.sum(), x[::-1])


def nested(a: Any) -> Any:
    def outer(c: Any, row: Any) -> Any:
        inner = lax.scan(lambda d, y: (d + y * row.sum(), d), c, a)
        return inner[0] * 0.1, inner[1].mean(0)

    return lax.scan(outer, jnp.zeros(a.shape[1]), a)


LOOPS: dict[str, Case] = {
    "while: predicate over shards": on(
        (8, 8),
        lambda a: lax.while_loop(
            lambda c: (jnp.abs(c[1]).max() > 1e-2) & (c[0] < 50),
            lambda c: (c[0] + 1, 0.4 * jnp.tanh(a @ c[1])), (0, a[0]),
        ),
    ),
    "while: constants of predicate and body": on(
        (8, 8),
        lambda a: lax.while_loop(
            lambda c: jnp.sum(c) < jnp.abs(a).sum() * 9, lambda c: c * c + 1 + a[0] ** 2, a[1]
        ),
    ),
    "while: vmapped": on(
        (8, 6),
        jax.vmap(
            lambda r: lax.while_loop(
                lambda c: c.max() > 0.1 * jnp.abs(r).sum(), lambda c: c * 0.7 - r / 9, r
            )
        ),
    ),
    "fori": on((8, 6), lambda a: lax.fori_loop(0, 5, lambda i, c: c * 0.5 + i, a)),
    "fori: bound known at run time": (
        lambda a, n: lax.fori_loop(0, n, lambda i, c: c * 0.5 + i, a),
        (arr(8, 6), np.int32(3)), (P("x", "y"), None),
    ),
    "scan": on((8, 6), lambda a: lax.scan(carried, jnp.ones(6), a)),
    "scan: scanned dim sharded, uneven": on(
        (7, 5), lambda a: lax.scan(carried, jnp.ones(5), a), "y"
    ),
    "scan: reverse": on((8, 6), lambda a: lax.scan(carried, jnp.ones(6), a, reverse=True)),
    "scan: unrolled": on((8, 6), lambda a: lax.scan(carried, jnp.ones(6), a, unroll=3)),
    "scan: length only": on(
        (8, 6), lambda a: lax.scan(lambda c, _: (jnp.sin(c), None), a, length=3)
    ),
    "scan: nested": on((8, 6), nested),
    "scan: gradient": on(
        (8, 6), jax.grad(lambda a: lax.scan(carried, jnp.ones(6), a)[1][0].sum())
    ),
    "map: in batches that do not divide": on(
        (10, 6), lambda a: lax.map(lambda r: jnp.sin(r) / (1 + r @ r), a, batch_size=4)
    ),
    "associative_scan": on(
        (9, 6),
        lambda a: lax.associative_scan(lambda p, q: (p[0] * q[0], p[1] * q[0] + q[1]), (a, a)),
        None, "y",
    ),
    "cond": on(
        (8, 6), lambda a: lax.cond(a.mean() > 0, lambda a: a @ a.T, lambda a: jnp.eye(8), a)
    ),
    "switch": (
        lambda a, i: lax.switch(i, [lambda a: a.sum(0), lambda a: a[0], lambda a: a.max(0)], a),
        (arr(8, 6), np.int32(2)), (P("x", "y"), None),
    ),
    "cond: vmapped predicate": on(
        (8, 6),
        jax.vmap(lambda r: lax.cond(r[0] > 0, lambda r: r / (1 + r @ r), lambda r: -r, r)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_loops_and_branches(name: str) -> None:
    f, args, specs = LOOPS[name]
    check(f, args, make_mesh(x=2, y=4), specs)


def test_scan_keeps_how_it_is_unrolled() -> None:
    f, args, specs = LOOPS["scan: unrolled"]
    assert "unroll=3" in str(check(f, args, make_mesh(x=2, y=4), specs).jaxpr)


def cube_root(a: Any) -> Any:
    def newton(f: Callable, x0: Any) -> Any:
        return lax.fori_loop(0, 30, lambda i, x: x - f(x) / (3 * x * x), x0)

    return lax.custom_root(
        lambda x: x**3 - a**2 - 1, jnp.ones_like(a), newton, lambda g, y: y / g(jnp.ones_like(y))
    )


def krylov(solver: str) -> Callable:
    def solved(a: Any, b: Any) -> Any:
        return getattr(jax.scipy.sparse.linalg, solver)(lambda v: a @ v, b)[0]

    return lambda a, b: (
        solved(a, b), jax.grad(lambda a, b: (solved(a, b) ** 2).sum(), (0, 1))(a, b)
    )  # fmt: skip


SOLVES: dict[str, Case] = {
    "custom_root": on((8, 6), lambda a: (cube_root(a), jax.grad(lambda a: cube_root(a).sum())(a))),
    **{
        name: (krylov(name), (spd(8), arr(8)), (P("x", "y"), P("y")))
        for name in ("cg", "gmres", "bicgstab")
    },
    "solve": (
        lambda a, b: (
            jnp.linalg.solve(a, b), jax.grad(lambda b: (jnp.linalg.solve(a, b) ** 2).sum())(b)
        ),
        (spd(8), arr(8, 3)), (P("x", "y"), P("y")),
    ),
    "solve: vmapped": (
        jax.vmap(jnp.linalg.solve), (np.stack([spd(4)] * 8), arr(8, 4)), (P("y"), P("y"))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SOLVES)
def test_implicitly_defined_functions(name: str) -> None:
    f, args, specs = SOLVES[name]
    check(f, args, make_mesh(x=2, y=4), specs, tolerance=1e-4)


def test_solver_never_moves_the_matrix() -> None:
    """Each product of the matrix with a vector sends vectors alone."""
    args = (spd(64), arr(64))
    made = check(
        lambda a, b: jax.scipy.sparse.linalg.cg(lambda v: a @ v, b, maxiter=20)[0],
        args, make_mesh(x=2, y=4), (P("x", "y"), P("y")), tolerance=1e-3,
    )  # fmt: skip
    assert all(c.bytes / c.count <= 2 * 64 * 4 for c in made.collectives)
    assert kinds(made)


@jax.custom_jvp
def tripled(x: Any) -> Any:
    return jnp.sin(x)


tripled.defjvp(lambda p, t: (tripled(*p), 3 * t[0] * jnp.cos(p[0])))


def doubled(**options: Any) -> Callable:
    f = jax.custom_vjp(lambda x: jnp.sin(x))
    f.defvjp(lambda x: (jnp.sin(x), x), lambda x, t: (2 * t * jnp.cos(x),), **options)
    return f


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def applied(g: Callable, x: Any) -> Any:
    return g(x)


applied.defvjp(lambda g, x: (g(x), x), lambda g, x, t: (t * x,))


@jax.custom_vjp
def with_zeros(x: Any, y: Any) -> Any:
    return x * y, x


def _zeros_backward(residuals: Any, cotangents: Any) -> Any:
    x, y = residuals
    t, unused = cotangents
    assert isinstance(unused, jax.custom_derivatives.SymbolicZero)
    return t * y, t * x


with_zeros.defvjp(
    lambda x, y: ((x.value * y.value, x.value), (x.value, y.value)), _zeros_backward,
    symbolic_zeros=True,
)  # fmt: skip


def reversed_rows() -> Callable:
    """Its batched form is another function, so that a test sees which of the two ran."""
    f = jax.custom_batching.custom_vmap(lambda x: jnp.sin(x))
    f.def_vmap(lambda size, batched, x: (jnp.cos(x), batched[0]))
    return f


def grad_sum(f: Callable) -> Callable:
    return jax.grad(lambda a: f(a).sum())


def linear(a: Any) -> Any:
    call = jax.custom_derivatives.linear_call
    f = lambda b: call(lambda r, x: x * r, lambda r, t: t * r * 2, a, b)  # noqa: E731
    return f(a), grad_sum(f)(a)


def exported(a: Any) -> Any:
    f = jax.export.export(jax.jit(lambda x: jnp.sin(x) @ x.T))
    return f(jax.ShapeDtypeStruct(a.shape, a.dtype)).call(a) * 2


def traced_before(a: Any) -> Any:
    closed = jax.make_jaxpr(lambda x: jnp.sin(x) @ x.T)(a)
    return jax.extend.core.jaxpr_as_fun(closed)(a)


def mutated(a: Any) -> Any:
    ref = jax.new_ref(a)
    ref[0] = ref[1] + 1

    def body(i: Any, c: Any) -> Any:
        ref[i] = ref[i] * c
        return c + 1.0

    last = lax.fori_loop(0, 4, body, 1.0)
    inner = jax.jit(lambda x: jax.freeze(jax.new_ref(x * last)))(a)
    return ref[...], inner


def run_state(a: Any) -> Any:
    def body(refs: Any) -> None:
        x, y = refs
        y[...] = x[...] @ x[...].T
        x[0] = x[1] * 2

    return pallas.run_state(body)((a, jnp.zeros((a.shape[0], a.shape[0]))))


def converted(a: Any) -> Any:
    f, consts = jax.closure_convert(lambda x: x * a.sum(), a)
    return f(a, *consts)


def tokens(a: Any) -> Any:
    lax.after_all(lax.create_token())
    lax.dce_sink(jnp.sin(a)) if hasattr(lax, "dce_sink") else None
    return a + 1


CALLS: dict[str, Callable] = {
    "jit": lambda a: (jax.jit(lambda x: x + 1)(a), jax.jit(jnp.sin, inline=True)(a)),
    "custom_jvp": lambda a: (tripled(a), jax.jvp(tripled, (a,), (a,)), jax.vmap(tripled)(a)),
    "custom_vjp": lambda a: (doubled()(a), grad_sum(doubled())(a)),
    "custom_vjp: optimised for remat": lambda a: (
        doubled(optimize_remat=True)(a), grad_sum(doubled(optimize_remat=True))(a),
        grad_sum(jax.checkpoint(doubled(optimize_remat=True)))(a),
    ),
    "custom_vjp: nondifferentiable": grad_sum(lambda a: applied(jnp.sin, a)),
    "custom_vjp: symbolic zeros": grad_sum(lambda a: with_zeros(a, a + 1)[0]),
    "custom_vmap": lambda a: (reversed_rows()(a), jax.vmap(reversed_rows())(a)),
    "sequential_vmap": jax.vmap(jax.custom_batching.sequential_vmap(jnp.cumsum)),
    "named_call": jax.named_call(lambda x: x @ x.T, name="outer"),
    "checkpoint_name": lambda a: checkpoint_name(a * 2, "z"),
    "linear_call": linear,
    "composite": lambda a: lax.composite(lambda x: jnp.tan(x) + x.sum(), name="my.tan")(a),
    "export: one device": exported,
    "jaxpr": traced_before,
    "refs": mutated,
    "refs: differentiated": grad_sum(lambda a: mutated(a)[0] ** 2),
    "run_state": run_state,
    "tokens, dce_sink": tokens,
    "reduce_precision": lambda a: lax.reduce_precision(a, 5, 3),
    "closure_convert": converted,
    "high-level primitives": lambda a: (jnp.searchsorted(a[0], a), *jnp.frexp(a)),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str) -> None:
    check(CALLS[name], (arr(8, 6),), make_mesh(x=2, y=4), (P("x", "y"),))


def test_export_for_several_devices_is_refused() -> None:
    mesh = make_mesh(x=2)
    there = jax.sharding.NamedSharding(mesh, P("x"))
    f = jax.export.export(jax.jit(lambda x: x * 2, in_shardings=there))
    call = f(jax.ShapeDtypeStruct((8, 6), jnp.float32)).call
    with pytest.raises(RuleError, match="exported for 2 devices"):
        spmd.jit(call, mesh=mesh)(arr(8, 6))


def count(state: Any, x: Any, by: Any = 1.0) -> Any:
    state["sum"][...] += x * by
    state["sum"][0, 0] = 0.0
    return state["sum"][...] @ x.T


def test_refs_among_the_arguments_are_changed() -> None:
    """Called several times, under jit, nested and vmapped; they stay where they lie."""
    mesh, x = make_mesh(x=2, y=4), arr(8, 6)
    there = jax.NamedSharding(mesh, P("x"))
    x = jax.device_put(x, there)
    step = spmd.jit(count, mesh=mesh, out_shardings=P("x"))

    def twice(f: Callable, x: Any) -> Any:
        f({"sum": (ref := jax.new_ref(x))}, x)
        return f({"sum": ref}, x, by=2.0), ref[...]

    want = jax.jit(partial(twice, count))(x)
    ref = jax.new_ref(x)
    step({"sum": ref}, x)
    results = [(step({"sum": ref}, x, by=2.0), ref[...])]
    assert ref.sharding.is_equivalent_to(there, 2) and results[0][0].sharding.spec == P("x")
    results += [jax.jit(partial(twice, step))(x), spmd.jit(partial(twice, step), mesh=mesh)(x)]
    results += [[y[1] for y in jax.jit(jax.vmap(partial(twice, step)))(jnp.stack([x * 0, x]))]]
    for got in results:
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, 1e-5, 1e-6)


def test_refs_that_cannot_be_changed_are_named() -> None:
    mesh, ref, x = make_mesh(x=2), jax.new_ref(jnp.ones((8, 6))), arr(8, 6)
    closed_over = spmd.jit(lambda x: count({"sum": ref}, x), mesh=mesh)
    with pytest.raises(ArgumentError, match="one that the function closes over"):
        closed_over(x)
    with pytest.raises(ArgumentError, match=r"from outside: state\['sum'\]"):
        spmd.jit(count, mesh=mesh).trace({"sum": ref}, x)
    with pytest.raises(ArgumentError, match="passed as 2 arguments"):
        spmd.jit(lambda a, b: None, mesh=mesh)(ref, ref)


def test_compute_type_survives() -> None:
    new = getattr(compute_on, "compute_on2", compute_on.compute_on)
    on_host = partial(new, compute_type="device_host", out_memory_spaces=jax.memory.Space.Device)
    f = lambda a: on_host(lambda x: jnp.sin(x) @ x.T)(a)  # noqa: E731
    made = check(f, (arr(8, 6),), make_mesh(x=2, y=4), (P("x"),))
    assert "compute_type=device_host" in str(made.jaxpr)


def test_metadata_survives() -> None:
    def f(a: Any) -> Any:
        with set_xla_metadata(inside="here"):
            b = jnp.sin(a)
        return set_xla_metadata(b * 2, tag="there")

    mesh = make_mesh(x=2, y=4)
    check(f, (arr(8, 6),), mesh, (P("x"),))
    text = spmd.jit(f, mesh=mesh).lower(arr(8, 6)).as_text()
    assert 'inside = "here"' in text and 'tag = "there"' in text


def test_metadata_of_a_call_survives() -> None:
    call = getattr(jax.experimental.xla_metadata, "xla_metadata_call", None)
    if call is None:
        pytest.skip("this version of JAX marks no calls")
    f = lambda a: call(lambda x: jnp.sin(x) @ x.T, tag="block")(a)  # noqa: E731
    mesh = make_mesh(x=2, y=4)
    check(lambda a: (f(a), grad_sum(f)(a)), (arr(8, 6),), mesh, (P("x", "y"),))
    assert 'tag = "block"' in spmd.jit(f, mesh=mesh).lower(arr(8, 6)).as_text()


other_p = Primitive("only_on_another_platform")
other_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(other_p, lambda ctx, x: [x], platform="tpu")
sharding.rule("a b -> a b")(other_p)


def test_branches_for_other_platforms_are_dropped() -> None:
    """One of them could not even be lowered here."""
    f = lambda a: lax.platform_dependent(a, cpu=jnp.sin, tpu=other_p.bind)  # noqa: E731
    check(f, (arr(8, 6),), make_mesh(x=2, y=4), (P("x", "y"),))
