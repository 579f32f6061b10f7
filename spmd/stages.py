"""The stages of a program: Traced -> Propagated -> Partitioned (-> Lowered -> Compiled).

Frozen objects in the manner of `jax.stages`: each prints, and each makes the next.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
from jax.sharding import AbstractMesh

import sharding.propagation
from sharding._jax import jit as _jit
from sharding.collector import uncollected
from sharding.errors import ShardingWarning
from sharding.own_steps import own_steps
from sharding.program import Program, Value, render
from sharding.spec import Layout, Sharding
from spmd import boundary, collectives
from spmd.annotations import Annotated
from spmd.arguments import Arguments, output_names
from spmd.caller import caller
from spmd.compiled import Lowered
from spmd.devices import alone, automatic, under
from spmd.explaining.inspection import Inspection
from spmd.options import Options, free_memory, memory
from spmd.partition.diagnose import forbid_gathers
from spmd.partition.diagnose import own_steps as own_loops
from spmd.partition.findings import diagnose, forbid_waste, over_limit
from spmd.partition.interpret import per_device
from spmd.partition.plan import Diagnostic, ProgramPlan
from spmd.partition.verify import ENABLED, verify
from spmd.planning import make_suited_plan, peak_bytes, weight
from spmd.reporting.stage import Reporting
from spmd.target import combined, compiler_options


@dataclass(frozen=True)
class Traced(Reporting):
    """A traced program: global shapes, names, and the user's annotations.

    Attributes:
      program: flat SSA with regions; its inputs are `captured` and then the arguments.
      arguments: of the call it was traced for.
      annotated: shardings that the user gave.
      out_tree: structure of the result.
      options: of `spmd.jit`.
      captured: large arrays that the function closes over.
      constants: everything that it closes over.
      inputs: values of `constants`, then of the arguments: the inputs of `program.closed`.
      source: the `jax.stages.Traced`; None for a call inside of another program.
      again: makes the same with functions in place of equations, see `program.build`.
    """

    program: Program
    arguments: Arguments
    annotated: Annotated
    out_tree: Any
    options: Options
    captured: tuple[Any, ...] = ()
    constants: Sequence[Any] = ()
    inputs: tuple[Value, ...] = ()
    source: Any = None
    again: Callable[[Sequence[tuple[Any, Callable]]], "Traced"] | None = None

    @property
    def annotations(self) -> tuple[tuple[Value, Sharding], ...]:
        return self.annotated.annotations

    @property
    def out_specs(self) -> tuple[Sharding | None, ...]:
        return self.annotated.out_specs

    @property
    def typed(self) -> bool:
        """Whether it was traced with Explicit axes, which it needs."""
        return any(_jit.explicit_spec(v.aval) is not None for v in self.program.values)

    @property
    def fun_name(self) -> str:
        return "call" if self.source is None else self.source.fun_name

    @property
    def jaxpr(self) -> Any:
        return self.program.closed if self.source is None else self.source.jaxpr

    @property
    def in_tree(self) -> Any:
        return self.arguments.tree

    @property
    def in_avals(self) -> Any:
        return jax.tree.unflatten(self.in_tree, self.arguments.avals)

    @property
    def args_info(self) -> Any:
        return self.source.args_info

    @property
    def donate_argnums(self) -> tuple[int, ...]:
        return self.source.donate_argnums

    @property
    def donated(self) -> list[bool]:
        """Per input of the program, whether `donate_argnums` or `donate_argnames` covers it."""
        if self.source is None:
            return [False] * len(self.program.body.inputs)
        flags = [a.donated for a in jax.tree.leaves(self.source.args_info)]
        return [False] * len(self.captured) + flags

    @property
    def out_avals(self) -> Any:
        return jax.tree.unflatten(self.out_tree, [v.aval for v in self.program.body.outputs])

    @property
    def out_info(self) -> Any:
        leaves = [
            jax.ShapeDtypeStruct(v.shape, v.dtype, weak_type=_weak(v))
            for v in self.program.body.outputs
        ]
        return jax.tree.unflatten(self.out_tree, leaves)

    def propagate(self) -> "Propagated":
        """Infers the sharding of every value."""
        mesh = self.options.mesh_shape
        found = sharding.propagation.propagate(self.program, mesh, self.annotations)
        able = self.options.on("own_steps") and not self.typed and alone(self.options.mesh)
        if self.again is None or not able:
            return Propagated(self, found)
        instead = own_steps(found, self.annotations, automatic(self.options.mesh))
        if not instead:
            return Propagated(self, found)
        # What such a loop stacks is sharded now, and another one may run over that.
        return replace(self.again(instead).propagate(), whole=Propagated(self, found))

    def lower(self, **how: Any) -> Lowered:
        """All stages up to StableHLO; with the options of `jax.stages.Traced.lower`."""
        return self.propagate().partition().lower(**how)

    def __str__(self) -> str:
        given = {v.id: s for v, s in self.annotations}
        notes = render(self.program, lambda v: f" {given[v.id]}" if v.id in given else "")
        return "\n".join(notes)


@dataclass(frozen=True)
class Propagated(Inspection):
    """A traced program with a sharding for every value.

    Attributes:
      traced: the stage before.
      result: shardings and the history of every decision.
      whole: the same program with its loops as they were, see `own_steps`; None: it is that.
    """

    traced: Traced
    result: sharding.propagation.Propagated
    whole: "Propagated | None" = None

    @cached_property
    def _inputs(self) -> tuple[list[Layout], list[Diagnostic]]:
        values = self.traced.program.body.inputs
        return self._boundary(values, [self.result.of(v) for v in values])

    @cached_property
    def _outputs(self) -> tuple[list[Layout], list[Diagnostic]]:
        values = self.traced.program.body.outputs
        pairs = zip(values, self.traced.out_specs, strict=True)
        found = [boundary.completed(given, self.result.of(v)) for v, given in pairs]
        return self._boundary(values, found)

    def _boundary(
        self, values: Sequence[Value], shardings: Sequence[Sharding]
    ) -> tuple[list[Layout], list[Diagnostic]]:
        layouts, diagnostics = [], []
        for value, given in zip(values, shardings, strict=True):
            layout, found = boundary.boundary_layout(value, given, self.result.mesh)
            layouts.append(layout)
            diagnostics += found
        return layouts, diagnostics

    @cached_property
    def flat_in_shardings(self) -> list[Any]:
        """NamedSharding per input of the program: what it closes over, then the arguments."""
        entries, traced = self.traced.annotated.in_entries, self.traced
        own = (None,) * len(traced.captured) + traced.arguments.memories
        kinds = [
            kind if free_memory(entry) else memory(entry)
            for entry, kind in zip(entries, own, strict=True)
        ]
        return boundary.named(traced.options.mesh, self._inputs[0], kinds)

    @cached_property
    def flat_out_shardings(self) -> list[Any]:
        values, entries = self.traced.program.body.outputs, self.traced.annotated.out_entries
        kinds = [
            _jit.memory_of(v.aval) if free_memory(entry) else memory(entry)
            for v, entry in zip(values, entries, strict=True)
        ]
        return boundary.named(self.traced.options.mesh, self._outputs[0], kinds)

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
        leaves = self.flat_in_shardings[len(self.traced.captured) :]
        return jax.tree.unflatten(self.traced.in_tree, leaves)

    @cached_property
    def out_shardings(self) -> Any:
        """NamedSharding per result, in the structure of the result."""
        return jax.tree.unflatten(self.traced.out_tree, self.flat_out_shardings)

    @property
    def out_info(self) -> Any:
        """ShapeDtypeStruct per result, with its sharding."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=s, weak_type=x.weak_type
            ),
            self.traced.out_info, self.out_shardings,
        )  # fmt: skip

    @cached_property
    def _plan(self) -> ProgramPlan:
        return make_suited_plan(
            self.result, self._inputs[0], self._outputs[0], self.traced.donated,
            self.traced.options,
        )  # fmt: skip

    @property
    def _weight(self) -> tuple[int, float]:
        return weight(self._plan, self.traced.donated, self.traced.options)

    def partition(self) -> "Partitioned":
        """Rewrites the program into a per-device one with explicit collectives."""
        options, plan = self.traced.options, self._plan
        if self.whole is not None and self.whole._weight < self._weight:
            return self.whole.partition()
        if ENABLED:
            verify(plan)
        if options.on_gather == "error":
            forbid_gathers(plan.diagnostics)
        partitioned = Partitioned(self, plan)
        if options.strict:
            forbid_waste(partitioned.diagnostics)
        return partitioned

    def __str__(self) -> str:
        return str(self.result)


