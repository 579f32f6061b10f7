"""The U-Net of Stable Diffusion: convolutions and attention on a pyramid of resolutions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from benchmarks.suite.case import Case, array
from benchmarks.suite.pods.common import (
    Axis,
    Weight,
    attention,
    bfloat16,
    program,
    split_heads,
    trained,
    weight,
)
from benchmarks.suite.pods.vision import waves
from benchmarks.suite.programs.vision import conv

BATCH: Axis = ("data", "fsdp")
CHANNELS = (320, 640, 1280)
TIME, TEXT = 1280, 768


def convolution(into: int, out: int, side: int = 3) -> Weight:
    """Weights; output channels lie over fsdp."""
    return weight((side, side, into, out), None, None, None, "fsdp")


def residual_weights(into: int, out: int) -> dict[str, Weight]:
    """Of `residual`."""
    found = {
        "norm_in": weight((2, into)),
        "in": convolution(into, out),
        "time": weight((TIME, out), "fsdp"),
        "norm_out": weight((2, out)),
        "out": convolution(out, out),
    }
    if into != out:
        found["skip"] = convolution(into, out, side=1)
    return found


def attention_block_weights(width: int) -> dict[str, Weight]:
    """Of `attend`."""
    return {
        "norm": weight((2, width)),
        "qkv": weight((width, 3 * width), "fsdp"),
        "self_out": weight((width, width), "fsdp"),
        "query": weight((width, width), "fsdp"),
        "key_value": weight((TEXT, 2 * width), "fsdp"),
        "cross_out": weight((width, width), "fsdp"),
        "up_gate": weight((width, 8 * width), "fsdp"),
        "down": weight((4 * width, width), "fsdp"),
    }


def level(into: int, out: int) -> dict[str, Any]:
    """Weights of a resolution."""
    return {"residual": residual_weights(into, out), "attention": attention_block_weights(out)}


def unet_weights() -> dict[str, Any]:
    """Three resolutions, with one residual block and one attention at each."""
    first, *_, last = CHANNELS
    ups = ((last, last), (last, CHANNELS[1]), (CHANNELS[1], first))
    return {
        "input": weight((3, 3, 4, first)),
        "time_in": weight((first, TIME), "fsdp"),
        "time_out": weight((TIME, TIME), "fsdp"),
        "down": [
            level(into, out) | {"shrink": convolution(out, out)}
            for into, out in zip((first, *CHANNELS[:-1]), CHANNELS, strict=True)
        ],
        "middle": level(last, last),
        "up": [level(below + beside, beside) for below, beside in ups],
        "norm": weight((2, first)),
        "output": weight((3, 3, first, 4)),
    }


def convolve(x: Any, weights: Any, stride: int = 1) -> Any:
    """x [batch, height, width, channels]."""
    return conv(x, weights.astype(x.dtype), stride)


def group_norm(x: Any, weights: Any) -> Any:
    """x [batch, height, width, channels] in 32 groups; weights [scale and shift, channels]."""
    groups = x.reshape(*x.shape[:3], 32, -1).astype(jnp.float32)
    groups = groups - groups.mean(axis=(1, 2, 4), keepdims=True)
    variance = jnp.square(groups).mean(axis=(1, 2, 4), keepdims=True)
    normal = (groups * lax.rsqrt(variance + 1e-5)).reshape(x.shape)
    return (normal * weights[0] + weights[1]).astype(x.dtype)


def residual(x: Any, w: Any, time: Any) -> Any:
    """Two convolutions, with the time [batch, width] added between them."""
    h = convolve(jax.nn.silu(group_norm(x, w["norm_in"])), w["in"])
    h = h + (jax.nn.silu(time) @ w["time"].astype(x.dtype))[:, None, None]
    h = convolve(jax.nn.silu(group_norm(h, w["norm_out"])), w["out"])
    return h + (convolve(x, w["skip"]) if "skip" in w else x)


def attend(x: Any, weights: Any, text: Any) -> Any:
    """Pixels attend to one another and to text [batch, length, width]; then a gated layer."""
    w = bfloat16(weights)
    batch, height, width, channels = x.shape
    h = group_norm(x, w["norm"]).reshape(batch, height * width, channels)

    def mixed(*qkv: Any) -> Any:
        return attention(*(split_heads(a, 8) for a in qkv)).reshape(h.shape)

    h = h + mixed(*jnp.split(h @ w["qkv"], 3, axis=-1)) @ w["self_out"]
    key, value = jnp.split(text @ w["key_value"], 2, axis=-1)
    h = h + mixed(h @ w["query"], key, value) @ w["cross_out"]
    up, gate = jnp.split(h @ w["up_gate"], 2, axis=-1)
    return x + (h + (up * jax.nn.gelu(gate)) @ w["down"]).reshape(x.shape)


def unet_loss(params: Any, noisy: Any, times: Any, text: Any, noise: Any) -> Any:
    """Finds the noise in latents [batch, height, width, 4] at times [batch]."""
    time = jax.nn.silu(waves(times, CHANNELS[0]) @ params["time_in"]) @ params["time_out"]
    time = time.astype(jnp.bfloat16)

    def at(x: Any, w: Any) -> Any:
        return attend(residual(x, w["residual"], time), w["attention"], text)

    x = convolve(noisy.astype(jnp.bfloat16), params["input"])
    skips = []
    for w in params["down"]:
        x = at(x, w)
        skips.append(x)
        x = convolve(x, w["shrink"], stride=2)
    x = at(x, params["middle"])
    for w in params["up"]:
        batch, height, width, channels = x.shape
        x = jax.image.resize(x, (batch, 2 * height, 2 * width, channels), "nearest")
        x = at(jnp.concatenate([x, skips.pop()], axis=-1), w)
    found = convolve(jax.nn.silu(group_norm(x, params["norm"])), params["output"])
    return jnp.square(found.astype(jnp.float32) - noise).mean()


def unet() -> Case:
    """A training step of the U-Net."""
    batch = 256
    latents = array(batch, 64, 64, 4)
    inputs = (latents, array(batch), array(batch, 77, TEXT, dtype=jnp.bfloat16), latents)
    return trained(
        unet_loss, unet_weights(), inputs, (P(BATCH),) * 4, {"data": 4, "fsdp": 4},
        optax.adamw(1e-4),
    )  # fmt: skip


PROGRAMS = (program("unet_text", "U-Net of latents and text; fsdp, all inferred", unet),)
