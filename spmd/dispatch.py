"""`spmd.jit`: the drop-in for `jax.jit`, and its caches.

A call outside of any transformation is dispatched by the C++ code that dispatches `jax.jit`; what
it does not know comes to `_Family.miss`. Inside of a transformation (grad, vmap, jit, scan ...)
the call binds a primitive that holds the *global* program: the transformation acts on that, and
partitioning happens when it is lowered.
"""

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax

from sharding._jax import jit as _jit
from sharding.annotate import normalise_rules
from sharding.errors import (
    ArgumentError,
    ArgumentTypeError,
    MeshError,
    Problem,
    did_you_mean,
)
from sharding.mesh import MeshShape
from spmd import refs, stages, tracing
from spmd.arguments import Arguments, check_buffers, check_hashable, flatten, suspicious
from spmd.call import call_of
from spmd.devices import check_concrete, checked_mesh, with_mesh
from spmd.executable import Executable, Variants
from spmd.options import PASSES, Options


def jit(
    fun: Callable | None = None,
    *,
    mesh: Any = None,
    axis_rules: Any = (),
    in_shardings: Any = None,
    out_shardings: Any = None,
    donate_argnums: int | Sequence[int] | None = None,
    donate_argnames: str | Sequence[str] | None = None,
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    keep_unused: bool = False,
    device: Any = None,
    backend: Any = None,
    inline: Any = False,
    fallback: str = "error",
    on_gather: str = "plan",
    strict: bool = False,
    disable_passes: Sequence[str] = (),
    memory_limit: int | None = None,
    compiler_options: Any = None,
) -> Any:
    """Compiles `fun` into a partitioned program: `jax.jit`, with the sharding of every operation
    inferred from a few annotations, and with explicit collectives.

    Args:
      fun: a function written as for one device.
      mesh: `jax.sharding.Mesh`, or `AbstractMesh` to plan without devices; by default that of a
        NamedSharding in `in_shardings` or `out_shardings`, else the one that `jax.set_mesh` has
        set when the function is called, else that of a committed argument.
      axis_rules: (logical name, mesh axes or None) pairs for names that are no mesh axes, with
        the semantics of flax's logical axis rules.
      in_shardings: pytree prefix of PartitionSpec, NamedSharding, Format or None (inferred) for
        the positional arguments.
      out_shardings: the same for the result.
      donate_argnums, donate_argnames, static_argnums, static_argnames, keep_unused, inline,
        compiler_options: as in `jax.jit`.
      device, backend: deprecated in `jax.jit`; here the mesh says it.
      fallback: "error": a primitive without a sharding rule is an error; "replicate": it runs
        whole on every device.
      on_gather: "plan": an operation that needs a sharded dim whole gets it gathered, with a
        diagnostic; "error": that is an error, which lists all of them.
      strict: everything in `Partitioned.diagnostics` that costs a device 1 MiB or more is an
        error, which lists all of it.
      disable_passes: names of optimisations that are off: "own_steps" (of a loop over a sharded dim
        whose steps need nothing of one another every device runs its own), "moved_axes" (an axis
        shards another dim for a part of the program, attention's heads in place of its positions,
        by all-to-alls, where others would gather), "shared_sums" (sums are reduced where that is
        cheapest for all that is made of them), "shared_gathers" (what several operations could
        gather is gathered once where that is), "direct_moves" (what is moved before and after it is
        only rearranged, or as it is and rearranged, is moved once), "late_broadcasts" (what is cut
        from one shard stays there until others need it), "loop_sums" (what a loop adds up is
        reduced once, after it),
        "loop_invariants" (what its steps gather is gathered once), "split_scatters", "own_stacks"
        and "async_collectives" (what TPU compilers need in order to keep reduce-scatters, to fill
        no memory with zeros that are overwritten, and to run collectives beside computation),
        "streams" (so that TPUs have half of a batch to compute while what they send of the other
        half is on its way), "transposed_sums" (so that they copy no weights into the order of their
        gradients), "keep_products" (what the CPU compiler needs in order to multiply matrices at
        full speed), "combine_small" (small collectives of simulated devices go as one; they are
        counted one by one), "saved_gathers", "regathers" and "bounded_schedule" (for these see
        `memory_limit`).
      memory_limit: bytes that a device has for the program. While the predicted peak stays below,
        weights that loops over layers gather forward and again on the way back are gathered once;
        where it is above, "loop_invariants" and "loop_sums" are given up if that helps, and what is
        gathered for several operations is let go and gathered again for the later ones. TPU
        compilers take no more to run transfers early. A program that is predicted to need more all
        the same has a diagnostic. None: nothing of this is done.

    Returns:
      A callable with the stages `.trace`, `.lower` (see `spmd.stages`).

    Raises:
      MeshError: there is no mesh, or it does not fit the devices.
      ArgumentError: an argument of `jit` itself is wrong.
    """
    given = {name: value for name, value in locals().items() if name != "fun"}
    if fun is None:
        return functools.partial(jit, **given)
    _check_callable(fun)
    _check_choices(device, backend, fallback, on_gather)
    _check_passes(disable_passes)
    memory_limit = _checked_memory_limit(memory_limit)
    donated_and_static = _jit.resolve_argnums(
        fun, donate_argnums, donate_argnames, static_argnums, static_argnames
    )
    options = Options(
        None if mesh is None else checked_mesh(mesh), normalise_rules(axis_rules),
        tuple(in_shardings) if isinstance(in_shardings, list) else in_shardings, out_shardings,
        *donated_and_static, keep_unused, fallback, on_gather,
        tuple((compiler_options or {}).items()), bool(strict), tuple(sorted(disable_passes)),
        memory_limit, mesh.across if isinstance(mesh, MeshShape) else (),
    )  # fmt: skip
    return Function(_referable(fun), options)


