"""Files that command lines write."""

from __future__ import annotations

from pathlib import Path

from sharding.errors import Problem
from spmd.cli.load import UsageError


def check_writable(option: str, path: str | None) -> None:
    """Raises UsageError where the folder of a file to write does not exist: before the work."""
    if path is not None and not Path(path).absolute().parent.is_dir():
        why = f"the folder {Path(path).absolute().parent} does not exist"
        raise UsageError(Problem(f"{option} {path}", why, "name a file in a folder that exists"))
