"""Reductions over dims, and arg-reductions.

What a collective reduces (sums, products, real extremes, flags) is REDUCE. Everything else passes:
shards reduce what they have, gather one partial result each, and reduce those in order.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sharding import _jax
from sharding.monoid import identity
from sharding.rule import Factor, Kind, Local, OpInfo, Rule, RuleFn, names, register
from sharding.rules.scalars import scalar_function

p = _jax.primitives

MONOID = {
    p.reduce_sum_p: "add",
    p.reduce_prod_p: "mul",
    p.reduce_max_p: "max",
    p.reduce_min_p: "min",
    p.reduce_and_p: "and",
    p.reduce_or_p: "or",
    p.reduce_xor_p: "xor",
}


def _collective(monoid: str, dtype: Any) -> bool:
    """Whether partial values of this dtype can be reduced by a collective: and, or of flags only;
    no order of complex numbers, no xor."""
    if monoid in ("and", "or"):
        return dtype == jnp.bool_
    if monoid in ("max", "min"):
        return not jnp.issubdtype(dtype, jnp.complexfloating)
    return monoid in ("add", "mul")


def _reduction(monoid: str) -> RuleFn:
    def rule(op: OpInfo) -> Rule:
        """Reduced dims are REDUCE where a collective knows the monoid. Otherwise each shard's
        partial result is gathered, and the `local` function returns whole results."""
        operand, axes = op.in_avals[0], op.params["axes"]
        reducible = _collective(monoid, operand.dtype)
        dims = names("d", len(operand.shape))
        factors = {
            d: Factor(n, Kind.REDUCE, monoid) if reducible and i in axes else Factor(n)
            for i, (d, n) in enumerate(zip(dims, operand.shape, strict=True))
        }
        kept = tuple((d,) for i, d in enumerate(dims) if i not in axes)
        linear = ((0,),) if monoid == "add" else ()
        return Rule(
            (tuple((d,) for d in dims),), (kept,), factors, linear=linear,
            local=None if reducible else _local_reduction,
            local_when=frozenset(dims[a] for a in axes),
        )  # fmt: skip

    return rule


for _primitive, _monoid in MONOID.items():
    register(_primitive)(_reduction(_monoid))


def _local_reduction(ctx: Local, op: OpInfo, x: Any) -> Sequence[Any]:
    """Reduces what is here, then one partial result per shard."""
    reduced = [f"d{a}" for a in op.params["axes"]]
    for factor in reduced:
        x = ctx.mask(x, 0, factor, identity(MONOID[op.primitive], x.dtype))
    (partial,) = ctx.bind(x)
    axes = tuple(a for factor in reduced for a in ctx.axes(factor))
    return ctx.bind(ctx.all_gather(partial[None], axes, 0), axes=(0,))


# reduce: any associative function of one operand or several, and the value it starts from

_FUNCTIONS = {p.add_p: "add", p.mul_p: "mul", p.max_p: "max", p.min_p: "min", p.and_p: "and",
              p.or_p: "or"}  # fmt: skip


@register(p.reduce_p)
def _reduce(op: OpInfo) -> Rule:
    """A function that a collective knows is REDUCE, with its start in the first shard alone.

    Of any other, each shard folds what it has, and one partial result per shard is gathered and
    folded in order; the start enters once, last. Nothing is asked of the start, nor of the
    function but that it is associative.
    """
    count = len(op.in_avals) // 2
    shape, reduced = op.in_avals[0].shape, op.params["dimensions"]
    monoid = _recognised(op)
    dims = names("d", len(shape))
    factors = {
        d: Factor(n, Kind.REDUCE, monoid) if monoid and i in reduced else Factor(n)
        for i, (d, n) in enumerate(zip(dims, shape, strict=True))
    }
    kept = tuple((d,) for i, d in enumerate(dims) if i not in reduced)
    return Rule(
        (tuple((d,) for d in dims),) * count + ((),) * count, (kept,) * count, factors,
        linear=(tuple(range(2 * count)),) if monoid == "add" else (),
        local=_local_start if monoid else _local_fold,
        local_when=frozenset(dims[d] for d in reduced),
    )  # fmt: skip


def _recognised(op: OpInfo) -> str:
    """The monoid of a computation that applies one to every operand on its own; else ""."""
    jaxpr = op.params["jaxpr"].jaxpr
    count = len(jaxpr.outvars)
    found = set()
    for i, out in enumerate(jaxpr.outvars):
        eqn = next((e for e in jaxpr.eqns if any(out is v for v in e.outvars)), None)
        pair = (jaxpr.invars[i], jaxpr.invars[count + i])
        if eqn is None or not _same_pair(eqn.invars, pair):
            return ""
        monoid = _FUNCTIONS.get(eqn.primitive, "")
        if not monoid or (out.aval.dtype == jnp.bool_ and monoid in ("add", "mul")):
            return ""
        if out.aval.dtype != pair[0].aval.dtype or not _collective(monoid, out.aval.dtype):
            return ""
        found.add(monoid)
    return found.pop() if len(found) == 1 else ""


def _same_pair(found: Sequence[Any], wanted: tuple[Any, Any]) -> bool:
    a, b = wanted
    return len(found) == 2 and (
        (found[0] is a and found[1] is b) or (found[0] is b and found[1] is a)
    )


def _local_start(ctx: Local, op: OpInfo, *args: Any) -> Sequence[Any]:
    """Padding is neutral. The start enters after the reduction, where XLA does not take it for
    the identity, and in the first shard only."""
    count = len(args) // 2
    monoid = _recognised(op)
    reduced = [f"d{d}" for d in op.params["dimensions"]]
    axes = tuple(a for factor in reduced for a in ctx.axes(factor))
    xs, neutral = list(args[:count]), [identity(monoid, x.dtype) for x in args[:count]]
    for i, fill in enumerate(neutral):
        for factor in reduced:
            xs[i] = ctx.mask(xs[i], i, factor, fill)
    partial = ctx.bind(*xs, *neutral)
    combine = _elementwise(scalar_function(op.params["jaxpr"]))
    starts = [jnp.broadcast_to(s, x.shape) for s, x in zip(args[count:], partial, strict=True)]
    started = combine(starts, partial)
    first = ctx.index(axes) == 0
    return [jnp.where(first, a, b) for a, b in zip(started, partial, strict=True)]


def _local_fold(ctx: Local, op: OpInfo, *args: Any) -> Sequence[Any]:
    """Folds dim after dim, minor to major, so that elements meet in row-major order.

    Along a sharded dim one partial result per shard is gathered, of the dims that are left.
    """
    count = len(args) // 2
    xs, starts = list(args[:count]), list(args[count:])
    combine = _elementwise(scalar_function(op.params["jaxpr"]))
    reduced = sorted(op.params["dimensions"])
    if prod(op.in_avals[0].shape[d] for d in reduced) == 0:
        return [jnp.full(ctx.local_out(i), start) for i, start in enumerate(starts)]
    for d in reversed(reduced):
        axes, size, here = ctx.axes(f"d{d}"), op.in_avals[0].shape[d], xs[0].shape[d]
        xs = _fold(combine, xs, d, size - ctx.offset(f"d{d}") if axes else None)
        if axes:
            filled = -(-size // here)  # shards that hold more than padding
            xs = [lax.slice_in_dim(ctx.all_gather(x, axes, d), 0, filled, axis=d) for x in xs]
            xs = _fold(combine, xs, d)
    xs = [jnp.squeeze(x, tuple(reduced)) for x in xs]
    starts = [jnp.broadcast_to(s, x.shape) for s, x in zip(starts, xs, strict=True)]
    return combine(starts, xs)


_Combine = Callable[[Sequence[Any], Sequence[Any]], list[Any]]


def _elementwise(function: Callable) -> _Combine:
    """A function of scalars on arrays of one shape: (left operands, right operands) -> results."""

    def combine(left: Sequence[Any], right: Sequence[Any]) -> list[Any]:
        shape = left[0].shape
        flat = [x.reshape(-1) for x in (*left, *right)]
        return [x.reshape(shape) for x in jax.vmap(function)(*flat)]

    return combine


def _fold(combine: _Combine, xs: list[Any], dim: int, valid: Any = None) -> list[Any]:
    """`xs` folded along `dim` to size 1, neighbours first, so that the order is kept.

    Args:
      valid: how many of the elements count (the first ones); None: all of them.
    """
    if valid is not None:
        at = lax.broadcasted_iota(jnp.int32, xs[0].shape, dim)
        xs = [*xs, at < valid]
    while (size := xs[0].shape[dim]) > 1:
        left, right = (
            [lax.slice_in_dim(x, first, size // 2 * 2, 2, dim) for x in xs] for first in (0, 1)
        )
        if valid is None:
            merged = combine(left, right)
        else:
            merged = combine(left[:-1], right[:-1])
            merged = [jnp.where(right[-1], m, x) for m, x in zip(merged, left, strict=False)]
            merged.append(left[-1])
        if size % 2:
            rest = [lax.slice_in_dim(x, size - 1, size, axis=dim) for x in xs]
            merged = [lax.concatenate(pair, dim) for pair in zip(merged, rest, strict=True)]
        xs = merged
    return xs if valid is None else xs[:-1]


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
    x = ctx.mask(x, 0, factor, identity("max" if largest else "min", x.dtype))
    (winner,) = ctx.bind(x)
    value = jnp.take_along_axis(x, jnp.expand_dims(winner, axis), axis)
    index = jnp.expand_dims(winner.astype(index_dtype), axis)
    index = index + ctx.offset(factor).astype(index_dtype)
    values = ctx.all_gather(value, ctx.axes(factor), axis)
    indices = ctx.all_gather(index, ctx.axes(factor), axis)
    # Shards are in order of their global index, so the first winner is the first globally.
    best = lax.argmax(values, axis, jnp.int32) if largest else lax.argmin(values, axis, jnp.int32)
    return [jnp.squeeze(jnp.take_along_axis(indices, jnp.expand_dims(best, axis), axis), axis)]
