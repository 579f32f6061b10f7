"""The one package that touches `jax._src`, and the one place for switches between JAX versions.

Here are primitives and what reads jaxprs; `calls` makes primitives of our own, and `jit` has what
`spmd.jit` takes from `jax.jit`.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import jax
from jax._src import (
    ad_checkpoint,
    buffer_callback,
    callback,
    checkify,
    compute_on,
    config,
    core,
    custom_partitioning,
    debugging,
    effects,
    hijax,
    source_info_util,
    traceback_util,
)
from jax._src import pjit as _pjit
from jax._src import random as _random
from jax._src import shard_map as _shard_map
from jax._src.core import Literal as Literal
from jax._src.cudnn import fused_attention_stablehlo, scaled_matmul_stablehlo
from jax._src.interpreters import mlir
from jax._src.interpreters import partial_eval as pe
from jax._src.lax import lax as _lax
from jax._src.lax import linalg as _linalg
from jax._src.lax import parallel as _parallel
from jax._src.lax import slicing as _slicing
from jax._src.lax.fft import FftType as FftType
from jax._src.lax.scaled_dot import scaled_dot_p as scaled_dot_p
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.random import prng as _prng
from jax._src.state import discharge
from jax._src.state.types import AbstractRef
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.extend.core import Primitive as Primitive
from jax.extend.core import primitives as primitives

# Primitives that `jax.extend.core.primitives` does not name.
split_p = _lax.split_p
stack_p = _lax.stack_p
unstack_p = _lax.unstack_p
tile_p = _lax.tile_p
mulhi_p = _lax.mulhi_p
ragged_dot_general_p = _lax.ragged_dot_general_p
cholesky_update_p = _linalg.cholesky_update_p
geqp3_p = _linalg.geqp3_p
geqrf_p = _linalg.geqrf_p
lu_pivots_to_permutation_p = _linalg.lu_pivots_to_permutation_p
ormqr_p = _linalg.ormqr_p
symmetric_product_p = _linalg.symmetric_product_p
empty_p = _lax.empty_p
empty2_p = _lax.empty2_p
optimization_barrier_p = _lax.optimization_barrier_p
scatter_sub_p = _slicing.scatter_sub_p
random_wrap_p = _prng.random_wrap_p
random_unwrap_p = _prng.random_unwrap_p
random_clone_p = _random.random_clone_p
iota_2x32_shape_p = _prng.iota_2x32_shape_p
threefry4x32_p = _random.threefry4x32.threefry4x32_p
philox2x32_p = _random.philox2x32.philox2x32_p
philox4x32_p = _random.philox4x32.philox4x32_p
gamma_one = _random.core._gamma_one  # pyright: ignore[reportAttributeAccessIssue]
sharding_constraint_p = _pjit.sharding_constraint_p
reshard_p = _pjit.reshard_p
pure_callback_p = callback.pure_callback_p
io_callback_p = callback.io_callback_p
buffer_callback_p = buffer_callback.buffer_callback_p
debug_callback_p = debugging.debug_callback_p
debug_print_p = debugging.debug_print_p
inspect_sharding_p = debugging.inspect_sharding_p
check_p = checkify.check_p
custom_partitioning_p = custom_partitioning.custom_partitioning_p
# Collectives by the names that shard_map gives them.
all_gather_invariant_p = _parallel.all_gather_invariant_p
psum_invariant_p = _parallel.psum_invariant_p
reduce_scatter_p = _parallel.reduce_scatter_p
shard_map_p = _shard_map.shard_map_p

# From JAX 0.11 on open and closed jaxprs are one class, and a call holds one instead of a function.
CALLS_HOLD_JAXPRS = not hasattr(core, "CallPrimitive")


# Where primitives live that `jax.extend.core.primitives` does not name.
_HOMES = tuple(
    importlib.import_module(f"jax._src.{name}")
    for name in (
        "core", "lax.lax", "lax.parallel", "lax.control_flow.solves", "lax.eval_jaxpr",
        "lax.control_flow.conditionals", "custom_derivatives", "custom_batching", "compute_on",
        "xla_metadata", "shard_map", "state.discharge", "export._export", "pjit", "program_order",
        "state.primitives", "shard_alike",
    )
    if importlib.util.find_spec(f"jax._src.{name}") is not None
)  # fmt: skip


def available(*names: str) -> tuple[Any, ...]:
    """The primitives of these names; those that this version of JAX does not have are left out."""
    found = []
    for name in names:
        home = next((m for m in (primitives, *_HOMES) if hasattr(m, name)), None)
        if home is not None:
            found.append(getattr(home, name))
    return tuple(found)


# Source lines are those of the user, not of this project or of the libraries around the model.
for _package in ("sharding", "spmd", "flax", "optax"):
    _found = importlib.util.find_spec(_package)
    for _folder in (_found.submodule_search_locations or ()) if _found else ():
        source_info_util.register_exclusion(os.path.join(os.path.abspath(_folder), ""))
        if _package in ("sharding", "spmd"):  # their frames are left out of filtered tracebacks
            traceback_util.register_exclusion(os.path.join(os.path.abspath(_folder), ""))

register_lowering = mlir.register_lowering
lower_fun = mlir.lower_fun
_LOWERED = mlir.lower_fun(lambda: ()).__qualname__


def lowered_as(primitive: Any) -> Callable | None:
    """The function of lists that a primitive is lowered as on every platform (`mlir.lower_fun`),
    or None: its lowering writes operations of its own, or there are several."""
    entry = mlir._lowerings.get(primitive)
    special = any(primitive in found for found in mlir._platform_specific_lowerings.values())
    if entry is None or special or getattr(entry.rule, "__qualname__", "") != _LOWERED:
        return None
    names, cells = entry.rule.__code__.co_freevars, entry.rule.__closure__ or ()
    held = {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
    if held["multiple_results"]:
        return held["fun"]
    return lambda *args, **params: [held["fun"](*args, **params)]


def traced_as(fun: Callable, eqn: Any) -> Any:
    """Closed jaxpr of `fun` for the operands and parameters of an equation."""
    return without_refs(jax.make_jaxpr(partial(fun, **eqn.params))(*[v.aval for v in eqn.invars]))


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


def body(fun: Callable, args: Sequence[Any]) -> Any:
    """Closed jaxpr of a body, traced inside the current trace."""
    return jax.make_jaxpr(lambda *xs: tuple(fun(*xs)))(*args)


def without_constants(closed: Any) -> tuple[Any, Sequence[Any]]:
    """(closed jaxpr that takes its constants as its first arguments, the constants)."""
    return ClosedJaxpr(pe.convert_constvars_jaxpr(closed.jaxpr), ()), closed.consts


def identity() -> Any:
    """Closed jaxpr of one argument, of any type where it is inlined."""
    return jax.make_jaxpr(lambda x: x)(0)


def closed(jaxpr: Any) -> Any:
    """A closed jaxpr from an open or a closed one."""
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


# What searchsorted, frexp and others are before they are lowered; more of them in later versions.
high_level_p = hijax.call_hi_primitive_p


def expansion(params: Any) -> Any:
    """Closed jaxpr of what a high-level primitive stands for."""
    prim = params["_prim"]
    return jax.make_jaxpr(lambda *xs: high_level_p.to_lojax(*xs, _prim=prim))(*prim.in_avals_flat)


def ordered_body(primitive: Any, params: Any) -> Any:
    """Closed jaxpr of a call whose equations are to run in the order of the program: with barriers
    between them where that is enforced."""
    body = params["call_jaxpr"]
    if not params.get("enforce"):
        return closed(body)
    return jax.make_jaxpr(lambda *xs: primitive.to_lojax(*xs, **params))(*body.in_avals)


def scan_counts(params: Any) -> tuple[int, int]:
    """(number of constants, number of carries) of a scan's parameters."""
    if "ft_in" in params:  # from JAX 0.11 on, trees of (constants, carries, inputs)
        consts, carries, _ = params["ft_in"].unpack()
        return len(consts), len(carries)
    return params["num_consts"], params["num_carry"]


