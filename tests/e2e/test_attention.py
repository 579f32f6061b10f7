"""`jax.nn.dot_product_attention` in all its implementations, and attention in flax.

There is no GPU here: cuDNN's primitives are given a lowering for CPUs with the mathematics of the
XLA implementation, under which their rules (and what these communicate) are the real ones.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.interpreters import mlir
from jax.sharding import PartitionSpec as P

import spmd
from sharding import _jax
from tests.oracle import check, kinds, make_mesh

BATCH, QUERIES, KEYS, DIM = 4, 8, 16, 8
LENGTHS = dict(query_seq_lengths=np.array([3, 8, 5, 1], np.int32),
               key_value_seq_lengths=np.array([16, 3, 9, 12], np.int32))  # fmt: skip


def mesh() -> Any:
    return make_mesh(x=2, y=4)


@functools.cache
def arr(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def qkv(heads: int = 8, kv_heads: int | None = None) -> list[np.ndarray]:
    kv = kv_heads or heads
    return [arr(BATCH, QUERIES, heads, DIM), arr(BATCH, KEYS, kv, DIM), arr(BATCH, KEYS, kv, DIM)]


def run(
    implementation: Any, args: list, ins: Any, bias: bool = False, **options: Any
) -> tuple[dict[str, float], dict[str, float]]:
    """Checks result and gradients. Kind of collective -> bytes, of the result and of both."""
    low = implementation == "cudnn"  # takes 16 bits only

    def attend(q: Any, k: Any, v: Any, *more: Any) -> Any:
        cast = [x.astype(jnp.bfloat16) if low else x for x in (q, k, v, *more)]
        if bias:
            options["bias"] = cast[3]
        q, k, v = cast[:3]
        out = jax.nn.dot_product_attention(q, k, v, implementation=implementation, **options)
        return jax.tree.map(lambda x: x.astype(jnp.float32), out)

    def both(*args: Any) -> Any:
        out, back = jax.vjp(attend, *args)
        return out, back(jax.tree.map(jnp.cos, out))

    ins = (*ins, *[P()] * (len(args) - len(ins)))
    forward = spmd.jit(attend, mesh=mesh(), in_shardings=ins).trace(*args).propagate().partition()
    partitioned = check(both, args, mesh(), ins, tolerance=3e-2 if low else 2e-5)
    return moved(forward), moved(partitioned)


def moved(partitioned: spmd.Partitioned) -> dict[str, float]:
    return {kind: bytes for (kind, _), (_, bytes) in kinds(partitioned).items()}


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets cuDNN's primitives be traced, and lowers them for CPUs."""
    home = _jax.fused_attention_stablehlo
    monkeypatch.setattr(home, "check_cudnn_version", lambda: 91500)
    monkeypatch.setattr(home, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(home, "is_cuda_compute_capability_equal", lambda capability: False)
    yield


def _reference(
    q: Any, k: Any, v: Any, bias: Any, q_lengths: Any, k_lengths: Any, *unused: Any,
    scale: float, mask_type: Any, layout: int, sliding_window_length: int | None,
    variadic_args: Any, **ignored: Any,
) -> tuple[Any, Any]:  # fmt: skip
    assert layout == 0
    options: dict[str, Any] = {}
    if bias.shape != (0,):
        options["bias"] = bias
    if "PADDING" in mask_type.name:
        options |= {"query_seq_lengths": q_lengths, "key_value_seq_lengths": k_lengths}
    if sliding_window_length:
        options["local_window_size"] = (sliding_window_length - 1, 0)
    out, residual = jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal="CAUSAL" in mask_type.name, implementation="xla",
        return_residual=True, **options,
    )  # fmt: skip
    return out, residual.transpose(0, 2, 1).astype(jnp.float32)


def _forward(*args: Any, is_training: bool, **params: Any) -> list[Any]:
    out, residual = _reference(*args, **params)
    return [out, residual] if is_training else [out]


def _backward(*args: Any, **params: Any) -> list[Any]:
    operands, cotangent = args[:10], args[12]
    fun = lambda *xs: _reference(*xs, *operands[4:], **params)[0]  # noqa: E731
    found = jax.vjp(fun, *operands[:4])[1](cotangent)
    return list(found if params["variadic_args"][1] else found[:3])


