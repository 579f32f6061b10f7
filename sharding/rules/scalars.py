"""Functions of scalars that equations hold as jaxprs: the computation of a reduction."""

from collections.abc import Callable, Sequence
from typing import Any

from sharding import _jax
from sharding.rule import REGISTRY


def scalar_function(closed: Any) -> Callable[..., list[Any]]:
    """A traceable function of flat arguments from a closed jaxpr.

    It may run inside of `shard_map`, where the meshes that its equations were traced under, and
    those of nested calls, would be rejected.
    """
    return lambda *args: _evaluate(closed.jaxpr, closed.consts, args)


def _evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, _jax.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        operands = [read(v) for v in eqn.invars]
        inline = REGISTRY.inlined.get(eqn.primitive)
        if inline is not None:
            body = inline.expand(eqn)
            taken = [operands[i] for i in inline.operands(eqn.params, len(operands))]
            results = _evaluate(body.jaxpr, body.consts, taken)
        else:
            with _jax.equation_context(eqn):
                params = eqn.primitive.get_bind_params(eqn.params)
                found = eqn.primitive.bind(*operands, **params)
            results = found if eqn.primitive.multiple_results else [found]
        env |= zip(eqn.outvars, results, strict=True)
    return [read(v) for v in jaxpr.outvars]
