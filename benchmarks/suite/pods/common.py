"""What the programs share: declared parameters, norms, positions, attention, losses, training.

    weights declared with their specs, a loss, a batch -> `trained` -> a case

Parameters are float32 and activations bfloat16, unless a program says otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from benchmarks.suite.case import Case, Program, array, drawn
from benchmarks.suite.programs.optimizers import like_params, training_case

# A mesh axis, or several, or none, for one dim.
Axis = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter: its shape, and how it lies on the mesh."""

    shape: tuple[int, ...]
    spec: P


def weight(shape: tuple[int, ...], *spec: Axis) -> Weight:
    """A parameter; dims that have no entry in `spec` are whole."""
    return Weight(shape, P(*spec))


def stacked(layers: int, weights: Any) -> Any:
    """Parameters of so many layers, with the layers as their first dim, which is whole."""
    return jax.tree.map(lambda w: Weight((layers, *w.shape), P(None, *w.spec)), weights)


def shapes_of(weights: Any, dtype: Any = jnp.float32) -> Any:
    """Arrays in place of declared parameters."""
    return jax.tree.map(lambda w: array(*w.shape, dtype=dtype), weights)


def specs_of(weights: Any) -> Any:
    """Specs in place of declared parameters."""
    return jax.tree.map(lambda w: w.spec, weights)


def random_bits() -> jax.ShapeDtypeStruct:
    """A key of random numbers, as `jax.random.wrap_key_data` takes it."""
    return array(2, dtype=jnp.uint32)


def bfloat16(tree: Any) -> Any:
    """All arrays of a pytree as bfloat16."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)


# --- layers ---------------------------------------------------------------------------------------


def rms_norm(x: Any, scale: Any) -> Any:
    """x [..., width] at unit root mean square, times scale [width]."""
    mean = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return (x * lax.rsqrt(mean + 1e-6)).astype(x.dtype) * scale.astype(x.dtype)


def standardized(x: Any) -> Any:
    """x [..., width] at zero mean and unit variance: a layer norm without parameters."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(wide).mean(axis=-1, keepdims=True)
    return (wide * lax.rsqrt(variance + 1e-6)).astype(x.dtype)


def layer_norm(x: Any, scale: Any, shift: Any) -> Any:
    """x [..., width]; scale and shift [width]."""
    return standardized(x) * scale.astype(x.dtype) + shift.astype(x.dtype)


def rotary(x: Any) -> Any:
    """Rotary position embeddings: x [batch, length, heads, head dim]."""
    length, width = x.shape[1], x.shape[-1]
    frequencies = 1e4 ** (-jnp.arange(0, width, 2) / width)
    angles = (jnp.arange(length)[:, None] * frequencies)[None, :, None]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def causal(length: int) -> Any:
    """What each position may attend to: bool [length, length]."""
    return jnp.tril(jnp.ones((length, length), bool))


def unit(x: Any) -> Any:
    """x [batch, width] at length 1, in float32."""
    wide = x.astype(jnp.float32)
    return wide / jnp.linalg.norm(wide, axis=-1, keepdims=True)


def split_heads(x: Any, heads: int) -> Any:
    """x [batch, length, width] as [batch, length, heads, width / heads]."""
    return x.reshape(*x.shape[:2], heads, -1)


def attention(
    query: Any, key: Any, value: Any, mask: Any = None, cap: float | None = None
) -> Any:
    """Grouped-query attention, with a softmax in float32.

    Args:
      query: [batch, length, heads, head dim].
      key, value: [batch, keys, key heads, head dim]; key heads divide heads.
      mask: bool, broadcast to [batch, key heads, heads of one, length, keys].
      cap: of logits, which tanh keeps below it.

    Returns:
      [batch, length, heads, head dim of value].
    """
    batch, length, heads, width = query.shape
    groups = heads // key.shape[2]
    query = query.reshape(batch, length, key.shape[2], groups, width)
    logits = jnp.einsum("bskgd,btkd->bkgst", query, key).astype(jnp.float32) * width**-0.5
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    if mask is not None:
        logits = jnp.where(mask, logits, -1e30)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bkgst,btkd->bskgd", weights, value)
    return mixed.reshape(batch, length, heads, value.shape[-1])


