"""Sorting and selection: the sorted dim is gathered, or only its winners are."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from sharding import _jax
from sharding.rule import Factor, Kind, Local, OpInfo, Rule, names, register
from sharding.rules.reduce import _worst

p = _jax.primitives


@register(p.sort_p)
def _sort(op: OpInfo) -> Rule:
    """All operands are sorted together along one dim, which is gathered; other dims pass."""
    shape, axis = op.in_avals[0].shape, op.params["dimension"]
    dims = names("d", len(shape))
    factors = {
        d: Factor(n, Kind.FIXED if i == axis else Kind.PASS)
        for i, (d, n) in enumerate(zip(dims, shape, strict=True))
    }
    tensors = (tuple((d,) for d in dims),) * len(op.in_avals)
    return Rule(tensors, tensors, factors)


@register(p.top_k_p)
def _top_k(op: OpInfo) -> Rule:
    """Each shard finds its own k winners; those alone (values and global indices) are gathered.

    As with argmax, the `local` function returns whole results, so the searched dim is PASS with no
    place in them. Where k is not small against a shard, the dim itself is gathered instead.
    """
    rule = _selection(op, op.params["axis"], Kind.PASS)
    searched = frozenset({f"d{op.params['axis']}"})
    return Rule(rule.operands, rule.results, rule.factors, local=_local_top_k, local_when=searched)


def _local_top_k(ctx: Local, op: OpInfo, x: Any) -> Sequence[Any]:
    axis, k = op.params["axis"], op.params["k"]
    factor = f"d{axis}"
    axes = ctx.axes(factor)
    x = ctx.mask(x, 0, factor, _worst(x.dtype, True))
    if 2 * k >= x.shape[axis]:
        whole = ctx.all_gather(x, axes, axis)
        return ctx.bind(lax.slice_in_dim(whole, 0, op.in_avals[0].shape[axis], axis=axis))
    values, places = ctx.bind(x)
    values = ctx.all_gather(values, axes, axis)
    places = ctx.all_gather(places + ctx.offset(factor).astype(places.dtype), axes, axis)
    # Equal values are gathered in order of their global index, which is how top_k breaks ties;
    # padding never wins, as its indices come after those of every real element.
    best, at = ctx.bind(values)
    return [best, jnp.take_along_axis(places, at, axis)]


@register(p.approx_top_k_p)
def _approx_top_k(op: OpInfo) -> Rule:
    """The searched dim is gathered: what is found depends on how the whole dim is divided."""
    axis = op.params["reduction_dimension"] % len(op.in_avals[0].shape)
    return _selection(op, axis, Kind.FIXED)


def _selection(op: OpInfo, axis: int, searched: Kind) -> Rule:
    """One operand, several results that are shorter along `axis`."""
    shape = op.in_avals[0].shape
    dims = names("d", len(shape))
    factors = {d: Factor(n) for d, n in zip(dims, shape, strict=True)}
    factors[dims[axis]] = Factor(shape[axis], searched)
    factors["k"] = Factor(op.out_avals[0].shape[axis], Kind.FIXED)
    out = tuple(("k",) if i == axis else (d,) for i, d in enumerate(dims))
    return Rule((tuple((d,) for d in dims),), (out,) * len(op.out_avals), factors)
