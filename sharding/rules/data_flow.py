"""Data flow: what comes out is what went in."""

from sharding import _jax
from sharding.rule import Dims, Factor, OpInfo, Rule, register

p = _jax.primitives


@register(_jax.optimization_barrier_p)
def _optimization_barrier(op: OpInfo) -> Rule:
    """Result i is operand i; partial values pass when all of them are partial."""
    return _same(op, identity=False)


@register(p.device_put_p)
def _device_put(op: OpInfo) -> Rule:
    """Devices are the partitioner's choice, so that nothing is left to do; a transfer to another
    kind of memory happens shard by shard."""
    kinds = [d for d in op.params["devices"] if _is_memory(d)]
    return _same(op, identity=not kinds)


def _is_memory(target: object) -> bool:
    return target is not None and type(target).__name__ in ("Space", "TransferToMemoryKind")


def _same(op: OpInfo, identity: bool) -> Rule:
    factors: dict[str, Factor] = {}
    tensors: list[Dims] = []
    for i, aval in enumerate(op.in_avals):
        tensors.append(tuple((f"t{i}d{d}",) if n != 1 else () for d, n in enumerate(aval.shape)))
        factors |= {f"t{i}d{d}": Factor(n) for d, n in enumerate(aval.shape) if n != 1}
    every = tuple(range(len(tensors)))
    return Rule(
        tuple(tensors), tuple(tensors), factors, linear=(every,), early=True, identity=identity
    )
