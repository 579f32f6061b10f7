"""The command line: one subcommand for each module listed in COMMANDS.

A command module has NAME, HELP, `add_arguments(parser)` and `run(given) -> exit code`. Exit codes:
0 all is well, 1 the answer is bad (a program that does not fit), 2 the question is (an unknown
function, a mesh that does not multiply up), with an error in three parts and no traceback.
"""

from __future__ import annotations

import argparse
import sys
from types import ModuleType

from rich.console import Console

from sharding.errors import SpmdError
from spmd.cli import aot, explain, plan, report

COMMANDS: tuple[ModuleType, ...] = (explain, report, plan, aot)


def main(argv: list[str]) -> int:
    """Runs the command line `argv` (without the program's name); the exit code."""
    given = parser().parse_args(argv)
    try:
        return given.run(given)
    except SpmdError as error:
        errors = Console(stderr=True, soft_wrap=True)
        errors.print(f"error: {error}", markup=False, highlight=False, style="red")
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    found = argparse.ArgumentParser(
        prog="python -m spmd", description="An SPMD compiler for JAX.", allow_abbrev=False
    )
    commands = found.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        its = commands.add_parser(
            command.NAME, help=command.HELP, description=command.__doc__, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        command.add_arguments(its)
        its.set_defaults(run=command.run)
    return found
