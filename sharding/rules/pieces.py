"""Cutting and joining: slice, pad, reverse, concatenate, split, stack, tile.

Along a sharded dim every shard works out which elements of its result lie where, and fetches those
from its neighbours. Nothing is ever gathered in order to be cut again.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from sharding import _jax
from sharding.parts import cut, pick, where
from sharding.rule import (
    Factor,
    Kind,
    Local,
    OpInfo,
    Rule,
    identity_rule,
    names,
    register,
    register_inline,
    sum_monoid,
)  # fmt: skip

p = _jax.primitives


def _dims(op: OpInfo, kinds: Sequence[Kind], **rule: Any) -> Rule:
    """Dims shared one to one by operand 0 and result 0; a dim that is cut from n to 1 has no place
    in the result, and is reduced."""
    src, dst = op.in_avals[0].shape, op.out_avals[0].shape
    monoid = sum_monoid(op.in_avals[0].dtype)
    factors: dict[str, Factor] = {}
    left, right = [], []
    for d, (n, m, kind) in enumerate(zip(src, dst, kinds, strict=True)):
        name = f"d{d}"
        if kind is Kind.REDUCE and not monoid:
            kind = Kind.FIXED
        factors[name] = Factor(n, kind, monoid if kind is Kind.REDUCE else "")
        if kind is Kind.PERMUTE:
            factors[name] = Factor(m, kind)
        left.append((name,) if n != 1 else ())
        right.append((name,) if m != 1 else ())
    cut = frozenset(f"d{d}" for d, kind in enumerate(kinds) if kind is not Kind.PASS)
    rest = tuple(() for _ in op.in_avals[1:])
    return Rule((tuple(left), *rest), (tuple(right),), factors, **{"local_when": cut, **rule})


def _cut_kinds(op: OpInfo, cut: Sequence[bool]) -> list[Kind]:
    src, dst = op.in_avals[0].shape, op.out_avals[0].shape
    return [
        Kind.PASS if not is_cut else Kind.REDUCE if m == 1 < n else Kind.PERMUTE
        for n, m, is_cut in zip(src, dst, cut, strict=True)
    ]


@register(p.slice_p)
def _slice(op: OpInfo) -> Rule:
    """A sliced dim keeps its axes: shards fetch what is theirs of the slice. A single element of
    a sharded dim (x[3]) comes from its owner: the result is all-reduced."""
    src, dst = op.in_avals[0].shape, op.out_avals[0].shape
    kinds = _cut_kinds(op, [n != m for n, m in zip(src, dst, strict=True)])
    begins = op.params["start_indices"]
    owned = {f"d{d}": (1, begins[d]) for d, kind in enumerate(kinds) if kind is Kind.REDUCE}
    # Parameters are of whole dims: sharded ones need others, whether they are sliced or not.
    return _dims(op, kinds, linear=((0,),), local=_local_slice, local_when=None, owned=owned,
                 fetches=(0,))  # fmt: skip


def _local_slice(ctx: Local, op: OpInfo, x: Any) -> Sequence[Any]:
    src, dst = op.in_avals[0].shape, op.out_avals[0].shape
    begins = op.params["start_indices"]
    strides = op.params["strides"] or (1,) * len(src)
    starts, limits, steps = [], [], []
    for d, (n, m) in enumerate(zip(src, dst, strict=True)):
        axes = ctx.axes(f"d{d}")
        if n == m or not axes:
            starts.append(begins[d])
            limits.append(op.params["limit_indices"][d] if n != m else x.shape[d])
            steps.append(strides[d])
            continue
        if m == 1:
            x = _only_owner(ctx, x, d, begins[d])
            starts.append(begins[d] % x.shape[d])
            limits.append(begins[d] % x.shape[d] + 1)
        else:
            size = ctx.local_out(0)[d]
            at = [begins[d] + strides[d] * size * i for i in range(ctx.shards(f"d{d}"))]
            x = ctx.fetch(x, d, axes, n, at, max(strides[d] * (size - 1) + 1, 0))
            starts.append(0)
            limits.append(x.shape[d])
        steps.append(strides[d] if m != 1 else 1)
    return ctx.bind(x, start_indices=tuple(starts), limit_indices=tuple(limits),
                    strides=tuple(steps))


def _only_owner(ctx: Local, x: Any, d: int, place: int) -> Any:
    """Zeros on every shard but the one that holds global `place` along `d`."""
    mine = lax.eq(ctx.index(ctx.axes(f"d{d}")), np.int32(place // x.shape[d]))
    return where(lax.broadcast(mine, x.shape), x, 0)


@register(p.rev_p)
def _rev(op: OpInfo) -> Rule:
    """Shards swap places along a reversed dim, with their mirror image. Of one element nothing is
    reversed, as of the kernel of a 1 x 1 convolution on the way back."""
    shape = op.in_avals[0].shape
    if all(shape[d] == 1 for d in op.params["dimensions"]):
        return identity_rule(shape)
    rank = len(shape)
    kinds = [Kind.PERMUTE if d in op.params["dimensions"] else Kind.PASS for d in range(rank)]
    return _dims(op, kinds, linear=((0,),), local=_local_rev, fetches=(0,))


def _local_rev(ctx: Local, op: OpInfo, x: Any) -> Sequence[Any]:
    shape, dims = op.in_avals[0].shape, op.params["dimensions"]
    sharded = [d for d in dims if ctx.axes(f"d{d}")]
    if len(sharded) > 1 and all(x.shape[d] * ctx.shards(f"d{d}") == shape[d] for d in sharded):
        # Every device is the mirror image of one other.
        axes = tuple(a for d in sharded for a in ctx.axes(f"d{d}"))
        count = prod(ctx.shards(f"d{d}") for d in sharded)
        (x,) = ctx.fetch(x[None], 0, axes, count, range(count)[::-1], 1)
        return ctx.bind(x)
    for d in sharded:
        n, size, shards = shape[d], ctx.local_out(0)[d], ctx.shards(f"d{d}")
        starts = [n - size * (i + 1) for i in range(shards)]
        x = ctx.fetch(x, d, ctx.axes(f"d{d}"), n, starts, size)
    return ctx.bind(x)


@register(p.pad_p)
def _pad(op: OpInfo) -> Rule:
    """A padded dim keeps its axes: shards fetch what their part of the result holds. Linear in the
    operand alone where the padding is a literal zero."""
    config = op.params["padding_config"]
    kinds = _cut_kinds(op, [tuple(c) != (0, 0, 0) for c in config])
    # Padding down to one element may be of the padding value: not the owner's to tell.
    kinds = [Kind.FIXED if kind is Kind.REDUCE else kind for kind in kinds]
    value = op.literal(1)
    linear = ((0,),) if value is not None and value == 0 else ((0, 1),)
    single = [d for d, n in enumerate(op.in_avals[0].shape) if n == 1 < op.out_avals[0].shape[d]]
    owned = {f"d{d}": (0, config[d][0]) for d in single if config[d][0] >= 0}
    return _dims(op, kinds, linear=linear, local=_local_pad, owned=owned, fetches=(0,))


def _local_pad(ctx: Local, op: OpInfo, x: Any, value: Any) -> Sequence[Any]:
    config = [tuple(c) for c in op.params["padding_config"]]
    for d, (low, _, interior) in enumerate(config):
        axes, shards = ctx.axes(f"d{d}"), ctx.shards(f"d{d}")
        if config[d] == (0, 0, 0) or not axes:
            continue
        step, size = interior + 1, ctx.local_out(0)[d]
        # Result place j holds operand element (j - low) / step, where that is whole.
        starts = [-((low - i * size) // step) for i in range(shards)]
        width = -(-size // step)
        if x.shape[d] == 1 == op.in_avals[0].shape[d]:  # whole on every device
            at = pick(starts, ctx.index(axes))
            at = at + lax.broadcasted_iota(jnp.int32, _resized(x, d, width), d)
            x = jnp.where(at == 0, x, value)
        else:
            x = ctx.fetch(x, d, axes, op.in_avals[0].shape[d], starts, width, value)
        config[d] = (0, 0, 0)
        if step > 1:
            lead = [start * step + low - i * size for i, start in enumerate(starts)]
            x = _spread(ctx, x, d, axes, step, lead, size, value)
    (out,) = ctx.bind(x, value, padding_config=tuple(config))
    return [out]


def _resized(x: Any, d: int, n: int) -> tuple[int, ...]:
    return (*x.shape[:d], n, *x.shape[d + 1 :])


def _spread(
    ctx: Local, x: Any, d: int, axes: tuple[str, ...], step: int, lead: Sequence[int], size: int,
    value: Any,
) -> Any:  # fmt: skip
    """`size` elements with those of `x` `step` apart, the first at `lead[shard]` < step."""
    same = len({*lead}) == 1
    low = lead[0] if same else step - 1
    places = max((x.shape[d] - 1) * step + 1, 0)
    high = size - (low if same else 0) - places
    widths = [(low, high, step - 1) if i == d else (0, 0, 0) for i in range(x.ndim)]
    x = lax.pad(x, value, widths)
    if same:
        return x
    start = pick([step - 1 - n for n in lead], ctx.index(axes))
    return cut(x, start, size, d)


@register(p.concatenate_p)
def _concatenate(op: OpInfo) -> Rule:
    """The joined dim keeps its axes: shards fetch from every operand what falls into their part.
    Operands of one element are whole on every device."""
    shape, axis = op.out_avals[0].shape, op.params["dimension"]
    dims = names("d", len(shape))
    factors = {d: Factor(n) for d, n in zip(dims, shape, strict=True)}
    factors[dims[axis]] = Factor(shape[axis], Kind.PERMUTE)

    def tensor(aval: Any) -> tuple[tuple[str, ...], ...]:
        return tuple((d,) if i != axis or aval.shape[axis] != 1 else ()
                     for i, d in enumerate(dims))

    operands = tuple(map(tensor, op.in_avals))
    every = tuple(range(len(operands)))
    return Rule(
        operands, (tensor(op.out_avals[0]),), factors, linear=(every,),
        local=_local_concatenate, local_when=frozenset({dims[axis]}), fetches=every,
    )  # fmt: skip


def _local_concatenate(ctx: Local, op: OpInfo, *operands: Any) -> Sequence[Any]:
    """Every place of this shard's part is taken from the operand that it falls into."""
    axis = op.params["dimension"]
    factor = f"d{axis}"
    axes, shards = ctx.axes(factor), ctx.shards(factor)
    sizes = [aval.shape[axis] for aval in op.in_avals]
    parted = all(x.shape[axis] * shards == n for x, n in zip(operands, sizes, strict=True))
    if parted and len({*sizes}) == 1 and shards % len(operands) == 0:
        return [_in_turn(ctx, operands, axis)]
    shape = _resized(operands[0], axis, ctx.local_out(0)[axis])
    at = ctx.offset(factor) + lax.broadcasted_iota(jnp.int32, shape, axis)
    out, begin = None, 0
    for x, n in zip(operands, sizes, strict=True):
        if n > 1:  # else it is whole on every device
            starts = [i * shape[axis] - begin for i in range(shards)]
            x = ctx.fetch(x, axis, axes, n, starts, shape[axis])
        if n:
            out = jnp.broadcast_to(x, shape) if out is None else jnp.where(at >= begin, x, out)
        begin += n
    return [operands[0] if out is None else out]


