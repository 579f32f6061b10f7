"""The coordination service of `jax.distributed`: who takes part, a store of texts, and barriers.

JAX has these for its own use; the public part is starting and ending, and nothing to talk with.
The service needs no devices, so it works before a backend starts and while a collective hangs.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed

__all__ = ["Service", "ServiceError", "service"]

# What a call raises when its time is over, or the service is gone.
ServiceError = jax.errors.JaxRuntimeError


class Service:
    """One process' connection to the coordination service.

    Attributes:
      process, processes: the number of this process, and how many there are.
      uses: how often each name was used, for keys that no earlier use has.
    """

    def __init__(self, client: Any, process: int, processes: int):
        self.process, self.processes = process, processes
        self.uses: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)
        self._client = client

    def set(self, key: str, value: str) -> None:
        """Writes `value`, for all to read."""
        self._client.key_value_set(key, value, allow_overwrite=True)

    def get(self, key: str, timeout_s: float) -> str:
        """Waits until somebody has written `key`.

        Raises:
          ServiceError: nobody did in time.
        """
        return self._client.blocking_key_value_get(key, _ms(timeout_s))

    def entries(self, folder: str) -> dict[str, str]:
        """What there is below `folder/`, by the rest of the key."""
        found = self._client.key_value_dir_get(f"{folder}/")
        return {key.removeprefix(f"{folder}/"): value for key, value in found}

    def delete(self, key: str) -> None:
        """Forgets `key`."""
        self._client.key_value_delete(key)

    def wait(self, barrier: str, timeout_s: float) -> None:
        """Waits until every process waits at `barrier`, a name that is used once.

        Raises:
          ServiceError: not all came in time.
        """
        self._client.wait_at_barrier(barrier, _ms(timeout_s))


_current: tuple[Any, Service] | None = None


def service() -> Service | None:
    """The service of the running `jax.distributed`; None where it was not started."""
    global _current
    state = distributed.global_state
    if state.client is None:
        return None
    if _current is None or _current[0] is not state.client:
        _current = state.client, Service(state.client, state.process_id, state.num_processes)
    return _current[1]


def _ms(seconds: float) -> int:
    return max(int(seconds * 1000), 1)
