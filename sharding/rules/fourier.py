"""Fourier transforms: batch dims pass, and so do transformed dims that can swap places."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from sharding import _jax
from sharding.rule import Factor, Kind, Local, OpInfo, Rule, register

p = _jax.primitives
Type = _jax.FftType


@register(p.fft_p)
def _fft(op: OpInfo) -> Rule:
    """Batch dims pass. A transformed dim is FIXED where its axes can go to a batch dim, and where
    it changes its size; otherwise it passes, if there is another dim to split meanwhile: an
    all-to-all before its transform and one after. Linear."""
    src, dst = op.in_avals[0].shape, op.out_avals[0].shape
    batch = len(src) - len(op.params["fft_lengths"])
    real = op.params["fft_type"] in (Type.RFFT, Type.IRFFT)
    factors: dict[str, Factor] = {}
    left, right = [], []
    for d, (n, m) in enumerate(zip(src, dst, strict=True)):
        last = real and d == len(src) - 1
        room = all(k == 1 for k in src[:batch]) and any(k > 1 for k in _without(src, d))
        if d < batch or (room and not last):
            name = f"d{d}"
            factors[name] = Factor(n)
            left.append((name,))
            right.append((name,))
        else:
            factors[f"i{d}"], factors[f"o{d}"] = Factor(n, Kind.FIXED), Factor(m, Kind.FIXED)
            left.append((f"i{d}",))
            right.append((f"o{d}",))
    return Rule(
        (tuple(left),), (tuple(right),), factors, linear=((0,),), local=_local_fft, always=True
    )


def _without(values: Sequence[int], d: int) -> list[int]:
    return [*values[:d], *values[d + 1 :]]


def _local_fft(ctx: Local, op: OpInfo, x: Any) -> Sequence[Any]:
    """The primitive, or one dim after the other where one is sharded: real numbers first of all or
    last of all, as the whole transform does."""
    kind, lengths = op.params["fft_type"], op.params["fft_lengths"]
    if not x.size:
        return [jnp.zeros(ctx.local_out(0), op.out_avals[0].dtype)]
    first, last = x.ndim - len(lengths), x.ndim - 1
    if not any(ctx.axes(f"d{d}") for d in range(first, x.ndim)):
        return [_row_major(ctx.bind(x)[0])]
    between = Type.FFT if kind in (Type.FFT, Type.RFFT) else Type.IFFT
    if kind == Type.RFFT:
        x = _along(ctx, x, last, kind, lengths[-1])
    for d in range(first, x.ndim if kind == between else last):
        if ctx.axes(f"d{d}"):
            x = _swapped(ctx, x, d, between, lengths[d - first])
        else:
            x = _along(ctx, x, d, between, lengths[d - first])
    return [_along(ctx, x, last, kind, lengths[-1]) if kind == Type.IRFFT else x]


def _along(ctx: Local, x: Any, d: int, kind: Any, length: int) -> Any:
    (out,) = ctx.bind(jnp.moveaxis(x, d, -1), fft_type=kind, fft_lengths=(length,))
    return jnp.moveaxis(_row_major(out), -1, d)


def _swapped(ctx: Local, x: Any, d: int, kind: Any, length: int) -> Any:
    """The transform along a sharded dim, while the longest other dim is split in its place."""
    axes, block = ctx.axes(f"d{d}"), x.shape[d]
    shards = ctx.shards(f"d{d}")
    other = max((t for t in range(x.ndim) if t != d), key=lambda t: x.shape[t])
    width = x.shape[other]
    x = _padded(x, other, -(-width // shards) * shards)
    for axis in reversed(axes):
        x = lax.all_to_all(x, axis, other, d, tiled=True)
    x = _along(ctx, lax.slice_in_dim(x, 0, length, axis=d), d, kind, length)
    x = _padded(x, d, block * shards)
    for axis in axes:
        x = lax.all_to_all(x, axis, d, other, tiled=True)
    return lax.slice_in_dim(x, 0, width, axis=other)


def _padded(x: Any, d: int, size: int) -> Any:
    widths = [(0, size - x.shape[d] if e == d else 0, 0) for e in range(x.ndim)]
    return lax.pad(x, jnp.zeros((), x.dtype), widths)


def _row_major(x: Any) -> Any:
    """The layout that XLA's transform on CPUs needs, and that XLA gives up in favour of the
    collective that reads the result."""
    layout = Layout(major_to_minor=tuple(range(x.ndim)))
    return lax.platform_dependent(
        x, cpu=lambda x: with_layout_constraint(x, layout), default=lambda x: x
    )
