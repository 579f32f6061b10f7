"""The stages of a program: Traced -> Propagated -> Partitioned -> Lowered -> Compiled.

Frozen objects in the manner of `jax.stages`: each prints, and each makes the next.
"""

import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from jax.sharding import AbstractMesh

import sharding.propagation
from sharding import _jax
from sharding.errors import ArgumentError, MeshError, Problem, ShardingWarning
from sharding.program import Program, Value, build, render
from sharding.spec import Layout, Sharding
from spmd import boundary, collectives, memory
from spmd.annotations import resolve_all
from spmd.arguments import Arguments, output_names, rebuild
from spmd.options import Options
from spmd.partition.interpret import per_device
from spmd.partition.plan import Diagnostic, ProgramPlan
from spmd.partition.planner import make_plan
from spmd.partition.verify import ENABLED, verify


@dataclass(frozen=True)
class Traced:
    """A traced program: global shapes, names, and the user's annotations.

    Attributes:
      program: flat SSA with regions.
      arguments: of the call it was traced for.
      annotations: shardings that the user gave, by value.
      out_tree: structure of the result.
      out_specs: per flat result, the spec given in `out_shardings`, or None.
      options: of `spmd.jit`.
    """

    program: Program
    arguments: Arguments
    annotations: tuple[tuple[Value, Sharding], ...]
    out_tree: Any
    out_specs: tuple[Sharding | None, ...]
    options: Options

    @property
    def jaxpr(self) -> Any:
        return self.program.closed

    @property
    def in_tree(self) -> Any:
        return self.arguments.tree

    @property
    def out_info(self) -> Any:
        leaves = [
            jax.ShapeDtypeStruct(v.shape, v.dtype) for v in self.program.body.outputs
        ]
        return jax.tree.unflatten(self.out_tree, leaves)

    def propagate(self) -> "Propagated":
        """Infers the sharding of every value."""
        mesh = self.options.mesh_shape
        return Propagated(
            self, sharding.propagation.propagate(self.program, mesh, self.annotations)
        )

    def __str__(self) -> str:
        given = {v.id: s for v, s in self.annotations}
        notes = render(self.program, lambda v: f" {given[v.id]}" if v.id in given else "")
        return "\n".join(notes)


@dataclass(frozen=True)
class Propagated:
    """A traced program with a sharding for every value.

    Attributes:
      traced: the stage before.
      result: shardings and the history of every decision.
    """

    traced: Traced
    result: sharding.propagation.Propagated

    @cached_property
    def _inputs(self) -> tuple[list[Layout], list[Diagnostic]]:
        values = self.traced.program.body.inputs
        return self._boundary(values, [self.result.of(v) for v in values])

    @cached_property
    def _outputs(self) -> tuple[list[Layout], list[Diagnostic]]:
        values = self.traced.program.body.outputs
        pairs = zip(values, self.traced.out_specs, strict=True)
        return self._boundary(values, [given or self.result.of(v) for v, given in pairs])

    def _boundary(
        self, values: Sequence[Value], shardings: Sequence[Sharding]
    ) -> tuple[list[Layout], list[Diagnostic]]:
        layouts, diagnostics = [], []
        for value, given in zip(values, shardings, strict=True):
            layout, found = boundary.boundary_layout(value, given, self.result.mesh)
            layouts.append(layout)
            diagnostics += found
        return layouts, diagnostics

    @property
    def in_shardings(self) -> Any:
        """NamedSharding per positional argument, as a tuple of pytrees; keyword arguments in
        `kwarg_shardings`."""
        return self._in_trees[0]

    @property
    def kwarg_shardings(self) -> Any:
        return self._in_trees[1]

    @cached_property
    def _in_trees(self) -> Any:
        leaves = boundary.named(self.traced.options.mesh, self._inputs[0])
        return jax.tree.unflatten(self.traced.in_tree, leaves)

    @cached_property
    def out_shardings(self) -> Any:
        """NamedSharding per result, in the structure of the result."""
        leaves = boundary.named(self.traced.options.mesh, self._outputs[0])
        return jax.tree.unflatten(self.traced.out_tree, leaves)

    def partition(self) -> "Partitioned":
        """Rewrites the program into a per-device one with explicit collectives."""
        plan = make_plan(self.result, self._inputs[0], self._outputs[0])
        if ENABLED:
            verify(plan)
        return Partitioned(self, plan)

    def __str__(self) -> str:
        return str(self.result)


