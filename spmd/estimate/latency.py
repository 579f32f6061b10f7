"""What waits for collectives that run beside computation, and so is run later than it could be.

Compilers hide such collectives: what reads their results waits, as long as there is other work to
do meanwhile. Until then operand and result are both held.
"""

import math
from collections.abc import Mapping

from spmd.chips import Chip
from spmd.estimate.fusion import Compiler, Held, Name, name
from spmd.estimate.roofline import compute_seconds
from spmd.estimate.work import Line
from spmd.partition.plan import Move


def beside(line: Line, compiler: Compiler) -> bool:
    """Whether a line's collectives are started, and waited for later."""
    moves = isinstance(line.instruction, Move) and bool(line.wires)
    return moves and all(wire.kind in compiler.beside for wire in line.wires)


def delayed(lines: tuple[Line, ...], kept: Held, compiler: Compiler) -> tuple[Line, ...]:
    """The lines in the order in which they run when readers of transfers wait, numbered by it."""
    if compiler.chip is None or not any(beside(line, compiler) for line in lines):
        return lines
    blocks: dict[int, list[Line]] = {}
    for line in lines:
        blocks.setdefault(line.parent, []).append(line)
    order: list[Line] = []
    _place(-1, blocks, kept, compiler, order)
    number = {line.index: i for i, line in enumerate(order)}
    return tuple(
        line._replace(index=i, parent=number.get(line.parent, -1)) for i, line in enumerate(order)
    )


def _place(
    parent: int, blocks: Mapping[int, list[Line]], kept: Held, compiler: Compiler,
    order: list[Line],
) -> None:  # fmt: skip
    assert compiler.chip is not None
    for line in _Waiting(blocks.get(parent, []), kept, compiler, compiler.chip).run():
        order.append(line)
        if line.index in blocks:
            _place(line.index, blocks, kept, compiler, order)


class _Waiting:
    """Runs the lines of one region by the clock; what waits runs when its transfer is done, or when
    there is nothing else to do."""

    def __init__(self, body: list[Line], kept: Held, compiler: Compiler, chip: Chip):
        self.body, self.kept, self.compiler, self.chip = body, kept, compiler, chip
        self.now = 0.0
        self.links = 0.0  # when they are free
        self.ready: dict[Name, float] = {}
        self.order: list[Line] = []
        self.waiting: list[Line] = []
        self.late: set[Name] = set()  # what waiting lines will write
        self.due = math.inf  # no waiting line can run before
        self.constant: dict[Name, Line] = {}  # written right before they are read

    def run(self) -> list[Line]:
        for line in self.body:
            self.resume(self.now)
            if not self.kept.reads[line.index] and len(line.writes) == 1:
                self.constant[name(line.writes[0])] = line
            elif self.waits(line, self.now):
                self.waiting.append(line)
                self.late |= {name(key) for key in line.writes}
            else:
                self.place(line)
        self.resume(float("inf"))
        for line in list(self.constant.values()):
            if name(line.writes[0]) in self.constant:
                self.place(self.constant.pop(name(line.writes[0])))
        return self.order

    def waits(self, line: Line, now: float) -> bool:
        operands = [name(key) for key in line.reads]
        free = [math.inf if x in self.late else self.ready.get(x, 0.0) for x in operands]
        at = max(free, default=0.0)
        if at > now:
            self.due = min(self.due, at)
        return at > now

    def resume(self, now: float) -> None:
        """Places the waiting lines whose operands are there, in their order."""
        if now < self.due:
            return
        still: list[Line] = []
        self.late, self.due = set(), math.inf
        for line in self.waiting:
            if self.waits(line, now):
                still.append(line)
                self.late |= {name(key) for key in line.writes}
            else:
                self.place(line)
        self.waiting = still

    def place(self, line: Line) -> None:
        for key in line.reads:
            if made := self.constant.pop(name(key), None):
                self.place(made)
        self.order.append(line)
        needed = max((self.ready.get(name(key), 0.0) for key in line.reads), default=0.0)
        self.now = max(self.now, needed)
        if beside(line, self.compiler):
            seconds = self.chip.ring_seconds(line.bytes)
            self.links = done = max(self.links, self.now) + seconds
        else:
            self.now += compute_seconds(line, self.kept, self.chip)
            done = self.now
        self.ready.update((name(key), done) for key in line.writes)
