"""The one file that touches `jax._src`, and the one place for switches between JAX versions."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import jax.extend.core as extend_core
from jax._src import ad_checkpoint, api_util, config, core, hijax, source_info_util
from jax._src import pjit as _pjit
from jax._src import random as _random
from jax._src.array import ArrayImpl
from jax._src.core import Literal as Literal
from jax._src.interpreters import ad, batching, mlir
from jax._src.interpreters import partial_eval as pe
from jax._src.lax import lax as _lax
from jax._src.lax import parallel as _parallel
from jax._src.lax import slicing as _slicing
from jax._src.random import prng as _prng
from jax.extend import linear_util as lu
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.extend.core import primitives as primitives

# Primitives that `jax.extend.core.primitives` does not name.
split_p = _lax.split_p
stack_p = _lax.stack_p
unstack_p = _lax.unstack_p
tile_p = _lax.tile_p
mulhi_p = _lax.mulhi_p
empty_p = _lax.empty_p
empty2_p = _lax.empty2_p
optimization_barrier_p = _lax.optimization_barrier_p
scatter_sub_p = _slicing.scatter_sub_p
random_wrap_p = _prng.random_wrap_p
random_unwrap_p = _prng.random_unwrap_p
random_clone_p = _random.random_clone_p
sharding_constraint_p = _pjit.sharding_constraint_p
reshard_p = _pjit.reshard_p
# Collectives by the names that shard_map gives them.
all_gather_invariant_p = _parallel.all_gather_invariant_p
psum_invariant_p = _parallel.psum_invariant_p
reduce_scatter_p = _parallel.reduce_scatter_p

# From JAX 0.11 on open and closed jaxprs are one class, and a call holds one instead of a function.
_CALLS_HOLD_JAXPRS = not hasattr(core, "CallPrimitive")


def available(*names: str) -> tuple[Any, ...]:
    """The primitives of these names; those that this version of JAX does not have are left out."""
    return tuple(getattr(primitives, name) for name in names if hasattr(primitives, name))


# Source lines are those of the user, not of this project or of the libraries around the model.
for _package in ("sharding", "spmd", "flax", "optax"):
    _found = importlib.util.find_spec(_package)
    for _folder in (_found.submodule_search_locations or ()) if _found else ():
        source_info_util.register_exclusion(os.path.join(os.path.abspath(_folder), ""))

register_lowering = mlir.register_lowering
lower_fun = mlir.lower_fun


def trace(fun: Callable, *avals: Any) -> Any:
    """Closed jaxpr of a function of flat arguments, without dead equations; inputs are kept."""
    closed = jax.make_jaxpr(fun)(*avals)
    return dead_code_free(closed)


def dead_code_free(closed: Any) -> Any:
    jaxpr, _ = pe.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    return ClosedJaxpr(jaxpr, closed.consts)


def as_fun(closed: Any) -> Callable:
    """A traceable function of flat arguments from a closed jaxpr."""
    return jaxpr_as_fun(closed)


def body_jaxpr(fun: Callable, args: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    """(open jaxpr, constants to pass before `args`) of `fun`, traced inside the current trace."""
    body, consts = without_constants(jax.make_jaxpr(fun)(*args))
    return body.jaxpr, consts


def without_constants(closed: Any) -> tuple[Any, Sequence[Any]]:
    """(closed jaxpr that takes its constants as its first arguments, the constants)."""
    return ClosedJaxpr(pe.convert_constvars_jaxpr(closed.jaxpr), ()), closed.consts


def closed(jaxpr: Any) -> Any:
    """A closed jaxpr from an open or a closed one."""
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


# What searchsorted, frexp and others are before they are lowered; more of them in later versions.
high_level_p = hijax.call_hi_primitive_p


def expansion(params: Any) -> Any:
    """Closed jaxpr of what a high-level primitive stands for."""
    prim = params["_prim"]
    return jax.make_jaxpr(lambda *xs: high_level_p.to_lojax(*xs, _prim=prim))(*prim.in_avals_flat)


def scan_counts(params: Any) -> tuple[int, int]:
    """(number of constants, number of carries) of a scan's parameters."""
    if "ft_in" in params:  # from JAX 0.11 on, trees of (constants, carries, inputs)
        consts, carries, _ = params["ft_in"].unpack()
        return len(consts), len(carries)
    return params["num_consts"], params["num_carry"]


