"""Cumulative reductions: shards accumulate on their own, and exchange one slice each."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from sharding import _jax
from sharding.monoid import identity
from sharding.parts import cut, plus
from sharding.rule import Factor, Local, OpInfo, Rule, names, register

p = _jax.primitives


# How two totals combine.
_COMBINE: dict[Any, Callable[[Any, Any], Any]] = {
    p.cumsum_p: lax.add,
    p.cumprod_p: lax.mul,
    p.cummax_p: lax.max,
    p.cummin_p: lax.min,
    p.cumlogsumexp_p: jnp.logaddexp,
}
_MONOID = {p.cumsum_p: "add", p.cumprod_p: "mul", p.cummax_p: "max", p.cummin_p: "min"}


def _neutral(primitive: Any, dtype: Any) -> Any:
    """What changes no total."""
    if primitive in _MONOID:
        return identity(_MONOID[primitive], dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.finfo(dtype).min / 4  # of two infinities the complex logaddexp makes NaN
    return identity("max", dtype)


@register(*_COMBINE)
def _cumulative(op: OpInfo) -> Rule:
    """Every dim passes. Along the accumulated one: an all-gather of one slice per shard."""
    shape, axis = op.in_avals[0].shape, op.params["axis"]
    dims = names("d", len(shape))
    factors = {d: Factor(n) for d, n in zip(dims, shape, strict=True)}
    tensor = (tuple((d,) for d in dims),)
    return Rule(
        tensor, tensor, factors, linear=((0,),) if op.primitive is p.cumsum_p else (),
        local=_local_cumulative, local_when=frozenset({dims[axis]}),
    )  # fmt: skip


def _local_cumulative(ctx: Local, op: OpInfo, x: Any) -> Sequence[Any]:
    """What shards before this one add up to is accumulated from their totals, as elements are."""
    axis, reverse = op.params["axis"], op.params["reverse"]
    factor = f"d{axis}"
    if not x.size:
        return [x]
    if reverse:  # forward, the padding at the end comes after everything that matters
        x = ctx.mask(x, 0, factor, _neutral(op.primitive, x.dtype))
    (within,) = ctx.bind(x)
    last = 0 if reverse else x.shape[axis] - 1
    total = lax.slice_in_dim(within, last, last + 1, axis=axis)
    totals = ctx.all_gather(total, ctx.axes(factor), axis)
    (totals,) = ctx.bind(totals)
    before = plus(ctx.index(ctx.axes(factor)), 1 if reverse else -1)
    prefix = cut(totals, before, 1, axis)
    prefix = jnp.broadcast_to(prefix, within.shape)
    combined = _COMBINE[op.primitive](prefix, within)
    return [jnp.where((before < 0) | (before == totals.shape[axis]), within, combined)]
