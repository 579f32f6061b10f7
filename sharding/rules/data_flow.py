"""Data flow: what comes out is what went in."""

from sharding import _jax
from sharding.rule import Dims, Factor, OpInfo, Rule, register

p = _jax.primitives


@register(_jax.optimization_barrier_p)
def _optimization_barrier(op: OpInfo) -> Rule:
    """Result i is operand i, in any layout, partial ones too."""
    factors: dict[str, Factor] = {}
    tensors: list[Dims] = []
    for i, aval in enumerate(op.in_avals):
        tensors.append(tuple((f"t{i}d{d}",) if n != 1 else () for d, n in enumerate(aval.shape)))
        factors |= {f"t{i}d{d}": Factor(n) for d, n in enumerate(aval.shape) if n != 1}
    return Rule(tuple(tensors), tuple(tensors), factors, early=True, elementary=True)
