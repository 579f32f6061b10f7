"""States whose values follow from their step alone, so that whoever restores one can check it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RECORD = {"seed": 0, "text": "0123456789abcdef"}
ROWS = 64


class State(struct.PyTreeNode):
    """In the manner of `training.state.TrainState`: checkpoints know of it that there is a step."""

    step: Any
    params: Any
    opt_state: Any
    key: Any


def abstract(columns: int, devices: int = 1) -> State:
    """Shapes, dtypes and shardings; `columns` sets the size: 256 bytes each, twice."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))

    def leaf(shape: tuple[int, ...], dtype: type, *spec: str) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return State(
        step=leaf((), jnp.int32),
        params={"w": leaf((ROWS, columns), jnp.float32, "data"), "b": leaf((3,), jnp.bfloat16)},
        opt_state=({"mu": leaf((ROWS, columns), jnp.float32, "data")},),
        key=leaf((2,), jnp.uint32),
    )


def at(step: int, columns: int, devices: int = 1) -> State:
    """The state after `step` steps: noise, as compression would shrink anything else."""
    generator = np.random.default_rng(step)

    def value(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.dtype == jnp.int32:
            return jax.device_put(np.int32(step), leaf.sharding)
        values = generator.integers(0, 2**16, leaf.shape).astype(leaf.dtype)
        return jax.device_put(values, leaf.sharding)

    return jax.tree.map(value, abstract(columns, devices))


def same(one: State, other: State) -> bool:
    """Whether two states are equal bit for bit."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(
        a.dtype == b.dtype and np.array_equal(np.asarray(a).view(), np.asarray(b).view())
        for a, b in pairs
    )
