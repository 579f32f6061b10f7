"""What the shards of a windowed dim need of their neighbours: the arithmetic of windows.

Windows of a stride and a dilation slide over a dim that is dilated and padded, as in convolutions
and window reductions. A shard has some of the windows, and fetches the elements that those cover.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from sharding import parts
from sharding.rule import Factor, Kind, Local, OpInfo


class Window(NamedTuple):
    """The windows along one dim: they slide over `size` elements, `base` apart after padding."""

    size: int
    count: int
    window: int
    stride: int
    padding: tuple[int, int]
    base: int = 1
    dilation: int = 1

    @property
    def extent(self) -> int:
        return (self.window - 1) * self.dilation + 1

    @property
    def plain(self) -> bool:
        """Every element is a window."""
        return (self.window, self.stride, self.padding, self.base) == (1, 1, (0, 0), 1)

    @property
    def inside(self) -> bool:
        """No window covers padding, or gaps between elements."""
        return self.base == 1 and max(self.padding) <= 0

    def part(self, shards: int, count: int) -> "Part":
        """What shards with `count` windows each cover."""
        firsts = [i * count * self.stride - self.padding[0] for i in range(shards)]
        return part(firsts, (count - 1) * self.stride + self.extent, self.base)


class Part(NamedTuple):
    """What the shards need of a dim whose elements are dilated.

    Attributes:
      starts: per shard the first element.
      width: number of elements.
      span: number of places that they make after dilation and padding.
      base: dilation.
      leads: places before the first element: one number, or one per shard where they differ.
    """

    starts: tuple[int, ...]
    width: int
    span: int
    base: int
    leads: tuple[int, ...]

    @property
    def even(self) -> bool:
        return len(self.leads) == 1

    @property
    def dilation(self) -> int:
        """The dilation that is left to the primitive."""
        return self.base if self.even else 1

    @property
    def padding(self) -> tuple[int, int]:
        """The padding that is left to the primitive: only what dilation makes."""
        return (self.leads[0], self._tail) if self.even else (0, 0)

    @property
    def _tail(self) -> int:
        """Places after the last element, where the lead is shortest."""
        return self.span - min(self.leads) - (self.width - 1) * self.base - 1

    def take(self, ctx: Local, x: Any, d: int, axes: tuple[str, ...], size: int, fill: Any) -> Any:
        """This shard's part of dim `d`, from its owners; `fill` outside of the dim."""
        fill = jnp.asarray(fill, x.dtype)
        if size == 1:  # whole on every device
            x = jnp.where(self.valid(ctx, d, axes, 1, x.ndim), x, fill)
        else:
            x = ctx.fetch(x, d, axes, size, self.starts, self.width, fill)
        return self.spread(ctx, x, d, axes, fill)

    def valid(self, ctx: Local, d: int, axes: tuple[str, ...], size: int, rank: int) -> Any:
        """Which of the elements lie in the dim."""
        shape = [self.width if i == d else 1 for i in range(rank)]
        at = lax.broadcasted_iota(jnp.int32, shape, d) + pick(ctx, axes, self.starts)
        return (at >= 0) & (at < size)

    def spread(self, ctx: Local, x: Any, d: int, axes: tuple[str, ...], fill: Any) -> Any:
        """Dilates the elements where the primitive cannot, since shards begin at other places."""
        if self.even:
            return x
        low = max(self.leads)
        gaps = [(low, self._tail, self.base - 1) if i == d else (0, 0, 0) for i in range(x.ndim)]
        begin = pick(ctx, axes, [low - lead for lead in self.leads])
        return parts.cut(lax.pad(x, fill, gaps), begin, self.span, d)


def part(firsts: Sequence[int], span: int, base: int) -> Part:
    """Of places `span` on from each shard's first, counted after dilation by `base`."""
    starts = tuple(-(-first // base) for first in firsts)
    leads = tuple(start * base - first for start, first in zip(starts, firsts, strict=True))
    width = max(-(-(span - min(leads)) // base), 1)
    return Part(starts, width, span, base, leads[:1] if len(set(leads)) == 1 else leads)


def pick(ctx: Local, axes: tuple[str, ...], table: Sequence[int]) -> Any:
    """This shard's entry."""
    return parts.pick(table, ctx.index(axes))


class Factors(dict[str, Factor]):
    """The factors of a rule under construction."""

    def dim(self, name: str, size: int, kind: Kind = Kind.PASS, monoid: str = "") -> tuple:
        """The names of a dim of one factor; none for a dim of size 1."""
        if size == 1:
            return ()
        self[name] = Factor(size, kind, monoid)
        return (name,)

    def pair(self, d: int, left: int, right: int, factor: Factor) -> tuple[tuple, tuple]:
        """The names of two dims that share a factor, or have each its own where it is FIXED."""
        if factor.kind is Kind.FIXED:
            return self.dim(f"i{d}", left, Kind.FIXED), self.dim(f"o{d}", right, Kind.FIXED)
        if left != 1 or right != 1:
            self[f"d{d}"] = factor
        return (f"d{d}",) if left != 1 else (), (f"d{d}",) if right != 1 else ()


def windows_of(op: OpInfo, sizes: Sequence[int], counts: Sequence[int]) -> list[Window]:
    params, ones = op.params, (1,) * len(sizes)
    return list(
        map(
            Window, sizes, counts, params["window_dimensions"], params["window_strides"],
            map(tuple, params["padding"]), params.get("base_dilation", ones),
            params.get("window_dilation", ones),
        )
    )  # fmt: skip