class Function:
    """What `spmd.jit` returns."""

    def __init__(self, fun: Callable, options: Options):
        self._family = family = _Family(fun, options)
        self._call = _jit.dispatcher(
            fun, family.miss, options.static_argnums, options.static_argnames, options
        )
        self._donates = bool(options.donate_argnums or options.donate_argnames)
        functools.update_wrapper(self, fun, updated=())

    @_jit.api_boundary
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _jit.BAD_BUFFERS_CRASH and suspicious((args, kwargs), self._donates):
            self._family.check_buffers(args, kwargs)
        if self._donates and _jit.looks_for_nans():
            # The C++ dispatch may know a program that donates what must be kept.
            return self._family.miss(*args, **kwargs)[0]
        try:
            return self._call(*args, **kwargs)
        except (ValueError, RuntimeError) as error:
            if "hash" in str(error):
                self._family.check_static(args, kwargs)
            elif "deleted" in str(error) or "donate" in str(error):
                self._family.check_buffers(args, kwargs)
            raise

    @_jit.api_boundary
    def trace(self, *args: Any, **kwargs: Any) -> stages.Traced:
        """The program for arguments like these; `ShapeDtypeStruct`s will do."""
        return self._family.trace(*self._family.arguments(args, kwargs))

    @_jit.api_boundary
    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """All stages up to StableHLO."""
        arguments, options = self._family.arguments(args, kwargs)
        executable = self._family.executable(arguments, options)
        executable.check_places(arguments)
        return executable.lowered

    @_jit.api_boundary
    def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
        """Shapes and dtypes of the result."""
        try:
            arguments, options = self._family.arguments(args, kwargs)
        except MeshError:  # shapes need none
            return self._family.jitted.eval_shape(*args, **kwargs)
        return tracing.source(self._family.jitted, arguments.abstract(), options).out_info

    def clear_cache(self) -> None:
        self._call._clear_cache()
        self._family.clear()

    def _cache_size(self) -> int:
        """Number of programs; arguments that one program serves, on the mesh or not, count once."""
        return sum(len(v.executables) for v in self._family.every_variants())

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __repr__(self) -> str:
        fun, given = self._family.fun, self._family.given
        name = getattr(fun, "__qualname__", repr(fun))
        mesh = "the mesh that is set" if given.mesh is None else given.mesh_shape
        return f"<spmd.jit of {name} over {mesh}>"


