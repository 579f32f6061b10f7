"""Serving a Llama with 8 billion parameters: a prompt, and one token after another.

The cache of keys and values is an argument whose memory the result takes. Parameters are bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from benchmarks.suite.case import Case, array, ints
from benchmarks.suite.pods.common import (
    Axis,
    attention,
    attention_weights,
    causal,
    program,
    project,
    random_bits,
    rms_norm,
    shapes_of,
    specs_of,
    stacked,
    weight,
)

EMBED, HEADS, KV_HEADS, HEAD = 4096, 32, 8, 128
MESH = {"data": 4, "tensor": 8}
CACHE = P(None, "data", None, "tensor")

# (cached keys, cached values, keys, values, positions) of a layer -> both caches with what is new,
# then what queries attend to: keys, values, mask.
Update = Callable[[Any, Any, Any, Any, Any], tuple[Any, Any, Any, Any, Any]]


def decoder_weights(layers: int, keys: tuple[Axis, ...] = (None, "tensor")) -> dict[str, Any]:
    """Heads, hidden units and the vocabulary lie over tensor.

    Args:
      keys: axes of weights of keys and values.
    """
    mlp, vocab = 14_336, 128_256
    layer = {
        **attention_weights(EMBED, HEADS, KV_HEADS, HEAD, None, "tensor", keys),
        "gate": weight((EMBED, mlp), None, "tensor"),
        "up": weight((EMBED, mlp), None, "tensor"),
        "down": weight((mlp, EMBED), "tensor"),
        "attention_norm": weight((EMBED,)),
        "mlp_norm": weight((EMBED,)),
    }
    return {
        "embedding": weight((vocab, EMBED), "tensor"),
        "output": weight((EMBED, vocab), None, "tensor"),
        "layers": stacked(layers, layer),
    }


def cache_of(layers: int, batch: int, length: int) -> Any:
    """Keys and values of all layers."""
    return (array(layers, batch, length, KV_HEADS, HEAD, dtype=jnp.bfloat16),) * 2


def decode(
    update: Update, params: Any, cache: Any, tokens: Any, positions: Any
) -> tuple[Any, Any]:
    """Logits [batch, length, vocab] of tokens [batch, length], and the cache with them."""

    def layer(x: Any, of_layer: Any) -> tuple[Any, Any]:
        w, keys, values = of_layer
        query, key, value = project(rms_norm(x, w["attention_norm"]), w)
        keys, values, key, value, mask = update(keys, values, key, value, positions)
        mixed = attention(query, key, value, mask)
        x = x + jnp.einsum("bthk,hkd->btd", mixed, w["attention_out"])
        h = rms_norm(x, w["mlp_norm"])
        return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"], (keys, values)

    x = params["embedding"][tokens]
    x, cache = lax.scan(layer, x, (params["layers"], *cache))
    return (x @ params["output"]).astype(jnp.float32), cache


def one_more(keys: Any, values: Any, key: Any, value: Any, positions: Any) -> Any:
    """Each sequence writes at its own position, and attends to all up to it."""

    def put(cache: Any, new: Any, position: Any) -> Any:
        return lax.dynamic_update_slice(cache, new, (position, 0, 0))

    keys = jax.vmap(put)(keys, key, positions)
    values = jax.vmap(put)(values, value, positions)
    mask = jnp.arange(keys.shape[1]) <= positions[:, None]
    return keys, values, keys, values, mask[:, None, None, None]


def whole_prompt(keys: Any, values: Any, key: Any, value: Any, positions: Any) -> Any:
    """Prompts are written from the start of an empty cache, and attend to themselves."""
    start = (0, 0, 0, 0)
    keys = lax.dynamic_update_slice(keys, key, start)
    values = lax.dynamic_update_slice(values, value, start)
    return keys, values, key, value, causal(key.shape[1])


def decode_sampled(params: Any, cache: Any, tokens: Any, positions: Any, bits: Any) -> Any:
    """One token more: drawn from the 50 likeliest, at temperature 0.7."""
    logits, cache = decode(one_more, params, cache, tokens[:, None], positions)
    likely, chosen = lax.top_k(logits[:, 0] / 0.7, 50)
    noise = jax.random.gumbel(jax.random.wrap_key_data(bits), likely.shape)
    drawn = jnp.argmax(likely + noise, axis=-1)
    return jnp.take_along_axis(chosen, drawn[:, None], axis=1)[:, 0], cache, positions + 1


def decode_greedy(params: Any, cache: Any, tokens: Any, positions: Any) -> Any:
    """One token more, the likeliest."""
    logits, cache = decode(one_more, params, cache, tokens[:, None], positions)
    return logits[:, 0].argmax(axis=-1), cache, positions + 1


def prefill_prompts(params: Any, cache: Any, tokens: Any, lengths: Any) -> Any:
    """The token after each prompt [batch, length], and the cache with the prompts."""
    logits, cache = decode(whole_prompt, params, cache, tokens, None)
    last = jnp.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return last.argmax(axis=-1), cache


def served(
    fun: Callable, weights: Any, cache: Any, place: P, inputs: tuple[Any, ...],
    mesh: Mapping[str, int], results: int,
) -> Case:  # fmt: skip
    """A step of serving: (parameters, cache, *inputs) -> tokens, cache, positions.

    Args:
      place: how keys and values lie.
      inputs: along the batch; random bits are whole.
      results: how many the step has.
    """
    whole = random_bits()
    specs = tuple(P() if leaf == whole else P("data") for leaf in inputs)
    outs = (P("data"), (place, place), P("data"))
    return Case(
        fun=fun,
        args=(shapes_of(weights, jnp.bfloat16), cache, *inputs),
        mesh=mesh,
        in_specs=(specs_of(weights), (place, place), *specs),
        out_specs=outs[:results],
        donate=(1,),
    )


def decode_step() -> Case:
    """Sampling for 128 sequences, with a cache of 8192 positions."""
    layers, batch = 32, 128
    inputs = (ints(batch), ints(batch), random_bits())
    cache = cache_of(layers, batch, 8192)
    return served(decode_sampled, decoder_weights(layers), cache, CACHE, inputs, MESH, 3)


def decode_long() -> Case:
    """Eight heads of keys do not divide 16 devices: the cache lies along its positions."""
    layers, batch = 32, 32
    weights = decoder_weights(layers, keys=("tensor",))
    inputs = (ints(batch), ints(batch))
    return served(
        decode_greedy, weights, cache_of(layers, batch, 32_768), P(None, "data", "tensor"),
        inputs, {"data": 2, "tensor": 16}, 3,
    )  # fmt: skip


def prefill() -> Case:
    """Prompts of 4096 tokens."""
    layers, batch = 8, 32
    inputs = (ints(batch, 4096), ints(batch))
    cache = cache_of(layers, batch, 8192)
    return served(prefill_prompts, decoder_weights(layers), cache, CACHE, inputs, MESH, 2)


PROGRAMS = (
    program("decode_step", "one token more; heads on tensor, sequences on data", decode_step),
    program("decode_long", "one token more; the cache's positions on tensor", decode_long),
    program("prefill_step", "prompts into a cache; heads on tensor, sequences on data", prefill),
)
