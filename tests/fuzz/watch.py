"""One case under a time limit, and what may come of it."""

from __future__ import annotations

import contextlib
import io
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NamedTuple

from sharding.errors import SpmdError

LIMIT = 5  # seconds


class Hang(BaseException):
    """A case took longer than it may."""


class Result(NamedTuple):
    """What became of a case.

    Attributes:
      kind: "accepted", or the class of our own error; "crash" or "hang" for what must not be.
      detail: traceback of a crash or hang.
      seconds: that it took.
    """

    kind: str
    detail: str
    seconds: float

    @property
    def bad(self) -> bool:
        return self.kind in ("crash", "hang")


def attempt(case: Callable[[], object]) -> Result:
    """Runs a case, without its output."""
    started = time.perf_counter()
    kind, detail = "accepted", ""
    try:
        with limited(), contextlib.redirect_stdout(io.StringIO()):
            case()
    except SpmdError as error:
        kind = type(error).__name__
        lines = [str(problem).count("\n") for problem in error.problems]
        if max(lines) > 5 or not str(error).isascii() and not _printable(str(error)):
            kind, detail = "crash", f"a message that cannot be shown: {error!r}"
    except Hang:
        kind, detail = "hang", traceback.format_exc()
    except BaseException:
        kind, detail = "crash", traceback.format_exc()
    return Result(kind, detail, time.perf_counter() - started)


@contextlib.contextmanager
def limited(seconds: float | None = None) -> Iterator[None]:
    """Raises Hang in the block after so many seconds, LIMIT by default; inside of another one it
    takes that one's place."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds or LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _printable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
