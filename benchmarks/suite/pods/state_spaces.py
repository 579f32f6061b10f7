"""State spaces and linear recurrences in place of most attention."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from benchmarks.suite.case import Case, ints
from benchmarks.suite.pods.common import (
    Axis,
    Weight,
    attention,
    bfloat16,
    causal,
    cross_entropy_by_one_hot,
    program,
    rms_norm,
    rotary,
    split_heads,
    stacked,
    trained,
    weight,
)
from benchmarks.suite.programs.optimizers import cross_entropy
from sharding import shard

BATCH: Axis = ("data", "fsdp")


# --- Mamba 2 --------------------------------------------------------------------------------------

MAMBA_HEADS, MAMBA_HEAD, STATE, CHUNK = 64, 64, 128, 256


def mamba_weights() -> dict[str, Any]:
    """Eight layers of Mamba 2 with 1.3 billion parameters."""
    embed, vocab, inner = 2048, 50_304, MAMBA_HEADS * MAMBA_HEAD
    layer = {
        "gate": weight((embed, inner), "fsdp", "tensor"),
        "input": weight((embed, inner), "fsdp", "tensor"),
        "write_read": weight((embed, 2 * STATE), "fsdp"),
        "time_step": weight((embed, MAMBA_HEADS), "fsdp", "tensor"),
        "time_step_bias": weight((MAMBA_HEADS,), "tensor"),
        "filter": weight((4, 1, inner), None, None, "tensor"),
        "decay": weight((MAMBA_HEADS,), "tensor"),
        "skip": weight((MAMBA_HEADS,), "tensor"),
        "norm": weight((embed,)),
        "gated_norm": weight((inner,), "tensor"),
        "output": weight((inner, embed), "tensor", "fsdp"),
    }
    return {
        "embedding": weight((vocab, embed), "tensor", "fsdp"),
        "final_norm": weight((embed,)),
        "layers": stacked(8, layer),
    }


def filtered(x: Any, taps: Any) -> Any:
    """Each channel of x [batch, length, channels] by its own causal filter [taps, 1, channels]."""
    return lax.conv_general_dilated(
        x, taps, (1,), [(taps.shape[0] - 1, 0)], dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=x.shape[-1],
    )  # fmt: skip


def state_space(x: Any, decay: Any, write: Any, read: Any) -> Any:
    """The state-space dual (Dao and Gu, arXiv 2405.21060): products inside chunks of positions, a
    recurrence of states between them.

    Args:
      x: [batch, length, heads, head dim].
      decay: logarithms, [batch, length, heads].
      write, read: of the state, [batch, length, state].
    """
    batch, length, heads, width = x.shape

    def chunked(a: Any) -> Any:
        return a.reshape(batch, length // CHUNK, CHUNK, *a.shape[2:])

    x, decay, write, read = (chunked(a) for a in (x, decay, write, read))
    total = jnp.cumsum(jnp.moveaxis(decay, 3, 1), axis=-1)
    between = total[..., :, None] - total[..., None, :]
    inside = jnp.exp(jnp.where(causal(CHUNK), between, -jnp.inf)).astype(x.dtype)
    y = jnp.einsum("bcln,bcsn,bhcls,bcshp->bclhp", read, write, inside, x)
    left = jnp.exp(total[..., -1:] - total).astype(x.dtype)
    states = jnp.einsum("bcln,bhcl,bclhp->bchpn", write, left, x).astype(jnp.float32)

    def advance(state: Any, chunk: Any) -> tuple[Any, Any]:
        decay, added = chunk
        return state * decay[..., None, None] + added, state

    decays = jnp.moveaxis(jnp.exp(total[..., -1]), 2, 0)
    start = jnp.zeros((batch, heads, width, STATE), jnp.float32)
    _, before = lax.scan(advance, start, (decays, jnp.moveaxis(states, 1, 0)))
    reached = jnp.exp(total).astype(x.dtype)
    carried = jnp.einsum("bcln,cbhpn,bhcl->bclhp", read, before.astype(x.dtype), reached)
    return (y + carried).reshape(batch, length, heads, width)


def mamba_layer(x: Any, weights: Any) -> tuple[Any, None]:
    """x [batch, length, embed]."""
    w = bfloat16(weights)
    h = rms_norm(x, w["norm"])
    inputs = split_heads(jax.nn.silu(filtered(h @ w["input"], w["filter"])), MAMBA_HEADS)
    write, read = jnp.split(h @ w["write_read"], 2, axis=-1)
    step = jax.nn.softplus((h @ w["time_step"] + w["time_step_bias"]).astype(jnp.float32))
    decay = -jnp.exp(w["decay"].astype(jnp.float32)) * step
    y = state_space(inputs * step[..., None].astype(x.dtype), decay, write, read)
    y = (y + inputs * w["skip"][:, None]).reshape(*x.shape[:2], -1)
    y = rms_norm(y * jax.nn.silu(h @ w["gate"]), w["gated_norm"])
    return shard(x + y @ w["output"], BATCH, None, None), None


def mamba_loss(params: Any, tokens: Any, labels: Any) -> Any:
    """Cross entropy: tokens and labels [batch, length]."""
    embedding = params["embedding"].astype(jnp.bfloat16)
    x = shard(embedding[tokens], BATCH, None, None)
    x, _ = lax.scan(jax.checkpoint(mamba_layer), x, params["layers"])
    logits = rms_norm(x, params["final_norm"]) @ embedding.T
    return cross_entropy(shard(logits, BATCH, None, "tensor"), labels)


def mamba2() -> Case:
    """A training step of Mamba 2."""
    tokens = ints(64, 4096)
    return trained(
        mamba_loss, mamba_weights(), (tokens, tokens), (P(BATCH), P(BATCH)),
        {"data": 2, "fsdp": 4, "tensor": 4},
    )  # fmt: skip


# --- Griffin --------------------------------------------------------------------------------------

GRIFFIN_HEADS, WINDOW = 16, 1024


def griffin_weights() -> dict[str, Any]:
    """Two blocks of two recurrences and one attention."""
    embed, mlp, vocab = 2048, 6144, 32_000
    square, norm = weight((embed, embed), "fsdp"), weight((embed,))
    head = embed // GRIFFIN_HEADS

    def recurrence() -> dict[str, Weight]:
        blocks = weight((GRIFFIN_HEADS, head, head))
        return {
            "input": square, "branch": square, "output": square, "norm": norm,
            "filter": weight((4, 1, embed)), "input_gate": blocks, "decay_gate": blocks,
            "decay": weight((embed,)),
        }  # fmt: skip

    def attend() -> dict[str, Weight]:
        one_head = weight((embed, head), "fsdp")
        return {"query": square, "key": one_head, "value": one_head, "output": square, "norm": norm}

    def feed() -> dict[str, Weight]:
        into = weight((embed, mlp), "fsdp")
        return {"gate": into, "up": into, "down": weight((mlp, embed), "fsdp"), "norm": norm}

    def block() -> dict[str, Any]:
        mixers = (recurrence(), recurrence(), attend())
        return {"mixers": mixers, "mlps": tuple(feed() for _ in mixers)}

    embedding = weight((vocab, embed), "fsdp")
    return {"embedding": embedding, "blocks": [block() for _ in range(2)]}


def gated_recurrence(x: Any, w: Any) -> Any:
    """Linear in its state, which decays as gates of the input say; x [batch, length, embed]."""
    h = rms_norm(x, w["norm"])
    z = filtered(h @ w["input"], w["filter"])
    heads = split_heads(z, GRIFFIN_HEADS)

    def gate(name: str) -> Any:
        logits = jnp.einsum("bthi,hij->bthj", heads, w[name]).reshape(z.shape)
        return jax.nn.sigmoid(logits.astype(jnp.float32))

    log_decay = -8 * gate("decay_gate") * jax.nn.softplus(w["decay"].astype(jnp.float32))
    inputs = z.astype(jnp.float32) * gate("input_gate") * jnp.sqrt(1 - jnp.exp(2 * log_decay))

    def compose(left: Any, right: Any) -> Any:
        return left[0] * right[0], left[1] * right[0] + right[1]

    _, states = lax.associative_scan(compose, (jnp.exp(log_decay), inputs), axis=1)
    return x + (states.astype(x.dtype) * jax.nn.gelu(h @ w["branch"])) @ w["output"]


def local_attention(x: Any, w: Any) -> Any:
    """All heads share one of keys, and see a window; x [batch, length, embed]."""
    h = rms_norm(x, w["norm"])
    here, there = jnp.arange(x.shape[1])[:, None], jnp.arange(x.shape[1])
    mask = (there <= here) & (here - there < WINDOW)
    query = rotary(split_heads(h @ w["query"], GRIFFIN_HEADS))
    key, value = (split_heads(h @ w[name], 1) for name in ("key", "value"))
    return x + attention(query, rotary(key), value, mask).reshape(x.shape) @ w["output"]


def gated_mlp(x: Any, w: Any) -> Any:
    """A feed-forward layer: x [batch, length, embed]."""
    h = rms_norm(x, w["norm"])
    return x + (jax.nn.gelu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]


@jax.checkpoint
def griffin_block(x: Any, w: Any) -> Any:
    """Two recurrences and an attention, each with a feed-forward layer."""
    mixers = (gated_recurrence, gated_recurrence, local_attention)
    for mixer, weights, mlp in zip(mixers, w["mixers"], w["mlps"], strict=True):
        x = gated_mlp(mixer(x, weights), mlp)
    return x


def griffin_loss(params: Any, tokens: Any, labels: Any) -> Any:
    """Cross entropy of capped logits: tokens and labels [batch, length]."""
    params = bfloat16(params)
    x = params["embedding"][tokens]
    for w in params["blocks"]:
        x = griffin_block(x, w)
    logits = x @ params["embedding"].T
    return cross_entropy_by_one_hot(30 * jnp.tanh(logits / 30), labels)


def griffin() -> Case:
    """A training step of Griffin."""
    tokens = ints(128, 2048)
    return trained(
        griffin_loss, griffin_weights(), (tokens, tokens), (P(BATCH), P(BATCH)),
        {"data": 4, "fsdp": 8},
    )  # fmt: skip


PROGRAMS = (
    program("mamba2", "Mamba 2; fsdp and tensor, annotated between layers", mamba2),
    program("griffin", "Griffin; fsdp, nothing annotated inside", griffin),
)