class _Family:
    """A function with its options, and how its programs are found or made."""

    def __init__(self, fun: Callable, given: Options):
        self.fun, self.given = fun, given
        self.by_refs: dict[tuple[int, ...], Function] = {}
        # It traces, and keeps what it traced for every wrapper of the function; it never runs.
        self.jitted: Any = jax.jit(
            fun, static_argnums=given.static_argnums, static_argnames=given.static_argnames,
            donate_argnums=given.donate_argnums, donate_argnames=given.donate_argnames,
        )  # fmt: skip

    def arguments(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Arguments, Options]:
        found = self.flat(args, kwargs)
        options = with_mesh(self.given, found.leaves)
        return found.on(options.mesh), options

    def flat(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Arguments:
        given = self.given
        return flatten(self.fun, args, kwargs, given.static_argnums, given.static_argnames)

    def trace(self, arguments: Arguments, options: Options) -> stages.Traced:
        return tracing.trace(self.jitted, arguments, options)

    def executable(self, arguments: Arguments, options: Options) -> Executable:
        def make() -> stages.Partitioned:
            traced = self.trace(arguments, options)
            _jit.check_no_tracers(traced.constants)
            partitioned = traced.propagate().partition()
            partitioned.warn()
            return partitioned

        return self.variants(arguments, options).find(arguments, make)

    def variants(self, arguments: Arguments, options: Options) -> Variants:
        found = _variants(self.fun, options, (arguments.key, _jit.looks_for_nans()))
        self.every_variants().add(found)
        return found

    def every_variants(self) -> Any:
        return _every_variants(self.fun, self.given)

    def miss(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, bool]:
        """A call that the C++ dispatch has no executable for."""
        if _jit.setting("no_tracing"):
            raise RuntimeError(f"re-tracing {self.fun} for spmd.jit, but 'no_tracing' is set")
        at = refs.places((args, kwargs))
        if at:
            return refs.call(self.on_values(at), at, args, kwargs), None, False
        if not _jit.outside_of_tracing():
            if jax.sharding.get_abstract_mesh().manual_axes:
                # Inside of a shard_map arrays are local already: part of the program around it.
                return self.fun(*args, **kwargs), None, False
            return self._bind(*self.arguments(args, kwargs)), None, False
        arguments, options = self.arguments(args, kwargs)
        check_concrete(options.mesh)
        executable = self.executable(arguments, options)
        try:
            results, fast, again = executable.run(arguments)
        except _jit.FloatingPointProblem as error:
            _jit.recheck_nans(error, self.fun, args, kwargs)
            raise
        return results, fast, again

    def _bind(self, arguments: Arguments, options: Options) -> Any:
        """Inside of a transformation: the global program, as one call."""
        variants = self.variants(arguments, options)
        call = variants.calls.get(arguments.specs)
        if call is None:
            call = call_of(self.trace(arguments, options))
            if not call.closes_over_tracers:
                variants.calls[arguments.specs] = call
        return call(arguments.leaves)

    def on_values(self, at: tuple[int, ...]) -> "Function":
        """The function on values in place of the mutable arrays at these leaves."""
        if at not in self.by_refs:
            pure = refs.on_values(self.fun, at)
            self.by_refs[at] = Function(pure, refs.options_on_values(self.given))
        return self.by_refs[at]

    def check_static(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Raises ArgumentError when a static argument cannot be hashed."""
        check_hashable(self.flat(args, kwargs).static)

    def check_buffers(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Raises DonationError when an argument is donated twice, was donated, or was deleted."""
        arguments, given = self.flat(args, kwargs), self.given
        flags = _jit.donation_vector(given.donate_argnums, given.donate_argnames, arguments.tree)
        check_buffers(arguments, flags)

    def clear(self) -> None:
        self.every_variants().clear()
        _variants.evict_weakref(self.fun)
        self.jitted.clear_cache()


@_jit.weakref_lru_cache
def _variants(fun: Callable, options: Options, key: Any) -> Variants:
    """Shared by all wrappers of a function; JAX adds its configuration to the key, and clears it
    with `jax.clear_caches()`."""
    return Variants()


@functools.partial(_jit.weakref_lru_cache, trace_context_in_key=False)
def _every_variants(fun: Callable, given: Options) -> Any:
    return weakref.WeakSet()


def _check_callable(fun: Any) -> None:
    if inspect.isgeneratorfunction(fun):
        what, fix = "a generator function", "return the values, as a tuple or from jax.lax.scan"
    elif not callable(fun) or isinstance(fun, staticmethod):
        what, fix = f"a {type(fun).__name__}", "pass a callable"
    else:
        return
    raise ArgumentTypeError(Problem(f"spmd.jit was given {what}", "it compiles functions", fix))


def _check_passes(names: Sequence[str]) -> None:
    given = [names] if isinstance(names, str) else list(names)
    problems = [
        Problem(
            f"disable_passes={names!r}",
            f"there is no pass {name!r}{did_you_mean(str(name), PASSES)}",
            f"choose from {', '.join(PASSES)}, as a sequence",
        )
        for name in given if isinstance(names, str) or name not in PASSES
    ]
    if problems:
        raise ArgumentError(*problems)


def _checked_memory_limit(limit: Any) -> int | None:
    if limit is None:
        return None
    if hasattr(limit, "__index__") and not isinstance(limit, bool) and limit > 0:
        return int(limit)
    raise ArgumentError(
        Problem(
            f"memory_limit={limit!r}",
            "it is the number of bytes that a device has for the program",
            "pass a positive int, such as 16 * 2**30, or None",
        )
    )


def _referable(fun: Callable) -> Callable:
    """`fun`, or a function that calls it where it cannot be referenced weakly, as caches do."""
    try:
        weakref.ref(fun)
        return fun
    except TypeError:
        return functools.wraps(fun, updated=())(lambda *args, **kwargs: fun(*args, **kwargs))


def _check_choices(device: Any, backend: Any, fallback: Any, on_gather: Any) -> None:
    name, given = ("device", device) if device is not None else ("backend", backend)
    if given is not None:
        raise ArgumentError(
            Problem(
                f"{name}={given!r}",
                "the devices of a partitioned program are those of its mesh",
                "make the mesh from them: jax.make_mesh(sizes, names, devices=...)",
            )
        )
    if fallback not in ("error", "replicate"):
        raise ArgumentError(
            Problem(
                f"fallback={fallback!r}",
                "a primitive without a rule is either an error or replicated",
                'use fallback="error" or fallback="replicate"',
            )
        )
    if on_gather not in ("plan", "error"):
        raise ArgumentError(
            Problem(
                f"on_gather={on_gather!r}",
                "a dim that an operation needs whole is either gathered by plan or an error",
                'use on_gather="plan" or on_gather="error"',
            )
        )
