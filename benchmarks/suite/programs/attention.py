"""Attention over what is not here: decoding one token with a cache, and training on long sequences.

Both run the layer of transformer.py. `decode` writes this position's keys and values into a cache
that is divided by sequence and head, then attends to all of it. `long_context` divides positions,
so that queries of one device meet keys of all of them.

Shape suffixes as in transformer.py; T counts positions of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from benchmarks.suite.case import Case, Program, Size, array, normal
from benchmarks.suite.programs import transformer, transformer_by_hand
from benchmarks.suite.programs.transformer import (
    MEGATRON,
    Config,
    Rules,
    axis_rules,
    config_of,
    drawn_parameters,
    drawn_tokens,
    logits_of,
    parameter_specs,
    parameters,
    residual,
    training_case,
)
from benchmarks.suite.programs.transformer_by_hand import Hand, looked_up
from models.transformer import attend

# Parameters whole on every device; positions divided everywhere, the batch on an axis of its own.
LONG_CONTEXT: Rules = {
    "batch": "data",
    "residual_sequence": "sequence",
    "inner_sequence": "sequence",
}


def decode_step(
    config: Config, params: Any, cache: Any, tokens_B: jax.Array, position: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
    """Greedy decoding of one token for every sequence of the batch.

    Args:
      cache: keys and values, [layers, batch, position, key/value head, head dim].
      tokens_B: the last token of each sequence.
      position: its position, an int32 scalar; the cache holds those before.

    Returns:
      The next tokens, their logits [batch, vocab], and the cache with this position written.
    """

    def body(x_B1D: Any, of_layer: Any) -> tuple[Any, Any]:
        w, cache = of_layer
        attention = partial(_with_cache, cache, position)
        return transformer.layer(config, x_B1D, w, position[None], attention)

    x_B1D = residual(params["embedding"][tokens_B[:, None]])
    x_B1D, cache = lax.scan(body, x_B1D, (params["layers"], cache))
    logits_BV = logits_of(x_B1D, params)[:, 0]
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), logits_BV, cache


def _with_cache(
    cache: Any, position: jax.Array, q_B1KGE: jax.Array, k_B1KE: jax.Array, v_B1KE: jax.Array
) -> tuple[jax.Array, Any]:
    """Attention of one position to all before it, and the cache with it; of any of the heads."""
    write = partial(lax.dynamic_update_slice_in_dim, start_index=position, axis=1)
    k_BTKE, v_BTKE = write(cache[0], k_B1KE), write(cache[1], v_B1KE)
    mask_1T = position >= jnp.arange(k_BTKE.shape[1])[None]
    return attend(q_B1KGE, k_BTKE, v_BTKE, mask_1T), (k_BTKE, v_BTKE)


def _decode_by_hand(config: Config, rules: Rules) -> Callable:
    hand = Hand.of(rules)

    def step(params: Any, cache: Any, tokens_B: Any, position: Any) -> Any:
        def body(x_B1D: Any, of_layer: Any) -> tuple[Any, Any]:
            w, cache = of_layer
            attention = partial(_with_cache, cache, position)
            return transformer_by_hand.layer(hand, config, x_B1D, w, position[None], attention)

        x_B1D = hand.leave(looked_up(params["embedding"], tokens_B[:, None], hand.tensor))
        x_B1D, cache = lax.scan(body, x_B1D, (params["layers"], cache))
        x_B1D = hand.norm(x_B1D, params["final_norm"])
        logits_BV = (x_B1D @ params["output"])[:, 0]
        assert hand.tensor is not None
        return _best(logits_BV, hand.tensor), logits_BV, cache

    return step


def _best(logits_BV: jax.Array, axis: str) -> jax.Array:
    """The largest logit's token; each device of `axis` has a part of the vocabulary."""
    place_B = jnp.argmax(logits_BV, axis=-1)
    value_B = jnp.take_along_axis(logits_BV, place_B[:, None], axis=-1)[:, 0]
    token_B = (place_B + lax.axis_index(axis) * logits_BV.shape[-1]).astype(jnp.int32)
    values_NB, tokens_NB = lax.all_gather((value_B, token_B), axis)
    return jnp.take_along_axis(tokens_NB, jnp.argmax(values_NB, axis=0)[None], axis=0)[0]


def _decode(size: Size) -> Case:
    config = config_of(size, batch=size.pick(16, 128))
    params, specs = parameters(config, size.dtype), parameter_specs(MEGATRON)
    length = config.sequence
    shape = (config.layers, config.batch, length, config.kv_heads, config.head_dim)
    cache, cache_spec = array(*shape, dtype=size.dtype), P(None, "data", None, "tensor", None)
    tokens = array(config.batch, dtype=jnp.int32)

    def values(rng: np.random.Generator) -> tuple[Any, ...]:
        filled = [normal(rng, shape, size.dtype) for _ in range(2)]
        position = np.int32(length * 3 // 4)
        of_batch = drawn_tokens(rng, config, tokens.shape)
        return drawn_parameters(rng, params), tuple(filled), of_batch, position

    return Case(
        fun=partial(decode_step, config),
        args=(params, (cache, cache), tokens, array(dtype=jnp.int32)),
        mesh={"data": size.devices // 4, "tensor": 4},
        in_specs=(specs, (cache_spec, cache_spec), P("data"), P()),
        out_specs=(P("data"), P("data", "tensor"), (cache_spec, cache_spec)),
        donate=(1,),
        values=values,
        by_hand=_decode_by_hand(config, MEGATRON),
        axis_rules=axis_rules(MEGATRON),
    )


def _long_context(size: Size) -> Case:
    config = config_of(size, batch=2, sequence=size.pick(256, 8192))
    mesh = {"data": 2, "sequence": size.devices // 2}
    return training_case(config, LONG_CONTEXT, mesh, size.dtype, transformer_by_hand.by_hand)


PROGRAMS: tuple[Program, ...] = (
    Program("decode", "one token with a cache divided by sequence and key/value head", _decode),
    Program("long_context", "a training step with positions divided everywhere", _long_context),
)
