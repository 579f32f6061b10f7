"""Kills a process that saves, again and again, and lets the next one say what is left.

The processes come from a fork server that has imported everything, so that each takes a second.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import random
import time
from pathlib import Path
from typing import Any

from tests.faults import saver

START_S = 120.0  # until a process has resumed
AIMED_S = 60.0  # until it is at the point
RANDOM_S = 2.5  # until it is killed


@dataclasses.dataclass
class Kill:
    """What one process found when it started, and what it had committed when it was killed.

    Attributes:
      resumed: the step it went on from; 0 for none.
      right: whether the values of that step were those of the step.
      passed: what was wrong with newer steps.
      committed: the newest step that it said was committed.
      there: whether it reached the point that the kill was aimed at.
    """

    resumed: int
    right: bool
    passed: tuple[str, ...]
    committed: int
    there: bool = False


def server() -> Any:
    """Starts processes that have imported what a saver needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.preload"])
    return context


def kill(
    context: Any, folder: Path, columns: int, generator: random.Random, point: str = ""
) -> Kill:
    """Starts a saver in `folder`, and kills it at `point`, or at a random moment of its saves.

    Raises:
      AssertionError: the saver failed, or was not there in time.
    """
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=saver.run, args=(str(folder), columns, point, theirs))
    process.start()
    theirs.close()
    try:
        assert ours.poll(START_S), "the saver has not started in time"
        kind, step, right, passed = _receive(ours, process)
        assert kind == "resumed"
        found = Kill(step, right, passed, step)
        limit = time.monotonic() + (AIMED_S if point else generator.uniform(0.0, RANDOM_S))
        while not found.there and ours.poll(max(limit - time.monotonic(), 0)):
            kind, step = _receive(ours, process)
            found.there = kind == "there"
            found.committed = step if kind == "committed" else found.committed
    finally:
        process.kill()
        process.join()
    while ours.poll():  # what it said before it was killed
        try:
            kind, step = ours.recv()
        except EOFError:
            break
        found.committed = step if kind == "committed" else found.committed
    assert found.there == bool(point), f"it never came to be {point}"
    return found


def faults(before: Kill | None, now: Kill) -> list[str]:
    """What is wrong with what a process found, given what the one before it had committed."""
    found = []
    if before and now.resumed < before.committed:
        found.append(f"step {before.committed} was committed and {now.resumed} was resumed")
    if not now.right:
        found.append(f"the values of step {now.resumed} are wrong")
    return found + [f"a listed step was broken: {text}" for text in now.passed]


def _receive(ours: Any, process: Any) -> Any:
    try:
        return ours.recv()
    except EOFError:
        process.join(10)
        raise AssertionError(f"the saver ended with code {process.exitcode}") from None
