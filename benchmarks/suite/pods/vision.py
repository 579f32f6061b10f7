"""Images: contrastive and masked pretraining of transformers, and a transformer for diffusion."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from benchmarks.suite.case import Case, array, ints
from benchmarks.suite.pods.common import (
    Axis,
    Weight,
    attention,
    averaged,
    bfloat16,
    layer_norm,
    program,
    random_bits,
    split_heads,
    stacked,
    standardized,
    trained,
    unit,
    weight,
)

BATCH: Axis = ("data", "fsdp")
PIXELS, SQUARE = 224, 16  # of an image's side, and of a patch's
PATCHES = (PIXELS // SQUARE) ** 2
COLOURS = 3 * SQUARE**2  # numbers of a patch


def patches(images: Any, side: int) -> Any:
    """Squares of images [batch, height, width, channels]: [batch, patches, numbers of each]."""
    batch, height, width, channels = images.shape
    rows, columns = height // side, width // side
    squares = images.reshape(batch, rows, side, columns, side, channels)
    squares = squares.transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(batch, rows * columns, side * side * channels)


def encoder_weights(layers: int, embed: int) -> dict[str, Weight]:
    """Stacked, for `encoded`; with four times as many hidden units."""
    mlp = 4 * embed
    layer = {
        "qkv": weight((embed, 3, embed), "fsdp"),
        "attention_out": weight((embed, embed), None, "fsdp"),
        "up": weight((embed, mlp), "fsdp"),
        "up_bias": weight((mlp,)),
        "down": weight((mlp, embed), None, "fsdp"),
        "down_bias": weight((embed,)),
        "norms": weight((4, embed)),
    }
    return stacked(layers, layer)


def encoded(x: Any, weights: Any, heads: int) -> Any:
    """Layers of a vision transformer: x [batch, length, embed]."""

    @jax.checkpoint
    def layer(x: Any, weights: Any) -> tuple[Any, None]:
        w = bfloat16(weights)
        h = layer_norm(x, w["norms"][0], w["norms"][1])
        qkv = jnp.moveaxis(jnp.einsum("btd,dce->btce", h, w["qkv"]), 2, 0)
        mixed = attention(*(split_heads(a, heads) for a in qkv))
        x = x + mixed.reshape(x.shape) @ w["attention_out"]
        h = layer_norm(x, w["norms"][2], w["norms"][3])
        return x + jax.nn.gelu(h @ w["up"] + w["up_bias"]) @ w["down"] + w["down_bias"], None

    return lax.scan(layer, x, weights)[0]


# --- SigLIP ---------------------------------------------------------------------------------------


def siglip_weights() -> dict[str, Any]:
    """Twelve layers for images and twelve for texts."""
    embed, vocab = 1024, 32_000
    ends = {
        "patch": weight((COLOURS, embed), None, "fsdp"),
        "places": weight((PATCHES, embed)),
        "image_head": weight((embed, embed), "fsdp"),
        "embedding": weight((vocab, embed), "fsdp"),
        "text_head": weight((embed, embed), "fsdp"),
    }
    return {
        "ends": ends,
        "image_encoder": encoder_weights(12, embed),
        "text_encoder": encoder_weights(12, embed),
        "temperature": weight(()),
        "bias": weight(()),
    }


def siglip_loss(params: Any, images: Any, texts: Any) -> Any:
    """A logistic loss of all pairs of images [batch, height, width, 3] and texts
    [batch, length]."""
    w = bfloat16(params["ends"])
    x = patches(images.astype(jnp.bfloat16), SQUARE) @ w["patch"] + w["places"]
    image = encoded(x, params["image_encoder"], 16).mean(axis=1) @ w["image_head"]
    text = encoded(w["embedding"][texts], params["text_encoder"], 16)[:, -1] @ w["text_head"]
    logits = unit(image) @ unit(text).T * jnp.exp(params["temperature"]) + params["bias"]
    signs = 2 * jnp.eye(len(images)) - 1
    return -jax.nn.log_sigmoid(signs * logits).sum() / len(images)


def siglip() -> Case:
    """A training step of SigLIP."""
    batch = 4096
    inputs = (array(batch, PIXELS, PIXELS, 3), ints(batch, 64))
    return trained(
        siglip_loss, siglip_weights(), inputs, (P(BATCH), P(BATCH)), {"data": 4, "fsdp": 8}
    )


# --- masked autoencoder ---------------------------------------------------------------------------

SEEN = PATCHES // 4


def mae_weights() -> dict[str, Any]:
    """A large encoder of few patches, a small decoder of all."""
    embed, narrow = 1024, 512
    ends = {
        "patch": weight((COLOURS, embed), None, "fsdp"),
        "places": weight((PATCHES, embed)),
        "narrow": weight((embed, narrow), "fsdp"),
        "mask": weight((narrow,)),
        "decoder_places": weight((PATCHES, narrow)),
        "output": weight((narrow, COLOURS), "fsdp"),
    }
    encoders = {"encoder": encoder_weights(24, embed), "decoder": encoder_weights(8, narrow)}
    return {"ends": ends, **encoders}


def mae_loss(params: Any, images: Any, bits: Any) -> Any:
    """A quarter of the patches is encoded; the decoder makes the others up."""
    w = bfloat16(params["ends"])
    pixels = patches(images, SQUARE)
    x = pixels.astype(jnp.bfloat16) @ w["patch"] + w["places"]
    noise = jax.random.uniform(jax.random.wrap_key_data(bits), x.shape[:2])
    order = jnp.argsort(noise, axis=1)
    back = jnp.argsort(order, axis=1)
    x = jnp.take_along_axis(x, order[:, :SEEN, None], axis=1)
    x = encoded(x, params["encoder"], 16) @ w["narrow"]
    masks = jnp.broadcast_to(w["mask"], (x.shape[0], PATCHES - SEEN, x.shape[-1]))
    x = jnp.take_along_axis(jnp.concatenate([x, masks], axis=1), back[..., None], axis=1)
    x = encoded(x + w["decoder_places"], params["decoder"], 8)
    found = (x @ w["output"]).astype(jnp.float32)
    mean, variance = (f(pixels, axis=-1, keepdims=True) for f in (jnp.mean, jnp.var))
    errors = jnp.square(found - (pixels - mean) / (variance + 1e-6) ** 0.5)
    hidden = (back >= SEEN).astype(jnp.float32)
    return (errors.mean(axis=-1) * hidden).sum() / hidden.sum()


def mae() -> Case:
    """A training step of the masked autoencoder."""
    inputs = (array(1024, PIXELS, PIXELS, 3), random_bits())
    return trained(mae_loss, mae_weights(), inputs, (P(BATCH), P()), {"data": 2, "fsdp": 16})


# --- diffusion transformer ------------------------------------------------------------------------

STEPS, CLASSES = 1000, 1000


def dit_weights() -> dict[str, Any]:
    """DiT-XL/2."""
    embed, mlp = 1152, 4608
    layer = {
        "modulation": weight((embed, 6, embed), "fsdp"),
        "qkv": weight((embed, 3, embed), "fsdp", None, "tensor"),
        "attention_out": weight((embed, embed), "tensor", "fsdp"),
        "up": weight((embed, mlp), "fsdp", "tensor"),
        "down": weight((mlp, embed), "tensor", "fsdp"),
    }
    return {
        "patch": weight((16, embed), None, "tensor"),
        "time_in": weight((256, embed), "fsdp", "tensor"),
        "time_out": weight((embed, embed), "tensor", "fsdp"),
        # the last eight are for images without a class
        "classes": weight((CLASSES + 8, embed), "fsdp", "tensor"),
        "layers": stacked(28, layer),
        "output": weight((embed, 32), "fsdp"),
    }


def dit_layer(condition: Any, x: Any, weights: Any) -> tuple[Any, None]:
    """The condition [batch, embed] shifts, scales and gates; x [batch, length, embed]."""
    w = bfloat16(weights)
    modulation = jnp.einsum("bd,dce->bce", condition, w["modulation"])
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = jnp.moveaxis(modulation, 1, 0)[:, :, None]
    h = standardized(x) * (1 + scale) + shift
    qkv = jnp.moveaxis(jnp.einsum("btd,dce->btce", h, w["qkv"]), 2, 0)
    mixed = attention(*(split_heads(a, 16) for a in qkv))
    x = x + gate * (mixed.reshape(x.shape) @ w["attention_out"])
    h = standardized(x) * (1 + mlp_scale) + mlp_shift
    return x + mlp_gate * (jax.nn.gelu(h @ w["up"]) @ w["down"]), None


def waves(times: Any, width: int) -> Any:
    """Sines and cosines of times [batch]: [batch, width]."""
    half = width // 2
    angles = jnp.exp(-np.log(1e4) * jnp.arange(half) / half) * times[:, None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def dit_loss(params: Any, latents: Any, labels: Any, bits: Any) -> Any:
    """Finds the noise that was added to latents [batch, height, width, channels]."""
    batch = latents.shape[:1]
    at, of, without = jax.random.split(jax.random.wrap_key_data(bits), 3)
    times = jax.random.randint(at, batch, 0, STEPS)
    noise = jax.random.normal(of, latents.shape)
    left = jnp.cumprod(1 - jnp.linspace(1e-4, 0.02, STEPS))[times][:, None, None, None]
    noisy = jnp.sqrt(left) * latents + jnp.sqrt(1 - left) * noise
    labels = jnp.where(jax.random.uniform(without, batch) < 0.1, CLASSES, labels)
    time = jax.nn.silu(waves(times, 256) @ params["time_in"]) @ params["time_out"]
    condition = jax.nn.silu(time + params["classes"][labels]).astype(jnp.bfloat16)
    x = patches(noisy, 2).astype(jnp.bfloat16) @ params["patch"].astype(jnp.bfloat16)
    layer = jax.checkpoint(partial(dit_layer, condition))
    x, _ = lax.scan(layer, x, params["layers"])
    # the second half is the variance, which another loss would train
    found = (standardized(x) @ params["output"].astype(jnp.bfloat16))[..., :16]
    return jnp.square(found.astype(jnp.float32) - patches(noise, 2)).mean()


def dit() -> Case:
    """A training step of the diffusion transformer."""
    batch = 256
    inputs = (array(batch, 32, 32, 4), ints(batch), random_bits())
    return averaged(
        jax.value_and_grad(dit_loss), dit_weights(), inputs, (P("fsdp"), P("fsdp"), P()),
        {"fsdp": 8, "tensor": 4}, optax.adamw(1e-4), decay=0.9999,
    )  # fmt: skip


PROGRAMS = (
    program("siglip", "SigLIP; fsdp, a loss of all pairs of the batch", siglip),
    program("mae", "masked autoencoder; fsdp, patches drawn and put back inside", mae),
    program("dit", "diffusion transformer, averaged parameters; fsdp and tensor", dit),
)