@dataclass(frozen=True)
class Partitioned(Inspection):
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
        return boundary.refined_jax_mesh(automatic(self.options.mesh), self.plan.mesh)

    @cached_property
    def sharded(self) -> Callable[..., tuple[Any, ...]]:
        """A traceable function of flat *global* arrays: the per-device program in shard_map."""
        return self._mapped(combined(self.plan, self.options))

    def _mapped(self, plan: ProgramPlan) -> Callable[..., tuple[Any, ...]]:
        ins = tuple(boundary.partition_spec(layout) for layout in plan.body.inputs)
        outs = tuple(boundary.partition_spec(key.layout) for key in plan.body.outputs)
        mesh = boundary.mapped_mesh(self.mesh, self.options.mesh, plan.program)
        body = per_device(plan)
        mapped = jax.shard_map(body, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)
        weak = list(map(_weak, plan.program.body.outputs))

        def run(*args: Any) -> tuple[Any, ...]:
            # Whatever mesh the caller has set, with whatever types of axes, the program's counts.
            with under(self.mesh):
                return tuple(map(_jit.weakly_typed, mapped(*args), weak))

        run.__name__ = run.__qualname__ = self.propagated.traced.fun_name
        return run

    @cached_property
    def jaxpr(self) -> Any:
        """The per-device program as a closed jaxpr of one shard_map, nothing combined."""
        return jax.make_jaxpr(self._mapped(self.plan))(*self._avals)

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
        return peak_bytes(self.plan, self.propagated.traced.donated, self.options)

    @cached_property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """What was done that the annotations did not say, or leave undone: the dearest first."""
        found = (*self.propagated._inputs[1], *self.propagated._outputs[1], *self._over_limit,
                 *own_loops(self.plan.program))  # fmt: skip
        return diagnose(self.propagated.result, self.plan, found)

    @cached_property
    def _over_limit(self) -> list[Diagnostic]:
        limit = self.options.memory_limit
        if limit is None or self.peak_memory <= limit:
            return []
        return [over_limit(self.peak_memory, limit)]

    @property
    def _avals(self) -> list[Any]:
        traced = self.propagated.traced
        return [*map(_jit.abstractify, traced.captured), *traced.arguments.avals]

    def lower(self, **how: Any) -> Lowered:
        """Lowers the per-device program to StableHLO; `how` as in `jax.stages.Traced.lower`."""
        names = [str(value) for value in self.plan.program.body.inputs]
        with uncollected():
            traced = jax.jit(self.sharded, **self.jit_options()).trace(*self._avals)
            _jit.name_arguments(traced, names, output_names(self.propagated.traced.out_tree))
            return Lowered(self, traced.lower(**how))

    def jit_options(self) -> dict[str, Any]:
        """Arguments of `jax.jit` for the partitioned function of flat arguments."""
        propagated, given = self.propagated, self.propagated.traced.annotated
        flags = [] if _jit.looks_for_nans() else propagated.traced.donated
        options: dict[str, Any] = {
            "compiler_options": compiler_options(self.options, self.plan) or None,
            "donate_argnums": tuple(i for i, d in enumerate(flags) if d),
            "keep_unused": self.options.keep_unused,
        }
        if not isinstance(self.options.mesh, AbstractMesh):
            ins, outs = propagated.flat_in_shardings, propagated.flat_out_shardings
            options["in_shardings"] = boundary.formats(given.in_entries, ins)
            options["out_shardings"] = boundary.formats(given.out_entries, outs)
        return options

    @cached_property
    def used(self) -> list[bool]:
        """Per argument, whether the executable takes it: unused ones are dropped."""
        inputs = self.plan.program.body.inputs[len(self.propagated.traced.captured) :]
        keep = self.options.keep_unused
        return [keep or self.plan.program.uses[v.id] > 0 for v in inputs]

    def warn(self) -> None:
        """Says, at the first use, which annotated dims do not lie so, and what is too large."""
        annotated = {str(v) for v, s in self.propagated.traced.annotations}
        shortened = (*self.propagated._inputs[1], *self.propagated._outputs[1])
        _, level = caller()
        for diagnostic in (*(d for d in shortened if d.value in annotated), *self._over_limit):
            warnings.warn(str(diagnostic), ShardingWarning, stacklevel=level)

    def __str__(self) -> str:
        told = collectives.texts(self.collectives, self.plan.mesh) or ["  none"]
        lines = [str(self.plan), "collectives", *told]
        if self.diagnostics:
            lines += ["diagnostics", *(f"  {d}" for d in self.diagnostics)]
        return "\n".join(lines)


def _weak(value: Value) -> bool:
    return getattr(value.aval, "weak_type", False)
