"""Requests to end a run: Ctrl-C, and the termination of its process.

The first request lets the current step finish, so that the state can be saved; a second one ends
the process at once. Signals are read by a thread of their own, since Python's handlers wait until
the main thread is back from a compilation or a collective, which may be never.

With several processes all must save the same step. Termination requests then belong to JAX's
preemption service, which makes the processes agree on the next poll; a Python handler would take
them away from it. A Ctrl-C is handed to the service.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from types import TracebackType
from typing import Any

from jax.experimental import multihost_utils

from spmd.runtime import processes

__all__ = ["StopRequest"]

# By signal: Ctrl-C is final; a termination request asks to be started again.
_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}
_AGREE_S = 600.0  # another process may still compile


class StopRequest:
    """While entered, the first request is told by `poll`, and a second one exits.

    Attributes:
      exit_code: what `poll` last told: None, 130 for Ctrl-C, 75 (try again) for a termination.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self._asked: int | None = None  # the exit code of a request to this process
        self._polls = 0
        self._several = processes.count() > 1
        self._before: dict[int, Any] = {}

    def poll(self) -> int | None:
        """Whether to end now, as an exit code; the same in all processes.

        Must be called in every loop, by all processes at the same places.

        Raises:
          BarrierError: the processes do not come to the same place.
        """
        if self.exit_code is not None:
            return self.exit_code
        if not self._several:
            self.exit_code = self._asked
            return self.exit_code
        self._polls += 1
        if multihost_utils.reached_preemption_sync_point(self._polls):
            asked = processes.gather("request to end", str(self._asked or 0), _AGREE_S)
            # Ctrl-C in any process is final for all.
            self.exit_code = max(int(code) for code in asked) or _EXIT_CODES[signal.SIGTERM]
        return self.exit_code

    def __enter__(self) -> StopRequest:
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        numbers = [signal.SIGINT] if self._several else list(_EXIT_CODES)
        for number in numbers:
            self._before[number] = signal.signal(number, lambda number, frame: None)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._write.close()
        self._thread.join()
        self._read.close()

    def _listen(self) -> None:
        while number := self._read.recv(1):
            if number[0] in self._before:
                self._request(signal.Signals(number[0]))

    def _request(self, number: signal.Signals) -> None:
        code = _EXIT_CODES[number]
        if self._asked is not None:
            _say(f"{number.name} again: ends at once, without saving")
            os._exit(code)
        self._asked = code
        _say(f"{number.name}: saves after this step, then ends; again: ends at once")
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)


def _say(text: str) -> None:
    # Not through a console: the main thread may hold its lock.
    os.write(2, f"\n{text}\n".encode())
