"""Meshes over several slices or nodes: which axes lie inside of one, and which between them."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd, prod
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from sharding.errors import MeshError, Problem
from sharding.nodes import node_of

__all__ = ["count_nodes", "make_mesh"]


def count_nodes() -> int:
    """How many slices or nodes the devices of this run lie in."""
    return len({node_of(device) for device in jax.devices()})


def make_mesh(sizes: Mapping[str, int], across: Mapping[str, int]) -> Mesh:
    """A mesh of all devices, in an order that suits how they are wired.

    Args:
      sizes: of the axes, major to minor.
      across: of axes that lie between slices or nodes, their sizes there; the rest of such an axis
        lies inside. Without any the first axes take as much as they can.

    Raises:
      MeshError: there is another number of slices or nodes.
    """
    types = (AxisType.Auto,) * len(sizes)
    by_node: dict[int, list[Any]] = {}
    for device in jax.devices():
        by_node.setdefault(node_of(device), []).append(device)
    if len(by_node) == 1 and not across:
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types)
    outer = _outer(sizes, across, len(by_node))
    if prod(outer) != len(by_node):
        raise MeshError(_wrong_nodes(sizes, dict(zip(sizes, outer, strict=True)), len(by_node)))
    inner = [size // n for size, n in zip(sizes.values(), outer, strict=True)]
    each = prod(inner)
    fewest = min(map(len, by_node.values()))
    if fewest < each:
        text = ", ".join(f"{name}={size}" for name, size in sizes.items())
        why = f"it takes {each} devices of each slice or node, and one has {fewest}"
        raise MeshError(Problem(f"mesh {text}", why, "use a smaller mesh"))
    parts = [_inside(inner, by_node[node][:each]) for node in sorted(by_node)]
    rank = len(inner)
    blocks = np.array(parts, dtype=object).reshape(*outer, *inner)
    order = [d for i in range(rank) for d in (i, rank + i)]
    devices = blocks.transpose(order).reshape(tuple(sizes.values()))
    return Mesh(devices, tuple(sizes), axis_types=types)


def _outer(sizes: Mapping[str, int], across: Mapping[str, int], nodes: int) -> list[int]:
    if across:
        return [across.get(name, 1) for name in sizes]
    left, outer = nodes, []
    for size in sizes.values():
        outer.append(gcd(left, size))
        left //= outer[-1]
    return outer


def _inside(sizes: list[int], devices: list[Any]) -> np.ndarray:
    """The devices of one slice or node, in an order that suits how they are wired."""
    if devices[0].platform == "cpu":
        return np.array(devices, dtype=object).reshape(sizes)
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def _wrong_nodes(sizes: Mapping[str, int], outer: Mapping[str, int], nodes: int) -> Problem:
    text = ", ".join(
        f"{name}={size}" + (f"@dcn ({outer[name]} ways)" if outer[name] > 1 else "")
        for name, size in sizes.items()
    )
    return Problem(
        f"mesh {text}",
        f"its axes cross the network between {prod(outer.values())} slices or nodes, and the"
        f" devices lie in {nodes}",
        f"put axes with the product {nodes} on the network, e.g. data={nodes}@dcn",
    )
