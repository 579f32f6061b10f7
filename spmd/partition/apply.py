"""Emits the collectives of a reshard plan, inside `shard_map`."""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sharding.mesh import MeshShape, axes_size, axis_size, refine, refine_refs, split_ref
from sharding.monoid import owner
from sharding.parts import cut, times, written
from sharding.spec import Layout
from spmd.partition.reshard import Dims, Step


def apply(
    steps: Sequence[Step], x: Any, src: Layout, shape: tuple[int, ...], mesh: MeshShape
) -> Any:
    """`x`, laid out as `src`, after `steps`.

    Args:
      shape: global shape.
    """
    if not steps:
        return x
    if 0 in shape:  # there is nothing to move, and XLA has no collectives of nothing
        return lax.empty(steps[-1].after.local_shape(shape, mesh), x.dtype)
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return _apply_to_keys(steps, x, src, shape, mesh)
    return _in_bytes(lambda y: _stepwise(steps, y, src, shape, mesh), x)


def _stepwise(steps: Sequence[Step], x: Any, before: Layout, shape: Any, mesh: MeshShape) -> Any:
    for step in steps:
        x = _APPLY[step.kind](step, x, before, shape, mesh)
        before = step.after
    return x


def all_gather(x: Any, axes: tuple[str, ...], dim: int) -> Any:
    """Shards along `axes` concatenated on `dim`."""
    return _in_bytes(lambda y: lax.all_gather(y, axes, axis=dim, tiled=True), x)


def linear_index(axes: Sequence[str], mesh: MeshShape) -> Any:
    """Traced int32: this device's place along `axes`, major to minor."""
    index = None
    for axis in axes:
        place = lax.axis_index(axis)
        if index is not None:
            place = lax.add(times(index, axis_size(mesh, axis)), place)
        index = place
    return np.int32(0) if index is None else index


def on_first_device(
    fun: Callable[..., Sequence[Any]], operands: Sequence[Any], mesh: MeshShape
) -> list[Any]:
    """Results of `fun`, which runs on the first device of the mesh alone, on every device."""
    if mesh.size == 1:
        return list(fun(*operands))
    avals = jax.eval_shape(lambda *xs: list(fun(*xs)), *operands)
    run = lambda *xs: [_words(x) for x in fun(*xs)]  # noqa: E731
    words = jax.eval_shape(run, *operands)
    nothing = lambda *xs: [jnp.zeros(w.shape, w.dtype) for w in words]  # noqa: E731
    found = lax.cond(linear_index(mesh.names, mesh) == 0, run, nothing, *operands)
    summed = [reduce_over(w, mesh.names, "add") if w.size else w for w in found]
    return [_from_words(w, a.dtype) for w, a in zip(summed, avals, strict=True)]


