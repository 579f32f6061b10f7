"""Where the time of a run goes: useful steps, and what kept the devices from them.

The host works one step ahead of the devices, so what it does costs time only while the devices
have nothing to do. Time counts as a step's from when the devices could begin it to when they are
done; what lies between two steps counts as what the host did then.
"""

from __future__ import annotations

import contextlib
import os
import queue
import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import jax

__all__ = ["KINDS", "Goodput", "Watch", "process_age"]

# In the order in which they are shown.
KINDS = (
    "step", "start", "compile", "restore", "data", "save", "evaluation", "skipped", "stall",
    "profile", "debug", "other",
)  # fmt: skip

# A step that takes this many times the median of those before it was held up by something.
_STALL = 3.0
_REMEMBERED = 101
_MIN_REMEMBERED = 5


class Goodput:
    """Seconds by kind, which together are all the time since `started`.

    Kinds: `step` (useful), `skipped` (steps without an update), `stall` (what a step takes beyond
    three times the median of the last hundred), `start` (before the first segment), `other` (nobody
    said what), and whatever is given to `spent`.

    Args:
      started: where counting begins, in seconds of `clock`.
      clock: seconds; by default `time.perf_counter`, from whose begin the process's age is taken.
    """

    def __init__(self, started: float | None = None, clock: Callable[[], float] | None = None):
        self._clock = clock or time.perf_counter
        self.started = self._clock() - process_age() if started is None else started
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._edge = self.started  # up to where time is attributed
        self._segments: list[tuple[str, float, float]] = []
        self._recent: deque[float] = deque(maxlen=_REMEMBERED)

    @contextlib.contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """What the host does meanwhile is of this kind. Not nested."""
        start = self._clock()
        if not self.seconds and not self._segments:
            self._segments.append(("start", self._edge, start))
        try:
            yield
        finally:
            self._segments.append((kind, start, self._clock()))

    def step(self, dispatched: float, done: float, useful: bool = True) -> float:
        """Attributes all time up to the end of a step.

        Args:
          dispatched, done: when it was given to the devices, and when they were done.
          useful: whether it updated the parameters.

        Returns:
          Seconds that the devices worked on it.
        """
        begin = max(dispatched, self._edge)
        done = max(done, begin)
        self._gap(begin)
        took = done - begin
        usual = statistics.median(self._recent) if len(self._recent) >= _MIN_REMEMBERED else took
        stall = max(took - _STALL * usual, 0.0)
        self._recent.append(took)
        self.seconds["step" if useful else "skipped"] += took - stall
        self.seconds["stall"] += stall
        self._edge = done
        # What ended while the devices worked cost nothing.
        self._segments = [one for one in self._segments if one[2] > done]
        return took

    def upto_now(self) -> dict[str, float]:
        """Seconds of each kind that there was, all time attributed; only while no step runs."""
        self._gap(self._clock())
        return self.now()

    def now(self) -> dict[str, float]:
        """Seconds of each kind that there was, up to the end of the last step."""
        return {kind: self.seconds[kind] for kind in KINDS if self.seconds[kind] > 0}

    def _gap(self, end: float) -> None:
        """Attributes the time up to `end`, in which the devices did nothing for the run."""
        if end <= self._edge:
            return
        unknown = end - self._edge
        for kind, start, stop in self._segments:
            inside = min(stop, end) - max(start, self._edge)
            if inside > 0:
                self.seconds[kind] += inside
                unknown -= inside
        self.seconds["other"] += max(unknown, 0.0)
        self._edge = end


class Watch:
    """Tells when the devices are done with what was given to them, whatever the host does then.

    A thread of its own waits, so that a signal reaches the main one while it waits for the thread.
    """

    def __init__(self) -> None:
        self._given: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[float | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._given.put(None)
        # A device that hangs keeps the thread; it ends with the process.
        self._thread.join(timeout=1.0)

    def give(self, values: Any) -> None:
        """`values`: arrays of one step; steps are done in the order in which they are given."""
        self._given.put(values)

    def done(self, timeout: float | None = None) -> float:
        """Waits for the oldest step that was given; when it was done, by `time.perf_counter`.

        Raises:
          queue.Empty: it is not done after `timeout` seconds.
          Exception: what the step raised.
        """
        found = self._done.get(timeout=timeout)
        if isinstance(found, BaseException):
            raise found
        return found

    def _run(self) -> None:
        while (values := self._given.get()) is not None:
            try:
                jax.block_until_ready(values)
                self._done.put(time.perf_counter())
            except Exception as error:  # whatever the step raised belongs to who waits for it
                self._done.put(error)


def process_age() -> float:
    """Seconds since this process was started; 0 where that is not known."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        with open("/proc/uptime") as file:
            uptime = float(file.read().split()[0])
        return max(uptime - ticks / os.sysconf("SC_CLK_TCK"), 0.0)
    except (OSError, ValueError, IndexError):
        return 0.0
