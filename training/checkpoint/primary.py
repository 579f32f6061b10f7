"""Work that one process does for all of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from sharding.errors import Problem
from spmd.runtime import processes
from training.errors import CheckpointError

__all__ = ["WAIT_S", "WRITE_S", "on_primary"]

WAIT_S = 1800.0  # seconds; for disks, so long
WRITE_S = 1200.0  # for what all write of one step; when one cannot, the others wait so long


def on_primary(name: str, work: Callable[[], Any]) -> Any:
    """What `work` returns in the primary process, in all of them; the others wait for it.

    Args:
      name: of the work, for messages.
      work: returns what JSON can hold.

    Raises:
      CheckpointError: `work` raised it, or an OSError, in all processes.
      BarrierError: a process did not come in time.
    """
    outcome: dict[str, Any] = {}
    if processes.is_primary():
        try:
            outcome = {"value": work()}
        except CheckpointError as error:
            outcome = {"problems": error.problems}
        except OSError as error:
            why = f"{error.strerror or error}: {error.filename}"
            outcome = {"problems": [(f"{name} failed", why, "make the folder accessible")]}
    told = processes.broadcast(name, json.dumps(outcome), WAIT_S)
    outcome = json.loads(told)
    if "problems" in outcome:
        raise CheckpointError(*(Problem(*problem) for problem in outcome["problems"]))
    return outcome["value"]
