"""Sorting and selection along a sharded dim."""

from collections.abc import Mapping, Sequence, Set
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from sharding import _jax
from sharding.monoid import identity
from sharding.rule import Factor, Gathered, Kind, Local, OpInfo, Rule, names, register

p = _jax.primitives


@register(p.sort_p)
def _sort(op: OpInfo) -> Rule:
    """All operands are sorted together along one dim; other dims pass.

    The sorted dim is FIXED where its axes can go to another dim, which is one all-to-all. Where
    there is no other dim it passes: shards sort what they have, and then exchange whole blocks in
    the rounds of a sorting network, of which each keeps the lower or the upper half. That needs
    the global index of elements whose order shows, and where it sends more than a gather would,
    the dim is gathered.
    """
    shape, axis = op.in_avals[0].shape, op.params["dimension"]
    dims = names("d", len(shape))
    alone = prod(shape) == shape[axis]
    factors = {
        d: Factor(n, Kind.FIXED if i == axis and not alone else Kind.PASS)
        for i, (d, n) in enumerate(zip(dims, shape, strict=True))
    }
    tensors = (tuple((d,) for d in dims),) * len(op.in_avals)
    return Rule(
        tensors, tensors, factors, local=_local_sort if alone else None,
        local_when=frozenset({dims[axis]}), gathers=_Sorted.of(op),
    )  # fmt: skip


