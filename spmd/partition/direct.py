"""Pass `direct_moves`: what is moved before and after it is only rearranged, moved once.

Two sharded dims that become one meet on its major one, by an all-to-all of what is flattened, as
propagation found. Where all that reads the flat value gathers one of the axes again, it had better
be gathered before. An operation does not know what its readers will need, so that this is seen in
the finished code:

    x [a, -]    = all_to_all(b) of x [a, b]             x [a, -]  = all_gather(b) of x [a, b]
    y [a+b]     = reshape(x [a+b, -])             ->    y [a]     = reshape(x [a, -])
    y [a]       = all_gather(b) of y [a+b]

So is what is moved once as it is and once rearranged, as by Newton and Schulz (`x @ x.T @ x`):

    y [-, a]    = transpose(x [a, -])                   x [-, -]  = all_gather(a) of x [a, -]
    y [-, -]    = all_gather(a) of y [-, a]       ->    y [-, -]  = transpose(x [-, -])
    x [-, -]    = all_gather(a) of x [a, -]
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import NamedTuple, TypeGuard

from sharding.mesh import MeshShape
from sharding.spec import Layout
from spmd.partition.again import plain
from spmd.partition.placed import forced, makes, needs
from spmd.partition.plan import Compute, Key, Move
from spmd.partition.reshard import plan
from spmd.partition.tensor import Tensor

Code = list[Move | Compute]

_LONGEST = 8  # operations between two moves


def direct_moves(
    code: Code, inputs: Sequence[Key], outputs: Sequence[Key], mesh: MeshShape
) -> Code:
    """The instructions of a region, with fewer moves where that costs less.

    Args:
      inputs, outputs: what the region is passed, and what it returns.
    """
    code = _through(code, inputs, outputs, mesh)
    return _together(code, inputs, outputs, mesh)


def _through(code: Code, inputs: Sequence[Key], outputs: Sequence[Key], mesh: MeshShape) -> Code:
    """What is moved before and after it is rearranged."""
    reads = Counter(key for one in code for key in one.reads)
    reads.update(outputs)
    written = {*inputs, *(key for one in code for key in one.writes)}
    made = {key: one for one in code for key in one.writes if reads[key] == 1}
    at_hand = {*inputs}
    dropped: set[int] = set()
    instead: dict[int, Code] = {}
    for after in code:
        between = _between(after, made) if isinstance(after, Move) else None
        if between is not None and id(between.before) not in instead:
            found = _direct(between, at_hand, mesh)
            if found and written.isdisjoint(key for one in found[:-1] for key in one.writes):
                gone = (between.before, *between.chain)
                dropped |= {*map(id, gone)}
                instead[id(after)] = found
                at_hand -= {key for one in gone for key in one.writes}
                for key in found[0].reads:
                    made.pop(key, None)  # another reads it now
        at_hand.update(after.writes)
    return [new for one in code if id(one) not in dropped for new in instead.get(id(one), [one])]


def _together(code: Code, inputs: Sequence[Key], outputs: Sequence[Key], mesh: MeshShape) -> Code:
    """What is moved rearranged, and as it is before or later: once as it is, from the first of both
    on. That is never more than to move it twice, whatever is held meanwhile."""
    while True:
        moves = (one for one in code if isinstance(one, Move) and one.plan.bytes)
        moved = {key: one for one in moves for key in one.writes}
        made = {key: one for one in code for key in one.writes}
        at_hand, early, instead = {*inputs}, set[int](), dict[int, Code]()
        for one in code:
            if id(one) in early:
                continue
            if isinstance(one, Move) and one.plan.bytes:
                for chain in _chains(one, made):
                    found = _redone(chain, one.dst, mesh)
                    first = _first(found[0], moved, at_hand) if found else None
                    if found and first is not None:
                        early |= {*map(id, first)}
                        instead[id(one)] = [*first, *found[1]]
                        break
            at_hand.update(key for new in instead.get(id(one), [one]) for key in new.writes)
        if not instead:
            return code
        code = [new for one in code if id(one) not in early for new in instead.get(id(one), [one])]
        code = _needed(code, inputs, outputs)


def _first(key: Key, moved: Mapping[Key, Move], at_hand: Set[Key]) -> list[Move] | None:
    """What has to be done for something to be there now; None: it cannot be."""
    if key in at_hand:
        return []
    move = moved.get(key)
    return [move] if move is not None and at_hand >= {*move.reads} else None


def _needed(code: Code, inputs: Sequence[Key], outputs: Sequence[Key]) -> Code:
    """Without what rearranges something that was so rearranged before, or for nobody."""
    known, once = {*inputs}, list[Move | Compute]()
    for one in code:
        if not _rearranges(one) or not known.issuperset(one.writes):
            once.append(one)
            known.update(one.writes)
    read, kept = {*outputs}, list[Move | Compute]()
    for one in reversed(once):
        if not _rearranges(one) or not read.isdisjoint(one.writes):
            kept.append(one)
            read.update(one.reads)
    return kept[::-1]


def _chains(move: Move, made: dict[Key, Move | Compute]) -> Iterator[list[Compute]]:
    """The operations that rearrange something to what is moved, the shortest first."""
    chain: list[Compute] = []
    one = made.get(move.reads[0])
    while one is not None and len(chain) < _LONGEST and _rearranges(one):
        chain.insert(0, one)
        yield [*chain]
        one = made.get(one.operands[_array(one)])


class _Between(NamedTuple):
    """Two moves, and the operations between them, each the only reader of what it reads."""

    before: Move
    chain: list[Compute]
    after: Move


def _between(after: Move, made: dict[Key, Move | Compute]) -> _Between | None:
    *_, chain = [], *(_chains(after, made) if after.plan.bytes else ())
    before = made.get(chain[0].operands[_array(chain[0])]) if chain else None
    return _Between(before, chain, after) if isinstance(before, Move) else None


def _rearranges(one: Move | Compute) -> TypeGuard[Compute]:
    """Whether an operation does so with one array; others are scalars."""
    if isinstance(one, Move):
        return False
    return sum(v.rank > 0 for v in one.op.inputs) == 1 and plain(one.op)


def _array(one: Compute) -> int:
    """Which operand that is."""
    return next(i for i, v in enumerate(one.op.inputs) if v.rank)


def _direct(between: _Between, at_hand: Set[Key], mesh: MeshShape) -> Code | None:
    """One move, or none, and the operations, the last of which makes what the second move did; None
    where that costs more."""
    before, chain, after = between
    found = _redone(chain, after.dst, mesh)
    if found is None or before.src.partial:
        return None
    (value, need, _), code = found
    if need == before.src or Key(value, need) in at_hand:
        return code
    steps = plan(before.src, need, value.shape, value.itemsize, mesh)
    if steps.cost >= before.plan.cost + after.plan.cost:
        return None
    return [replace(before, dst=need, plan=steps), *code]


def _redone(chain: Sequence[Compute], need: Layout, mesh: MeshShape) -> tuple[Key, Code] | None:
    """What operations have to read for the last one to make its result in a layout, and they
    themselves; None where something would be exchanged."""
    key, code = Key(chain[-1].op.outputs[0], need), list[Move | Compute]()
    for one in reversed(chain):
        rule, place, operands = one.op.rule, _array(one), list(one.operands)
        need = key.layout
        if need.partial or one.assignment.carried or not need.used <= {a for a, _ in mesh.axes}:
            return None
        assignment = forced(rule, need, mesh)
        if makes(rule, assignment, mesh) != (need,) or rule.alone.keys() & assignment.axes:
            return None  # there, or what crosses shards would be exchanged
        tensors = [Tensor(v.shape, v.itemsize, (layout,)) for v, layout, _ in operands]
        read = Key(operands[place].value, needs(rule, assignment, tensors, mesh)[place])
        operands[place] = read
        code.insert(0, replace(one, assignment=assignment, operands=tuple(operands),
                               results=(key,), asked=()))  # fmt: skip
        key = read
    return key, code