def key_impl(dtype: Any) -> Any:
    """The random implementation behind an extended key dtype, or None."""
    return getattr(dtype, "_impl", None)


def effects_of(jaxpr: Any) -> Any:
    return jaxpr.effects


def source_of(eqn: Any) -> str:
    """`file.py:line (function)` of the user's code behind an equation, or '' where unknown."""
    frame = source_info_util.user_frame(eqn.source_info.traceback)
    if frame is None:
        return ""
    name = frame.file_name.rsplit("/", 2)
    return f"{'/'.join(name[-2:])}:{frame.start_line} ({frame.function_name})"


def at_source(eqn: Any) -> AbstractContextManager:
    """Equations traced inside carry the source line, name stack and context of `eqn`."""
    info = eqn.source_info
    stack = source_info_util.current_name_stack() + info.name_stack
    return source_info_util.user_context(info.traceback, name_stack=stack)


def equation_context(eqn: Any) -> AbstractContextManager:
    """The configuration that `eqn` was traced under (compute type, threefry, XLA metadata).

    The abstract mesh of the context is left out: shapes are local now, under another mesh.
    """
    return jax.threefry_partitionable(eqn.ctx.threefry_partitionable)


def checkpoint_params(params: Any) -> dict[str, Any]:
    """Parameters of remat that must survive a rebuild, or XLA undoes the rematerialisation."""
    return {k: params[k] for k in ("differentiated", "prevent_cse", "policy")}


remat_p = ad_checkpoint.remat_p


_PYTHON_SCALARS = (int, float, complex)


def weak_types(args: Any) -> list[bool]:
    """Per leaf, whether its dtype gives way to others: Python scalars and what is made of them."""
    # On the path of every warm call: a list of the cheapest test that fits the leaf.
    return [
        x.aval.weak_type
        if type(x) is ArrayImpl
        else type(x) in _PYTHON_SCALARS or getattr(x, "weak_type", False)
        for x in jax.tree.leaves(args)
    ]


trace_context = config.trace_context


def call_primitive(name: str, lowering: Callable, place: Callable) -> Any:
    """A call primitive whose differentiation and batching act on the global program: every
    transformation (grad, vmap, remat, scan) maps onto its jaxpr.

    Args:
      name: the primitive's name.
      lowering: (call_jaxpr, params) -> traceable function of the flat operands.
      place: (params, x) -> x on the devices that the call runs on.
    """
    call_p = (_jaxpr_call if _CALLS_HOLD_JAXPRS else _function_call)(name, place)

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
    return call_p


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
    if _CALLS_HOLD_JAXPRS:
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


def subjaxprs(eqn: Any) -> Sequence[Any]:
    """The open jaxprs in an equation's parameters."""
    return [getattr(j, "jaxpr", j) for j in core.jaxprs_in_params(eqn.params)]


def outside_of_tracing() -> bool:
    """No transformation (jit, grad, vmap ...) is in progress."""
    return core.trace_state_clean()


def infer_argnums(fun: Callable, argnums: Any, argnames: Any) -> tuple[tuple, tuple]:
    """argnums and argnames completed from each other by the function's signature."""
    signature = api_util.fun_signature(fun)
    if signature is None:  # a builtin: positions and names stay what they are
        return _as_tuple(argnums), _as_tuple(argnames)
    return api_util.infer_argnums_and_argnames(signature, argnums, argnames)


def _as_tuple(x: Any) -> tuple:
    if x is None:
        return ()
    return (x,) if isinstance(x, (int, str)) else tuple(x)


def committed_sharding(x: Any) -> Any:
    """The sharding of an array that was placed on purpose, or of a ShapeDtypeStruct; else None."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.sharding
    if isinstance(x, core.Tracer) or not isinstance(x, jax.Array):
        return None
    return x.sharding if x.committed else None


def abstractify(x: Any) -> Any:
    """Shape, dtype and weak type of an argument; never its value or its sharding."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return core.ShapedArray(x.shape, x.dtype, weak_type=x.weak_type)
    aval = core.typeof(x)
    if isinstance(aval, core.ShapedArray):
        return core.ShapedArray(aval.shape, aval.dtype, weak_type=aval.weak_type)
    return aval
