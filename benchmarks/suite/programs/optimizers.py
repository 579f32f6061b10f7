"""Training steps from a loss and an optimiser; and a step whose optimiser is the program: Muon.

    loss, parameters, batch, their specs -> `training_case` -> a case of the suite

A step takes parameters, optimiser state and a batch, and returns new parameters, new state and the
loss. Where the state lies follows from where the parameters lie, unless a program says otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec as P
from optax import contrib

from benchmarks.suite.case import Case, Program, Size, array, drawn, everywhere, normal


def training_case(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    params: Any,
    specs: Any,
    batch: tuple[Any, ...],
    batch_specs: tuple[Any, ...],
    *,
    mesh: Mapping[str, int],
    batch_values: Callable[[np.random.Generator], tuple[Any, ...]],
    grads_by_hand: Callable | None = None,
    state_specs: Any = None,
    carried_specs: Any = None,
) -> Case:
    """A step of training as a case: (params, state, *batch) -> (params, state, loss).

    Args:
      loss: (params, *batch) -> scalar; with `carried_specs` a pair of that and what else the step
        returns, after the loss.
      optimizer: elementwise, or else its steps are not right by hand.
      params: shapes. specs: a spec for each.
      batch: shapes of further arguments. batch_specs: their specs.
      batch_values: (generator) -> the batch.
      grads_by_hand: (params, *batch) on one device -> what `jax.value_and_grad(loss)` gives, on
        the shards of that device: the loss summed over all devices, gradients like parameters.
      state_specs: of the optimiser's state, where it does not lie like the parameters.
      carried_specs: specs of what the loss carries to the next step.
    """
    state = jax.eval_shape(optimizer.init, params)
    if state_specs is None:
        state_specs = like_params(state, specs)
    carries = carried_specs is not None

    def values(rng: np.random.Generator) -> tuple[Any, ...]:
        drawn_params = drawn(rng, params)
        return drawn_params, state_values(optimizer, drawn_params), *batch_values(rng)

    return Case(
        fun=_step(optimizer, jax.value_and_grad(loss, has_aux=carries), carries),
        args=(params, state, *batch),
        mesh=mesh,
        in_specs=(specs, state_specs, *batch_specs),
        out_specs=(specs, state_specs, P(), *((carried_specs,) if carries else ())),
        donate=(0, 1),
        values=values,
        by_hand=_step(optimizer, grads_by_hand, carries) if grads_by_hand is not None else None,
    )


def _step(
    optimizer: optax.GradientTransformation, value_and_grad: Callable, carries: bool
) -> Callable:
    def step(params: Any, state: Any, *batch: Any) -> tuple[Any, ...]:
        value, grads = value_and_grad(params, *batch)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state, *value) if carries else (params, state, value)

    return step


def like_params(state: Any, specs: Any) -> Any:
    """Specs of an optimiser's state: what has the path of a parameter lies like it; all else is
    whole."""
    places = dict(jax.tree_util.tree_leaves_with_path(specs))

    def one(path: Any, _: Any) -> P:
        ends = (path[start:] for start in range(len(path)))
        return next((places[end] for end in ends if end in places), P())

    return jax.tree_util.tree_map_with_path(one, state)


def state_values(optimizer: optax.GradientTransformation, params: Any) -> Any:
    """An optimiser's state as arrays of numpy.

    Second moments are 1: at 0 a first step of Adam is the sign of the gradient, and the sign of a
    gradient that is nearly 0 depends on rounding.
    """

    def one(path: Any, leaf: Any) -> np.ndarray:
        second = any(getattr(key, "name", "") == "nu" for key in path)
        return np.ones(leaf.shape, leaf.dtype) if second else np.asarray(leaf)

    return jax.tree_util.tree_map_with_path(one, optimizer.init(params))


def cross_entropy(logits: Any, labels: Any) -> Any:
    """Mean over all labels: logits [..., classes], labels [...]; in float32."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)


def rms_norm(x: Any, gain: Any) -> Any:
    """x [..., width] at unit scale, times 1 + gain [width]."""
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    return (wide * scale).astype(x.dtype) * (1 + gain)