@dataclass(frozen=True)
class Partitioned:
    """A per-device program.

    Attributes:
      propagated: the stage before.
      plan: what is computed, at which layouts, and what moves between.
    """

    propagated: Propagated
    plan: ProgramPlan

    @property
    def in_shardings(self) -> Any:
        return self.propagated.in_shardings

    @property
    def out_shardings(self) -> Any:
        return self.propagated.out_shardings

    @property
    def options(self) -> Options:
        return self.propagated.traced.options

    @cached_property
    def mesh(self) -> Any:
        """The mesh of the per-device program; sub-axes are axes of it."""
        return boundary.refined_jax_mesh(self.options.mesh, self.plan.mesh)

    @cached_property
    def sharded(self) -> Callable[..., tuple[Any, ...]]:
        """A traceable function of flat *global* arrays: the per-device program in shard_map."""
        ins = tuple(boundary.partition_spec(layout) for layout in self.plan.body.inputs)
        outs = tuple(boundary.partition_spec(key.layout) for key in self.plan.body.outputs)
        mapped = jax.shard_map(
            per_device(self.plan), mesh=self.mesh, in_specs=ins, out_specs=outs, check_vma=False
        )

        def run(*args: Any) -> tuple[Any, ...]:
            # Whatever mesh the caller has set, with whatever types of axes, the program's counts.
            with _under(self.mesh):
                return mapped(*args)

        return run

    @cached_property
    def jaxpr(self) -> Any:
        """The per-device program as a closed jaxpr of one shard_map."""
        return jax.make_jaxpr(self.sharded)(*self.propagated.traced.arguments.avals)

    @cached_property
    def collectives(self) -> tuple[collectives.Collective, ...]:
        """Every collective of the per-device program, by kind, axes and source, dearest first."""
        return collectives.count(self.jaxpr.jaxpr, dict(self.plan.mesh.axes))

    @property
    def wire_bytes(self) -> float:
        """Bytes that every device sends per call, by the ring model."""
        return sum(c.bytes for c in self.collectives)

    @cached_property
    def peak_memory(self) -> int:
        """Predicted peak bytes per device."""
        return memory.peak_bytes(self.plan, donated(self.propagated.traced))

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """What was done that the annotations did not say, boundary first."""
        found = (*self.propagated._inputs[1], *self.propagated._outputs[1])
        return (*found, *self.plan.diagnostics)

    def lower(self) -> "Lowered":
        """Lowers the per-device program to StableHLO for the devices of the mesh."""
        traced = self.propagated.traced
        function = jax.jit(self.sharded, **self.jit_options(flat=True))
        return Lowered(self, function.lower(*traced.arguments.avals))

    def jit_options(self, flat: bool) -> dict[str, Any]:
        """Arguments of `jax.jit` for the partitioned function, of flat or structured arguments."""
        traced = self.propagated.traced
        options: dict[str, Any] = {"compiler_options": self.options.compiler_options}
        if flat:
            options["donate_argnums"] = tuple(i for i, d in enumerate(donated(traced)) if d)
            options["keep_unused"] = True
        else:
            # Positions among the dynamic arguments, which is all that the executable takes.
            static = {i for i, _ in traced.arguments.static if isinstance(i, int)}
            options["donate_argnums"] = tuple(
                i - sum(s < i for s in static) for i in self.options.donate_argnums
            )
            options["keep_unused"] = self.options.keep_unused
        if not isinstance(self.options.mesh, AbstractMesh):
            outs = boundary.named(self.options.mesh, self.propagated._outputs[0])
            ins = boundary.named(self.options.mesh, self.propagated._inputs[0])
            options["in_shardings"] = tuple(ins) if flat else self.in_shardings
            options["out_shardings"] = tuple(outs) if flat else self.out_shardings
        return options

    def warn(self) -> None:
        """Says what was done to annotated dims that do not divide; once, when it is first used."""
        annotated = {str(v) for v, s in self.propagated.traced.annotations}
        for diagnostic in (*self.propagated._inputs[1], *self.propagated._outputs[1]):
            if diagnostic.value in annotated:
                warnings.warn(str(diagnostic), ShardingWarning, stacklevel=_stacklevel())

    def __str__(self) -> str:
        lines = [str(self.plan), "collectives"]
        lines += [
            f"  {c.kind}({'+'.join(c.axes)}) x{c.count} {c.bytes:,.0f} B"
            for c in collectives.summarize(self.collectives)
        ] or ["  none"]
        if self.diagnostics:
            lines += ["diagnostics", *(f"  {d}" for d in self.diagnostics)]
        return "\n".join(lines)


