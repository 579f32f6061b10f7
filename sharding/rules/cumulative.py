"""Cumulative reductions: shards accumulate on their own, and exchange one slice each."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from sharding import _jax
from sharding.rule import Factor, Kind, Local, OpInfo, Rule, names, register
from sharding.rules.reduce import _worst

p = _jax.primitives


class _Monoid(NamedTuple):
    combine: Callable[[Any, Any], Any]
    identity: Callable[[Any], Any]
    orders: bool = False  # compares elements, which has no identity among complex numbers


_MONOIDS = {
    p.cumsum_p: _Monoid(lax.add, lambda dtype: 0),
    p.cumprod_p: _Monoid(lax.mul, lambda dtype: 1),
    p.cummax_p: _Monoid(lax.max, lambda dtype: _worst(dtype, True), orders=True),
    p.cummin_p: _Monoid(lax.min, lambda dtype: _worst(dtype, False), orders=True),
    p.cumlogsumexp_p: _Monoid(jnp.logaddexp, lambda dtype: -jnp.inf, orders=True),
}


@register(*_MONOIDS)
def _cumulative(op: OpInfo) -> Rule:
    """Every dim passes. Along the accumulated one: an all-gather of one slice per shard."""
    operand, axis = op.in_avals[0], op.params["axis"]
    dims = names("d", len(operand.shape))
    factors = {d: Factor(n) for d, n in zip(dims, operand.shape, strict=True)}
    if _MONOIDS[op.primitive].orders and jnp.issubdtype(operand.dtype, jnp.complexfloating):
        factors[dims[axis]] = Factor(operand.shape[axis], Kind.FIXED)
    tensor = (tuple((d,) for d in dims),)
    return Rule(
        tensor, tensor, factors, linear=((0,),) if op.primitive is p.cumsum_p else (),
        local=_local_cumulative, local_when=frozenset({dims[axis]}),
    )  # fmt: skip


def _local_cumulative(ctx: Local, op: OpInfo, x: Any) -> Sequence[Any]:
    axis, reverse = op.params["axis"], op.params["reverse"]
    factor = f"d{axis}"
    monoid = _MONOIDS[op.primitive]
    identity = jnp.asarray(monoid.identity(x.dtype), x.dtype)
    if reverse:  # forward, the padding at the end comes after everything that matters
        x = ctx.mask(x, 0, factor, identity)
    (within,) = ctx.bind(x)
    last = 0 if reverse else x.shape[axis] - 1
    total = lax.slice_in_dim(within, last, last + 1, axis=axis)
    totals = ctx.all_gather(total, ctx.axes(factor), axis)
    shard = lax.broadcasted_iota(jnp.int32, totals.shape, axis)
    me = ctx.index(ctx.axes(factor))
    before = shard > me if reverse else shard < me
    prefix = lax.reduce(jnp.where(before, totals, identity), identity, monoid.combine, (axis,))
    return [monoid.combine(within, jnp.broadcast_to(jnp.expand_dims(prefix, axis), within.shape))]
