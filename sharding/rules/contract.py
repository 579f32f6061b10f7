"""Contractions: free and batch dims pass through, contracted dims are reduced.

A ragged contraction has groups of rows besides, which follow each other along one dim. Group sizes
are global; where rows or groups are sharded, every shard works out those of its own part.
"""

from collections.abc import Sequence
from functools import reduce
from math import gcd
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sharding import _jax
from sharding.rule import Dims, Factor, Kind, Local, OpInfo, Rule, register

p = _jax.primitives


class _Names(NamedTuple):
    """Factor names of a contraction, per dim of its operands and its result."""

    left: list[str]
    right: list[str]
    out: list[str]


def _named(
    lhs: Sequence[int], rhs: Sequence[int], numbers: Any, monoid: str, factors: dict[str, Factor],
    groups: Sequence[int] = (),
) -> _Names:  # fmt: skip
    """Names dims b0.. (batch), m0.., n0.. (free) and k0.. (contracted), and fills `factors`.

    Args:
      groups: dims of the rhs that are none of these: named g, and left out of the result.
    """
    (lhs_k, rhs_k), (lhs_b, rhs_b) = numbers
    left = [""] * len(lhs)
    right = ["g" if d in groups else "" for d in range(len(rhs))]
    for i, (a, b) in enumerate(zip(lhs_b, rhs_b, strict=True)):
        left[a] = right[b] = f"b{i}"
        factors[f"b{i}"] = Factor(lhs[a])
    for i, (a, b) in enumerate(zip(lhs_k, rhs_k, strict=True)):
        left[a] = right[b] = f"k{i}"
        factors[f"k{i}"] = Factor(lhs[a], Kind.REDUCE, monoid)
    free_left = [d for d in range(len(lhs)) if not left[d]]
    free_right = [d for d in range(len(rhs)) if not right[d]]
    for i, d in enumerate(free_left):
        left[d] = f"m{i}"
        factors[left[d]] = Factor(lhs[d])
    for i, d in enumerate(free_right):
        right[d] = f"n{i}"
        factors[right[d]] = Factor(rhs[d])
    out = [left[d] for d in (*lhs_b, *free_left)] + [right[d] for d in free_right]
    return _Names(left, right, out)


def _dims(names: Sequence[str]) -> Dims:
    return tuple((n,) for n in names)


def _monoid(op: OpInfo) -> str:
    return "or" if op.out_avals[0].dtype == bool else "add"


@register(p.dot_general_p)
def _dot_general(op: OpInfo) -> Rule:
    """`bmk,bkn->bmn`: batch b, free m and n PASS, contracted k REDUCE by add."""
    factors: dict[str, Factor] = {}
    lhs, rhs = (a.shape for a in op.in_avals)
    monoid = _monoid(op)
    names = _named(lhs, rhs, op.params["dimension_numbers"], monoid, factors)
    return Rule(
        (_dims(names.left), _dims(names.right)), (_dims(names.out),), factors,
        linear=((0,), (1,)) if monoid == "add" else (), flops=2,
    )  # fmt: skip


# ragged_dot_general


class _Ragged(NamedTuple):
    """A ragged contraction.

    Attributes:
      ragged: the factor along which the groups follow each other.
      prefix: factors of the group sizes but for the last dim; none where all share one vector.
      grouped: whether the rhs has a dim g of groups (ragged m); otherwise the result has one
        (ragged k) or nothing has (ragged b).
    """

    names: _Names
    ragged: str
    prefix: list[str]
    grouped: bool


def _ragged(op: OpInfo, factors: dict[str, Factor]) -> _Ragged:
    lhs, rhs, sizes = (a.shape for a in op.in_avals)
    numbers = op.params["ragged_dot_dimension_numbers"]
    groups, grouped = sizes[-1], bool(numbers.rhs_group_dimensions)
    monoid = _monoid(op)
    if grouped:
        factors["g"] = Factor(groups, Kind.REDUCE, monoid)
    dot = numbers.dot_dimension_numbers
    names = _named(lhs, rhs, dot, monoid, factors, numbers.rhs_group_dimensions)
    ragged = names.left[numbers.lhs_ragged_dimensions[0]]
    (contracted, _), (batch, _) = dot
    free = [n for n in names.left if n[0] == "m"]
    kinds = {"b": [names.left[d] for d in batch], "k": [names.left[d] for d in contracted],
             "m": free}  # fmt: skip
    same = kinds[ragged[0]]
    before = same[: same.index(ragged)] if len(sizes) > 1 else []
    outer = kinds["b"] if len(sizes) > 1 and ragged[0] != "b" else []
    if ragged[0] == "k":
        factors["g"] = Factor(groups)
        names.out.insert(0, "g")
    return _Ragged(names, ragged, outer + before, grouped)


@register(_jax.ragged_dot_general_p)
def _ragged_dot_general(op: OpInfo) -> Rule:
    """`bmk,gbkn->bmn` with ragged m, `bmk,bkn->gbmn` with ragged k, `bmk,bkn->bmn` with ragged b.

    Factors as in dot_general, the ragged one included: each shard has the sizes of the parts of
    groups that lie in it. Groups g that the rhs has are REDUCE: a shard multiplies the rows of its
    own groups, other rows are zero. Groups that the result has PASS. Group sizes are whole.
    """
    factors = {"sizes": Factor(op.in_avals[2].shape[-1], Kind.FIXED)}
    found = _ragged(op, factors)
    names = found.names
    return Rule(
        (_dims(names.left), _dims(names.right), _dims((*found.prefix, "sizes"))),
        (_dims(names.out),), factors,
        linear=((0,), (1,)) if _monoid(op) == "add" else (), flops=2,
        local=_local_ragged, local_when=frozenset({found.ragged, "g", *found.prefix}),
    )  # fmt: skip


