"""The training loop: steps, validation, checkpoints, progress, and an orderly end."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sharding.errors import Problem
from spmd.runtime.processes import is_primary
from training.checkpoint import Checkpoints
from training.data import Corpus, batch_at, validation_batches
from training.errors import CheckpointError, Interrupted, StalledError
from training.goodput import Goodput, Watch
from training.log import StepLog
from training.metrics import Metrics
from training.nonfinite import NonFinite
from training.plot import write_plot
from training.profiling import Profile
from training.program import Plan
from training.signals import StopRequest
from training.state import TrainState

__all__ = ["Loop"]

# A step that takes longer is told to the user, and told again.
_PATIENCE_S = 60.0


class _Running(NamedTuple):
    """A step that the devices work on."""

    step: int
    dispatched: float
    metrics: dict[str, jax.Array]


@dataclasses.dataclass
class Loop:
    """Runs a plan from a state to its last step.

    Attributes:
      step: compiled; (state, batch) to (state, metrics).
      evaluate: compiled; (parameters, batch) to a loss in nats.
      record: what is written beside each checkpoint, see `training.checkpoint.identity`.
      stop: asked between batches whether the run has to end.
      goodput: where the time goes, from the start of the process on.
      validation_loss: the last one, in nats per token.
    """

    plan: Plan
    corpus: Corpus
    step: Callable[[TrainState, jax.Array], tuple[TrainState, dict]]
    evaluate: Callable[[Any, jax.Array], jax.Array]
    checkpoints: Checkpoints
    record: dict[str, Any]
    console: Console
    stop: StopRequest
    goodput: Goodput = dataclasses.field(default_factory=Goodput)
    validation_loss: float = float("nan")
    _running: _Running | None = None

    def run(self, state: TrainState) -> TrainState:
        """Trains to the last step, saves and validates it.

        Raises:
          Interrupted: a signal came; the state is saved.
          DivergedError: too many steps in a row were not finite. None of them changed a parameter,
            and the last checkpoint is from before them.
          CheckpointError: the state cannot be saved.
          StalledError: a step does not end.
        """
        start, steps = int(state.step), self.plan.run.train.steps
        with self._recorded(state), self._progress(start):
            for done in range(start + 1, steps + 1):
                if self._log.in_a_row or not self._ahead:
                    self._finish(state)
                if done == self._profile.first:
                    self._pause(state, "profile", self._profile.start)
                state = self._start(done, state)
                if done == self._profile.last:
                    self._pause(state, "profile", self._profile.stop)
                self._warn(self.checkpoints.poll())
                self._end_if_asked(done, state)
                if done < steps:
                    self._between(done, state)
            self._save_last(steps, state)
            self._validate(steps, state)
            self.console.print(self._log.summary(), highlight=False)
        return state

    def _start(self, done: int, state: TrainState) -> TrainState:
        """Gives step `done` to the devices, and waits for the one before it."""
        train, sequence = self.plan.run.train, self.plan.run.data.sequence
        with self.goodput.spent("data"):
            batch = batch_at(self.corpus.train, train.seed, done - 1, train.batch, sequence)
            batch = self.plan.put(batch)
        dispatched = time.perf_counter()
        with jax.profiler.StepTraceAnnotation("train", step_num=done):
            next_state, metrics = self.step(state, batch)
        self._watch.give(metrics)
        # One step runs while the next is prepared; more would only queue up.
        self._finish(next_state)
        self._running = _Running(done, dispatched, metrics)
        return next_state

    def _finish(self, state: TrainState) -> None:
        """Waits for the running step, if there is one, and records it.

        Args:
          state: after the last step that was started.
        """
        if self._running is None:
            return
        step, dispatched, arrays = self._running
        done = self._wait(step)
        self._running = None
        values = {name: float(array) for name, array in arrays.items()}
        self.goodput.step(dispatched, done, useful=not values["skipped"])
        self._log.step(step, values, done)
        self._show.update(self._show.task_ids[0], completed=step, line=self._log.line)
        if values["skipped"]:
            self._pause(state, "debug", partial(self._nonfinite.skipped, step, values, state))

    def _wait(self, step: int) -> float:
        """When the oldest step that was started was done."""
        waited, limit = 0.0, self.plan.run.processes.step_timeout
        while True:
            patience = min(_PATIENCE_S, limit - waited)
            try:
                return self._watch.done(patience)
            except queue.Empty:
                waited += patience
                if waited >= limit:
                    raise StalledError(_stalled(step, limit)) from None
                text = f"warning: step {step} has been running for {waited:.0f} s"
                self.console.print(text, style="yellow", highlight=False)

    def _between(self, done: int, state: TrainState) -> None:
        """Validates and saves after step `done`, when it is time to."""
        every = self.plan.run.checkpoint.checkpoint_every
        if done % self.plan.run.train.eval_every == 0:
            self._validate(done, state)
        if every and done % every == 0:
            self._finish(state)
            # What led to bad steps may lie before them: such saves would push out better ones.
            if not self._log.in_a_row:
                self._save(done, state)

    def _pause(self, state: TrainState, kind: str, task: Callable[[], Any]) -> Any:
        """Runs `task` between two steps; its time is no step's."""
        self._finish(state)
        before = time.perf_counter()
        with self.goodput.spent(kind):
            found = task()
        self._log.pause(time.perf_counter() - before)
        return found

    def _validate(self, done: int, state: TrainState) -> None:
        def losses() -> list[float]:
            train, sequence = self.plan.run.train, self.plan.run.data.sequence
            batches = validation_batches(
                self.corpus.validation, train.eval_batches, train.batch, sequence
            )
            found = []
            for batch in batches:
                found.append(float(self.evaluate(state.params, self.plan.put(batch))))
                if self.stop.poll() is not None:
                    break
            return found

        found = self._pause(state, "evaluation", losses)
        self._end_if_asked(done, state)
        self.validation_loss = float(np.mean(found))
        self._log.validated(done, self.validation_loss)

    def _save(self, done: int, state: TrainState) -> None:
        save = partial(self.checkpoints.save, done, state, self.record)
        self._pause(state, "save", save)

    def _end_if_asked(self, done: int, state: TrainState) -> None:
        if (code := self.stop.poll()) is not None:
            self._save_last(done, state)
            raise Interrupted(code)

    def _save_last(self, done: int, state: TrainState) -> None:
        self._save(done, state)
        problem = self._pause(state, "save", self.checkpoints.finish)
        while told := self.checkpoints.poll():
            self._warn(told)
        if problem:
            raise CheckpointError(problem)

    def _warn(self, problem: Problem | None) -> None:
        if problem:
            self.console.print(f"warning: {problem}", style="yellow", markup=False)

    @contextlib.contextmanager
    def _recorded(self, state: TrainState) -> Iterator[None]:
        """Opens what records the run, and closes it and draws the losses whatever happens."""
        run, folder, start = self.plan.run, self.checkpoints.folder, int(state.step)
        metrics = Metrics(folder, start, run.log.tensorboard, is_primary())
        unit = self.corpus.unit.removesuffix("s")
        self._log = StepLog(self.plan, metrics, self.goodput, self.console, state, unit)
        self._nonfinite = NonFinite(self.plan, self.corpus, self.console)
        # Only so is the state of a step that turns out bad still there.
        self._ahead = run.train.max_skipped > 1 and not run.log.debug_nans
        with contextlib.ExitStack() as stack:
            self._watch = stack.enter_context(Watch())
            self._profile = stack.enter_context(Profile(run.log.profile, folder / "profile"))
            if missed := self._profile.missed(start):
                self.console.print(missed, style="yellow", highlight=False, soft_wrap=True)
            try:
                yield
            finally:
                metrics.close()
                self._warn(write_plot(folder) if is_primary() else None)

    @contextlib.contextmanager
    def _progress(self, start: int) -> Iterator[None]:
        self._show = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._show.add_task("train", total=self.plan.run.train.steps, completed=start, line="")
        with self._show:
            yield


def _stalled(step: int, limit: float) -> Problem:
    return Problem(
        f"step {step} has been running for {limit:,.0f} s, --step-timeout",
        "a process, a device or the network does not answer; nothing of this step is saved",
        "start all processes again with --resume must, or allow steps more time",
    )