def _words(x: Any) -> Any:
    """The bits of `x` as integers: a sum of floats would lose the sign of zero."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint8)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.stack([_words(lax.real(x)), _words(lax.imag(x))])
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return lax.bitcast_convert_type(x, f"uint{jnp.finfo(x.dtype).bits}")
    return x


def _from_words(words: Any, dtype: Any) -> Any:
    if dtype == jnp.bool_:
        return words.astype(dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        part = jnp.float32 if dtype == jnp.complex64 else jnp.float64
        return lax.complex(_from_words(words[0], part), _from_words(words[1], part))
    if jnp.issubdtype(dtype, jnp.inexact):
        return lax.bitcast_convert_type(words, dtype)
    return words


def _in_bytes(fun: Callable[[Any], Any], x: Any) -> Any:
    """`fun` of integers; those of 1 or 2 bits as bytes, since XLA moves no smaller ones than 4."""
    small = jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 4
    return fun(x.astype(jnp.int8)).astype(x.dtype) if small else fun(x)


def reduce_over(x: Any, axes: tuple[str, ...], monoid: str) -> Any:
    """All-reduce by any monoid that `Sharding.partial` knows."""
    if monoid in ("and", "or"):
        reduce = lax.pmin if monoid == "and" else lax.pmax
        return reduce(x.astype(jnp.int8), axes).astype(x.dtype)
    return _in_bytes(lambda y: _REDUCE[monoid](y, axes), x)


def _product(x: Any, axes: tuple[str, ...]) -> Any:
    return lax.reduce(lax.all_gather(x, axes), jnp.ones((), x.dtype), lax.mul, (0,))


def _extreme(highest: bool, x: Any, axes: tuple[str, ...]) -> Any:
    reduce = lax.pmax if highest else lax.pmin
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return reduce(x, axes)
    # As integers in the same order: collectives of most platforms lose NaNs.
    return _from_ordered(reduce(_ordered(x, highest), axes), x.dtype)


_REDUCE: dict[str, Callable] = {
    "add": lax.psum, "mul": _product,
    "max": partial(_extreme, True), "min": partial(_extreme, False),
}  # fmt: skip


def _ordered(x: Any, nan_highest: bool) -> Any:
    """Integers in the order of floats; any NaN is the highest of all, or the lowest. They are as
    wide as the floats, of which those of 8 bits and less are in too many formats: 16."""
    wide = x if x.dtype.itemsize >= 2 else x.astype(jnp.bfloat16)
    whole = jnp.dtype(f"int{8 * wide.dtype.itemsize}")
    found = lax.bitcast_convert_type(wide, whole)
    found = jnp.where(found < 0, found ^ jnp.iinfo(whole).max, found)
    limit = jnp.iinfo(whole).max if nan_highest else jnp.iinfo(whole).min
    return jnp.where(jnp.isnan(wide), jnp.asarray(limit, whole), found)


def _from_ordered(x: Any, dtype: Any) -> Any:
    """The inverse of `_ordered`."""
    x = jnp.where(x < 0, x ^ jnp.iinfo(x.dtype).max, x)
    wide = dtype if jnp.dtype(dtype).itemsize >= 2 else jnp.bfloat16
    return lax.bitcast_convert_type(x, wide).astype(dtype)


def _addend(step: Step, x: Any, before: Layout, shape: Any, mesh: MeshShape) -> Any:
    first = linear_index(step.axes, mesh) == 0
    return lax.select(jnp.broadcast_to(first, x.shape), x, jnp.zeros_like(x))


def _owner(step: Step, x: Any, before: Layout, shape: Any, mesh: MeshShape) -> Any:
    """Zeros on every device but the owner."""
    held = [(axis, owner(monoid)) for axis, monoid in before.partial if axis in step.axes]
    mine = reduce(jnp.logical_and, [lax.axis_index(axis) == place for axis, place in held])
    return lax.select(jnp.broadcast_to(mine, x.shape), x, jnp.zeros_like(x))


def _spread(step: Step, x: Any, before: Layout, shape: Any, mesh: MeshShape) -> Any:
    whole = list(x.shape)
    whole[step.dim] *= axes_size(mesh, step.axes)
    start = times(linear_index(step.axes, mesh), x.shape[step.dim])
    return written(jnp.zeros(whole, x.dtype), x, start, step.dim)


def _slice(step: Step, x: Any, before: Layout, shape: Any, mesh: MeshShape) -> Any:
    size = _local(step.after, step.dim, shape, mesh)
    x = pad_to(x, step.dim, size * axes_size(mesh, step.axes))
    return cut(x, times(linear_index(step.axes, mesh), size), size, step.dim)


def _all_gather(step: Step, x: Any, before: Layout, shape: Any, mesh: MeshShape) -> Any:
    x = all_gather(x, step.axes, step.dim)
    return trim_to(x, step.dim, _local(step.after, step.dim, shape, mesh))


def _all_to_all(step: Step, x: Any, before: Layout, shape: Any, mesh: MeshShape) -> Any:
    size = _local(step.after, step.to_dim, shape, mesh)
    x = pad_to(x, step.to_dim, size * axis_size(mesh, step.axes[0]))
    axis, groups = grouped(step.axes[0], mesh)
    x = lax.all_to_all(
        x, axis, step.to_dim, step.dim, axis_index_groups=groups, tiled=True
    )  # fmt: skip
    return trim_to(x, step.dim, _local(step.after, step.dim, shape, mesh))


def grouped(ref: str, mesh: MeshShape) -> tuple[str, list[list[int]] | None]:
    """An axis of the mesh, and the groups of devices along it where `ref` is a part of it."""
    if ref in mesh.names:
        return ref, None
    name, pre, size = split_ref(ref)
    assert size is not None, f"{ref} is no axis of {mesh}"
    return name, _groups((pre, size, axis_size(mesh, name) // (pre * size)))[1]


def _reduce_scatter(step: Step, x: Any, before: Layout, shape: Any, mesh: MeshShape) -> Any:
    size = _local(step.after, step.dim, shape, mesh)
    x = pad_to(x, step.dim, size * axis_size(mesh, step.axes[0]))
    if jnp.issubdtype(x.dtype, jnp.complexfloating):  # TPU compilers scatter no complex numbers
        parts = _scattered(step, jnp.stack([lax.real(x), lax.imag(x)]), step.dim + 1)
        return lax.complex(parts[0], parts[1])
    return _scattered(step, x, step.dim)


def _scattered(step: Step, x: Any, dim: int) -> Any:
    for groups in _groups(step.parts):
        x = lax.psum_scatter(
            x, step.axes[0], scatter_dimension=dim, tiled=True, axis_index_groups=groups
        )
    return x


def _groups(parts: tuple[int, ...]) -> list[list[list[int]] | None]:
    """Per part the groups of devices along an axis, as `axis_index_groups`: those that differ in
    this digit of their number alone."""
    numbers = np.arange(prod(parts)).reshape(parts or (1,))
    return [np.moveaxis(numbers, i, -1).reshape(-1, n).tolist() for i, n in enumerate(parts)] or [
        None
    ]


def _all_reduce(step: Step, x: Any, before: Layout, shape: Any, mesh: MeshShape) -> Any:
    return reduce_over(x, step.axes, step.monoid)


def _permute(step: Step, x: Any, before: Layout, shape: Any, mesh: MeshShape) -> Any:
    # Parts of axes are numbered as the axes are.
    refs = {a for layout in (before, step.after) for dim in layout.dims for a in dim}
    fine = refine(mesh, refs - {*mesh.names})
    src, dst = (
        tuple(refine_refs(mesh, fine, axes) for axes in layout.dims)
        for layout in (before, step.after)
    )
    moved = {grouped(a, mesh)[0] for a in step.axes}
    axes = tuple(a for a in mesh.names if a in moved)
    pairs = permutation(src, dst, refine_refs(mesh, fine, axes), fine)
    return lax.ppermute(x, axes, pairs)


_APPLY = {
    "owner": _owner, "addend": _addend,
    "spread": _spread,
    "slice": _slice,
    "all_gather": _all_gather,
    "all_to_all": _all_to_all,
    "reduce_scatter": _reduce_scatter,
    "all_reduce": _all_reduce,
    "permute": _permute,
}


def permutation(
    src: Dims, dst: Dims, axes: tuple[str, ...], mesh: MeshShape
) -> list[tuple[int, int]]:
    """(source, destination) pairs, linear over `axes`, that turn layout `src` into `dst`.

    A destination wants the block at its index along the new axes; the block lies at the source
    with that index along the old axes. Axes that hold no block pair up in order, so that the map
    is a bijection.
    """
    sizes = [axis_size(mesh, a) for a in axes]
    held = [a for s, d in zip(src, dst, strict=True) if s != d for a in s]
    wanted = [a for s, d in zip(src, dst, strict=True) if s != d for a in d]
    held += [a for a in axes if a not in held]
    wanted += [a for a in axes if a not in wanted]
    # Linear index along `held` (source) equals linear index along `wanted` (destination).
    grid = np.arange(prod(sizes)).reshape(sizes)
    by_held = grid.transpose([axes.index(a) for a in held]).ravel()
    by_wanted = grid.transpose([axes.index(a) for a in wanted]).ravel()
    return [(int(s), int(d)) for s, d in zip(by_held, by_wanted, strict=True)]


def _local(layout: Layout, dim: int, shape: Sequence[int], mesh: MeshShape) -> int:
    return -(-shape[dim] // axes_size(mesh, layout.dims[dim]))


def pad_to(x: Any, dim: int, size: int) -> Any:
    """Padding at the end of `dim`; its content is never read."""
    if x.shape[dim] == size:
        return x
    widths = [(0, size - x.shape[dim], 0) if d == dim else (0, 0, 0) for d in range(x.ndim)]
    return lax.pad(x, jnp.zeros((), x.dtype), widths)


def trim_to(x: Any, dim: int, size: int) -> Any:
    return x if x.shape[dim] == size else lax.slice_in_dim(x, 0, size, axis=dim)


def _apply_to_keys(steps: Any, x: Any, src: Layout, shape: Any, mesh: MeshShape) -> Any:
    """Collectives move the words of random keys: one more dim, never sharded."""
    impl = jax.random.key_impl(x)
    data = jax.random.key_data(x)
    wide = [s._replace(after=Layout((*s.after.dims, ()), s.after.partial)) for s in steps]
    data = apply(
        wide, data, Layout((*src.dims, ()), src.partial), (*shape, data.shape[-1]), mesh
    )
    return jax.random.wrap_key_data(data, impl=impl)
