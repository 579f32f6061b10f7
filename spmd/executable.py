"""A partitioned program with its executable: which arguments it is for, and how it is called."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding

from sharding import _jax
from sharding.annotate import Spec, spec_of
from sharding.errors import ArgumentError, MeshError, Problem
from sharding.mesh import MeshShape
from spmd.annotations import given_entries
from spmd.arguments import Arguments, trimmed
from spmd.stages import Partitioned


class Executable:
    """One partitioned program; compiled when first called."""

    def __init__(self, partitioned: Partitioned):
        self.partitioned = partitioned
        self.arguments = partitioned.propagated.traced.arguments

    def accepts(self, arguments: Arguments) -> bool:
        """Whether the program is the one for these arguments: they carry the same annotations,
        or lie where the program's own inference wants them."""
        triples = zip(arguments.specs, self.arguments.specs, self.wanted, strict=True)
        return all(own == mine or (mine is None and own == want) for own, mine, want in triples)

    def call(self, arguments: Arguments) -> Any:
        """Runs the program.

        Raises:
          ArgumentError: arguments lie elsewhere than `in_shardings` says.
        """
        leaves = self.placed(arguments)
        if arguments.keywords:
            results = self._flat(*leaves)
            return jax.tree.unflatten(self.partitioned.propagated.traced.out_tree, results)
        dynamic, _ = jax.tree.unflatten(arguments.tree, leaves)
        return self.compiled(*dynamic)

    @functools.cached_property
    def shardings(self) -> list[NamedSharding]:
        """Of the flat arguments."""
        return jax.tree.leaves(
            (self.partitioned.in_shardings, self.partitioned.propagated.kwarg_shardings)
        )

    @functools.cached_property
    def wanted(self) -> tuple[Spec | None, ...]:
        """The spec that the program wants each flat argument in."""
        layouts = self.partitioned.plan.body.inputs
        pairs = zip(self.shardings, layouts, strict=True)
        return tuple(trimmed(spec_of(s, len(x.dims))) for s, x in pairs)

    @functools.cached_property
    def compiled(self) -> Callable:
        """For positional arguments. An executable compiled ahead of time takes arrays on the
        wanted shardings and uncommitted ones alike; a `jax.jit` would trace again for each."""
        dynamic, _ = jax.tree.unflatten(self.arguments.tree, self.arguments.avals)
        options = self.partitioned.jit_options(flat=False)
        return jax.jit(self._run, **options).lower(*dynamic).compile()

    @functools.cached_property
    def _flat(self) -> Callable:
        """With keyword arguments, which have no shardings in `jax.jit`: all by position."""
        return self.partitioned.lower().compile().compiled

    def _run(self, *dynamic: Any) -> Any:
        results = self.partitioned.sharded(*jax.tree.leaves((dynamic, {})))
        return jax.tree.unflatten(self.partitioned.propagated.traced.out_tree, results)

    def placed(self, arguments: Arguments) -> list[Any]:
        """The leaves, those that lie elsewhere on the mesh's devices moved to where they belong."""
        explicit = given_entries(self.arguments, self.partitioned.options)
        problems: list[Problem] = []
        leaves: list[Any] = []
        rows = zip(arguments.leaves, arguments.names, self.shardings, explicit, strict=True)
        for leaf, name, wanted, entry in rows:
            lies = _jax.committed_sharding(leaf)
            if lies is None or lies.is_equivalent_to(wanted, leaf.ndim):
                leaves.append(leaf)
            elif entry is None:
                leaves.append(jax.device_put(leaf, wanted))
            else:
                problems.append(_elsewhere(name, lies, wanted))
        if problems:
            raise ArgumentError(*problems)
        return leaves


def check_devices(mesh: Any, arguments: Arguments) -> None:
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


def _elsewhere(name: str, lies: Any, wanted: NamedSharding) -> Problem:
    spec = spec_of(wanted, 0)
    here = spec_of(lies, 0) if isinstance(lies, NamedSharding) else lies
    return Problem(
        f"{name} lies on {here}, committed",
        f"in_shardings says {spec}; moving it silently could cost more than the program",
        f"move it with jax.device_put({name}, NamedSharding(mesh, {spec})), or leave in_shardings "
        "out for it",
    )
