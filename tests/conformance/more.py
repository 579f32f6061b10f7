"""Cases for primitives that JAX's harnesses leave out: (primitive-what, function, arrays)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.shard_alike import shard_alike

from sharding import _jax

CASES: list[tuple[str, Callable, tuple[Any, ...]]] = []

_RNG = np.random.RandomState(1)


def case(name: str, fun: Callable, *args: Any) -> None:
    CASES.append((name, fun, args))


def real(*shape: int, low: float = -2.0, high: float = 2.0) -> np.ndarray:
    return _RNG.uniform(low, high, shape).astype(np.float32)


def whole(*shape: int, low: int = -9, high: int = 10, dtype: Any = np.int32) -> np.ndarray:
    return _RNG.randint(low, high, shape).astype(dtype)


def bits(*shape: int) -> np.ndarray:
    return _RNG.randint(0, 1 << 32, shape, np.uint32)


def exported(x: Any) -> Any:
    """Calls a program that was exported for arrays like this; it is made when it is traced, since
    that starts JAX's backend."""
    aval = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.export.export(jax.jit(lambda x: jnp.cumsum(x, 1).T))(aval).call(x)


def data(fun: Callable) -> Callable:
    """A function of random keys as one of their integers, with integers as its result."""
    return lambda x, *args: jax.random.key_data(fun(jax.random.wrap_key_data(x), *args))


# pointwise
case("square-float32", lax.square, real(8, 6))
case("exp2-float32", lax.exp2, real(8, 6))
case("not-int32", lax.bitwise_not, whole(8, 6))
case("clz-uint32", lax.clz, bits(8, 6))
case("copy-float32", jnp.copy, real(8, 6))
case("polygamma-float32", lax.polygamma, np.float32(2) + 0 * real(8, 6), real(8, 6, low=0.5))
case("zeta-float32", lax.zeta, real(8, 6, low=2, high=5), real(8, 6, low=0.5))
case("igamma_grad_a-float32", lax.igamma_grad_a, real(8, 6, low=0.5), real(8, 6, low=0.5))
case("name-float32", lambda x: checkpoint_name(x, "x"), real(8, 6))
case("threefry2x32-arrays", _jax.primitives.threefry2x32_p.bind, bits(8, 6), bits(8, 6),
     bits(8, 6), bits(8, 6))  # fmt: skip

# shape and data flow
for sizes in ((4, 4), (3, 5), (1, 7)):
    text = "_".join(map(str, sizes))
    case(f"split-{text}", partial(lax.split, sizes=sizes, axis=0), real(8, 6))
for n in (8, 3):
    case(f"stack-{n}", lambda x, y: _jax.stack_p.bind(x, y, axis=1), real(n, 6), real(n, 6))
    case(f"unstack-{n}", lambda x: _jax.unstack_p.bind(x, axis=1), real(n, 4))
    case(f"tile-{n}", lambda x: _jax.tile_p.bind(x, reps=(1, 2)), real(n, 6))
    case(f"optimization_barrier-{n}", lambda x, y: lax.optimization_barrier((x, y)), real(n, 4),
         whole(n))  # fmt: skip

# reductions and indexing
case("reduce_xor-int32", lambda x: lax.reduce(x, np.int32(0), lax.bitwise_xor, (0,)), whole(8, 6))
case("reduce_xor-uneven", lambda x: lax.reduce(x, np.int32(0), lax.bitwise_xor, (1,)), whole(8, 7))
case("scatter_sub-rows", lambda x, i, u: x.at[i].subtract(u), real(8, 6),
     whole(5, low=0, high=8), real(5, 6))  # fmt: skip
case("dot_general-batch", partial(jnp.einsum, "bij,bjk->bik"), real(4, 6, 8), real(4, 8, 12))
case("dynamic_slice-starts", lambda x, i: lax.dynamic_slice(x, (i, 0, 0), (3, 6, 4)),
     real(8, 6, 4), np.int32(2))  # fmt: skip
case("dynamic_update_slice-starts", lambda x, u, i: lax.dynamic_update_slice(x, u, (i, 0)),
     real(8, 6), real(3, 6), np.int32(7))  # fmt: skip
case("ragged_dot_general-rows", lax.ragged_dot, real(12, 8), real(3, 8, 6),
     np.array([5, 0, 7], np.int32))  # fmt: skip

# linear algebra
_SYMMETRIC = np.einsum("bij,bkj->bik", *[real(4, 6, 6)] * 2)
case("householder_product-batch", lax.linalg.householder_product, real(4, 6, 3), real(4, 3))
case("hessenberg-batch", lax.linalg.hessenberg, real(4, 6, 6))
case("tridiagonal-batch", lambda x: lax.linalg.tridiagonal(x + x.mT), real(4, 6, 6))
case("schur-batch", lax.linalg.schur, real(4, 6, 6))
case("lu_pivots_to_permutation-batch", partial(lax.linalg.lu_pivots_to_permutation,
     permutation_size=6), whole(8, 3, low=3, high=6))  # fmt: skip
