"""What the suite compares: annotated programs, and how an expert would write some of them by hand.

A program is written once, as for one device. `spmd.jit` and `jax.jit` are given the very same
function, shardings of arguments and results, and annotations inside.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec


class Size(NamedTuple):
    """How large a case is.

    Attributes:
      devices: of the mesh.
      small: what 8 simulated devices run in well under a second a step; otherwise what keeps the
        chips of a slice busy.
      dtype: of parameters and activations.
    """

    devices: int
    small: bool
    dtype: Any

    def pick(self, small: Any, large: Any) -> Any:
        return small if self.small else large


_MANY = 1 << 22  # elements of an array that are not drawn by numpy

RUNS = Size(8, True, jnp.float32)
LARGE = Size(16, False, jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class Case:
    """A program at one size.

    Attributes:
      fun: written as for one device; annotations inside are `sharding.shard` or
        `jax.lax.with_sharding_constraint`.
      args: one pytree of `jax.ShapeDtypeStruct` per argument.
      mesh: axis name -> size.
      in_specs: per argument a pytree of PartitionSpec, with one for each array.
      out_specs: the same for the result.
      donate: arguments whose memory the result may take.
      values: (generator) -> arguments as arrays of numpy, where `drawn` would not do.
      by_hand: what an expert writes: the per-device body of one `jax.shard_map` over the whole
        mesh, with the same arguments, results, and shardings as the program; or None.
      axis_rules: of logical names in annotations, see `spmd.jit`.
    """

    fun: Callable
    args: tuple[Any, ...]
    mesh: Mapping[str, int]
    in_specs: tuple[Any, ...]
    out_specs: Any
    donate: tuple[int, ...] = ()
    values: Callable[[np.random.Generator], tuple[Any, ...]] | None = None
    by_hand: Callable | None = None
    axis_rules: Any = ()

    def draw(self, seed: int = 0) -> tuple[Any, ...]:
        """Arguments for a run."""
        rng = np.random.default_rng(seed)
        return self.values(rng) if self.values is not None else drawn(rng, self.args)


@dataclasses.dataclass(frozen=True)
class Program:
    """A kind of model, sharded in one way.

    Attributes:
      name: unique in the suite.
      text: a line that says what it is.
      make: (size) -> the case.
    """

    name: str
    text: str
    make: Callable[[Size], Case]


def normal(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, scale: float = 1.0,
    mean: float = 0.0,
) -> Any:  # fmt: skip
    """Normally distributed numbers. Many are drawn by JAX on its first device, which is a GPU's
    time instead of minutes of numpy's."""
    if math.prod(shape) < _MANY:
        return (mean + scale * rng.standard_normal(shape, np.float32)).astype(dtype)
    return _normal(int(rng.integers(1 << 31)), shape, np.dtype(dtype), scale, mean)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _normal(seed: Any, shape: tuple[int, ...], dtype: Any, scale: float, mean: float) -> jax.Array:
    found = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
    return (mean + scale * found).astype(dtype)


def drawn(rng: np.random.Generator, shapes: Any) -> Any:
    """Small random numbers for floating arrays; 0 for others."""

    def one(leaf: jax.ShapeDtypeStruct) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return np.zeros(leaf.shape, leaf.dtype)
        return normal(rng, leaf.shape, leaf.dtype, 0.05)

    return jax.tree.map(one, shapes)


def array(*dims: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def ints(*dims: int) -> jax.ShapeDtypeStruct:
    return array(*dims, dtype=jnp.int32)


def everywhere(tree: Any) -> Any:
    """Specs that leave every array of a pytree whole."""
    return jax.tree.map(lambda _: PartitionSpec(), tree)
