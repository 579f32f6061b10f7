"""Slices and windows at computed places: dynamic_slice, dynamic_update_slice, gather, scatter.

Along a sharded dim every device handles the part of a window that lies in its own shard: places
are made legal globally first, as XLA would, and only then shifted by the shard's offset. What is
read is summed over the shards; what is written needs no communication at all.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from sharding import _jax
from sharding.monoid import identity
from sharding.rule import Dims, Factor, Kind, Local, OpInfo, Rule, RuleFn, register, sum_monoid

p = _jax.primitives
Mode = lax.GatherScatterMode


class _Factors(dict[str, Factor]):
    """The factors of a rule under construction."""

    def dim(self, name: str, size: int, kind: Kind = Kind.PASS, monoid: str = "") -> tuple:
        """The names of a dim of one factor; none for a dim of size 1."""
        if size == 1:
            return ()
        self[name] = Factor(size, kind, monoid)
        return (name,)


def _bounded(places: Any, low: Any, high: Any) -> Any:
    """`places` clamped to [low, high], as int32 that can be shifted by an offset."""
    info = jnp.iinfo(places.dtype)
    low, high = (np.clip(b, info.min, info.max).astype(places.dtype) for b in (low, high))
    return jnp.minimum(jnp.maximum(places, low), high).astype(jnp.int32)


# dynamic_slice and dynamic_update_slice. Dims of the operand are n0, n1 ...; of a slice that is
# shorter than the operand s0, s1 ...


@register(p.dynamic_slice_p)
def _dynamic_slice(op: OpInfo) -> Rule:
    """Dims taken whole pass. Along a sliced dim every shard gives what it has of the slice, and
    the result (not the operand) is all-reduced."""
    src, dst = op.in_avals[0].shape, op.out_avals[0].shape
    monoid = sum_monoid(op.in_avals[0].dtype)
    factors = _Factors()
    left, right = [], []
    for d, (n, m) in enumerate(zip(src, dst, strict=True)):
        if n == m:
            left.append(factors.dim(f"n{d}", n))
            right.append(left[-1])
        else:
            left.append(factors.dim(f"n{d}", n, Kind.REDUCE if monoid else Kind.FIXED, monoid))
            right.append(factors.dim(f"s{d}", m, Kind.FIXED))
    scalars = ((),) * (len(op.in_avals) - 1)
    taken = [d for d, (n, m) in enumerate(zip(src, dst, strict=True)) if n != m and m > 1]
    keeps = {f"n{d}": f"s{d}" for d in taken if src[d] > 1}
    return Rule(
        (tuple(left), *scalars), (tuple(right),), factors, keeps=keeps,
        linear=((0,),), local=_local_dynamic_slice, always=True, flops=0,
    )  # fmt: skip


def _local_dynamic_slice(ctx: Local, op: OpInfo, x: Any, *starts: Any) -> Sequence[Any]:
    """Starts are clamped here, not by XLA: it merges the slice with the one that a device takes of
    its result, and clamps the sum of their starts alone."""
    src, dst = op.in_avals[0].shape, op.out_avals[0].shape
    split = [d for d, n in enumerate(src) if dst[d] != n and ctx.axes(f"n{d}")]
    sizes = [x.shape[d] if d in split or dst[d] == n else dst[d] for d, n in enumerate(src)]
    places = [
        jnp.int32(0) if d in split else _bounded(s, 0, src[d] - dst[d])
        for d, s in enumerate(starts)
    ]
    (out,) = ctx.bind(x, *places, slice_sizes=tuple(sizes))
    for d in split:
        start = _bounded(starts[d], 0, src[d] - dst[d]) - ctx.offset(f"n{d}")
        at = start + lax.iota(jnp.int32, dst[d])
        here = (at >= 0) & (at < x.shape[d])
        out = jnp.take(out, at, axis=d, mode="clip")
        out = jnp.where(_along(here, d, out.ndim), out, jnp.zeros((), out.dtype))
    return [out]


def _along(x: Any, d: int, rank: int) -> Any:
    """A vector as an array of `rank` dims that lies along `d`."""
    return lax.broadcast_in_dim(x, [x.size if i == d else 1 for i in range(rank)], (d,))


@register(p.dynamic_update_slice_p)
def _dynamic_update_slice(op: OpInfo) -> Rule:
    """Every dim of the operand passes: each shard writes what it has of the window. An update that
    is shorter than the dim is whole on every device."""
    src, update = op.in_avals[0].shape, op.in_avals[1].shape
    factors = _Factors()
    left = tuple(factors.dim(f"n{d}", n) for d, n in enumerate(src))
    right = tuple(
        left[d] if m == src[d] else factors.dim(f"s{d}", m, Kind.FIXED)
        for d, m in enumerate(update)
    )
    scalars = ((),) * (len(op.in_avals) - 2)
    cut = frozenset(f"n{d}" for d, m in enumerate(update) if m != src[d])
    return Rule(
        (left, right, *scalars), (left,), factors, linear=((0, 1),),
        local=_local_dynamic_update_slice, local_when=cut, flops=0,
    )  # fmt: skip


def _local_dynamic_update_slice(
    ctx: Local, op: OpInfo, x: Any, update: Any, *starts: Any
) -> Sequence[Any]:
    """Reads the part of the shard that the window may touch, and writes it back updated."""
    src, window = op.in_avals[0].shape, op.in_avals[1].shape
    places = [_bounded(s, 0, n - m) for s, n, m in zip(starts, src, window, strict=True)]
    written: Any = None
    for d, (n, m) in enumerate(zip(src, window, strict=True)):
        if m == n or not ctx.axes(f"n{d}"):
            continue
        start = places[d] - ctx.offset(f"n{d}")
        size = min(m, x.shape[d])
        places[d] = _bounded(start, 0, x.shape[d] - size)
        at = places[d] - start + lax.iota(jnp.int32, size)
        here = _along((at >= 0) & (at < m), d, x.ndim)
        written = here if written is None else written & here
        if m > 1:
            update = jnp.take(update, at, axis=d, mode="clip")
    old = lax.dynamic_slice(x, places, update.shape)
    return ctx.bind(x, jnp.where(written, update, old), *places)


# gather and scatter. Batch dims of the indices are i0, i1 ...; dims of the operand that windows
# cover whole w0, w1 ..., other dims of the operand n0, n1 ..., and of windows s0, s1 ...


def _batched(factors: _Factors, shape: Sequence[int], kinds: Sequence[tuple]) -> list[tuple]:
    """The dims of the indices without their last."""
    return [
        factors.dim(f"i{j}", n, *kind)
        for j, (n, kind) in enumerate(zip(shape[:-1], kinds, strict=True))
    ]


def _with_batch(windows: Sequence[tuple], where: Sequence[int], batch: Sequence[tuple]) -> Dims:
    """Dims of windows at the places `where`, batch dims in order at the others."""
    dims = list(batch)
    for place, window in sorted(zip(where, windows, strict=True)):
        dims.insert(place, window)
    return tuple(dims)


@register(p.gather_p)
def _gather(op: OpInfo) -> Rule:
    """Batch dims and dims taken whole pass. Along an indexed dim, as of a sharded embedding, every
    shard looks up what it has: the result (not the operand) is all-reduced."""
    operand, indices = op.in_avals
    numbers, sizes = op.params["dimension_numbers"], op.params["slice_sizes"]
    monoid = sum_monoid(operand.dtype)
    factors = _Factors()
    batch = _batched(factors, indices.shape, [(Kind.PASS,)] * (len(indices.shape) - 1))
    pairs = dict(
        zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    )
    left, windows = [], []
    for d, n in enumerate(operand.shape):
        if d in pairs:
            left.append(batch[pairs[d]])
            continue
        whole = sizes[d] == n
        found = bool(monoid) and sizes[d] == 1 and d in numbers.start_index_map
        kind = Kind.REDUCE if found else Kind.FIXED
        part = monoid if found else ""
        left.append(factors.dim(f"w{d}", n) if whole else factors.dim(f"n{d}", n, kind, part))
        if d not in numbers.collapsed_slice_dims:
            windows.append(left[-1] if whole else factors.dim(f"s{d}", sizes[d], Kind.FIXED))
    vector = factors.dim("vector", indices.shape[-1], Kind.FIXED)
    fill = op.params["fill_value"]
    reduced = [names[0] for names in left if names and factors[names[0]].kind is Kind.REDUCE]
    first = next((names[0] for names in batch if names), None)
    keeps = {reduced[0]: first} if len(reduced) == 1 and first else {}
    return Rule(
        (tuple(left), (*batch, vector)),
        (_with_batch(windows, numbers.offset_dims, batch),),
        factors,
        linear=((0,),) if fill is None or fill == 0 else (),
        keeps=keeps,
        local=_local_gather,
        flops=0,
    )


def _local_gather(ctx: Local, op: OpInfo, x: Any, indices: Any) -> Sequence[Any]:
    numbers, sizes = op.params["dimension_numbers"], op.params["slice_sizes"]
    shape = op.in_avals[0].shape
    local = tuple(x.shape[d] if s == shape[d] else s for d, s in enumerate(sizes))
    axes = tuple(a for d in numbers.start_index_map for a in ctx.axes(f"n{d}"))
    if not axes:
        return ctx.bind(x, indices, slice_sizes=local)
    fills = op.params["mode"] is Mode.FILL_OR_DROP
    if fills:
        indices = indices.astype(jnp.int32)  # as the whole gather does
    bounds = np.array([shape[d] - sizes[d] for d in numbers.start_index_map])
    start = _bounded(indices, 0, bounds)
    legal: Any = jnp.all(indices == start, axis=-1)
    start, here = _shifted(ctx, numbers.start_index_map, start, x.shape)
    (out,) = ctx.bind(
        x, start, slice_sizes=local, mode=Mode.CLIP, fill_value=None, indices_are_sorted=False
    )
    places = tuple(d for d in range(out.ndim) if d not in numbers.offset_dims)
    zero = jnp.zeros((), out.dtype)
    if not fills:
        return [jnp.where(lax.broadcast_in_dim(here, out.shape, places), out, zero)]
    # The fill is an addend of one shard.
    fill = jnp.where(ctx.index(axes) == 0, jnp.asarray(op.params["fill_value"], out.dtype), zero)
    legal, here = (lax.broadcast_in_dim(m, out.shape, places) for m in (legal, here))
    return [jnp.where(legal, jnp.where(here, out, zero), fill)]


def _shifted(
    ctx: Local, where: Sequence[int], start: Any, shape: Sequence[int]
) -> tuple[Any, Any]:
    """Global places of windows as places in this shard, and whether they lie in it."""
    here = jnp.ones(start.shape[:-1], jnp.bool_)
    columns = []
    for k, d in enumerate(where):
        at = start[..., k]
        if ctx.axes(f"n{d}"):
            at = at - ctx.offset(f"n{d}")
            here &= (at >= 0) & (at < shape[d])
        columns.append(at)
    return jnp.stack(columns, axis=-1), here


def _scatter(monoid: str, linear: tuple[tuple[int, ...], ...] = ()) -> RuleFn:
    """The rule of a scatter that combines by `monoid`; "" where the order of updates matters."""

    def rule(op: OpInfo) -> Rule:
        """Every dim of the operand but a partly written one passes: each shard takes the updates
        that fall into it. Updates over sharded batch dims are reduced, the operand counting once.
        """
        operand, indices, updates = op.in_avals
        numbers = op.params["dimension_numbers"]
        pairs = dict(
            zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True)
        )
        reducible = bool(monoid) and sum_monoid(operand.dtype) == "add"
        reduced = (Kind.REDUCE, monoid) if reducible else (Kind.FIXED,)
        batching = pairs.values()
        kinds = [(Kind.PASS,) if j in batching else reduced for j in range(len(indices.shape) - 1)]
        factors = _Factors()
        batch = _batched(factors, indices.shape, kinds)
        left, windows = [], []
        sizes = window_sizes(numbers, operand.shape, updates.shape)
        for d, (n, size) in enumerate(zip(operand.shape, sizes, strict=True)):
            if d in pairs:
                left.append(batch[pairs[d]])
                continue
            whole = size == n
            found = size == 1 and d in numbers.scatter_dims_to_operand_dims
            kind = Kind.PASS if found else Kind.FIXED
            left.append(factors.dim(f"w{d}", n) if whole else factors.dim(f"n{d}", n, kind))
            if d not in numbers.inserted_window_dims:
                windows.append(left[-1] if whole else factors.dim(f"s{d}", size, Kind.FIXED))
        vector = factors.dim("vector", indices.shape[-1], Kind.FIXED)
        written = _with_batch(windows, numbers.update_window_dims, batch)
        special = frozenset(f for f in factors if f[0] == "n" or factors[f].kind is Kind.REDUCE)
        return Rule(
            (tuple(left), (*batch, vector), written), (tuple(left),), factors,
            linear=linear, local=_local_scatter, local_when=special, flops=0,
        )  # fmt: skip

    return rule


register(p.scatter_add_p, _jax.scatter_sub_p)(_scatter("add", ((0, 2),)))
register(p.scatter_mul_p)(_scatter("mul"))
register(p.scatter_min_p)(_scatter("min"))
register(p.scatter_max_p)(_scatter("max"))
register(p.scatter_p)(_scatter(""))


def window_sizes(numbers: Any, operand: Sequence[int], updates: Sequence[int]) -> list[int]:
    """Global size of a scatter's window per dim of the operand, from the shapes of both."""
    sizes = iter([updates[d] for d in sorted(numbers.update_window_dims)])
    alone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    return [1 if d in alone else next(sizes) for d in range(len(operand))]


