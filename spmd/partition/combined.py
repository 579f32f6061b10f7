"""Pass `combine_small`: small collectives of one kind, along the same axes, as one.

A collective of few bytes costs its start: all devices meet. On simulated devices that takes as long
as to copy some ten thousand bytes. So collectives that do not need one another are sent together:
those that as many small collectives come before, on the longest way to each. Compilers for TPUs
and GPUs combine gathers and sums by themselves; that for CPUs all-reduces alone.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from heapq import heappop, heappush
from itertools import count, groupby
from math import prod
from operator import attrgetter
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from sharding.mesh import MeshShape, axes_size
from sharding.spec import Layout
from spmd.partition.apply import grouped, pad_to, trim_to
from spmd.partition.numbers import Numbers
from spmd.partition.plan import Compute, Key, Move, ProgramPlan, RegionPlan
from spmd.partition.reshard import Step

# Bytes that a device sends: of a collective that is small, and of all that go as one. Four at a
# time take 0.3 to 0.8 of the time, up to twice the first; above that, and above the second, what is
# packed and what is there earlier takes memory that shows.
_SMALL, _MOST = 1 << 15, 1 << 16


def combine_small(plan: ProgramPlan) -> ProgramPlan:
    """The plan with small collectives next to those that they are sent with.

    What compilers would make once goes alone, or they would not: what is sent several times, also
    in calls and in layers that are made again (see `numbers`). What changes in fewer loops is not
    sent with the rest: they bring it out of the loop.
    """
    numbers = Numbers(plan)
    moves = (one for one, _ in plan.body.walk() if isinstance(one, Move) and _kind(one))
    alike = Counter(_what(move, numbers) for move in moves)
    return replace(plan, body=_region(plan.body, numbers, alike))


def _what(move: Move, numbers: Numbers) -> tuple[int, Layout, Layout]:
    """What moves that are one have in common."""
    return numbers.of(move.value), move.src, move.dst


def _region(body: RegionPlan, numbers: Numbers, alike: Mapping[Any, int]) -> RegionPlan:
    code = tuple(
        replace(i, regions=tuple(_region(r, numbers, alike) for r in i.regions))
        if isinstance(i, Compute) and i.regions else i
        for i in body.code
    )  # fmt: skip
    kinds = [
        (kind, numbers.level(i.value))
        if isinstance(i, Move) and (kind := _kind(i)) and alike[_what(i, numbers)] == 1 else None
        for i in code
    ]  # fmt: skip
    before = _before(code)
    found = _grouped(code, before, kinds)
    return replace(body, code=tuple(_ordered(code, before, found) if found else code))


def _before(code: Sequence[Move | Compute]) -> list[set[int]]:
    """Per instruction the places of those that it needs: what makes what it reads, and what has
    effects before it, where it has some."""
    made: dict[Key, int] = {}
    effect = -1
    before = []
    for i, each in enumerate(code):
        needed = {made.get(key, -1) for key in each.reads}  # of the region's inputs no one
        if isinstance(each, Compute) and each.op.eqn is not None and each.op.eqn.effects:
            needed.add(effect)
            effect = i
        before.append(needed - {-1})
        made.update(dict.fromkeys(each.writes, i))
    return before


def _grouped(
    code: Sequence[Move | Compute], before: Sequence[set[int]], kinds: Sequence[Any]
) -> list[list[int]]:
    """Places of moves of one kind that go as one. As many small collectives lie on the longest way
    to each: so none needs another, nor do groups, since every way on has one more."""
    depths: list[int] = []
    last: dict[Any, list[int]] = {}
    sizes: dict[Any, float] = {}
    found = []
    for i, (each, kind) in enumerate(zip(code, kinds, strict=True)):
        depths.append(max((depths[j] + (kinds[j] is not None) for j in before[i]), default=0))
        if kind is None or isinstance(each, Compute):
            continue
        key, size = (kind, depths[i]), each.plan.steps[0].bytes
        if key not in last or sizes[key] + size > _MOST:
            last[key], sizes[key] = [], 0.0
            found.append(last[key])
        last[key].append(i)
        sizes[key] += size
    return [group for group in found if len(group) > 1]


def _ordered(
    code: Sequence[Move | Compute], before: Sequence[set[int]], found: Sequence[Sequence[int]]
) -> Iterator[Move | Compute]:  # fmt: skip
    """The instructions, each as early as it was or as soon as it can be, those of a group next to
    each other, at the place of the first."""
    first = [*range(len(code))]
    for group in found:
        for i in group:
            first[i] = group[0]
    members: dict[int, list[int]] = defaultdict(list)
    for i, place in enumerate(first):
        members[place].append(i)
    needed = {place: {first[j] for i in inside for j in before[i]}
              for place, inside in members.items()}  # fmt: skip
    readers: dict[int, list[int]] = defaultdict(list)
    for place, others in needed.items():
        for other in others:
            readers[other].append(place)
    missing = {place: len(others) for place, others in needed.items()}
    ready = [place for place, n in missing.items() if not n]  # in order, so it is a heap
    numbers = count(1)
    while ready:
        place = heappop(ready)
        alone = len(members[place]) == 1
        number = 0 if alone else next(numbers)
        for i in members[place]:
            each = code[i]
            yield replace(each, group=number) if isinstance(each, Move) else each
        for reader in readers[place]:
            missing[reader] -= 1
            if not missing[reader]:
                heappush(ready, reader)
    assert not any(missing.values()), "moves that go as one need each other"


def groups(code: Sequence[Move | Compute]) -> Iterator[list[Any]]:
    """Instructions in their order, moves of one group together."""
    for number, found in groupby(code, lambda i: i.group if isinstance(i, Move) else 0):
        inside = [*found]
        yield from [inside] if number else ([each] for each in inside)


def _kind(move: Move) -> tuple[Any, ...] | None:
    """What moves that go as one have in common; None: it goes alone."""
    if len(move.plan.steps) != 1 or move.copy or move.after or move.parts is not None:
        return None
    (step,), dtype = move.plan.steps, move.value.dtype
    small = step.kind in _PACKED and 0 < step.bytes <= _SMALL and not step.parts
    if not small or not jnp.issubdtype(dtype, jnp.number):  # random keys have words
        return None
    if jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits < 4:
        return None  # XLA moves them as bytes
    return step.kind, step.axes, step.monoid, dtype


def together(moves: Sequence[Move], operands: Sequence[Any], mesh: MeshShape) -> list[Any]:
    """Local arrays after moves of one group, by one collective of a row for every device."""
    steps = [move.plan.steps[0] for move in moves]
    split, send, joins = _PACKED[steps[0].kind]
    shards = axes_size(mesh, steps[0].axes)
    pieces, rows, sizes = [], [], []
    for step, move, x in zip(steps, moves, operands, strict=True):
        dims = step.after.local_shape(move.value.shape, mesh)
        x = x[None] if split is None else _split(x, shards, (dim := split(step)), dims[dim])
        pieces.append(x.shape[1:])
        rows.append(x.reshape(x.shape[0], -1))
        sizes.append(dims[step.dim])
    sent = send(steps[0], lax.concatenate(rows, 1), mesh)
    ends = np.cumsum([row.shape[1] for row in rows])
    made = []
    for step, piece, end, size in zip(steps, pieces, ends, sizes, strict=True):
        part = lax.slice_in_dim(sent, end - prod(piece), end, axis=1).reshape(-1, *piece)
        made.append(_joined(part, step.dim, size) if joins else part[0])
    return made


def _split(x: Any, shards: int, dim: int, size: int) -> Any:
    """`[shards, ...]`: what each device gets of `x`, `size` along a dim."""
    x = pad_to(x, dim, size * shards)
    return jnp.moveaxis(x.reshape(*x.shape[:dim], shards, size, *x.shape[dim + 1 :]), dim, 0)


def _joined(parts: Any, dim: int, size: int) -> Any:
    """`[shards, ...]` side by side along a dim, without its padding."""
    x = jnp.moveaxis(parts, 0, dim)
    return trim_to(x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2 :]), dim, size)


def _gather(step: Step, x: Any, mesh: MeshShape) -> Any:
    return lax.all_gather(x, step.axes, tiled=True)


def _scatter(step: Step, x: Any, mesh: MeshShape) -> Any:
    return lax.psum_scatter(x, step.axes[0], tiled=True)


def _exchange(step: Step, x: Any, mesh: MeshShape) -> Any:
    axis, groups = grouped(step.axes[0], mesh)
    return lax.all_to_all(x, axis, 0, 0, axis_index_groups=groups, tiled=True)


# By kind: the dim of which every device gets a part, the collective, and whether the parts of all
# lie side by side then.
_PACKED = {
    "all_gather": (None, _gather, True),
    "reduce_scatter": (attrgetter("dim"), _scatter, False),
    "all_to_all": (attrgetter("to_dim"), _exchange, True),
}
