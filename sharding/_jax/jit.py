"""What `spmd.jit` takes from the private parts of `jax.jit`: types of arguments, the dispatch of
calls, and stages."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src import api_util, config, core, dispatch, traceback_util, tree_util, util
from jax._src import mesh as _mesh
from jax._src import pjit as _pjit
from jax._src import profiler as _profiler
from jax._src.array import ArrayImpl
from jax._src.interpreters import pxla as _pxla
from jax._src.lax import lax as _lax
from jax._src.lib import _jax as _jaxlib  # pyright: ignore[reportPrivateImportUsage]

from sharding._jax import dead_code_free, without_constants


def outside_of_tracing() -> bool:
    """No transformation (jit, grad, vmap ...) is in progress."""
    return core.trace_state_clean()


def resolve_argnums(
    fun: Callable, donate_argnums: Any, donate_argnames: Any, static_argnums: Any,
    static_argnames: Any,
) -> tuple[tuple, tuple, tuple, tuple]:  # fmt: skip
    """The four, completed from each other by the function's signature and checked against it."""
    return api_util.resolve_argnums(
        fun, api_util.fun_signature(fun), donate_argnums, donate_argnames, static_argnums,
        static_argnames,
    )  # fmt: skip


api_boundary = traceback_util.api_boundary
donation_vector = api_util.donation_vector
weakref_lru_cache = util.weakref_lru_cache
_DISPATCHED = _jaxlib.PjitFunctionCache(capacity=8192)


def dispatcher(
    fun: Callable, miss: Callable, static_argnums: Sequence[int], static_argnames: Sequence[str],
    key: Any,
) -> Any:  # fmt: skip
    """The C++ dispatch of `jax.jit` with another `miss`, which returns what `fast_call` takes.

    Args:
      fun: what users wrote; functions that share it and `key` share their executables.
      miss: (args, kwargs) -> (results, data of the fast path or None, False).
    """
    call = _jaxlib.pjit(
        util.fun_name(fun), fun, miss, static_argnums, static_argnames, key,
        tree_util.dispatch_registry, _pxla.cc_shard_arg, _DISPATCHED,
    )  # fmt: skip
    call._fun = fun  # which debug_nans runs again, operation by operation
    return call


def fast_call(
    compiled: Any, out_tree: Any, args: Sequence[Any], results: Sequence[Any], effects: Any
) -> Any:
    """What the C++ dispatch needs to run a `jax.stages.Compiled` on its own; None where it may not
    (effects, extended results)."""
    consts = compiled._params.const_args
    executable = compiled._executable
    return _pjit._get_fastpath_data(
        executable, out_tree, args, results, effects, (), None, executable.shard_const_args(consts)
    )


def profiler() -> Any:
    """Collects what XLA can recompile a program by (`jax_enable_pgle`); None where that is off."""
    runs, percentile = config.pgle_profiling_runs.value, config.pgle_aggregation_percentile.value
    return _profiler.PGLEProfiler(runs, percentile) if config.enable_pgle.value and runs else None


def profiled(profiler: Any, run: Callable[[], Any]) -> Any:
    """What `run` returns; it is watched to its end."""
    with _profiler.PGLEProfiler.trace(profiler):
        return jax.block_until_ready(run())


def asks_for_devices(primitive: Any) -> bool:
    """Whether lowering a primitive needs to know the devices, as that of cuDNN's kernels does."""
    return primitive in dispatch.prim_requires_devices_during_lowering


def restructured(compiled: Any, consts: Sequence[Any], args_info: Any, out_tree: Any) -> Any:
    """A flat executable as one of structured arguments, its first arguments bound to `consts`."""
    bound = [*compiled._params.const_args, *consts]
    return jax.stages.Compiled(compiled._executable, bound, args_info, out_tree)


def traced_program(traced: Any) -> tuple[Any, list[Any]]:
    """(closed jaxpr of a `jax.stages.Traced` that takes what the function closes over as its first
    arguments, those values); without dead equations."""
    closed = dead_code_free(traced.jaxpr)
    return without_constants(closed)[0], [*closed.consts, *traced._consts]


def name_arguments(traced: Any, names: Sequence[str], results: Sequence[str]) -> None:
    """Gives the arguments and results of a `jax.stages.Traced` the names that XLA knows them by."""
    jaxpr = getattr(traced.jaxpr, "jaxpr", traced.jaxpr)
    info = jaxpr.debug_info._replace(arg_names=tuple(names), result_paths=tuple(results))
    jaxpr._debug_info = info