@dataclass(frozen=True)
class Lowered:
    """A lowered program; `compile` binds it to the devices of the mesh."""

    partitioned: Partitioned
    lowered: Any

    def compile(self, compiler_options: Any = None) -> "Compiled":
        """Compiles with XLA.

        Raises:
          MeshError: the mesh is abstract: it has no devices to compile for.
        """
        if isinstance(self.partitioned.options.mesh, AbstractMesh):
            raise MeshError(
                Problem(
                    f"the mesh {self.partitioned.options.mesh_shape} is abstract",
                    "an executable is made for devices, and an AbstractMesh has none",
                    "give spmd.jit a jax.sharding.Mesh (its devices may be of a described "
                    "topology)",
                )
            )
        return Compiled(self.partitioned, self.lowered.compile(compiler_options))

    def as_text(self, dialect: str | None = None) -> str:
        return self.lowered.as_text(dialect)

    def compiler_ir(self, dialect: str | None = None) -> Any:
        return self.lowered.compiler_ir(dialect)

    def __str__(self) -> str:
        return self.as_text()


@dataclass(frozen=True)
class Compiled:
    """An executable; called like the function, with global arrays."""

    partitioned: Partitioned
    compiled: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        traced = self.partitioned.propagated.traced
        leaves, tree = jax.tree.flatten((args, kwargs))
        if tree != traced.in_tree:
            raise ArgumentError(
                Problem(
                    f"called with arguments of structure {tree}",
                    f"compiled for {traced.in_tree}",
                    "pass the structure it was compiled for, without static arguments",
                )
            )
        return jax.tree.unflatten(traced.out_tree, self.compiled(*leaves))

    @property
    def in_shardings(self) -> Any:
        return self.partitioned.in_shardings

    @property
    def out_shardings(self) -> Any:
        return self.partitioned.out_shardings

    @property
    def collectives(self) -> tuple[collectives.Collective, ...]:
        return self.partitioned.collectives

    def as_text(self) -> str:
        """The optimised HLO."""
        return self.compiled.as_text()

    def memory_analysis(self) -> Any:
        return self.compiled.memory_analysis()

    def cost_analysis(self) -> Any:
        return self.compiled.cost_analysis()

    def runtime_executable(self) -> Any:
        return self.compiled.runtime_executable()

    def __str__(self) -> str:
        return self.as_text()


def _under(mesh: Any) -> AbstractContextManager:
    """Makes `mesh` the current one for tracing; inside of a program for another number of devices
    that one's mesh stays, and the program is partitioned over it in the end."""
    abstract = mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh
    current = jax.sharding.get_abstract_mesh()
    if not current.empty and current.size != abstract.size:
        return nullcontext()
    return jax.sharding.use_abstract_mesh(abstract)


def _stacklevel() -> int:
    """Of the first frame outside of this package, seen from the caller."""
    package = os.path.dirname(__file__)
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_code.co_filename.startswith(package):
        frame, level = frame.f_back, level + 1
    return level


def trace(fun: Callable, arguments: Arguments, options: Options) -> Traced:
    """Traces `fun` for the arguments of one call, and resolves every annotation.

    Raises:
      SpecError: every annotation that does not fit.
      RuleError: a primitive has no rule.
    """
    out_tree: list[Any] = []

    def flat(*leaves: Any) -> list[Any]:
        args, kwargs = rebuild(arguments, leaves)
        results, tree = jax.tree.flatten(fun(*args, **kwargs))
        out_tree.append(tree)
        return results

    with _under(options.mesh):
        closed = _jax.trace(flat, *arguments.avals)
    program = build(closed, arguments.names, output_names(out_tree[-1]))
    program.check_rules(options.fallback)
    annotations, out_specs = resolve_all(program, arguments, out_tree[-1], options)
    return Traced(program, arguments, annotations, out_tree[-1], out_specs, options)


def donated(traced: Traced) -> list[bool]:
    """Per flat argument, whether `donate_argnums` or `donate_argnames` covers it."""
    options, arguments = traced.options, traced.arguments
    static = {i for i, _ in arguments.static if isinstance(i, int)}
    args, kwargs = jax.tree.unflatten(arguments.tree, arguments.leaves)
    flags: list[bool] = []
    positions = [i for i in range(len(args) + len(static)) if i not in static]
    for i, arg in zip(positions, args, strict=True):
        flags += [i in options.donate_argnums] * len(jax.tree.leaves(arg))
    for name in sorted(kwargs):
        flags += [name in options.donate_argnames] * len(jax.tree.leaves(kwargs[name]))
    return flags
