"""Partitions a function on a mesh that nobody has to have, and reports what every device does.

    python -m spmd report train:step --args train:shapes --mesh data=2,tensor=4 --machine v5e:2x4

Nothing is compiled or run: no device is needed.
"""

from __future__ import annotations

import argparse

from spmd.cli import program
from spmd.cli.load import check_fit, read_mesh
from spmd.cli.write import check_writable

NAME = "report"
HELP = "shardings, collectives, memory and predicted time of a partitioned program"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    program.add_arguments(parser)
    parser.add_argument("--machine", help="predict times on it: v5e:2x4, v5p:4x4x4, h100:8 ...")
    parser.add_argument("--html", metavar="FILE", help="write the page")
    parser.add_argument("--json", metavar="FILE", help="write the data, for `plan diff`")


def run(given: argparse.Namespace) -> int:
    """The exit code: 1 where the program does not fit into the memory of a device."""
    from spmd.hardware import Machine

    mesh = read_mesh(given.mesh)
    machine = Machine.parse(given.machine) if given.machine else None
    if machine is not None:
        check_fit(mesh, machine)
    check_writable("--html", given.html)
    check_writable("--json", given.json)
    # Through a stage: the function's own arguments may be called anything.
    found = program.read(given).traced(mesh).report(machine)
    print(found)
    for path in filter(None, (given.html, given.json)):
        with open(path, "w", encoding="utf-8") as file:
            file.write(found.to_html() if path == given.html else found.to_json())
    too_much = found.memory.capacity and found.memory.peak > found.memory.capacity
    return 1 if too_much else 0
