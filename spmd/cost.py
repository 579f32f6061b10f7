"""What data movement and redundant work cost, in bytes on a link.

One unit keeps plans comparable: a byte sent over a link. Computation and memory traffic enter by
the ratio of a TPU v5p (2.8 TB/s HBM, 180 GB/s per axis both ways; the JAX scaling book,
"TPU specs"). Collectives follow the ring model of Thakur et al. (2005). Those over axes that cross
the network between slices or nodes work in two levels, between them on the part that each device
of one has, and what is sent there is dearer by the same chip's ratio.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sharding.mesh import MeshShape, axis_size

LINK_BYTES_PER_S = 1.8e11
# Far below the chip's own ratio (2,550): a matmul that every device repeats in order to save a
# collective is paid at every size of mesh, the collective only once.
FLOPS_PER_LINK_BYTE = 8.0
NETWORK_BYTES_PER_S = 2.5e10 / 4  # of a host, which four chips share
HBM_BYTES_PER_LINK_BYTE = 2.8e12 / LINK_BYTES_PER_S

# Memory that a copy takes for a long time, from the way forward to the way back.
HELD_PER_LINK_BYTE = 8.0

_DEARER = LINK_BYTES_PER_S / NETWORK_BYTES_PER_S
# Enough to prefer one collective over two of the same bytes, too little to prefer more bytes.
STEP_BYTES = 64.0


class Traits(NamedTuple):
    """What plans depend on of the chip and its compiler.

    Attributes:
      waits: what a device waits for of what collectives of a kind send, as a part of it; of kinds
        that are not there, for all of it.
      lanes: elements of an array's last dim that are worked on at once, however few there are.
    """

    waits: Mapping[str, float] = {}
    lanes: int = 1


# Of simulated devices, and of chips that nobody described.
ANY = Traits()


def all_gather(out_bytes: float, shards: int) -> float:
    """Wire bytes per device: every device receives all shards but its own."""
    return out_bytes * (shards - 1) / shards


def reduce_scatter(in_bytes: float, shards: int) -> float:
    return in_bytes * (shards - 1) / shards


def all_reduce(size: float, shards: int) -> float:
    """A reduce-scatter and an all-gather."""
    return 2 * size * (shards - 1) / shards


def all_to_all(size: float, shards: int) -> float:
    return size * (shards - 1) / shards


def compute(flops: float, hbm_bytes: float) -> float:
    """Local work, in link bytes."""
    return flops / FLOPS_PER_LINK_BYTE + hbm_bytes / HBM_BYTES_PER_LINK_BYTE


def network_bytes(kind: str, axes: Sequence[str], wire: float, mesh: MeshShape) -> float:
    """Of what one device sends in a collective, what goes over the network.

    Args:
      kind: all_gather, reduce_scatter, all_reduce, all_to_all or permute.
      axes: axis references of `mesh`.
      wire: all that it sends, as the functions above count it.
    """
    nodes = inside = 1
    for axis in axes:
        along = mesh.nodes_along(axis)
        nodes, inside = nodes * along, inside * (axis_size(mesh, axis) // along)
    if nodes == 1:
        return 0.0
    if kind == "permute":
        return wire  # of the devices at the border, which all others wait for
    shards = nodes * inside
    share = wire * shards / (shards - 1) * (nodes - 1) / nodes
    return share if kind == "all_to_all" else share / inside


def priced(kind: str, axes: Sequence[str], wire: float, mesh: MeshShape) -> float:
    """What one device sends in a collective, in bytes on a link; see `network_bytes`."""
    if not mesh.across:
        return wire
    return wire + network_bytes(kind, axes, wire, mesh) * (_DEARER - 1)
