"""The collectives of one transformer layer, by count and bytes, against what the papers derive.

One layer (attention and feed-forward, no norms, so that nothing but the matmuls communicates),
forward and backward with gradients of weights and input. With a cotangent given, in elements:

  A  = batch x sequence x model    an activation of the residual stream
  W  = 4 model^2 + 2 model x hidden    all weights

Ring model, k devices: all-gather and reduce-scatter move (k-1)/k of the whole, all-reduce twice.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding import shard
from tests.oracle import P, check, kinds, make_mesh

BATCH, SEQ, MODEL, HEADS, HIDDEN = 8, 16, 128, 4, 512
HEAD = MODEL // HEADS
F32 = 4
A = BATCH * SEQ * MODEL * F32  # 64 KiB, small beside the weights: Megatron's own setting
W = (4 * MODEL * MODEL + 2 * MODEL * HIDDEN) * F32


def arr(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32) / 4


def weights() -> dict[str, jax.Array]:
    shapes = {
        "q": (MODEL, HEADS, HEAD), "k": (MODEL, HEADS, HEAD), "v": (MODEL, HEADS, HEAD),
        "o": (HEADS, HEAD, MODEL), "up": (MODEL, HIDDEN), "down": (HIDDEN, MODEL),
    }  # fmt: skip
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        n: jax.random.normal(k, s) / 12 for k, (n, s) in zip(keys, shapes.items(), strict=True)
    }


def layer(w: dict[str, jax.Array], x: jax.Array, rules: dict) -> jax.Array:
    """`rules` gives the annotation of the residual stream and of a sub-layer's input."""
    x = shard(x, *rules["residual"])
    h = shard(x, *rules["inner"])
    q, k, v = (jnp.einsum("bsm,mhd->bshd", h, w[n]) for n in "qkv")
    probs = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k), -1)
    y = jnp.einsum("bhqk,bkhd->bqhd", probs, v)
    x = x + shard(jnp.einsum("bshd,hdm->bsm", y, w["o"]), *rules["residual"])
    h = shard(x, *rules["inner"])
    y = jnp.einsum("bsh,hm->bsm", jax.nn.relu(jnp.einsum("bsm,mh->bsh", h, w["up"])), w["down"])
    return x + shard(y, *rules["residual"])


def measure(rules: dict, mesh, remat: bool = False, seq: int = SEQ) -> dict:
    """(kind, axes) -> (count, bytes) of forward and backward, checked against the oracle."""
    x, cotangent = jax.random.normal(jax.random.key(1), (2, BATCH, seq, MODEL))

    def step(w, x, cotangent):
        fun = lambda w, x: layer(w, x, rules)  # noqa: E731
        out, vjp = jax.vjp(jax.checkpoint(fun) if remat else fun, w, x)
        return out, vjp(cotangent)

    data = P(*rules["residual"])
    outs = (data, ({n: P(*s) for n, s in rules["weights"].items()}, data))
    return kinds(check(step, (weights(), x, cotangent), mesh, (outs[1][0], data, data), outs))


def moved(found: dict, kind: str, axis: str) -> float:
    return found.get((kind, (axis,)), (0, 0.0))[1]


HEAD_WISE = {
    "q": (None, "tensor"), "k": (None, "tensor"), "v": (None, "tensor"), "o": ("tensor",),
    "up": (None, "tensor"), "down": ("tensor",),
}  # fmt: skip


def test_megatron_is_four_all_reduces() -> None:
    """Shoeybi et al. (arXiv 1909.08053), section 3: f and g are conjugate, so forward and backward
    each all-reduce once per sub-layer: 4 x 2 A (k-1)/k."""
    rules = {"residual": (None, None, None), "inner": (None, None, None), "weights": HEAD_WISE}
    found = measure(rules, make_mesh(tensor=4))
    assert found == {("all_reduce", ("tensor",)): (4, 4 * 2 * A * 3 / 4)}


def test_sequence_parallel_moves_what_megatron_moves() -> None:
    """Korthikanti et al. (arXiv 2205.05198), section 4.2.2: every all-reduce becomes an all-gather
    and a reduce-scatter of the same bytes in sum. (Their backward gathers the input of each
    sub-layer once more; here the gathered input of the forward pass is still there.)"""
    rules = {
        "residual": (None, "tensor", None), "inner": (None, None, None), "weights": HEAD_WISE,
    }  # fmt: skip
    found = measure(rules, make_mesh(tensor=4))
    assert found == {
        ("all_gather", ("tensor",)): (4, 4 * A * 3 / 4),
        ("reduce_scatter", ("tensor",)): (4, 4 * A * 3 / 4),
    }


