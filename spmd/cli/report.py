"""Partitions a function on a mesh that nobody has to have, and reports what every device does.

    python -m spmd report train:step --args train:shapes --mesh data=2,tensor=4 --machine v5e:2x4

Nothing is compiled or run: no device is needed.
"""

from __future__ import annotations

import argparse
from typing import Any

from sharding.errors import Problem
from spmd.cli.load import UsageError, call, load, read_arguments, read_mesh
from spmd.cli.write import check_writable

NAME = "report"
HELP = "shardings, collectives, memory and predicted time of a partitioned program"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("function", metavar="MODULE:FUNCTION", help="written as for one device")
    parser.add_argument(
        "--args", required=True, metavar="MODULE:FUNCTION",
        help="returns the abstract arguments: a tuple, or (args, kwargs)",
    )  # fmt: skip
    parser.add_argument("--mesh", required=True, metavar="AXES", help="data=2,tensor=4")
    parser.add_argument("--machine", help="predict times on it: v5e:2x4, v5p:4x4x4, h100:8 ...")
    parser.add_argument(
        "--options", metavar="MODULE:FUNCTION",
        help="returns a dict of options of spmd.jit: in_shardings, axis_rules, donate_argnums ...",
    )  # fmt: skip
    parser.add_argument("--html", metavar="FILE", help="write the page")
    parser.add_argument("--json", metavar="FILE", help="write the data, for `plan diff`")


def run(given: argparse.Namespace) -> int:
    """The exit code: 1 where the program does not fit into the memory of a device."""
    import spmd
    from spmd.hardware import Machine

    mesh = read_mesh(given.mesh)
    machine = Machine.parse(given.machine) if given.machine else None
    if machine is not None:
        machine.lay(mesh)  # says what is wrong with the mesh before anything is imported
    check_writable("--html", given.html)
    check_writable("--json", given.json)
    function = load("", given.function)
    if not callable(function):
        why = f"it is a {type(function).__name__}"
        raise UsageError(Problem(given.function, why, "name a function"))
    args, kwargs = read_arguments("--args", given.args)
    options = _options(given.options) if given.options else {}
    # Through a stage: the function's own arguments may be called anything.
    traced = spmd.jit(function, mesh=mesh, **options).trace(*args, **kwargs)
    found = traced.report(machine)
    print(found)
    for path in filter(None, (given.html, given.json)):
        with open(path, "w", encoding="utf-8") as file:
            file.write(found.to_html() if path == given.html else found.to_json())
    too_much = found.memory.capacity and found.memory.peak > found.memory.capacity
    return 1 if too_much else 0


def _options(text: str) -> dict[str, Any]:
    found = call("--options", text)
    if not isinstance(found, dict) or "mesh" in found:
        why = "it returns a mesh" if isinstance(found, dict) else f"it is a {type(found).__name__}"
        fix = "return a dict of options of spmd.jit, such as in_shardings, without the mesh"
        raise UsageError(Problem(f"--options {text}", why, fix))
    return found
