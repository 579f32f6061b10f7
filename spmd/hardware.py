"""Machines: how many chips are wired how, and how the axes of a mesh lie on the wires.

`Machine.parse` reads a description:

    v5p:4x4x4     a slice of 64 chips in a torus; the sizes count *chips*, as in libtpu
    v3:32x32      1,024 chips, and since a v3 chip is two devices, 2,048 devices (v2 alike)
    v5e:16x16*2   two slices, connected by the data-centre network (DCN)
    h100:8        one node of 8 GPUs on a switch; h100:4x8 is four nodes, connected by InfiniBand
    cpu:8         8 simulated devices

The axes of a mesh are laid as `mesh_utils.create_device_mesh` (behind `jax.make_mesh`) lays them
for real devices, dims of the torus split where axes need it: the last axis chooses first, and
prefers whole dims. Two assumptions go beyond it. On v2 and v3, where JAX keeps the order of
`jax.devices()`, the torus x, y, core is laid by the same algorithm (as the GSPMD paper's programs
had it). And several slices or nodes go to the first axes.

Times follow the ring model of `spmd/topology.py`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from sharding.errors import MeshError, Problem, did_you_mean
from sharding.mesh import MeshShape, split_ref
from spmd.chips import ALIASES, CHIPS, Chip
from spmd.topology import AxisLayout, Dims, axis_layout, collective_time, payload

__all__ = ["CHIPS", "AxisLayout", "Chip", "Machine", "MachineLayout", "wrong_slices"]

_TEXT = re.compile(r"(?P<chip>[\w.-]+):(?P<sizes>\d+(?:x\d+)*)(?:\*(?P<slices>\d+))?")
_EXAMPLES = "write it like v5p:4x4x4, v3:32x32, v5e:16x16*2, h100:8, h100:4x8 or cpu:8"


@dataclass(frozen=True)
class Machine:
    """Chips and the links between them.

    Attributes:
      chip: of which all are.
      shape: chips along each dim of the torus of one slice; for GPUs and CPUs devices per node.
      slices: slices or nodes, connected by the network.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def parse(text: str) -> Machine:
        """The machine that `text` describes.

        Raises:
          MeshError: no such chip, or sizes that it does not come in.
        """
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            why = "a topology is a chip, a colon, and sizes"
            raise MeshError(Problem(f"topology {text!r}", why, _EXAMPLES))
        name = match["chip"].lower()
        sizes = tuple(int(n) for n in match["sizes"].split("x"))
        slices = int(match["slices"] or 1)
        if name not in CHIPS:
            raise MeshError(_unknown(text, name))
        chip = CHIPS[name]
        problem = _sizes_problem(text, chip, sizes, slices)
        if problem:
            raise MeshError(problem)
        if chip.family == "gpu" and len(sizes) == 2:
            return Machine(chip, sizes[1:], sizes[0] * slices)
        return Machine(chip, sizes, slices)

    @property
    def devices(self) -> int:
        """JAX devices: cores on v2 and v3, chips on everything later."""
        return prod(self.shape) * self.chip.cores * self.slices

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Per dim of the torus, whether its ends are linked."""
        if self.chip.wrap == "cubes":
            return (all(n % 4 == 0 for n in self.shape),) * len(self.shape)
        return tuple(self.chip.wrap == "full" and n == self.chip.pod for n in self.shape)

    @property
    def hbm_bytes(self) -> float:
        """Per device."""
        return self.chip.hbm_bytes

    def lay(self, mesh: Any) -> MachineLayout:
        """How the axes of `mesh` (sizes by name, or a mesh) lie on the machine.

        Raises:
          MeshError: the sizes do not multiply to the devices.
        """
        return _lay(self, MeshShape.of(mesh))

    def time(self, kind: str, axes: AxisLayout, size: float) -> float:
        """Seconds of one collective by the ring model.

        Args:
          kind: all_gather, reduce_scatter, all_reduce, all_to_all or permute.
          axes: from `lay(mesh).over("data", ...)`.
          size: bytes of the larger side on one device: what an all_gather returns, and what the
            others take.
        """
        return collective_time(kind, axes, size)

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape))
        if self.chip.family == "gpu":
            return f"{self.chip.name}:{f'{self.slices}x' if self.slices > 1 else ''}{sizes}"
        return f"{self.chip.name}:{sizes}{f'*{self.slices}' if self.slices > 1 else ''}"


class MachineLayout:
    """The axes of one mesh on one machine; by name, as sub-axes, and several together.

    Attributes:
      machine, mesh: of which it is the layout.
      positions: [*mesh sizes, dim of the machine] int: where each device of the mesh lies, as
        (slice or node, x, y, z, core) without the dims that the machine has not.
    """

    def __init__(self, machine: Machine, mesh: MeshShape, positions: np.ndarray):
        self.machine, self.mesh, self.positions = machine, mesh, positions
        self._known: dict[tuple[str, ...], AxisLayout] = {}

    def __getitem__(self, axis: str) -> AxisLayout:
        return self.over(axis)

    def over(self, *axes: str) -> AxisLayout:
        """How a collective over these axes or sub-axes (`tensor:(2)4`), major to minor, lies.

        Raises:
          MeshError: the mesh has no such axis.
        """
        if axes not in self._known:
            group = _group(self, axes)
            self._known[axes] = axis_layout(axes, group, _dims(self.machine), self.machine.chip)
        return self._known[axes]

    def among(self, devices: Sequence[int]) -> AxisLayout:
        """How a group of devices lies, given by their numbers in the mesh, in its order."""
        group = self.positions.reshape(self.mesh.size, -1)[list(devices)]
        return axis_layout(("devices",), group, _dims(self.machine), self.machine.chip)

    def time(self, kind: str, axes: Sequence[str], size: float) -> float:
        """Seconds of one collective over the named axes, see `Machine.time`."""
        return self.machine.time(kind, self.over(*axes), size)

    def wire_time(self, kind: str, axes: Sequence[str], wire_bytes: float) -> float:
        """The same from what one device sends in a flat ring, as `spmd.collectives` counts."""
        return self.time(kind, axes, payload(kind, self.over(*axes).size, wire_bytes))

    def __str__(self) -> str:
        return "\n".join(str(self.over(name)) for name in self.mesh.names)


def _unknown(text: str, name: str) -> Problem:
    near = f" (did you mean {ALIASES[name]!r}?)" if name in ALIASES else did_you_mean(name, CHIPS)
    return Problem(
        f"topology {text!r}",
        f"there is no chip {name!r}{near}",
        f"the chips are {', '.join(CHIPS)}",
    )


def _sizes_problem(text: str, chip: Chip, sizes: tuple[int, ...], slices: int) -> Problem | None:
    what = f"topology {text!r}"
    if 0 in sizes or slices == 0:
        return Problem(what, "a size is 0, and every dim has at least one chip", _EXAMPLES)
    if chip.rank and len(sizes) != chip.rank:
        why = f"{chip.name} chips are wired in a {chip.rank}-d torus, and {len(sizes)} sizes are"
        example = "x".join("4" * chip.rank)
        return Problem(what, f"{why} given", f"give {chip.rank} sizes, e.g. {chip.name}:{example}")
    if chip.rank:
        return None
    if chip.family == "cpu" and len(sizes) != 1:
        return Problem(what, "simulated devices have no wires", f"write cpu:{prod(sizes)}")
    in_node = sizes[len(sizes) - 1]
    if chip.family == "gpu" and (len(sizes) > 2 or in_node > chip.node):
        total = prod(sizes)
        why = f"a node of {chip.name} holds at most {chip.node} GPUs, and {in_node} are given"
        why = why if len(sizes) <= 2 else "sizes are nodes x GPUs per node"
        nodes = -(-total // chip.node)
        return Problem(what, why, f"write nodes x GPUs, e.g. {chip.name}:{nodes}x{chip.node}")
    return None


class _Stand:
    """What `mesh_utils` reads of a device. v2 and v3 pass their cores off as a dim of a torus."""

    platform, core_on_chip = "tpu", 0

    def __init__(self, index: int, coords: tuple[int, ...], kind: str):
        self.id, self.coords, self.device_kind = index, coords, kind


@functools.lru_cache(maxsize=64)
def _lay(machine: Machine, mesh: MeshShape) -> MachineLayout:
    if mesh.size != machine.devices:
        raise MeshError(_wrong_size(machine, mesh))
    # Several axes may cross the same network, in a mesh whose devices are in no regular order.
    alone, counts = len(mesh.across) == 1, [n for _, n in mesh.across]
    if counts and prod(counts) != machine.slices and (alone or max(counts) > machine.slices):
        raise MeshError(wrong_slices(machine, mesh))
    sizes = [n for _, n in mesh.axes]
    outer = _outer(machine, mesh)
    inner = [n // o for n, o in zip(sizes, outer, strict=True)]
    found = _inner_positions(machine, inner)  # [*inner, dims]
    full = np.empty((*outer, *found.shape[:-1], 1 + found.shape[-1]), dtype=np.int32)
    full[..., 1:] = found
    slice_of = np.arange(machine.slices, dtype=np.int32).reshape(outer)
    full[..., 0] = slice_of.reshape(*outer, *(1,) * len(inner))
    rank = len(sizes)
    order = [d for i in range(rank) for d in (i, rank + i)]
    positions = full.transpose(*order, 2 * rank).reshape(*sizes, -1)
    return MachineLayout(machine, mesh, positions)


def _wrong_size(machine: Machine, mesh: MeshShape) -> Problem:
    product = " x ".join(f"{name}={n}" for name, n in mesh.axes)
    cores = f", {machine.chip.cores} per chip" if machine.chip.cores > 1 else ""
    count, fix = machine.devices, f"use sizes whose product is {machine.devices:,}"
    if mesh.axes:
        name, size = mesh.axes[0]
        rest = mesh.size // size
        if count % rest == 0:
            fix += f", e.g. {name}={count // rest}"
    return Problem(
        f"mesh {mesh} on {machine}",
        f"{product} = {mesh.size:,} devices, and {machine} has {count:,}{cores}",
        fix,
    )


def wrong_slices(machine: Machine, mesh: MeshShape) -> Problem:
    """What is wrong with a mesh whose axes cross another number of slices or nodes."""
    axes = " x ".join(f"{name}={n}" for name, n in mesh.across)
    asked = prod(n for _, n in mesh.across)
    return Problem(
        f"mesh {mesh.placed_text()} on {machine}",
        f"its axes cross the network between {axes} = {asked} slices or nodes, and {machine} has"
        f" {machine.slices}",
        f"name a machine of {asked} slices or nodes, with {mesh.size // asked} devices each, or let"
        f" the axes with @dcn have the product {machine.slices}",
    )


def _outer(machine: Machine, mesh: MeshShape) -> list[int]:
    """Per axis, its part over slices or nodes: as the mesh says; where it does not, the first axes
    take as much as they can."""
    along = [mesh.nodes_along(name) for name in mesh.names]
    even = all(size % part == 0 for (_, size), part in zip(mesh.axes, along, strict=True))
    if mesh.across and even and prod(along) == machine.slices:
        return along
    left, outer = machine.slices, []
    for _, size in mesh.axes:
        outer.append(gcd(left, size))
        left //= outer[-1]
    return outer


def _inner_positions(machine: Machine, sizes: Sequence[int]) -> np.ndarray:
    """[*sizes, dims of one slice]: where each device lies."""
    if machine.chip.family != "tpu":
        return np.arange(prod(sizes)).reshape(*sizes, 1)
    dims = (*machine.shape, *([machine.chip.cores] if machine.chip.cores > 1 else []))
    coords = list(np.ndindex(*(*dims, *(1,) * (3 - len(dims)))))
    cores = machine.chip.cores > 1
    kind = "torus" if cores else machine.chip.kind
    # Device order is x fastest, which the handlers of small v5e and v6e slices rely on.
    coords.sort(key=lambda c: tuple(reversed(c)))
    stands = [_Stand(i, c, kind) for i, c in enumerate(coords)]
    placed = mesh_utils.create_device_mesh(sizes, stands, allow_split_physical_axes=True)
    flat = np.array([d.coords[: len(dims)] for d in placed.flat], dtype=np.int32)
    return flat.reshape(*sizes, len(dims))


def _dims(machine: Machine) -> Dims:
    """Column of `positions` -> (dim, size, wrapped)."""
    if machine.chip.family != "tpu":
        return {0: ("network", machine.slices, False), 1: ("switch", prod(machine.shape), False)}
    rows = [("network", machine.slices, False)]
    rows += [(n, s, w) for n, s, w in zip("xyz", machine.shape, machine.wraps, strict=False)]
    if machine.chip.cores > 1:
        rows.append(("core", machine.chip.cores, False))
    return dict(enumerate(rows))


def _group(layout: MachineLayout, axes: tuple[str, ...]) -> np.ndarray:
    """[size, dims]: positions of the first group of devices that differ along `axes` only."""
    shape, sizes = dict(layout.mesh.axes), [n for _, n in layout.mesh.axes]
    strides = {name: prod(sizes[i + 1 :]) for i, name in enumerate(layout.mesh.names)}
    index = np.zeros(1, dtype=np.int64)
    for ref in axes:
        name, pre, part = (ref, 1, None) if ref in shape else split_ref(ref)
        if name not in shape:
            why = f"the mesh {layout.mesh} has no such axis{did_you_mean(name, shape)}"
            raise MeshError(Problem(f"axis {ref!r}", why, "name axes of the mesh"))
        size = shape[name] if part is None else part
        step = strides[name] * (shape[name] // (pre * size))
        index = (index[:, None] + np.arange(size) * step).reshape(-1)
    return layout.positions.reshape(-1, layout.positions.shape[-1])[index]
