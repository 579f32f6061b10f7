"""The order in which a compiler may run the lines of a plan, so as to hold little memory.

A program says what depends on what; compilers choose the order. Remat above all writes the
repeated forward pass first, and a compiler runs each part of it when the backward pass needs it.
"""

import heapq
from collections.abc import Mapping, Sequence

from spmd.estimate.fusion import Held, Name, name
from spmd.estimate.work import Line
from spmd.partition.plan import Compute, ProgramPlan, RegionPlan


def scheduled(plan: ProgramPlan, lines: tuple[Line, ...], kept: Held) -> tuple[Line, ...]:
    """The lines in the new order, numbered by it.

    Every region is ordered from its end: of the lines whose readers are all placed comes the one
    after which least is held.
    """
    blocks: dict[int, list[Line]] = {}
    for line in lines:
        blocks.setdefault(line.parent, []).append(line)
    order: list[Line] = []
    _place(plan.body, -1, blocks, kept, order)
    number = {line.index: i for i, line in enumerate(order)}
    return tuple(
        line._replace(index=i, parent=number.get(line.parent, -1)) for i, line in enumerate(order)
    )


def _place(
    region: RegionPlan, parent: int, blocks: Mapping[int, list[Line]], kept: Held,
    order: list[Line],
) -> None:  # fmt: skip
    for line in _Backwards(region, blocks.get(parent, []), kept).run():
        order.append(line)
        found = line.instruction
        for inner in found.regions if isinstance(found, Compute) else ():
            own = {id(i) for i in inner.code}
            mine = [child for child in blocks.get(line.index, []) if id(child.instruction) in own]
            _place(inner, line.index, {**blocks, line.index: mine}, kept, order)


_STEP = 1 << 16  # bytes


class _Backwards:
    """Orders the lines of one region, last line first."""

    def __init__(self, region: RegionPlan, body: Sequence[Line], kept: Held):
        self.body, self.kept = body, kept
        self.live: set[Name] = {kept.memory_of(key) for key in region.outputs}
        writer = {name(key): line.index for line in body for key in line.writes}
        self.makers = {
            line.index: {writer[name(k)] for k in line.reads if name(k) in writer}
            for line in body
        }
        self.readers = dict.fromkeys((line.index for line in body), 0)
        for makers in self.makers.values():
            for maker in makers:
                self.readers[maker] += 1
        self.lines = {line.index: line for line in body}
        self.waiting: dict[Name, set[int]] = {}
        self.heap: list[tuple[int, int, int]] = []  # growth, -(number of the offer), line
        self.offers = 0
        self.placed: set[int] = set()

    def run(self) -> list[Line]:
        for line in self.body:
            if not self.readers[line.index]:
                self.offer(line.index)
        found: list[Line] = []
        while self.heap:
            growth, _, index = heapq.heappop(self.heap)
            if index in self.placed or growth != self.growth(index):
                continue  # placed, or offered again with another score
            self.placed.add(index)
            found.append(self.lines[index])
            self.settle(index)
        return found[::-1]

    def offer(self, index: int) -> None:
        """Of lines that are alike the one that was offered last comes first: what made a value is
        placed right before its reader."""
        self.push(index)
        for key in self.kept.reads[index]:
            if name(key) not in self.live:
                self.waiting.setdefault(name(key), set()).add(index)

    def push(self, index: int) -> None:
        self.offers += 1
        heapq.heappush(self.heap, (self.growth(index), -self.offers, index))

    def growth(self, index: int) -> int:
        """Bytes held before the line, less those held after it, in steps that matter."""
        line = self.lines[index]
        more = sum(k.local_bytes(line.mesh) for k in self.kept.reads[index]
                   if name(k) not in self.live)  # fmt: skip
        less = sum(k.local_bytes(line.mesh) for k in self.kept.writes[index]
                   if name(k) in self.live)  # fmt: skip
        return round((more - less) / _STEP)

    def settle(self, index: int) -> None:
        """Updates what is live before the line, and offers the lines that it was waiting for."""
        self.live -= {name(key) for key in self.kept.writes[index]}
        changed: set[int] = set()
        for key in self.kept.reads[index]:
            if name(key) not in self.live:
                self.live.add(name(key))
                changed |= self.waiting.pop(name(key), set())
        for maker in self.makers[index]:
            self.readers[maker] -= 1
            if not self.readers[maker]:
                self.offer(maker)
        for other in changed - self.placed:
            self.push(other)