def _local_scatter(
    ctx: Local, op: OpInfo, x: Any, indices: Any, updates: Any
) -> Sequence[Any]:
    numbers, shape = op.params["dimension_numbers"], op.in_avals[0].shape
    where = numbers.scatter_dims_to_operand_dims
    sizes = window_sizes(numbers, shape, op.in_avals[2].shape)
    reduced = [f for f in _batch_factors(op) if ctx.axes(f)]
    if reduced:
        none = _identity(op.primitive, x.dtype)
        for factor in reduced:
            updates = ctx.mask(updates, 2, factor, none)
        first = ctx.index(tuple(a for f in reduced for a in ctx.axes(f))) == 0
        x = jnp.where(first, x, none)
    if not any(ctx.axes(f"n{d}") for d in where):
        return ctx.bind(x, indices, updates)
    bounds = np.array([shape[d] - sizes[d] for d in where])
    clips = op.params["mode"] is Mode.CLIP
    # What is out of bounds stays so, and is dropped like the updates of other shards: those go
    # past the end. Between the end of an uneven dim and that of its last shard is only padding.
    start = _bounded(indices, 0, bounds) if clips else _bounded(indices, -1, bounds + 1)
    start, here = _shifted(ctx, where, start, x.shape)
    past = np.array([x.shape[d] for d in where], np.int32)
    start = jnp.where(here[..., None], start, past)
    if start.size == len(where):
        # XLA turns a scatter of one update into a slice and an update, and merges the slice with
        # one that made `x`: the clamp of the first is lost, and the update lands in this shard.
        x = lax.optimization_barrier(x)
    return ctx.bind(x, start, updates, mode=Mode.FILL_OR_DROP, indices_are_sorted=False)


def _batch_factors(op: OpInfo) -> list[str]:
    """The batch dims of the indices that the operand does not have."""
    batching = op.params["dimension_numbers"].scatter_indices_batching_dims
    return [f"i{j}" for j in range(len(op.in_avals[1].shape) - 1) if j not in batching]


def _identity(primitive: Any, dtype: Any) -> Any:
    """The update that changes nothing."""
    monoids = {p.scatter_min_p: "min", p.scatter_max_p: "max", p.scatter_mul_p: "mul"}
    return jnp.asarray(identity(monoids.get(primitive, "add"), dtype))
