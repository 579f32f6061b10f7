"""`LocalView`: what a rule's `local` function may ask while it runs inside `shard_map`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from sharding.mesh import MeshShape, axes_size, axis_size
from sharding.monoid import identity
from sharding.parts import plus, times, where
from sharding.program import Op
from sharding.rule import Kind
from spmd.partition.apply import all_gather, linear_index, on_first_device, reduce_over
from spmd.partition.halo import fetch
from spmd.partition.plan import PART, Compute
from spmd.partition.verify import check_gather

# Parameters that hold shardings on the global mesh: meaningless at local shapes.
_SHARDING_PARAMS = ("sharding", "out_sharding")
# Parameters that name manual axes.
_AXIS_PARAMS = ("axes", "axis_name")


class LocalView:
    """Implements `sharding.local.Local` for one instruction.

    Args:
      part: this one's place along `PART`, an axis that parts of an array lie along, not devices.
    """

    def __init__(self, instruction: Compute, mesh: MeshShape, part: int = 0):
        self.instruction, self.part = instruction, part
        self.op: Op = instruction.op
        self.rule = instruction.op.rule
        self.mesh = mesh
        self.assigned: Mapping[str, tuple[str, ...]] = instruction.assignment.axes
        self.results = instruction.results
        self.unread = instruction.unread

    def axes(self, factor: str) -> tuple[str, ...]:
        return self.assigned.get(factor, ())

    def shards(self, factor: str) -> int:
        return axes_size(self.mesh, self.axes(factor))

    def local_size(self, factor: str) -> int:
        return -(-self.rule.factors[factor].size // self.shards(factor))

    def offset(self, factor: str) -> Any:
        return times(self.index(self.axes(factor)), self.local_size(factor))

    def local_out(self, result: int) -> tuple[int, ...]:
        value, layout, _ = self.results[result]
        return layout.local_shape(value.shape, self.mesh)

    def named(self, axes: Any) -> Any:
        """Axis names of the user's mesh as those of the mesh at hand, where they may be split."""
        if isinstance(axes, (tuple, list)):
            return tuple(ref for a in axes for ref in (self.mesh.manual_refs(a) or (a,)))
        refs = self.mesh.manual_refs(axes)
        return axes if refs in ((), (axes,)) else refs

    def is_read(self, result: int) -> bool:
        return not self.unread or not self.unread[result]

    def index(self, axes: tuple[str, ...]) -> Any:
        if PART not in axes:
            return linear_index(axes, self.mesh)
        at = axes.index(PART)  # inside of the axes of its factor, others may follow
        before, after = axes[:at], axes[at + 1 :]
        place = times(linear_index(before, self.mesh), axis_size(self.mesh, PART))
        place = times(plus(place, self.part), axes_size(self.mesh, after))
        return lax.add(place, linear_index(after, self.mesh)) if after else place

    def uneven(self, factor: str) -> bool:
        return self.rule.factors[factor].size % self.shards(factor) != 0

    def mask(self, x: Any, operand: int, factor: str, fill: Any) -> Any:
        """`x` with the padding of `factor` replaced by `fill`; `x` itself where it is even."""
        if not self.uneven(factor):
            return x
        dim = next(d for t, d in self.rule.where[factor] if t == operand)
        at = lax.broadcasted_iota(jnp.int32, x.shape, dim) + self.offset(factor)
        return where(at < np.int32(self.rule.factors[factor].size), x, fill)

    def all_gather(self, x: Any, axes: tuple[str, ...], dim: int) -> Any:
        check_gather(self.instruction, x, axes, dim, self.mesh)
        if not axes:
            return x
        if not x.size:
            return jnp.concatenate([x] * axes_size(self.mesh, axes), dim)
        return all_gather(x, axes, dim)

    def all_reduce(self, x: Any, axes: tuple[str, ...], monoid: str = "add") -> Any:
        return reduce_over(x, axes, monoid) if axes and x.size else x

    def fetch(
        self, x: Any, dim: int, axes: tuple[str, ...], size: int, starts: Sequence[int],
        width: int, fill: Any = 0, wrap: bool = False,
    ) -> Any:  # fmt: skip
        return fetch(x, dim, axes, size, starts, width, fill, self.index(axes), self.mesh, wrap)

    def on_first_device(self, fun: Callable[..., Sequence[Any]], *operands: Any) -> Sequence[Any]:
        return on_first_device(fun, operands, self.mesh)

    def bind(self, *operands: Any, **changed: Any) -> Sequence[Any]:
        params = {**self.op.params, **changed}
        for name in _SHARDING_PARAMS:
            if name in params:
                params[name] = None
        if self.mesh.manual:
            for name in _AXIS_PARAMS:
                if name in params:
                    params[name] = self.named(params[name])
        for name, result in self.rule.resize:
            if name not in changed:
                params[name] = self.local_out(result)
        out = self.op.primitive.bind(*operands, **self.op.primitive.get_bind_params(params))
        return out if self.op.primitive.multiple_results else [out]

    def run(self, operands: Sequence[Any]) -> Sequence[Any]:
        """The equation at local shapes: by its `local` function, or bound with padding masked."""
        if self.rule.identity:
            return [x if hasattr(x, "shape") else jnp.asarray(x) for x in operands]
        when = self.rule.local_when
        sharded = {name for name, axes in self.assigned.items() if axes}
        special = self.rule.always or (sharded if when is None else sharded & when)
        if self.rule.local is not None and special:
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
