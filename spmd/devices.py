"""The mesh of a call, and whether its arguments lie on the devices of that mesh."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from sharding._jax import jit as _jit
from sharding.errors import MeshError, Problem
from sharding.mesh import MeshShape
from spmd.arguments import Arguments
from spmd.options import Options, sharding_of


def checked_mesh(mesh: Any) -> Any:
    """The mesh that a user gave: a `Mesh` or `AbstractMesh` as it is, names and sizes as an
    AbstractMesh.

    Raises:
      MeshError: it is malformed.
    """
    shape = MeshShape.of(mesh)
    if isinstance(mesh, (Mesh, AbstractMesh)):
        return mesh
    automatic = (AxisType.Auto,) * len(shape.axes)
    return AbstractMesh(tuple(n for _, n in shape.axes), shape.names, axis_types=automatic)


@lru_cache(maxsize=256)
def automatic(mesh: Any) -> Any:
    """The mesh with axes of type Auto, under which programs are traced: axis types say who decides
    about shardings, and here that is this compiler."""
    types = (AxisType.Auto,) * len(mesh.axis_names)
    if tuple(mesh.axis_types) == types:
        return mesh
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=types)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=types)


def under(mesh: Any) -> AbstractContextManager:
    """Makes `mesh` the current one for tracing; inside of a program for another number of devices
    that one's mesh stays, and the program is partitioned over it in the end."""
    abstract = mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh
    return jax.sharding.use_abstract_mesh(abstract) if alone(mesh) else nullcontext()


def alone(mesh: Any) -> bool:
    """Whether no mesh of another number of devices is the current one."""
    current = jax.sharding.get_abstract_mesh()
    return current.empty or current.size == mesh.size


def with_mesh(options: Options, leaves: Sequence[Any]) -> Options:
    """Options with the mesh of a call: the one given; else that of a NamedSharding in
    `in_shardings` or `out_shardings`, the one that `jax.set_mesh` set, or that of an argument.

    Raises:
      MeshError: there is none.
    """
    if options.mesh is not None:
        return options
    mesh = next(_candidates(options, leaves), None)
    if mesh is None:
        raise MeshError(
            Problem(
                "spmd.jit has no mesh",
                "a program is partitioned over the axes of a mesh",
                'pass mesh=jax.make_mesh((8,), ("data",)), or enter jax.set_mesh(mesh)',
            )
        )
    return replace(options, mesh=checked_mesh(mesh))


def _candidates(options: Options, leaves: Sequence[Any]) -> Iterator[Any]:
    given = (sharding_of(entry) for entry in options.entries)
    yield from (s.mesh for s in given if isinstance(s, NamedSharding) and not s.mesh.empty)
    yield from _jit.meshes_in_context()
    placed = map(_jit.committed_sharding, leaves)
    yield from (s.mesh for s in placed if isinstance(s, NamedSharding) and not s.mesh.empty)


def same_mesh(a: Any, b: Any) -> bool:
    """Whether two meshes put the same names on the same devices in the same order; a mesh without
    devices is compared by its names and sizes."""
    if not MeshShape.of(a).like(MeshShape.of(b)):
        return False
    if isinstance(a, AbstractMesh) or isinstance(b, AbstractMesh):
        return True
    return tuple(a.devices.flat) == tuple(b.devices.flat)


def check_devices(mesh: Any, arguments: Arguments, used: Sequence[bool]) -> None:
    """Raises MeshError when the program cannot run on the mesh, or with these arguments.

    Args:
      used: per leaf, whether the program reads it; others may lie anywhere.
    """
    check_concrete(mesh)
    order = tuple(mesh.devices.flat)
    problems = []
    for placed, name, read in zip(arguments.placed, arguments.names, used, strict=True):
        if not read or placed is None or getattr(placed, "mesh", None) is mesh:
            continue
        if (found := _jit.device_order(placed)) != order:
            problems.append(_elsewhere(name, found, order, MeshShape.of(mesh)))
    if problems:
        raise MeshError(*problems)


def check_concrete(mesh: Any) -> None:
    """Raises MeshError when the mesh has no devices."""
    if not isinstance(mesh, AbstractMesh):
        return
    shape = MeshShape.of(mesh)
    raise MeshError(
        Problem(
            f"the mesh {shape} is abstract",
            f"it describes {shape.size} devices and names none, so nothing can run on it",
            "pass a jax.sharding.Mesh to run; use .trace(...).propagate().partition() to plan",
        )
    )


def _elsewhere(name: str, found: Sequence[Any], order: Sequence[Any], shape: MeshShape) -> Problem:
    here, there = device_text(found), device_text(order)
    if set(found) == set(order):
        here, there = f"{here} in another order", f"{there} in its own order"
    return Problem(
        f"{name} lies on {here}, committed",
        f"the mesh {shape} has the {there}",
        f"put {name} on the mesh with jax.device_put({name}, NamedSharding(mesh, P(...))), or make "
        "the mesh from the devices of the arguments",
    )


def device_text(devices: Any) -> str:
    """`device 5`, `devices 0, 1`, `devices 0, 1 and 62 more`."""
    ids = sorted(d.id for d in devices)
    shown = ", ".join(map(str, ids[:8])) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
    return f"device{'s' if len(ids) > 1 else ''} {shown}"
