"""A pipeline as in section 3.3 of the GSPMD paper: stages are a sharded dim of arrays.

    microbatches -> scan over ticks: [shift the states by one stage, put one in] -> vmap of stages
      -> the last stage's states -> loss

A shift of a sharded dim by one is a permute between neighbours. The backward pass is the transpose
of the loop: it is a pipeline in the other direction.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from benchmarks.suite.case import Case, Program, Size, array, normal
from benchmarks.suite.programs.optimizers import rms_norm, shaped, training_case
from sharding import shard


def stage(params: Any, x: Any) -> Any:
    """Residual layers of one stage: weights [layers, ...], x [rows, width]."""

    def layer(x: Any, weights: Any) -> tuple[Any, None]:
        hidden = jax.nn.gelu(rms_norm(x, weights["norm"]) @ weights["up"])
        return x + hidden @ weights["down"], None

    return lax.scan(layer, x, params)[0]


def loss(params: Any, x: Any, target: Any) -> Any:
    """Mean square error: weights [stages, layers, ...]; x, target [microbatches, rows, width]."""
    stages = params["norm"].shape[0]
    first = (jnp.arange(stages) == 0)[:, None, None]

    def tick(states: Any, fresh: Any) -> tuple[Any, Any]:
        states = jnp.where(first, fresh, jnp.roll(states, 1, axis=0))
        states = shard(jax.vmap(stage)(params, states), "stage", "data", None)
        return states, states[-1]

    states = jnp.zeros((stages, *x.shape[1:]), x.dtype)
    _, y = lax.scan(tick, states, _with_bubble(x, stages))
    return jnp.mean(jnp.square((y[stages - 1 :] - target).astype(jnp.float32)))


def _with_bubble(x: Any, stages: int) -> Any:
    """Microbatches, and what the first stage works on while the others finish."""
    return jnp.pad(x, ((0, stages - 1), (0, 0), (0, 0)))


def by_hand(params: Any, x: Any, target: Any) -> tuple[Any, Any]:
    """Loss and gradients on one device: its stage, and its rows of all microbatches."""

    def part_of_loss(params: Any) -> Any:
        stages, here = lax.axis_size("stage"), lax.axis_index("stage")
        own = jax.tree.map(lambda weights: weights[0], params)
        forward = [(i, i + 1) for i in range(stages - 1)]

        def tick(state: Any, fresh: Any) -> tuple[Any, Any]:
            state = jnp.where(here == 0, fresh, lax.ppermute(state, "stage", forward))
            state = stage(own, state)
            return state, state

        _, y = lax.scan(tick, jnp.zeros_like(x[0]), _with_bubble(x, stages))
        error = jnp.mean(jnp.square((y[stages - 1 :] - target).astype(jnp.float32)))
        return jnp.where(here == stages - 1, error, 0) / lax.axis_size("data")

    value, grads = jax.value_and_grad(part_of_loss)(params)
    return lax.psum(value, ("stage", "data")), lax.psum(grads, "data")


def _pipeline(size: Size) -> Case:
    mesh = size.pick({"stage": 4, "data": 2}, {"stage": 8, "data": 2})
    layers, width, hidden = size.pick((2, 64, 256), (2, 4096, 16384))
    microbatches, rows = size.pick((8, 32), (16, 4096))
    leading = (mesh["stage"], layers)
    shapes = {
        "norm": (*leading, width), "up": (*leading, width, hidden),
        "down": (*leading, hidden, width),
    }  # fmt: skip
    shape = (microbatches, rows, width)

    def values(rng: np.random.Generator) -> tuple[Any, ...]:
        x = normal(rng, (2, *shape), size.dtype)
        return x[0], x[1]

    return training_case(
        loss, optax.adamw(1e-3), shaped(shapes, size.dtype), dict.fromkeys(shapes, P("stage")),
        (array(*shape, dtype=size.dtype),) * 2, (P(None, "data"), P(None, "data")),
        mesh=mesh, batch_values=values, grads_by_hand=by_hand,
    )  # fmt: skip


PROGRAMS = (Program("pipeline", "stages as a sharded dim that is shifted; and data", _pipeline),)
