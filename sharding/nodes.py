"""Which slice or node a device is part of, and which mesh axes cross the network between them.

Slices of TPUs and nodes of GPUs say it themselves. Simulated devices are told by `SPMD_NODES`, how
many nodes they stand for, in the order of `jax.devices()`; see `spmd.simulate`.
"""

import os
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh

__all__ = ["along", "node_of", "simulated"]


def simulated() -> int:
    """How many nodes simulated devices stand for."""
    text = os.environ.get("SPMD_NODES", "")
    return int(text) if text.isdigit() and int(text) else 1


def node_of(device: Any) -> int:
    """The number of the slice or node of a device; 0 where there is one, or nobody says."""
    if device.platform != "cpu":
        return getattr(device, "slice_index", None) or 0
    if simulated() == 1:
        return 0
    order = _order()
    return order[device] * simulated() // len(order) if device in order else 0


def along(mesh: Any) -> tuple[tuple[str, int], ...]:
    """The axes of a mesh that cross the network, with how many slices or nodes lie along each.
    Abstract meshes lie nowhere.

    Args:
      mesh: a `jax.sharding.Mesh` or `AbstractMesh`.
    """
    return () if isinstance(mesh, AbstractMesh) else _along(mesh, simulated())


@lru_cache(maxsize=256)
def _along(mesh: Any, simulated: int) -> tuple[tuple[str, int], ...]:
    first = mesh.devices.flat[0] if mesh.devices.size else None
    if first is None or first.platform == "cpu" and simulated == 1:
        return ()
    placed = np.vectorize(node_of, otypes=[int])(mesh.devices)
    found = []
    for axis, name in enumerate(mesh.axis_names):
        lines = np.moveaxis(placed, axis, -1).reshape(-1, placed.shape[axis])
        count = max(len(set(line)) for line in lines.tolist())
        if count > 1:
            found.append((name, count))
    return tuple(found)


@lru_cache(maxsize=1)
def _order() -> dict[Any, int]:
    return {device: number for number, device in enumerate(jax.devices("cpu"))}