def _forward_fp8(q: Any, k: Any, v: Any, *scales: Any, is_training: bool, **params: Any) -> Any:
    """Not cuDNN's numbers: something that sees what each shard has."""
    x = [a.astype(jnp.float32) for a in (q, k, v)]
    out, residual = jax.nn.dot_product_attention(*x, is_causal=params["use_causal_mask"],
                                                 return_residual=True)  # fmt: skip
    amax = [jnp.abs(a).max().reshape(1, 1, 1, 1) for a in (residual, out)]
    found = [out.astype(q.dtype), *amax, residual.transpose(0, 2, 1).astype(jnp.float32)]
    return found if is_training else found[:3]


def _backward_fp8(q: Any, k: Any, v: Any, o: Any, cotangent: Any, *more: Any, **params: Any) -> Any:
    x = [a.astype(jnp.float32) for a in (q, k, v, cotangent)]
    fun = lambda *xs: jax.nn.dot_product_attention(*xs, is_causal=params["use_causal_mask"])  # noqa: E731
    found = jax.vjp(fun, *x[:3])[1](x[3])
    amax = [jnp.abs(a).max().reshape(1, 1, 1, 1) for a in (found[0], o.astype(jnp.float32))]
    return [*[a.astype(q.dtype) for a in found], *amax, *amax]


for _name, _lowering in {
    "_dot_product_attention_fwd_p_wrapper": _forward,
    "_dot_product_attention_bwd_p_wrapper": _backward,
    "_dot_product_attention_fp8_fwd_p_wrapper": _forward_fp8,
    "_dot_product_attention_fp8_bwd_p_wrapper": _backward_fp8,
}.items():
    (_primitive,) = _jax.cudnn(_name)
    mlir.register_lowering(
        _primitive, mlir.lower_fun(_lowering, multiple_results=True), platform="cpu"
    )

BATCH_HEADS = (P("x", None, "y"),) * 3
OPTIONS: dict[str, dict] = {
    "plain": {},
    "causal": dict(is_causal=True),
    "lengths": LENGTHS,
    "window": dict(is_causal=True, local_window_size=(4, 0)),
}


BOTH = [
    pytest.mark.usefixtures("cudnn"),
    pytest.mark.parametrize("implementation", [None, "cudnn"]),
]


def both(test: Callable) -> Callable:
    for mark in BOTH:
        test = mark(test)
    return test


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize("implementation, options", [
    (None, "plain"), (None, "lengths"), ("cudnn", "causal"), ("cudnn", "lengths"),
    ("cudnn", "window"),
])  # fmt: skip
def test_batch_and_heads_need_no_communication(implementation: Any, options: str) -> None:
    assert run(implementation, qkv(), BATCH_HEADS, **OPTIONS[options]) == ({}, {})


def test_keys_that_are_sharded() -> None:
    run("xla", qkv(), (P("x"), P("x", "y"), P("x", "y")))


@both
def test_fewer_heads_of_keys(implementation: Any) -> None:
    more = (P(None, None, ("x", "y")), P(None, None, "x"), P(None, None, "x"))
    # Each head of keys is on four devices, with different queries: the gradients are summed.
    forward, total = run(implementation, qkv(8, 2), more)
    itemsize = 2 if implementation == "cudnn" else 4
    assert forward == {}
    assert total == {"all_reduce": 2 * 2 * 3 / 4 * BATCH * KEYS * DIM * itemsize}


@both
def test_beside_parts_of_an_axis(implementation: Any) -> None:
    """A kernel that asks for devices, in a program over a mesh of parts of the user's axes."""
    z = arr(4, 16, 8)

    def fun(q: Any, k: Any, v: Any, z: Any) -> Any:
        q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
        out = jax.nn.dot_product_attention(q, k, v, implementation=implementation)
        return out.astype(jnp.float32), jnp.tanh(z.reshape(-1, 8)).reshape(z.shape)

    places = (*BATCH_HEADS, P("x", "y"))
    planned = check(fun, (*qkv(), z), mesh(), places, (None, P("x", "y")), tolerance=3e-2)
    assert kinds(planned) == {("all_to_all", ("y:(2)2",)): (2, z.nbytes / 8)}