FSDP = {
    "q": ("fsdp",), "k": ("fsdp",), "v": ("fsdp",), "o": (None, None, "fsdp"), "up": ("fsdp",),
    "down": (None, "fsdp"),
}  # fmt: skip


@pytest.mark.parametrize("remat", [False, True])
def test_fsdp_moves_every_weight_as_zero_3_does(remat: bool) -> None:
    """Rajbhandari et al. (arXiv 1910.02054), section 7.2.2: ZeRO-3 gathers every weight in the
    forward and again in the backward pass, and reduce-scatters its gradient: 3 W (k-1)/k. The
    second gather is what recomputation costs; without it the gathered weights are still there."""
    rules = {"residual": ("fsdp",), "inner": ("fsdp",), "weights": FSDP}
    found = measure(rules, make_mesh(fsdp=8), remat, seq=256)  # far more tokens than model dims
    gathers = found.pop(("all_gather", ("fsdp",)))
    assert found == {("reduce_scatter", ("fsdp",)): (6, W * 7 / 8)}
    assert gathers == ((12, 2 * W * 7 / 8) if remat else (6, W * 7 / 8))


def test_two_dimensional_sharding_of_gspmd() -> None:
    """Xu et al. (arXiv 2105.04663), section 5.1, the finalised form: weights on X and Y, the batch
    on X, model dims on Y. Weights are gathered along X (W/Y), activations along Y (A/X), and their
    gradients and partial sums are reduce-scattered likewise."""
    x, y = 2, 4
    rules = {
        "residual": ("data", None, "tensor"), "inner": ("data", None, None),
        "weights": {
            "q": ("data", "tensor"), "k": ("data", "tensor"), "v": ("data", "tensor"),
            "o": ("tensor", None, "data"), "up": ("data", "tensor"), "down": ("tensor", "data"),
        },
    }  # fmt: skip
    found = measure(rules, make_mesh(data=x, tensor=y))
    assert found == {
        ("all_gather", ("data",)): (6, W / y * (x - 1) / x),
        ("reduce_scatter", ("data",)): (6, W / y * (x - 1) / x),
        ("all_gather", ("tensor",)): (4, 4 * A / x * (y - 1) / y),
        ("reduce_scatter", ("tensor",)): (4, 4 * A / x * (y - 1) / y),
    }


def test_data_parallel_all_reduces_every_gradient_once() -> None:
    rules = {"residual": ("data",), "inner": ("data",), "weights": {n: () for n in HEAD_WISE}}
    found = measure(rules, make_mesh(data=8))
    assert found == {("all_reduce", ("data",)): (6, 2 * W * 7 / 8)}


def test_a_sum_of_three_partial_gradients_is_reduced_once() -> None:
    """Linear operations carry partial values: one all-reduce for three products and their sum."""
    def f(a, b, c, w):
        return (a @ w + b @ w) * 2.0 - c @ w.astype(jnp.float32)

    x = jax.random.normal(jax.random.key(0), (4, 8, 64))
    w = jax.random.normal(jax.random.key(1), (64, 8))
    specs = (*(P(None, "tensor"),) * 3, P("tensor"))
    args = (x[0], x[1], x[2], w)
    whole = check(f, args, make_mesh(tensor=8), specs, P())
    assert kinds(whole) == {("all_reduce", ("tensor",)): (1, 2 * 8 * 8 * F32 * 7 / 8)}
    split = check(f, args, make_mesh(tensor=8), specs, P("tensor"))
    assert kinds(split) == {("reduce_scatter", ("tensor",)): (1, 8 * 8 * F32 * 7 / 8)}


