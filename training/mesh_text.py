"""`--mesh data=2@dcn,fsdp=4` on the devices and nodes that there are."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from sharding.errors import Problem
from spmd.mesh_text import parse_mesh
from training.errors import quoted

__all__ = ["AXES", "across_problem", "read_mesh"]

AXES = ("data", "fsdp", "tensor", "sequence", "expert", "stage")


def read_mesh(text: str, devices: int) -> tuple[dict[str, int], list[Problem]]:
    """The sizes that `--mesh` names, with -1 filled in; and what is wrong with it."""
    shown = f"--mesh {quoted(text)}"
    mesh, problems = parse_mesh(text, shown, AXES, fill=True)
    if problems:
        return mesh, problems
    known = prod(size for size in mesh.values() if size != -1)
    product = " x ".join(f"{name}={size}" for name, size in mesh.items())
    if -1 in mesh.values() and devices % known == 0:
        mesh = {name: devices // known if size == -1 else size for name, size in mesh.items()}
    elif -1 in mesh.values():
        why = f"the other sizes make {known}, which does not divide the {devices} devices"
        problems.append(Problem(shown, why, f"use sizes whose product divides {devices}"))
    elif known != devices:
        why = f"{product} needs {known} devices and there are {devices}"
        fix = f"use sizes with the product {devices}, or -1 for one of them"
        problems.append(Problem(shown, why, fix))
    return mesh, problems


def across_problem(
    text: str, across: Mapping[str, int], nodes: int | None, processes: int
) -> Problem | None:
    """What is wrong with the axes between slices or nodes.

    Args:
      nodes: how many there are; None where they are simulated, and whole processes stand for them.
    """
    count = prod(across.values())
    if not across or count == nodes:
        return None
    axes = " x ".join(f"{name}={size}@dcn" for name, size in across.items())
    if nodes is not None:
        there = "they are all in one slice or node" if nodes == 1 else f"they are in {nodes}"
        why = f"{axes} needs devices in {count} slices or nodes, and {there}"
        fix = f"give @dcn axes the product {nodes}" if nodes > 1 else "leave @dcn out"
        return Problem(f"--mesh {text}", why, fix)
    if processes == 1 or processes % count == 0:
        return None
    why = f"{axes} needs {count} nodes, and {processes} processes do not make {count} alike"
    fix = f"start {count} processes, or give @dcn axes a product that divides {processes}"
    return Problem(f"--mesh {text}", why, fix)
