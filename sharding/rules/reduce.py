"""Reductions over dims, and arg-reductions."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from sharding import _jax
from sharding.rule import Factor, Kind, Local, OpInfo, Rule, RuleFn, names, register

p = _jax.primitives

MONOID = {
    p.reduce_sum_p: "add",
    p.reduce_prod_p: "mul",
    p.reduce_max_p: "max",
    p.reduce_min_p: "min",
    p.reduce_and_p: "and",
    p.reduce_or_p: "or",
}


def _reduction(monoid: str) -> RuleFn:
    def rule(op: OpInfo) -> Rule:
        shape = op.in_avals[0].shape
        axes = op.params["axes"]
        dims = names("d", len(shape))
        # and/or of integers is bitwise, which no collective reduces.
        bitwise = monoid in ("and", "or") and op.in_avals[0].dtype != jnp.bool_
        # Nor is there one for the order of complex numbers.
        ordered = monoid in ("max", "min") and jnp.iscomplexobj(op.in_avals[0])
        reduced = (Kind.FIXED, "") if bitwise or ordered else (Kind.REDUCE, monoid)
        factors = {
            d: Factor(n, *reduced) if i in axes else Factor(n)
            for i, (d, n) in enumerate(zip(dims, shape, strict=True))
        }
        kept = tuple((d,) for i, d in enumerate(dims) if i not in axes)
        linear = ((0,),) if monoid == "add" else ()
        return Rule((tuple((d,) for d in dims),), (kept,), factors, linear=linear)

    return rule


for _primitive, _monoid in MONOID.items():
    register(_primitive)(_reduction(_monoid))


@register(p.reduce_xor_p)
def _reduce_xor(op: OpInfo) -> Rule:
    """No collective reduces by xor: reduced dims are FIXED."""
    shape, axes = op.in_avals[0].shape, op.params["axes"]
    dims = names("d", len(shape))
    factors = {
        d: Factor(n, Kind.FIXED if i in axes else Kind.PASS)
        for i, (d, n) in enumerate(zip(dims, shape, strict=True))
    }
    kept = tuple((d,) for i, d in enumerate(dims) if i not in axes)
    return Rule((tuple((d,) for d in dims),), (kept,), factors)


@register(p.argmax_p, p.argmin_p)
def _arg_reduction(op: OpInfo) -> Rule:
    """Each shard finds its own winner; the winners (value and global index) are compared.

    The factor is REDUCE in form, but its `local` function returns whole results, so it is PASS
    here with no place in the result: two all-gathers of one element per shard.
    """
    shape, (axis,) = op.in_avals[0].shape, op.params["axes"]
    dims = names("d", len(shape))
    factors = {d: Factor(n) for d, n in zip(dims, shape, strict=True)}
    kept = tuple((d,) for i, d in enumerate(dims) if i != axis)
    return Rule(
        (tuple((d,) for d in dims),), (kept,), factors,
        local=_local_arg_reduction, local_when=frozenset({dims[axis]}),
    )  # fmt: skip


def _local_arg_reduction(ctx: Local, op: OpInfo, x: Any) -> Sequence[Any]:
    (axis,), index_dtype = op.params["axes"], op.params["index_dtype"]
    factor = f"d{axis}"
    largest = op.primitive is p.argmax_p
    x = ctx.mask(x, 0, factor, _worst(x.dtype, largest))
    (winner,) = ctx.bind(x)
    value = jnp.take_along_axis(x, jnp.expand_dims(winner, axis), axis)
    index = jnp.expand_dims(winner.astype(index_dtype), axis)
    index = index + ctx.offset(factor).astype(index_dtype)
    values = ctx.all_gather(value, ctx.axes(factor), axis)
    indices = ctx.all_gather(index, ctx.axes(factor), axis)
    # Shards are in order of their global index, so the first winner is the first globally.
    best = lax.argmax(values, axis, jnp.int32) if largest else lax.argmin(values, axis, jnp.int32)
    return [jnp.squeeze(jnp.take_along_axis(indices, jnp.expand_dims(best, axis), axis), axis)]


def _worst(dtype: Any, largest: bool) -> Any:
    """A fill that never wins, so that padding is never chosen over a real element."""
    if dtype == jnp.bool_:
        return not largest
    if jnp.issubdtype(dtype, jnp.inexact):
        return -jnp.inf if largest else jnp.inf
    info = jnp.iinfo(dtype)
    return info.min if largest else info.max
