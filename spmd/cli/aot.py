"""Compiles a partitioned function for TPUs that nobody has to have, and says what became of it.

    python -m spmd aot train:step --args train:shapes --mesh data=16,tensor=4 --topology v5p:4x4x4

Exit code 1: the program does not fit into the memory of a device.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from sharding.errors import Problem
from spmd.cli.load import UsageError, call, load, read_arguments, read_mesh

NAME = "aot"
HELP = "compile for a TPU topology, without a TPU: memory, collectives, predicted time"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("function", metavar="MODULE:FUNCTION", help="written as for one device")
    parser.add_argument(
        "--args", required=True, metavar="MODULE:FUNCTION",
        help="returns the abstract arguments: a tuple, or (args, kwargs)",
    )  # fmt: skip
    parser.add_argument("--mesh", required=True, metavar="AXES", help="data=16,tensor=4")
    parser.add_argument("--topology", required=True, help="v5p:4x4x4, v3:32x32, v5e:16x16*2 ...")
    parser.add_argument(
        "--options", metavar="MODULE:FUNCTION",
        help="returns a dict of options of spmd.jit: in_shardings, axis_rules, donate_argnums ...",
    )  # fmt: skip
    parser.add_argument("--model-flops", type=float, help="FLOPs of a call, for the utilisation")
    parser.add_argument("--json", metavar="FILE", help="write everything that is printed, and more")


def run(given: argparse.Namespace) -> int:
    """The exit code; raises SpmdError for what is wrong with the command line or the program."""
    from spmd.hardware import Machine

    mesh, machine = read_mesh(given.mesh), Machine.parse(given.topology)
    machine.lay(mesh)  # says what is wrong with the mesh before anything is imported or compiled
    _check_writable(given.json)
    function = load("", given.function)
    if not callable(function):
        why = f"it is a {type(function).__name__}"
        raise UsageError(Problem(given.function, why, "name a function"))
    args, kwargs = read_arguments("--args", given.args)
    options = _options(given.options) if given.options else {}
    found = with_progress(
        function, *args, mesh=mesh, topology=machine, kwargs=kwargs,
        model_flops=given.model_flops, **options,
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


def _options(text: str) -> dict[str, Any]:
    found = call("--options", text)
    taken = {"mesh", "topology", "kwargs", "model_flops", "progress"}
    if not isinstance(found, dict) or taken & set(found):
        why = f"it returns {type(found).__name__ if not isinstance(found, dict) else sorted(found)}"
        fix = "return a dict of options of spmd.jit, such as in_shardings, without the mesh"
        raise UsageError(Problem(f"--options {text}", why, fix))
    return found


def _check_writable(path: str | None) -> None:
    if path is not None and not Path(path).absolute().parent.is_dir():
        why = f"the folder {Path(path).absolute().parent} does not exist"
        raise UsageError(Problem(f"--json {path}", why, "name a file in a folder that exists"))