def test_the_same_value_is_gathered_once_for_all_its_users() -> None:
    def f(x, u, v):
        x = shard(x, "tensor")
        return jnp.tanh(x) @ u, jnp.tanh(x) @ v, x.sum()

    x = jax.random.normal(jax.random.key(0), (8, 64))
    u, v = jax.random.normal(jax.random.key(1), (2, 64, 64))
    specs = (P("tensor"), P(None, "tensor"), P(None, "tensor"))
    outs = (P(None, "tensor"), P(None, "tensor"), P())
    found = kinds(check(f, (x, u, v), make_mesh(tensor=8), specs, outs))
    # tanh(x) is traced twice, but x itself is gathered for both: the cheaper of the two.
    assert found["all_gather", ("tensor",)][0] <= 2


def test_addends_are_reduced_together_where_each_alone_would_not_be() -> None:
    """One product moves its operands (all-to-all 896 B and all-gather 7,168 B) rather than scatter
    its 16 KiB (14,336 B); three products and their sum scatter once."""
    x = jax.random.normal(jax.random.key(0), (3, 64, 32))
    w = jax.random.normal(jax.random.key(1), (3, 32, 64))
    mesh = make_mesh(tensor=8)
    operands = (P(None, "tensor"), P("tensor"))
    alone = check(lambda x, w: x @ w, (x[0], w[0]), mesh, operands, P("tensor"))
    assert kinds(alone) == {
        ("all_to_all", ("tensor",)): (1, 64 * 32 / 8 * F32 * 7 / 8),
        ("all_gather", ("tensor",)): (1, 32 * 64 * F32 * 7 / 8),
    }
    def three(a, b, c, u, v, w):
        return (a @ u + b @ v) - c @ w

    specs = (operands[0],) * 3 + (operands[1],) * 3
    together = check(three, (*x, *w), mesh, specs, P("tensor"))
    assert kinds(together) == {("reduce_scatter", ("tensor",)): (1, 64 * 64 * F32 * 7 / 8)}


def test_the_way_back_gathers_gradients_and_keeps_nothing_whole() -> None:
    """To gather the gradient once, for both of its products, sends what reducing one of them to
    shards sends; the other one then needs no input that was gathered on the way forward. (The small
    weights would be gathered, were axes moved.)"""
    layers, width, batch = 4, 64, 4096

    def loss(ws: Any, x: Any) -> Any:
        for w in ws:
            y = x @ w
            for _ in range(6):  # so many operations that the way back is far
                y = jnp.tanh(y) * y
            x = shard(y, "data", "tensor")
        return jnp.mean(x**2)

    args = ([arr(width, width) for _ in range(layers)], arr(batch, width))
    columns = [P(None, "tensor")] * layers
    found = check(
        lambda ws, x: jax.grad(loss)(ws, x), args, make_mesh(data=2, tensor=4),
        (columns, P("data", "tensor")), columns, disable_passes=["moved_axes"],
    )  # fmt: skip
    counts = kinds(found)
    gathered = batch // 2 * width * 4 * 3 / 4
    assert counts["all_gather", ("tensor",)] == (2 * layers - 1, (2 * layers - 1) * gathered)
    assert ("reduce_scatter", ("tensor",)) not in counts
    # 5.3 with the inputs of all layers whole until the way back
    assert found.peak_memory < batch // 2 * width * 4 * 4.5


@pytest.mark.parametrize("width", [1, 16])
@pytest.mark.parametrize("rows", ["data", None])
def test_a_narrow_head_after_columns(rows: str | None, width: int) -> None:
    """A value or a reward head, FSDP and tensor parallel: its few weights have `data` on the
    features, which the layer before has on `tensor`. They are what moves, forwards and back, and
    no activation of the layer, whose features reach as far as the batch does."""
    batch, inner, hidden = 64, 16, 64

    def step(p: Any, x: Any) -> Any:
        def loss(p: Any) -> Any:
            return ((jnp.tanh(x @ p["w"]) @ p["v"]) ** 2).mean()

        return jax.tree.map(lambda a, b: a - b, p, jax.grad(loss)(p))

    p, x = {"w": arr(inner, hidden), "v": arr(hidden, width)}, arr(batch, inner)
    places = {"w": P(rows, "tensor"), "v": P("data")}
    planned = check(step, (p, x), make_mesh(data=2, tensor=4), (places, P("data")), places)
    w, v, out = (n * F32 for n in (inner * hidden, hidden * width, batch * width))
    # weights there and their gradients back, columns of the first; sums of what the head makes
    most = (w / 4 + v / 4) * 2 + out / 2 * 2 * 3 / 4 + v
    assert planned.wire_bytes <= most
