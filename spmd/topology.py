"""How the axes of a mesh use the links of a machine, and what collectives take on them.

Times follow the ring model (the JAX scaling book, "Sharded Matrices"): on a torus all dims of a
group work at once, one that wraps around in both directions. A group that spans several levels
works hierarchically: between slices or nodes on the part that each device has, then inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from spmd.chips import Chip

__all__ = ["AxisLayout", "Wire", "collective_time", "payload"]

SHARE = {"all_reduce": 2.0}  # of (k-1)/k of the payload, what a device sends
# column of positions -> (dim, size, wrapped)
Dims = Mapping[int, tuple[str, int, bool]]


@dataclass(frozen=True)
class Wire:
    """What a mesh axis uses of one dim of the machine.

    Attributes:
      dim: "x", "y", "z", "core", "switch" or "network".
      extent: positions along it.
      stride: distance between neighbours; that many groups share each link.
      wrapped: whether the positions form a ring.
      bandwidth: bytes/s that a device can send along it, both ways where it is wrapped.
      latency: seconds per hop.
    """

    dim: str
    extent: int
    stride: int
    wrapped: bool
    bandwidth: float
    latency: float

    @property
    def steps(self) -> int:
        """Hops that data makes to reach everybody."""
        if self.dim in ("switch", "network"):
            return 1
        return self.stride * (self.extent // 2 if self.wrapped else self.extent - 1)

    def __str__(self) -> str:
        how = "ring" if self.wrapped else "line"
        how = how if self.dim in ("x", "y", "z") else ""
        apart = f" stride {self.stride}" if self.stride > 1 else ""
        return f"{self.dim}:{self.extent}{' ' * bool(how)}{how}{apart}"


@dataclass(frozen=True)
class AxisLayout:
    """How one mesh axis, or several together, lie on the machine.

    Attributes:
      axes: names, major to minor.
      size: devices in a group.
      wires: per dim that the group extends over.
      hops: mean number of links between neighbours in the ring of the group; 1.0 is best, and an
        open line has almost 2, since its ends are far apart.
      max_hops: the most.
    """

    axes: tuple[str, ...]
    size: int
    wires: tuple[Wire, ...]
    hops: float
    max_hops: int

    @property
    def crosses_network(self) -> bool:
        """Whether groups span slices or nodes."""
        return any(w.dim == "network" for w in self.wires)

    @property
    def bandwidth(self) -> float:
        """Bytes/s that a device sends in a ring over the group, on its slowest level of links; inf
        for one device."""
        for level in (("network",), ("x", "y", "z", "switch"), ("core",)):
            if wires := [w for w in self.wires if w.dim in level]:
                return sum(w.bandwidth for w in wires)
        return float("inf")

    @property
    def latency(self) -> float:
        """Seconds per hop, of the slowest kind of link."""
        return max((w.latency for w in self.wires), default=0.0)

    @property
    def badness(self) -> float:
        """1.0: neighbours are one link apart and no link is shared; `hops` times the largest
        stride otherwise. Crossing the network is told apart, by `crosses_network`."""
        return self.hops * max((w.stride for w in self.wires if w.dim != "network"), default=1)

    def __str__(self) -> str:
        lies = ", ".join(map(str, self.wires)) or "one device"
        return (
            f"{'+'.join(self.axes)}={self.size} on {lies}; {self.bandwidth / 1e9:.3g} GB/s,"
            f" {self.hops:.2f} hops"
        )


def collective_time(kind: str, layout: AxisLayout, size: float) -> float:
    """Seconds of one collective; see `Machine.time`."""
    if layout.size <= 1:
        return 0.0
    wires = layout.wires
    if kind == "permute":
        slowest = max(size / _one_way(w) for w in wires)
        return max(slowest, layout.max_hops * layout.latency)
    far = [w for w in wires if w.dim == "network"]
    near = [w for w in wires if w.dim != "network"]
    if kind == "all_to_all":
        inside = max((_all_to_all(w, size) for w in near), default=0.0)
        return sum(_all_to_all(w, size) for w in far) + inside
    torus, cores = [w for w in near if w.dim != "core"], [w for w in near if w.dim == "core"]
    per_core = size / prod(w.extent for w in cores)
    # What has arrived over a link passes on to the other core while the rest arrives.
    inside = max(_gather(torus, per_core), _gather(cores, size))
    outside = _gather(far, size / prod(w.extent for w in near))
    return SHARE.get(kind, 1.0) * (inside + outside)


def payload(kind: str, shards: int, wire_bytes: float) -> float:
    """Bytes of the larger side of a collective, from those that a ring algorithm sends."""
    if shards <= 1 or kind == "permute":
        return wire_bytes
    return wire_bytes * shards / ((shards - 1) * SHARE.get(kind, 1.0))


def _one_way(wire: Wire) -> float:
    """Bytes/s in one direction, when all groups on the link send."""
    return wire.bandwidth / (2 if wire.wrapped else 1)


def _gather(wires: Sequence[Wire], size: float) -> float:
    """Seconds until everybody has `size` bytes, of which everybody had an equal part."""
    if not wires:
        return 0.0
    shards = prod(w.extent for w in wires)
    sent = size * (shards - 1) / shards
    return max(
        sent / sum(w.bandwidth for w in wires), sum(w.steps * w.latency for w in wires)
    )  # fmt: skip


def _all_to_all(wire: Wire, size: float) -> float:
    """Half of the data crosses the middle of a line or ring; a switch has no middle."""
    k = wire.extent
    through = (k - 1) / k if wire.dim in ("switch", "network") else k / 4
    return max(size * through / wire.bandwidth, wire.steps * wire.latency)


def axis_layout(axes: tuple[str, ...], group: np.ndarray, dims: Dims, chip: Chip) -> AxisLayout:
    """The layout of a group of devices.

    Args:
      group: [devices, dims of the machine] int, where each lies, in the order of the group.
    """
    wires = []
    for column, (dim, size, wraps) in dims.items():
        taken = np.unique(group[:, column])
        if len(taken) > 1:
            wires.append(_wire(chip, dim, size, wraps, taken))
    hops = _hops(group, dims)
    mean = float(hops.mean()) if len(group) > 1 else 0.0
    return AxisLayout(axes, len(group), tuple(wires), mean, int(hops.max()))


def _wire(chip: Chip, dim: str, size: int, wraps: bool, taken: np.ndarray) -> Wire:
    extent = len(taken)
    stride = -(-int(taken[-1] - taken[0]) // (extent - 1))
    if dim == "network":
        return Wire(dim, extent, 1, False, chip.network_bandwidth, chip.network_latency)
    if dim == "switch":
        return Wire(dim, extent, 1, False, chip.link_bandwidth, chip.hop_latency)
    if dim == "core":
        # Between the memories of one chip: each byte is read once and written once.
        return Wire(dim, extent, 1, False, chip.hbm_bandwidth / 2, chip.hop_latency)
    wrapped = wraps and stride * extent == size and extent > 2
    # The cores of a chip share its links.
    bandwidth = chip.link_bandwidth / chip.cores / stride * (2 if wrapped else 1)
    return Wire(dim, extent, stride, wrapped, bandwidth, chip.hop_latency)


def _hops(group: np.ndarray, dims: Dims) -> np.ndarray:
    """Links between each device of a group and the next one, the first after the last."""
    steps = np.abs(np.roll(group, -1, axis=0) - group)
    total = np.zeros(len(group), dtype=np.int64)
    for column, (dim, size, wraps) in dims.items():
        step = steps[:, column]
        if dim in ("network", "switch"):
            total += step > 0
        else:
            total += np.minimum(step, size - step) if wraps else step
    return total
