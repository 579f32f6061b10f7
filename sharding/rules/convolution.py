"""Convolutions: batch, feature and group dims as in a contraction; neighbours exchange halos along
spatial dims."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from sharding import _jax
from sharding.rule import Dims, Factor, Kind, Local, OpInfo, Rule, register
from sharding.rules.halo import Factors, Window, part

p = _jax.primitives


@register(p.conv_general_dilated_p)
def _convolution(op: OpInfo) -> Rule:
    """`b c, f c -> b f` with batch b and features f PASS, input features c REDUCE by add, groups g
    major in the dims that they divide. Spatial dims d0, d1 ... see `_spatial_kind`."""
    lhs, rhs = (a.shape for a in op.in_avals)
    numbers = op.params["dimension_numbers"]
    by_feature, by_batch = op.params["feature_group_count"], op.params["batch_group_count"]
    (lhs_b, lhs_c), (rhs_f, rhs_c) = numbers.lhs_spec[:2], numbers.rhs_spec[:2]
    factors = Factors()
    g = factors.dim("g", by_feature * by_batch)
    b = factors.dim("b", lhs[lhs_b] // by_batch)
    c = factors.dim("c", rhs[rhs_c], Kind.REDUCE, "add")
    f = factors.dim("f", rhs[rhs_f] // (by_feature * by_batch))
    left: dict[int, tuple] = {lhs_b: g + b, lhs_c: c} if by_batch > 1 else {lhs_b: b, lhs_c: g + c}
    right: dict[int, tuple] = {rhs_f: g + f, rhs_c: c}
    result = dict(zip(numbers.out_spec[:2], (b, g + f), strict=True))
    flops = 2
    for i, w in enumerate(_windows(op)):
        kind = _spatial_kind(w)
        lhs_d, rhs_d, out_d = (spec[2 + i] for spec in numbers)
        if kind is Kind.REDUCE:
            factors[f"d{i}"] = Factor(w.window, kind, "add")
            left[lhs_d] = right[rhs_d] = (f"d{i}",)
            result[out_d] = factors.dim(f"o{i}", w.count, Kind.FIXED)
        else:
            left[lhs_d], result[out_d] = factors.pair(i, w.size, w.count, Factor(w.count, kind))
            right[rhs_d] = factors.dim(f"w{i}", w.window, Kind.FIXED)
        # A FIXED factor does not count as iterations: what it runs over is work of each of them.
        iterated = {Kind.REDUCE: w.window, Kind.FIXED: 1}.get(kind, w.count)
        flops *= w.window * w.count // max(iterated, 1)

    def dims(names: dict[int, tuple]) -> Dims:
        return tuple(names[d] for d in range(len(names)))

    return Rule(
        (dims(left), dims(right)), (dims(result),), factors,
        linear=((0,), (1,)), local=_local_convolution, always=0 in (*lhs, *rhs), flops=flops,
        spatial=frozenset(f"d{i}" for i in range(len(lhs) - 2)),
    )  # fmt: skip


def _windows(op: OpInfo) -> list[Window]:
    """The windows of the kernel along every spatial dim."""
    lhs, rhs, out = (a.shape for a in (*op.in_avals, *op.out_avals))
    lhs_spec, rhs_spec, out_spec = op.params["dimension_numbers"]
    params = op.params
    return [
        Window(lhs[i], out[k], rhs[j], stride, tuple(padding), base, dilation)
        for i, j, k, stride, padding, base, dilation in zip(
            lhs_spec[2:], rhs_spec[2:], out_spec[2:], params["window_strides"],
            params["padding"], params["lhs_dilation"], params["rhs_dilation"], strict=True,
        )
    ]  # fmt: skip


def _spatial_kind(w: Window) -> Kind:
    """What happens along a spatial dim, by its sizes.

    PASS: the kernel is a single element.
    REDUCE: the kernel is as long as what it slides over, as in the gradient of a kernel. Shards
      hold corresponding parts of both, fetch a halo of the left one, and sum few results.
    PERMUTE: shards fetch the halo that their results need; the kernel is whole. So too where a
      kernel longer than the result tiles what it slides over, as where an image is cut to patches.
    """
    if w.plain:
        return Kind.PASS
    if 0 in (w.size, w.count, w.window):
        return Kind.FIXED
    overlapping = w.window > w.count and w.window * w.count > w.size
    if w.count == 1 or overlapping:
        return Kind.REDUCE if w.size > 1 and w.window > 1 else Kind.FIXED
    return Kind.PERMUTE


def _local_convolution(ctx: Local, op: OpInfo, lhs: Any, rhs: Any) -> Sequence[Any]:
    params = op.params
    if not lhs.size or not rhs.size:  # XLA may crash on it in a program for one of many devices
        return [jnp.zeros(ctx.local_out(0), op.out_avals[0].dtype)]
    if ctx.axes("c"):
        lhs, rhs = ctx.mask(lhs, 0, "c", 0), ctx.mask(rhs, 1, "c", 0)
    changed: dict[str, Any] = {}
    for name in ("feature_group_count", "batch_group_count"):
        if params[name] > 1:
            changed[name] = -(-params[name] // ctx.shards("g"))
    padding, dilation = list(params["padding"]), list(params["lhs_dilation"])
    for i, w in enumerate(_windows(op)):
        axes, shards = ctx.axes(f"d{i}"), ctx.shards(f"d{i}")
        if not axes or w.plain:
            continue
        lhs_d, rhs_d, out_d = (spec[2 + i] for spec in params["dimension_numbers"])
        if _spatial_kind(w) is Kind.REDUCE:
            size = rhs.shape[rhs_d]
            begins = [j * size for j in range(shards)]
            rhs = ctx.fetch(rhs, rhs_d, axes, w.window, begins, size)
            span = (w.count - 1) * w.stride + (size - 1) * w.dilation + 1
            need = part([b * w.dilation - w.padding[0] for b in begins], span, w.base)
        else:
            need = w.part(shards, ctx.local_out(0)[out_d])
        lhs = need.take(ctx, lhs, lhs_d, axes, w.size, 0)
        padding[i], dilation[i] = need.padding, need.dilation
    return ctx.bind(lhs, rhs, padding=tuple(padding), lhs_dilation=tuple(dilation), **changed)
