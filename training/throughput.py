"""How much arithmetic a token takes, and how much a device can do."""

from __future__ import annotations

from models.transformer import TransformerConfig

__all__ = ["flops_per_token", "peak_flops"]

# Dense bfloat16 FLOP/s of one JAX device, by what its `device_kind` contains; first match wins.
# A TPU v2, v3 or 7x chip is two devices.
_PEAK_BF16 = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L4", 121e12),
    ("TPU v2", 22.5e12),
    ("TPU v3", 61.5e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("TPU7x", 1153e12),
)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Peak FLOP/s of one device for matmuls in `dtype`; None where it is not known."""
    if dtype != "bfloat16":
        return None
    return next((peak for name, peak in _PEAK_BF16 if name in device_kind), None)


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