case("symmetric_product-square", lax.linalg.symmetric_product, real(8, 6), real(8, 8))
case("cholesky_update-square", lambda r, w: lax.linalg.cholesky_update(
    jnp.triu(r) + 4 * jnp.eye(6, dtype=r.dtype), w), real(6, 6), real(6))  # fmt: skip

case("eigh-batch", lambda x: lax.linalg.eigh(x, symmetrize_input=False), _SYMMETRIC)

# random
case("random_bits-keys", lambda k: jax.vmap(
    lambda d: jax.random.bits(jax.random.wrap_key_data(d), (6,)))(k), bits(8, 2))  # fmt: skip
case("random_bits-one_key", lambda k: jax.random.bits(jax.random.wrap_key_data(k), (8, 6)), bits(2))
case("random_fold_in-keys", data(jax.vmap(jax.random.fold_in)), bits(8, 2), whole(8))
case("random_split-keys", data(jax.vmap(partial(jax.random.split, num=(3, 4)))), bits(8, 2))
case("random_clone-keys", data(jax.random.clone), bits(8, 2))
case("random_seed-seeds", lambda s: jax.random.key_data(jax.vmap(jax.random.key)(s)), whole(8))

# control flow and calls
case("scan-carry_and_stack", lambda x: lax.scan(lambda c, r: (c + r, c * r), jnp.zeros(6), x),
     real(8, 6))  # fmt: skip
case("scan-reverse", lambda c, x: lax.scan(lambda c, r: (c @ r, c), c, x, reverse=True),
     real(4, 6), real(3, 6, 6))  # fmt: skip
case("while-count", lambda x: lax.fori_loop(0, jnp.int32(x[0, 0]), lambda i, x: x + x.sum(), x),
     whole(8, 6, low=1, high=5).astype(np.float32))  # fmt: skip
for taken in (0, 2):
    case(f"cond-branch_{taken}", lambda i, x: lax.switch(
        i[0], [lambda x: x, lambda x: x.T @ x @ x.T, lambda x: x[::-1] + x.sum(1)], x
    ), np.array([taken], np.int32), real(6, 6))  # fmt: skip
case("remat2-gradient", jax.grad(jax.checkpoint(lambda x: jnp.sum(jnp.sin(x @ x.T)))), real(8, 6))
case("custom_jvp_call-relu", jax.nn.relu, real(8, 6))
case("custom_vjp_call-gradient", jax.grad(lambda x: jax.nn.logsumexp(x, 1).sum()), real(8, 6))

# callbacks
case("pure_callback-sort", lambda x: jax.pure_callback(partial(np.sort, axis=1), x, x),
     real(8, 6))  # fmt: skip
case("io_callback-ordered", lambda x: io_callback(partial(np.flip, axis=0), x, x, ordered=True),
     real(8, 6))  # fmt: skip
case("io_callback-rows", lambda x: io_callback(partial(np.sort, axis=1), x, x), real(7, 6))
case("debug_callback-values", lambda x: (jax.debug.callback(lambda x: None, x), x * 2)[1],
     real(8, 6))  # fmt: skip

# comparisons in total order, high words of products
for name in ("eq_to", "le_to", "lt_to"):
    compare = getattr(_jax.primitives, f"{name}_p").bind
    case(f"{name}-float32", compare, np.repeat(real(4, 6), 2, 0), np.tile(real(2, 6), (4, 1)))
case("lt-int32", lax.lt, whole(8, 6), whole(8, 6))
case("mulhi-int32", lax.mulhi, whole(8, 6, low=-(1 << 30), high=1 << 30),
     whole(8, 6, low=-(1 << 30), high=1 << 30))  # fmt: skip

# what says something to the compiler
case("device_put-same", jax.device_put, real(8, 6))
case("platform_index-cpu", lambda x: lax.platform_dependent(
    x, cpu=lambda x: x.sum(1), default=lambda x: x.max(1)), real(8, 6))  # fmt: skip
case("layout_constraint-columns", lambda x: with_layout_constraint(
    x * 2, Layout(major_to_minor=(1, 0))), real(8, 6))  # fmt: skip
case("shard_alike-two", lambda x, y: shard_alike(x + 1, y), real(8, 6), real(8, 6))
case("call_exported-sum", exported, real(8, 6))

# random keys in and out of their words
case("random_wrap-keys", data(lambda keys: keys[::-1]), bits(8, 2))
case("random_unwrap-keys", lambda x: jax.random.key_data(jax.random.wrap_key_data(x)), bits(8, 2))
