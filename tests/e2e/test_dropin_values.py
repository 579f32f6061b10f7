"""`spmd.jit` as `jax.jit`: constants, nesting, random keys, narrow and extended dtypes, Refs, and
every configuration of JAX that changes values."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spmd
from sharding import ArgumentError, P, shard
from tests.e2e.dropin_case import MESH, X, both, compilations, named, on_mesh
from tests.oracle import assert_close, make_mesh


@both
def test_arrays_that_a_function_closes_over(jit) -> None:
    small, numpy, scalar = jnp.arange(16.0), np.arange(16.0, dtype=np.float32), jnp.float32(2)
    key = jax.random.key(3)

    def f(x):
        return (x + small + numpy) * scalar + jax.random.normal(key, x.shape)

    want = (X + 2 * small) * 2 + jax.random.normal(key, X.shape)
    function = jit(f, in_shardings=named("data"))
    for _ in range(2):
        assert_close(function(X), want, 1e-5, "constants")
    assert_close(function.lower(X).compile()(X), want, 1e-5, "ahead of time")
    assert_close(jax.grad(lambda x: function(x).sum())(X), 2 + 0 * X, 1e-6, "grad")


def test_large_arrays_that_a_function_closes_over_are_arguments() -> None:
    w = jax.random.normal(jax.random.key(0), (512, 512))
    sharded = jax.device_put(w, named(None, "tensor"))
    x = jax.random.normal(jax.random.key(1), (16, 512))
    for weight in (w, sharded, np.asarray(w)):
        function = on_mesh(lambda x, w=weight: x @ w, in_shardings=P("data"))
        lowered = function.lower(x)
        assert len(lowered.as_text()) < 20_000, "no constant of 262,144 elements"
        for _ in range(2):
            assert_close(function(x), x @ w, 1e-4, "closed over")
        assert_close(lowered.compile()(x), x @ w, 1e-4, "ahead of time")
    # One that lies on the mesh stays where it lies, and says how to shard the program.
    partitioned = on_mesh(lambda x: x @ sharded).trace(x).propagate().partition()
    assert partitioned.collectives == () and partitioned.out_shardings.spec == P(None, "tensor")
    gradient = jax.grad(lambda x: on_mesh(lambda x: x @ sharded)(x).sum())(x)
    assert_close(gradient, jnp.broadcast_to(w.sum(1), x.shape), 1e-4, "gradient")


@both
def test_functions_that_close_over_traced_values(jit) -> None:
    def scaled(scale):
        return jit(lambda x: (x * scale).sum())(X)

    assert_close(jax.grad(scaled)(2.0), X.sum(), 1e-5, "grad")
    assert_close(jax.jit(scaled)(2.0), 2 * X.sum(), 1e-5, "jit")
    assert_close(jax.vmap(scaled)(jnp.arange(3.0)), jnp.arange(3.0) * X.sum(), 1e-5, "vmap")

    def body(carry, scale):
        return carry + jit(lambda x: (x * scale).sum())(X), None

    total, _ = jax.lax.scan(body, 0.0, jnp.arange(4.0))
    assert_close(total, 6 * X.sum(), 1e-5, "scan")
    outer = jit(lambda s: jit(lambda x: x * s)(X))
    assert_close(outer(3.0), 3 * X, 1e-6, "nested")


@both
def test_nested_and_inlined_functions(jit) -> None:
    inner = jit(lambda x, n: x * n, static_argnums=1, inline=True)

    @jit
    def outer(x):
        y = jax.lax.fori_loop(0, 3, lambda i, y: inner(y, 2), x)
        return jax.lax.cond(y.sum() > 0, lambda y: inner(y, 3), lambda y: y, y)

    assert_close(outer(X), 24 * X, 1e-5, "nested")
    assert_close(jax.jit(outer)(X), 24 * X, 1e-5, "in jax.jit")
    assert_close(jit(jax.jit(lambda x: inner(x, 5)))(X), 5 * X, 1e-6, "jax.jit in it")
    assert_close(jax.checkpoint(inner, static_argnums=1)(X, 2), 2 * X, 0, "remat")


def test_a_nested_function_has_its_own_axis_rules_and_shardings() -> None:
    rules = [("batch", "tensor"), ("width", None)]
    inner = on_mesh(lambda x: shard(x * 2, "batch", "width"), axis_rules=rules)
    outer = on_mesh(
        lambda x: inner(shard(x, "batch")), axis_rules=[("batch", "data"), ("width", "data")]
    )
    assert outer(X).sharding == named("tensor")
    constrained = on_mesh(lambda x: x + 1, in_shardings=P(None, "tensor"))
    propagated = on_mesh(lambda x: constrained(x)).trace(X).propagate()
    assert propagated.out_shardings == named(None, "tensor")


@both
def test_values_at_compile_time_and_eager_values(jit) -> None:
    inner = jit(lambda x: x.sum())

    def f(x):
        with jax.ensure_compile_time_eval():
            n = int(inner(jnp.ones(4)))
        return x * n

    assert_close(jit(f)(X), 4 * X, 0, "inside")
    assert_close(jax.jit(f)(X), 4 * X, 0, "inside of jax.jit")


@both
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_random_keys_are_arguments_and_results(jit, impl) -> None:
    keys = jax.random.split(jax.random.key(0, impl=impl), 8)

    def f(keys, one):
        a, b = jax.random.split(one)
        return jax.vmap(lambda k: jax.random.fold_in(k, 1))(keys), jax.random.bits(a, (4,)), b

    want = f(keys, keys[0])
    placed = jax.device_put(keys, named("data"))
    for options in ({}, dict(in_shardings=(named("data"), named()))):
        function = jit(f, **options)
        for argument in (keys, placed, placed):
            got = function(argument, jax.device_put(keys[0], named()))
            for a, b in zip(got, want, strict=True):
                assert_close(a, b, 0, "keys")
    assert got[0].dtype == keys.dtype and got[0].sharding.is_equivalent_to(named("data"), 1)
    assert function.lower(keys, keys[0]).compile().out_info[0].dtype == keys.dtype


@both
def test_random_values_follow_the_configuration_and_not_the_mesh(jit) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        draws = {}
        for partitionable in (True, False):
            with jax.threefry_partitionable(partitionable):
                key = jax.random.key(1)
                want = jax.random.normal(key, (8, 16))
                function = jit(lambda key: jax.random.normal(key, (8, 16)))
                draws[partitionable] = function(key)
                assert_close(draws[partitionable], want, 1e-6, f"{partitionable}")
    assert not np.allclose(draws[True], draws[False])


NARROW = [
    jnp.int4, jnp.uint4, jnp.int2, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.bfloat16, jnp.float16,
    jnp.int8, jnp.uint8, jnp.bool_, jnp.complex64, jnp.float4_e2m1fn,
]  # fmt: skip


@both
@pytest.mark.parametrize("dtype", NARROW, ids=[np.dtype(d).name for d in NARROW])
def test_narrow_dtypes(jit, dtype) -> None:
    x = (jnp.arange(16).reshape(8, 2) % 2).astype(dtype)

    def f(x):
        return x.T, x.astype(jnp.float32) if dtype is not jnp.complex64 else x

    function = jit(f, in_shardings=named("data"))
    for _ in range(2):
        turned, wide = function(x)
        assert turned.dtype == dtype
        assert_close(wide, f(x)[1], 0, "converted")
        assert_close(turned.astype(wide.dtype), f(x)[0].astype(wide.dtype), 0, "transposed")


@both
def test_float0_cotangents_of_integers(jit) -> None:
    function = jit(lambda x, n: (x * n).sum())
    gradient = jax.grad(function, argnums=1, allow_int=True)(X, jnp.arange(16))
    assert gradient.dtype == jax.dtypes.float0
    _, tangent = jax.jvp(
        jit(lambda x, n: (x * 2, n)), (X, 3), (X, np.zeros((), jax.dtypes.float0))
    )
    assert tangent[1].dtype == jax.dtypes.float0
    zero = np.zeros((8,), jax.dtypes.float0)
    assert jit(lambda z: 1)(zero) == 1


@both
def test_wide_types_in_a_context(jit) -> None:
    function = jit(lambda x: x * np.pi)
    with jax.enable_x64(True):
        wide = jnp.arange(8, dtype=jnp.float64)
        for x in (wide, np.arange(8.0), jax.device_put(wide, named("data"))):
            assert function(x).dtype == jnp.float64
        assert jit(lambda n: n + 1)(2**40) == 2**40 + 1
        compiled = function.lower(wide).compile()
        assert compiled(wide).dtype == jnp.float64
    assert function(np.arange(8.0)).dtype == jnp.float32
    inner = jit(lambda x: jax.enable_x64(True)(lambda: x.astype(jnp.float64).sum())())
    assert inner(X).dtype in (jnp.float64, jnp.float32)


@both
def test_refs_are_made_inside(jit) -> None:
    def pure(x):
        ref = jax.new_ref(jnp.zeros(()))

        def body(i, _):
            ref[...] += x[i].sum()

        jax.lax.fori_loop(0, 8, body, None)
        return ref[...]

    assert_close(jit(pure)(X), X.sum(), 1e-5, "made inside")


@both
def test_refs_are_arguments(jit) -> None:
    total = jax.new_ref(jax.device_put(jnp.zeros(16), named()))

    @jit
    def accumulate(ref, x):
        ref[...] += x.sum(0)
        return ref[...] * 2

    for step in (1, 2, 3):
        got = accumulate(total, X)
        assert_close(total[...], step * X.sum(0), 1e-5, "written")
        assert_close(got, 2 * step * X.sum(0), 1e-5, "read")


def test_refs_that_a_function_closes_over_are_an_error() -> None:
    count = jax.new_ref(jnp.zeros(()))

    def counted(x):
        count[...] += 1
        return x

    with pytest.raises(ArgumentError, match="mutable arrays .* from outside"):
        on_mesh(counted)(X)


def test_matmul_precision_is_that_of_each_operation() -> None:
    def f(x):
        with jax.default_matmul_precision("bfloat16"):
            y = x @ x.T
        with jax.default_matmul_precision("float32"):
            return y @ x

    def precisions(jit):
        return sorted(
            line.split("precision = [")[1].split("]")[0]
            for line in jit(f).lower(X).as_text().splitlines() if "precision = [" in line
        )  # fmt: skip

    assert precisions(on_mesh) == precisions(jax.jit) != []
    with jax.default_matmul_precision("float32"):
        plain = lambda x: x @ x.T  # noqa: E731
        assert "HIGHEST" in on_mesh(plain).lower(X).as_text()
    assert "HIGHEST" not in on_mesh(plain).lower(X).as_text()


@both
def test_promotion_and_ranks_follow_the_configuration(jit) -> None:
    function = jit(lambda x, n: x + n)
    ints = jnp.arange(16)
    function(X, ints)
    for context in (jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise")):
        with context, pytest.raises((TypeError, ValueError), match="promot"):
            function(X, ints)
    assert_close(function(X, ints), X + ints, 1e-6, "as before")


@both
def test_nans_are_found_operation_by_operation(jit) -> None:
    def f(x):
        y = x * 2
        return jnp.log(y) + 1

    function = jit(f, in_shardings=named("data"), donate_argnums=0)
    assert jnp.isnan(function(-X)).any()
    with jax.debug_nans(True):
        assert_close(function(X + 1), jnp.log(2 * (X + 1)) + 1, 1e-5, "fine")
        for _ in range(2):
            with pytest.raises(FloatingPointError, match=r"nan.*(log|jit)") as error:
                function(-X - 1)
        assert any(entry.name == "f" for entry in error.traceback)
    with jax.debug_infs(True), pytest.raises(FloatingPointError, match="inf"):
        jit(lambda x: 1 / x)(jnp.zeros(8))


def test_nans_of_donated_arguments_are_found() -> None:
    """Also where the function has run, and donated, before."""
    function = on_mesh(lambda x: jnp.log(x * 2), donate_argnums=0)
    put = lambda x: jax.device_put(x, named("data"))  # noqa: E731
    for _ in range(2):
        function(put(X + 1))
    for context, values in ((jax.debug_nans, -X - 1), (jax.debug_infs, X * 0)):
        with context(True):
            for _ in range(2):
                with pytest.raises(FloatingPointError, match="encountered in log"):
                    function(put(values))
            x = put(X + 1)
            function(x)
            assert not x.is_deleted()
    x = put(X + 1)
    function(x)
    assert x.is_deleted()


@both
def test_compilation_can_be_turned_off(jit) -> None:
    seen = []

    def f(x):
        seen.append(isinstance(x, jax.core.Tracer))
        x = jax.lax.with_sharding_constraint(shard(x, "data"), named("data"))
        return x + 1 if x.sum() > 0 else x

    with jax.disable_jit():
        assert_close(jit(f, in_shardings=named("data"))(X), X + 1, 0, "eager")
        assert_close(jax.grad(lambda x: jit(f)(x).sum())(X), X * 0 + 1, 0, "grad")
    assert seen == [False, True]


@both
def test_transfers_can_be_guarded(jit) -> None:
    function = jit(lambda x, s: x * s, in_shardings=(named("data"), named()))
    x, two = jax.device_put(X, named("data")), jax.device_put(2.0, named())
    function(X, 2.0)
    with jax.transfer_guard("disallow"):
        for _ in range(2):
            function(x, two)
        for args in ((np.asarray(X), two), (x, 2.0), (X, two)):
            for _ in range(2):
                with pytest.raises(Exception, match="[Dd]isallowed"):
                    function(*args)


@both
def test_nothing_is_executed_where_that_is_forbidden(jit) -> None:
    function = jit(lambda x: x * 2, in_shardings=named("data"))
    function(X)
    with jax._src.config.no_execution(True), pytest.raises(Exception, match="no_execution"):
        function(X)


def test_a_gradient_under_each_wrapper_is_the_same() -> None:
    w = jax.random.normal(jax.random.key(0), (16, 16)) / 4

    def loss(w, x):
        return (jnp.tanh(x @ w) ** 2).sum()

    function = on_mesh(loss, in_shardings=(None, P("data")))
    want, direction = jax.grad(loss)(w, X), jnp.ones_like(w)
    with compilations("jit(loss)") as count:
        for _ in range(2):
            assert_close(jax.grad(function)(w, X), want, 1e-5, "eager")
    first = count[0]
    assert first <= 4
    for transformed in (
        jax.jit(jax.grad(function)), jax.grad(jax.jit(function)), on_mesh(jax.grad(function)),
        jax.grad(on_mesh(function)), jax.grad(jax.checkpoint(function)),
        lambda w, x: jax.vjp(function, w, x)[1](1.0)[0],
        lambda w, x: jax.linear_transpose(jax.linearize(lambda w: function(w, x), w)[1], w)(1.0)[0],
    ):
        assert_close(transformed(w, X), want, 1e-5, "transformed")
    product = jax.jvp(lambda w: jax.grad(function)(w, X), (w,), (direction,))[1]
    expected = jax.jvp(lambda w: jax.grad(loss)(w, X), (w,), (direction,))[1]
    assert_close(product, expected, 1e-4, "Hessian-vector product")
    batched = jax.vmap(function, in_axes=(None, 0))(w, jnp.stack([X, X + 1]))
    assert_close(batched, jax.vmap(loss, in_axes=(None, 0))(w, jnp.stack([X, X + 1])), 1e-5, "vmap")


def test_a_program_inside_of_a_program_of_another_mesh() -> None:
    inner = spmd.jit(lambda x: x * 2, mesh=make_mesh(data=2), in_shardings=P("data"))
    assert_close(on_mesh(lambda x: inner(x) + 1)(X), 2 * X + 1, 0, "the outer mesh counts")
    with jax.set_mesh(MESH):
        function = spmd.jit(lambda x: shard(x, "data") + 1)
        assert_close(jax.jit(lambda x: function(x))(X), X + 1, 0, "in jax.jit, mesh of the context")
        assert_close(jax.grad(lambda x: function(x).sum())(X), X * 0 + 1, 0, "grad")


def test_a_call_inside_of_a_program_of_explicit_axes() -> None:
    mesh = jax.make_mesh((2, 4), ("data", "tensor"))
    x = jax.device_put(X, jax.sharding.NamedSharding(mesh, P("data")))
    function = spmd.jit(lambda x: jnp.sin(x) * 2, mesh=mesh)
    typed = spmd.jit(lambda x: jnp.sin(jax.sharding.reshard(x, P("data"))) * 2, mesh=mesh)
    assert_close(jax.jit(lambda x: function(x) + x)(x), jnp.sin(X) * 2 + X, 1e-5, "jax.jit")
    assert_close(jax.vmap(function)(x), jnp.sin(X) * 2, 1e-5, "vmap")
    with jax.set_mesh(mesh):
        for f in (function, typed):
            got = jax.jit(lambda x, f=f: f(x) + x)(x)
            assert got.sharding.is_equivalent_to(x.sharding, 2)
            assert_close(got, jnp.sin(X) * 2 + X, 1e-5, "context")
            assert_close(jax.grad(lambda x, f=f: f(x).sum())(x), 2 * jnp.cos(X), 1e-5, "grad")
            assert_close(spmd.jit(lambda x, f=f: f(x) + x)(x), jnp.sin(X) * 2 + X, 1e-5, "nested")
