"""`spmd.jit`: the drop-in for `jax.jit`, its caches and its fast path.

A call outside of any transformation goes straight into the executable of the last signature, so
that the C++ dispatch of JAX decides; only a mismatch comes back to Python. Inside of a
transformation (grad, vmap, jit, scan ...) the call binds a primitive that holds the *global*
program: the transformation acts on that, and partitioning happens when it is lowered.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sharding import _jax
from sharding.annotate import DimSpec, Spec, normalise_rules, shard_p
from sharding.errors import ArgumentError, MeshError, Problem
from sharding.mesh import MeshShape
from sharding.program import build
from sharding.propagation import annotations_in, propagate
from sharding.rule import register_inline
from spmd import stages
from spmd.arguments import Arguments, flatten
from spmd.executable import Executable, check_devices
from spmd.options import Options
from spmd.stages import Partitioned


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
    fallback: str = "error",
    compiler_options: Any = None,
) -> Any:
    """Compiles `fun` into a partitioned program: `jax.jit`, with the sharding of every operation
    inferred from a few annotations, and with explicit collectives.

    Args:
      fun: a function written as for one device.
      mesh: `jax.sharding.Mesh`, or `AbstractMesh` to plan without devices; by default the mesh
        that `jax.set_mesh` has set when the function is called.
      axis_rules: (logical name, mesh axes or None) pairs for names that are no mesh axes, with
        the semantics of flax's logical axis rules.
      in_shardings: pytree prefix of PartitionSpec, NamedSharding or None (inferred) for the
        positional arguments.
      out_shardings: the same for the result.
      donate_argnums, donate_argnames, static_argnums, static_argnames, keep_unused,
        compiler_options: as in `jax.jit`.
      fallback: "error": a primitive without a sharding rule is an error; "replicate": it runs
        whole on every device.

    Returns:
      A callable with the stages `.trace`, `.lower` (see `spmd.stages`).

    Raises:
      MeshError: there is no mesh, or it does not fit the devices.
      ArgumentError: an argument of `jit` itself is wrong.
    """
    if fun is None:
        return functools.partial(
            jit, mesh=mesh, axis_rules=axis_rules, in_shardings=in_shardings,
            out_shardings=out_shardings, donate_argnums=donate_argnums,
            donate_argnames=donate_argnames, static_argnums=static_argnums,
            static_argnames=static_argnames, keep_unused=keep_unused, fallback=fallback,
            compiler_options=compiler_options,
        )  # fmt: skip
    _check_options(fun, fallback)
    static = _jax.infer_argnums(fun, static_argnums, static_argnames)
    donate = _jax.infer_argnums(fun, donate_argnums, donate_argnames)
    options = Options(
        None if mesh is None else checked_mesh(mesh), normalise_rules(axis_rules),
        in_shardings, out_shardings,
        donate[0], donate[1], static[0], static[1], keep_unused, fallback, compiler_options,
    )  # fmt: skip
    return Function(fun, options)


def _check_options(fun: Any, fallback: str) -> None:
    if not callable(fun):
        raise ArgumentError(
            Problem(
                f"spmd.jit was given a {type(fun).__name__}",
                "it compiles functions",
                "pass a callable",
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


def checked_mesh(mesh: Any) -> Any:
    """The mesh to use: the one given, or the one that `jax.set_mesh` set.

    Raises:
      MeshError: there is none, or it is malformed.
    """
    if mesh is None:
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            raise MeshError(
                Problem(
                    "spmd.jit has no mesh",
                    "a program is partitioned over the axes of a mesh",
                    'pass mesh=jax.make_mesh((8,), ("data",)), or enter jax.set_mesh(mesh)',
                )
            )
    shape = MeshShape.of(mesh)
    # The types of axes (Explicit is what `jax.make_mesh` gives) say who decides about shardings:
    # here it is always this compiler.
    automatic = (AxisType.Auto,) * len(shape.axes)
    if isinstance(mesh, (AbstractMesh, MeshShape, dict)):
        return AbstractMesh(tuple(n for _, n in shape.axes), shape.names, axis_types=automatic)
    if tuple(mesh.axis_types) == automatic:
        return mesh
    return Mesh(mesh.devices, mesh.axis_names, axis_types=automatic)


class Function:
    """What `spmd.jit` returns."""

    def __init__(self, fun: Callable, options: Options):
        self._fun, self._given = fun, options
        self._entries: dict[Any, list[Executable]] = {}
        # The last executable, with what its C++ dispatch does not compare: weak types and the
        # configuration that programs are traced under.
        self._fast: tuple[Callable, list[bool], Any] | None = None
        functools.update_wrapper(self, fun, updated=())

    @property
    def _options(self) -> Options:
        """With the mesh that `jax.set_mesh` has set now, where none was given."""
        if self._given.mesh is not None:
            return self._given
        return dataclasses.replace(self._given, mesh=checked_mesh(None))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not _jax.outside_of_tracing():
            return self._bind(args, kwargs)
        fast = self._fast
        if fast is not None and not kwargs:
            executable, weak, context = fast
            if _jax.weak_types(args) == weak and _jax.trace_context() == context:
                try:
                    return executable(*args)
                except (TypeError, ValueError):
                    # Not what it was compiled for, or the user's mistake: the slow path tells.
                    pass
        return self._dispatch(args, kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> stages.Traced:
        """The program for arguments like these; `ShapeDtypeStruct`s will do."""
        return stages.trace(self._fun, self._arguments(args, kwargs), self._options)

    def lower(self, *args: Any, **kwargs: Any) -> stages.Lowered:
        """All stages up to StableHLO."""
        return self._partition(self._arguments(args, kwargs)).lower()

    def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
        return jax.eval_shape(self._fun, *args, **kwargs)

    def clear_cache(self) -> None:
        self._entries.clear()
        self._fast = None

    def _cache_size(self) -> int:
        return sum(map(len, self._entries.values()))

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __repr__(self) -> str:
        name = getattr(self._fun, "__qualname__", repr(self._fun))
        mesh = "the mesh that is set" if self._given.mesh is None else self._given.mesh_shape
        return f"<spmd.jit of {name} over {mesh}>"

    def _arguments(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Arguments:
        options = self._options
        return flatten(
            self._fun, args, kwargs, options.static_argnums, options.static_argnames,
            options.mesh_shape.names,
        )  # fmt: skip

    def _partition(self, arguments: Arguments) -> Partitioned:
        traced = stages.trace(self._fun, arguments, self._options)
        partitioned = traced.propagate().partition()
        partitioned.warn()
        return partitioned

    def _dispatch(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The slow path: finds or makes the program for these arguments, and calls it."""
        arguments = self._arguments(args, kwargs)
        check_devices(self._options.mesh, arguments)
        context = _jax.trace_context()
        known = self._entries.setdefault((arguments.key, context), [])
        entry = next((e for e in known if e.accepts(arguments)), None)
        if entry is None:
            entry = Executable(self._partition(arguments))
            known.append(entry)
        # Static arguments are no arguments of the executable, and keyword arguments are passed by
        # position: both take the slow path.
        by_position = not arguments.static and not arguments.keywords
        weak = _jax.weak_types(arguments.leaves)
        self._fast = (entry.compiled, weak, context) if by_position else None
        return entry.call(arguments)

    def _bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Inside of a transformation: the global program, as one call."""
        arguments = self._arguments(args, kwargs)
        traced = stages.trace(self._fun, arguments, self._options)
        inner = {v.id: s for v, s in traced.annotations}

        def run(*leaves: Any) -> Sequence[Any]:
            marked = [
                _annotated(x, inner.get(v.id))
                for x, v in zip(leaves, traced.program.body.inputs, strict=True)
            ]
            results = _jax.as_fun(traced.program.closed)(*marked)
            return [_annotated(x, s) for x, s in zip(results, traced.out_specs, strict=True)]

        # What the function closes over may be traced too: as an argument it is differentiated.
        closed, consts = _jax.without_constants(_jax.trace(run, *arguments.avals))
        leaves = [_on_mesh(x, self._options.mesh) for x in (*consts, *arguments.leaves)]
        results = _jax.bind_call(spmd_call_p, closed, leaves, options=self._options)
        placed = [_on_mesh(x, self._options.mesh) for x in results]
        return jax.tree.unflatten(traced.out_tree, placed)


def _lower_call(closed: Any, params: dict[str, Any]) -> Callable:
    """Partitions the global program of a call that a transformation has finished with."""
    options: Options = params["options"]
    closed = _jax.dead_code_free(closed)
    program = build(closed)
    program.check_rules(options.fallback)
    annotations = annotations_in(program, options.mesh_shape, options.axis_rules)
    result = propagate(program, options.mesh_shape, annotations)
    arguments = Arguments(tuple(v.aval for v in program.body.inputs), None, (), (), ())
    traced = stages.Traced(
        program, arguments, tuple(annotations), None, (None,) * len(program.body.outputs), options
    )
    return stages.Propagated(traced, result).partition().sharded


def _place(params: dict[str, Any], x: Any) -> Any:
    return _on_mesh(x, params["options"].mesh)


spmd_call_p = _jax.call_primitive("spmd_call", _lower_call, _place)
register_inline(spmd_call_p, lambda params: _jax.closed(params["call_jaxpr"]))


def _annotated(x: Any, sharding: Any) -> Any:
    if sharding is None:
        return x
    dims = tuple(DimSpec(d.axes, d.open, d.priority) for d in sharding.dims)
    return shard_p.bind(x, spec=Spec(dims))


def _on_mesh(x: Any, mesh: Any) -> Any:
    """Tells an outer `jax.jit` which devices the call runs on, and leaves the layout free."""
    if isinstance(mesh, AbstractMesh):
        return x
    free = PartitionSpec(*[PartitionSpec.UNCONSTRAINED] * jax.numpy.ndim(x))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, free))
