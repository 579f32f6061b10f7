"""Fetching ranges of a sharded dim: each device gets the elements it needs from the neighbours.

What a device wants is known before tracing, so the exchange is a list of hops. In a hop every
shard sends one part and receives one, or none; what nobody wants is not sent. Halo exchange, shift,
reversal and redistribution over other shard sizes are all this.
"""

from collections.abc import Sequence
from functools import lru_cache, reduce
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sharding.mesh import MeshShape, axes_size, axis_size
from sharding.parts import cut, fixed, pick, where, written
from spmd import cost

_LARGER = 3  # what is joined may be that many times as large as what is wanted of it
# Of its own block, what a device takes whole: what is joined is cut once, and not its parts before,
# which would lie on other boundaries of registers than all that they are joined with.
_MOST = 0.9


class Hop(NamedTuple):
    """One exchange.

    Attributes:
      pairs: (source, receiver) shards, each at most once; or every shard with itself.
      length: elements along the dim, the same for all.
      send: per shard, the local place where the part that it sends starts.
      place: per shard, where in its result the part that it receives starts; may reach outside.
    """

    pairs: tuple[tuple[int, int], ...]
    length: int
    send: tuple[int, ...]
    place: tuple[int, ...]

    @property
    def moves(self) -> bool:
        return any(source != receiver for source, receiver in self.pairs)


# (source, receiver) -> the global range that moves, and how much further on it is gone round
_Parts = dict[tuple[int, int], tuple[int, int, int]]


