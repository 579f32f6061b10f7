"""What is said about each step: lines on the console, metrics, warnings of skipped steps."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from training.goodput import Goodput
from training.metrics import Metrics, memory
from training.program import Plan
from training.state import TrainState
from training.throughput import flops_per_token, peak_flops

__all__ = ["StepLog"]


class StepLog:
    """Follows a run step by step.

    Attributes:
      line: the last one on the console, without its step.
      in_a_row: how many steps, up to the last one, were skipped.
      total: how many were skipped since the run began, those before a resume included.

    Args:
      state: before the first step.
      unit: what a token is called.
    """

    def __init__(
        self,
        plan: Plan,
        metrics: Metrics,
        goodput: Goodput,
        console: Console,
        state: TrainState,
        unit: str = "byte",
    ):
        self.line, self.in_a_row = "", int(state.skipped)
        self.total = int(metrics.last.get("skipped_total", 0))
        self._train, self._metrics, self._goodput = plan.run.train, metrics, goodput
        self._console, self._speed, self._unit = console, Speed(plan), unit
        self._from, self._pauses, self._since = int(state.step), 0.0, time.perf_counter()

    def step(self, step: int, values: Mapping[str, float], done: float) -> None:
        """A step is done.

        Args:
          values: what it returned.
          done: when, by `time.perf_counter`.
        """
        self.in_a_row = int(values["skipped"])
        if self.in_a_row:
            self.total += 1
            text = f"warning: {self._skipped(step, values)}"
            self._console.print(text, style="yellow", highlight=False, soft_wrap=True)
        due = step % self._train.log_every == 0 or step == self._train.steps
        if due or self.in_a_row:
            seconds = max(done - self._since - self._pauses, 1e-9) / max(step - self._from, 1)
            speed = self._speed.of(seconds)
            self._from, self._pauses, self._since = step, 0.0, done
            counts = {"skipped": self.in_a_row, "skipped_total": self.total}
            self.write(step, {**values, **counts, **speed, **self.state()})
            self.line = _line(values["loss"], speed)
        if due:
            self._console.print(f"step {step:>6}  {self.line}", highlight=False)

    def pause(self, seconds: float) -> None:
        """Time that was spent on something else than steps: it does not count for their speed."""
        self._pauses += seconds

    def validated(self, step: int, loss: float) -> None:
        """The validation loss after a step, in nats per token."""
        self._console.print(f"step {step:>6}  validation loss {loss:.4f} nats/{self._unit}")
        self.write(step, {"validation_loss": loss, "skipped_total": self.total, **self.state()})

    def state(self) -> dict[str, Any]:
        """Where the time went up to the last step, and memory."""
        seconds = self._goodput.now()
        whole = sum(seconds.values())
        share = seconds.get("step", 0.0) / whole if whole else 0.0
        return {"goodput": share, "seconds": seconds, "memory": memory()}

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Into the metrics of a step."""
        if problem := self._metrics.add(step, values):
            self._console.print(f"warning: {problem}", style="yellow", markup=False)

    def summary(self) -> str:
        """Where the time of the whole run went; only while no step runs."""
        seconds = self._goodput.upto_now()
        whole = sum(seconds.values())
        rest = sorted(((n, kind) for kind, n in seconds.items() if kind != "step"), reverse=True)
        shown = ", ".join(f"{kind} {n / whole:.1%}" for n, kind in rest if n / whole >= 5e-4)
        text = f"goodput {seconds.get('step', 0.0) / whole:.1%} of {whole:,.1f} s"
        return f"{text}; {shown}" if shown else text

    def _skipped(self, step: int, values: Mapping[str, float]) -> str:
        return (
            f"step {step} was skipped: loss {values['loss']:.4g}, gradient norm"
            f" {values['grad_norm']:.4g}; its batch is the one of seed {self._train.seed}, step"
            f" {step - 1}; {self.in_a_row} in a row, {self.total} in all"
        )


class Speed:
    """Speed from the time of a step, with what is known about the model and the devices."""

    def __init__(self, plan: Plan):
        run, devices = plan.run, plan.mesh.devices
        self._tokens = run.train.batch * run.data.sequence
        self._flops = self._tokens * flops_per_token(run.model, run.data.sequence)
        peak = peak_flops(devices.flat[0].device_kind, run.model.dtype)
        self._peak = peak * devices.size if peak else None

    def of(self, seconds: float) -> dict[str, float]:
        """Per step of `seconds`; `mfu`, model FLOPs utilisation, only where the peak is known."""
        found = {"step_seconds": seconds, "tokens_per_second": self._tokens / seconds}
        found["model_flops_per_second"] = self._flops / seconds
        if self._peak:
            found["mfu"] = self._flops / seconds / self._peak
        return found


def _line(loss: float, speed: Mapping[str, float]) -> str:
    text = f"loss {loss:.4f}  {speed['tokens_per_second']:,.0f} tokens/s"
    text += f"  {speed['step_seconds'] * 1e3:.0f} ms/step"
    return text + (f"  {speed['mfu']:.1%} MFU" if "mfu" in speed else "")

