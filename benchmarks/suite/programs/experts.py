"""Mixture of experts, as in GShard: top-2 gating, capacity, dispatch and combination by einsums.

    x [groups, tokens, width] -> gates -> places [g, s, e, c] -> inputs of experts [e, g, c, width]
      -> hidden [e, g, c, hidden] -> outputs of experts -> y [groups, tokens, width]

Groups of tokens lie over the axis `expert`, and so do experts: from the one to the other is an
all-to-all. The hidden dim lies over `tensor`. By hand, sums over `tensor` are of tokens, which are
half as large as what experts get and return: dispatch and combination are linear.
"""

from __future__ import annotations

from functools import partial
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

BALANCE = 1e-2  # weight of the loss that balances experts


def route(gates: Any, capacity: int) -> tuple[Any, Any]:
    """Where tokens go: gates [g, s, e], probabilities in float32.

    Returns:
      weights [g, s, e, c]: of an expert's output at place c for the token; 0 where it is not sent.
      balance, scalar: small when experts get as many tokens as each other.
    """
    experts = gates.shape[-1]
    first = jax.nn.one_hot(jnp.argmax(gates, axis=-1), experts)
    second = jax.nn.one_hot(jnp.argmax(gates * (1 - first), axis=-1), experts)
    # second choices queue behind all first ones
    first_place = jnp.cumsum(first, axis=1) - first
    second_place = jnp.cumsum(second, axis=1) - second + first.sum(axis=1, keepdims=True)
    total = (gates * (first + second)).sum(axis=-1, keepdims=True)
    weights = sum(
        (gates / total * chosen)[..., None] * jax.nn.one_hot(place.astype(jnp.int32), capacity)
        for chosen, place in ((first, first_place), (second, second_place))
    )
    balance = jnp.mean(first.mean(axis=1) * gates.mean(axis=1)) * experts**2
    return weights, balance


def loss(params: Any, x: Any, target: Any) -> Any:
    """Mean square error after a stack of residual blocks: x, target [groups, tokens, width]."""
    capacity = 2 * x.shape[1] // params[0]["gate"].shape[-1]
    balances = jnp.float32(0)
    for layer in params:
        h = rms_norm(x, layer["norm"])
        gates = jax.nn.softmax((h @ layer["gate"]).astype(jnp.float32))
        weights, balance = route(gates, capacity)
        weights = shard(weights.astype(x.dtype), "expert", None, None, None)
        inputs = jnp.einsum("gsec,gsm->egcm", (weights > 0).astype(x.dtype), h)
        inputs = shard(inputs, "expert", None, None, None)
        hidden = jax.nn.gelu(jnp.einsum("egcm,emh->egch", inputs, layer["up"]))
        hidden = shard(hidden, "expert", None, None, "tensor")
        outputs = jnp.einsum("egch,ehm->egcm", hidden, layer["down"])
        x = x + shard(jnp.einsum("gsec,egcm->gsm", weights, outputs), "expert", None, None)
        balances += balance
    error = jnp.mean(jnp.square((x - target).astype(jnp.float32)))
    return error + BALANCE * balances / len(params)


# --- by hand --------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def enter(x: Any, axis: str) -> Any:
    """x, whole on every device of `axis`, for work that is split over them: it gets the sum of
    their gradients."""
    return x


enter.defvjp(lambda x, axis: (x, None), lambda axis, _, g: (lax.psum(g, axis),))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def leave(x: Any, axis: str) -> Any:
    """The sum of parts over `axis`, each of which has the gradient of the sum."""
    return lax.psum(x, axis)


leave.defvjp(lambda x, axis: (lax.psum(x, axis), None), lambda axis, _, g: (g,))


def by_hand(params: Any, x: Any, target: Any) -> tuple[Any, Any]:
    """Loss and gradients on the shards of one device: x, target [groups/expert, tokens, width]."""
    value, grads = jax.value_and_grad(_part_of_loss)(params, x, target)
    whole = [{name: layer[name] for name in ("norm", "gate")} for layer in grads]
    value, whole = lax.psum((value, whole), "expert")
    return value, [layer | summed for layer, summed in zip(grads, whole, strict=True)]


def _part_of_loss(params: Any, x: Any, target: Any) -> Any:
    """What this device's groups add to the loss."""
    balances = jnp.float32(0)
    for layer in params:
        y, balance = _block(layer, x)
        x = x + y
        balances += balance
    error = jnp.mean(jnp.square((x - target).astype(jnp.float32)))
    return (error + BALANCE * balances / len(params)) / lax.axis_size("expert")


def _block(layer: Any, x: Any) -> tuple[Any, Any]:
    h = rms_norm(x, layer["norm"])
    gates = jax.nn.softmax((h @ layer["gate"]).astype(jnp.float32))
    capacity = 2 * x.shape[1] // gates.shape[-1]
    chosen, balance = route(gates, capacity)
    weights, _ = route(enter(gates, "tensor"), capacity)
    sent = jnp.einsum("gsec,gsm->egcm", (chosen > 0).astype(x.dtype), enter(h, "tensor"))
    inputs = lax.all_to_all(sent, "expert", 0, 1, tiled=True)
    hidden = jax.nn.gelu(jnp.einsum("egcm,emh->egch", inputs, layer["up"]))
    outputs = jnp.einsum("egch,ehm->egcm", hidden, layer["down"])
    back = lax.all_to_all(outputs, "expert", 1, 0, tiled=True)
    y = leave(jnp.einsum("gsec,egcm->gsm", weights.astype(x.dtype), back), "tensor")
    return y, balance


def _experts(size: Size) -> Case:
    mesh = size.pick({"expert": 4, "tensor": 2}, {"expert": 8, "tensor": 2})
    layers, width, hidden, experts = size.pick((2, 64, 128, 8), (4, 2048, 8192, 16))
    groups, tokens = size.pick((8, 64), (16, 2048))
    layer = {
        "norm": (width,), "gate": (width, experts),
        "up": (experts, width, hidden), "down": (experts, hidden, width),
    }  # fmt: skip
    specs = {
        "norm": P(), "gate": P(),
        "up": P("expert", None, "tensor"), "down": P("expert", "tensor"),
    }  # fmt: skip
    shape = (groups, tokens, width)

    def values(rng: np.random.Generator) -> tuple[Any, ...]:
        x = normal(rng, (2, *shape), size.dtype)
        return x[0], x[1]

    return training_case(
        loss, optax.adamw(1e-3), shaped([layer] * layers, size.dtype), [specs] * layers,
        (array(*shape, dtype=size.dtype),) * 2, (P("expert"), P("expert")),
        mesh=mesh, batch_values=values, grads_by_hand=by_hand,
    )  # fmt: skip


PROGRAMS = (
    Program("experts", "mixture of experts, top-2 gates; experts and hidden sharded", _experts),
)
