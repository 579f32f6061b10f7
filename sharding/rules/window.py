"""Window reductions and their transposes: neighbours exchange halos along windowed dims.

Every shard fetches the elements that the windows of its results cover, the padding outside of the
dim included; what is left is a window reduction without padding. So shards at the borders run the
same program as those between them.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from sharding import _jax
from sharding.monoid import identity
from sharding.parts import cut
from sharding.rule import Dims, Factor, Kind, Local, OpInfo, Rule, RuleFn, register
from sharding.rules.halo import Factors, Window, pick, windows_of
from sharding.rules.scalars import scalar_function

p = _jax.primitives


# Reductions: dims of the operand and of the result are d0, d1 ...; i0 and o0 where they are FIXED.


def _kind(window: Window, monoid: str) -> Kind:
    """One window over the whole dim is a reduction, several are neighbourhoods."""
    if window.plain:
        return Kind.PASS
    if 0 in (window.size, window.count):
        return Kind.FIXED
    if window.count > 1:
        return Kind.PERMUTE
    dense = window.base == window.dilation == 1
    return Kind.REDUCE if monoid and dense and window.size > 1 else Kind.FIXED


def _reduction(monoid: str, linear: tuple[tuple[int, ...], ...] = ()) -> RuleFn:
    """`monoid` is "" where there is none to reduce the results of shards by."""

    def rule(op: OpInfo) -> Rule:
        """Dims without windows pass; along the others shards fetch what their windows cover. A
        window that is all of a dim is reduced."""
        windows = windows_of(op, op.in_avals[0].shape, op.out_avals[0].shape)
        factors = Factors()
        pairs = []
        for d, w in enumerate(windows):
            kind = _kind(w, monoid)
            reduced = kind is Kind.REDUCE
            factor = Factor(w.size, kind, monoid) if reduced else Factor(w.count, kind)
            pairs.append(factors.pair(d, w.size, w.count, factor))
        operands = tuple(
            tuple(left for left, _ in pairs) if len(a.shape) == len(pairs) else ()
            for a in op.in_avals
        )
        result = tuple(right for _, right in pairs)
        moved = frozenset(f for f, factor in factors.items() if factor.kind is not Kind.PASS)
        return Rule(
            operands, (result,) * len(op.out_avals), factors, linear=linear,
            local=_local_reduction, local_when=moved, flops=prod(w.window for w in windows),
        )  # fmt: skip

    return rule


_MONOIDS = {
    p.reduce_window_sum_p: "add", p.reduce_window_max_p: "max", p.reduce_window_min_p: "min",
}  # fmt: skip


for _primitive, _monoid in _MONOIDS.items():
    register(_primitive)(_reduction(_monoid, ((0,),) if _monoid == "add" else ()))
register(p.reduce_window_p)(_reduction(""))
register(p.select_and_gather_add_p)(_reduction("", ((0,),)))


def _local_reduction(ctx: Local, op: OpInfo, *args: Any) -> Sequence[Any]:
    params, generic = op.params, op.primitive is p.reduce_window_p
    count = len(op.out_avals) if generic else len(args)
    xs, inits = list(args[:count]), args[count:]
    fills = inits or _fills(op)
    changed = {name: list(params[name]) for name in ("window_dimensions", "window_strides",
                                                     "padding", "base_dilation")}  # fmt: skip
    valid = None
    windows = windows_of(op, op.in_avals[0].shape, op.out_avals[0].shape)
    for d, w in enumerate(windows):
        axes = ctx.axes(f"d{d}")
        if not axes or w.plain:
            continue
        changed["padding"][d] = (0, 0)
        if w.count == 1:
            xs = [_own(ctx, x, d, w, fill) for x, fill in zip(xs, fills, strict=True)]
            changed["window_dimensions"][d], changed["window_strides"][d] = xs[0].shape[d], 1
            continue
        need = w.part(ctx.shards(f"d{d}"), ctx.local_out(0)[d])
        xs = [need.take(ctx, x, d, axes, w.size, f) for x, f in zip(xs, fills, strict=True)]
        changed["padding"][d], changed["base_dilation"][d] = need.padding, need.dilation
        if generic and not w.inside:
            here = need.valid(ctx, d, axes, w.size, xs[0].ndim)
            here = need.spread(ctx, here, d, axes, jnp.asarray(False))
            valid = here if valid is None else valid & here
    changed = {name: tuple(value) for name, value in changed.items()}
    if valid is None:
        return ctx.bind(*xs, *inits, **changed)
    return _skipping(op, xs, inits, jnp.broadcast_to(valid, xs[0].shape), changed)


def _fills(op: OpInfo) -> tuple[Any, ...]:
    """What padding holds, per operand."""
    if op.primitive is p.select_and_gather_add_p:
        return 0, _never_chosen(op.params["select_prim"], op.in_avals[1].dtype)
    return (identity(_MONOIDS[op.primitive], op.in_avals[0].dtype),)


def _never_chosen(select: Any, dtype: Any) -> Any:
    return identity("max" if select is p.ge_p else "min", dtype)


def _own(ctx: Local, x: Any, d: int, w: Window, fill: Any) -> Any:
    """This shard's elements of the one window there is."""
    low, high = max(-w.padding[0], 0), min(w.window - w.padding[0], w.size)
    at = lax.broadcasted_iota(jnp.int32, x.shape, d) + ctx.offset(f"d{d}")
    return jnp.where((at >= low) & (at < high), x, jnp.asarray(fill, x.dtype))


