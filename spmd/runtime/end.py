"""How several processes end: together, or all at once when one of them fails.

A process that fails says so to all others through the coordination service, and leaves without
the barrier with which `jax.distributed` ends, where everybody would wait for everybody. Each of
the others has a thread that waits for such a message, and ends its process even while the main
thread hangs in a collective. What is not told here, a process that was killed, JAX's client finds
by heartbeats, and aborts.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

from sharding._jax import distributed
from sharding._jax.distributed import Service, ServiceError
from sharding.errors import Problem
from spmd.runtime import processes
from spmd.runtime.processes import BarrierError, named

__all__ = ["fail", "finish", "uncaught", "watch", "write"]

_PEER_LOST = 6
# A configuration that is wrong in one process is wrong for a supervisor that starts all again.
_PASSED_ON = frozenset({2, 3, 4, 5, 75, 130})
_COLLECT_S = 1.0  # for others to fail in the same way, so that it is printed once
_GRACE_S = 2.5  # for a process to fail by itself, after it heard of another
_LEAVE_S = 10.0  # nobody takes longer to leave
_LOOK_S = 30.0
_LOST = re.compile(
    r"connection (closed|reset) by peer|socket closed|gloo|nccl|broken pipe|unhealthy|UNAVAILABLE",
    re.IGNORECASE,
)
_STOP = "stop"


class _Watch(threading.Thread):
    """Waits for the message that another process failed."""

    def __init__(self, service: Service):
        super().__init__(name="spmd-watch", daemon=True)
        self.service = service
        self.leaving = threading.Event()
        self.told = threading.Event()
        self._failed = {"process": 0, "code": _PEER_LOST}  # who failed, once told

    def run(self) -> None:
        while not self.leaving.is_set():
            try:
                mail = self.service.get(_mailbox(self.service.process), _LOOK_S)
            except ServiceError as error:
                if "DEADLINE_EXCEEDED" in str(error):
                    continue
                return  # the coordinator is gone, and JAX's own client ends this process
            if mail == _STOP:
                return
            self._failed = json.loads(mail)
            self.told.set()
            if not self.leaving.wait(_GRACE_S):
                self.follow()
            return

    def follow(self) -> NoReturn:
        """Ends this process because another one failed, which has printed why."""
        self.leaving.set()
        if self.service.process == 0:
            write(f"{named([self._failed['process']])} failed: all processes end")
        code = self._failed["code"]
        _leave(self.service, code if code in _PASSED_ON else _PEER_LOST)

    def stop(self) -> None:
        self.leaving.set()
        self.service.set(_mailbox(self.service.process), _STOP)
        self.join(_LEAVE_S)


_watch: _Watch | None = None
_end_s = 20.0


def watch(end_s: float) -> None:
    """Ends this process when another one fails, and the others when this one does.

    Args:
      end_s: seconds that `finish` waits.
    """
    global _watch, _end_s
    _end_s = end_s
    service = distributed.service()
    if service is None or service.processes == 1 or _watch is not None:
        return
    _watch = _Watch(service)
    _watch.start()
    sys.excepthook = _hook


def finish() -> None:
    """Waits until all processes have done their work; the program may end then. Where they do not
    come in time, this process ends with exit code 6."""
    global _watch
    if _watch is None:
        return
    try:
        processes.barrier("end of the run", _end_s)
    except BarrierError as error:
        fail(error.exit_code, f"error: {error}", write)
    _watch.stop()
    _watch = None


def fail(code: int, text: str, show: Callable[[str], None], at_once: bool = False) -> None:
    """Prints why this process fails; with several it ends them all, and does not return.

    Of processes that fail for the same reason, one prints it.

    Args:
      code: the exit code.
      text: the message.
      show: prints it.
      at_once: whether a process that is alone leaves here too, since its end would hang.
    """
    if _watch is None:
        show(text)
        if at_once:
            sys.stdout.flush()
            os._exit(code)
        return
    alarm = threading.Timer(_LEAVE_S, os._exit, (code,))
    alarm.daemon = True
    alarm.start()
    _watch.leaving.set()
    service = _watch.service
    alike = _alike(service, text)
    if service.process == min(alike):
        show(f"{named(alike)}: {text}")
    mail = json.dumps({"process": service.process, "code": code})
    try:
        for process in range(service.processes):
            if process not in alike:
                service.set(_mailbox(process), mail)
    except ServiceError:
        pass  # the coordinator is gone, and everybody sees that
    _leave(service, code)


def write(text: str) -> None:
    """A line on stderr, from whatever thread."""
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)


def _alike(service: Service, text: str) -> list[int]:
    """The processes that fail with the same text within a moment, this one among them."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    try:
        service.set(f"spmd/failed/{service.process}", digest)
        time.sleep(_COLLECT_S)
        found = service.entries("spmd/failed")
    except ServiceError:
        return [service.process]
    return sorted(int(process) for process, other in found.items() if other == digest)


def _leave(service: Service, code: int) -> NoReturn:
    """Ends this process at once; process 0, which has the store, when the others have gone."""
    until = time.monotonic() + _LEAVE_S / 2
    try:
        service.set(f"spmd/gone/{service.process}", "")
        while service.process == 0 and time.monotonic() < until:
            if len(service.entries("spmd/gone")) == service.processes:
                break
            time.sleep(0.05)
    except ServiceError:
        pass
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _mailbox(process: int) -> str:
    return f"spmd/mail/{process}"


def uncaught(error: BaseException) -> None:
    """With several processes: `fail` with the traceback."""
    if _watch is None:
        return
    text = "".join(traceback.format_exception(error)).rstrip()
    code = getattr(error, "exit_code", 1)
    if isinstance(error, KeyboardInterrupt):
        code, text = 130, "interrupted"
    elif isinstance(error, Exception) and _LOST.search(str(error)):
        if _watch.told.wait(_COLLECT_S):
            _watch.follow()  # the connection broke because that process left
        code = _PEER_LOST
        why = "the connection to another process broke: it was killed, or its node is lost"
        fix = "start all processes again, the run goes on from its newest checkpoint"
        text += f"\nerror: {Problem('a collective failed', why, fix)}"
    fail(code, text, write)


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    uncaught(error)
    sys.__excepthook__(kind, error, trace)