def cudnn(name: str) -> tuple[Any, ...]:
    """The primitive of that name in JAX's cuDNN modules, as a tuple; empty where there is none."""
    homes = (fused_attention_stablehlo, scaled_matmul_stablehlo)
    return tuple(getattr(home, name) for home in homes if hasattr(home, name))


def called_sharding_rule(given: Callable, op: Any) -> Any:
    """The sharding rule that a callable of `custom_partitioning` gives for an equation."""
    with mlir.make_ir_context(), ir.Location.unknown():
        types = [
            [ir.RankedTensorType.get(a.shape, mlir.dtype_to_ir_type(a.dtype)) for a in avals]
            for avals in (op.in_avals, op.out_avals)
        ]
        found = given(*op.params["static_args"], jax.sharding.get_abstract_mesh(), *types)
    text, options = found if isinstance(found, (list, tuple)) else (found, {})
    if isinstance(text, str):
        parse = custom_partitioning.str_to_sdy_sharding_rule  # pyright: ignore
        return parse(text, **options)
    return text


class _OrderedPrint(debugging.OrderedDebugEffect):
    """The effect of callbacks that happen in order, on one device of several.

    JAX allows its own ordered effect only in programs for one device.
    """


effects.shardable_ordered_effects.add_type(_OrderedPrint)
_ordered_print = _OrderedPrint()


