"""Generation with a key/value cache that stays on the mesh, sharded.

Shape suffixes: B sample, S prompt position, N new position, V vocab.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from models.shardings import shards
from models.transformer import Cache, Transformer, TransformerConfig, init_cache
from sharding import shard
from training.program import Plan
from training.report import sharding_text
from training.tokenizer import Tokenizer

__all__ = ["decode", "prefill", "sample"]


def sample(plan: Plan, tokenizer: Tokenizer, params: Any) -> tuple[str, str]:
    """Continues the prompt of the configuration.

    Args:
      params: as they are in the training state.

    Returns:
      The prompt with its continuation, and the sharding of the cache as text.
    """
    options, model = plan.run.sample, plan.run.model
    text = (options.prompt or "\n").encode(errors="replace")
    prompt = tokenizer.encode(text, "--prompt").astype(np.int32)
    if not len(prompt):  # a tokenizer may make nothing of spaces
        prompt = np.zeros(1, np.int32)
    # As many samples as the batch has shards, so that the cache divides evenly; one is shown.
    count = shards(dict(plan.rules).get("batch"), dict(plan.mesh.shape))
    prompt_BS = np.tile(prompt, (count, 1))
    keys = _keys(plan.run.train.seed, options.sample_bytes)
    step = partial(decode, model, options.temperature)
    start = partial(prefill, model, options.temperature, options.sample_bytes)
    params_in = plan.state_shardings.params
    abstract = jax.eval_shape(start, params, prompt_BS, keys[0])
    inferred = plan.jit(step, in_shardings=(params_in, None, None, None)).trace(
        plan.state.params, *abstract, keys[1:]
    )
    shardings = inferred.propagate().in_shardings
    first = plan.jit(start, in_shardings=(params_in, None, None), out_shardings=shardings[1:3])
    token_B, cache = first(params, prompt_BS, keys[0])
    keys_LBTKE = cache.keys_LBTKE
    cache_text = f"{keys_LBTKE.shape} {sharding_text(keys_LBTKE.sharding, keys_LBTKE.ndim)}"
    rest = plan.jit(step, in_shardings=shardings, donate_argnums=(2,))
    tokens_BN, _ = rest(params, token_B, cache, keys[1:])
    # Samples lie in all processes, and each of them prints or returns the first.
    token_B, tokens_BN = multihost_utils.process_allgather((token_B, tokens_BN), tiled=True)
    new = [token_B[:1], tokens_BN[0]]
    return tokenizer.decode(np.concatenate([prompt, *new])), cache_text


def prefill(
    model: TransformerConfig,
    temperature: float,
    num_new: int,
    params: Any,
    prompt_BS: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Reads the prompt into a cache with room for `num_new` more, and draws the first token."""
    batch, length = prompt_BS.shape
    cache = init_cache(model, batch, length + num_new)
    prompt_BS = shard(prompt_BS, "batch", None)
    logits_BSV, cache = _apply(model, params, prompt_BS, cache)
    return _draw(logits_BSV[:, -1], temperature, key), cache


def decode(
    model: TransformerConfig,
    temperature: float,
    params: Any,
    token_B: jax.Array,
    cache: Cache,
    keys: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Draws one more token after `token_B` for each of the N `keys`: tokens_BN and the cache."""
    # Named here too, where the cache enters: what a loop carries starts as it goes on.
    names = ("layers", "batch", "cache_sequence", "kv_heads", "head_dim")
    cache = cache._replace(
        keys_LBTKE=shard(cache.keys_LBTKE, *names), values_LBTKE=shard(cache.values_LBTKE, *names)
    )

    def step(carry: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
        token_B, cache = carry
        logits_BSV, cache = _apply(model, params, token_B[:, None], cache)
        token_B = _draw(logits_BSV[:, 0], temperature, key)
        return (token_B, cache), token_B

    (_, cache), tokens_NB = jax.lax.scan(step, (shard(token_B, "batch"), cache), keys)
    return tokens_NB.T, cache


def _apply(model: TransformerConfig, params: Any, tokens_BS: jax.Array, cache: Cache) -> Any:
    return Transformer(model).apply({"params": params}, tokens_BS, cache)


def _draw(logits_BV: jax.Array, temperature: float, key: jax.Array) -> jax.Array:
    # The choice compares all of the vocab, so each sample's logits come to one place first.
    logits_BV = shard(logits_BV, "batch", None)
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    key = jax.random.wrap_key_data(key)
    return jax.random.categorical(key, logits_BV / temperature).astype(jnp.int32)


def _keys(seed: int, count: int) -> np.ndarray:
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), count)
    return np.asarray(jax.random.key_data(keys))