def _in_turn(ctx: Local, operands: Sequence[Any], axis: int) -> Any:
    """Operands of one size, whose number divides that of the shards: in each round every shard
    sends its block of one of them, shard s that of operand (round + s) modulo their number, and
    receives one. Which one goes round among the groups of receivers."""
    axes, shards, count = ctx.axes(f"d{axis}"), ctx.shards(f"d{axis}"), len(operands)
    block, groups = operands[0].shape[axis], range(shards)
    group = [d // (shards // count) for d in groups]
    blocks = lax.concatenate(operands, axis)  # of shard 0, then of shard 1, ...
    rounds = []
    for turn in range(count):
        sources = [count * (d % (shards // count)) + (group[d] - turn) % count for d in groups]
        starts = [(count * s + (turn + s) % count) * block for s in sources]
        size = shards * count * block
        rounds.append(ctx.fetch(blocks, axis, axes, size, starts, block))
    # Its part t, from 0 on, came in round (group - t) modulo their number.
    if count == 2:
        first = jnp.asarray(group)[ctx.index(axes)] == 0
        return lax.concatenate([jnp.where(first, *rounds), jnp.where(first, *rounds[::-1])], axis)
    order = [rounds[-1 - t % count] for t in range(2 * count - 1)]
    first = [(count - 1 - g % count) * block for g in group]
    return cut(lax.concatenate(order, axis), pick(first, ctx.index(axes)), count * block, axis)


def _slices(x: Any, *, sizes: Sequence[int], axis: int) -> list[Any]:
    """The parts that a split makes: a part of one element is reduced, others stay divided."""
    ends = list(accumulate(sizes))
    pairs = zip(sizes, ends, strict=True)
    return [lax.slice_in_dim(x, end - size, end, axis=axis % x.ndim) for size, end in pairs]


register_inline(_jax.split_p, None, function=_slices)


@register(_jax.stack_p)
def _stack(op: OpInfo) -> Rule:
    """A new FIXED dim; all dims of the operands pass through."""
    axis = op.params["axis"]
    shape = op.in_avals[0].shape
    dims = names("d", len(shape))
    factors = {d: Factor(n) for d, n in zip(dims, shape, strict=True)}
    factors["new"] = Factor(len(op.in_avals), Kind.FIXED)
    out = [(d,) for d in dims]
    out.insert(axis % (len(shape) + 1), ("new",))
    every = tuple(range(len(op.in_avals)))
    operand = tuple((d,) for d in dims)
    return Rule((operand,) * len(op.in_avals), (tuple(out),), factors, linear=(every,))


@register(_jax.unstack_p)
def _unstack(op: OpInfo) -> Rule:
    """Every result is needed whole: along the unstacked dim one gather is the cheapest."""
    shape = op.in_avals[0].shape
    axis = op.params["axis"] % len(shape)
    dims = names("d", len(shape))
    factors = {d: Factor(n, Kind.FIXED if i == axis else Kind.PASS)
               for i, (d, n) in enumerate(zip(dims, shape, strict=True))}
    out = tuple((d,) for i, d in enumerate(dims) if i != axis)
    operand = tuple((d,) for d in dims)
    return Rule((operand,), (out,) * len(op.out_avals), factors, linear=((0,),))


@register(_jax.tile_p)
def _tile(op: OpInfo) -> Rule:
    """A repeated dim is whole in the operand, which is the smaller; each shard of the result makes
    its own part of it."""
    src, dst = op.in_avals[0].shape, op.out_avals[0].shape
    factors: dict[str, Factor] = {}
    left, right = [], []
    for d, (n, m) in enumerate(zip(src, dst, strict=True)):
        factors[f"d{d}"] = Factor(m)
        right.append((f"d{d}",))
        if n == m:
            left.append((f"d{d}",))
        else:
            factors[f"i{d}"] = Factor(n, Kind.FIXED)
            left.append((f"i{d}",) if n != 1 else ())
    cut = frozenset(f"d{d}" for d, (n, m) in enumerate(zip(src, dst, strict=True)) if n != m)
    return Rule((tuple(left),), (tuple(right),), factors, linear=((0,),), expands=True,
                local=_local_tile, local_when=cut)


def _local_tile(ctx: Local, op: OpInfo, x: Any) -> Sequence[Any]:
    for d, (n, m) in enumerate(zip(op.in_avals[0].shape, op.out_avals[0].shape, strict=True)):
        if n != m:
            at = ctx.offset(f"d{d}") + lax.iota(jnp.int32, ctx.local_out(0)[d])
            x = jnp.take(x, at % max(n, 1), axis=d, mode="clip")
    return [x]
