"""How much arithmetic a token takes, and how much a device can do."""

from __future__ import annotations

from models.transformer import TransformerConfig
from spmd import chips

__all__ = ["flops_per_token", "peak_flops"]

def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Peak FLOP/s of one device for matmuls in `dtype`; None where it is not known, or nominal."""
    chip = chips.of_kind(device_kind)
    # how float32 is multiplied depends on the precision that each matmul asks for
    if chip is None or chip.family == "cpu" or dtype != "bfloat16":
        return None
    return chip.peak(dtype)


def flops_per_token(config: TransformerConfig, sequence: int) -> float:
    """FLOPs of one training step per token, forward and backward, recomputation not counted.

    Every weight of a matmul takes 6 (2 forward, 4 backward); attention scores and their use
    take 12 for each key position and query channel, the masked half included.
    """
    heads_dim = config.num_heads * config.head_dim
    kv_dim = config.num_kv_heads * config.head_dim
    attention = config.embed_dim * (2 * heads_dim + 2 * kv_dim)
    mlp = 3 * config.embed_dim * config.mlp_dim
    weights = config.num_layers * (attention + mlp) + config.vocab_size * config.embed_dim
    return 6.0 * weights + 12.0 * config.num_layers * heads_dim * sequence
