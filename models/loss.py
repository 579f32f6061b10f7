"""The training loss: cross entropy of the next token.

Shape suffixes: B batch, S position, V vocab.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["cross_entropy"]


def cross_entropy(logits_BSV: jax.Array, targets_BS: jax.Array) -> jax.Array:
    """Mean negative log likelihood of `targets_BS` in nats, a float32 scalar."""
    logits_BSV = logits_BSV.astype(jnp.float32)
    # A comparison with an iota instead of a gather: it stays local where the vocab is sharded.
    vocab_V = jnp.arange(logits_BSV.shape[-1], dtype=targets_BS.dtype)
    chosen_BS = jnp.sum(jnp.where(targets_BS[..., None] == vocab_V, logits_BSV, 0.0), axis=-1)
    return jnp.mean(jax.nn.logsumexp(logits_BSV, axis=-1) - chosen_BS)