def is_ordered(params: Any) -> bool:
    """Whether a debug callback or print has `ordered=True`."""
    if "effect" in params:
        return effects.ordered_effects.contains(params["effect"])
    return params["ordered"]


def ordered_callback(prim: Any, params: Any, *operands: Any) -> Sequence[Any]:
    """An ordered debug callback or print, legal in a program for several devices."""
    run = params["callback"] if prim is debug_callback_p else partial(prim.impl, **params)
    return debug_callback_p.bind(
        *operands, callback=run, effect=_ordered_print, partitioned=params["partitioned"]
    )


def key_impl(dtype: Any) -> Any:
    """The random implementation behind an extended key dtype, or None."""
    return getattr(dtype, "_impl", None)


def without_refs(closed: Any) -> Any:
    """The same program with the mutable arrays that it makes inside as plain values."""
    if not any(isinstance(e, core.InternalMutableArrayEffect) for e in closed.effects):
        return closed
    return dead_code_free(discharge.discharge_state(closed, lower=False))


def run_state_body(params: Any) -> Any:
    """Closed jaxpr of a `run_state`: the mutable arrays it works on as plain values."""
    pairs = zip(params["jaxpr"].invars, params["is_initialized"], strict=True)
    avals = [v.aval.inner_aval for v, given in pairs if given]
    return jax.make_jaxpr(lambda *xs: discharge.run_state_p.impl(*xs, **params))(*avals)


def outer_refs(closed: Any) -> tuple[list[int], bool]:
    """Mutable arrays that a program changes outside of itself: which of its arguments are some,
    and whether it closes over others."""
    arguments = [i for i, v in enumerate(closed.jaxpr.invars) if isinstance(v.aval, AbstractRef)]
    return arguments, any(isinstance(v.aval, AbstractRef) for v in closed.jaxpr.constvars)


def effects_of(jaxpr: Any) -> Any:
    return jaxpr.effects


def source_of(eqn: Any) -> str:
    """`file.py:line (function)` of the user's code behind an equation, or '' where unknown."""
    frame = source_info_util.user_frame(eqn.source_info.traceback)
    if frame is None:
        return ""
    name = frame.file_name.rsplit("/", 2)
    return f"{'/'.join(name[-2:])}:{frame.start_line} ({frame.function_name})"


def name_stack_of(eqn: Any) -> str:
    """The names that modules, `jax.named_scope` and transformations put around an equation."""
    return str(eqn.source_info.name_stack)


def at_source(eqn: Any, site: Any = None) -> AbstractContextManager:
    """Equations traced inside carry the name stack of `eqn`, and the source line of `site`, which
    is `eqn` itself unless that is on no line of the user."""
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    traceback = (eqn if site is None else site).source_info.traceback
    return source_info_util.user_context(traceback, name_stack=stack)


@contextmanager
def tracing_context(eqn: Any) -> Iterator[None]:
    """For tracing what stands for `eqn`: its source line, and the manual axes that are known there
    by name."""
    mesh = eqn.ctx.cur_abstract_mesh
    manual = [(name, mesh.shape[name]) for name in mesh.manual_axes]
    varies = any(getattr(v.aval, "mat", _NO_MAT).varying for v in (*eqn.invars, *eqn.outvars))
    with (
        at_source(eqn),
        core.extend_axis_env_nd(manual),
        jax.sharding.use_abstract_mesh(mesh) if manual else nullcontext(),
        config._check_vma(varies),
    ):
        yield


_NO_MAT = core.ManualAxisType()


def equation_context(eqn: Any) -> AbstractContextManager:
    """The configuration that `eqn` was traced under (compute type, threefry, XLA metadata).

    The abstract mesh of the context is left out: shapes are local now, under another mesh.
    """
    if eqn.ctx.compute_type is None and not eqn.ctx.xla_metadata:
        return jax.threefry_partitionable(eqn.ctx.threefry_partitionable)
    return _annotated_context(eqn.ctx)


@contextmanager
def _annotated_context(ctx: Any) -> Iterator[None]:
    with (
        jax.threefry_partitionable(ctx.threefry_partitionable),
        compute_on.extend_compute_type(ctx.compute_type),
        set_xla_metadata(**(ctx.xla_metadata or {})),
    ):
        yield


remat_p = ad_checkpoint.remat_p


def subjaxprs(eqn: Any) -> Sequence[Any]:
    """The open jaxprs in an equation's parameters."""
    return [getattr(j, "jaxpr", j) for j in core.jaxprs_in_params(eqn.params)]
