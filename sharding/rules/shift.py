"""Shifts: what cutting and joining make together.

    jnp.roll(x, k)                      concatenate([x[n-k:], x[:n-k]])             a rotation
    its gradient                        pad(g[:k], low=n-k) + pad(g[k:], high=k)    a rotation
    jnp.pad(x, k)[i : i+n]              slice of a pad                              a pad, cut too
    its gradient, and those of several  slice of a sum of pads                      a sum of such

One by one the pieces would be moved from shard to shard, to shards of other sizes and back, and
pieces of a single row reduced over all of them. Together they are one exchange with neighbours.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
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
                local_when=None, fetches=(0,))  # fmt: skip


def _local_rotate(ctx: Local, op: OpInfo, x: Any) -> Sequence[Any]:
    dim, shift = op.params["dim"], op.params["shift"]
    n, size, axes = op.in_avals[0].shape[dim], ctx.local_out(0)[dim], ctx.axes(f"d{dim}")
    if not axes:
        return [_rolled(x, dim=dim, shift=shift)]
    starts = [i * size - shift for i in range(ctx.shards(f"d{dim}"))]
    if size * len(starts) == n:
        return [ctx.fetch(x, dim, axes, n, [start % n for start in starts], size, wrap=True)]
    # The last shard ends in padding, which nothing that goes round may pass.
    before = ctx.fetch(x, dim, axes, n, [start + n for start in starts], size)
    after = ctx.fetch(x, dim, axes, n, starts, size)
    at = lax.broadcasted_iota(jnp.int32, before.shape, dim) + ctx.offset(f"d{dim}")
    return [jnp.where(at < shift, before, after)]


@register_merged(p.concatenate_p)
def _joined(params: Mapping[str, Any], operands: Sequence[Any]) -> Merged | None:
    """Two slices of one array, the second of which begins it and the first of which ends it."""
    dim = params["dimension"]
    if len(operands) != 2:
        return None
    (x, end), (y, begin) = (_slice_of(v, dim) for v in operands)
    if x is None or x is not y or end[1] != x.shape[dim] or begin != (0, end[0]):
        return None
    return Merged(partial(rotate_p.bind, dim=dim, shift=end[1] - end[0]), (x,))


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
    return Merged(partial(rotate_p.bind, dim=dim, shift=place), (x,))


@register_merged(p.slice_p)
def _sliced(params: Mapping[str, Any], operands: Sequence[Any]) -> Merged | None:
    """A part of an array; of all of it, it is the array."""
    (value,) = operands
    if set(params["strides"] or ()) - {1}:
        return None
    starts, limits = params["start_indices"], params["limit_indices"]
    if not any(starts) and tuple(limits) == value.shape:
        return Merged(lambda x: x, (value,))
    return _cut(value, starts, limits)


@register_merged(p.pad_p)
def _padded(params: Mapping[str, Any], operands: Sequence[Any]) -> Merged | None:
    """What is padded by less than nothing is cut: gradients of pads are."""
    value, config = operands[0], params["padding_config"]
    if any(low > 0 or high > 0 or inside for low, high, inside in config):
        return None
    ends = [n + high for n, (_, high, _) in zip(value.shape, config, strict=True)]
    return _cut(value, [-low for low, _, _ in config], ends)


def _cut(value: Any, starts: Sequence[int], limits: Sequence[int]) -> Merged | None:
    """A part of a pad, or of a sum of pads: each is cut, where it was padded, and only there."""
    cut = [d for d, n in enumerate(value.shape) if (starts[d], limits[d]) != (0, n)]
    pads = list(_pads(value))
    if not cut or not pads:
        return None
    for pad in pads:
        config = pad.op.params["padding_config"]
        if any(tuple(config[d]) == (0, 0, 0) or limits[d] - starts[d] < 2 for d in cut):
            return None

    def rebuilt(value: Any, arrays: Iterator[Any]) -> Any:
        if value.op.primitive is not p.pad_p:
            left, right = (rebuilt(v, arrays) for v in value.op.inputs)
            return lax.add(left, right)
        config = [
            (low - a, high - (n - b), inside)
            for (low, high, inside), a, b, n in zip(
                value.op.params["padding_config"], starts, limits, value.shape, strict=True
            )
        ]
        return lax.pad(next(arrays), next(arrays), config)

    operands = [v for pad in pads for v in pad.op.inputs]
    return Merged(lambda *arrays: rebuilt(value, iter(arrays)), operands)


def _pads(value: Any, depth: int = 8) -> Iterator[Any]:
    """The pads that a value is the sum of, in order; nothing where it is of anything else too."""
    op = value.op
    if op is not None and op.primitive is p.pad_p:
        yield value
    elif op is not None and op.primitive in (p.add_p, p.add_jaxvals_p) and depth:
        left, right = (list(_pads(v, depth - 1)) for v in op.inputs)
        yield from (*left, *right) if left and right else ()


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
