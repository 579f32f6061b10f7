"""Whether a run starts from a checkpoint, and from which."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sharding.errors import Problem, did_you_mean
from training.checkpoint.checkpoints import Checkpoints
from training.checkpoint.primary import on_primary
from training.checkpoint.store import Found, steps_in
from training.errors import CheckpointError

__all__ = ["find_step"]

_LOOKED_AT = 1000  # folders


def find_step(
    checkpoints: Checkpoints, resume: str, expected: dict[str, Any], tell: Callable[[Problem], None]
) -> Found | None:
    """The verified step to go on from, or None to start afresh: only where there never was one.

    Opens the folder if it exists, and makes none.

    Args:
      resume: the value of `--resume`.
      expected: the `identity` of this run.
      tell: takes what was wrong with steps that are passed over.

    Raises:
      CheckpointError: `--resume` and the folder do not go together, or no step can be used.
    """
    latest = checkpoints.latest()
    shown = f"--resume {resume} --checkpoint-dir {checkpoints.folder}"
    if latest is None and resume == "must":
        why = f"the folder holds no checkpoint{_elsewhere(checkpoints.folder)}"
        fix = "name the folder of the run to continue, or leave --resume out"
        raise CheckpointError(Problem(shown, why, fix))
    if latest is not None and resume == "never":
        why = f"the folder holds step {latest} of another run, and the two would be mixed up"
        raise CheckpointError(Problem(shown, why, "name a new folder, or use --resume auto"))
    if resume == "never" or not on_primary("the folder", checkpoints.folder.is_dir):
        return None
    checkpoints.open()
    found = checkpoints.find(expected)
    for notice in found.notices if found else ():
        tell(notice)
    return found


def _steps(folder: Path) -> list[int]:
    try:
        return steps_in(folder)
    except OSError:  # somebody else's
        return []


def _elsewhere(folder: Path) -> str:
    """` (did you mean 'a'?)`, or where checkpoints are below and beside a folder."""
    beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
    below = folder.iterdir() if folder.is_dir() else ()
    places = sorted(itertools.islice(itertools.chain(below, beside), _LOOKED_AT))
    held = {path: steps[-1] for path in places if (steps := _steps(path))}
    if meant := did_you_mean(folder.name, [path.name for path in held]):
        return meant
    shown = ", ".join(f"{path} (step {step})" for path, step in list(held.items())[:3])
    return f"; there are some in {shown}" if held else ""
