"""Convolutions: a residual network over a batch, and U-Nets over space in two and three dims.

    cnn   images -> convolutions with batch norm, in residual pairs -> mean over space -> classes
    unet  image -> levels down, each half as large -> levels up, beside what came down -> labels

The batch of the network lies over all devices, and so do the statistics of its norms: they are
those of the whole batch. The U-Nets have rows and columns, or depth, over the mesh: convolutions
want rows of their neighbours. Activations are smooth, so that rounding moves gradients little.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from benchmarks.suite.case import Case, Program, Size, array, everywhere, normal
from benchmarks.suite.programs.optimizers import cross_entropy, shaped, training_case
from sharding import shard

MOMENTUM = 0.9  # of running statistics


def conv(x: Any, kernel: Any, stride: int = 1) -> Any:
    """x [batch, *space, channels], kernel [*window, channels, features]; space shrinks by stride"""
    rank = kernel.ndim - 2
    return lax.conv_general_dilated(
        x, kernel, (stride,) * rank, "SAME", dimension_numbers=_dims(rank)
    )


def upscale(x: Any, kernel: Any) -> Any:
    """The transposed convolution that doubles every dim of space."""
    rank = kernel.ndim - 2
    return lax.conv_transpose(x, kernel, (2,) * rank, "SAME", dimension_numbers=_dims(rank))


def _dims(rank: int) -> tuple[str, str, str]:
    space = "DHW"[3 - rank :]
    return f"N{space}C", f"{space}IO", f"N{space}C"


# --- a residual network ---------------------------------------------------------------------------


def cnn_loss(
    params: Any, stats: Any, images: Any, labels: Any, total: Callable = lambda x: x
) -> tuple[Any, Any]:
    """Cross entropy of a residual network, and its running statistics.

    Args:
      stats: mean and variance [channels] of every norm; in the structure of the parameters.
      images: [batch, height, width, 3]. labels: [batch].
      total: (means over the batch at hand) -> means over the whole batch.
    """
    normed = partial(_normed_conv, total)
    x, stem = normed(params["stem"], stats["stem"], images)
    x, stages = jax.nn.silu(x), []
    for stage, stage_stats in zip(params["stages"], stats["stages"], strict=True):
        stages.append([])
        for weights, before in zip(stage, stage_stats, strict=True):
            stride = 2 if "skip" in weights else 1
            y, a = normed(weights["a"], before["a"], x, stride)
            y, b = normed(weights["b"], before["b"], jax.nn.silu(y))
            now = {"a": a, "b": b}
            if "skip" in weights:
                x, now["skip"] = normed(weights["skip"], before["skip"], x, stride)
            x = jax.nn.silu(x + y)
            stages[-1].append(now)
    logits = x.mean(axis=(1, 2)) @ params["head"]
    return cross_entropy(logits, labels), {"stem": stem, "stages": stages}


def _normed_conv(
    total: Callable, weights: Any, stats: Any, x: Any, stride: int = 1
) -> tuple[Any, Any]:
    x = conv(x, weights["kernel"], stride)
    wide = x.astype(jnp.float32)
    over = (0, 1, 2)
    mean, square = total((wide.mean(axis=over), jnp.square(wide).mean(axis=over)))
    now = {"mean": mean, "variance": square - jnp.square(mean)}
    scale = lax.rsqrt(now["variance"] + 1e-5) * (1 + weights["gain"])
    y = ((wide - mean) * scale + weights["bias"]).astype(x.dtype)
    return y, jax.tree.map(lambda old, new: MOMENTUM * old + (1 - MOMENTUM) * new, stats, now)


def cnn_by_hand(params: Any, stats: Any, images: Any, labels: Any) -> tuple[Any, Any]:
    """Loss with statistics, and gradients, on one device: the batch is over `data`."""

    def part_of_loss(params: Any) -> tuple[Any, Any]:
        total = partial(lax.pmean, axis_name="data")
        value, now = cnn_loss(params, stats, images, labels, total)
        return value / lax.axis_size("data"), now

    (value, now), grads = jax.value_and_grad(part_of_loss, has_aux=True)(params)
    value, grads = lax.psum((value, grads), "data")
    return (value, now), grads


def _cnn(size: Size) -> Case:
    widths, blocks = size.pick(((16, 32), 2), ((64, 128, 256, 512), 2))
    batch, side, classes = size.pick((32, 32, 16), (1024, 224, 1024))
    shapes: dict[str, Any] = {
        "stem": _normed_shapes(size.pick(3, 7), 3, widths[0]), "stages": [],
        "head": (widths[-1], classes),
    }  # fmt: skip
    before = widths[0]
    for width in widths:
        shapes["stages"].append([])
        for _ in range(blocks):
            block = {"a": _normed_shapes(3, before, width), "b": _normed_shapes(3, width, width)}
            if width != before:
                block["skip"] = _normed_shapes(1, before, width)
            shapes["stages"][-1].append(block)
            before = width
    params = shaped(shapes, size.dtype)
    norms = {name: shapes[name] for name in ("stem", "stages")}
    stats = jax.tree.map(
        lambda layer: {name: array(*layer["gain"]) for name in ("mean", "variance")},
        norms, is_leaf=lambda x: isinstance(x, dict) and "gain" in x,
    )  # fmt: skip

    def values(rng: np.random.Generator) -> tuple[Any, ...]:
        images = normal(rng, (batch, side, side, 3), size.dtype)
        ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), stats)
        return ones, images, rng.integers(0, classes, batch, dtype=np.int32)

    return training_case(
        cnn_loss, optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9)),
        params, everywhere(params),
        (stats, array(batch, side, side, 3, dtype=size.dtype), array(batch, dtype=jnp.int32)),
        (everywhere(stats), P("data"), P("data")), mesh={"data": size.devices},
        batch_values=values, grads_by_hand=cnn_by_hand, carried_specs=everywhere(stats),
    )  # fmt: skip


def _normed_shapes(window: int, channels: int, features: int) -> dict[str, tuple[int, ...]]:
    return {
        "kernel": (window, window, channels, features), "gain": (features,), "bias": (features,),
    }  # fmt: skip


# --- U-Nets ---------------------------------------------------------------------------------------


def unet_loss(spec: P, params: Any, image: Any, labels: Any) -> Any:
    """Cross entropy of each place: image [batch, *space, channels], labels [batch, *space].

    Args:
      spec: of batch and space; every level is sharded so.
    """
    x = _pair(params["first"], image, spec)
    beside = []
    for level in params["down"]:
        beside.append(x)
        x = _pair(level["pair"], conv(x, level["halve"], stride=2), spec)
    for level in params["up"]:
        x = jnp.concatenate([beside.pop(), upscale(x, level["double"])], axis=-1)
        x = _pair(level["pair"], x, spec)
    return cross_entropy(conv(x, params["head"]), labels)


def _pair(weights: Any, x: Any, spec: P) -> Any:
    for layer in weights:
        x = jax.nn.silu(group_norm(conv(x, layer["kernel"]), layer["gain"], layer["bias"]))
        x = shard(x, *spec, None)
    return x


def group_norm(x: Any, gain: Any, bias: Any, width: int = 8) -> Any:
    """x [batch, *space, channels] at mean 0 and scale 1 over space and `width` channels."""
    wide = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, width)
    over = (*range(1, x.ndim - 1), x.ndim)
    mean = wide.mean(axis=over, keepdims=True)
    variance = jnp.square(wide).mean(axis=over, keepdims=True) - jnp.square(mean)
    normal = ((wide - mean) * lax.rsqrt(variance + 1e-5)).reshape(x.shape).astype(x.dtype)
    return normal * (1 + gain) + bias


def _unet_shapes(rank: int, widths: tuple[int, ...], channels: int, classes: int) -> Any:
    def pair(before: int, width: int) -> list[Any]:
        return [
            {"kernel": (3,) * rank + (inside, width), "gain": (width,), "bias": (width,)}
            for inside in (before, width)
        ]

    steps = list(zip(widths, widths[1:], strict=False))
    return {
        "first": pair(channels, widths[0]),
        "down": [
            {"halve": (3,) * rank + (a, a), "pair": pair(a, b)} for a, b in steps
        ],
        "up": [
            {"double": (2,) * rank + (b, a), "pair": pair(2 * a, a)} for a, b in reversed(steps)
        ],
        "head": (1,) * rank + (widths[0], classes),
    }  # fmt: skip


def _unet(
    size: Size, mesh: dict[str, int], spec: P, shape: tuple[int, ...], widths: tuple[int, ...]
) -> Case:
    channels, classes = 4, 8
    shapes = _unet_shapes(len(shape) - 1, widths, channels, classes)
    params = shaped(shapes, size.dtype)

    def values(rng: np.random.Generator) -> tuple[Any, ...]:
        image = normal(rng, (*shape, channels), size.dtype)
        return image, rng.integers(0, classes, shape, dtype=np.int32)

    return training_case(
        partial(unet_loss, spec), optax.adamw(1e-3), params, everywhere(params),
        (array(*shape, channels, dtype=size.dtype), array(*shape, dtype=jnp.int32)),
        (spec, spec), mesh=mesh, batch_values=values,
    )  # fmt: skip


def _unet_2d(size: Size) -> Case:
    mesh = size.pick({"x": 4, "y": 2}, {"x": 4, "y": 4})
    shape = size.pick((2, 64, 64), (8, 1024, 1024))
    return _unet(size, mesh, P(None, "x", "y"), shape, size.pick((8, 16, 32), (64, 128, 256, 512)))


def _unet_3d(size: Size) -> Case:
    mesh = size.pick({"data": 2, "space": 4}, {"data": 4, "space": 4})
    shape = size.pick((2, 16, 8, 8), (8, 128, 128, 128))
    widths = size.pick((8, 16), (32, 64, 128))
    return _unet(size, mesh, P("data", "space", None, None), shape, widths)


PROGRAMS = (
    Program("cnn", "residual CNN, batch norm over the whole batch; data parallel", _cnn),
    Program("unet_2d", "U-Net; rows over x, columns over y", _unet_2d),
    Program("unet_3d", "U-Net in 3D; batch over data, depth over space", _unet_3d),
)
