"""The errors of a training run, each with the exit code that train.py returns for it."""

from __future__ import annotations

from sharding.errors import SpmdError, printable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DivergedError",
    "Interrupted",
    "StalledError",
    "TrainingError",
    "quoted",
]

_LONGEST = 200  # characters of a user's text that a message repeats


class TrainingError(SpmdError):
    """Base of the errors that end a run with a message instead of a traceback."""

    exit_code = 1


class ConfigError(TrainingError):
    """The options, or what they name, cannot work. Nothing was compiled or written."""

    exit_code = 2


class DataError(TrainingError):
    """What is learnt cannot be read, or is not what it should be."""

    exit_code = 3


class CheckpointError(TrainingError):
    """A checkpoint cannot be written or read, or belongs to another run."""

    exit_code = 4


class DivergedError(TrainingError):
    """The loss is no longer a finite number."""

    exit_code = 5


class StalledError(TrainingError):
    """A step does not end. What it waits for may never answer: the process must leave at once."""

    exit_code = 6


def quoted(text: object) -> str:
    """A user's text as messages repeat it: on one line, without control characters, not endless."""
    found = printable(str(text))
    return found if len(found) <= _LONGEST else f"{found[: _LONGEST - 3]}..."


class Interrupted(Exception):
    """A signal ended the run after its state was saved.

    Attributes:
      exit_code: 130 for Ctrl-C, 75 (try again) for a termination request.
    """

    def __init__(self, exit_code: int):
        super().__init__(f"interrupted (exit code {exit_code})")
        self.exit_code = exit_code
