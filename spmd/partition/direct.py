"""Pass `direct_moves`: what is moved before and after it is only rearranged, moved once.

Two sharded dims that become one meet on its major one, by an all-to-all of what is flattened, as
propagation found. Where all that reads the flat value gathers one of the axes again, it had better
be gathered before. An operation does not know what its readers will need, so that this is seen in
the finished code:

    x [a, -]    = all_to_all(b) of x [a, b]             x [a, -]  = all_gather(b) of x [a, b]
    y [a+b]     = reshape(x [a+b, -])             ->    y [a]     = reshape(x [a, -])
    y [a]       = all_gather(b) of y [a+b]
"""

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import replace
from typing import NamedTuple

from sharding.mesh import MeshShape
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


class _Between(NamedTuple):
    """Two moves, and the operations between them, each the only reader of what it reads."""

    before: Move
    chain: list[Compute]
    after: Move


def _between(after: Move, made: dict[Key, Move | Compute]) -> _Between | None:
    chain: list[Compute] = []
    if not after.plan.bytes:
        return None
    one = made.get(after.reads[0])
    while isinstance(one, Compute) and len(chain) < _LONGEST and _rearranges(one):
        chain.insert(0, one)
        one = made.get(one.operands[_array(one)])
    return _Between(one, chain, after) if chain and isinstance(one, Move) else None


def _rearranges(one: Compute) -> bool:
    """Whether it does so with one array; others are scalars."""
    return sum(v.rank > 0 for v in one.op.inputs) == 1 and plain(one.op)


def _array(one: Compute) -> int:
    """Which operand that is."""
    return next(i for i, v in enumerate(one.op.inputs) if v.rank)


def _direct(between: _Between, at_hand: Set[Key], mesh: MeshShape) -> Code | None:
    """One move, or none, and the operations, the last of which makes what the second move did; None
    where that costs more."""
    before, chain, after = between
    need, value = after.dst, before.value
    if need.partial or before.src.partial:
        return None
    code: Code = []
    for one in reversed(chain):
        rule, place, operands = one.op.rule, _array(one), list(one.operands)
        if one.assignment.carried or not need.used <= {axis for axis, _ in mesh.axes}:
            return None
        assignment = forced(rule, need, mesh)
        if makes(rule, assignment, mesh) != (need,) or rule.alone.keys() & assignment.axes:
            return None  # there, or what crosses shards would be exchanged
        tensors = [Tensor(v.shape, v.itemsize, (layout,)) for v, layout, _ in operands]
        result, need = Key(one.op.outputs[0], need), needs(rule, assignment, tensors, mesh)[place]
        operands[place] = Key(operands[place].value, need)
        code.insert(0, replace(one, assignment=assignment, operands=tuple(operands),
                               results=(result,), asked=()))  # fmt: skip
    if need == before.src or Key(value, need) in at_hand:
        return code
    steps = plan(before.src, need, value.shape, value.itemsize, mesh)
    if steps.cost >= before.plan.cost + after.plan.cost:
        return None
    return [replace(before, dst=need, plan=steps), *code]