def _local_ragged(ctx: Local, op: OpInfo, lhs: Any, rhs: Any, sizes: Any) -> Sequence[Any]:
    """Sizes cut to the rows that are here; with sharded groups, rows are rotated so that those of
    the own groups come first, as the primitive wants them."""
    found = _ragged(op, {})
    names = found.names
    for name in names.left:
        if name[0] == "k":
            lhs, rhs = ctx.mask(lhs, 0, name, 0), ctx.mask(rhs, 1, name, 0)
    for name in found.prefix:  # kernels need not expect sizes that make no sense
        sizes = ctx.mask(sizes, 2, name, 0)
    dtype, dim = sizes.dtype, names.left.index(found.ragged)
    ends = jnp.cumsum(sizes.astype(jnp.int32), axis=-1)
    starts = ends - sizes.astype(jnp.int32)
    if ctx.axes(found.ragged):
        low = ctx.offset(found.ragged)
        starts, ends = (jnp.clip(x - low, 0, lhs.shape[dim]) for x in (starts, ends))
    if not ctx.axes("g"):
        return ctx.bind(lhs, rhs, (ends - starts).astype(dtype))
    first, own = _own_groups(ctx, starts, ends - starts)
    rows = (found.ragged, found.prefix)
    lhs = _rotated(lhs, -first, names.left, *rows)
    if not found.grouped:
        return ctx.bind(lhs, _rotated(rhs, -first, names.right, *rows), own.astype(dtype))
    (out,) = ctx.bind(lhs, ctx.mask(rhs, 1, "g", 0), own.astype(dtype))
    out = _truncated(out, own.sum(-1), names.out, *rows)
    return [_rotated(out, first, names.out, *rows)]


def _own_groups(ctx: Local, starts: Any, sizes: Any) -> tuple[Any, Any]:
    """(first row, sizes) of the groups of this shard; groups that are padding are empty."""
    at = ctx.offset("g") + lax.iota(jnp.int32, ctx.local_size("g"))
    own = jnp.take(sizes, at, axis=-1, mode="fill", fill_value=0)
    return jnp.take(starts, at[0], axis=-1, mode="clip"), own


def _rotated(x: Any, by: Any, names: Sequence[str], ragged: str, prefix: Sequence[str]) -> Any:
    """`x` rolled along its ragged dim, by an amount for each place along the prefix."""
    return _each(lambda x, by, dim: jnp.roll(x, by, dim), x, by, names, ragged, prefix)


def _truncated(x: Any, rows: Any, names: Sequence[str], ragged: str, prefix: Sequence[str]) -> Any:
    """`x` with zeros after the first `rows` along its ragged dim: what the primitive leaves in
    rows of no group is not promised on all platforms."""

    def truncate(x: Any, rows: Any, dim: int) -> Any:
        at = lax.broadcasted_iota(jnp.int32, x.shape, dim)
        return jnp.where(at < rows, x, jnp.zeros((), x.dtype))

    return _each(truncate, x, rows, names, ragged, prefix)


def _each(
    function: Any, x: Any, amount: Any, names: Sequence[str], ragged: str, prefix: Sequence[str]
) -> Any:
    """`function(x, amount, ragged dim)`, mapped over the dims of `amount`, which are `prefix`."""
    if not prefix:
        return function(x, amount, names.index(ragged))
    d = names.index(prefix[0])
    rest = [*names[:d], *names[d + 1 :]]
    return jax.vmap(
        lambda x, a: _each(function, x, a, rest, ragged, prefix[1:]), in_axes=(d, 0), out_axes=d
    )(x, amount)


# scaled_dot


@register(_jax.scaled_dot_p)
def _scaled_dot(op: OpInfo) -> Rule:
    """As dot_general, with scales of both operands, one for each block along contracted dims.

    A contracted dim is blocks times elements of a block: blocks are REDUCE, and the dims of scales
    share them. Where the scales of both sides are of different blocks, the common ones count. A
    scale of size 1 is for the whole dim.
    """
    lhs, rhs, lhs_scale, rhs_scale = (a.shape for a in op.in_avals)
    numbers = op.params["dimension_numbers"]
    factors: dict[str, Factor] = {}
    names = _named(lhs, rhs, numbers, "add", factors)
    sides = (names.left, names.right) * 2
    tensors: list[list[tuple[str, ...]]] = [[(n,) for n in side] for side in sides]
    for i, (a, b) in enumerate(zip(*numbers[0], strict=True)):
        scales = (lhs_scale[a], rhs_scale[b])
        blocks = reduce(gcd, [s for s in scales if s > 1], 0)
        if blocks:
            factors[f"k{i}"] = Factor(blocks, Kind.REDUCE, "add")
            factors[f"e{i}"] = Factor(lhs[a] // blocks, Kind.FIXED)
            tensors[0][a] = tensors[1][b] = (f"k{i}", f"e{i}")
        for t, d, s in ((2, a, scales[0]), (3, b, scales[1])):
            tensors[t][d] = () if s == 1 else (f"k{i}",)
            if s > 1 and s != blocks:
                factors[f"s{t}_{i}"] = Factor(s // blocks, Kind.FIXED)
                tensors[t][d] = (f"k{i}", f"s{t}_{i}")
    # Not linear: operands are rounded to bfloat16 first.
    return Rule(tuple(map(tuple, tensors)), (_dims(names.out),), factors, flops=2)
