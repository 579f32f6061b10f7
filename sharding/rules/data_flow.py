"""Data flow: what comes out is what went in."""

from collections.abc import Sequence
from typing import Any

from sharding import _jax
from sharding.rule import (
    Dims,
    Factor,
    Kind,
    Local,
    OpInfo,
    Rule,
    names,
    pointwise_rule,
    register,
    register_inline,
)

p = _jax.primitives


@register(*_jax.available("layout_constraint_p", "relayout_p", "with_memory_space_constraint_p"))
def _annotated(op: OpInfo) -> Rule:
    """The value with a remark for the compiler, which each shard carries on."""
    shape = op.in_avals[0].shape
    return pointwise_rule([shape], [shape], linear=((0,),))


def _apart(op: OpInfo) -> tuple[list[Dims], dict[str, Factor]]:
    """Every operand has dims of its own."""
    factors: dict[str, Factor] = {}
    tensors: list[Dims] = []
    for i, aval in enumerate(op.in_avals):
        shape = getattr(aval, "shape", ())  # tokens have none
        tensors.append(tuple((f"t{i}d{d}",) if n != 1 else () for d, n in enumerate(shape)))
        factors |= {f"t{i}d{d}": Factor(n) for d, n in enumerate(shape) if n != 1}
    return tensors, factors


@register(_jax.optimization_barrier_p)
def _optimization_barrier(op: OpInfo) -> Rule:
    """Result i is operand i, in any layout, partial ones too."""
    tensors, factors = _apart(op)
    return Rule(tuple(tensors), tuple(tensors), factors, early=True, elementary=True)


for _prim in _jax.available("tie_p"):  # (x, y) -> y: a remark that is dropped when it is lowered
    register_inline(_prim, lambda params: _jax.identity(), operands=lambda params, n: (1,))


@register(*_jax.available("shard_alike_p"))
def _shard_alike(op: OpInfo) -> Rule:
    """Two values as they are, sharded in the same way."""
    shape = op.in_avals[0].shape
    same = pointwise_rule([shape] * 2, [shape] * 2)
    return Rule(same.operands, same.results, same.factors, local=_unchanged, early=True)


def _unchanged(ctx: Local, op: OpInfo, *operands: Any) -> Sequence[Any]:
    return operands


@register(*_jax.available("to_edtype_p", "from_edtype_p"))
def _extended(op: OpInfo) -> Rule:
    """An element of an extended dtype is a small array: its dims are FIXED."""
    src, dst = (a.shape for a in (op.in_avals[0], op.out_avals[0]))
    longer, shared = max(src, dst, key=len), min(len(src), len(dst))
    dims = names("d", len(longer))
    factors = {
        d: Factor(n, Kind.PASS if i < shared else Kind.FIXED)
        for i, (d, n) in enumerate(zip(dims, longer, strict=True))
    }
    sides = [tuple((d,) for d in dims[: len(s)]) for s in (src, dst)]
    return Rule((sides[0],), (sides[1],), factors, early=True)
