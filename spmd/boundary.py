"""The program's boundary: what JAX can express there, and what was done where it cannot.

JAX wants even shards of whole mesh axes for arguments and results. A dim keeps the largest prefix
of its axes that divides it evenly; inside the program it is sharded in full: padded, or on a part
of an axis. An array without elements is held whole: XLA replicates it whatever it is told, and
`jax.jit` with `out_shardings` gives an array that cannot be read.
"""

from collections.abc import Sequence
from typing import Any

from jax.experimental.layout import Format
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sharding._jax import jit as _jit
from sharding.mesh import MeshShape, axes_size
from sharding.program import Program, Value, value_bytes
from sharding.spec import Layout, Sharding
from spmd.partition.plan import Diagnostic


def boundary_layout(
    value: Value, sharding: Sharding, mesh: MeshShape
) -> tuple[Layout, list[Diagnostic]]:
    """The layout of an argument or result at the boundary, and a diagnostic per shortened dim."""
    dims = []
    diagnostics = []
    for d, dim in enumerate(sharding.dims):
        axes = () if 0 in value.shape else even_prefix(dim.axes, value.shape[d], mesh)
        dims.append(axes)
        if axes != dim.axes and 0 not in value.shape:
            diagnostics.append(_shortened(value, d, dim.axes, axes, mesh))
    return Layout(tuple(dims)), diagnostics


def even_prefix(axes: tuple[str, ...], n: int, mesh: MeshShape) -> tuple[str, ...]:
    """The longest prefix of whole axes whose product divides n."""
    kept: tuple[str, ...] = ()
    for axis in axes:
        if ":" in axis or n % axes_size(mesh, (*kept, axis)):
            break
        kept += (axis,)
    return kept


def completed(given: Sharding | None, inferred: Sharding) -> Sharding:
    """What `out_shardings` says of a result; dims that it leaves open are where they were inferred
    to be."""
    if given is None:
        return inferred
    taken = {axis for dim in given.dims for axis in dim.axes}
    dims = tuple(
        found if dim.open and not dim.axes and taken.isdisjoint(found.axes) else dim
        for dim, found in zip(given.dims, inferred.dims, strict=True)
    )
    return Sharding(dims)


def partition_spec(layout: Layout) -> PartitionSpec:
    """The PartitionSpec of a layout without partial axes; trailing empty dims are dropped."""
    entries = [axes[0] if len(axes) == 1 else axes or None for axes in layout.dims]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def even_spec(sharding: Sharding, shape: Sequence[int], mesh: MeshShape) -> PartitionSpec:
    """The PartitionSpec of what can be held evenly of a sharding."""
    if 0 in shape:
        return PartitionSpec()
    pairs = zip(sharding.dims, shape, strict=True)
    return partition_spec(Layout(tuple(even_prefix(d.axes, n, mesh) for d, n in pairs)))


def named(
    mesh: Any, layouts: Sequence[Layout], memories: Sequence[str | None] = ()
) -> list[NamedSharding]:
    """The shardings of values at the boundary; `memories` has the kind of memory of each that
    does not lie in the devices' own."""
    kinds = memories or (None,) * len(layouts)
    pairs = zip(layouts, kinds, strict=True)
    return [NamedSharding(mesh, partition_spec(x), memory_kind=kind) for x, kind in pairs]


def formats(entries: Sequence[Any], shardings: Sequence[NamedSharding]) -> tuple[Any, ...]:
    """Shardings as `jax.jit` takes them, with the array layout that an entry of the user gives."""
    return tuple(
        Format(entry.layout, sharding) if isinstance(entry, Format) else sharding
        for entry, sharding in zip(entries, shardings, strict=True)
    )


def refined_jax_mesh(mesh: Any, refined: MeshShape) -> Any:
    """`mesh`, of Auto axes, with axes split into sub-axes: the same devices in the same order."""
    if tuple(mesh.axis_names) == refined.names:
        return mesh
    sizes = tuple(size for _, size in refined.axes)
    automatic = (AxisType.Auto,) * len(sizes)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(sizes, refined.names, axis_types=automatic)
    return Mesh(mesh.devices.reshape(sizes), refined.names, axis_types=automatic)


def mapped_mesh(mesh: Any, given: Any, program: Program) -> Any:
    """The mesh of the `shard_map` over `mesh`, which may be a refined one of the user's.

    Its names alone, where kernels ask for devices when they are lowered, such as cuDNN's: beside
    them JAX takes no mesh of devices but that of the arguments and results. Without such kernels
    it is the mesh with its devices, since names alone mean those of a mesh that the user has set.
    """
    refined = tuple(mesh.axis_names) != tuple(given.axis_names)
    if not refined or isinstance(mesh, AbstractMesh):
        return mesh
    asks = any(_jit.asks_for_devices(op.primitive) for op in program.ops())
    return mesh.abstract_mesh if asks else mesh


def _shortened(
    value: Value, d: int, wanted: tuple[str, ...], kept: tuple[str, ...], mesh: MeshShape
) -> Diagnostic:
    n, shards = value.shape[d], axes_size(mesh, wanted)
    held = value_bytes(value) // axes_size(mesh, kept)
    local, over = -(-n // shards), "+".join(wanted)
    if n % shards:
        why = f"does not divide into {shards} shards over {over}"
        inside = f"{local} of {local * shards} padded elements"
    else:
        why = f"lies over {over}, and arrays lie on whole axes"
        inside = f"{local} of {n} elements"
    return Diagnostic(
        "boundary",
        value.name or str(value),
        f"dim {d} of size {n} {why}: held {'over ' + '+'.join(kept) if kept else 'whole'} at the "
        f"boundary ({held:,} B per device), {inside} per device inside",
        float(held),
    )
