r"""Explains a partitioned program: why a value is sharded so, and where a collective comes from.

    python -m spmd explain train:step --args train:shapes --mesh data=2,tensor=4 \
        --value "params['w']"
    python -m spmd explain ... --why 'all_reduce(tensor)'
    python -m spmd explain ... --why-not "params['w']" '[data, -]'

A value is an argument path, a name of the printed program, or a source line. Without any question
the partitioned program is printed, which has the names. No device is needed.
"""

from __future__ import annotations

import argparse

from spmd.cli import program
from spmd.cli.load import read_mesh

NAME = "explain"
HELP = "why a value is sharded so, where a collective comes from, what another sharding costs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    program.add_arguments(parser)
    parser.add_argument(
        "--value", action="append", default=[], help="why it is sharded so; repeatable, as all are"
    )
    parser.add_argument(
        "--why", action="append", default=[], metavar="COLLECTIVE",
        help="where it comes from: all_reduce, 'all_reduce(tensor)', a value or a source line",
    )  # fmt: skip
    parser.add_argument(
        "--why-not", action="append", default=[], nargs=2, metavar=("VALUE", "SHARDING"),
        help="what changes when the value is annotated so: '[data, -]'",
    )  # fmt: skip
    parser.add_argument("--machine", help="times of --why on it: v5e:2x4, v5p:4x4x4, h100:8 ...")


def run(given: argparse.Namespace) -> int:
    """The exit code; raises SpmdError for what is wrong with the command line or the program."""
    mesh = read_mesh(given.mesh)
    stage = program.read(given).traced(mesh).propagate().partition()
    answers = [
        *(stage.explain(value) for value in given.value),
        *(stage.why(collective, given.machine) for collective in given.why),
        *(stage.why_not(value, sharding) for value, sharding in given.why_not),
    ]
    print("\n\n".join(map(str, answers or [stage])))
    return 0