def _skipping(
    op: OpInfo, xs: Sequence[Any], inits: Sequence[Any], valid: Any, changed: dict
) -> Sequence[Any]:
    """The reduction of any function, over valid elements alone.

    XLA does not apply the function to padding. That shows where the initial values are not its
    identity, so padding that was fetched is left out too.
    """
    jaxpr, consts = op.params["jaxpr"], op.params["consts"]
    fun = scalar_function(_jax.ClosedJaxpr(_jax.closed(jaxpr).jaxpr, consts))

    def computation(x: tuple, y: tuple) -> tuple:
        *xs, x_valid = x
        *ys, y_valid = y
        both = x_valid & y_valid
        some = [lax.select(x_valid, a, b) for a, b in zip(xs, ys, strict=True)]
        done = [lax.select(both, a, b) for a, b in zip(fun(*xs, *ys), some, strict=True)]
        return (*done, x_valid | y_valid)

    *out, _ = lax.reduce_window(
        (*xs, valid), (*inits, jnp.asarray(True)), computation,
        window_dilation=op.params["window_dilation"], **changed,
    )  # fmt: skip
    return out


# Transposes: dims of the operand and of the result are d0, d1 ... as are those of the source, which
# has one element per window; i0 and o0 where they are FIXED.


@register(p.select_and_scatter_add_p)
def _select_and_scatter_add(op: OpInfo) -> Rule:
    """Each shard fetches the windows that touch its elements, and keeps what falls on those."""
    source, operand = op.in_avals
    left, right, factors = _scattered(op, operand.shape, source.shape, distributes=True)
    return _scatter_rule(op, (right, left), left, factors, ((0,),))


@register(p.select_and_scatter_p)
def _select_and_scatter(op: OpInfo) -> Rule:
    """As select_and_scatter_add where it chooses by order and adds; else windowed dims are FIXED:
    nothing is known that another function would leave out."""
    operand, source, _ = op.in_avals
    left, right, factors = _scattered(op, operand.shape, source.shape, _chooses_and_adds(op))
    linear = ((1, 2),) if _function(op.params["scatter_jaxpr"]) is p.add_p else ()
    return _scatter_rule(op, (left, right, ()), left, factors, linear)


def _scattered(
    op: OpInfo, sizes: Sequence[int], counts: Sequence[int], distributes: bool
) -> tuple[Dims, Dims, Factors]:
    factors = Factors()
    pairs = []
    for d, w in enumerate(windows_of(op, sizes, counts)):
        kind = Kind.PASS if w.plain else Kind.PERMUTE
        if kind is Kind.PERMUTE and not (distributes and w.size > 1 and w.count > 1):
            kind = Kind.FIXED
        pairs.append(factors.pair(d, w.size, w.count, Factor(w.size, kind)))
    return tuple(left for left, _ in pairs), tuple(right for _, right in pairs), factors


