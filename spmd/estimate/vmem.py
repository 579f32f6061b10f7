"""Which temporaries XLA keeps in a core's own memory, so that they take nothing of the device's.

It prefers those of which most bytes are written and read: that is what it saves.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Lived(Protocol):
    """A buffer: bytes, and the lines from which and up to which it lives."""

    @property
    def bytes(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...


class _Offer(NamedTuple):
    left: int  # less than nothing: bytes that are not moved to and from the device's memory
    start: int
    number: int


def on_chip(
    candidates: Sequence[Lived], moved: Sequence[int], lines: int, capacity: float
) -> frozenset[int]:
    """Numbers of the candidates that are kept in `capacity` bytes, over a program of `lines`.

    Args:
      moved: per candidate, bytes that are written of it and read.
    """
    free = [capacity] * (lines + 2)
    chosen: set[int] = set()
    offers = sorted(
        _Offer(-moved[i], buffer.start, i)
        for i, buffer in enumerate(candidates) if 0 < buffer.bytes <= capacity
    )  # fmt: skip
    for _, start, i in offers:
        buffer = candidates[i]
        span = range(start, min(max(buffer.end, start + 1), lines + 1))
        if all(free[line] >= buffer.bytes for line in span):
            chosen.add(i)
            for line in span:
                free[line] -= buffer.bytes
    return frozenset(chosen)
