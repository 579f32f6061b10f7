"""`regathers`: what was gathered is let go, and gathered again for those who read it much later.

A gather that several operations need is made once, and stays from the first to the last: weights of
layers that are not in a loop, and activations whose gradients need them, from the way forward to
the way back. Where that does not fit into `memory_limit`, those are let go that are held where
most is, the largest first: a byte on the wire for each byte of memory. (ZeRO-3, arXiv 1910.02054,
section 7.2.2, gathers weights twice; what loops gather in each step is so from the start.)

The second gather waits for something that its first reader needs as well, or compilers would make
one of the two.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spmd.estimate.liveness import Ordered
from spmd.estimate.work import Line
from spmd.partition.plan import Compute, Key, Move, ProgramPlan

# Each round lets go at the place where most is held by then; a program has a few such places.
_ROUNDS = 32
# Operations with one operand, one after the other, between a value and what waits for another.
_DEEPEST = 3


class _Late(NamedTuple):
    """A gathered value, and what reads it after the place where most is held.

    Attributes:
      held: bytes that it takes there.
      readers: places of instructions in the body, in order.
      after: what the second gather waits for; the first of them reads it too.
    """

    key: Key
    move: Move
    held: int
    readers: tuple[int, ...]
    after: Key


def regathered(
    plan: ProgramPlan, found: Ordered, ordered: Callable[[ProgramPlan], Ordered], limit: int
) -> tuple[ProgramPlan, Ordered]:
    """The plan with as few values gathered twice as it takes to fit, or with all that help.

    Args:
      found: its instructions in the order in which they run, and the memory.
      ordered: gives that of other plans.
      limit: bytes per device that the peak may be.
    """
    useless: set[Key] = set()
    for _ in range(_ROUNDS):
        missing = found.memory.peak - limit
        if missing <= 0:
            break
        chosen: list[_Late] = []
        for late in sorted(_Search(plan, found).run(), key=lambda late: -late.held):
            if missing > 0 and late.key not in useless:
                chosen.append(late)
                missing -= late.held
        if not chosen:
            break
        changed = _again(plan, chosen)
        after = ordered(changed)
        if _above(after, limit) < _above(found, limit):
            plan, found = changed, after
        else:
            useless |= {late.key for late in chosen}
    return plan, found


def _above(found: Ordered, limit: int) -> int:
    """Bytes above the limit, at all places together: two that are alike are one by one less."""
    return sum(max(held - limit, 0) for held in found.memory.over)


class _Search:
    """Gathered values that are held where most is, and that nobody reads there.

    Attributes:
      at: number of the line where most is held, of the loop if that is inside of one.
      made: the line at the top that makes a value.
      readers: the lines at the top that read it.
      place: of the instructions in the body, by id.
    """

    def __init__(self, plan: ProgramPlan, found: Ordered):
        self.plan, self.memory = plan, found.memory
        lines = {line.index: line for line in found.lines}
        line = lines[found.memory.at]
        while line.parent >= 0:
            line = lines[line.parent]
        self.at = line.index
        top = [line for line in found.lines if line.parent < 0]
        self.made = {key: line for line in top for key in line.writes}
        self.readers: dict[Key, list[Line]] = {key: [] for key in self.made}
        for line in top:
            for key in {*line.reads} & self.readers.keys():
                self.readers[key].append(line)
        self.place = {id(one): i for i, one in enumerate(plan.body.code)}

    def run(self) -> Iterator[_Late]:
        leaving = {*self.plan.body.outputs}
        for buffer in self.memory.live(self.memory.at):
            key, made = buffer.key, self.made.get(buffer.key)
            move = made.instruction if made is not None else None
            if made is None or not isinstance(move, Move) or not _gathers(move) or key in leaving:
                continue
            readers = self.readers[key]
            later = sorted(
                (line for line in readers if line.index > self.at), key=self.place_of
            )
            here = self.at in {made.index, *(line.index for line in readers)}
            if here or not later or not all(isinstance(r.instruction, Compute) for r in later):
                continue
            after = self.waited(later[0], key, self.place_of(later[0]), _DEEPEST)
            if after is not None:
                yield _Late(key, move, buffer.bytes, tuple(map(self.place_of, later)), after)

    def place_of(self, line: Line) -> int:
        return self.place[id(line.instruction)]

    def waited(self, reader: Line, key: Key, place: int, depth: int) -> Key | None:
        """What a reader needs as well, that is made late, and in the program before a place; of one
        that needs nothing else, what its own readers need."""
        others = [k for k in reader.reads if k != key and k in self.made]
        late = [
            k for k in others
            if self.made[k].index > self.at and self.place_of(self.made[k]) < place
        ]  # fmt: skip
        if late:
            return max(late, key=lambda k: self.made[k].index)
        if others or not depth:
            return None
        for made in reader.writes:
            for line in self.readers[made]:
                found = self.waited(line, made, place, depth - 1)
                if found is not None:
                    return found
        return None


def _gathers(move: Move) -> bool:
    """Whether it makes more of less, by collectives that can be repeated."""
    plain = not jnp.issubdtype(move.value.dtype, jax.dtypes.extended)
    kinds = {step.kind for step in move.plan.steps}
    return plain and not move.src.partial and kinds == {"all_gather"}


def _again(plan: ProgramPlan, chosen: Sequence[_Late]) -> ProgramPlan:
    """The plan where late readers of the chosen values have copies of their own."""
    copies = Counter(key[:2] for one in plan.body.code for key in one.writes)
    made: dict[int, list[Move]] = {}
    reads: dict[int, dict[Key, Key]] = {}
    for late in chosen:
        move = replace(late.move, copy=copies[late.key[:2]], after=(late.after,))
        copies[late.key[:2]] += 1
        made.setdefault(late.readers[0], []).append(move)
        for place in late.readers:
            reads.setdefault(place, {})[late.key] = move.writes[0]
    code: list[Move | Compute] = []
    for place, one in enumerate(plan.body.code):
        code += made.get(place, [])
        if isinstance(one, Compute) and place in reads:
            one = replace(one, operands=tuple(reads[place].get(k, k) for k in one.operands))
        code.append(one)
    return replace(plan, body=replace(plan.body, code=tuple(code)))
