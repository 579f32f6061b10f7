"""A function as one call inside of other programs: grad, vmap, scan, remat and jit act on its
*global* program, and it is partitioned when what they made of it is lowered."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from sharding import _jax
from sharding._jax import calls
from sharding._jax import jit as _jit
from sharding.annotate import DimSpec, Spec, shard_p
from sharding.program import build
from sharding.rule import register_inline
from sharding.stated import annotations_in
from spmd import stages
from spmd.annotations import Annotated
from spmd.arguments import Arguments
from spmd.devices import automatic, under
from spmd.options import Options


class Call:
    """The call of a traced program.

    Attributes:
      closes_over_tracers: whether it belongs to a transformation in progress.
    """

    def __init__(self, constants: Sequence[Any], out_tree: Any, run: Callable):
        self.constants, self.out_tree, self.run = constants, out_tree, run
        self.closes_over_tracers = any(map(_jit.is_tracer, constants))

    def __call__(self, leaves: Sequence[Any]) -> Any:
        return jax.tree.unflatten(self.out_tree, self.run(*self.constants, *leaves))


def call_of(traced: stages.Traced) -> Call:
    """The call of a program, traced for the arguments of a call."""
    if traced.typed:
        return _typed_call(traced)
    options, annotated = traced.options, {v.id: s for v, s in traced.annotations}
    specs = [annotated.get(v.id) for v in traced.inputs]

    def program(*xs: Any) -> Sequence[Any]:
        marked = map(_annotated, xs, specs)
        results = _jax.as_fun(traced.program.closed)(*marked)
        return list(map(_annotated, results, traced.out_specs))

    # What the function closes over may be traced too: as an argument it is differentiated.
    avals = [*map(_jit.abstractify, traced.constants), *traced.arguments.avals]
    closed = _jax.trace(program, *avals)

    def bind(*xs: Any) -> list[Any]:
        placed = [_on_mesh(x, options.mesh) for x in xs]
        results = calls.bind_call(spmd_call_p, closed, placed, options=options)
        return [_on_mesh(x, options.mesh) for x in results]

    def run(*xs: Any) -> Any:
        mesh = next(filter(None, map(_jit.explicit_mesh, xs)), None)
        if mesh is None:
            return bind(*xs)
        # The program around it has Explicit axes: its types hear where the results lie.
        outs = [s.spec for s in traced.propagate().flat_out_shardings]
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.sharding.auto_axes(bind, out_sharding=outs)(*xs)

    run.__name__ = run.__qualname__ = traced.fun_name
    # JAX keeps what it makes of a jitted function: a gradient is taken and compiled once.
    call = jax.jit(run, compiler_options=dict(options.compiler_options) or None)
    return Call(traced.constants, traced.out_tree, call)


def _typed_call(traced: stages.Traced) -> Call:
    """A program that only Explicit axes understand becomes part of the program around it."""
    def run(*xs: Any) -> Sequence[Any]:
        with jax.sharding.use_abstract_mesh(traced.options.mesh.abstract_mesh):
            return _jax.as_fun(traced.program.closed)(*xs)

    run.__name__ = run.__qualname__ = traced.fun_name
    return Call(traced.constants, traced.out_tree, jax.jit(run))


def _lower_call(closed: Any, params: dict[str, Any]) -> Callable:
    """Partitions the global program of a call that a transformation has finished with."""
    options: Options = params["options"]
    closed = _jax.dead_code_free(closed)

    def made(instead: Sequence[Any]) -> stages.Traced:
        with under(automatic(options.mesh)):
            program = build(closed, instead=instead)
        program.check_rules(options.fallback)
        annotations = annotations_in(program, options.mesh_shape, options.axis_rules)
        ins, outs = program.body.inputs, program.body.outputs
        arguments = Arguments(tuple(v.aval for v in ins), None, tuple(map(str, ins)))
        annotated = Annotated(
            tuple(annotations), (None,) * len(outs), (None,) * len(ins), (None,) * len(outs)
        )
        return stages.Traced(program, arguments, annotated, None, options,
                             again=program.again(made, instead))  # fmt: skip

    partitioned = made(()).propagate().partition()
    partitioned.warn()
    return partitioned.sharded


def _place(params: dict[str, Any], x: Any) -> Any:
    return _on_mesh(x, params["options"].mesh)


spmd_call_p = calls.call_primitive("spmd_call", _lower_call, _place)
register_inline(
    spmd_call_p,
    lambda params: _jax.closed(params["call_jaxpr"]),
    axis_rules=lambda params, around: params["options"].axis_rules,
)


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
    return jax.lax.with_sharding_constraint(x, NamedSharding(automatic(mesh), free))
