"""Compiles a partitioned function for TPUs that nobody has to have, and says what became of it.

    python -m spmd aot train:step --args train:shapes --mesh data=16,tensor=4 --topology v5p:4x4x4

Exit code 1: the program does not fit into the memory of a device.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rich.console import Console

from spmd.cli import program
from spmd.cli.load import check_fit, read_mesh
from spmd.cli.write import check_writable

NAME = "aot"
HELP = "compile for a TPU topology, without a TPU: memory, collectives, predicted time"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    program.add_arguments(parser)
    parser.add_argument("--topology", required=True, help="v5p:4x4x4, v3:32x32, v5e:16x16*2 ...")
    parser.add_argument("--model-flops", type=float, help="FLOPs of a call, for the utilisation")
    parser.add_argument("--json", metavar="FILE", help="write everything that is printed, and more")


def run(given: argparse.Namespace) -> int:
    """The exit code; raises SpmdError for what is wrong with the command line or the program."""
    from spmd.hardware import Machine

    mesh, machine = read_mesh(given.mesh), Machine.parse(given.topology)
    check_fit(mesh, machine)
    check_writable("--json", given.json)
    asked = program.read(given)
    found = with_progress(
        asked.function, *asked.args, mesh=mesh, topology=machine, kwargs=asked.kwargs,
        model_flops=given.model_flops, **asked.options,
    )  # fmt: skip
    print(found)
    if given.json:
        found.write(given.json)
    return 0 if found.fits else 1


def with_progress(function: Any, *args: Any, **options: Any) -> Any:
    """`spmd.aot`, with the name of the phase shown on a terminal while it lasts."""
    from spmd.ahead.compile import PHASES, aot

    console = Console(stderr=True)
    with console.status("starting") as status:

        def begins(phase: str) -> None:
            status.update(f"{phase} ({PHASES.index(phase) + 1} of {len(PHASES)})")

        found = aot(function, *args, progress=begins, **options)
    took = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found.phases)
    print(took, file=sys.stderr)
    return found
