"""A decoder-only language model, written for one device.

No mesh axis is named here: parameters carry logical dim names, and a few activations are
annotated with `shard`. `models/shardings.py` says what the names mean on a mesh.

Shape suffixes (logical dims, never the sharding):
  B batch   S query position   T key position   D embed   V vocab   L layer
  K key/value head   G query head of one key/value head   E head dim   F feed-forward hidden
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sharding import shard

__all__ = ["Cache", "Transformer", "TransformerConfig", "init_cache"]

_LARGE_NEGATIVE = -1e30  # finite, so that a fully masked row gives no NaN


def _option(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The sizes and choices that define the model."""

    vocab_size: int = _option(256, "number of token ids")
    num_layers: int = _option(4, "attention and feed-forward pairs")
    embed_dim: int = _option(128, "width of the residual stream")
    mlp_dim: int = _option(384, "width inside a feed-forward layer")
    num_heads: int = _option(4, "query heads, a multiple of num_kv_heads")
    num_kv_heads: int = _option(2, "key/value heads, each shared by a group of query heads")
    head_dim: int = _option(32, "width of a head, even")
    tied_embeddings: bool = _option(True, "the output projection is the embedding table")
    dropout: float = _option(0.0, "probability that a sub-layer's output is zeroed in training")
    rope_base: float = _option(10_000.0, "longest rotary wavelength, in positions / (2 pi)")
    dtype: str = _option(
        "float32",
        "of the computation; parameters are float32; auto: bfloat16 on accelerators",
        ("auto", "float32", "bfloat16"),
    )
    scan_layers: bool = _option(True, "trace one layer and run it num_layers times")
    remat: str = _option(
        "dots",
        "what the backward pass recomputes: all but matmuls, all, none",
        ("dots", "full", "none"),
    )


class Cache(NamedTuple):
    """Keys and values of the positions seen so far.

    Attributes:
      keys_LBTKE, values_LBTKE: in the compute dtype; entries at `position` and later are unused.
      position: int32 scalar, the number of positions filled.
    """

    keys_LBTKE: jax.Array
    values_LBTKE: jax.Array
    position: jax.Array


class LayerCache(NamedTuple):
    """One layer's part of a `Cache`."""

    keys_BTKE: jax.Array
    values_BTKE: jax.Array


def init_cache(config: TransformerConfig, batch: int, length: int) -> Cache:
    """An empty cache for `batch` sequences of at most `length` positions."""
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    zeros = jnp.zeros(shape, config.dtype)
    names = ("layers", "batch", "cache_sequence", "kv_heads", "head_dim")
    return Cache(shard(zeros, *names), shard(zeros, *names), jnp.zeros((), jnp.int32))


