"""Saves in the background, one at a time, and what becomes of them."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import orbax.checkpoint as ocp

from sharding.errors import Problem
from spmd.runtime import end, processes
from training.checkpoint import arrays
from training.checkpoint.primary import WAIT_S, WRITE_S, on_primary
from training.checkpoint.save_options import hide_orphaned_writes, save_small_arrays_whole
from training.checkpoint.store import Found, Store, steps_in
from training.errors import CheckpointError
from training.state import TrainState

__all__ = ["Checkpoints"]

_STATE = "state"
_SLOW_S = 1.0  # waits for an earlier save that are worth a word


class Checkpoints:
    """The checkpoints in one folder, which is made when it is opened or first saved to.

    With several processes, all call the same methods in the same order, `poll` and `close` apart.

    Attributes:
      folder: where they are.
      pending: the step that is being written, or None.
      about: written into every manifest: how the run is laid out.
      waits: how often a save had to wait for the one before it, and `waited_s` for how long.
    """

    def __init__(self, folder: Path, keep: int, max_failures: int = 3):
        self.folder = folder
        self.pending: int | None = None
        self.about: dict[str, Any] = {}
        self.waits, self.waited_s = 0, 0.0
        self._store = Store(folder, keep)
        self._max_failures = max_failures
        self._failures = 0
        self._failure: Problem | None = None  # of the last save
        self._untold: list[Problem] = []
        self._done: Future[None] | None = None
        self._stuck = False  # the disk did not answer
        self._opened: ocp.AsyncCheckpointer | None = None
        # Orbax logs each write that failed with its trace; `poll` tells it in three lines.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        hide_orphaned_writes()

    def latest(self) -> int | None:
        """The newest step that is listed, or None; `find` tells whether it can be read."""
        return on_primary("newest checkpoint", lambda: max(steps_in(self.folder), default=None))

    def open(self) -> None:
        """Makes the folder, takes its lock, and clears what a killed run left in it.

        Raises:
          CheckpointError: it cannot be written, or another run uses it.
        """
        on_primary("opening the checkpoints", self._store.open)

    def find(self, expected: dict[str, Any]) -> Found | None:
        """The newest step whose every byte is as it was written, or None if there are no steps.

        Damaged ones are moved to `quarantine/`, and named in the notices. `open` must have been
        called.

        Args:
          expected: the `identity` of this run.

        Raises:
          CheckpointError: the step belongs to another run, or there are steps and none is good.
        """
        found = on_primary("verifying the checkpoints", lambda: self._store.newest_good(expected))
        if found is None:
            return None
        step, about, notices = found
        return Found(step, about, tuple(Problem(*notice) for notice in notices))

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state of a step that `find` found, with the shardings of `abstract`.

        Raises:
          CheckpointError: its arrays are not those of `abstract`; all that differs.
        """
        target = nn.unbox(abstract)
        folder = (self.folder / str(step) / _STATE).absolute()

        def compare() -> None:
            if problems := arrays.mismatches(self._checkpointer(), folder, target):
                raise CheckpointError(*problems)

        on_primary("comparing arrays", compare)
        state = arrays.restore(self._checkpointer(), folder, target)
        if int(state.step) != step:
            what, why = f"{self.folder}, step {step}", f"its state is of step {int(state.step)}"
            raise CheckpointError(Problem(what, why, "remove it, and the step before it is used"))
        return jax.tree.unflatten(jax.tree.structure(abstract), jax.tree.leaves(state))

    def save(self, step: int, state: TrainState, record: dict[str, Any]) -> None:
        """Copies the state, then writes it in the background. A step that is there is kept.

        What fails here is told by the next `poll` or `finish`. An earlier save that is not done is
        waited for: saves never queue up.

        Args:
          record: the `identity` of this run.

        Raises:
          CheckpointError: as many saves in a row have failed as a run may have.
        """
        self._wait(step)
        self._agree()
        self._failure = None
        unboxed = nn.unbox(state)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(unboxed))
        try:
            if not on_primary("preparing a save", lambda: self._store.prepare(step, size)):
                return
        except CheckpointError as error:
            self._failed(step, error)
            return self._enough()
        self.pending, self._done = step, Future()
        try:
            copied = arrays.small_copy(unboxed)
            if copied is None:
                self._write(step, unboxed)
            what = (self._done, step, copied, dict(record), dict(self.about))
            threading.Thread(target=self._commit, args=what, daemon=True, name="commit").start()
        except Exception as error:  # Orbax raises whatever its storage raised
            self._done.set_exception(error)

    def poll(self) -> Problem | None:
        """Looks, without waiting, whether a background save ended; what there is to tell of it.

        Raises:
          CheckpointError: as many saves in a row have failed as a run may have.
        """
        if self._done is not None and self._done.done():
            self._settle()
            if processes.count() == 1:  # several stop together, at the next save
                self._enough()
        return self._untold.pop(0) if self._untold else None

    def finish(self) -> Problem | None:
        """Waits for the background save, in all processes; its problem if the last one failed.

        Raises:
          CheckpointError: as many saves in a row have failed as a run may have.
        """
        self._wait()
        self._agree()
        self._untold = [problem for problem in self._untold if problem != self._failure]
        return self._failure

    def close(self) -> None:
        """Waits for the background save of this process and releases the folder."""
        try:
            if not self._stuck:
                self._wait()
        finally:
            if self._opened is not None and self._done is None:
                self._opened.close()
                self._opened = None
            if processes.is_primary():
                self._store.close()

    def _write(self, step: int, state: Any) -> None:
        """Orbax copies the state to the host, and goes on to write it in the background."""
        folder = (self._store.staged(step) / _STATE).absolute()
        self._checkpointer().save(folder, args=ocp.args.StandardSave(state))

    def _commit(
        self, done: Future[None], step: int, copied: Any, record: dict[str, Any],
        about: dict[str, Any],
    ) -> None:  # fmt: skip
        """Runs in the background: Orbax's writing, then the manifest.

        Args:
          copied: the state, where Orbax has not begun with it.
        """
        try:
            if copied is not None:
                self._write(step, copied)
            self._checkpointer().wait_until_finished()
            if processes.is_primary():
                self._store.commit(step, record, about)
            done.set_result(None)
        except BaseException as error:
            if not processes.is_primary():  # which sees no more than that this one does not come
                end.write(f"warning: {self._store.not_saved(step, arrays.reason(error))}")
            done.set_exception(error)

    def _wait(self, for_step: int | None = None) -> None:
        """Until the background save of this process ends, and settles it."""
        if self._done is None:
            return
        busy, started = not self._done.done(), time.monotonic()
        try:
            self._done.exception(WAIT_S)
        except TimeoutError:
            self._stuck = True
            why = f"it has not ended after {WAIT_S:.0f} s: the disk does not answer"
            raise CheckpointError(self._store.not_saved(self.pending or 0, why)) from None
        waited, before = time.monotonic() - started, self.pending
        self._settle()
        if busy and for_step is not None:
            self.waits += 1
            self.waited_s += waited
            if waited >= _SLOW_S and self.waits & (self.waits - 1) == 0:  # 1, 2, 4, 8, ...
                self._untold.append(_slow(for_step, before, waited, self.waits))

    def _settle(self) -> None:
        """Takes note of how the background save ended."""
        assert self._done is not None and self.pending is not None
        step, error = self.pending, self._done.exception()
        self.pending = self._done = None
        if error is not None:
            self._failed(step, error)
        else:
            self._failures = 0

    def _failed(self, step: int, error: BaseException) -> None:
        self._failures += 1
        ours = isinstance(error, CheckpointError)
        why = arrays.reason(error)
        self._failure = error.problems[0] if ours else self._store.not_saved(step, why)
        self._untold.append(self._failure)
        if processes.is_primary():
            self._store.discard()

    def _agree(self) -> None:
        """What the primary process knows of saves, in all of them: it alone writes manifests."""
        told = on_primary("how saves ended", lambda: [self._failures, self._failure])
        self._failures = told[0]
        self._failure = Problem(*told[1]) if told[1] else None
        self._enough()

    def _enough(self) -> None:
        if self._failure is not None and self._failures >= self._max_failures:
            remedy = self._failure.fix.partition(";")[0]
            raise CheckpointError(
                self._failure._replace(
                    fix=f"{self._failures} saves in a row have failed, and the run ends before more"
                    f" is lost: {remedy}, and start it again"
                )
            )

    def _checkpointer(self) -> ocp.AsyncCheckpointer:
        if self._opened is None:
            save_small_arrays_whole()
            self._opened = ocp.AsyncCheckpointer(
                ocp.StandardCheckpointHandler(),
                async_options=ocp.AsyncOptions(
                    timeout_secs=int(WRITE_S),
                    # Where folders cannot be made, writers would wait for them until the limit,
                    # and the process with them when it ends.
                    create_directories_asynchronously=False,
                ),
            )
        return self._opened


def _slow(step: int, before: int | None, waited: float, waits: int) -> Problem:
    return Problem(
        f"the save of step {step} waited {waited:.1f} s for that of step {before}"
        f" (the {waits}. wait of this run)",
        "the disk takes longer for a checkpoint than the steps between two of them",
        "use a larger --checkpoint-every, or a faster disk",
    )
