"""The folder of a run's checkpoints: what is in it, what may be believed, what is kept.

A step is written in `saving/` and renamed when its manifest is on the disk: that rename is the
commit, so a folder named like a step is whole or was damaged later. Steps that are no longer
wanted are renamed into `trash/` before they are deleted, damaged ones into `quarantine/`.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from sharding.errors import Problem
from training.checkpoint import durable, manifest
from training.checkpoint.identity import differences
from training.checkpoint.lock import Lock
from training.checkpoint.manifest import BadStep, Manifest
from training.errors import CheckpointError
from training.folders import make_folder

__all__ = ["Found", "Store", "newest_about", "steps_in"]

SAVING, TRASH, QUARANTINE = "saving", "trash", "quarantine"
_SPARE = 1.2  # of the size of the last step: later ones compress less
_STEP = re.compile(r"0|[1-9]\d{0,17}")


class Found(NamedTuple):
    """A step that was verified.

    Attributes:
      step: its number.
      about: from its manifest, how it was laid out.
      notices: what was wrong with newer steps.
    """

    step: int
    about: dict[str, Any]
    notices: tuple[Problem, ...]


def steps_in(folder: Path) -> list[int]:
    """The steps that a folder lists, in order; whether they can be read is another question."""
    if not os.path.isdir(folder):  # `Path.is_dir` raises where a name is too long
        return []
    # Links too: they are refused when they are read, not overlooked.
    names = (path.name for path in folder.iterdir() if path.is_dir() or path.is_symlink())
    return sorted(int(name) for name in names if _STEP.fullmatch(name))


def newest_about(folder: Path) -> dict[str, Any]:
    """How the newest step whose manifest is intact was laid out; empty if there is none."""
    try:
        steps = steps_in(folder)
    except OSError:
        return {}  # told when the folder is opened
    for step in reversed(steps):
        try:
            return manifest.read(folder / str(step)).about
        except (BadStep, CheckpointError):
            continue
    return {}


class Store:
    """What the primary process does in the folder; no arrays are read or written here."""

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self._keep = keep
        self._lock = Lock(folder)
        self._size: int | None = None  # of the last step, in bytes

    def open(self) -> None:
        """Makes the folder if it is not there, takes its lock, and clears what a killed run left.

        Raises:
          CheckpointError: it cannot be written, or another run uses it.
        """
        make_folder(self.folder)
        self._lock.take()
        for name in (SAVING, TRASH):
            durable.remove(self.folder / name)

    def close(self) -> None:
        """Gives the lock back, and leaves no folder that is empty."""
        for name in (SAVING, TRASH) if self._lock.held else ():
            durable.remove_empty(self.folder / name)
        self._lock.release()

    def newest_good(self, expected: dict[str, Any]) -> Found | None:
        """The newest step that is as it was written; newer ones are moved to `quarantine/`.

        Args:
          expected: `training.checkpoint.identity` of this run.

        Returns:
          None where there never was a step.

        Raises:
          CheckpointError: the step is of another run or a newer format, or none is good. Nothing
            is moved then.
        """
        bad: dict[int, str] = {}
        for step in reversed(steps_in(self.folder)):
            try:
                found = self._verified(step, expected)
            except BadStep as error:
                bad[step] = str(error)
                continue
            self._size = found.size
            notices = tuple(self._quarantine(*entry, step) for entry in bad.items())
            return Found(step, found.about, notices)
        kept = sorted(path.name for path in (self.folder / QUARANTINE).glob("*"))
        if bad or kept:
            raise CheckpointError(*self._none_good(bad, kept))
        return None

    def prepare(self, step: int, size: int) -> bool:
        """Makes ready to write a step.

        Args:
          size: bytes of its arrays.

        Returns:
          Whether it has to be written: False if it is there.

        Raises:
          CheckpointError: the lock was lost, or there is too little room.
        """
        self._lock.check()
        if step in steps_in(self.folder):
            return False
        durable.remove(self.folder / SAVING)
        needed = int(_SPARE * (self._size or size))
        if (free := durable.free_bytes(self.folder)) < needed:
            why = f"it takes up to {needed:,} bytes, and the disk has {free:,} left"
            raise CheckpointError(self.not_saved(step, why))
        try:
            self.staged(step).mkdir(parents=True)
        except OSError as error:
            why = f"{error.strerror}: {error.filename}"
            raise CheckpointError(self.not_saved(step, why)) from error
        return True

    def staged(self, step: int) -> Path:
        """Where a step is written before it is committed."""
        return self.folder / SAVING / str(step)

    def commit(self, step: int, run: dict[str, Any], about: dict[str, Any]) -> None:
        """Writes the manifest of a staged step, makes it one of the steps, and retires old ones."""
        written = manifest.write(self.staged(step), step, run, about)
        self._lock.check()
        durable.move(self.staged(step), self.folder / str(step))
        self._size = written.size
        for old in steps_in(self.folder)[: -self._keep]:
            # Deleting in place can be killed half-way, and the half would be listed.
            durable.remove(self._put(old, TRASH))

    def discard(self) -> None:
        """Deletes what a failed save has written: it would keep its space."""
        durable.remove(self.folder / SAVING)

    def not_saved(self, step: int, why: str) -> Problem:
        """The problem of a save that failed."""
        limited = why.startswith(os.strerror(errno.EFBIG))
        fix = "raise the limit on files, ulimit -f" if limited else "make room on the disk"
        return Problem(
            f"step {step} was not saved in {self.folder}",
            why,
            f"{fix}; the next checkpoint is tried all the same",
        )

    def _verified(self, step: int, expected: dict[str, Any]) -> Manifest:
        folder = self.folder / str(step)
        found = manifest.read(folder)
        if problems := differences(f"{self.folder}, step {step}", found.run, expected):
            raise CheckpointError(*problems)
        manifest.verify(folder, found)
        return found

    def _quarantine(self, step: int, why: str, used: int) -> Problem:
        moved = self._put(step, QUARANTINE)
        return Problem(
            f"{self.folder}, step {step} is damaged and is not used",
            why,
            f"it is kept as {moved}; the run goes on from step {used}",
        )

    def _none_good(self, bad: dict[int, str], kept: list[str]) -> list[Problem]:
        fix = "put a good copy in its place, or name another --checkpoint-dir to start afresh"
        problems = [
            Problem(f"{self.folder}, step {step} is damaged", why, fix)
            for step, why in bad.items()
        ]
        if not problems:
            why = f"all its steps are in {QUARANTINE}/ ({', '.join(kept[:5])})"
            problems.append(Problem(f"{self.folder} has no step to go on from", why, fix))
        return problems

    def _put(self, step: int, place: str) -> Path:
        """Moves a step under a name that is free there."""
        (self.folder / place).mkdir(exist_ok=True)
        names = (self.folder / place / f"{step}-{i}" for i in itertools.count(1))
        target = next(path for path in names if not path.exists())
        durable.move(self.folder / str(step), target)
        return target
