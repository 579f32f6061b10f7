"""The errors of the project: what you passed, why it cannot work, how to fix it.

Every user-facing error is built from one or more `Problem`s, so that all offenders are reported
at once and every message has the same three parts.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import NamedTuple


class Problem(NamedTuple):
    """One thing that is wrong, in the three parts that every message has."""

    what: str
    why: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}\n  why: {self.why}\n  fix: {self.fix}"


class SpmdError(ValueError):
    """Base of all errors raised on purpose by `sharding` and `spmd`.

    Attributes:
      problems: every offender found, in program order.
    """

    def __init__(self, *problems: Problem):
        self.problems = problems
        super().__init__(_render(problems))


class MeshError(SpmdError):
    """The mesh itself, or how it meets the devices, is wrong."""


class SpecError(SpmdError):
    """A sharding annotation does not fit the array, the mesh or itself."""


class RuleError(SpmdError):
    """A primitive has no sharding rule."""


class ArgumentError(SpmdError):
    """Arguments of a public function do not fit together."""


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument has the wrong type; `jax.jit` raises a TypeError there too."""


class DonationError(ArgumentError, RuntimeError):
    """An argument was donated twice, or before, or deleted; `jax.jit` has a RuntimeError there."""


class GatherError(SpmdError):
    """A program gathers sharded values, and `on_gather="error"` forbids that."""


class StrictError(SpmdError):
    """A program wastes memory or communication, and `strict=True` forbids that."""


class VerificationError(SpmdError):
    """A stage produced a program that violates its own invariants: a defect of this project."""


class ShardingWarning(UserWarning):
    """Something was done differently from what was annotated, and what it costs."""


def _render(problems: Sequence[Problem]) -> str:
    if len(problems) == 1:
        return str(problems[0])
    return f"{len(problems)} problems\n" + "\n".join(
        f"({i}) {problem}" for i, problem in enumerate(problems, 1)
    )


def merged(problems: Sequence[Problem]) -> list[Problem]:
    """Problems of one cause as one: the first is told in full, with the number of the others."""
    groups: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((problem.why, problem.fix), []).append(problem)
    return [
        group[0]._replace(what=f"{group[0].what} (and {len(group) - 1} more like it)")
        if len(group) > 1
        else group[0]
        for group in groups.values()
    ]


def printable(text: str) -> str:
    """What a user wrote, as messages repeat it: without control characters."""
    return text if text.isprintable() else repr(text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest known name, or the empty string."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