@lru_cache(maxsize=4096)
def hops(
    size: int, block: int, shards: int, starts: tuple[int, ...], width: int, wrap: bool = False
) -> tuple[Hop, ...]:
    """The exchanges after which shard i has global elements [starts[i], starts[i] + width).

    Args:
      size: global size of the dim.
      block: elements per shard, the last ones padded.
      wrap: the dim, which is even, goes round: element `size` is element 0.
    """
    by_distance: dict[int, _Parts] = {}
    for (i, start), turn in product(enumerate(starts), (0, size) if wrap else (0,)):
        low, high = max(start - turn, 0), min(start - turn + width, size)
        for j in range(low // block if block else 0, shards):
            first, last = max(low, j * block), min(high, (j + 1) * block)
            if first >= last:
                break
            by_distance.setdefault(j - i, {})[j, i] = (first, last, turn)
    own = by_distance.pop(0, None)
    if own and _length(own) > _MOST * block:
        own = {(i, i): (i * block, (i + 1) * block, turn) for (i, _), (_, _, turn) in own.items()}
    moving = _merged([parts for _, parts in sorted(by_distance.items())])
    groups = ([own] if own else []) + moving
    return tuple(_hop(parts, block, starts, shards) for parts in groups)


def _merged(groups: Sequence[_Parts]) -> list[_Parts]:
    """Distances that no shard sends or receives over twice go together, the longest first."""
    merged: list[_Parts] = []
    for parts in sorted(groups, key=_length, reverse=True):
        for other in merged:
            if all(
                {pair[end] for pair in parts}.isdisjoint(pair[end] for pair in other)
                for end in (0, 1)
            ):
                other.update(parts)
                break
        else:
            merged.append(dict(parts))
    return merged


def _length(parts: _Parts) -> int:
    return max(last - first for first, last, _ in parts.values())


def _hop(parts: _Parts, block: int, starts: Sequence[int], shards: int) -> Hop:
    length = _length(parts)
    send, place = [0] * shards, [-length] * shards
    for (source, receiver), (first, _, turn) in parts.items():
        send[source] = min(first - source * block, block - length)
        place[receiver] = source * block + send[source] + turn - starts[receiver]
    return Hop(tuple(parts), length, tuple(send), tuple(place))


def fetch(
    x: Any, dim: int, axes: tuple[str, ...], size: int, starts: Sequence[int], width: int,
    fill: Any, index: Any, mesh: MeshShape, wrap: bool = False,
) -> Any:  # fmt: skip
    """See `sharding.local.Local.fetch`. `index` is this device's place along `axes`."""
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        impl = jax.random.key_impl(x)
        words = fetch(
            jax.random.key_data(x), dim, axes, size, starts, width, 0, index, mesh, wrap
        )
        return jax.random.wrap_key_data(words, impl=impl)
    shards = axes_size(mesh, axes)
    starts = tuple(int(s) for s in starts)
    fill = fixed(fill, x.dtype)
    shape = (*x.shape[:dim], width, *x.shape[dim + 1 :])
    if 0 in shape or not size:
        return jnp.full(shape, fill)
    whole = size > 1 and x.shape[dim] == size  # a shard of several has fewer elements
    if whole and shards > 1:
        return _own(x, dim, starts, width, fill, index, wrap)
    exchanged = hops(size, x.shape[dim], shards, starts, width, wrap)
    inside = wrap or all(0 <= s and s + width <= size for s in starts)
    even = size == x.shape[dim] * shards
    assert even or not wrap, "padding cannot go round"
    if _whole_is_cheaper(exchanged, x, dim, shards):
        out = lax.all_gather(x, axes, axis=dim, tiled=True)
        at = pick(starts, index) + lax.iota(jnp.int32, width)
        at = at % size if wrap else at
        out = jnp.take(out, at, axis=dim, mode="clip")
        return out if inside else _masked(out, dim, size, starts, index, fill)
    parts = [(hop, _received(hop, x, dim, axes, index, mesh)) for hop in exchanged]
    joined = _joined(parts, dim, width, index)
    if joined is None:
        joined = _placed(parts, dim, width, jnp.full(shape, fill), index)
        return joined if even else _masked(joined, dim, size, starts, index, fill)
    return joined if inside and even else _masked(joined, dim, size, starts, index, fill)


def _own(
    x: Any, dim: int, starts: tuple[int, ...], width: int, fill: Any, index: Any, wrap: bool
) -> Any:
    """What this device wants of an array that is whole on every device. Of the fill, too, as much
    as it wants alone: where the array is not fused with that, nothing as large as the result."""
    size = x.shape[dim]
    if wrap:
        at = (pick(starts, index) + lax.iota(jnp.int32, width)) % size
        return jnp.take(x, at, axis=dim, mode="clip")
    starts = tuple(min(max(start, -width), size) for start in starts)
    low, high = max(0, -min(starts)), max(0, max(starts) + width - size)
    if low or high:
        x = lax.pad(x, fill, [(low, high, 0) if d == dim else (0, 0, 0) for d in range(x.ndim)])
    return cut(x, pick([start + low for start in starts], index), width, dim)


def _whole_is_cheaper(exchanged: Sequence[Hop], x: Any, dim: int, shards: int) -> bool:
    """Whether one all-gather costs less than the hops, a constant per collective included."""
    moving = [hop for hop in exchanged if hop.moves]
    row = x.size // max(x.shape[dim], 1) * x.dtype.itemsize
    by_hops = sum(hop.length * row + cost.STEP_BYTES for hop in moving)
    return by_hops > (shards - 1) * x.shape[dim] * row + cost.STEP_BYTES


def _received(
    hop: Hop, x: Any, dim: int, axes: tuple[str, ...], index: Any, mesh: MeshShape
) -> Any:
    """What another shard has for this device; zeros where none has anything."""
    if hop.length != x.shape[dim]:
        used = {hop.send[source] for source, _ in hop.pairs}
        start = np.int32(used.pop()) if len(used) == 1 else pick(hop.send, index)
        x = cut(x, start, hop.length, dim)
    if not hop.moves:
        return x
    order = tuple(a for a in mesh.names if a in axes)
    number = _numbers(axes, order, mesh)
    return lax.ppermute(x, order, [(number[s], number[r]) for s, r in hop.pairs])


def _numbers(axes: Sequence[str], order: Sequence[str], mesh: MeshShape) -> list[int]:
    """Linear index along `order` of each linear index along `axes`: `ppermute` numbers devices in
    mesh order, whatever the order of the axes it is given."""
    grid = np.arange(axes_size(mesh, tuple(order)))
    grid = grid.reshape([axis_size(mesh, a) for a in order])
    return [int(i) for i in grid.transpose([order.index(a) for a in axes]).ravel()]


def _joined(parts: Sequence[tuple[Hop, Any]], dim: int, width: int, index: Any) -> Any:
    """The parts side by side, and of these the window that a device wants; None where they do not
    lie side by side. Outside of what a device receives there is anything."""
    offsets = _offsets([hop for hop, _ in parts]) if parts else None
    if offsets is None:
        return None
    places, begins = offsets
    order = sorted(range(len(parts)), key=lambda k: places[k])
    first, end = places[order[0]], places[order[0]]
    for k in order:
        if places[k] != end:
            return None
        end += parts[k][0].length
    if end - first > _LARGER * width:
        return None
    joined = [parts[k][1] for k in order]
    out = joined[0] if len(joined) == 1 else lax.concatenate(joined, dim)
    begins = [begin - first for begin in begins]
    low, high = max(0, *(-b for b in begins)), max(0, *(b + width - end + first for b in begins))
    if low or high:
        widths = [(low, high, 0) if d == dim else (0, 0, 0) for d in range(out.ndim)]
        out = lax.pad(out, jnp.zeros((), out.dtype), widths)
    if low + end - first + high == width:
        return out
    return cut(out, pick([b + low for b in begins], index), width, dim)


def _offsets(exchanged: Sequence[Hop]) -> tuple[list[int], list[int]] | None:
    """A place for every part, the same on all devices, and for every device the place where what
    it wants begins; None where there are none."""
    places: dict[int, int] = {0: 0}
    begins: dict[int, int] = {}
    received = [(k, i) for k, hop in enumerate(exchanged) for i in {r for _, r in hop.pairs}]
    for _ in range(2 * len(exchanged)):
        for k, i in received:
            if k in places:
                begins.setdefault(i, places[k] - exchanged[k].place[i])
            elif i in begins:
                places[k] = begins[i] + exchanged[k].place[i]
    if len(places) < len(exchanged) or any(i not in begins for _, i in received):
        return None
    if any(places[k] - exchanged[k].place[i] != begins[i] for k, i in received):
        return None
    nothing = min(begins.values())
    devices = range(len(exchanged[0].place))
    return [places[k] for k in range(len(exchanged))], [begins.get(i, nothing) for i in devices]


def _placed(
    parts: Sequence[tuple[Hop, Any]], dim: int, width: int, out: Any, index: Any
) -> Any:
    """Every part written to its own place of `out`.

    The margins take what reaches outside, and what a device that receives nothing would write.
    Parts may overlap: they hold the same elements there.
    """
    receivers = [{receiver for _, receiver in hop.pairs} for hop, _ in parts]
    low = high = 0
    for (hop, _), found in zip(parts, receivers, strict=True):
        low = max(low, *(-hop.place[i] for i in found))
        high = max(high, *(hop.place[i] + hop.length - width for i in found))
        high = high if len(found) == len(hop.place) else max(high, hop.length)
    widths = [(low, high, 0) if d == dim else (0, 0, 0) for d in range(out.ndim)]
    out = lax.pad(out, jnp.zeros((), out.dtype), widths)
    for (hop, part), found in zip(parts, receivers, strict=True):
        at = [low + (p if i in found else width) for i, p in enumerate(hop.place)]
        out = written(out, part, pick(at, index), dim)
    return lax.slice_in_dim(out, low, low + width, axis=dim)


def _masked(x: Any, dim: int, size: int, starts: Sequence[int], index: Any, fill: Any) -> Any:
    """`fill` wherever the global place is outside of [0, size)."""
    begin = lax.broadcast(pick(starts, index), x.shape)
    at = lax.add(lax.broadcasted_iota(jnp.int32, x.shape, dim), begin)
    tests = []
    if min(starts) < 0:
        tests.append(lax.ge(at, lax.broadcast(np.int32(0), x.shape)))
    if max(starts) + x.shape[dim] > size:
        tests.append(lax.lt(at, lax.broadcast(np.int32(size), x.shape)))
    return where(reduce(lax.bitwise_and, tests), x, fill) if tests else x
