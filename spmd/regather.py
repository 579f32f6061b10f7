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
    plan: ProgramPlan, ordered: Callable[[ProgramPlan], Ordered], limit: int
) -> ProgramPlan:
    """The plan with as few values gathered twice as it takes to fit, or with all that help.

    Args:
      ordered: the instructions of a plan in the order in which they run, and the memory.
      limit: bytes per device that the peak may be.
    """
    found = ordered(plan)
    for _ in range(_ROUNDS):
        missing = found.memory.peak - limit
        if missing <= 0:
            break
        chosen: list[_Late] = []
        for late in sorted(_late(plan, found), key=lambda late: -late.held):
            if missing <= 0:
                break
            chosen.append(late)
            missing -= late.held
        changed = _again(plan, chosen) if chosen else plan
        after = ordered(changed)
        if after.memory.peak >= found.memory.peak:
            break
        plan, found = changed, after
    return plan


def _late(plan: ProgramPlan, found: Ordered) -> Iterator[_Late]:
    """Gathered values that are held where most is, and read by nobody there."""
    place = {id(one): i for i, one in enumerate(plan.body.code)}
    top = [line for line in found.lines if line.parent < 0]
    makers = {key: line.index for line in top for key in line.writes}
    moves = {key: line.instruction for line in top for key in line.writes}
    readers: dict[Key, list[Line]] = {key: [] for key in makers}
    for line in top:
        for key in {*line.reads} & readers.keys():
            readers[key].append(line)
    at, leaving = found.memory.at, {*plan.body.outputs}
    for buffer in found.memory.live(at):
        key, move = buffer.key, moves.get(buffer.key)
        if not isinstance(move, Move) or not _gathers(move) or key in leaving:
            continue
        later = [line for line in readers[key] if line.index > at]
        here = makers[key] == at or any(line.index == at for line in readers[key])
        if here or not later or not all(isinstance(line.instruction, Compute) for line in later):
            continue
        first, *others = sorted(later, key=lambda line: place[id(line.instruction)])
        waited = [k for k in first.reads if k != key and makers.get(k, 0) > at]
        if waited:
            places = tuple(place[id(line.instruction)] for line in (first, *others))
            yield _Late(key, move, buffer.bytes, places, max(waited, key=makers.__getitem__))


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