@both
def test_heads_that_do_not_divide(implementation: Any) -> None:
    with pytest.warns(match="does not divide"):
        run(implementation, qkv(6), BATCH_HEADS)


@both
@pytest.mark.parametrize("mask", [(1, 8), (4, 1)])
def test_biases_broadcast_and_their_gradients_are_summed(
    implementation: Any, mask: tuple[int, int]
) -> None:
    args = [*qkv(), arr(*mask, QUERIES, KEYS)]
    forward, total = run(implementation, args, BATCH_HEADS, bias=True)
    assert forward == {}
    assert "all_reduce" in total and set(total) <= {"all_reduce", "all_gather"}


@both
def test_queries_are_sharded_freely_where_no_mask_counts_them(implementation: Any) -> None:
    ins = (P("x", "y"), P("x"), P("x"))
    forward, total = run(implementation, qkv(), ins)
    assert forward == {} and set(total) == {"all_reduce"}
    run(implementation, qkv(), ins, is_causal=True)


@both
def test_residuals_and_masks(implementation: Any) -> None:
    mask = arr(BATCH, 1, QUERIES, KEYS) > -1
    options = {} if implementation else {"return_residual": True}  # cuDNN's have no gradients
    assert run(implementation, qkv(), BATCH_HEADS, mask=mask, **options) == ({}, {})


@pytest.mark.parametrize("causal, ins", [
    (True, (P("x", None, "y"),) * 3), (False, (P("x", "y"), P("x"), P("x"))),
])  # fmt: skip
def test_cudnn_fp8(causal: bool, ins: Any) -> None:
    q, k, v = (x.astype(jnp.float8_e4m3fn) for x in qkv(8, 8))
    one = np.ones((1, 1, 1, 1), np.float32)
    (forward,) = _jax.cudnn("_dot_product_attention_fp8_fwd_p_wrapper")
    (backward,) = _jax.cudnn("_dot_product_attention_fp8_bwd_p_wrapper")
    params = dict(scale=1.0, use_causal_mask=causal, layout=0)

    def attend(q: Any, k: Any, v: Any) -> Any:
        out, *amax, residual = forward.bind(q, k, v, *[one] * 6, is_training=True, **params)
        grads = backward.bind(q, k, v, out, out, residual, *[one] * 12, **params)
        return [x.astype(jnp.float32) for x in (out, *amax, residual, *grads)]

    reduced = set(moved(check(attend, [q, k, v], mesh(), ins, tolerance=0.2)))
    assert "all_reduce" in reduced  # of the largest values; of gradients where queries are sharded
    assert reduced == {"all_reduce"}


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(
            num_heads=8, in_features=16, decode=False, use_bias=False, rngs=rngs
        )

    def __call__(self, x: Any, mask: Any) -> Any:
        return self.attention(x, mask=mask)


def test_flax_nnx() -> None:
    graph, state = nnx.split(Block(nnx.Rngs(0)))
    ins = jax.tree_util.tree_map_with_path(
        lambda path, leaf: P("y") if "out" in jax.tree_util.keystr(path) else P(None, "y"), state
    )

    def loss(state: Any, x: Any) -> Any:
        mask = nnx.make_causal_mask(x[..., 0])
        return (nnx.merge(graph, state)(x, mask) ** 2).mean()

    check(jax.value_and_grad(loss), [state, arr(4, 8, 16)], mesh(), (ins, P("x")), tolerance=1e-4)


def test_flax_linen() -> None:
    linen = pytest.importorskip("flax.linen")
    module: Callable = linen.MultiHeadDotProductAttention(num_heads=8, use_bias=False)
    x = arr(4, 8, 16)
    params = module.init(jax.random.key(0), x, x)

    def loss(params: Any, x: Any) -> Any:
        return (module.apply(params, x, mask=linen.make_causal_mask(x[..., 0])) ** 2).mean()

    partitioned = check(jax.value_and_grad(loss), [params, x], mesh(), (P(), P("x")))
    assert set(moved(partitioned)) == {"all_reduce"}
