"""Compares reports that `python -m spmd report --json` wrote.

    python -m spmd plan diff before.json after.json --html diff.html
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sharding.errors import ArgumentError, Problem
from spmd.cli.load import UsageError
from spmd.cli.write import check_writable

NAME = "plan"
HELP = "what changes from one report to another"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    diff = kinds.add_parser("diff", help=HELP, description=HELP, allow_abbrev=False)
    diff.add_argument("before", metavar="BEFORE.json")
    diff.add_argument("after", metavar="AFTER.json")
    diff.add_argument("--html", metavar="FILE", help="write the page of the difference")


def run(given: argparse.Namespace) -> int:
    """The exit code; raises UsageError for files that are no reports."""
    check_writable("--html", given.html)
    found = _read(given.before).diff(_read(given.after))
    print(found)
    if given.html:
        Path(given.html).write_text(found.to_html(), encoding="utf-8")
    return 0


def _read(path: str) -> Any:
    from spmd.reporting.model import Report

    try:
        return Report.from_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = f"it cannot be read: {type(error).__name__}: {error}"
        raise UsageError(Problem(path, why, "name a file that --json wrote")) from None
    except ArgumentError as error:
        why = error.problems[0].why
        fix = "write it with python -m spmd report --json of this version"
        raise UsageError(Problem(path, why, fix)) from None
