"""`spmd.jit` as a drop-in for `jax.jit`: stages, caches, donation, transformations, placement."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding

import spmd
from sharding import ArgumentError, P, Priority, ShardingWarning, shard
from tests.oracle import assert_close, check, make_mesh

MESH = make_mesh(data=2, tensor=4)


def params():
    k1, k2 = jax.random.split(jax.random.key(0))
    return {"w1": jax.random.normal(k1, (16, 32)) / 4, "w2": jax.random.normal(k2, (32, 16)) / 4}


X = jax.random.normal(jax.random.key(1), (8, 16))
SPECS = ({"w1": P(None, "tensor"), "w2": P("tensor", None)}, P("data"))


def mlp(params, x):
    return jax.nn.gelu(x @ params["w1"]) @ params["w2"]


def loss(params, x):
    return (mlp(params, x) ** 2).mean()


def test_every_stage_prints_with_its_shardings_and_collectives() -> None:
    traced = spmd.jit(mlp, mesh=MESH, in_shardings=SPECS).trace(params(), X)
    assert "in  params['w1']: f32[16,32] [-, tensor]" in str(traced)
    propagated = traced.propagate()
    assert "out result [data?, ?]" in str(propagated)
    partitioned = propagated.partition()
    assert "all_reduce(tensor)" in str(partitioned) and "test_jit.py" in str(partitioned)
    lowered = partitioned.lower()
    assert "stablehlo.all_reduce" in str(lowered)
    compiled = lowered.compile()
    assert "all-reduce" in compiled.as_text()
    assert_close(compiled(params(), X), mlp(params(), X), 1e-5, "compiled")


def test_inferred_shardings_can_be_read_back() -> None:
    structs = jax.eval_shape(lambda: (params(), X))
    function = spmd.jit(mlp, mesh=MESH, in_shardings=({"w1": P(None, "tensor"), "w2": None}, None))
    compiled = function.trace(*structs).propagate().partition().lower().compile()
    (weights, x) = compiled.in_shardings
    assert weights["w1"] == NamedSharding(MESH, P(None, "tensor"))
    assert weights["w2"] == NamedSharding(MESH, P("tensor"))
    assert x == NamedSharding(MESH, P())
    init = spmd.jit(params, mesh=MESH, out_shardings=weights)()
    assert init["w2"].sharding.spec == P("tensor")
    assert init["w2"].addressable_shards[0].data.shape == (8, 16)
    assert_close(init["w2"], params()["w2"], 0, "bits do not depend on the mesh")


def test_committed_arguments_are_annotations() -> None:
    placed = jax.device_put(params(), jax.tree.map(lambda s: NamedSharding(MESH, s), SPECS[0]))
    function = spmd.jit(mlp, mesh=MESH)
    out = function(placed, jax.device_put(X, NamedSharding(MESH, P("data"))))
    assert out.sharding.spec == P("data")
    # Other placements are other programs; the first is still there.
    other = function(placed, jax.device_put(X, NamedSharding(MESH, P(None, "tensor"))))
    assert function._cache_size() == 2
    assert_close(other, mlp(params(), X), 1e-5, "other placement")
    function(placed, jax.device_put(X, NamedSharding(MESH, P("data"))))
    assert function._cache_size() == 2


def test_flax_metadata_is_an_annotation() -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_logical_partitioning(nn.initializers.normal(), ("embed", "mlp"))
            return x @ self.param("w", init, (16, 32))

    variables = Model().init(jax.random.key(0), X)
    function = spmd.jit(Model().apply, mesh=MESH, axis_rules=[("mlp", "tensor")])
    propagated = function.trace(variables, X).propagate()
    assert propagated.out_shardings.spec == P(None, "tensor")
    partitioned = spmd.jit(
        nn.with_partitioning(nn.initializers.normal(), ("data", "tensor")), mesh=MESH,
        static_argnums=(1,),
    ).trace(jax.random.key(0), (8, 8))  # fmt: skip
    assert partitioned.program is not None


def test_with_sharding_constraint_is_an_annotation() -> None:
    def f(x):
        y = jax.lax.with_sharding_constraint(x * 2, NamedSharding(MESH, P("data")))
        return jax.lax.with_sharding_constraint(
            y + 1, NamedSharding(MESH, P(P.UNCONSTRAINED, "tensor"))
        )

    traced = spmd.jit(f, mesh=MESH).trace(X)
    assert traced.propagate().out_shardings.spec == P("data", "tensor")
    check(f, (X,), MESH)


def test_priorities_decide_who_is_first() -> None:
    def f(x, first, second):
        y = shard(x * 1.0, Priority("tensor", first), P.UNCONSTRAINED)
        z = shard(x * 2.0, P.UNCONSTRAINED, Priority("tensor", second))
        return y + z

    def spec(first: int, second: int):
        function = spmd.jit(f, mesh=MESH, static_argnums=(1, 2))
        return function.trace(X, first, second).propagate().out_shardings.spec

    assert spec(0, 1) == P("tensor")
    assert spec(1, 0) == P(None, "tensor")


def test_annotations_inside_every_transformation() -> None:
    def f(w, x):
        def body(h, _):
            h = shard(jnp.tanh(h @ w), "data", "tensor")
            return h, h.sum()

        h, sums = jax.lax.scan(jax.checkpoint(body), x, None, length=3)
        h = jax.lax.cond(sums[0] > 0, lambda h: shard(h, "data"), lambda h: h * 2, h)
        return (h**2).sum() + sums.sum()

    w = jax.random.normal(jax.random.key(3), (16, 16)) / 4
    check(jax.grad(f), (w, X), MESH)
    check(lambda w, x: jax.jvp(f, (w, x), (w, x)), (w, X), MESH)
    check(jax.vmap(f, in_axes=(None, 0)), (w, jnp.stack([X, X + 1])), MESH)
    hvp = jax.jvp(lambda w: jax.grad(f)(w, X), (w,), (w,))
    check(lambda w: jax.jvp(lambda w: jax.grad(f)(w, X), (w,), (w,)), (w,), MESH)
    assert all(map(jnp.isfinite, map(jnp.sum, hvp)))


def test_shard_is_the_identity_outside() -> None:
    assert_close(shard(X, "data", "anything"), X, 0, "eager")
    assert_close(jax.jit(lambda x: shard(x, "anything"))(X), X, 0, "jax.jit")


def test_transformations_of_a_partitioned_function() -> None:
    function = spmd.jit(loss, mesh=MESH, in_shardings=SPECS)
    want = jax.grad(loss)(params(), X)
    for got in (
        jax.grad(function)(params(), X),
        jax.jit(jax.grad(function))(params(), X),
        jax.grad(jax.jit(function))(params(), X),
        jax.grad(jax.checkpoint(function))(params(), X),
    ):
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-5, "grad"), got, want)
    batch = jnp.stack([X, 2 * X])
    got = jax.vmap(function, in_axes=(None, 0))(params(), batch)
    assert_close(got, jax.vmap(loss, in_axes=(None, 0))(params(), batch), 1e-5, "vmap")
    nested = spmd.jit(lambda p, x: function(p, x) * 2, mesh=MESH)
    assert_close(nested(params(), X), 2 * loss(params(), X), 1e-5, "nested")
    hlo = jax.jit(function).lower(params(), X).compile().as_text()
    assert "all-reduce" in hlo


def test_values_that_a_partitioned_function_closes_over_are_transformed() -> None:
    def scaled(scale, wrap):
        return wrap(lambda x: loss(params(), scale * x))(X)

    def on_mesh(f):
        return spmd.jit(f, mesh=MESH, in_shardings=P("data"))

    want = jax.grad(lambda s: scaled(s, jax.jit))(2.0)
    assert_close(jax.grad(lambda s: scaled(s, on_mesh))(2.0), want, 1e-5, "grad")
    assert_close(jax.jit(jax.grad(lambda s: scaled(s, on_mesh)))(2.0), want, 1e-5, "jit of grad")
    scales = jnp.array([1.0, 2.0])
    want = jax.vmap(lambda s: scaled(s, jax.jit))(scales)
    assert_close(jax.vmap(lambda s: scaled(s, on_mesh))(scales), want, 1e-5, "vmap")


def test_donation_is_kept() -> None:
    function = spmd.jit(
        lambda state, x: (state + x, x.sum()), mesh=MESH, donate_argnums=(0,),
        in_shardings=(P("data"), P("data")),
    )  # fmt: skip
    state = jax.device_put(X, NamedSharding(MESH, P("data")))
    out, _ = function(state, X)
    assert state.is_deleted() and not out.is_deleted()
    compiled = function.lower(X, X).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= X.nbytes // 2


def test_static_keyword_and_weakly_typed_arguments() -> None:
    def f(x, scale, *, power, shift=0.0):
        return x**power * scale + shift

    function = spmd.jit(
        f, mesh=MESH, static_argnames=("power",), in_shardings=(P("data"), None)
    )
    for power in (2, 3):
        want = f(X, 2.0, power=power, shift=1)
        assert_close(function(X, 2.0, power=power, shift=1), want, 1e-6, "static")
    ints = spmd.jit(lambda n, s: n * s, mesh=MESH)(jnp.arange(8), 2)
    assert ints.dtype == jnp.int32


def test_second_calls_neither_trace_nor_partition_again() -> None:
    count = []

    def f(x):
        count.append(1)
        return x * 2

    function = spmd.jit(f, mesh=MESH, in_shardings=P("data"))
    out = function(X)
    for _ in range(3):
        out = function(out)
    function(np.asarray(X))
    assert len(count) == 1
    function(X[:4])
    function(X)
    assert len(count) == 2
    assert function._cache_size() == 2
    jax.clear_caches()
    assert_close(function(X), X * 2, 0, "after clear_caches")


def test_dims_that_do_not_divide_are_named_at_the_boundary() -> None:
    x = jnp.arange(30.0).reshape(6, 5)
    function = spmd.jit(lambda x: jnp.exp(x).sum(0), mesh=MESH, in_shardings=P("tensor"))
    with pytest.warns(ShardingWarning) as warned:
        out = function(x)
    assert str(warned[0].message) == (
        "boundary: x: dim 0 of size 6 does not divide into 4 shards over tensor: held whole at "
        "the boundary (120 B per device), 2 of 8 padded elements per device inside"
    )
    assert_close(out, jnp.exp(x).sum(0), 1e-6, "padding is masked")


def test_results_and_arguments_that_are_the_same_value() -> None:
    function = spmd.jit(
        lambda x: (x, x, x + 1), mesh=MESH, in_shardings=P("data"),
        out_shardings=(P(), P("tensor"), P(None, "tensor")),
    )  # fmt: skip
    out = function(X)
    assert [o.sharding.spec for o in out] == [P(), P("tensor"), P(None, "tensor")]
    for got, want in zip(out, (X, X, X + 1), strict=True):
        assert_close(got, want, 0, "forwarded")


def test_the_ambient_mesh_and_a_decorator() -> None:
    with jax.set_mesh(MESH):
        @spmd.jit
        def f(x):
            return shard(x, "data") + 1

        assert f(X).sharding.spec == P("data")


def test_one_device_needs_no_collectives() -> None:
    partitioned = check(jax.grad(loss), (params(), X), make_mesh(data=1), (None, P("data")))
    assert partitioned.collectives == ()


def test_recomputation_stays_recomputation() -> None:
    """Bound without its original parameters, remat would be merged with the forward pass."""
    def deep(w, x, wrap):
        layer = wrap(lambda x, w: jnp.sin(jnp.sin(x @ w) @ w))
        for _ in range(4):
            x = layer(x, w)
        return (x**2).sum()

    fun = jax.grad(lambda w, x: deep(w, x, jax.checkpoint))
    args = jnp.ones((64, 64)), jnp.ones((512, 64))
    options = {"disable_passes": ["keep_products"]}  # it has barriers of its own
    function = spmd.jit(fun, mesh=MESH, in_shardings=(None, P("data")), **options)
    ours = function.lower(*args).as_text()
    theirs = jax.jit(fun).lower(*args).as_text()
    # What the compiler makes of a barrier is its own affair (XLA on CPU drops them, for both).
    for operation in ("stablehlo.optimization_barrier", "stablehlo.dot_general"):
        assert ours.count(operation) == theirs.count(operation) > 0, operation


def test_weak_types_static_types_and_configuration_make_other_programs() -> None:
    half = jnp.ones(8, jnp.bfloat16)
    for first, second in [(2.0, jnp.float32(2)), (jnp.float32(2), 2.0)]:
        function = spmd.jit(lambda s: s * half, mesh=MESH)
        for argument in (first, second, first):
            assert function(argument).dtype == (argument * half).dtype
    static = spmd.jit(lambda x, s: x * s, mesh=MESH, static_argnums=1)
    ints = jnp.arange(8)
    assert [static(ints, 2).dtype, static(ints, 2.0).dtype] == [jnp.int32, jnp.float32]
    wide = spmd.jit(lambda x: jnp.arange(3.0) + x.sum(), mesh=MESH)
    assert wide(X).dtype == jnp.float32
    with jax.enable_x64(True):
        assert wide(X).dtype == jnp.float64
    assert wide(X).dtype == jnp.float32


def test_concrete_arguments_inside_of_transformations() -> None:
    function = spmd.jit(jnp.sum, mesh=MESH, in_shardings=P("data"))
    assert_close(jax.grad(function)(X), jnp.ones_like(X), 0, "grad of the function itself")
    constant = np.asarray(X)
    assert_close(jax.jit(lambda z: function(constant) + z)(1.0), X.sum() + 1, 1e-5, "constants")
    scale = spmd.jit(lambda x, y: x * y, mesh=MESH)
    assert_close(jax.jit(lambda x: scale(x, 2.0))(X), 2 * X, 0, "scalar inside of jit")
    assert_close(jax.grad(lambda x: scale(x, y=3.0).sum())(X), 3 + 0 * X, 0, "keyword")


def test_partitioning_a_partitioned_function_again_uses_the_new_mesh() -> None:
    small = make_mesh(data=2)
    again = spmd.jit(spmd.jit(lambda x: shard(x * 2, "data"), mesh=MESH), mesh=small)
    assert again(X).sharding.device_set == set(small.devices.flat)


def test_arguments_that_lie_elsewhere_on_the_same_devices() -> None:
    other = make_mesh(a=4, b=2)
    x = jax.device_put(X, NamedSharding(other, P("a", "b")))
    assert_close(spmd.jit(lambda x: x + 1, mesh=MESH)(x), X + 1, 0, "moved")
    function = spmd.jit(lambda x: x + 1, mesh=MESH, in_shardings=P("data"))
    function(X)
    with pytest.raises(ArgumentError) as error:
        function(x)
    assert str(error.value) == (
        "x lies on P('a', 'b'), committed\n"
        "  why: in_shardings says P('data'); moving it silently could cost more than "
        "the program\n"
        "  fix: move it with jax.device_put(x, NamedSharding(mesh, P('data'))), or "
        "leave in_shardings out for it"
    )


def test_a_static_argument_that_cannot_be_hashed() -> None:
    function = spmd.jit(lambda x, s: x, mesh=MESH, static_argnums=1)
    with pytest.raises(ArgumentError) as error:
        function(X, [1])
    assert str(error.value) == (
        "static argument 1 is [1], a list\n"
        "  why: a static argument is part of what a program is compiled for, and must be hashable\n"
        "  fix: pass a tuple, a string, a number or a frozen object, or do not make it static"
    )


def test_methods() -> None:
    class Model:
        scale = 3.0

        @functools.partial(spmd.jit, static_argnums=0)
        def apply(self, x):
            return x * self.scale

    with jax.set_mesh(MESH):
        assert_close(Model().apply(X), 3 * X, 0, "bound")
