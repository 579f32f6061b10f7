"""`spmd.jit`: the drop-in for `jax.jit`, its caches and its fast path.

A call outside of any transformation goes straight into the executable of the last signature, so
that the C++ dispatch of JAX decides; only a mismatch comes back to Python. Inside of a
transformation (grad, vmap, jit, scan ...) the call binds a primitive that holds the *global*
program: the transformation acts on that, and partitioning happens when it is lowered.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sharding import _jax
from sharding.annotate import DimSpec, Spec, normalise_rules, shard_p, spec_of
from sharding.errors import ArgumentError, MeshError, Problem
from sharding.mesh import MeshShape
from sharding.program import build
from sharding.propagation import annotations_in, propagate
from sharding.rule import register_inline
from spmd import stages
from spmd.arguments import Arguments, flatten, trimmed
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
        set by `jax.set_mesh`.
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
        checked_mesh(mesh), normalise_rules(axis_rules), in_shardings, out_shardings,
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
        self._fun, self._options = fun, options
        self._entries: dict[Any, list[_Entry]] = {}
        self._fast: Callable | None = None
        functools.update_wrapper(self, fun)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not _jax.outside_of_tracing():
            return self._bind(args, kwargs)
        fast = self._fast
        if fast is None or kwargs:
            return self._dispatch(args, kwargs)
        try:
            return fast(*args)
        except (TypeError, ValueError) as error:
            # Not what the last program was compiled for, or the user's mistake: `_dispatch` tells.
            return self._dispatch(args, kwargs, error)

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
        return self if instance is None else functools.partial(self, instance)

    def __repr__(self) -> str:
        name = getattr(self._fun, "__qualname__", repr(self._fun))
        return f"<spmd.jit of {name} over {self._options.mesh_shape}>"

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

    def _dispatch(
        self, args: Sequence[Any], kwargs: dict[str, Any], error: Exception | None = None
    ) -> Any:
        """The slow path: finds or makes the program for these arguments, and calls it."""
        arguments = self._arguments(args, kwargs)
        _check_devices(self._options.mesh, arguments)
        known = self._entries.setdefault(arguments.key, [])
        entry = next((e for e in known if e.accepts(arguments)), None)
        if entry is None:
            entry = _Entry(self._partition(arguments))
            known.append(entry)
        elif error is not None and self._fast is entry.compiled:
            raise error
        dynamic, keywords = jax.tree.unflatten(arguments.tree, arguments.leaves)
        if keywords:
            return entry.call_flat(arguments)
        # Static arguments are no arguments of the executable: they take the slow path.
        self._fast = None if arguments.static else entry.compiled
        return entry.compiled(*dynamic)

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
        return jax.tree.unflatten(traced.out_tree, results)


class _Entry:
    """One partitioned program and its executables, compiled when first called."""

    def __init__(self, partitioned: Partitioned):
        self.partitioned = partitioned
        self.arguments = partitioned.propagated.traced.arguments

    def accepts(self, arguments: Arguments) -> bool:
        """Whether the program is the one for these arguments: they carry the same annotations,
        or lie where the program's own inference wants them."""
        triples = zip(arguments.specs, self.arguments.specs, self.wanted, strict=True)
        return all(own == mine or (mine is None and own == want) for own, mine, want in triples)

    @functools.cached_property
    def wanted(self) -> tuple[Spec | None, ...]:
        """The spec that the program wants each flat argument in."""
        layouts = self.partitioned.plan.body.inputs
        shardings = jax.tree.leaves((self.partitioned.in_shardings,
                                     self.partitioned.propagated.kwarg_shardings))
        return tuple(
            trimmed(spec_of(s, len(x.dims))) for s, x in zip(shardings, layouts, strict=True)
        )

    @functools.cached_property
    def compiled(self) -> Callable:
        """For positional arguments. An executable compiled ahead of time takes arrays on the
        wanted shardings and uncommitted ones alike; a `jax.jit` would trace again for each."""
        tree, leaves = self.arguments.tree, self.arguments.avals
        dynamic, _ = jax.tree.unflatten(tree, leaves)
        options = self.partitioned.jit_options(flat=False)
        return jax.jit(self._run, **options).lower(*dynamic).compile()

    def call_flat(self, arguments: Arguments) -> Any:
        """Keyword arguments have no shardings in `jax.jit`: everything is passed by position."""
        results = self._flat(*arguments.leaves)
        return jax.tree.unflatten(self.partitioned.propagated.traced.out_tree, results)

    @functools.cached_property
    def _flat(self) -> Callable:
        return self.partitioned.lower().compile().compiled

    def _run(self, *dynamic: Any) -> Any:
        results = self.partitioned.sharded(*jax.tree.leaves((dynamic, {})))
        return jax.tree.unflatten(self.partitioned.propagated.traced.out_tree, results)


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


spmd_call_p = _jax.call_primitive("spmd_call", _lower_call)
register_inline(spmd_call_p, lambda params: _jax.closed(params["call_jaxpr"]))


def _annotated(x: Any, sharding: Any) -> Any:
    if sharding is None:
        return x
    dims = tuple(DimSpec(d.axes, d.open, d.priority) for d in sharding.dims)
    return shard_p.bind(x, spec=Spec(dims))


def _on_mesh(x: Any, mesh: Any) -> Any:
    """Tells an outer `jax.jit` which devices the call runs on."""
    if isinstance(mesh, AbstractMesh) or not _jax.is_tracer(x):
        return x
    free = PartitionSpec(*[PartitionSpec.UNCONSTRAINED] * x.ndim)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, free))


def _check_devices(mesh: Any, arguments: Arguments) -> None:
    """Raises MeshError when the program cannot run on the mesh, or with these arguments."""
    shape = MeshShape.of(mesh)
    if isinstance(mesh, AbstractMesh):
        raise MeshError(
            Problem(
                f"the mesh {shape} is abstract",
                f"it describes {shape.size} devices and names none, so nothing can run on it",
                "pass a jax.sharding.Mesh to run; use .trace(...).propagate().partition() to plan",
            )
        )
    devices = set(mesh.devices.flat)
    problems = []
    for leaf, name in zip(arguments.leaves, arguments.names, strict=True):
        placed = _jax.committed_sharding(leaf)
        if placed is not None and placed.device_set != devices:
            problems.append(
                Problem(
                    f"{name} lies on {_device_text(placed.device_set)}, committed",
                    f"the mesh {shape} has the {_device_text(devices)}",
                    f"put {name} on the mesh with jax.device_put({name}, NamedSharding(mesh, "
                    "P(...))), or make the mesh from the devices of the arguments",
                )
            )
    if problems:
        raise MeshError(*problems)


def _device_text(devices: Any) -> str:
    """`device 5`, `devices 0, 1`, `devices 0, 1 and 62 more`."""
    ids = sorted(d.id for d in devices)
    shown = ", ".join(map(str, ids[:8])) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
    return f"device{'s' if len(ids) > 1 else ''} {shown}"


