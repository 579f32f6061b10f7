"""Windows at places that the program itself says, as `x.at[1:-1].set(y)` and its gradient have.

`gather` and `scatter` need a dim whole of which a window is a part: with computed places any shard
may hold any of it. At constant ones a gather of one window is a slice; and of what a scatter writes
each shard gets its own from its neighbours.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from sharding import _jax
from sharding.rule import Factor, Kind, Local, Merged, OpInfo, Rule, register, register_merged
from sharding.rules.indexing import window_sizes

p = _jax.primitives


class _Window(NamedTuple):
    """Where a window lies: per dim of the array its first element and its size; `alone` are dims of
    size 1 that arrays of windows do not have."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    alone: tuple[int, ...]


@register_merged(p.gather_p)
def _gathered(params: Mapping[str, Any], operands: Sequence[Any]) -> Merged | None:
    """A gather of one window is a slice."""
    array, indices = operands
    numbers = params["dimension_numbers"]
    if numbers.operand_batching_dims or len(numbers.offset_dims) + len(
        numbers.collapsed_slice_dims
    ) != len(array.shape):
        return None
    window = _placed(
        array.shape, params["slice_sizes"], numbers.collapsed_slice_dims, numbers.start_index_map,
        indices,
    )  # fmt: skip
    if window is None:
        return None
    starts, sizes, alone = window
    limits = [start + size for start, size in zip(starts, sizes, strict=True)]
    return Merged(lambda x: lax.squeeze(lax.slice(x, starts, limits), alone), (array,))


_COMBINE: dict[str, Callable[[Any, Any], Any]] = {
    "add": lax.add, "sub": lax.sub, "mul": lax.mul, "min": lax.min, "max": lax.max,
    "set": lambda old, new: new,
}  # fmt: skip


def _write(x: Any, y: Any, *, starts: Sequence[int], combine: str, inside: Any = None) -> Any:
    """`x` where the window of `y`, whose first element is at `starts`, is combined with it; of the
    window only what is `inside`, where that is given."""
    limits = [start + n for start, n in zip(starts, y.shape, strict=True)]
    old = lax.slice(x, starts, limits)
    new = _COMBINE[combine](old, y)
    new = new if inside is None else jnp.where(inside, new, old)
    return lax.dynamic_update_slice(x, new, starts)


write_p = _jax.Primitive("write")
write_p.def_impl(_write)
write_p.def_abstract_eval(lambda x, y, *, starts, combine: x)
_jax.register_lowering(write_p, _jax.lower_fun(_write, multiple_results=False))


@register(write_p)
def _write_rule(op: OpInfo) -> Rule:
    """Of a dim that the window is a part of each shard gets what is its own from the window's
    shards; a window of one element there is whole on every device."""
    x, y = op.in_avals
    factors: dict[str, Factor] = {}
    left, right = [], []
    for d, (n, m) in enumerate(zip(x.shape, y.shape, strict=True)):
        factors[f"d{d}"] = Factor(n, Kind.PASS if n == m else Kind.PERMUTE)
        left.append((f"d{d}",) if n != 1 else ())
        right.append((f"d{d}",) if m != 1 else ())
    cut = frozenset(name for name, factor in factors.items() if factor.kind is Kind.PERMUTE)
    linear = ((0, 1),) if op.params["combine"] in ("add", "sub", "set") else ()
    return Rule(
        (tuple(left), tuple(right)), (tuple(left),), factors, linear=linear, local=_local_write,
        local_when=cut, fetches=(1,),
    )  # fmt: skip


def _local_write(ctx: Local, op: OpInfo, x: Any, y: Any) -> Sequence[Any]:
    starts, inside = list(op.params["starts"]), None
    for d, (n, m) in enumerate(zip(*(aval.shape for aval in op.in_avals), strict=True)):
        axes, size = ctx.axes(f"d{d}"), x.shape[d]
        if n == m or not axes:
            continue
        if m > 1:  # else it is compared with each place, and broadcast
            firsts = [i * size - starts[d] for i in range(ctx.shards(f"d{d}"))]
            y = ctx.fetch(y, d, axes, m, firsts, size)
        ones = [size if i == d else 1 for i in range(x.ndim)]
        at = ctx.offset(f"d{d}") + lax.broadcasted_iota(jnp.int32, ones, d)
        mine = (at >= starts[d]) & (at < starts[d] + m)
        inside = mine if inside is None else inside & mine
        y = jnp.broadcast_to(y, (*y.shape[:d], size, *y.shape[d + 1 :]))
        starts[d] = 0
    return [_write(x, y, starts=starts, combine=op.params["combine"], inside=inside)]


def _scattered(combine: str) -> Callable[[Mapping[str, Any], Sequence[Any]], Merged | None]:
    """A scatter of one window writes it."""

    def merge(params: Mapping[str, Any], operands: Sequence[Any]) -> Merged | None:
        array, indices, updates = operands
        numbers = params["dimension_numbers"]
        if numbers.operand_batching_dims or len(numbers.update_window_dims) != updates.rank:
            return None
        window = _placed(
            array.shape, window_sizes(numbers, array.shape, updates.shape),
            numbers.inserted_window_dims, numbers.scatter_dims_to_operand_dims, indices,
        )  # fmt: skip
        if window is None:
            return None

        def written(x: Any, y: Any) -> Any:
            y = lax.expand_dims(y, window.alone)
            return write_p.bind(x, y, starts=window.starts, combine=combine)

        return Merged(written, (array, updates))

    return merge


register_merged(p.scatter_add_p)(_scattered("add"))
register_merged(_jax.scatter_sub_p)(_scattered("sub"))
register_merged(p.scatter_mul_p)(_scattered("mul"))
register_merged(p.scatter_min_p)(_scattered("min"))
register_merged(p.scatter_max_p)(_scattered("max"))
register_merged(p.scatter_p)(_scattered("set"))


def _placed(
    shape: Sequence[int], sizes: Sequence[int], alone: Sequence[int], where: Sequence[int],
    indices: Any,
) -> _Window | None:  # fmt: skip
    """The one window that constant indices say; None where they are computed, say several or reach
    outside, and where no dim would have to be whole for it."""
    places = _constant(indices)
    if places is None or places.size != len(where):
        return None
    starts = [0] * len(shape)
    for d, place in zip(where, places.ravel().tolist(), strict=True):
        starts[d] = place
    windows = zip(starts, sizes, shape, strict=True)
    if any(start < 0 or start + size > n for start, size, n in windows):
        return None
    if not any(1 < size < n for size, n in zip(sizes, shape, strict=True)):
        return None
    return _Window(tuple(starts), tuple(sizes), tuple(alone))


def _constant(value: Any) -> Any:
    """A constant of the program as an array of numpy; None for what is computed."""
    if value.const is not None:
        return np.asarray(value.const)
    op = value.op
    if op is None or op.primitive not in (p.broadcast_in_dim_p, p.concatenate_p):
        return None  # before what made it is looked at: a whole program may have
    parts = [_constant(v) for v in op.inputs]
    if any(part is None for part in parts):
        return None
    if op.primitive is p.concatenate_p:
        return np.concatenate(parts, op.params["dimension"])
    return np.full(op.params["shape"], parts[0]) if parts[0].ndim == 0 else None
