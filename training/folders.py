"""The folder of a run: confined to a root when it is named, and readable by its owner only."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from pathlib import Path

from sharding.errors import Problem
from training.config import CheckpointConfig
from training.errors import CheckpointError, quoted

__all__ = ["make_folder", "name_problem", "with_folder"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def name_problem(root: str, name: str) -> Problem | None:
    """Why `name` cannot be a run's name below the folder `root`; None where it can.

    A name is never a path: whoever may choose names cannot write elsewhere, through a link in
    `root` neither.
    """
    given = f"--run-name {quoted(name)}"
    if not _NAME.fullmatch(name) or ".." in name:
        why = "a name has 1 to 64 letters, digits and . _ -, begins with a letter or digit, and"
        why += " has no two dots in a row"
        return Problem(given, why, "for instance --run-name baseline-2")
    try:
        inside = os.path.realpath(os.path.join(root, name))
        outer = os.path.realpath(root)
    except (OSError, ValueError) as error:  # a NUL in the root
        return Problem(f"--output-root {quoted(root)}", quoted(error), "name a folder")
    if os.path.dirname(inside) != outer:
        why = f"it is a link to {quoted(inside)}, which is not in --output-root {quoted(root)}"
        return Problem(given, why, "use another name, or remove the link")
    return None


def with_folder(checkpoint: CheckpointConfig) -> CheckpointConfig:
    """The options with `checkpoint_dir` filled in: as given, or the run's name below the root."""
    if checkpoint.checkpoint_dir:
        return checkpoint
    name = checkpoint.run_name or time.strftime("%Y%m%d-%H%M%S")
    folder = os.path.join(checkpoint.output_root, name)
    return dataclasses.replace(checkpoint, checkpoint_dir=folder)


def make_folder(folder: Path) -> None:
    """Makes the folder of a run, for its owner only; one that is there stays as it is.

    Raises:
      CheckpointError: it cannot be made.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        problem = Problem(
            f"--checkpoint-dir {quoted(folder)}",
            f"the folder cannot be made: {error.strerror}",
            "name a folder that can be written",
        )
        raise CheckpointError(problem) from error