class _Sorted(NamedTuple):
    """The sorted dim is gathered, where that sends less than the sorting network.

    Attributes:
      factor, size: of the sorted dim.
      items: bytes per element of every operand.
      ties: whether the order of elements that compare as equal has to be kept.
    """

    factor: str
    size: int
    items: tuple[int, ...]
    ties: bool

    @staticmethod
    def of(op: OpInfo) -> "_Sorted":
        axis = op.params["dimension"]
        items = tuple(a.dtype.itemsize for a in op.in_avals)
        ties = bool(op.params["is_stable"]) and _shows_ties(op)
        return _Sorted(f"d{axis}", op.in_avals[0].shape[axis], items, ties)

    def __call__(
        self, shards: Mapping[str, int], free: Set[int] = frozenset()
    ) -> Mapping[str, Gathered]:
        if self.factor not in shards or not self.size:
            return {}
        count = shards[self.factor]
        index, row = self.index(count), sum(self.items)
        gathered = sum(n for i, n in enumerate(self.items) if i not in free)
        rounds, extra = len(network(count)), index.itemsize if index else 0
        if rounds * (row + extra) <= (count - 1) * gathered:
            return {}
        wire = rounds * -(-self.size // count) * (row + extra)
        kept = " that keep the order of equals" if extra else ""
        why = f"{rounds} exchanges of blocks{kept} would send {wire:,} B"
        remedy = "sort with stable=False (is_stable=False of jax.lax.sort), which exchanges blocks"
        return {self.factor: Gathered(why, remedy if extra and rounds < count else "")}

    def index(self, shards: int) -> Any:
        """The dtype of the global index, where it has to decide between elements that compare as
        equal; or None.

        In a network of two, neighbours merge in order. In a larger one equal elements overtake each
        other.
        """
        if shards <= 2 or not self.ties:
            return None
        return np.min_scalar_type(self.size + shards)  # shards end after the last element


def _local_sort(ctx: Local, op: OpInfo, *xs: Any) -> Sequence[Any]:
    """By a sorting network."""
    axis = op.params["dimension"]
    factor = f"d{axis}"
    if not op.in_avals[0].shape[axis]:
        return xs
    keys, dtype = op.params["num_keys"], _Sorted.of(op).index(ctx.shards(factor))
    if dtype:
        index = lax.broadcasted_iota(jnp.int32, xs[0].shape, axis) + ctx.offset(factor)
        xs, keys = (*xs[:keys], index.astype(dtype), *xs[keys:]), keys + 1
    out = list(_merged(ctx, op, xs, keys, network(ctx.shards(factor))))
    if dtype:
        del out[keys - 1]
    return out


def _shows_ties(op: OpInfo) -> bool:
    """Whether the order of elements that compare as equal can be seen in the results: there are
    operands besides the keys, or keys of which some differ and compare as equal (zeros, NaN)."""
    keys = op.params["num_keys"]
    return keys < len(op.in_avals) or any(
        jnp.issubdtype(a.dtype, jnp.inexact) for a in op.in_avals[:keys]
    )


@lru_cache
def network(count: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Rounds of compared pairs (low, high) that sort any `count` elements: Batcher's merge
    exchange (Knuth, The Art of Computer Programming 3, algorithm 5.2.2M)."""
    top = 1 << max((count - 1).bit_length() - 1, 0)
    rounds = []
    bit = top
    while bit and count > 1:
        q, r, distance = top, 0, bit
        while True:
            rounds.append(
                tuple((i, i + distance) for i in range(count - distance) if i & bit == r)
            )
            if q == bit:
                break
            distance, q, r = q - bit, q // 2, bit
        bit //= 2
    return tuple(rounds)


def _merged(
    ctx: Local, op: OpInfo, xs: Sequence[Any], keys: int, rounds: Sequence[Any]
) -> Sequence[Any]:
    """Blocks in order: in each round two shards have both their blocks; the one with the lower
    index keeps the lower half. Padding counts as higher than anything, so that it stays in the
    last shards, and how much each has never changes."""
    axis = op.params["dimension"]
    factor, size = f"d{axis}", op.in_avals[0].shape[axis]
    shards, block = ctx.shards(factor), ctx.local_size(factor)
    me = ctx.index(ctx.axes(factor))
    filled = np.clip(size - block * np.arange(shards), 0, block)
    at = lax.broadcasted_iota(jnp.int32, xs[0].shape, axis)

    def ordered(operands: Sequence[Any], padding: Any) -> Sequence[Any]:
        if size % shards == 0:
            return ctx.bind(*operands, num_keys=keys)
        return ctx.bind(padding, *operands, num_keys=keys + 1)[1:]

    xs = ordered(xs, at >= jnp.asarray(filled)[me])
    for pairs in rounds:
        partner = np.arange(shards)
        for low, high in pairs:
            partner[low], partner[high] = high, low
        other = jnp.asarray(partner)[me]
        first, second = jnp.minimum(me, other), jnp.maximum(me, other)
        starts = [int(shard) * block for shard in partner]
        theirs = [ctx.fetch(x, axis, ctx.axes(factor), size, starts, block) for x in xs]
        padding = [at >= jnp.asarray(filled)[shard] for shard in (first, second)]
        both = ordered(
            [_joined(me < other, x, y, axis) for x, y in zip(xs, theirs, strict=True)],
            lax.concatenate(padding, axis),
        )
        start = jnp.where(me < other, 0, block)
        kept = [lax.dynamic_slice_in_dim(x, start, block, axis) for x in both]
        xs = [jnp.where(me == other, x, y) for x, y in zip(xs, kept, strict=True)]
    return xs


def _joined(mine_first: Any, mine: Any, theirs: Any, axis: int) -> Any:
    low, high = jnp.where(mine_first, mine, theirs), jnp.where(mine_first, theirs, mine)
    return lax.concatenate([low, high], axis)


@register(p.top_k_p)
def _top_k(op: OpInfo) -> Rule:
    """Each shard finds its own k winners; those alone (values and global indices) are gathered.

    As with argmax, the `local` function returns whole results, so the searched dim is PASS with no
    place in them. It is FIXED where even two shards would send as much as it has.
    """
    axis, k = op.params["axis"], op.params["k"]
    few = 2 * k < op.in_avals[0].shape[axis]
    rule = _selection(op, axis, Kind.PASS if few else Kind.FIXED)
    return Rule(
        rule.operands, rule.results, rule.factors, local=_local_top_k,
        local_when=frozenset({f"d{axis}"}),
        gathers=_Searched(f"d{axis}", op.in_avals[0].shape[axis], op.in_avals[0].dtype.itemsize, k),
    )  # fmt: skip


class _Searched(NamedTuple):
    """The searched dim is gathered, where winners with their indices are more bytes than the
    shards.

    Attributes:
      factor, size: of the searched dim.
      item: bytes per element.
      k: winners.
    """

    factor: str
    size: int
    item: int
    k: int

    def __call__(
        self, shards: Mapping[str, int], free: Set[int] = frozenset()
    ) -> Mapping[str, Gathered]:
        block = -(-self.size // shards.get(self.factor, 1))
        if self.factor not in shards or self.k * (self.item + 4) < block * self.item:
            return {}
        why = f"{self.k} winners of each shard with their indices are no less"
        return {self.factor: Gathered(why)}


def _local_top_k(ctx: Local, op: OpInfo, x: Any) -> Sequence[Any]:
    """Of the winners of every shard."""
    axis = op.params["axis"]
    factor = f"d{axis}"
    axes, size, block = ctx.axes(factor), op.in_avals[0].shape[axis], x.shape[axis]
    # Equal values are gathered in order of their global index, which is how top_k breaks ties;
    # padding never wins, as its indices come after those of every real element.
    stable = {"is_stable": True} if "is_stable" in op.params and size % block else {}
    x = ctx.mask(x, 0, factor, identity("max", x.dtype))
    values, places = ctx.bind(x, **stable)
    values = ctx.all_gather(values, axes, axis)
    places = ctx.all_gather(places + ctx.offset(factor).astype(places.dtype), axes, axis)
    best, at = ctx.bind(values, **stable)
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
