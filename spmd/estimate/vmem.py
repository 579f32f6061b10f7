"""Which temporaries XLA keeps in a core's own memory, so that they take nothing of the device's.

It prefers what lives for a short time: of that fits most, and each is written and read soon.
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
    lines: int
    start: int
    number: int


def on_chip(candidates: Sequence[Lived], lines: int, capacity: float) -> frozenset[int]:
    """Numbers of the candidates that are kept in `capacity` bytes, over a program of `lines`."""
    free = [capacity] * (lines + 2)
    chosen: set[int] = set()
    offers = sorted(
        _Offer(buffer.end - buffer.start, buffer.start, i)
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