def _scatter_rule(
    op: OpInfo, operands: tuple[Dims, ...], result: Dims, factors: Factors, linear: tuple
) -> Rule:
    moved = frozenset(f for f, factor in factors.items() if factor.kind is Kind.PERMUTE)
    return Rule(
        operands, (result,), factors, linear=linear, local=_local_scatter, local_when=moved,
        flops=prod(op.params["window_dimensions"]),
    )  # fmt: skip


def _function(jaxpr: Any) -> Any:
    """The primitive of two arguments that a function is, or None."""
    jaxpr = _jax.closed(jaxpr).jaxpr
    if len(jaxpr.eqns) != 1:
        return None
    (eqn,) = jaxpr.eqns
    same = list(eqn.invars) == list(jaxpr.invars) and list(eqn.outvars) == list(jaxpr.outvars)
    return eqn.primitive if same else None


def _chooses_and_adds(op: OpInfo) -> bool:
    """Whether zeros that are scattered, and the lowest or highest value, are as good as nothing."""
    select, scatter = (_function(op.params[f"{name}_jaxpr"]) for name in ("select", "scatter"))
    return scatter in (p.add_p, p.or_p) and select in (p.ge_p, p.le_p)


def _local_scatter(ctx: Local, op: OpInfo, *args: Any) -> Sequence[Any]:
    if op.primitive is p.select_and_scatter_p:
        o, s, init = 0, 1, args[2]
        select = _function(op.params["select_jaxpr"])
    else:
        o, s, init = 1, 0, 0
        select = op.params["select_prim"]
    xs, padding = list(args), list(op.params["padding"])
    worst = _never_chosen(select, xs[o].dtype)
    cuts = []
    for d, w in enumerate(windows_of(op, op.in_avals[o].shape, op.in_avals[s].shape)):
        axes = ctx.axes(f"d{d}")
        if not axes or w.plain:
            continue
        touched = _touched(w, ctx.shards(f"d{d}"), xs[o].shape[d])
        xs[s] = ctx.fetch(xs[s], d, axes, w.count, touched.first, touched.count)
        xs[o] = ctx.fetch(xs[o], d, axes, w.size, touched.starts, touched.width, worst)
        padding[d] = (0, 0)
        cuts.append((d, axes, touched))
    (out,) = ctx.bind(*xs, padding=tuple(padding))
    for d, axes, touched in cuts:
        out = touched.cut(ctx, out, d, axes, jnp.asarray(init, out.dtype))
    return [out]


class _Touched(NamedTuple):
    """The windows that touch the elements of each shard, and where those elements are in them.

    Attributes:
      first: per shard the first window.
      count: number of windows.
      starts: per shard the first element that they cover.
      width: number of elements that they cover.
      places: per shard where its own elements start among the covered ones.
      size: number of own elements.
    """

    first: tuple[int, ...]
    count: int
    starts: tuple[int, ...]
    width: int
    places: tuple[int, ...]
    size: int

    def cut(self, ctx: Local, x: Any, d: int, axes: tuple[str, ...], init: Any) -> Any:
        """A shard's own elements; `init` where no window covers them."""
        low = max(0, -min(self.places))
        high = max(0, max(self.places) + self.size - self.width)
        x = lax.pad(x, init, [(low, high, 0) if i == d else (0, 0, 0) for i in range(x.ndim)])
        begin = pick(ctx, axes, [place + low for place in self.places])
        return cut(x, begin, self.size, d)


def _touched(w: Window, shards: int, size: int) -> _Touched:
    low, begins = w.padding[0], [i * size for i in range(shards)]
    first = tuple(-(-(begin + low - w.window + 1) // w.stride) for begin in begins)
    last = [(begin + size - 1 + low) // w.stride for begin in begins]
    count = max(1, *(b - a + 1 for a, b in zip(first, last, strict=True)))
    starts = tuple(f * w.stride - low for f in first)
    places = tuple(begin - start for begin, start in zip(begins, starts, strict=True))
    return _Touched(first, count, starts, (count - 1) * w.stride + w.window, places, size)