def attention_weights(
    embed: int, heads: int, kv_heads: int, head_dim: int, fsdp: Axis, tensor: Axis,
    keys: tuple[Axis, ...] | None = None,
) -> dict[str, Weight]:  # fmt: skip
    """Of one layer, with heads as a dim of their own, as `self_attention` takes them.

    Args:
      keys: axes of keys and values, where they do not lie like queries.
    """
    keys = (fsdp, tensor) if keys is None else keys
    return {
        "query": weight((embed, heads, head_dim), fsdp, tensor),
        "key": weight((embed, kv_heads, head_dim), *keys),
        "value": weight((embed, kv_heads, head_dim), *keys),
        "attention_out": weight((heads, head_dim, embed), tensor, None, fsdp),
    }


def self_attention(x: Any, weights: Any, mask: Any) -> Any:
    """x [batch, length, embed], with rotary positions."""
    query, key, value = project(x, weights)
    mixed = attention(rotary(query), rotary(key), value, mask)
    return jnp.einsum("bthk,hkd->btd", mixed, weights["attention_out"])


def project(x: Any, weights: Any) -> tuple[Any, ...]:
    """Queries, keys and values [batch, length, heads, head dim] of x [batch, length, embed]."""
    return tuple(
        jnp.einsum("btd,dhk->bthk", x, weights[name]) for name in ("query", "key", "value")
    )


def cross_entropy_by_one_hot(logits: Any, labels: Any) -> Any:
    """The mean over all labels, which are products with one-hot vectors: nothing is gathered."""
    logits = logits.astype(jnp.float32)
    chosen = (logits * jax.nn.one_hot(labels, logits.shape[-1])).sum(axis=-1)
    return (jax.nn.logsumexp(logits, axis=-1) - chosen).mean()


# --- training -------------------------------------------------------------------------------------


def clipped_adamw() -> optax.GradientTransformation:
    """AdamW of gradients whose global norm is at most 1."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def trained(
    loss: Callable, weights: Any, batch: tuple[Any, ...], batch_specs: tuple[Any, ...],
    mesh: Mapping[str, int], optimizer: optax.GradientTransformation | None = None,
    state_specs: Any = None,
) -> Case:  # fmt: skip
    """A training step: (parameters, state, *batch) -> (parameters, state, loss).

    Args:
      loss: (parameters, *batch) -> scalar.
      weights: a pytree of `Weight`.
      optimizer: AdamW of clipped gradients by default.
      state_specs: of its state, where it does not lie like the parameters.
    """
    return training_case(
        loss, optimizer or clipped_adamw(), shapes_of(weights), specs_of(weights),
        batch, batch_specs, mesh=mesh, state_specs=state_specs,
        batch_values=partial(drawn, shapes=batch),
    )  # fmt: skip


def averaged(
    value_and_grad: Callable, weights: Any, batch: tuple[Any, ...], batch_specs: tuple[Any, ...],
    mesh: Mapping[str, int], optimizer: optax.GradientTransformation, decay: float,
) -> Case:  # fmt: skip
    """`trained`, with a moving average of the parameters beside them.

    Args:
      value_and_grad: (parameters, *batch) -> loss, gradients.
      decay: of the average.
    """
    params, specs = shapes_of(weights), specs_of(weights)
    state = jax.eval_shape(optimizer.init, params)
    state_specs = like_params(state, specs)

    def step(params: Any, state: Any, average: Any, *batch: Any) -> tuple[Any, ...]:
        value, grads = value_and_grad(params, *batch)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
        return params, state, average, value

    return Case(
        fun=step,
        args=(params, state, params, *batch),
        mesh=mesh,
        in_specs=(specs, state_specs, specs, *batch_specs),
        out_specs=(specs, state_specs, specs, P()),
        donate=(0, 1, 2),
    )


def program(name: str, text: str, make: Callable[[], Case]) -> Program:
    """A program whose sizes and mesh are its own, whatever the size that the suite asks for."""
    return Program(name, text, lambda _: make())
