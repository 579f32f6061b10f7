"""Primitives of our own: calls and identities that transformations treat as the global program."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.extend.core as extend_core
from jax._src import checkify, core
from jax._src.interpreters import ad, batching, mlir
from jax._src.interpreters import partial_eval as pe
from jax.extend import linear_util as lu
from jax.extend.core import Primitive, jaxpr_as_fun

from sharding._jax import CALLS_HOLD_JAXPRS, closed


def call_primitive(name: str, lowering: Callable, place: Callable) -> Any:
    """A call primitive whose differentiation and batching act on the global program: every
    transformation (grad, vmap, remat, scan) maps onto its jaxpr.

    Args:
      name: the primitive's name.
      lowering: (call_jaxpr, params) -> traceable function of the flat operands.
      place: (params, x) -> x on the devices that the call runs on.
    """
    call_p = (_jaxpr_call if CALLS_HOLD_JAXPRS else _function_call)(name, place)

    def lower(ctx: Any, *operands: Any, call_jaxpr: Any, **params: Any) -> Any:
        fun = lowering(closed(call_jaxpr), params)
        return mlir.lower_fun(fun, multiple_results=True)(ctx, *operands)

    mlir.register_lowering(call_p, lower)
    return call_p


def _jaxpr_call(name: str, place: Callable) -> Any:
    call_p = getattr(extend_core, "create_call_primitive")(name)  # noqa: B009
    call_p.def_impl(
        lambda *args, **params: _eagerly(
            lambda *xs: call_p.bind(*xs, **params), args, partial(place, params)
        )
    )
    checkify.error_checks[call_p] = partial(_checked_call, call_p)
    return call_p


def _checked_call(
    call_p: Any, context: Any, error: Any, enabled: Any, *args: Any, call_jaxpr: Any, **params: Any
) -> Any:
    """The call under `checkify`: of the program whose checks are values."""
    errors, tree = jax.tree.flatten(error)
    avals = tuple(map(core.typeof, (*errors, *args)))
    checked, out_tree, _ = checkify.jaxpr_to_checkify_jaxpr(
        context, call_jaxpr, enabled, tree, *avals
    )
    results = call_p.bind(*errors, *args, call_jaxpr=checked, **params)
    return jax.tree.unflatten(out_tree, results)


def _function_call(name: str, place: Callable) -> Any:
    call_p = core.CallPrimitive(name)

    def run(fun: Any, *args: Any, **params: Any) -> Sequence[Any]:
        bind = lambda *xs: call_p.bind(*xs, subfuns=(fun,), **params)  # noqa: E731
        return _eagerly(bind, args, partial(place, params))

    call_p.def_impl(run)
    ad.primitive_transposes[call_p] = lambda *args, **kw: ad.call_transpose(call_p, *args, **kw)
    pe.partial_eval_jaxpr_custom_rules[call_p] = lambda *args: pe.call_partial_eval_custom_rule(
        "call_jaxpr", lambda *a: a[-2:], *args
    )
    pe.dce_rules[call_p] = pe.dce_jaxpr_call_rule
    return call_p


def _eagerly(run: Callable, args: Sequence[Any], place: Callable) -> Sequence[Any]:
    # Outside of jit (an eager backward pass, say) the call is compiled like any other program.
    return jax.jit(lambda *xs: [place(y) for y in run(*map(place, xs))])(*args)


def bind_call(call_p: Any, closed: Any, args: Sequence[Any], **params: Any) -> Sequence[Any]:
    if CALLS_HOLD_JAXPRS:
        return call_p.bind(*args, call_jaxpr=closed, **params)
    fun = lu.wrap_init(jaxpr_as_fun(closed), debug_info=closed.jaxpr.debug_info)
    return call_p.bind(*args, subfuns=(fun,), **params)


def identity_primitive(name: str, lowering: Callable, transposed: Callable) -> Any:
    """A one-operand identity that is linear.

    Args:
      lowering: traceable function (x, **params) -> x.
      transposed: parameters -> the parameters of the cotangent's identity.
    """
    prim = Primitive(name)
    prim.def_impl(lambda x, **params: x)
    prim.def_abstract_eval(lambda x, **params: x)
    ad.deflinear2(prim, lambda ct, x, **params: [prim.bind(ct, **transposed(params))])
    mlir.register_lowering(prim, mlir.lower_fun(lowering, multiple_results=False))
    return prim


def register_batcher(prim: Any, insert: Callable[[dict, int, Any], dict]) -> None:
    """`insert(params, dim, spmd_axis_name)` gives the parameters after a new dim at `dim`."""

    def batch(axis_data: Any, args: Any, dims: Any, **params: Any) -> Any:
        (x,), (d,) = args, dims
        if d is None:
            return prim.bind(x, **params), d
        return prim.bind(x, **insert(params, d, axis_data.spmd_name)), d

    batching.fancy_primitive_batchers[prim] = batch
