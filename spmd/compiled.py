"""The last two stages, Lowered -> Compiled, with everything that those of `jax.stages` tell."""

from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding

from sharding._jax import jit as _jit
from sharding.annotate import spec_of
from sharding.errors import ArgumentError, ArgumentTypeError, MeshError, Problem
from spmd import collectives
from spmd.arguments import check_buffers, suspicious
from spmd.explaining.inspection import Inspection
from spmd.target import explained


@dataclass(frozen=True)
class Lowered(Inspection):
    """A lowered program; `compile` binds it to the devices of the mesh.

    Attributes:
      partitioned: the stage before.
      lowered: the `jax.stages.Lowered` of the flat arguments, those that the function closes over
        first.
    """

    partitioned: Any
    lowered: Any

    def compile(
        self, compiler_options: Any = None, *, device_assignment: Any = None
    ) -> "Compiled":
        """Compiles with XLA.

        Raises:
          MeshError: the mesh is abstract: it has no devices to compile for.
        """
        options = self.partitioned.options
        if isinstance(options.mesh, AbstractMesh) and device_assignment is None:
            raise MeshError(
                Problem(
                    f"the mesh {options.mesh_shape} is abstract",
                    "an executable is made for devices, and an AbstractMesh has none",
                    "give spmd.jit a jax.sharding.Mesh (its devices may be of a described "
                    "topology)",
                )
            )
        with explained(options, self.partitioned.plan):
            flat = self.lowered.compile(compiler_options, device_assignment=device_assignment)
        captured = self.partitioned.propagated.traced.captured
        return Compiled(
            self.partitioned, _jit.restructured(flat, captured, self.args_info, self.out_tree)
        )

    @property
    def in_tree(self) -> Any:
        return self.partitioned.propagated.traced.in_tree

    @property
    def out_tree(self) -> Any:
        return self.partitioned.propagated.traced.out_tree

    @property
    def args_info(self) -> Any:
        return self.partitioned.propagated.traced.args_info

    @property
    def out_info(self) -> Any:
        return self.partitioned.propagated.out_info

    @property
    def in_avals(self) -> Any:
        return self.partitioned.propagated.traced.in_avals

    @property
    def donate_argnums(self) -> tuple[int, ...]:
        return self.partitioned.propagated.traced.donate_argnums

    @property
    def _lowering(self) -> Any:
        """What `jax.export` reads.

        Raises:
          ArgumentError: the function closes over large arrays, which would be more arguments.
        """
        captured = self.partitioned.propagated.traced.captured
        if captured:
            shapes = ", ".join(_jit.abstractify(x).str_short() for x in captured)
            raise ArgumentError(
                Problem(
                    f"the exported function closes over {shapes}",
                    "large arrays that a function closes over are arguments of its program, which "
                    "an exported function does not have",
                    "pass them as arguments",
                )
            )
        return self.lowered._lowering

    def as_text(self, dialect: str | None = None, *, debug_info: bool = False) -> str:
        return self.lowered.as_text(dialect, debug_info=debug_info)

    def compiler_ir(self, dialect: str | None = None) -> Any:
        return self.lowered.compiler_ir(dialect)

    def cost_analysis(self) -> Any:
        return self.lowered.cost_analysis()

    def __str__(self) -> str:
        return self.as_text()


@dataclass(frozen=True)
class Compiled(Inspection):
    """An executable; called like the function, with global arrays and without static arguments.

    Attributes:
      partitioned: the program that it runs.
      compiled: the `jax.stages.Compiled`, of the same arguments.
    """

    partitioned: Any
    compiled: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the program.

        Raises:
          ArgumentTypeError: arguments of another structure or type than it was compiled for.
          ArgumentError: arguments on other shardings than it was compiled for.
        """
        if _jit.BAD_BUFFERS_CRASH and suspicious((args, kwargs), bool(self.donate_argnums)):
            self._check(args, kwargs)
        try:
            return self.compiled(*args, **kwargs)
        except (TypeError, ValueError, RuntimeError):
            self._check(args, kwargs)
            raise

    def _check(self, args: Any, kwargs: Any) -> None:
        traced = self.partitioned.propagated.traced
        leaves, tree = jax.tree.flatten((args, kwargs))
        if tree != traced.in_tree:
            raise ArgumentTypeError(_other_structure(tree, traced.in_tree)) from None
        flags = [info.donated for info in jax.tree.leaves(self.args_info)]
        check_buffers(replace(traced.arguments, leaves=tuple(leaves)), flags)
        wanted = jax.tree.leaves(self.in_shardings_and_kwargs)
        types, shardings = [], []
        rows = zip(leaves, traced.arguments.avals, traced.arguments.names, wanted, strict=True)
        for leaf, aval, name, want in rows:
            found, lies = _jit.abstractify(leaf), _jit.committed_sharding(leaf)
            if (found.shape, found.dtype) != (aval.shape, aval.dtype):
                types.append(_other_type(name, found, aval))
            elif lies is not None and not lies.is_equivalent_to(want, len(aval.shape)):
                shardings.append(_other_sharding(name, lies, want))
        if types:
            raise ArgumentTypeError(*types) from None
        if shardings:
            raise ArgumentError(*shardings) from None

    @property
    def in_shardings(self) -> Any:
        return self.partitioned.in_shardings

    @property
    def out_shardings(self) -> Any:
        return self.partitioned.out_shardings

    @property
    def in_shardings_and_kwargs(self) -> Any:
        """(shardings of positional arguments, of keyword arguments)."""
        return self.in_shardings, self.partitioned.propagated.kwarg_shardings

    @property
    def collectives(self) -> tuple[collectives.Collective, ...]:
        return self.partitioned.collectives

    @property
    def input_shardings(self) -> Any:
        """As `jax.stages.Compiled` has it: (args, kwargs), None for what was dropped as unused."""
        return self.compiled.input_shardings

    @property
    def output_shardings(self) -> Any:
        return self.compiled.output_shardings

    @property
    def input_formats(self) -> Any:
        return self.compiled.input_formats

    @property
    def output_formats(self) -> Any:
        return self.compiled.output_formats

    @property
    def in_tree(self) -> Any:
        return self.compiled.in_tree

    @property
    def out_tree(self) -> Any:
        return self.compiled.out_tree

    @property
    def args_info(self) -> Any:
        return self.compiled.args_info

    @property
    def out_info(self) -> Any:
        return self.compiled.out_info

    @property
    def in_avals(self) -> Any:
        return self.compiled.in_avals

    @property
    def donate_argnums(self) -> tuple[int, ...]:
        return self.compiled.donate_argnums

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


def _other_structure(tree: Any, wanted: Any) -> Problem:
    return Problem(
        f"called with arguments of structure {tree}",
        f"compiled for {wanted}",
        "pass the structure it was compiled for, without static arguments",
    )


def _other_type(name: str, found: Any, wanted: Any) -> Problem:
    return Problem(
        f"{name} is {found.str_short()}",
        f"compiled for {wanted.str_short()}; an executable is of fixed types",
        f"convert {name}, or lower and compile for its type",
    )


def _other_sharding(name: str, lies: Any, wanted: Any) -> Problem:
    here, spec = (spec_of(s, 0) if isinstance(s, NamedSharding) else s for s in (lies, wanted))
    return Problem(
        f"{name} lies on {here}, committed",
        f"compiled for {spec}; an executable takes arguments where it has them",
        f"move it with jax.device_put({name}, NamedSharding(mesh, {spec})), or lower and compile "
        "for its sharding",
    )
