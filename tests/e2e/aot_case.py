"""A small program for the tests of `spmd.aot` and of the command line."""

import jax
import jax.numpy as jnp

from sharding import shard


def shapes(batch=4096, width=2048, layers=4):
    weights = jax.ShapeDtypeStruct((layers, width, 2 * width), jnp.bfloat16)
    back = jax.ShapeDtypeStruct((layers, 2 * width, width), jnp.bfloat16)
    return jax.ShapeDtypeStruct((batch, width), jnp.bfloat16), weights, back


def huge():
    return shapes(batch=1 << 20, width=4096, layers=64)


def with_names():
    x, up, down = shapes()
    return (x,), {"up": up, "down": down}


def not_a_tuple():
    return list(shapes())


def loss(x, up, down):
    """Mean square after `layers` residual layers x + relu(x up) down."""
    x = shard(x, "data", None)
    up, down = shard(up, None, "data", "tensor"), shard(down, None, "tensor", "data")

    def layer(x, weights):
        up, down = weights
        return x + jax.nn.relu(x @ up) @ down, None

    x, _ = jax.lax.scan(layer, x, (up, down))
    return jnp.mean(jnp.square(x.astype(jnp.float32)))


def step(x, up, down):
    """The gradients of `loss`."""
    return jax.grad(loss, argnums=(1, 2))(x, up, down)


def no_options():
    return {"mesh": None}


def options():
    return {"donate_argnums": (0,)}


NUMBER = 3
