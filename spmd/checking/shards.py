"""Whole arrays as what each device holds of them, and back; on the host, with numpy alone.

Nothing here calls the partitioner: a fault there must not hide itself. Random keys are the integers
of `jax.random.key_data`, with one more dim that is never sharded.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sharding import _jax
from sharding.mesh import MeshShape, axes_size
from sharding.monoid import identity, owner
from sharding.program import Value
from sharding.spec import Layout

_REDUCE: dict[str, Any] = {
    "add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum,
    "and": np.bitwise_and, "or": np.bitwise_or,
}  # fmt: skip


def is_key(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.extended)


def to_words(x: Any) -> Any:
    """An array that can leave a program: a random key as integers."""
    return jax.random.key_data(x) if is_key(x.dtype) else x


def from_words(x: Any, dtype: Any) -> Any:
    """The inverse, for a value of `dtype`; inside of a program or outside."""
    return jax.random.wrap_key_data(x, impl=_jax.key_impl(dtype)) if is_key(dtype) else x


def on_host(x: Any, dtype: Any = None) -> np.ndarray:
    """A whole array on the host, as integers where it is a random key."""
    dtype = getattr(x, "dtype", None) if dtype is None else dtype
    if dtype is not None and is_key(dtype):
        return np.asarray(jax.random.key_data(x))
    return np.asarray(x, dtype)


def words_layout(layout: Layout, value: Value) -> Layout:
    """The layout of the integers of a random key; that of other values as it is."""
    return Layout((*layout.dims, ()), layout.partial) if is_key(value.dtype) else layout


def split(x: np.ndarray, layout: Layout, mesh: MeshShape) -> np.ndarray:
    """What each device holds of `x`, as [devices, *local shape].

    Padding is poison (NaN, integers in and out of bounds, True), and so is what only its owner has,
    elsewhere. A partial value comes as addends (or operands of its monoid) that give exactly `x`.
    """
    shards = _cut(x, layout, mesh, poison(x.dtype))
    for monoid in dict.fromkeys(m for _, m in layout.partial):
        axes = tuple(a for a, m in layout.partial if m == monoid)
        place = owner(monoid)
        if place is not None:
            shards = _only(shards, place, axes, mesh)
            continue
        shards = _parts(shards, monoid, _index(axes, mesh), axes_size(mesh, axes))
    return shards


def inside(shape: Sequence[int], layout: Layout, mesh: MeshShape) -> np.ndarray:
    """Which elements of the local arrays are not padding, as bool[devices, *local shape]."""
    return _cut(np.ones(shape, bool), layout, mesh, np.zeros(1, bool))


def whole_parts(shards: np.ndarray, layout: Layout, mesh: MeshShape) -> np.ndarray:
    """[devices, *local shape] where each device has the reduction over the layout's partial axes;
    each device keeps its own copy along the others."""
    sizes = tuple(size for _, size in mesh.axes)
    grid = shards.reshape(*sizes, *shards.shape[1:])
    for axis, monoid in layout.partial:
        at = mesh.names.index(axis)
        slices = np.split(grid, sizes[at], at)
        with np.errstate(invalid="ignore", over="ignore"):
            place = owner(monoid)
            total = reduce(_REDUCE[monoid], slices) if place is None else slices[place]
            total = total.astype(shards.dtype)
        grid = np.concatenate([total] * sizes[at], at)
    return grid.reshape(shards.shape)


def global_index(
    device: int, local: Sequence[int], shape: Sequence[int], layout: Layout, mesh: MeshShape
) -> tuple[int, ...]:
    """Where an element of a device's local array is in the whole one."""
    found = []
    for d, (i, axes) in enumerate(zip(local, layout.dims, strict=True)):
        size = -(-shape[d] // axes_size(mesh, axes))
        found.append(int(i) + int(_index(axes, mesh)[device]) * size)
    return tuple(found)


def coordinates(device: int, mesh: MeshShape) -> str:
    """`data=1, tensor=0`"""
    at = np.unravel_index(device, tuple(size for _, size in mesh.axes))
    return ", ".join(f"{name}={i}" for name, i in zip(mesh.names, at, strict=True))


def poison(dtype: Any) -> np.ndarray:
    """What padding holds."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return np.full(1, np.nan).astype(dtype)
    if dtype == np.bool_:
        return np.ones(1, bool)
    drawn = np.random.default_rng(0).integers(-3, 9, 37)
    unsigned = jnp.issubdtype(dtype, jnp.unsignedinteger)
    return (np.abs(drawn) if unsigned else drawn).astype(dtype)


def _index(axes: tuple[str, ...], mesh: MeshShape) -> np.ndarray:
    """Per device its place along `axes`, major to minor."""
    sizes = tuple(size for _, size in mesh.axes)
    at = dict(zip(mesh.names, np.unravel_index(np.arange(mesh.size), sizes), strict=True))
    index = np.zeros(mesh.size, int)
    for axis in axes:
        index = index * axes_size(mesh, (axis,)) + at[axis]
    return index


def _cut(x: np.ndarray, layout: Layout, mesh: MeshShape, fill: np.ndarray) -> np.ndarray:
    for d, axes in enumerate(layout.dims):
        missing = -x.shape[d] % axes_size(mesh, axes)
        if missing:
            shape = (*x.shape[:d], missing, *x.shape[d + 1 :])
            x = np.concatenate([x, np.resize(fill, shape).astype(x.dtype)], d)
    local = [n // axes_size(mesh, axes) for n, axes in zip(x.shape, layout.dims, strict=True)]
    starts = [_index(axes, mesh) * n for axes, n in zip(layout.dims, local, strict=True)]
    pieces = [
        x[tuple(slice(s[i], s[i] + n) for s, n in zip(starts, local, strict=True))]
        for i in range(mesh.size)
    ]
    return np.stack(pieces)


def _only(x: np.ndarray, place: int, axes: Sequence[str], mesh: MeshShape) -> np.ndarray:
    """`x` with poison but on devices at a place along every one of the axes."""
    mine = np.all([_index((axis,), mesh) == place for axis in axes], 0)
    elsewhere = np.resize(poison(x.dtype), x.shape).astype(x.dtype)
    return np.where(mine.reshape(-1, *(1,) * (x.ndim - 1)), x, elsewhere)


def _parts(x: np.ndarray, monoid: str, index: np.ndarray, count: int) -> np.ndarray:
    """`x` with the copies of each group of devices turned into operands of the monoid."""
    at = index.reshape(-1, *(1,) * (x.ndim - 1))
    if monoid == "add" and jnp.issubdtype(x.dtype, jnp.inexact) and x.dtype.itemsize > 1:
        # Halves, quarters ...: exact, and none is zero, which would hide an infinity beside it.
        weights = 0.5 ** np.minimum(at + 1, max(count - 1, 0))
        return x * weights.astype(x.dtype)
    if monoid == "add" and x.dtype.kind in "iu":
        drawn = np.random.default_rng(1).integers(0, 99, (count, *x.shape[1:])).astype(x.dtype)
        drawn[-1] = -drawn[:-1].sum(0, dtype=x.dtype)
        return np.where(at == count - 1, x + drawn[-1], drawn[index])
    owner = np.arange(x[0].size).reshape(x.shape[1:]) % count
    return np.where(owner == at, x, identity(monoid, x.dtype))
