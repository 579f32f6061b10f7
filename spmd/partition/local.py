"""`LocalView`: what a rule's `local` function may ask while it runs inside `shard_map`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from sharding.mesh import MeshShape, axes_size
from sharding.program import Op
from sharding.rule import Kind
from spmd.partition.apply import linear_index
from spmd.partition.plan import Compute

# Parameters that hold shardings on the global mesh: meaningless at local shapes.
_SHARDING_PARAMS = ("sharding", "out_sharding")

IDENTITY = {"add": 0, "mul": 1, "and": True, "or": False}


class LocalView:
    """Implements `sharding.rule.Local` for one instruction."""

    def __init__(self, instruction: Compute, mesh: MeshShape):
        self.op: Op = instruction.op
        self.rule = instruction.op.rule
        self.mesh = mesh
        self.assigned: Mapping[str, tuple[str, ...]] = instruction.assignment.axes
        self.results = instruction.results

    def axes(self, factor: str) -> tuple[str, ...]:
        return self.assigned.get(factor, ())

    def shards(self, factor: str) -> int:
        return axes_size(self.mesh, self.axes(factor))

    def local_size(self, factor: str) -> int:
        return -(-self.rule.factors[factor].size // self.shards(factor))

    def offset(self, factor: str) -> Any:
        return self.index(self.axes(factor)) * self.local_size(factor)

    def local_out(self, result: int) -> tuple[int, ...]:
        value, layout = self.results[result]
        return layout.local_shape(value.shape, self.mesh)

    def index(self, axes: tuple[str, ...]) -> Any:
        return linear_index(axes, self.mesh)

    def uneven(self, factor: str) -> bool:
        return self.rule.factors[factor].size % self.shards(factor) != 0

    def mask(self, x: Any, operand: int, factor: str, fill: Any) -> Any:
        """`x` with the padding of `factor` replaced by `fill`; `x` itself where it is even."""
        if not self.uneven(factor):
            return x
        dim = next(d for t, d in self.rule.where[factor] if t == operand)
        at = lax.broadcasted_iota(jnp.int32, x.shape, dim) + self.offset(factor)
        return jnp.where(at < self.rule.factors[factor].size, x, jnp.asarray(fill, x.dtype))

    def all_gather(self, x: Any, axes: tuple[str, ...], dim: int) -> Any:
        return lax.all_gather(x, axes, axis=dim, tiled=True) if axes else x

    def bind(self, *operands: Any, **changed: Any) -> Sequence[Any]:
        params = {**self.op.params, **changed}
        for name in _SHARDING_PARAMS:
            if name in params:
                params[name] = None
        for name, result in self.rule.resize:
            if name not in changed:
                params[name] = self.local_out(result)
        out = self.op.primitive.bind(*operands, **self.op.primitive.get_bind_params(params))
        return out if self.op.primitive.multiple_results else [out]

    def run(self, operands: Sequence[Any]) -> Sequence[Any]:
        """The equation at local shapes: by its `local` function, or bound with padding masked."""
        if self.rule.identity:
            return operands
        when = self.rule.local_when
        sharded = {name for name, axes in self.assigned.items() if axes}
        if self.rule.local is not None and (sharded if when is None else sharded & when):
            return self.rule.local(self, self.op, *operands)
        return self.bind(*self.masked(operands))

    def masked(self, operands: Sequence[Any]) -> Sequence[Any]:
        """Operands with the padding of uneven reduced factors replaced by the identity."""
        operands = list(operands)
        if not self.rule.masked:
            return operands
        for name, factor in self.rule.factors.items():
            if factor.kind is Kind.REDUCE and self.axes(name) and self.uneven(name):
                for tensor, _ in self.rule.where[name]:
                    if tensor < len(operands):
                        fill = identity(factor.monoid, operands[tensor].dtype)
                        operands[tensor] = self.mask(operands[tensor], tensor, name, fill)
        return operands


def identity(monoid: str, dtype: Any) -> Any:
    """The element that a monoid ignores."""
    if monoid in IDENTITY:
        return IDENTITY[monoid]
    if dtype == jnp.bool_:
        return monoid == "min"
    low = monoid == "max"
    if jnp.issubdtype(dtype, jnp.inexact):
        return -jnp.inf if low else jnp.inf
    info = jnp.iinfo(dtype)
    return info.min if low else info.max
