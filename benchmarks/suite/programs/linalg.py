"""Factorisations and transforms: Gaussian processes, and a layer in the frequencies of a grid.

    gaussian_process  x [tasks, points, dims] -> features -> covariances -> Cholesky factors
                      -> likelihood of the targets
    spectral          a [batch, rows, columns, channels] -> layers: [lowest frequencies, mixed over
                      channels, + a product over channels] -> error against another field

Tasks lie over all devices, each of which factors whole matrices. The field has its batch over
`data` and its channels over `tensor`; rows and columns are whole, so that transforms are local.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.linalg import cho_solve
from jax.sharding import PartitionSpec as P

from benchmarks.suite.case import Case, Program, Size, array, everywhere, normal
from benchmarks.suite.programs.optimizers import shaped, training_case
from sharding import shard


def gaussian_process_loss(params: Any, x: Any, y: Any) -> Any:
    """Negative log likelihood of a datum: x [tasks, points, dims], y [tasks, points]."""
    hidden = jnp.tanh(x @ params["in"])
    features = (hidden @ params["out"]).astype(jnp.float32) / jnp.exp(params["length"])
    square = jnp.square(features).sum(axis=-1)
    products = jnp.einsum("tid,tjd->tij", features, features)
    distance = square[:, :, None] + square[:, None, :] - 2 * products
    noise = jnp.exp(params["noise"]) * jnp.eye(x.shape[1])
    factor = jnp.linalg.cholesky(jnp.exp(params["scale"] - distance / 2) + noise)
    weights = jax.vmap(lambda c, y: cho_solve((c, True), y))(factor, y)
    half_log = jnp.log(jnp.diagonal(factor, axis1=1, axis2=2)).sum(axis=-1)
    fit = jnp.einsum("ti,ti->t", y, weights) / 2
    return jnp.mean(fit + half_log) / x.shape[1]


def _gaussian_process(size: Size) -> Case:
    tasks, points, dims, hidden = size.pick((16, 32, 4, 16), (512, 512, 16, 256))
    f32 = jnp.float32
    params = shaped({"in": (dims, hidden), "out": (hidden, dims)}, size.dtype) | {
        name: array(*shape, dtype=f32)
        for name, shape in (("length", (dims,)), ("noise", ()), ("scale", ()))
    }

    def values(rng: np.random.Generator) -> tuple[Any, ...]:
        x = rng.standard_normal((tasks, points, dims), np.float32)
        return x.astype(size.dtype), np.sin(3 * x.sum(axis=-1))

    return training_case(
        gaussian_process_loss, optax.adamw(1e-3), params, everywhere(params),
        (array(tasks, points, dims, dtype=size.dtype), array(tasks, points)),
        (P("data"), P("data")), mesh={"data": size.devices}, batch_values=values,
    )  # fmt: skip


# --- a layer in frequencies -----------------------------------------------------------------------


def spectral_loss(params: Any, field: Any, target: Any) -> Any:
    """Mean square error: field, target [batch, rows, columns, channels]."""
    x = shard(field @ params["lift"], "data", None, None, "tensor")
    for layer in params["layers"]:
        x = jax.nn.gelu(_convolved(layer, x) + x @ layer["mix"])
        x = shard(x, "data", None, None, "tensor")
    error = x @ params["project"] - target
    return jnp.mean(jnp.square(error.astype(jnp.float32)))


def _convolved(layer: Any, x: Any) -> Any:
    """x, convolved over all of space: a product with weights at its lowest frequencies."""
    rows, columns = x.shape[1:3]
    high, wide = layer["real"].shape[1:3]
    weights = jax.lax.complex(layer["real"], layer["imaginary"])
    z = jnp.fft.rfft2(x.astype(jnp.float32), axes=(1, 2))
    # rows have frequencies of both signs, columns of one
    low = jnp.stack([z[:, :high, :wide], z[:, -high:, :wide]])
    low = jnp.einsum("sbhwi,shwio->sbhwo", low, weights)
    out = jnp.zeros((*z.shape[:-1], low.shape[-1]), low.dtype)
    out = out.at[:, :high, :wide].set(low[0]).at[:, -high:, :wide].set(low[1])
    return jnp.fft.irfft2(out, (rows, columns), axes=(1, 2)).astype(x.dtype)


def _spectral(size: Size) -> Case:
    mesh = size.pick({"data": 4, "tensor": 2}, {"data": 4, "tensor": 4})
    layers, width, modes = size.pick((2, 16, 4), (4, 256, 16))
    batch, side, channels = size.pick((8, 32, 4), (32, 256, 4))
    weights = array(2, modes, modes, width, width)
    mix = array(width, width, dtype=size.dtype)
    params = {
        "lift": array(channels, width, dtype=size.dtype),
        "layers": [{"real": weights, "imaginary": weights, "mix": mix}] * layers,
        "project": array(width, channels, dtype=size.dtype),
    }
    # features of a layer are sharded, so each device wants the channels of all
    last = P(None, None, None, None, "tensor")
    layer = {"real": last, "imaginary": last, "mix": P(None, "tensor")}
    specs = {"lift": P(None, "tensor"), "layers": [layer] * layers, "project": P("tensor")}
    shape = (batch, side, side, channels)

    def values(rng: np.random.Generator) -> tuple[Any, ...]:
        fields = normal(rng, (2, *shape), size.dtype)
        return fields[0], fields[1]

    return training_case(
        spectral_loss, optax.adamw(1e-3), params, specs,
        (array(*shape, dtype=size.dtype),) * 2, (P("data"), P("data")), mesh=mesh,
        batch_values=values,
    )  # fmt: skip


PROGRAMS = (
    Program("gaussian_process", "Cholesky factors of many tasks, over all devices",
            _gaussian_process),
    Program("spectral", "Fourier layers; batch over data, channels over tensor", _spectral),
)  # fmt: skip
