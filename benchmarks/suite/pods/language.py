"""Decoder-only language models, and ways to train them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from benchmarks.suite.case import Case
from benchmarks.suite.pods.common import (
    Axis,
    Weight,
    attention,
    attention_weights,
    averaged,
    bfloat16,
    causal,
    clipped_adamw,
    cross_entropy_by_one_hot,
    integers,
    program,
    project,
    rms_norm,
    rotary,
    shapes_of,
    split_heads,
    stacked,
    trained,
    weight,
)
from benchmarks.suite.programs.optimizers import cross_entropy, like_params
from sharding import shard

BATCH: Axis = ("data", "fsdp")


# --- Llama ----------------------------------------------------------------------------------------


class Llama(NamedTuple):
    """Sizes of Llama 3 with 8 billion parameters, and of a batch."""

    layers: int = 32
    kv_heads: int = 8
    embed: int = 4096
    heads: int = 32
    head_dim: int = 128
    mlp: int = 14_336
    vocab: int = 128_256
    batch: int = 64
    length: int = 4096


class Axes(NamedTuple):
    """Mesh axes of the dims of parameters and activations.

    Attributes:
      batch: of all activations.
      fsdp: the embed dim of weights.
      tensor: heads, hidden units of the feed-forward layers and the vocabulary.
      sequence: positions of the residual stream.
      inner_sequence: positions of queries and hidden units.
      key_weights: heads in the weights of keys and values; as `tensor` where it divides them.
      annotated: whether activations are annotated.
    """

    batch: Axis
    fsdp: Axis = None
    tensor: Axis = None
    sequence: Axis = None
    inner_sequence: Axis = None
    key_weights: Axis = None
    annotated: bool = True

    def put(self, x: Any, *spec: Axis) -> Any:
        return shard(x, *spec) if self.annotated else x

    def residual(self, x: Any) -> Any:
        return self.put(x, self.batch, self.sequence, None)


def llama_weights(model: Llama, axes: Axes) -> dict[str, Any]:
    m, fsdp, tensor = model, axes.fsdp, axes.tensor
    layer = {
        **attention_weights(m.embed, m.heads, m.kv_heads, m.head_dim, fsdp, tensor),
        "gate": weight((m.embed, m.mlp), fsdp, tensor),
        "up": weight((m.embed, m.mlp), fsdp, tensor),
        "down": weight((m.mlp, m.embed), tensor, fsdp),
        "attention_norm": weight((m.embed,)),
        "mlp_norm": weight((m.embed,)),
    }
    for name in ("key", "value"):
        layer[name] = weight((m.embed, m.kv_heads, m.head_dim), fsdp, axes.key_weights)
    return {
        "embedding": weight((m.vocab, m.embed), tensor, fsdp),
        "output": weight((m.embed, m.vocab), fsdp, tensor),
        "final_norm": weight((m.embed,)),
        "layers": stacked(m.layers, layer),
    }


def llama_layer(axes: Axes, x: Any, weights: Any) -> tuple[Any, None]:
    """x [batch, length, embed]; weights of one layer."""
    w, put = bfloat16(weights), axes.put
    h = axes.residual(rms_norm(x, w["attention_norm"]))
    query, key, value = project(h, w)
    query = put(rotary(query), axes.batch, axes.inner_sequence, axes.tensor, None)
    key = put(rotary(key), axes.batch, None, axes.tensor, None)
    value = put(value, axes.batch, None, axes.tensor, None)
    mixed = attention(query, key, value, causal(x.shape[1]))
    mixed = put(mixed, axes.batch, axes.inner_sequence, axes.tensor, None)
    x = axes.residual(x + jnp.einsum("bthk,hkd->btd", mixed, w["attention_out"]))
    h = axes.residual(rms_norm(x, w["mlp_norm"]))
    hidden = jax.nn.silu(h @ w["gate"]) * (h @ w["up"])
    hidden = put(hidden, axes.batch, axes.inner_sequence, axes.tensor)
    return axes.residual(x + hidden @ w["down"]), None


def llama_loss(axes: Axes, one_hot: bool, params: Any, tokens: Any, labels: Any) -> Any:
    """Cross entropy: tokens and labels [batch, length].

    Args:
      one_hot: tokens are embedded by a product with one-hot vectors, as where rows of the
        embedding are spread over devices.
    """
    embedding = params["embedding"].astype(jnp.bfloat16)
    if one_hot:
        x = jax.nn.one_hot(tokens, embedding.shape[0], dtype=jnp.bfloat16) @ embedding
    else:
        x = embedding[tokens]
    layer = jax.checkpoint(partial(llama_layer, axes))
    x, _ = lax.scan(layer, axes.residual(x), params["layers"])
    logits = rms_norm(x, params["final_norm"]) @ params["output"].astype(jnp.bfloat16)
    logits = axes.put(logits, axes.batch, axes.inner_sequence, axes.tensor)
    return cross_entropy_by_one_hot(logits, labels)


def llama(
    axes: Axes, mesh: Mapping[str, int], model: Llama | None = None, one_hot: bool = False
) -> Callable[[], Case]:
    """Training of a Llama, with layers in a loop and recomputed in the backward pass."""
    model = model or Llama()

    def make() -> Case:
        tokens = integers(model.batch, model.length)
        return trained(
            partial(llama_loss, axes, one_hot), llama_weights(model, axes),
            (tokens, tokens), (P(axes.batch), P(axes.batch)), mesh,
        )  # fmt: skip

    return make


_3D = Axes(BATCH, "fsdp", "tensor", key_weights="tensor")
_MESH_3D = {"data": 2, "fsdp": 4, "tensor": 4}


# --- Gemma 2 --------------------------------------------------------------------------------------

GEMMA_EMBED, GEMMA_VOCAB, GEMMA_WINDOW = 2304, 256_128, 1024


def gemma_weights() -> dict[str, Any]:
    embed, heads, kv_heads, head_dim, mlp, pairs = GEMMA_EMBED, 8, 4, 256, 9216, 13

    def layers() -> dict[str, Weight]:
        layer = {
            "query": weight((embed, heads, head_dim), "fsdp", "tensor"),
            "key_value": weight((2, embed, kv_heads, head_dim), None, "fsdp", "tensor"),
            "attention_out": weight((heads, head_dim, embed), "tensor", None, "fsdp"),
            "gate_up": weight((2, embed, mlp), None, "fsdp", "tensor"),
            "down": weight((mlp, embed), "tensor", "fsdp"),
            "norms": weight((4, embed)),
        }
        return stacked(pairs, layer)

    return {
        "embedding": weight((GEMMA_VOCAB, embed), "tensor", "fsdp"),
        "final_norm": weight((embed,)),
        "local": layers(),
        "global": layers(),
    }


def gemma_block(x: Any, weights: Any, window: int) -> Any:
    """Norms before and after attention and feed-forward; each position sees `window` others."""
    w = bfloat16(weights)
    scales = 1 + w["norms"]
    h = rms_norm(x, scales[0])
    query = rotary(jnp.einsum("btd,dhk->bthk", h, w["query"]))
    key, value = jnp.einsum("btd,cdhk->cbthk", h, w["key_value"])
    here, there = jnp.arange(x.shape[1])[:, None], jnp.arange(x.shape[1])
    mask = (there <= here) & (here - there < window)
    mixed = attention(query, rotary(key), value, mask, cap=50.0)
    x = x + rms_norm(jnp.einsum("bthk,hkd->btd", mixed, w["attention_out"]), scales[1])
    gate, up = jnp.einsum("btd,cdf->cbtf", rms_norm(x, scales[2]), w["gate_up"])
    x = x + rms_norm((jax.nn.gelu(gate) * up) @ w["down"], scales[3])
    return shard(x, BATCH, None, None)


def gemma_loss(params: Any, tokens: Any, labels: Any) -> Any:
    """Cross entropy and z-loss of capped logits; embedding and output share their weights."""
    embedding = params["embedding"].astype(jnp.bfloat16)
    x = shard(embedding[tokens] * GEMMA_EMBED**0.5, BATCH, None, None)

    @jax.checkpoint
    def pair(x: Any, weights: Any) -> tuple[Any, None]:
        x = gemma_block(x, weights[0], tokens.shape[1])
        return gemma_block(x, weights[1], GEMMA_WINDOW), None

    x, _ = lax.scan(pair, x, (params["global"], params["local"]))
    x = rms_norm(x, 1 + params["final_norm"])
    logits = jnp.einsum("btd,vd->btv", x, embedding).astype(jnp.float32)
    logits = 30 * jnp.tanh(logits / 30)
    total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return (total - chosen).mean() + 1e-4 * jnp.square(total).mean()


def gemma2() -> Case:
    tokens = integers(64, 4096)
    return trained(
        gemma_loss, gemma_weights(), (tokens, tokens), (P(BATCH), P(BATCH)), _MESH_3D
    )


# --- GPT, trained in various ways -----------------------------------------------------------------


def gpt_weights(
    embed: int, mlp: int, fsdp: Axis = None, tensor: Axis = None
) -> dict[str, Weight]:
    """Of one layer: queries, keys and values are one matrix."""
    return {
        "qkv": weight((embed, 3 * embed), fsdp, tensor),
        "attention_out": weight((embed, embed), tensor, fsdp),
        "up": weight((embed, mlp), fsdp, tensor),
        "down": weight((mlp, embed), tensor, fsdp),
        "attention_norm": weight((embed,)),
        "mlp_norm": weight((embed,)),
    }


def gpt_layer(x: Any, weights: Any) -> tuple[Any, None]:
    """x [batch, length, embed], in 16 heads."""
    w = bfloat16(weights)
    qkv = jnp.split(rms_norm(x, w["attention_norm"]) @ w["qkv"], 3, axis=-1)
    mixed = attention(*(split_heads(a, 16) for a in qkv), mask=causal(x.shape[1]))
    x = x + mixed.reshape(x.shape) @ w["attention_out"]
    return x + jax.nn.gelu(rms_norm(x, w["mlp_norm"]) @ w["up"]) @ w["down"], None


def chunked_loss(chunks: int, params: Any, tokens: Any, labels: Any) -> Any:
    """Cross entropy; logits are computed of one chunk of positions at a time, and again in the
    backward pass, so that they are never all in memory."""
    embedding = params["embedding"].astype(jnp.bfloat16)
    x, _ = lax.scan(jax.checkpoint(gpt_layer), embedding[tokens], params["layers"])
    x = rms_norm(x, params["final_norm"])
    batch, _, width = x.shape
    x = jnp.moveaxis(x.reshape(batch, chunks, -1, width), 1, 0)
    labels = jnp.moveaxis(labels.reshape(batch, chunks, -1), 1, 0)

    @jax.checkpoint
    def add(total: Any, chunk: Any) -> tuple[Any, None]:
        x, labels = chunk
        logits = jnp.einsum("btd,vd->btv", x, params["embedding"].astype(jnp.bfloat16))
        return total + cross_entropy(logits, labels) / chunks, None

    return lax.scan(add, 0.0, (x, labels))[0]


def accumulated() -> Case:
    """Gradients of four microbatches are added before a step."""
    embed, vocab, microbatches = 2048, 50_304, 4
    weights = {
        "embedding": weight((vocab, embed), "fsdp"),
        "final_norm": weight((embed,)),
        "layers": stacked(12, gpt_weights(embed, 8192, fsdp="fsdp")),
    }

    def value_and_grad(params: Any, tokens: Any, labels: Any) -> tuple[Any, Any]:
        def add(sums: Any, batch: Any) -> tuple[Any, None]:
            found = jax.value_and_grad(partial(chunked_loss, 8))(params, *batch)
            return jax.tree.map(jnp.add, sums, found), None

        zeros = (0.0, jax.tree.map(jnp.zeros_like, params))
        sums, _ = lax.scan(add, zeros, (tokens, labels))
        return jax.tree.map(lambda total: total / microbatches, sums)

    tokens, place = integers(microbatches, 128, 2048), P(None, BATCH)
    return averaged(
        value_and_grad, weights, (tokens, tokens), (place, place), {"data": 4, "fsdp": 8},
        clipped_adamw(), decay=0.999,
    )  # fmt: skip


def zero1() -> Case:
    embed, vocab = 2048, 50_304
    weights = {
        "embedding": weight((vocab, embed)),
        "layers": [gpt_weights(embed, 8192) for _ in range(3)],
    }

    def loss(params: Any, tokens: Any, labels: Any) -> Any:
        params = bfloat16(params)
        x = params["embedding"][tokens]
        for layer in params["layers"]:
            x, _ = gpt_layer(x, layer)
        return cross_entropy(x @ params["embedding"].T, labels)

    state = jax.eval_shape(clipped_adamw().init, shapes_of(weights))
    scattered = jax.tree.map(lambda _: P("data"), weights)
    tokens = integers(64, 2048)
    return trained(
        loss, weights, (tokens, tokens), (P("data"), P("data")), {"data": 16},
        state_specs=like_params(state, scattered),
    )  # fmt: skip


def orthogonalized(grad: Any) -> Any:
    """Newton-Schulz iterations on stacked matrices [layers, rows, columns]; others stay."""
    if grad.ndim < 3:
        return grad
    x = grad.astype(jnp.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)

    def iterate(x: Any, _: Any) -> tuple[Any, None]:
        a = x @ x.mT
        return 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x, None

    x, _ = lax.scan(iterate, x, None, length=5)
    return (x.mT if tall else x).astype(jnp.float32)


def muon_stacked() -> Case:
    embed, vocab = 2048, 32_000
    weights = {
        "embedding": weight((vocab, embed), "tensor", "fsdp"),
        "layers": stacked(8, gpt_weights(embed, 8192, "fsdp", "tensor")),
    }

    def loss(params: Any, tokens: Any, labels: Any) -> Any:
        embedding = params["embedding"].astype(jnp.bfloat16)
        x, _ = lax.scan(jax.checkpoint(gpt_layer), embedding[tokens], params["layers"])
        return cross_entropy(x @ embedding.T, labels)

    optimizer = optax.chain(optax.trace(0.95), optax.stateless_with_tree_map(
        lambda moment, _: -0.02 * orthogonalized(moment)
    ))  # fmt: skip
    tokens = integers(64, 2048)
    return trained(
        loss, weights, (tokens, tokens), (P("fsdp"), P("fsdp")), {"fsdp": 8, "tensor": 4},
        optimizer,
    )  # fmt: skip


_SHORT = Llama(layers=8)
PROGRAMS = (
    program("llama", "Llama; fsdp and tensor, annotated inside", llama(_3D, _MESH_3D)),
    program(
        "llama_free",
        "llama without annotations inside",
        llama(_3D._replace(annotated=False), _MESH_3D),
    ),
    program(
        "llama_sequence",
        "Llama; heads and hidden units on tensor, and positions of the residual stream as well",
        llama(
            Axes("data", tensor="tensor", sequence="tensor", key_weights="tensor"),
            {"data": 4, "tensor": 8}, _SHORT, one_hot=True,
        ),
    ),
    program(
        "llama_context",
        "Llama; positions of queries on an axis of their own, keys and values gathered",
        llama(
            Axes("fsdp", "fsdp", sequence="sequence", inner_sequence="sequence"),
            {"fsdp": 8, "sequence": 4}, _SHORT,
        ),
    ),
    program(
        "llama_fsdp",
        "Llama; parameters on fsdp, the batch on data as well",
        llama(Axes(BATCH, "fsdp"), {"data": 2, "fsdp": 16}, _SHORT),
    ),
    program(
        "llama_few_heads",
        "Llama with 4 heads of keys on 8 devices of tensor",
        llama(
            Axes("fsdp", "fsdp", "tensor"), {"fsdp": 4, "tensor": 8}, _SHORT._replace(kv_heads=4)
        ),
    ),
    program("gemma2", "Gemma 2; fsdp and tensor, annotated between layers", gemma2),
    program(
        "accumulated",
        "GPT; fsdp, accumulated gradients, a loss in chunks, averaged parameters",
        accumulated,
    ),
    program("gpt_zero1", "GPT; data parallel, the optimiser's state sharded", zero1),
    program("muon_stacked", "GPT; Muon on stacked layers, on fsdp and tensor", muon_stacked),
)  # fmt: skip
