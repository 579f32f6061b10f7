"""Rotation: what slices and joins of one array make together, and what its gradient is.

    jnp.roll(x, k)                      concatenate([x[n-k:], x[:n-k]])
    its gradient                        pad(g[:k], low=n-k) + pad(g[k:], high=k)

One by one the pieces would be moved from shard to shard, and pieces of a single row reduced over
all of them. Together they are one exchange between neighbours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from sharding import _jax
from sharding.rule import (
    Factor,
    Kind,
    Local,
    Merged,
    OpInfo,
    Rule,
    names,
    register,
    register_merged,
)

p = _jax.primitives


def _rolled(x: Any, *, dim: int, shift: int) -> Any:
    """Element i of `dim` is element i - shift of `x`, 0 < shift < n."""
    middle = x.shape[dim] - shift
    end = lax.slice_in_dim(x, middle, None, axis=dim)
    return lax.concatenate((end, lax.slice_in_dim(x, 0, middle, axis=dim)), dim)


rotate_p = _jax.Primitive("rotate")
rotate_p.def_impl(_rolled)
rotate_p.def_abstract_eval(lambda x, *, dim, shift: x)
_jax.register_lowering(rotate_p, _jax.lower_fun(_rolled, multiple_results=False))


@register(rotate_p)
def _rotate(op: OpInfo) -> Rule:
    """The rotated dim keeps its axes: every shard gets what is its own from its neighbours."""
    shape = op.in_avals[0].shape
    dims = names("d", len(shape))
    factors = {d: Factor(n, Kind.PERMUTE if i == op.params["dim"] else Kind.PASS)
               for i, (d, n) in enumerate(zip(dims, shape, strict=True))}
    tensor = tuple((d,) if n != 1 else () for d, n in zip(dims, shape, strict=True))
    return Rule((tensor,), (tensor,), factors, linear=((0,),), local=_local_rotate,
                local_when=None)  # fmt: skip


def _local_rotate(ctx: Local, op: OpInfo, x: Any) -> Sequence[Any]:
    dim, shift = op.params["dim"], op.params["shift"]
    n, size, axes = op.in_avals[0].shape[dim], x.shape[dim], ctx.axes(f"d{dim}")
    if not axes:
        return [_rolled(x, dim=dim, shift=shift)]
    starts = [i * size - shift for i in range(ctx.shards(f"d{dim}"))]
    if size * len(starts) == n:
        return [ctx.fetch(x, dim, axes, n, [start % n for start in starts], size, wrap=True)]
    # The last shard ends in padding, which nothing that goes round may pass.
    before = ctx.fetch(x, dim, axes, n, [start + n for start in starts], size)
    after = ctx.fetch(x, dim, axes, n, starts, size)
    at = lax.broadcasted_iota(jnp.int32, x.shape, dim) + ctx.offset(f"d{dim}")
    return [jnp.where(at < shift, before, after)]


@register_merged(p.concatenate_p)
def _joined(params: Mapping[str, Any], operands: Sequence[Any]) -> Merged | None:
    """Two slices of one array, the second of which begins it and the first of which ends it."""
    if len(operands) != 2:
        return None
    (x, end), (y, begin) = (_slice_of(v, params["dimension"]) for v in operands)
    if x is None or x is not y or end[1] != x.shape[params["dimension"]]:
        return None
    if begin != (0, end[0]):
        return None
    return Merged(rotate_p, {"dim": params["dimension"], "shift": end[1] - end[0]}, (x,))


@register_merged(p.add_p, p.add_jaxvals_p)
def _added(params: Mapping[str, Any], operands: Sequence[Any]) -> Merged | None:
    """The same as a sum: each slice brought to its new place, with zeros everywhere else."""
    found = [move for v in operands if (move := _moved(v)) is not None]
    if len(found) != 2:
        return None
    (x, dim, *one), (y, other, *two) = sorted(found, key=lambda move: move[2])
    if x is not y or dim != other:
        return None
    # (first, last, place): the beginning goes to the end, the end to the beginning
    (first, last, place), (then, end, begin) = one, two
    n = x.shape[dim]
    if (first, then, end, begin) != (0, last, n, 0) or place != n - last:
        return None
    return Merged(rotate_p, {"dim": dim, "shift": place}, (x,))


def _slice_of(value: Any, dim: int) -> tuple[Any, tuple[int, int]]:
    """The array that a value is a slice of along `dim` alone, and from where to where; or None."""
    op = value.op
    if op is None or op.primitive is not p.slice_p or set(op.params["strides"] or ()) - {1}:
        return None, (0, 0)
    (x,) = op.inputs
    cut = [d for d, (n, m) in enumerate(zip(x.shape, value.shape, strict=True)) if n != m]
    if cut != [dim]:
        return None, (0, 0)
    return x, (op.params["start_indices"][dim], op.params["limit_indices"][dim])


def _moved(value: Any) -> tuple[Any, int, int, int, int] | None:
    """(x, dim, first, last, place) of x[first:last] put at `place` among zeros; or None."""
    op = value.op
    if op is None or op.primitive is not p.pad_p:
        return None
    config = [tuple(c) for c in op.params["padding_config"]]
    dims = [d for d, c in enumerate(config) if c != (0, 0, 0)]
    zero = op.inputs[1].const
    if len(dims) != 1 or zero is None or zero != 0:
        return None
    low, high, interior = config[dims[0]]
    x, (first, last) = _slice_of(op.inputs[0], dims[0])
    if x is None or x.shape != value.shape or interior or min(low, high) < 0:
        return None
    return x, dims[0], first, last, low
