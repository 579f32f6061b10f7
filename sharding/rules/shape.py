"""Shape operations: dims are renamed, merged, split or left alone; no arithmetic happens."""

from collections.abc import Sequence
from math import gcd
from typing import Any

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
    return Rule(
        (operand, *rest), (_singles(dims),), factors,
        linear=((0,),), resize=(("shape", 0),), early=src == dst, expands=src != dst,
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
    """
    src, dst = op.in_avals[0].shape, op.out_avals[0].shape
    if op.params.get("dimensions") is not None or 0 in src:
        return _unrelated(src, dst)
    factors: dict[str, Factor] = {}
    left, right = reshape_factors(src, dst, factors)
    rest = tuple(() for _ in op.in_avals[1:])
    return Rule((left, *rest), (right,), factors, linear=((0,),), resize=(("new_sizes", 0),),
                early=True)


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


def _dims_fixed_where(op: OpInfo, fixed: Sequence[bool], linear: tuple = ((0,),)) -> Rule:
    """Dims shared one to one by operand 0 and result 0; those in `fixed` are two FIXED factors."""
    src, dst = op.in_avals[0].shape, op.out_avals[0].shape
    factors: dict[str, Factor] = {}
    left, right = [], []
    for d, is_fixed in enumerate(fixed):
        if is_fixed:
            factors[f"i{d}"] = Factor(src[d], Kind.FIXED)
            factors[f"o{d}"] = Factor(dst[d], Kind.FIXED)
            left.append((f"i{d}",))
            right.append((f"o{d}",))
        else:
            factors[f"d{d}"] = Factor(src[d])
            left.append((f"d{d}",))
            right.append((f"d{d}",))
    rest = tuple(() for _ in op.in_avals[1:])
    return Rule((tuple(left), *rest), (tuple(right),), factors, linear=linear)


@register(p.rev_p)
def _rev(op: OpInfo) -> Rule:
    return _dims_fixed_where(
        op, [d in op.params["dimensions"] for d in range(len(op.in_avals[0].shape))]
    )


@register(p.slice_p)
def _slice(op: OpInfo) -> Rule:
    """Dims taken whole pass through; a sliced dim is FIXED. Parameters are of whole dims, so
    those of sharded dims are replaced by the local size."""
    src, dst = op.in_avals[0].shape, op.out_avals[0].shape
    rule = _dims_fixed_where(op, [n != m for n, m in zip(src, dst, strict=True)])
    return Rule(
        rule.operands, rule.results, rule.factors, linear=((0,),), local=_local_slice,
    )  # fmt: skip


def _local_slice(ctx: Local, op: OpInfo, x: Any) -> Sequence[Any]:
    limits = tuple(
        n if whole == dst else limit
        for n, whole, dst, limit in zip(
            x.shape, op.in_avals[0].shape, op.out_avals[0].shape, op.params["limit_indices"],
            strict=True,
        )
    )  # fmt: skip
    return ctx.bind(x, limit_indices=limits)


@register(p.pad_p)
def _pad(op: OpInfo) -> Rule:
    """Padded dims are FIXED; linear when the padding is a literal zero."""
    fixed = [tuple(c) != (0, 0, 0) for c in op.params["padding_config"]]
    value = op.literal(1)
    linear = ((0,),) if value is not None and value == 0 else ((0, 1),)
    return _dims_fixed_where(op, fixed, linear)


@register(p.concatenate_p)
def _concatenate(op: OpInfo) -> Rule:
    return _joined(op, op.params["dimension"])


def _joined(op: OpInfo, axis: int) -> Rule:
    """Operands joined along `axis`, which is FIXED; all other dims pass through."""
    shape = op.out_avals[0].shape
    factors = {f"d{d}": Factor(n) for d, n in enumerate(shape) if d != axis}
    factors["joined"] = Factor(shape[axis], Kind.FIXED)

    def dims(name: str) -> Dims:
        return tuple((name,) if d == axis else (f"d{d}",) for d in range(len(shape)))

    operands = []
    for i, aval in enumerate(op.in_avals):
        factors[f"part{i}"] = Factor(aval.shape[axis], Kind.FIXED)
        operands.append(dims(f"part{i}"))
    every = tuple(range(len(operands)))
    return Rule(tuple(operands), (dims("joined"),), factors, linear=(every,))


@register(_jax.split_p)
def _split(op: OpInfo) -> Rule:
    shape, axis = op.in_avals[0].shape, op.params["axis"]
    factors = {f"d{d}": Factor(n) for d, n in enumerate(shape) if d != axis}
    factors["whole"] = Factor(shape[axis], Kind.FIXED)

    def dims(name: str) -> Dims:
        return tuple((name,) if d == axis else (f"d{d}",) for d in range(len(shape)))

    results = []
    for i, aval in enumerate(op.out_avals):
        factors[f"part{i}"] = Factor(aval.shape[axis], Kind.FIXED)
        results.append(dims(f"part{i}"))
    return Rule((dims("whole"),), tuple(results), factors, linear=((0,),))


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
    return Rule((_singles(dims),) * len(op.in_avals), (tuple(out),), factors, linear=(every,))


@register(_jax.unstack_p)
def _unstack(op: OpInfo) -> Rule:
    shape = op.in_avals[0].shape
    axis = op.params["axis"] % len(shape)
    factors = {f"d{d}": Factor(n, Kind.FIXED if d == axis else Kind.PASS)
               for d, n in enumerate(shape)}
    dims = _singles(names("d", len(shape)))
    out = tuple(d for i, d in enumerate(dims) if i != axis)
    return Rule((dims,), (out,) * len(op.out_avals), factors, linear=((0,),))


@register(_jax.tile_p)
def _tile(op: OpInfo) -> Rule:
    """A repeated dim is FIXED, the others pass through."""
    src, dst = op.in_avals[0].shape, op.out_avals[0].shape
    return _dims_fixed_where(op, [n != m for n, m in zip(src, dst, strict=True)])
