"""Decoder-only language models: Llama, sharded in the usual ways, and Gemma 2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from benchmarks.suite.case import Case, ints
from benchmarks.suite.pods.common import (
    Axis,
    Weight,
    attention,
    attention_weights,
    bfloat16,
    causal,
    cross_entropy_by_one_hot,
    program,
    project,
    rms_norm,
    rotary,
    stacked,
    trained,
    weight,
)
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
        """Annotates an activation, or leaves it as it is."""
        return shard(x, *spec) if self.annotated else x

    def residual(self, x: Any) -> Any:
        """Annotates the residual stream, [batch, length, embed]."""
        return self.put(x, self.batch, self.sequence, None)


def llama_weights(model: Llama, axes: Axes) -> dict[str, Any]:
    """Parameters, with those of all layers stacked."""
    m, fsdp, tensor = model, axes.fsdp, axes.tensor
    keys = (fsdp, axes.key_weights)
    layer = {
        **attention_weights(m.embed, m.heads, m.kv_heads, m.head_dim, fsdp, tensor, keys),
        "gate": weight((m.embed, m.mlp), fsdp, tensor),
        "up": weight((m.embed, m.mlp), fsdp, tensor),
        "down": weight((m.mlp, m.embed), tensor, fsdp),
        "attention_norm": weight((m.embed,)),
        "mlp_norm": weight((m.embed,)),
    }
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
        tokens = ints(model.batch, model.length)
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
    """Gemma 2 with 2 billion parameters: pairs of a local and a global layer."""
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
    """A training step of Gemma 2."""
    tokens = ints(64, 4096)
    return trained(
        gemma_loss, gemma_weights(), (tokens, tokens), (P(BATCH), P(BATCH)), _MESH_3D
    )


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
)  # fmt: skip
