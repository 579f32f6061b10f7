"""`--mesh data=2@dcn,fsdp=4`: axes, their sizes, and which lie between slices or nodes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod

from sharding.errors import Problem, did_you_mean
from training.errors import quoted

__all__ = ["AXES", "across_problem", "mesh_text", "read_across", "read_mesh"]

AXES = ("data", "fsdp", "tensor", "sequence", "expert", "stage")
_PART = re.compile(r"\s*([a-z]+)\s*=\s*(-?\d{1,9})\s*(@\s*[a-z]*)?\s*")


def read_mesh(text: str, devices: int) -> tuple[dict[str, int], list[Problem]]:
    """The sizes that `--mesh` names, with -1 filled in; and what is wrong with it."""
    shown = f"--mesh {quoted(text)}"
    mesh, problems = _parse(text, shown)
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


def read_across(text: str, mesh: Mapping[str, int]) -> dict[str, int]:
    """Of the axes of `mesh`, those that `--mesh` puts between slices or nodes, with their sizes."""
    matches = [_PART.fullmatch(part) for part in text.split(",")]
    names = [match[1] for match in matches if match and match[3]]
    return {name: mesh[name] for name in names if mesh.get(name, 1) > 1}


def mesh_text(mesh: Mapping[str, int], across: Mapping[str, int]) -> str:
    """What `read_mesh` and `read_across` read as these."""
    return ",".join(f"{n}={size}{'@dcn' if n in across else ''}" for n, size in mesh.items())


def _parse(text: str, shown: str) -> tuple[dict[str, int], list[Problem]]:
    mesh: dict[str, int] = {}
    problems = []
    for part in text.split(","):
        match = _PART.fullmatch(part)
        if not match:
            why = f"{quoted(part)!r} is not of the form axis=size"
            problems.append(Problem(shown, why, "write it like data=2,tensor=4"))
            continue
        name, size = match[1], int(match[2])
        if name not in AXES:
            why = f"{name!r} is no mesh axis{did_you_mean(name, AXES)}"
            problems.append(Problem(shown, why, f"the axes are {', '.join(AXES)}"))
        if name in mesh:
            problems.append(Problem(shown, f"axis {name!r} is given twice", "give it one size"))
        if size == 0 or size < -1:
            why = f"axis {name!r} has size {size}, and an axis holds at least one device"
            problems.append(Problem(shown, why, "use 1 or more, or -1 for all that is left"))
        if match[3] and match[3] != "@dcn":
            why = f"{match[3]!r} is no network; @dcn is the one between slices or nodes"
            problems.append(Problem(shown, why, f"write {name}={size}@dcn, or {name}={size}"))
        mesh[name] = size
    if list(mesh.values()).count(-1) > 1:
        why = "-1 stands for all devices that are left, so only one axis can have it"
        problems.append(Problem(shown, why, "give all axes but one a size"))
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
