"""A GPT, trained in ways that change the step: accumulation, a pipeline, ZeRO-1, Muon."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from benchmarks.suite.case import Case, ints
from benchmarks.suite.pods.common import (
    Axis,
    Weight,
    attention,
    averaged,
    bfloat16,
    causal,
    clipped_adamw,
    cross_entropy_by_one_hot,
    program,
    rms_norm,
    shapes_of,
    split_heads,
    stacked,
    trained,
    weight,
)
from benchmarks.suite.programs.optimizers import cross_entropy, like_params
from sharding import shard

BATCH: Axis = ("data", "fsdp")


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
    layer = gpt_weights(embed, 8192)
    for name in ("qkv", "attention_out", "up", "down"):
        layer[name] = weight(layer[name].shape, "fsdp")
    weights = {
        "embedding": weight((vocab, embed), "fsdp"),
        "final_norm": weight((embed,)),
        "layers": stacked(12, layer),
    }

    def value_and_grad(params: Any, tokens: Any, labels: Any) -> tuple[Any, Any]:
        def add(sums: Any, batch: Any) -> tuple[Any, None]:
            found = jax.value_and_grad(partial(chunked_loss, 8))(params, *batch)
            return jax.tree.map(jnp.add, sums, found), None

        zeros = (0.0, jax.tree.map(jnp.zeros_like, params))
        sums, _ = lax.scan(add, zeros, (tokens, labels))
        return jax.tree.map(lambda total: total / microbatches, sums)

    tokens, place = ints(microbatches, 128, 2048), P(None, BATCH)
    return averaged(
        value_and_grad, weights, (tokens, tokens), (place, place), {"data": 4, "fsdp": 8},
        clipped_adamw(), decay=0.999,
    )  # fmt: skip


def pipelined() -> Case:
    """Four stages of two layers each, and 16 microbatches. The states of all stages are one array,
    which every step shifts by one (GSPMD, section 3.3)."""
    embed, vocab, stages, microbatches = 2048, 32_000, 4, 16
    layers = stacked(2, gpt_weights(embed, 8192))
    weights = {
        "embedding": weight((vocab, embed)),
        "final_norm": weight((embed,)),
        "stages": jax.tree.map(lambda w: Weight((stages, *w.shape), P("stage")), layers),
    }

    def stage(layers: Any, x: Any) -> Any:
        return lax.scan(jax.checkpoint(gpt_layer), x, layers)[0]

    def loss(params: Any, tokens: Any, labels: Any) -> Any:
        embedding = params["embedding"].astype(jnp.bfloat16)
        x = embedding[tokens].reshape(microbatches, -1, tokens.shape[1], embed)
        x = shard(x, None, "data", None, None)
        last = jnp.zeros((stages - 1, *x.shape[1:]), x.dtype)

        def tick(states: Any, entering: Any) -> tuple[Any, Any]:
            states = jnp.roll(states, 1, axis=0).at[0].set(entering)
            states = shard(states, "stage", "data", None, None)
            states = jax.vmap(stage)(params["stages"], states)
            states = shard(states, "stage", "data", None, None)
            return states, states[-1]

        states = jnp.zeros((stages, *x.shape[1:]), x.dtype)
        _, x = lax.scan(tick, states, jnp.concatenate([x, last]))
        x = shard(x[stages - 1 :], None, "data", None, None).reshape(*tokens.shape, embed)
        logits = rms_norm(x, params["final_norm"]) @ embedding.T
        return cross_entropy_by_one_hot(logits, labels)

    tokens = ints(128, 1024)
    return trained(
        loss, weights, (tokens, tokens), (P("data"), P("data")), {"stage": 4, "data": 8}
    )


def zero1() -> Case:
    """Parameters are whole on every device; the optimiser's state is divided."""
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
    tokens = ints(64, 2048)
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
    """Momentum is made orthogonal, for all layers at once."""
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
    tokens = ints(64, 2048)
    return trained(
        loss, weights, (tokens, tokens), (P("fsdp"), P("fsdp")), {"fsdp": 8, "tensor": 4},
        optimizer,
    )  # fmt: skip


PROGRAMS = (
    program(
        "accumulated",
        "GPT; fsdp, accumulated gradients, a loss in chunks, averaged parameters",
        accumulated,
    ),
    program("pipelined", "GPT; four stages, data parallel, 16 microbatches", pipelined),
    program("zero1", "GPT; data parallel, the optimiser's state sharded", zero1),
    program("muon_stacked", "GPT; Muon on stacked layers, on fsdp and tensor", muon_stacked),
)