class Transformer(nn.Module):
    """Decoder-only transformer: RMSNorm, rotary embeddings, grouped-query attention, SwiGLU."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, tokens_BS: jax.Array, cache: Cache | None = None, train: bool = False
    ) -> tuple[jax.Array, Cache | None]:
        """Logits for the token after each position.

        Args:
          tokens_BS: token ids, integers in [0, vocab_size).
          cache: the positions before `tokens_BS`; None for none, and no cache is returned.
          train: applies dropout, which needs the "dropout" random stream.

        Returns:
          logits_BSV in float32, and the cache extended by S positions (the caller sees to it
          that they fit).
        """
        cfg = self.config
        table = {"vocab": cfg.vocab_size, "embed": cfg.embed_dim}
        embedding_VD = _weights(self, "embedding", cfg.embed_dim, **table)
        x_BSD = embedding_VD[tokens_BS] * jnp.asarray(cfg.embed_dim**0.5, cfg.dtype)
        x_BSD = shard(x_BSD, "batch", "residual_sequence", "residual_embed")
        start = jnp.zeros((), jnp.int32) if cache is None else cache.position
        x_BSD, cache = self._layers(x_BSD, start, cache, train)
        x_BSD = RMSNorm(cfg, name="final_norm")(x_BSD)
        output_VD = embedding_VD
        if not cfg.tied_embeddings:
            output_VD = _weights(self, "output", cfg.embed_dim, **table)
        logits_BSV = jnp.einsum("bsd,vd->bsv", x_BSD, output_VD)
        logits_BSV = shard(logits_BSV, "batch", "sequence", "activation_vocab")
        return logits_BSV.astype(jnp.float32), cache

    def _layers(
        self, x_BSD: jax.Array, start: jax.Array, cache: Cache | None, train: bool
    ) -> tuple[jax.Array, Cache | None]:
        cfg = self.config
        block = _rematerialised(cfg)
        caches = None if cache is None else LayerCache(cache.keys_LBTKE, cache.values_LBTKE)
        if cfg.scan_layers:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
                length=cfg.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x_BSD, caches = scanned(cfg, train, name="layers")(x_BSD, start, caches)
        else:
            parts = []
            for i in range(cfg.num_layers):
                part = jax.tree.map(lambda leaf, i=i: leaf[i], caches)
                x_BSD, part = block(cfg, train, name=f"layer_{i}")(x_BSD, start, part)
                parts.append(part)
            caches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
        if cache is None:
            return x_BSD, None
        return x_BSD, Cache(caches.keys_BTKE, caches.values_BTKE, start + x_BSD.shape[1])


class Block(nn.Module):
    """Attention and feed-forward, each normalised before and added to the residual stream."""

    config: TransformerConfig
    train: bool

    @nn.compact
    def __call__(
        self, x_BSD: jax.Array, start: jax.Array, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """The residual stream after this layer, and the layer's extended cache."""
        cfg = self.config
        drop = nn.Dropout(cfg.dropout, deterministic=not self.train)
        normed_BSD = shard(
            RMSNorm(cfg, name="attention_norm")(x_BSD), "batch", "sequence", "activation_embed"
        )
        y_BSD, cache = Attention(cfg, name="attention")(normed_BSD, start, cache)
        y_BSD = shard(y_BSD, "batch", "residual_sequence", "residual_embed")
        x_BSD = x_BSD + drop(y_BSD)
        normed_BSD = shard(
            RMSNorm(cfg, name="mlp_norm")(x_BSD), "batch", "sequence", "activation_embed"
        )
        y_BSD = shard(
            SwiGLU(cfg, name="mlp")(normed_BSD), "batch", "residual_sequence", "residual_embed"
        )
        return x_BSD + drop(y_BSD), cache


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last dim, in float32, and scales."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        """Same shape and dtype as `x_BSD`."""
        scale_D: Any = self.param(
            "scale",
            nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
            (x_BSD.shape[-1],),
        )
        wide_BSD = x_BSD.astype(jnp.float32)
        mean_BS1 = jnp.mean(jnp.square(wide_BSD), axis=-1, keepdims=True)
        return (wide_BSD * jax.lax.rsqrt(mean_BS1 + 1e-6) * scale_D).astype(x_BSD.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x_BSD: jax.Array, start: jax.Array, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attends from S positions beginning at `start` to all positions up to each.

        Returns:
          The output, shaped like `x_BSD`, and `cache` with the S new keys and values written.
        """
        cfg = self.config
        heads = {"kv_heads": cfg.num_kv_heads, "head_dim": cfg.head_dim}
        # The groups are a dim of their own: no reshape stands between the heads and a mesh axis.
        grouped = {
            "kv_heads": cfg.num_kv_heads,
            "head_groups": cfg.num_heads // cfg.num_kv_heads,
            "head_dim": cfg.head_dim,
        }
        q_DKGE = _weights(self, "query", cfg.embed_dim, embed=cfg.embed_dim, **grouped)
        k_DKE = _weights(self, "key", cfg.embed_dim, embed=cfg.embed_dim, **heads)
        v_DKE = _weights(self, "value", cfg.embed_dim, embed=cfg.embed_dim, **heads)
        fan_in = cfg.num_heads * cfg.head_dim * 2 * cfg.num_layers
        o_KGED = _weights(self, "output", fan_in, **grouped, embed=cfg.embed_dim)
        positions_S = start + jnp.arange(x_BSD.shape[1], dtype=jnp.int32)
        q_BSKGE = jnp.einsum("bsd,dkge->bskge", x_BSD, q_DKGE)
        k_BSKE = jnp.einsum("bsd,dke->bske", x_BSD, k_DKE)
        v_BSKE = jnp.einsum("bsd,dke->bske", x_BSD, v_DKE)
        q_BSKGE = shard(q_BSKGE, "batch", "sequence", "kv_heads", "head_groups", "head_dim")
        q_BSKGE = rotate(q_BSKGE, positions_S, cfg.rope_base)
        k_BSKE = rotate(k_BSKE, positions_S, cfg.rope_base)
        if cache is not None:
            cache = LayerCache(
                jax.lax.dynamic_update_slice_in_dim(cache.keys_BTKE, k_BSKE, start, axis=1),
                jax.lax.dynamic_update_slice_in_dim(cache.values_BTKE, v_BSKE, start, axis=1),
            )
        k_BTKE, v_BTKE = (k_BSKE, v_BSKE) if cache is None else cache
        positions_T = positions_S if cache is None else jnp.arange(k_BTKE.shape[1])
        out_BSKGE = attend(q_BSKGE, k_BTKE, v_BTKE, positions_S[:, None] >= positions_T)
        return jnp.einsum("bskge,kged->bsd", out_BSKGE, o_KGED), cache


