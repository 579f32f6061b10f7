"""Shape operations: dims are renamed, merged, split or left alone; no arithmetic happens."""

from collections.abc import Sequence
from math import gcd, prod
from typing import Any

import jax.numpy as jnp
from jax import lax

from sharding import _jax
from sharding.rule import Dims, Factor, Kind, Local, OpInfo, Rule, names, register

p = _jax.primitives


def _singles(dims: Sequence[str]) -> Dims:
    return tuple((d,) for d in dims)


@register(p.transpose_p)
def _transpose(op: OpInfo) -> Rule:
    shape = op.in_avals[0].shape
    dims = names("d", len(shape))
    out = tuple(dims[i] for i in op.params["permutation"])
    return Rule(
        (_singles(dims),), (_singles(out),),
        {d: Factor(n) for d, n in zip(dims, shape, strict=True)}, linear=((0,),), early=True,
    )  # fmt: skip


@register(p.broadcast_in_dim_p)
def _broadcast_in_dim(op: OpInfo) -> Rule:
    """Mapped dims share a factor; dims that are new, or grow from size 1, have one of their own."""
    src, dst = op.in_avals[0].shape, op.out_avals[0].shape
    dims = names("d", len(dst))
    operand = tuple(
        (dims[j],) if src[i] == dst[j] else ()
        for i, j in enumerate(op.params["broadcast_dimensions"])
    )
    factors = {d: Factor(n) for d, n in zip(dims, dst, strict=True)}
    rest = tuple(() for _ in op.in_avals[1:])
    grows = prod(src) != prod(dst)
    return Rule(
        (operand, *rest), (_singles(dims),), factors,
        linear=((0,),), resize=(("shape", 0),), early=not grows, expands=grows,
    )  # fmt: skip


@register(p.squeeze_p)
def _squeeze(op: OpInfo) -> Rule:
    shape = op.in_avals[0].shape
    gone = {d % len(shape) for d in op.params["dimensions"]}
    dims = names("d", len(shape))
    operand = tuple(() if i in gone else (d,) for i, d in enumerate(dims))
    factors = {d: Factor(shape[i]) for i, d in enumerate(dims) if i not in gone}
    return Rule((operand,), (tuple(o for i, o in enumerate(operand) if i not in gone),), factors,
                linear=((0,),), early=True)


@register(p.reshape_p)
def _reshape(op: OpInfo) -> Rule:
    """Factors by repeated gcd, major to minor; what has no common factor is FIXED.

    [8, 6] -> [48] is (a)(b) -> (ab); [6, 4] -> [8, 3] is (a x)(y) -> (a z)(w) with a of size 2.
    What these cannot express (6 over 4 shards) the major dims of both sides express as a whole:
    shards then exchange the elements that another shard has after the reshape.
    """
    src, dst = op.in_avals[0].shape, op.out_avals[0].shape
    if 0 in src:
        return _unrelated(src, dst)
    order = _order(op)
    src = [src[d] for d in order]
    factors: dict[str, Factor] = {}
    left, right = reshape_factors(src, dst, factors)
    alone: dict[str, frozenset[str]] = {}
    for ins, outs in _groups(src, dst):
        if len(ins) == len(outs) == 1:
            continue
        name = f"g{len(alone)}"
        alone[name] = frozenset(f for d in ins for f in left[d])
        factors[name] = Factor(dst[outs[0]], Kind.PERMUTE)
        left = (*left[: ins[0]], (name, *left[ins[0]]), *left[ins[0] + 1 :])
        right = (*right[: outs[0]], (name, *right[outs[0]]), *right[outs[0] + 1 :])
    left = tuple(left[order.index(d)] for d in range(len(order)))
    rest = tuple(() for _ in op.in_avals[1:])
    return Rule((left, *rest), (right,), factors, linear=((0,),), resize=(("new_sizes", 0),),
                alone=alone, local=_local_reshape, local_when=frozenset(alone), early=True, flops=0)


def _order(op: OpInfo) -> Sequence[int]:
    """The order of the operand's dims in which its elements are read."""
    return op.params.get("dimensions") or range(len(op.in_avals[0].shape))


