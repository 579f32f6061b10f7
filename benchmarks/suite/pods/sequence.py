"""Encoders with decoders: T5, and translation of packed sentences."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from benchmarks.suite.case import Case, everywhere, ints
from benchmarks.suite.pods.common import (
    Axis,
    Weight,
    attention,
    bfloat16,
    causal,
    layer_norm,
    program,
    rms_norm,
    shapes_of,
    stacked,
    trained,
    weight,
)

BATCH: Axis = ("data", "fsdp")


# --- T5 -------------------------------------------------------------------------------------------

T5_LAYERS, BUCKETS, FARTHEST = 12, 32, 128


def t5_weights() -> dict[str, Any]:
    """T5 large with half of its layers."""
    embed, heads, head_dim, mlp, vocab = 1024, 16, 64, 2816, 32_128

    def attend() -> dict[str, Weight]:
        into = weight((embed, heads, head_dim), None, "model")
        layer = {"query": into, "key": into, "value": into, "norm": weight((embed,))}
        layer["out"] = weight((heads, head_dim, embed), "model")
        return stacked(T5_LAYERS, layer)

    def feed() -> dict[str, Weight]:
        into = weight((embed, mlp), None, "model")
        layer = {"gate": into, "up": into, "norm": weight((embed,))}
        layer["down"] = weight((mlp, embed), "model")
        return stacked(T5_LAYERS, layer)

    return {
        "embedding": weight((vocab, embed), "model"),
        "output": weight((embed, vocab), None, "model"),
        "encoder_bias": weight((BUCKETS, heads), None, "model"),
        "decoder_bias": weight((BUCKETS, heads), None, "model"),
        "encoder": {"self": attend(), "mlp": feed()},
        "decoder": {"self": attend(), "cross": attend(), "mlp": feed()},
        "encoder_norm": weight((embed,)),
        "decoder_norm": weight((embed,)),
    }


def relative_buckets(length: int, both_ways: bool) -> Any:
    """Buckets of how far positions are apart, in steps that grow: int32 [length, length]."""
    apart = jnp.arange(length) - jnp.arange(length)[:, None]
    count = BUCKETS // 2 if both_ways else BUCKETS
    offset = jnp.where(apart > 0, count, 0) if both_ways else 0
    apart = jnp.abs(apart) if both_ways else jnp.maximum(-apart, 0)
    exact = count // 2
    far = jnp.log(apart.astype(jnp.float32) / exact + 1e-6) / np.log(FARTHEST / exact)
    far = jnp.minimum(exact + (far * exact).astype(jnp.int32), count - 1)
    return offset + jnp.where(apart < exact, apart, far)


def t5_attention(x: Any, memory: Any, weights: Any, bias: Any) -> Any:
    """x [batch, length, embed] attends to itself or to `memory`; bias is added to logits."""
    w = bfloat16(weights)
    h = rms_norm(x, w["norm"])
    memory = h if memory is None else memory
    query = jnp.einsum("btd,dhk->bthk", h, w["query"])
    key, value = (jnp.einsum("btd,dhk->bthk", memory, w[name]) for name in ("key", "value"))
    logits = jnp.einsum("bshk,bthk->bhst", query, key).astype(jnp.float32) + bias
    mixed = jnp.einsum("bhst,bthk->bshk", jax.nn.softmax(logits, -1).astype(x.dtype), value)
    return x + jnp.einsum("bshk,hkd->bsd", mixed, w["out"])


def t5_mlp(x: Any, weights: Any) -> Any:
    """A feed-forward layer: x [batch, length, embed]."""
    w = bfloat16(weights)
    h = rms_norm(x, w["norm"])
    return x + (jax.nn.gelu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]


def biases(table: Any, length: int, both_ways: bool) -> Any:
    """Of each head: [1, heads, length, length]."""
    return jnp.moveaxis(table[relative_buckets(length, both_ways)], -1, 0)[None]


def t5_loss(params: Any, source: Any, inputs: Any, labels: Any) -> Any:
    """Cross entropy and z-loss; tokens 0 are padding."""
    embedding = params["embedding"].astype(jnp.bfloat16)
    padding = jnp.where(source > 0, 0.0, -1e9)[:, None, None]
    later = jnp.where(causal(inputs.shape[1]), 0.0, -1e9)
    encoder_bias = biases(params["encoder_bias"], source.shape[1], True) + padding
    decoder_bias = biases(params["decoder_bias"], inputs.shape[1], False) + later

    @jax.checkpoint
    def encode(x: Any, w: Any) -> tuple[Any, None]:
        return t5_mlp(t5_attention(x, None, w["self"], encoder_bias), w["mlp"]), None

    memory, _ = lax.scan(encode, embedding[source], params["encoder"])
    memory = rms_norm(memory, params["encoder_norm"])

    @jax.checkpoint
    def decode(x: Any, w: Any) -> tuple[Any, None]:
        x = t5_attention(x, None, w["self"], decoder_bias)
        return t5_mlp(t5_attention(x, memory, w["cross"], padding), w["mlp"]), None

    x, _ = lax.scan(decode, embedding[inputs], params["decoder"])
    logits = rms_norm(x, params["decoder_norm"]) @ params["output"].astype(jnp.bfloat16)
    logits = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    known = (labels > 0).astype(jnp.float32)
    return ((total - chosen + 1e-4 * total**2) * known).sum() / known.sum()


def t5_adafactor() -> Case:
    """The factored second moments of Adafactor are small, and whole on every device."""
    weights, optimizer, batch = t5_weights(), optax.adafactor(1e-2), 256
    state = jax.eval_shape(optimizer.init, shapes_of(weights))
    inputs = (ints(batch, 512), ints(batch, 128), ints(batch, 128))
    return trained(
        t5_loss, weights, inputs, (P("data"),) * 3, {"data": 8, "model": 4}, optimizer,
        state_specs=everywhere(state),
    )  # fmt: skip


# --- translation of packed sentences --------------------------------------------------------------


def translator_weights() -> dict[str, Any]:
    """The example of flax's repository, with layers that are not stacked."""
    embed, heads, mlp, vocab = 1024, 16, 4096, 32_000

    def attend() -> dict[str, Weight]:
        return {
            "qkv": weight((3, embed, heads, embed // heads), None, "fsdp", "tensor"),
            "out": weight((heads, embed // heads, embed), "tensor", None, "fsdp"),
            "scale": weight((embed,)),
            "shift": weight((embed,)),
        }

    def feed() -> dict[str, Weight]:
        return {
            "up": weight((embed, mlp), "fsdp", "tensor"),
            "up_bias": weight((mlp,), "tensor"),
            "down": weight((mlp, embed), "tensor", "fsdp"),
            "down_bias": weight((embed,)),
            "scale": weight((embed,)),
            "shift": weight((embed,)),
        }

    return {
        "embedding": weight((vocab, embed), "tensor", "fsdp"),
        "encoder": [{"self": attend(), "mlp": feed()} for _ in range(3)],
        "decoder": [{"self": attend(), "cross": attend(), "mlp": feed()} for _ in range(3)],
    }


def translator_attention(x: Any, memory: Any, weights: Any, mask: Any) -> Any:
    """x [batch, length, embed] attends to itself or to `memory`, where mask [batch, length, keys]
    lets it."""
    w = bfloat16(weights)
    h = layer_norm(x, w["scale"], w["shift"])
    memory = h if memory is None else memory
    query = jnp.einsum("btd,dhk->bthk", h, w["qkv"][0])
    key, value = jnp.einsum("btd,cdhk->cbthk", memory, w["qkv"][1:])
    mixed = attention(query, key, value, mask[:, None, None])
    return x + jnp.einsum("bthk,hkd->btd", mixed, w["out"])


def translator_mlp(x: Any, weights: Any) -> Any:
    """A feed-forward layer: x [batch, length, embed]."""
    w = bfloat16(weights)
    h = jax.nn.relu(layer_norm(x, w["scale"], w["shift"]) @ w["up"] + w["up_bias"])
    return x + h @ w["down"] + w["down_bias"]


def translation_loss(
    params: Any, source: Any, source_sentences: Any, source_places: Any,
    target: Any, target_sentences: Any, target_places: Any, labels: Any,
) -> Any:  # fmt: skip
    """Cross entropy with smoothed labels; all arguments but the first are [batch, length].

    Args:
      source_sentences, target_sentences: which sentence of the row a token is of; 0 is padding.
      source_places, target_places: of a token in its sentence.
    """
    embedding = params["embedding"].astype(jnp.bfloat16)
    vocab, embed = embedding.shape
    length = source.shape[1]
    angles = jnp.arange(length)[:, None] / 1e4 ** (jnp.arange(embed) / embed)
    places = jnp.sin(angles).astype(jnp.bfloat16)
    shifted = jnp.pad(target, ((0, 0), (1, 0)))[:, :-1]
    memory = embedding[source] * embed**0.5 + places[source_places]
    x = embedding[shifted] * embed**0.5 + places[target_places]
    rows, columns = target_sentences[:, :, None], source_sentences[:, None]
    for w in params["encoder"]:
        mask = source_sentences[:, :, None] == columns
        memory = translator_mlp(translator_attention(memory, None, w["self"], mask), w["mlp"])
    for w in params["decoder"]:
        mask = (rows == target_sentences[:, None]) & causal(length)
        x = translator_attention(x, None, w["self"], mask)
        x = translator_attention(x, memory, w["cross"], rows == columns)
        x = translator_mlp(x, w["mlp"])
    logits = (x @ embedding.T).astype(jnp.float32) / embed**0.5
    smooth = jax.nn.one_hot(labels, vocab) * 0.9 + 0.1 / vocab
    loss = -(smooth * jax.nn.log_softmax(logits)).sum(axis=-1)
    known = (target_sentences > 0).astype(jnp.float32)
    return (loss * known).sum() / known.sum()


def translation_packed() -> Case:
    """A training step of the translator."""
    inputs = (ints(256, 256),) * 7
    return trained(
        translation_loss, translator_weights(), inputs, (P(BATCH),) * 7,
        {"data": 4, "fsdp": 4, "tensor": 2},
    )  # fmt: skip


PROGRAMS = (
    program(
        "t5_adafactor",
        "T5 with relative positions and Adafactor; heads and hidden units on model",
        t5_adafactor,
    ),
    program(
        "translation_packed",
        "encoder and decoder of packed sentences; fsdp and tensor, nothing annotated inside",
        translation_packed,
    ),
)
