"""Custom kernels under rules of the user's: Pallas, foreign functions, custom_partitioning."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import sharding
import spmd
from sharding import RuleError, _jax
from tests.oracle import check, kinds, make_mesh


def mesh() -> Any:
    return make_mesh(x=2, y=4)


@functools.cache
def arr(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def moved(fun: Callable, args: list, ins: Any, tolerance: float = 1e-5) -> dict[Any, float]:
    """Checks values; (kind of collective, axes) -> bytes."""
    partitioned = check(fun, args, mesh(), ins, tolerance=tolerance)
    return {key: bytes for key, (_, bytes) in kinds(partitioned).items()}


def _matmul_kernel(x: Any, w: Any, out: Any) -> None:
    out[...] = x[...] @ w[...]


def pallas_matmul(x: Any, w: Any) -> Any:
    """A grid over blocks of 4 rows."""
    (m, k), n = x.shape, w.shape[1]
    return pl.pallas_call(
        _matmul_kernel,
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        grid=(pl.cdiv(m, 4),),
        in_specs=[pl.BlockSpec((4, k), lambda i: (i, 0)), pl.BlockSpec((k, n), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((4, n), lambda i: (i, 0)),
        interpret=True,
    )(x, w)


ruled = sharding.rule("m k, k n -> m n")(pallas_matmul)


@jax.custom_vjp
def _differentiable(x: Any, w: Any) -> Any:
    return pallas_matmul(x, w)


_differentiable.defvjp(
    lambda x, w: (pallas_matmul(x, w), (x, w)),
    lambda kept, g: (pallas_matmul(g, kept[1].T), pallas_matmul(kept[0].T, g)),
)
differentiable = sharding.rule("m k, k n -> m n")(_differentiable)

X, W = arr(16, 8), arr(8, 12)


def test_a_kernel_without_a_rule_is_named_with_the_fix() -> None:
    function = spmd.jit(pallas_matmul, mesh=mesh(), in_shardings=(P("x"), None))
    with pytest.raises(RuleError) as caught:
        function(X, W)
    assert "primitive 'pallas_call' '_matmul_kernel' at e2e/test_kernels.py" in str(caught.value)
    assert '@sharding.rule("a b, c d -> e f")' in str(caught.value)

    def foreign(x: Any) -> Any:
        return jax.ffi.ffi_call("lapack_spotrf_ffi", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    with pytest.raises(RuleError, match="'ffi_call' 'lapack_spotrf_ffi' at"):
        spmd.jit(foreign, mesh=mesh()).trace(X)


def test_rows_pass_and_what_is_contracted_is_reduced() -> None:
    assert moved(lambda x, w: ruled(x, w), [X, W], (P(("x", "y")), None)) == {}
    reduced = moved(lambda x, w: ruled(x, w), [X, W], (P("x", "y"), P("y")))
    assert reduced == {("all_reduce", ("y",)): 2 * 3 / 4 * 8 * 12 * 4}
    with pytest.warns(match="does not divide"):
        moved(lambda x, w: ruled(x, w), [X[:13], W], (P("x", "y"), P("y")))


def test_contracted_dims_that_do_not_divide_are_whole() -> None:
    """What padding adds to a sum is not known."""
    add = sharding.rule("a b -> a")(lambda x: jnp.exp(x).sum(1))
    x = arr(8, 6)
    text = moved(lambda x: add(x), [x], (P("x", None),))
    assert text == {}
    fun = lambda x: add(jnp.pad(x, ((0, 0), (0, 1)))[:, :6])  # noqa: E731
    partitioned = check(fun, [x], mesh(), (P(None, "x"),))
    assert ("all_reduce", ("x",)) in kinds(partitioned)
    sharded = lambda x: add(lax.with_sharding_constraint(x, NamedSharding(mesh(), P(None, "y"))))  # noqa: E731
    assert ("all_reduce", ("y",)) not in kinds(check(sharded, [x], mesh(), (P(),)))


@pytest.mark.parametrize("monoid", ["max", "min", "mul"])
def test_other_monoids(monoid: str) -> None:
    reduce = {"max": jnp.max, "min": jnp.min, "mul": jnp.prod}[monoid]
    fun = sharding.rule("a b -> a", reduce=monoid)(lambda x: reduce(x, axis=1))
    assert moved(lambda x: fun(x), [arr(8, 8)], (P(None, "y"),))
    grad = jax.grad(lambda x: fun(x).sum())
    with pytest.raises(RuleError, match=f"is differentiated, and reduces by {monoid}"):
        spmd.jit(grad, mesh=mesh())(arr(8, 8))


@pytest.mark.parametrize("order", ["inside", "outside"])
def test_gradients(order: str) -> None:
    """custom_vjp inside of the rule, and around two functions that have one."""
    if order == "inside":
        fun = differentiable
    else:
        fun = jax.custom_vjp(lambda x, w: ruled(x, w))
        fun.defvjp(
            lambda x, w: (ruled(x, w), (x, w)),
            lambda kept, g: (ruled(g, kept[1].T), ruled(kept[0].T, g)),
        )
    grads = lambda x, w: jax.grad(lambda *a: (fun(*a) ** 2).sum(), (0, 1))(x, w)  # noqa: E731
    assert moved(grads, [X, W], (P("x"), None)) == {("all_reduce", ("x",)): 8 * 12 * 4}
    assert moved(grads, [X, W], (None, P(None, "y"))) == {
        ("all_reduce", ("y",)): 2 * 3 / 4 * 16 * 8 * 4
    }


def test_padding_does_not_reach_the_gradient_of_what_shards_share() -> None:
    fun = lambda x, w: (jnp.cos(ruled(jnp.cos(x), w)) ** 2).sum()  # noqa: E731
    ruled = sharding.rule("m k, k n -> m n")(lambda x, w: x @ w)
    grads = lambda x, w: jax.grad(fun, (0, 1))(x, w)  # noqa: E731
    with pytest.warns(match="does not divide"):
        moved(grads, [arr(1023, 8), W], (P(("x", "y")), None), 1e-4)


def test_names_of_results_only_are_whole() -> None:
    table = sharding.rule("a -> a b")(lambda x: x[:, None] ** jnp.arange(8))
    partitioned = spmd.jit(
        lambda x: table(x), mesh=mesh(), in_shardings=P("x"), out_shardings=P("x", "y")
    )
    np.testing.assert_allclose(partitioned(arr(8)), arr(8)[:, None] ** np.arange(8), rtol=1e-5)


def test_vmap_and_its_gradients() -> None:
    x = arr(6, 16, 8)
    batched = jax.vmap(differentiable, (0, None))
    assert moved(lambda x, w: batched(x, w), [x, W], (P("x", "y"), None)) == {}
    both = lambda x, w: jax.grad(lambda *a: (batched(*a) ** 2).sum(), (0, 1))(x, w)  # noqa: E731
    assert {k for k, _ in moved(both, [x, W], (P("x", "y"), None))} == {"all_reduce"}


@sharding.rule("b q d, b k d, b k v, b q k -> b q v", fixed="k")
def attend(q: Any, k: Any, v: Any, bias: Any, *, scale: float = 1.0) -> Any:
    return jax.nn.softmax(scale * jnp.einsum("bqd,bkd->bqk", q, k) + bias) @ v


@pytest.mark.parametrize("bias", [(4, 8, 6), (1, 8, 6), (4, 1, 6)])
def test_fixed_names_and_dims_of_size_1(bias: tuple[int, ...]) -> None:
    """A shared dim of size 1 is broadcast, and its gradient summed over what it is shared by."""
    args = [arr(4, 8, 8), arr(4, 6, 8), arr(4, 6, 8), arr(*bias)]
    ins = (P("x", "y"), P("x"), P("x"), None)
    assert moved(lambda *a: attend(*a, scale=0.5), args, ins) == {}

    def grads(*args: Any) -> Any:
        return jax.grad(lambda *a: (attend(*a, scale=0.5) ** 2).sum(), (0, 1, 2, 3))(*args)

    assert {kind for kind, _ in moved(grads, args, ins)} == {"all_reduce"}


def test_all_other_transformations() -> None:
    multiply = sharding.rule("b m k, b k n -> b m n")(lambda x, w: x @ w)
    x, w = arr(2, 4, 4), arr(2, 4, 6)
    ins = (P("x"), P("x"))
    moved(lambda x, w: jax.jvp(multiply, (x, w), (w[..., :4] * x, w)), [x, w], ins)
    moved(lambda x, w: jax.jacfwd(lambda x: multiply(x, w))(x), [x, w], ins)
    moved(lambda x, w: jax.hessian(lambda x: (multiply(x, w) ** 3).sum())(x), [x, w], ins, 1e-4)

    def looped(x: Any, w: Any) -> Any:
        square = w[..., :4]
        step = jax.checkpoint(lambda c, _: (multiply(c, square), None))
        return lax.scan(step, x, length=3)[0].sum()

    moved(lambda x, w: jax.grad(looped, (0, 1))(x, w), [x, w], ins, 1e-4)

    def transposed_after_vmap(x: Any, w: Any) -> Any:
        linear = jax.linearize(multiply, x, w)[1]
        return jax.grad(lambda t: jax.vmap(linear, (0, None))(t, w).sum())(jnp.stack([x, 2 * x]))

    moved(transposed_after_vmap, [x, w], ins)


def test_merged_dims_trees_and_static_arguments() -> None:
    @sharding.rule("b (h d), h -> b h d, b")
    def split(tree: dict, weights: Any, *, names: tuple, power: int) -> Any:
        assert names == ("a", "b")
        x = tree["x"].reshape(tree["x"].shape[0], weights.shape[0], -1)
        return {"out": x**power * weights[:, None]}, tree["x"][:, 0]

    fun = lambda x, w: split({"x": x}, w, names=("a", "b"), power=3)  # noqa: E731
    x, w = arr(8, 12), arr(4)
    assert moved(fun, [x, w], (P("x"), None)) == {}
    # The second result lacks h, so h is whole, for gradients too.
    assert {k for k, _ in moved(fun, [x, w], (P(None, "y"), P("y")))} == {"all_gather"}
    grad = jax.grad(lambda x, w: (fun(x, w)[1] ** 2).sum())
    moved(lambda x, w: grad(x, w), [x, w], (P(None, "y"), P("y")))


def test_a_kernel_of_pallas_ops() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from JAX 0.12 on
        from jax.experimental.pallas.ops.gpu import attention
    size = attention.BlockSizes(16, 16, 16, 16, 16, 16)
    mha = functools.partial(
        attention.mha, segment_ids=None, interpret=True, block_sizes=size, causal=True
    )
    fun = sharding.rule("b q h d, b k h d, b k h d -> b q h d", fixed="q k d")(mha)
    args = [arr(2, 16, 4, 16), arr(2, 16, 4, 16) + 1, arr(2, 16, 4, 16) - 1]
    both = lambda *a: jax.vjp(fun, *a)[1](fun(*a))  # noqa: E731
    assert moved(both, args, (P("x", None, "y"),) * 3, 1e-4) == {}


def test_a_foreign_function() -> None:
    jnp.linalg.cholesky(jnp.eye(2))  # loads LAPACK

    @sharding.rule("b n m -> b n", fixed="n m")
    def diagonal(x: Any) -> Any:
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        info = jax.ShapeDtypeStruct(x.shape[:-2], jnp.int32)
        call = jax.ffi.ffi_call("lapack_spotrf_ffi", (like, info), vmap_method="broadcast_all")
        return jnp.diagonal(call(x, uplo=np.uint8(ord("L")))[0], axis1=-2, axis2=-1)

    x = arr(6, 4, 4) @ arr(6, 4, 4).swapaxes(1, 2) + 4 * np.eye(4, dtype=np.float32)
    assert moved(lambda x: diagonal(x), [x], (P("x"),)) == {}
    fun = lambda x: jax.vmap(diagonal, 1)(x)  # noqa: E731
    assert moved(fun, [x.reshape(2, 3, 4, 4)], (P("x"),)) == {}


def test_primitives() -> None:
    """By the same text as functions. Uneven sums, and names of some results only, are whole."""
    pair_p = Primitive("pair")
    pair_p.multiple_results = True
    fun = lambda x: [x * 2, x.sum(1)]  # noqa: E731
    pair_p.def_impl(fun)
    pair_p.def_abstract_eval(lambda x: [x, x.update(shape=x.shape[:1])])
    mlir.register_lowering(pair_p, mlir.lower_fun(fun, multiple_results=True))
    assert sharding.rule("a b -> a b, a")(pair_p) is pair_p
    assert moved(lambda x: pair_p.bind(x), [arr(8, 8)], (P("x"),)) == {}
    assert moved(lambda x: pair_p.bind(x), [arr(8, 8)], (P("x", "y"),))


# custom_partitioning


def _custom(rule: Any, partition: Callable | None = None, **options: Any) -> Any:
    @custom_partitioning
    def multiply(x: Any, w: Any) -> Any:
        return x @ w

    def per_shard(mesh: Any, args: Any, result: Any) -> Any:
        spec = tuple(args[0].sharding.spec)
        axes = spec[1] if len(spec) > 1 else None
        lower = lambda x, w: lax.psum(x @ w, axes) if axes else x @ w  # noqa: E731
        return mesh, lower, result.sharding, tuple(a.sharding for a in args)

    multiply.def_partition(partition or per_shard, sharding_rule=rule, **options)
    return multiply


def test_custom_partitioning_by_its_own_rule() -> None:
    multiply = _custom("m k, k n -> m n", reduction_factors=("k",))
    fun = lambda x, w: multiply(x, w)  # noqa: E731
    assert moved(fun, [X, W], (P("x"), P(None, "y"))) == {}
    assert moved(fun, [X, W], P()) == {}
    assert moved(fun, [X, W], (P("x", "y"), P("y"))) == {("all_reduce", ("y",)): 576.0}
    with pytest.warns(match="does not divide"):
        moved(fun, [X[:15], W], (P("x", "y"), P("y")))
    whole = _custom("m k, k n -> m n", need_replication_factors=("k",))
    gathered = moved(lambda x, w: whole(x, w), [X, W], (P("x", "y"), None))
    assert {kind for kind, _ in gathered} == {"all_gather"}


def test_custom_partitioning_by_a_callable_and_with_static_arguments() -> None:
    called = lambda mesh, ins, outs: ("m k, k n -> m n", {"reduction_factors": ("k",)})  # noqa: E731
    multiply = _custom(called)
    reduced = moved(lambda x, w: multiply(x, w), [X, W], (P("x", "y"), P("y")))
    assert reduced == {("all_reduce", ("y",)): 576.0}

    @functools.partial(custom_partitioning, static_argnums=(1,))
    def scaled(x: Any, scale: float) -> Any:
        return jnp.sin(x) * scale, x.sum(-1)

    def per_shard(scale: float, mesh: Any, args: Any, results: Any) -> Any:
        lower = lambda x: (jnp.sin(x) * scale, x.sum(-1))  # noqa: E731
        return mesh, lower, tuple(r.sharding for r in results), tuple(a.sharding for a in args)

    scaled.def_partition(
        per_shard, sharding_rule="... d -> ... d, ...", need_replication_factors=("d",)
    )
    fun = lambda x: scaled(x, 3.0)  # noqa: E731
    assert moved(fun, [arr(4, 8, 4)], (P("x", "y"),)) == {}
    assert moved(fun, [arr(4, 8, 4)], (P("x", None, "y"),))


def test_custom_partitioning_that_cannot_be_honoured() -> None:
    function = spmd.jit(lambda x, w: _custom(None)(x, w), mesh=mesh(), in_shardings=(P("x"), None))
    with pytest.raises(RuleError, match="without a sharding_rule"):
        function(X, W)

    def refuse(mesh: Any, args: Any, result: Any) -> Any:
        whole = NamedSharding(mesh, P())
        return mesh, lambda x, w: x @ w, whole, (whole, whole)

    refusing = _custom("m k, k n -> m n", refuse)
    function = spmd.jit(lambda x, w: refusing(x, w), mesh=mesh(), in_shardings=(P("x"), None))
    with pytest.raises(RuleError, match="need_replication_factors"):
        function(X, W)


@pytest.mark.parametrize("text, problem", [
    ("a b", "operands and results are told apart"),
    ("a (b -> a", "a dim is a name, 1, or"),
    ("a () -> a", "a dim is a name, 1, or"),
    ("a 2 -> a", "a dim is a name, 1, or"),
    ("a a b -> b a", "the array has 2 dims"),
    ("a, b -> b a", "names 2 operands, of 1"),
    ("a b -> b a, a", "names 2 results, of 1"),
    ("a b -> a b", "one factor has one size"),
    ("1 b -> b 1", "1 stands for dims of size 1"),
    ("(a c) b -> b (a c)", "give every merged name"),
])  # fmt: skip
def test_texts_that_do_not_fit(text: str, problem: str) -> None:
    with pytest.raises(RuleError, match=problem):
        transpose = sharding.rule(text)(lambda x: x.T)
        spmd.jit(lambda x: transpose(x), mesh=mesh()).trace(arr(4, 6)).propagate()


def test_a_result_of_size_1_is_no_sum_unless_it_is_said() -> None:
    mean = sharding.rule("a b -> a b")(lambda x: x.mean(1, keepdims=True))
    with pytest.raises(RuleError, match="write 1 for the result's dim"):
        spmd.jit(lambda x: mean(x), mesh=mesh()).trace(arr(4, 6)).propagate()


def test_arguments_of_rule_that_do_not_fit() -> None:
    with pytest.raises(RuleError, match="there is no such reduction"):
        sharding.rule("a -> a", reduce="mean")
    with pytest.raises(RuleError, match="they are named in fixed="):
        sharding.rule("a -> a", fixed="b")
    with pytest.raises(RuleError, match="rules are for primitives and functions"):
        sharding.rule("a -> a")(3)


def test_scaled_matmul() -> None:
    (scaled_p,) = _jax.cudnn("_scaled_matmul_p_wrapper")

    def lowered(x: Any, w: Any, xs: Any, ws: Any, *, preferred_element_type: Any) -> Any:
        spread = [jnp.repeat(s, 4, axis=-1) for s in (xs, ws)]
        return [jnp.einsum("bmk,bnk->bmn", x * spread[0], w * spread[1])]

    mlir.register_lowering(
        scaled_p, mlir.lower_fun(lowered, multiple_results=True), platform="cpu"
    )
    args = [arr(2, 8, 16), arr(2, 12, 16), arr(2, 8, 4), arr(2, 12, 4)]
    fun = lambda *a: scaled_p.bind(*a, preferred_element_type=jnp.float32)  # noqa: E731
    assert moved(fun, args, (P("x", "y"), P("x"), P("x", "y"), P("x"))) == {}
    ins = (P(None, None, "y"),) * 4
    assert {kind for kind, _ in moved(fun, args, ins)} == {"all_reduce"}