def _groups(src: Sequence[int], dst: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of dims, those of size 1 left out, with equal products on both sides."""
    groups: list[tuple[list[int], list[int]]] = []
    i, j = ([d for d, n in enumerate(shape) if n != 1] for shape in (src, dst))
    while i and j:
        ins, outs = [i.pop(0)], [j.pop(0)]
        while (a := prod(src[d] for d in ins)) != (b := prod(dst[d] for d in outs)):
            if a < b:
                ins.append(i.pop(0))
            else:
                outs.append(j.pop(0))
        groups.append((ins, outs))
    return groups


def _local_reshape(ctx: Local, op: OpInfo, x: Any, *rest: Any) -> Sequence[Any]:
    """Every group of dims as one flat dim, whose shards change their size."""
    src, dst = [op.in_avals[0].shape[d] for d in _order(op)], op.out_avals[0].shape
    shape, groups = ctx.local_out(0), _groups(src, dst)
    x = jnp.transpose(x, _order(op))
    x = jnp.reshape(x, [prod(x.shape[d] for d in ins) for ins, _ in groups])
    number = 0
    for i, (ins, outs) in enumerate(groups):
        if len(ins) == len(outs) == 1:
            continue
        name, number = f"g{number}", number + 1
        if axes := ctx.axes(name):
            width = prod(shape[d] for d in outs)
            starts = [width * k for k in range(ctx.shards(name))]
            x = ctx.fetch(x, i, axes, prod(src[d] for d in ins), starts, width)
    return [jnp.reshape(x, shape)]


def reshape_factors(
    src: Sequence[int], dst: Sequence[int], factors: dict[str, Factor]
) -> tuple[Dims, Dims]:
    """Fills `factors` and returns the factor names of both shapes."""
    left: list[list[str]] = [[] for _ in src]
    right: list[list[str]] = [[] for _ in dst]
    i = j = 0
    a = b = 1  # what is still to be matched of the current dims
    blocked = False  # no common factor: this stretch is matched only where both sides end

    def new(size: int, *places: list[str], kind: Kind = Kind.PASS) -> None:
        name = f"f{len(factors)}"
        factors[name] = Factor(size, kind)
        for place in places:
            place.append(name)

    done_a = done_b = 1  # products consumed so far
    while i < len(src) or j < len(dst):
        if a == 1 and i < len(src) and (b > 1 or done_a <= done_b or j >= len(dst)):
            a, i = src[i], i + 1
            continue
        if b == 1 and j < len(dst):
            b, j = dst[j], j + 1
            continue
        common = gcd(a, b)
        if common == 1 or blocked:
            # Consume the whole current dims privately until the products meet again.
            blocked = True
            if done_a <= done_b and a > 1:
                new(a, left[i - 1], kind=Kind.FIXED)
                done_a, a = done_a * a, 1
            elif b > 1:
                new(b, right[j - 1], kind=Kind.FIXED)
                done_b, b = done_b * b, 1
            blocked = not (done_a == done_b and a == 1 and b == 1)
            continue
        new(common, left[i - 1], right[j - 1])
        done_a, done_b = done_a * common, done_b * common
        a, b = a // common, b // common
    _finish(a, b, left, right, i, j, new)
    return tuple(map(tuple, left)), tuple(map(tuple, right))


def _finish(a: int, b: int, left: Any, right: Any, i: int, j: int, new: Any) -> None:
    """The last pair of dims, when the loop ended with both loaded."""
    if a > 1 and a == b:
        new(a, left[i - 1], right[j - 1])
        return
    if a > 1:
        new(a, left[i - 1], kind=Kind.FIXED)
    if b > 1:
        new(b, right[j - 1], kind=Kind.FIXED)


def _unrelated(src: Sequence[int], dst: Sequence[int]) -> Rule:
    ins, outs = names("i", len(src)), names("o", len(dst))
    factors = {d: Factor(n, Kind.FIXED) for d, n in zip((*ins, *outs), (*src, *dst), strict=True)}
    return Rule((_singles(ins),), (_singles(outs),), factors)


@register(p.iota_p)
def _iota(op: OpInfo) -> Rule:
    shape = op.out_avals[0].shape
    dims = names("d", len(shape))
    return Rule(
        tuple(() for _ in op.in_avals), (_singles(dims),),
        {d: Factor(n) for d, n in zip(dims, shape, strict=True)}, resize=(("shape", 0),),
        local=_local_iota, local_when=frozenset({dims[op.params["dimension"]]}),
    )  # fmt: skip


def _local_iota(ctx: Local, op: OpInfo, *operands: Any) -> Sequence[Any]:
    dtype, d = op.params["dtype"], op.params["dimension"]
    iota = lax.broadcasted_iota(dtype, ctx.local_out(0), d)
    return [iota + ctx.offset(f"d{d}").astype(dtype)]


@register(_jax.empty_p, _jax.empty2_p)
def _empty(op: OpInfo) -> Rule:
    """Memory of any content: every shard has its own."""
    shape = op.out_avals[0].shape
    dims = names("d", len(shape))
    return Rule(
        (), (_singles(dims),), {d: Factor(n) for d, n in zip(dims, shape, strict=True)},
        resize=(("shape", 0),) if "shape" in op.params else (),
    )  # fmt: skip
