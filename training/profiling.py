"""Traces of chosen steps, written to files: `--profile 10:12`. Nothing listens on a port."""

from __future__ import annotations

import re
from pathlib import Path

import jax

from sharding.errors import Problem
from training.errors import quoted

__all__ = ["Profile", "check_profile"]


class Profile:
    """Traces from the start of step `first` to the end of step `last`; None where there is none.

    Args:
      text: `first:last`, as `check_profile` accepts; or "".
      folder: where traces go; TensorBoard, XProf and Perfetto read them.
    """

    def __init__(self, text: str, folder: Path):
        self.first, self.last = _parse(text) or (None, None)
        self.folder = folder
        self._running = False

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            self.stop()
        except Exception:  # whatever writing raised; what ended the run counts more
            if kind is None:
                raise

    def missed(self, done: int) -> str:
        """What to say where there will be no trace because step `done` is behind the run already;
        else ""."""
        if self.first is None or self.first > done:
            return ""
        return (
            f"no trace is written: --profile {self.first}:{self.last} begins before step"
            f" {done + 1}, the first one of this process"
        )

    def start(self) -> None:
        """Starts the trace."""
        jax.profiler.start_trace(str(self.folder))
        self._running = True

    def stop(self) -> None:
        """Writes the trace, if one was started."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


def check_profile(text: str, steps: int) -> list[Problem]:
    """What is wrong with the value of --profile in a run of `steps` steps."""
    fix = "write the first and the last step, for instance --profile 10:12"
    found = _parse(text)
    if found is None:
        return [Problem(f"--profile {quoted(text)}", "it is not of the form first:last", fix)]
    first, last = found
    if not 1 <= first <= last <= steps:
        why = f"the steps of the run are 1 to {steps}, and the first comes before the last"
        return [Problem(f"--profile {text}", why, fix)]
    return []


def _parse(text: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    return (int(match[1]), int(match[2])) if match else None