# --- Muon -----------------------------------------------------------------------------------------


def residual_mlp_loss(params: Any, x: Any, labels: Any) -> Any:
    """Cross entropy of a stack of residual blocks: x [batch, inputs], labels [batch]."""

    def block(h: Any, weights: Any) -> tuple[Any, None]:
        hidden = jax.nn.gelu(rms_norm(h, weights["norm"]) @ weights["up"])
        return h + hidden @ weights["down"], None

    h, _ = lax.scan(block, x @ params["embed"], params["blocks"])
    return cross_entropy(h @ params["head"], labels)


def _matrices(params: Any) -> Any:
    """Which parameters are stacked matrices; the others are left to AdamW."""
    matrix = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: matrix if path[-1].key in ("up", "down") else None, params
    )


def _muon_by_hand(optimizer: optax.GradientTransformation) -> Callable:
    """The step on one device: gradients of stacked matrices are scattered over layers, and the
    updates of its own layers go to all."""

    def step(params: Any, state: Any, x: Any, labels: Any) -> tuple[Any, Any, Any]:
        def stacked(one: Callable, other: Callable, tree: Any) -> Any:
            return jax.tree_util.tree_map_with_path(
                lambda path, leaf: (one if path[-1].key in ("up", "down") else other)(leaf), tree
            )

        def own(weights: Any) -> Any:
            layers = weights.shape[0] // lax.axis_size("data")
            start = lax.axis_index("data") * layers
            return lax.dynamic_slice_in_dim(weights, start, layers)

        def mean_loss(params: Any) -> Any:
            return residual_mlp_loss(params, x, labels) / lax.axis_size("data")

        scatter = partial(lax.psum_scatter, axis_name="data", tiled=True)
        gather = partial(lax.all_gather, axis_name="data", tiled=True)
        value, grads = jax.value_and_grad(mean_loss)(params)
        grads = stacked(scatter, partial(lax.psum, axis_name="data"), grads)
        updates, state = optimizer.update(grads, state, stacked(own, lambda leaf: leaf, params))
        updates = stacked(gather, lambda leaf: leaf, updates)
        return optax.apply_updates(params, updates), state, lax.psum(value, "data")

    return step


def _muon(size: Size) -> Case:
    """Data parallel; momentum, and the Newton-Schulz iterations on it, are sharded over layers."""
    layers, width, hidden, classes = size.pick((8, 64, 192, 32), (16, 2048, 8192, 1024))
    rows, inputs = size.pick((256, 48), (32768, 1024))
    shapes = {
        "embed": (inputs, width),
        "blocks": {"norm": (layers, width), "up": (layers, width, hidden),
                   "down": (layers, hidden, width)},
        "head": (width, classes),
    }  # fmt: skip
    params = shaped(shapes, size.dtype)
    optimizer = contrib.muon(1e-3, weight_decay=0.1, muon_weight_dimension_numbers=_matrices)
    over_layers = everywhere(params)
    over_layers["blocks"] |= {"up": P("data"), "down": P("data")}
    state = jax.eval_shape(optimizer.init, params)

    def values(rng: np.random.Generator) -> tuple[Any, ...]:
        x = normal(rng, (rows, inputs), size.dtype)
        return x, rng.integers(0, classes, rows, dtype=np.int32)

    case = training_case(
        residual_mlp_loss, optimizer, params, everywhere(params),
        (array(rows, inputs, dtype=size.dtype), array(rows, dtype=jnp.int32)),
        (P("data"), P("data")), mesh={"data": size.devices}, batch_values=values,
        state_specs=like_params(state, over_layers),
    )  # fmt: skip
    return dataclasses.replace(case, by_hand=_muon_by_hand(optimizer))


def shaped(shapes: Any, dtype: Any) -> Any:
    """A pytree of tuples of sizes as one of arrays of `dtype`."""
    return jax.tree.map(
        lambda dims: array(*dims, dtype=dtype), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


PROGRAMS = (
    Program("muon", "residual MLP, data parallel; Muon with its state sharded over layers", _muon),
)
