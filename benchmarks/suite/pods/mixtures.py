"""Mixtures of experts, dispatched by products, by a sort, and by a scatter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from benchmarks.suite.case import Case, ints
from benchmarks.suite.pods.common import (
    Axis,
    attention,
    attention_weights,
    bfloat16,
    causal,
    cross_entropy_by_one_hot,
    program,
    rms_norm,
    rotary,
    self_attention,
    stacked,
    trained,
    weight,
)
from benchmarks.suite.programs.optimizers import cross_entropy
from sharding import shard

BATCH: Axis = ("data", "expert")
EXPERT_MESH = {"data": 4, "expert": 8}


# --- Mixtral, by products with one-hot tensors, as GShard -----------------------------------------

EXPERTS, CAPACITY = 8, 640


def mixtral_weights() -> dict[str, Any]:
    """Mixtral 8x7B with a quarter of its layers; experts lie over an axis of their own."""
    embed, mlp, vocab = 4096, 14_336, 32_000
    layer = {
        **attention_weights(embed, 32, 8, 128, "data", None),
        "router": weight((embed, EXPERTS)),
        "gate": weight((EXPERTS, embed, mlp), "expert", "data"),
        "up": weight((EXPERTS, embed, mlp), "expert", "data"),
        "down": weight((EXPERTS, mlp, embed), "expert", None, "data"),
        "attention_norm": weight((embed,)),
        "mlp_norm": weight((embed,)),
    }
    return {
        "embedding": weight((vocab, embed), None, "data"),
        "output": weight((embed, vocab), "data"),
        "final_norm": weight((embed,)),
        "layers": stacked(8, layer),
    }


def routed(x: Any, router: Any) -> tuple[Any, Any, Any]:
    """Two experts for each token of x [batch, length, embed].

    Returns:
      Which slot of which expert a token goes to, [batch, length, experts, capacity]; the same
      weighted; and the loss that balances experts.
    """
    probabilities = jax.nn.softmax((x @ router).astype(jnp.float32), axis=-1)
    scores, chosen = lax.top_k(probabilities, 2)
    scores = scores / scores.sum(axis=-1, keepdims=True)
    taken = jax.nn.one_hot(chosen, EXPERTS, dtype=jnp.int32)
    order = jnp.cumsum(taken.reshape(x.shape[0], -1, EXPERTS), axis=1).reshape(taken.shape)
    places = order * taken - 1
    dispatch = jax.nn.one_hot(places, CAPACITY, dtype=jnp.bfloat16).sum(axis=2)
    slots = jax.nn.one_hot(places, CAPACITY, dtype=jnp.bfloat16)
    combine = (slots * scores[..., None, None].astype(jnp.bfloat16)).sum(axis=2)
    share = taken[:, :, 0].astype(jnp.float32).mean(axis=(0, 1))
    balance = (probabilities.mean(axis=(0, 1)) * share).sum() * EXPERTS
    return dispatch, combine, balance


def einsum_experts(x: Any, w: Any) -> tuple[Any, Any]:
    """x [batch, length, embed] -> the same, and the loss that balances experts."""
    dispatch, combine, balance = routed(x, w["router"])
    slots = jnp.einsum("btd,btec->ebcd", x, dispatch)
    slots = shard(slots, "expert", "data", None, None)
    gate = jnp.einsum("ebcd,edf->ebcf", slots, w["gate"])
    hidden = jax.nn.silu(gate) * jnp.einsum("ebcd,edf->ebcf", slots, w["up"])
    results = jnp.einsum("ebcf,efd->ebcd", hidden, w["down"])
    results = shard(results, "expert", "data", None, None)
    return jnp.einsum("ebcd,btec->btd", results, combine), balance


def mixtral_loss(params: Any, tokens: Any, labels: Any) -> Any:
    """Cross entropy and the loss that balances experts: tokens and labels [batch, length]."""

    @jax.checkpoint
    def layer(x: Any, weights: Any) -> tuple[Any, Any]:
        w = bfloat16(weights)
        x = x + self_attention(rms_norm(x, w["attention_norm"]), w, causal(x.shape[1]))
        mixed, balance = einsum_experts(rms_norm(x, w["mlp_norm"]), w)
        return shard(x + mixed, BATCH, None, None), balance

    x = shard(params["embedding"].astype(jnp.bfloat16)[tokens], BATCH, None, None)
    x, balance = lax.scan(layer, x, params["layers"])
    logits = rms_norm(x, params["final_norm"]) @ params["output"].astype(jnp.bfloat16)
    return cross_entropy_by_one_hot(logits, labels) + 0.01 * balance.mean()


def mixtral_einsum() -> Case:
    """A training step of Mixtral."""
    tokens = ints(64, 2048)
    return trained(
        mixtral_loss, mixtral_weights(), (tokens, tokens), (P(BATCH), P(BATCH)), EXPERT_MESH
    )


# --- experts by ragged products of sorted tokens, as MegaBlocks -----------------------------------


def ragged_experts(x: Any, w: Any) -> Any:
    """x [batch, length, embed]; all tokens are sorted by expert, and none is dropped."""
    flat = x.reshape(-1, x.shape[-1])
    probabilities = jax.nn.softmax((flat @ w["router"]).astype(jnp.float32), axis=-1)
    scores, chosen = lax.top_k(probabilities, 2)
    order = jnp.argsort(chosen.reshape(-1))
    sizes = jnp.bincount(chosen.reshape(-1), length=EXPERTS)
    hidden = jax.nn.silu(lax.ragged_dot(flat[order // 2], w["up"], sizes))
    results = lax.ragged_dot(hidden, w["down"], sizes)
    results = jnp.zeros_like(results).at[order].set(results).reshape(-1, 2, x.shape[-1])
    return (results * scores[..., None].astype(jnp.bfloat16)).sum(axis=1).reshape(x.shape)


def ragged_loss(params: Any, tokens: Any, labels: Any) -> Any:
    """Of layers that are experts alone."""
    params = bfloat16(params)
    x = params["embedding"][tokens]
    for w in params["layers"]:
        x = x + ragged_experts(rms_norm(x, w["norm"]), w)
    return cross_entropy(x @ params["embedding"].T, labels)


def mixtral_ragged() -> Case:
    """A training step of two layers of experts."""
    embed, mlp, vocab = 2048, 7168, 32_000
    layer = {
        "router": weight((embed, EXPERTS)),
        "up": weight((EXPERTS, embed, mlp), None, "fsdp"),
        "down": weight((EXPERTS, mlp, embed), None, None, "fsdp"),
        "norm": weight((embed,)),
    }
    weights = {"embedding": weight((vocab, embed), None, "fsdp"), "layers": [layer, layer]}
    tokens, place = ints(64, 1024), P(("data", "fsdp"))
    return trained(
        ragged_loss, weights, (tokens, tokens), (place, place), {"data": 4, "fsdp": 8}
    )


# --- DeepSeek: latent attention, shared and routed experts, dispatched by a scatter ---------------

FINE_EXPERTS, CHOSEN = 64, 6
LATENT, ROTARY, HEAD = 512, 64, 128


def deepseek_weights() -> dict[str, Any]:
    """A smaller DeepSeek V2; routed experts lie over an axis of their own."""
    embed, heads, mlp, vocab = 2048, 16, 1408, 102_400
    layer = {
        "query": weight((embed, heads, HEAD + ROTARY), "data"),
        "compress": weight((embed, LATENT + ROTARY), "data"),
        "key": weight((LATENT, heads, HEAD)),
        "value": weight((LATENT, heads, HEAD)),
        "attention_out": weight((heads, HEAD, embed), None, None, "data"),
        "latent_norm": weight((LATENT,)),
        "attention_norm": weight((embed,)),
        "mlp_norm": weight((embed,)),
        "router": weight((embed, FINE_EXPERTS)),
        "gate_up": weight((FINE_EXPERTS, embed, 2, mlp), "expert", "data"),
        "down": weight((FINE_EXPERTS, mlp, embed), "expert", None, "data"),
        "shared_gate_up": weight((embed, 2, 2 * mlp), "data"),
        "shared_down": weight((2 * mlp, embed), None, "data"),
    }
    return {
        "embedding": weight((vocab, embed), None, "data"),
        "output": weight((embed, vocab), "data"),
        "layers": stacked(4, layer),
    }


def latent_attention(x: Any, w: Any) -> Any:
    """Keys and values are computed from a narrow latent vector; x [batch, length, embed]."""
    query = jnp.einsum("btd,dhk->bthk", x, w["query"])
    query = jnp.concatenate([query[..., :HEAD], rotary(query[..., HEAD:])], axis=-1)
    compressed = x @ w["compress"]
    latent = rms_norm(compressed[..., :LATENT], w["latent_norm"])
    position = rotary(compressed[..., None, LATENT:])
    key = jnp.einsum("btr,rhk->bthk", latent, w["key"])
    position = jnp.broadcast_to(position, (*key.shape[:-1], ROTARY))
    value = jnp.einsum("btr,rhk->bthk", latent, w["value"])
    key = jnp.concatenate([key, position], axis=-1)
    mixed = attention(query, key, value, causal(x.shape[1]))
    return jnp.einsum("bthk,hkd->btd", mixed, w["attention_out"])


def slots_of(experts: Any, capacity: int) -> Any:
    """Places in a row's buffer of its sorted choices [batch, choices]; past its end for those
    that an expert has no room for."""
    count = experts.shape[1]
    first = jax.vmap(lambda row: jnp.searchsorted(row, row))(experts)
    rank = jnp.arange(count) - first
    return jnp.where(rank < capacity, experts * capacity + rank, FINE_EXPERTS * capacity)


def scattered_experts(x: Any, w: Any) -> Any:
    """x [batch, length, embed]; each row sorts its tokens by expert and scatters them into a
    buffer, and an expert drops what it has no room for."""
    batch, length, embed = x.shape
    count = length * CHOSEN
    capacity = count // FINE_EXPERTS * 5 // 4
    size = FINE_EXPERTS * capacity
    probabilities = jax.nn.softmax((x @ w["router"]).astype(jnp.float32), axis=-1)
    scores, chosen = lax.top_k(probabilities, CHOSEN)
    chosen = chosen.reshape(batch, count)
    order = jnp.argsort(chosen, axis=1)
    slots = slots_of(jnp.take_along_axis(chosen, order, axis=1), capacity)
    taken = jnp.take_along_axis(x, (order // CHOSEN)[..., None], axis=1)

    def fill(slots: Any, taken: Any) -> Any:
        return jnp.zeros((size, embed), x.dtype).at[slots].set(taken, mode="drop")

    def add(places: Any, results: Any) -> Any:
        return jnp.zeros((length, embed), x.dtype).at[places].add(results)

    buffer = jax.vmap(fill)(slots, taken).reshape(batch, FINE_EXPERTS, capacity, embed)
    buffer = shard(buffer, "data", "expert", None, None)
    both = jnp.einsum("becd,edzf->beczf", buffer, w["gate_up"])
    hidden = jax.nn.silu(both[..., 0, :]) * both[..., 1, :]
    results = jnp.einsum("becf,efd->becd", hidden, w["down"])
    results = shard(results, BATCH, None, None, None).reshape(batch, size, embed)
    results = jnp.take_along_axis(results, jnp.minimum(slots, size - 1)[..., None], axis=1)
    results = results * (slots < size)[..., None].astype(x.dtype)
    scores = jnp.take_along_axis(scores.reshape(batch, count), order, axis=1).astype(x.dtype)
    return jax.vmap(add)(order // CHOSEN, results * scores[..., None])


def deepseek_loss(params: Any, tokens: Any, labels: Any) -> Any:
    """Cross entropy: tokens and labels [batch, length]."""

    @jax.checkpoint
    def layer(x: Any, weights: Any) -> tuple[Any, None]:
        w = bfloat16(weights)
        x = x + latent_attention(rms_norm(x, w["attention_norm"]), w)
        h = rms_norm(x, w["mlp_norm"])
        both = jnp.einsum("btd,dzf->btzf", h, w["shared_gate_up"])
        shared = (jax.nn.silu(both[:, :, 0]) * both[:, :, 1]) @ w["shared_down"]
        return shard(x + shared + scattered_experts(h, w), BATCH, None, None), None

    x = shard(params["embedding"].astype(jnp.bfloat16)[tokens], BATCH, None, None)
    x, _ = lax.scan(layer, x, params["layers"])
    return cross_entropy(x @ params["output"].astype(jnp.bfloat16), labels)


def deepseek() -> Case:
    """A training step of DeepSeek."""
    tokens = ints(64, 2048)
    return trained(
        deepseek_loss, deepseek_weights(), (tokens, tokens), (P(BATCH), P(BATCH)), EXPERT_MESH
    )


PROGRAMS = (
    program(
        "mixtral_einsum",
        "Mixtral; experts on an axis, reached by products with one-hot tensors",
        mixtral_einsum,
    ),
    program(
        "mixtral_ragged",
        "experts by ragged products of sorted tokens; fsdp, nothing annotated inside",
        mixtral_ragged,
    ),
    program(
        "deepseek",
        "DeepSeek; experts on an axis, reached by a sort and a scatter of each row's tokens",
        deepseek,
    ),
)
