"""What the processes of a run say to each other: barriers, agreement, one value for all.

All goes through the coordination service of `jax.distributed`, no device takes part: it works
before a backend starts, and while a collective hangs. Every wait has a limit. With one process,
nothing is said and nothing waits. All processes must call the same functions with the same names
in the same order for each name.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence

from sharding._jax import distributed
from sharding._jax.distributed import Service, ServiceError
from sharding.errors import Problem, SpmdError

__all__ = ["AgreementError", "BarrierError", "agree", "barrier", "broadcast", "count", "gather"]
__all__ += ["index", "is_primary", "named"]

_ROOT = "spmd"
_ABSENT = "(nothing)"
_SHOWN = 80  # characters of a value


class BarrierError(SpmdError):
    """Not all processes came in time: a peer is lost or hangs."""

    exit_code = 6


class AgreementError(SpmdError):
    """Processes that must have been started alike were not."""

    exit_code = 2


def index() -> int:
    """The number of this process, from 0."""
    found = distributed.service()
    return found.process if found else 0


def count() -> int:
    """How many processes take part."""
    found = distributed.service()
    return found.processes if found else 1


def is_primary() -> bool:
    """Whether this is process 0: the one that prints and writes metrics."""
    return index() == 0


def barrier(name: str, timeout_s: float) -> None:
    """Waits until all processes are here.

    Args:
      name: what the processes wait for, for keys and messages.
      timeout_s: seconds.

    Raises:
      BarrierError: they did not all come in time; it names those that are missing.
    """
    if found := _several():
        folder = _folder(found, "barrier", name)
        _meet(found, folder, name, "", timeout_s)
        found.delete(f"{folder}/{found.process}")


def agree(name: str, values: Mapping[str, str], timeout_s: float) -> None:
    """Waits until all processes have given `values`, and compares them.

    Args:
      values: by what they are of, as messages name it.
      timeout_s: seconds.

    Raises:
      AgreementError: they differ; it names each key with the processes that have each value.
      BarrierError: not all came in time.
    """
    given = [json.loads(text) for text in gather(name, json.dumps(dict(values)), timeout_s)]
    if problems := _differences(name, given):
        raise AgreementError(*problems)


def gather(name: str, value: str, timeout_s: float) -> list[str]:
    """The value of each process, by its number, in all processes.

    Args:
      timeout_s: seconds.

    Raises:
      BarrierError: not all came in time.
    """
    if not (found := _several()):
        return [value]
    folder = _folder(found, "gather", name)
    _meet(found, folder, name, value, timeout_s)
    given = found.entries(folder)
    # Others may still read: what was written is deleted when all have met once more.
    _meet(found, f"{folder}-read", name, "", timeout_s)
    found.delete(f"{folder}/{found.process}")
    found.delete(f"{folder}-read/{found.process}")
    # As many as there are: that processes count alike is what may be asked here.
    return [given[process] for process in sorted(given, key=int)]


def broadcast(name: str, value: str | None, timeout_s: float) -> str:
    """The value of process 0, in all processes, once all have it.

    Args:
      value: of process 0; what others give is ignored.
      timeout_s: seconds.

    Raises:
      BarrierError: not all came in time.
      ValueError: process 0 gave None.
    """
    found = _several()
    if is_primary() and value is None:
        raise ValueError(f"broadcast({name!r}): process 0 has to give a value")
    if not found:
        assert value is not None
        return value
    folder, limit = _folder(found, "broadcast", name), time.monotonic() + timeout_s
    if value is not None and found.process == 0:
        found.set(f"{folder}/value", value)
    else:
        try:
            value = found.get(f"{folder}/value", timeout_s)
        except ServiceError as error:
            raise BarrierError(_missing(name, [0], timeout_s, error)) from error
    _meet(found, f"{folder}-read", name, "", max(limit - time.monotonic(), 0.0))
    if found.process == 0:
        found.delete(f"{folder}/value")
    found.delete(f"{folder}-read/{found.process}")
    return value


def _several() -> Service | None:
    found = distributed.service()
    return found if found and found.processes > 1 else None


def _folder(service: Service, kind: str, name: str) -> str:
    used = f"{kind}/{name}"
    return f"{_ROOT}/{used}/{next(service.uses[used])}"


def _meet(service: Service, folder: str, name: str, value: str, timeout_s: float) -> None:
    """Writes `folder/<process>` and waits until all have."""
    started = time.monotonic()
    try:
        service.set(f"{folder}/{service.process}", value)
        service.wait(folder, timeout_s)
    except ServiceError as error:
        waited = time.monotonic() - started
        raise BarrierError(_missing(name, _late(service, folder), waited, error)) from error


def _late(service: Service, folder: str) -> list[int]:
    """Who has not written below `folder`; empty if nobody can say."""
    try:
        here = service.entries(folder)
    except ServiceError:
        return []
    return [process for process in range(service.processes) if str(process) not in here]


def _missing(name: str, late: list[int], waited: float, error: Exception) -> Problem:
    reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
    why = f"{named(late)} did not come" if late else f"the coordinator says: {reason}"
    return Problem(
        f"waited {waited:.1f} s for all processes ({name})",
        why,
        "see what that process printed last; start all processes again, the run goes on from its"
        " newest checkpoint",
    )


def _differences(name: str, given: Sequence[Mapping[str, str]]) -> list[Problem]:
    problems = []
    for key in dict.fromkeys(key for values in given for key in values):
        by_value: dict[str, list[int]] = {}
        for process, values in enumerate(given):
            by_value.setdefault(values.get(key, _ABSENT), []).append(process)
        if len(by_value) > 1:
            said = "; ".join(f"{_cut(v)} in {named(who)}" for v, who in by_value.items())
            why = f"{said}: they would run different programs, and wait for each other"
            fix = "start all processes with the same command, files and packages"
            problems.append(Problem(f"{key} differs between processes ({name})", why, fix))
    return problems


def named(numbers: Iterable[int]) -> str:
    """`process 3`, `processes 1, 2, 3`, `processes 0, 1 and 62 more`."""
    numbers = list(numbers)
    shown = ", ".join(map(str, numbers[:8]))
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"process{'es' if len(numbers) > 1 else ''} {shown}{more}"


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
