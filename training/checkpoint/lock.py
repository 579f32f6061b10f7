"""One run at a time in a folder: a lock that outlives neither its process nor its machine.

The kernel holds the lock (`flock`) as long as the process lives, and frees it however it ends, so
taking over the lock of a dead run needs no judgement and leaves no gap for a third one. The file
says who holds it. File systems exist whose locks end at one machine: there the holder's heartbeat,
the file's time stamp, tells a living run on another machine.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from sharding.errors import Problem
from training.errors import CheckpointError

__all__ = ["Lock"]

NAME = "lock"
_BEAT_S = 5.0
_SILENCE_S = 3 * _BEAT_S  # how long a run on another machine is listened for


class Lock:
    """The lock of one folder, held from `take` to `release`."""

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self._handle: int | None = None
        self._content = b""
        self._released = threading.Event()
        self._beating: threading.Thread | None = None

    @property
    def held(self) -> bool:
        """Whether this object has taken it, and not released."""
        return self._handle is not None

    def take(self) -> None:
        """Takes the lock; does nothing if this object holds it.

        Raises:
          CheckpointError: another run holds it, or the file cannot be written.
        """
        if self._handle is not None:
            return
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._claim(handle)
        except BaseException as error:
            os.close(handle)
            if isinstance(error, OSError):
                raise self._unwritable(error) from error
            raise
        self._handle = handle
        self._released.clear()
        self._beating = threading.Thread(target=self._beat, args=(handle,), daemon=True)
        self._beating.start()

    def check(self) -> None:
        """Looks whether the lock is still this object's.

        Raises:
          CheckpointError: it was removed, or another run has it.
        """
        try:
            found = self.path.read_bytes()
        except OSError as error:
            what = f"the lock {self.path} cannot be read: {error.strerror}"
            why = "the folder was moved or removed while the run used it"
            raise CheckpointError(Problem(what, why, "put the folder back")) from error
        if found != self._content:
            raise CheckpointError(self._held(found))

    def release(self) -> None:
        """Gives the lock back, if it is held."""
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        self._released.set()
        if self._beating is not None:
            self._beating.join(_BEAT_S)  # the number of a closed file may soon be another's
        try:
            os.ftruncate(handle, 0)
        except OSError:
            pass  # the file system is gone or read-only; the kernel frees the lock all the same
        os.close(handle)

    def _claim(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(self._held(os.pread(handle, 4096, 0))) from None
        found = os.pread(handle, 4096, 0)
        host = _parsed(found).get("host", socket.gethostname())
        if host != socket.gethostname() and _beats(handle):
            raise CheckpointError(self._held(found))
        me = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.time()}
        self._content = f"{json.dumps(me)}\n".encode()
        os.ftruncate(handle, 0)
        os.pwrite(handle, self._content, 0)
        os.fsync(handle)

    def _beat(self, handle: int) -> None:
        while not self._released.wait(_BEAT_S):
            try:
                os.utime(handle)
            except OSError:
                return

    def _held(self, content: bytes) -> Problem:
        holder = _parsed(content)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.get("started", 0)))
        who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')} since {since}"
        return Problem(
            f"--checkpoint-dir {self.path.parent}",
            f"another run uses the folder: {who if holder else 'it has just begun'}",
            "wait until it ends, end it, or name another folder",
        )

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            Problem(
                f"--checkpoint-dir {self.path.parent}",
                f"the folder cannot be written: {error.strerror or error}",
                "name a folder that can be written",
            )
        )


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _beats(handle: int) -> bool:
    """Whether a holder elsewhere renews the time stamp. Clocks may differ, so it is only compared
    with itself."""
    before, limit = os.fstat(handle).st_mtime_ns, time.monotonic() + _SILENCE_S
    while time.monotonic() < limit:
        time.sleep(0.2)
        if os.fstat(handle).st_mtime_ns != before:
            return True
    return False