def setting(name: str) -> Any:
    """The value of a configuration option in this context, by its name without `jax_`."""
    return getattr(config, name).value


def is_tracer(x: Any) -> bool:
    return isinstance(x, core.Tracer)


def is_ref(x: Any) -> bool:
    """Whether a value is a mutable array."""
    return isinstance(x, core.Ref)


def check_no_tracers(values: Sequence[Any]) -> None:
    """Raises UnexpectedTracerError when one of the values belongs to a transformation."""
    core.check_eval_args(values)


def looks_for_nans() -> bool:
    """Whether programs are run again, operation by operation, when a result has a NaN or an
    infinity: their arguments are needed then."""
    found = config.debug_nans.value or config.debug_infs.value
    return found and not config.disable_jit.value


def recheck_nans(error: Any, fun: Callable, args: Sequence[Any], kwargs: Any) -> None:
    """Runs `fun` operation by operation, to name the one that made a NaN or an infinity."""
    api_util.maybe_recursive_nan_check(error, fun, args, kwargs)


FloatingPointProblem = api_util.InternalFloatingPointError


def meshes_in_context() -> tuple[Any, ...]:
    """What `jax.set_mesh`, the deprecated `with mesh:` and `use_abstract_mesh` have set."""
    legacy = _mesh.thread_resources.env.physical_mesh
    found = (_mesh.get_concrete_mesh(), legacy, _mesh.get_abstract_mesh())
    return tuple(mesh for mesh in found if mesh is not None and not mesh.empty)


def device_order(sharding: Any) -> tuple[Any, ...]:
    return tuple(sharding._internal_device_list)


def committed_sharding(x: Any) -> Any:
    """The sharding of an array that was placed on purpose, or of a ShapeDtypeStruct; else None."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.sharding
    if isinstance(x, core.Tracer) or not isinstance(x, jax.Array):
        return None
    return x.sharding if x.committed else None


def weakly_typed(x: Any, weak: bool) -> Any:
    """`x` with a dtype that gives way to others, as results of Python scalars have."""
    return _lax._convert_element_type(x, x.dtype, weak_type=True) if weak else x


def explicit_mesh(x: Any) -> Any:
    """The mesh of Explicit axes in the type of `x`, or None."""
    sharding = getattr(core.typeof(x), "sharding", None)
    return sharding.mesh if sharding is not None and sharding.mesh._any_axis_explicit else None


def explicit_spec(aval: Any) -> Any:
    """The spec in the type of a value on a mesh of Explicit axes; None where it says nothing."""
    sharding = getattr(aval, "sharding", None)
    if sharding is None or sharding.mesh.empty or not sharding.mesh._any_axis_explicit:
        return None
    return sharding.spec if any(entry is not None for entry in sharding.spec) else None


def special_memory(sharding: Any) -> str | None:
    """The kind of memory that a sharding names, where it is not that of computations."""
    kind = getattr(sharding, "memory_kind", None)
    return None if kind == "device" else kind


def memory_of(aval: Any) -> str | None:
    """The kind of memory that a value's type names, where it is not that of computations."""
    space = getattr(aval, "memory_space", None)
    return "pinned_host" if space == core.MemorySpace.Host else None


# With JAX 0.10 an executable of several devices ends the process when it cannot take an argument
# (deleted, or donated twice).
BAD_BUFFERS_CRASH = jax.__version_info__ < (0, 11)


def is_array(x: Any) -> bool:
    return type(x) is ArrayImpl


def deleted(x: Any) -> bool:
    """Whether `x` is an array that was deleted, or donated to a program."""
    return type(x) is ArrayImpl and x.is_deleted()


_flatten = tree_util.default_registry.flatten


def any_deleted(tree: Any) -> bool:
    # On the path of every warm call with JAX 0.10: no call of Python per leaf.
    for x in _flatten(tree)[0]:
        if type(x) is ArrayImpl and x.is_deleted():
            return True
    return False


def abstractify(x: Any) -> Any:
    """Shape, dtype, weak type and memory of an argument; never its value or its sharding."""
    aval = core.shaped_abstractify(x)
    if isinstance(aval, core.ShapedArray):
        return core.ShapedArray(
            aval.shape, aval.dtype, weak_type=aval.weak_type, memory_space=aval.memory_space
        )
    return aval
