"""`data=2@dcn,fsdp=4`: the axes of a mesh as command lines name them, with their sizes, and which
of them lie between slices or nodes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from sharding.errors import Problem, did_you_mean

__all__ = ["mesh_text", "parse_mesh", "read_across"]

_PART = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*(-?\d{1,9})\s*(@\s*\w*)?\s*", re.ASCII)
_LONGEST = 200  # characters of a part that are shown


def parse_mesh(
    text: str, shown: str, known: Collection[str] = (), fill: bool = False
) -> tuple[dict[str, int], list[Problem]]:
    """The sizes by axis, and what is wrong with them.

    Args:
      text: `data=2@dcn,fsdp=4`.
      shown: how messages repeat it, with its option.
      known: the axes that there are; any without.
      fill: whether one axis may have the size -1.
    """
    mesh: dict[str, int] = {}
    problems = []
    for part in text.split(","):
        match = _PART.fullmatch(part)
        if not match:
            part = part if len(part) <= _LONGEST else f"{part[: _LONGEST - 3]}..."
            why = f"{part!r} is not of the form axis=size"
            problems.append(Problem(shown, why, "write it like data=2,tensor=4"))
            continue
        name, size = match[1], int(match[2])
        if known and name not in known:
            why = f"{name!r} is no mesh axis{did_you_mean(name, known)}"
            problems.append(Problem(shown, why, f"the axes are {', '.join(known)}"))
        if name in mesh:
            problems.append(Problem(shown, f"axis {name!r} is given twice", "give it one size"))
        if size == 0 or size < (-1 if fill else 0):
            why = f"axis {name!r} has size {size}, and an axis holds at least one device"
            fix = "use 1 or more" + (", or -1 for all that is left" if fill else "")
            problems.append(Problem(shown, why, fix))
        if match[3] and match[3] != "@dcn":
            why = f"{match[3]!r} is no network; @dcn is the one between slices or nodes"
            problems.append(Problem(shown, why, f"write {name}={size}@dcn, or {name}={size}"))
        mesh[name] = size
    if list(mesh.values()).count(-1) > 1:
        why = "-1 stands for all devices that are left, so only one axis can have it"
        problems.append(Problem(shown, why, "give all axes but one a size"))
    return mesh, problems


def read_across(text: str, mesh: Mapping[str, int]) -> dict[str, int]:
    """Of the axes of `mesh`, those that the text puts between slices or nodes, with their sizes."""
    matches = [_PART.fullmatch(part) for part in text.split(",")]
    names = [match[1] for match in matches if match and match[3]]
    return {name: mesh[name] for name in names if mesh.get(name, 1) > 1}


def mesh_text(mesh: Mapping[str, int], across: Mapping[str, int]) -> str:
    """What `parse_mesh` and `read_across` read as these."""
    return ",".join(f"{n}={size}{'@dcn' if n in across else ''}" for n, size in mesh.items())
