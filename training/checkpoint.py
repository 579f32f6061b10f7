"""Checkpoints of a run: written in the background, read onto any mesh.

A step folder holds the training state, without the boxes of its dim names, and a small record of
what the state belongs to.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import orbax.checkpoint as ocp

from sharding.errors import Problem
from training.config import RunConfig
from training.data import Corpus
from training.errors import CheckpointError
from training.state import TrainState

__all__ = ["Checkpoints", "identity"]

_FORMAT = 1
_TRASH = "trash"
_MAX_FAILURES = 3
# These change how the model is computed, not what its state means.
_FREE_MODEL_KEYS = ("dtype", "remat", "dropout")


def identity(run: RunConfig, corpus: Corpus) -> dict[str, Any]:
    """What must be the same for a state to be continued, by option name."""
    model = dataclasses.asdict(run.model)
    for key in _FREE_MODEL_KEYS:
        del model[key]
    return {
        "format": _FORMAT,
        **model,
        "seed": run.train.seed,
        "batch": run.train.batch,
        "sequence": run.data.sequence,
        "validation": run.data.validation,
        "text": corpus.fingerprint,
    }


class Checkpoints:
    """The checkpoints in one folder, which is made when it is opened or first saved to.

    Attributes:
      folder: where they are.
      pending: the step that is being written, or None.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.pending: int | None = None
        self._keep = keep
        self._failures = 0
        self._opened: ocp.CheckpointManager | None = None
        logging.getLogger("absl").setLevel(logging.ERROR)

    def latest(self) -> int | None:
        """The newest step that was committed, or None."""
        return self._manager().latest_step() if self.folder.is_dir() else None

    def open(self) -> None:
        """Makes the folder, and clears what a killed run left in it.

        Raises:
          CheckpointError: it cannot be written.
        """
        self._manager()

    def check(self, step: int, expected: dict[str, Any]) -> None:
        """Compares the record of `step` with the `identity` of this run.

        Raises:
          CheckpointError: the record cannot be read, or names another run; all differences.
        """
        found = self._restore(step, {"record": ocp.args.JsonRestore()}, "its record")["record"]
        problems = [
            Problem(
                f"{self.folder}, step {step}: {key} is {found.get(key)}",
                f"this run has {expected[key]}, so the state would not mean the same",
                "name the data that the run began with, or give --allow-data-change"
                if key == "text"
                else "give this run the same value, or another --checkpoint-dir",
            )
            for key in expected
            if found.get(key) != expected[key]
        ]
        if problems:
            raise CheckpointError(*problems)

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state of `step`, with the shardings of `abstract`, whatever mesh it came from."""
        target = {"state": ocp.args.StandardRestore(nn.unbox(abstract))}
        state = self._restore(step, target, "its state")["state"]
        return jax.tree.unflatten(jax.tree.structure(abstract), jax.tree.leaves(state))

    def save(self, step: int, state: TrainState, record: dict[str, Any]) -> None:
        """Copies the state, then writes it in the background. A step that is there is kept."""
        self.finish()
        manager = self._manager()
        if step in manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(nn.unbox(state)), record=ocp.args.JsonSave(record)
        )
        try:
            manager.save(step, args=items, force=True)
            self.pending = step
        except (OSError, ValueError) as error:
            self._failed(step, error)

    def poll(self) -> Problem | None:
        """Looks, without waiting, whether a background save ended; the problem if it failed.

        Raises:
          CheckpointError: several saves in a row have failed.
        """
        if self.pending is None or self._manager().is_saving_in_progress():
            return None
        return self.finish()

    def finish(self) -> Problem | None:
        """Waits for the background save; see `poll`."""
        if self.pending is None:
            return None
        step, self.pending = self.pending, None
        try:
            # Only this call reports a failed save and forgets its step: until then the step
            # is listed as if it were there.
            self._manager().wait_until_finished()
        except Exception as error:  # Orbax raises whatever its storage raised
            return self._failed(step, error)
        self._failures = 0
        self._empty_trash()
        return None

    def close(self) -> None:
        """Waits for the background save and releases the folder."""
        self.finish()
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _manager(self) -> ocp.CheckpointManager:
        if self._opened is None:
            try:
                self._opened = ocp.CheckpointManager(
                    self.folder.absolute(),
                    options=ocp.CheckpointManagerOptions(
                        max_to_keep=self._keep,
                        # What a killed save left over would keep its space.
                        cleanup_tmp_directories=True,
                        # Deleting in place can be killed half-way, and the half would be listed.
                        todelete_subdir=_TRASH,
                    ),
                )
            except OSError as error:
                problem = Problem(
                    f"--checkpoint-dir {self.folder}",
                    f"the folder cannot be made: {error.strerror}",
                    "name a folder that can be written",
                )
                raise CheckpointError(problem) from error
            self._empty_trash()
        return self._opened

    def _restore(self, step: int, items: dict[str, Any], what: str) -> Any:
        try:
            return self._manager().restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax raises whatever its storage raised
            reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
            problem = Problem(
                f"{self.folder}, step {step}",
                f"{what} cannot be read: {reason}",
                f"remove the folder {self.folder / str(step)} to use the step before it",
            )
            raise CheckpointError(problem) from error

    def _failed(self, step: int, error: Exception) -> Problem:
        self._failures += 1
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        problem = Problem(
            f"step {step} was not saved in {self.folder}",
            reason,
            "make room on the disk; the next checkpoint is tried all the same",
        )
        if self._failures >= _MAX_FAILURES:
            raise CheckpointError(problem) from error
        return problem

    def _empty_trash(self) -> None:
        # Orbax moves old steps there and leaves them.
        for entry in (self.folder / _TRASH).glob("*"):
            shutil.rmtree(entry, ignore_errors=True)
