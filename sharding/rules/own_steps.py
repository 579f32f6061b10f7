"""Loops whose steps need nothing of one another, over a sharded dim: each device runs its own.

`jax.lax.map` over examples, chunks of queries, or chains, and the way back of it, which only adds
up what the steps have of gradients. As one loop on every device it would run over all of the dim,
gathered.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from sharding import _jax

p = _jax.primitives


def scan_in_parts(op: Any) -> Callable[..., Callable] | None:
    """See `Control.in_parts`."""
    body = op.params["jaxpr"].jaxpr
    consts, carry = _jax.scan_counts(op.params)
    if body.effects or not op.params["length"]:
        return None
    ins, outs = body.invars[consts : consts + carry], body.outvars[:carry]
    if not all(jnp.issubdtype(v.aval.dtype, jnp.number) for v in ins):
        return None
    readers: dict[int, list[Any]] = {}  # by `id` of a variable; None stands for a result
    for eqn in body.eqns if carry else ():
        for v in eqn.invars:
            readers.setdefault(id(v), []).append(eqn)
    for v in body.outvars:
        readers.setdefault(id(v), []).append(None)
    added = all(_only_added(readers, a, b) for a, b in zip(ins, outs, strict=True))
    return _in_parts if added else None


def _only_added(readers: Mapping[int, Sequence[Any]], carry: Any, result: Any) -> bool:
    """Whether the body only adds to a carry: nothing else reads it, before or after. What makes a
    type weak or strong changes no number."""
    value = carry
    while len(found := readers.get(id(value), ())) == 1:
        (eqn,) = found
        if eqn is None:
            return value is result
        if eqn.primitive not in (p.add_p, p.add_jaxvals_p) and not _same(eqn):
            return False
        (value,) = eqn.outvars
    return False


def _same(eqn: Any) -> bool:
    dtypes = [v.aval.dtype for v in (*eqn.invars, *eqn.outvars)]
    return eqn.primitive is p.convert_element_type_p and len({*dtypes}) == 1


def _in_parts(mesh: Any, axes: Sequence[str]) -> Callable[..., Sequence[Any]]:
    def run(*operands: Any, **params: Any) -> Sequence[Any]:
        consts, carry = _jax.scan_counts(params)
        whole, stacked = operands[: consts + carry], operands[consts + carry :]
        first = whole[consts:]
        length = params["length"] // prod(mesh.shape[axis] for axis in axes)

        def steps(*local: Any) -> Any:
            start = [lax.full(x.shape, 0, x.dtype) for x in first]
            made = p.scan_p.bind(*local[:consts], *start, *local[consts:],
                                 **{**params, "length": length})  # fmt: skip
            return (*(lax.expand_dims(x, (0,)) for x in made[:carry]), *made[carry:])

        own, every = PartitionSpec(tuple(axes)), PartitionSpec()
        results = len(params["jaxpr"].out_avals)
        mapped = jax.shard_map(
            steps, mesh=mesh,
            in_specs=(every,) * consts + (own,) * len(stacked),
            out_specs=(own,) * results,
            axis_names={*axes}, check_vma=False,
        )  # fmt: skip
        made = mapped(*whole[:consts], *stacked)
        # Of every device what its steps add; where that is summed, the partitioner decides.
        sums = [lax.reduce(x, lax.full((), 0, x.dtype), lax.add, (0,)) for x in made[:carry]]
        return [*map(lax.add, first, sums), *made[carry:]]

    return run
