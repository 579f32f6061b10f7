"""The training loop: steps, validation, checkpoints, progress, and an orderly end."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sharding.errors import Problem
from spmd.runtime.processes import is_primary
from training.checkpoint import Checkpoints
from training.data import Corpus, batch_at, validation_batches
from training.errors import CheckpointError, DivergedError, Interrupted
from training.program import Plan
from training.signals import StopRequest
from training.state import TrainState
from training.throughput import flops_per_token, peak_flops

__all__ = ["Loop"]


@dataclasses.dataclass
class Loop:
    """Runs a plan from a state to its last step.

    Attributes:
      step: compiled; (state, batch) to (state, metrics).
      evaluate: compiled; (parameters, batch) to a loss in nats.
      record: what is written beside each checkpoint, see `training.checkpoint.identity`.
      stop: asked between batches whether the run has to end.
    """

    plan: Plan
    corpus: Corpus
    step: Callable[[TrainState, jax.Array], tuple[TrainState, dict]]
    evaluate: Callable[[Any, jax.Array], jax.Array]
    checkpoints: Checkpoints
    record: dict[str, Any]
    console: Console
    stop: StopRequest

    def run(self, state: TrainState) -> TrainState:
        """Trains to the last step, and saves it.

        Raises:
          Interrupted: a signal came; the state is saved.
          DivergedError: the loss is not finite; the last checkpoint is from before.
          CheckpointError: the state cannot be saved.
        """
        train, every = self.plan.run.train, self.plan.run.checkpoint.checkpoint_every
        start = int(state.step)
        meter = Meter(self.plan, start)
        previous: dict[str, jax.Array] = {}
        with self._progress(start) as progress:
            task = progress.add_task("train", total=train.steps, completed=start, line="")
            for index in range(start, train.steps):
                state, metrics = self.step(state, self._batch(index))
                # One step runs while the next is prepared; more would only queue up.
                jax.block_until_ready(previous)
                previous, done = metrics, index + 1
                if done % train.log_every == 0 or done == train.steps:
                    line = self._log(done, meter, metrics)
                    progress.update(task, line=line)
                progress.update(task, completed=done)
                self._warn(self.checkpoints.poll())
                self._end_if_asked(done, state)
                if done % train.eval_every == 0 and done < train.steps:
                    self.validate(done, state)
                    meter.restart(done)
                if every and done % every == 0 and done < train.steps:
                    self._save(done, state)
        self._save_last(train.steps, state)
        return state

    def validate(self, done: int, state: TrainState) -> float:
        """Prints and returns the validation loss, in nats per byte.

        Raises:
          Interrupted: a signal came; the state is saved.
          CheckpointError: the state cannot be saved.
        """
        train, sequence = self.plan.run.train, self.plan.run.data.sequence
        batches = validation_batches(
            self.corpus.validation, train.eval_batches, train.batch, sequence
        )
        losses = []
        for batch in batches:
            losses.append(float(self.evaluate(state.params, self.plan.put(batch))))
            self._end_if_asked(done, state)
        loss = float(np.mean(losses))
        self.console.print(f"step {done:>6}  validation loss {loss:.4f} nats/byte")
        return loss

    def _batch(self, index: int) -> jax.Array:
        train, sequence = self.plan.run.train, self.plan.run.data.sequence
        return self.plan.put(batch_at(self.corpus.train, train.seed, index, train.batch, sequence))

    def _log(self, done: int, meter: Meter, metrics: dict[str, jax.Array]) -> str:
        values = {name: float(value) for name, value in metrics.items()}
        line = meter.line(done, values["loss"])
        self.console.print(f"step {done:>6}  {line}", highlight=False)
        if is_primary():
            with (self.checkpoints.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": done, **values}) + "\n")
        if not math.isfinite(values["loss"]):
            problem = Problem(
                f"the loss at step {done} is {values['loss']}",
                "an update was too large, or a value overflowed; all later steps would be lost",
                "use a lower --learning-rate or a longer --warmup, and start from a checkpoint",
            )
            raise DivergedError(problem)
        return line

    def _save(self, done: int, state: TrainState) -> None:
        self.checkpoints.save(done, state, self.record)

    def _end_if_asked(self, done: int, state: TrainState) -> None:
        if (code := self.stop.poll()) is not None:
            self._save_last(done, state)
            raise Interrupted(code)

    def _save_last(self, done: int, state: TrainState) -> None:
        self._save(done, state)
        if problem := self.checkpoints.finish():
            raise CheckpointError(problem)

    def _warn(self, problem: Problem | None) -> None:
        if problem:
            self.console.print(f"warning: {problem}", style="yellow", markup=False)

    def _progress(self, start: int) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )


class Meter:
    """Speed since the last line: step time, tokens per second, and the share of the peak."""

    def __init__(self, plan: Plan, start: int):
        run, devices = plan.run, plan.mesh.devices
        self._tokens = run.train.batch * run.data.sequence
        self._flops = self._tokens * flops_per_token(run.model, run.data.sequence)
        peak = peak_flops(devices.flat[0].device_kind, run.model.dtype)
        self._peak = peak * devices.size if peak else None
        self.restart(start)

    def restart(self, step: int) -> None:
        """Counts from now, after `step` steps."""
        self._step, self._time = step, time.perf_counter()

    def line(self, step: int, loss: float) -> str:
        """The loss in nats per token and the speed since the last line."""
        seconds = (time.perf_counter() - self._time) / max(step - self._step, 1)
        self.restart(step)
        speed = self._tokens / seconds
        text = f"loss {loss:.4f}  {speed:,.0f} tokens/s  {seconds * 1e3:.0f} ms/step"
        if self._peak:
            text += f"  {self._flops / seconds / self._peak:.1%} MFU"
        return text