class SwiGLU(nn.Module):
    """Gated feed-forward: silu(x W_gate) * (x W_up), projected back."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        """Same shape and dtype as `x_BSD`."""
        cfg = self.config
        hidden = {"embed": cfg.embed_dim, "mlp": cfg.mlp_dim}
        gate_DF = _weights(self, "gate", cfg.embed_dim, **hidden)
        up_DF = _weights(self, "up", cfg.embed_dim, **hidden)
        fan_in = cfg.mlp_dim * 2 * cfg.num_layers
        down_FD = _weights(self, "down", fan_in, mlp=cfg.mlp_dim, embed=cfg.embed_dim)
        gate_BSF = jnp.einsum("bsd,df->bsf", x_BSD, gate_DF)
        up_BSF = jnp.einsum("bsd,df->bsf", x_BSD, up_DF)
        hidden_BSF = shard(nn.silu(gate_BSF) * up_BSF, "batch", "sequence", "mlp")
        return jnp.einsum("bsf,fd->bsd", hidden_BSF, down_FD)


def rotate(x_BSHE: jax.Array, positions_S: jax.Array, base: float) -> jax.Array:
    """Rotates pairs (e, e + E/2) of the last dim by angles that grow with the position.

    The dot product of two rotated vectors depends on their positions' difference only.

    Args:
      x_BSHE: any number of head dims between S and an even E.
      positions_S: integers.
      base: longest wavelength in positions / (2 pi).
    """
    half = x_BSHE.shape[-1] // 2
    frequency_E = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_SE = positions_S.astype(jnp.float32)[:, None] * frequency_E
    angle_SHE = angle_SE.reshape(-1, *(1,) * (x_BSHE.ndim - 3), half)
    cos, sin = jnp.cos(angle_SHE), jnp.sin(angle_SHE)
    low, high = jnp.split(x_BSHE.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return rotated.astype(x_BSHE.dtype)


def attend(
    q_BSKGE: jax.Array, k_BTKE: jax.Array, v_BTKE: jax.Array, mask_ST: jax.Array
) -> jax.Array:
    """Softmax attention of each query head over its key/value head; shaped like `q_BSKGE`.

    Args:
      mask_ST: True where a query may see a key. The softmax is computed in float32.
    """
    scale = q_BSKGE.shape[-1] ** -0.5
    scores_BKGST = jnp.einsum("bskge,btke->bkgst", q_BSKGE * scale, k_BTKE).astype(jnp.float32)
    scores_BKGST = jnp.where(mask_ST, scores_BKGST, _LARGE_NEGATIVE)
    weights_BKGST = jax.nn.softmax(scores_BKGST, axis=-1).astype(v_BTKE.dtype)
    return jnp.einsum("bkgst,btke->bskge", weights_BKGST, v_BTKE)


def _weights(module: Any, name: str, fan_in: int, **dims: int) -> jax.Array:
    """A float32 parameter with these named dims, in the compute dtype.

    It starts normally distributed with the variance 1 / `fan_in`. What is added to the residual
    stream counts all additions in `fan_in`, so that their sum does not grow with the depth.
    """
    init = nn.initializers.normal(fan_in**-0.5)
    boxed = nn.with_logical_partitioning(init, tuple(dims))
    return module.param(name, boxed, tuple(dims.values())).astype(module.config.dtype)


def _rematerialised(config: TransformerConfig) -> Any:
    if config.remat == "none":
        return Block
    policy = {
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "full": None,
    }[config.remat]
    # Inside scan XLA cannot merge the forward pass with its recomputation, so no barrier is
    # needed; between unrolled layers it is.
    return nn.remat(Block, prevent_cse=not config.scan_layers, policy=policy)
