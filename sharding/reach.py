"""How far a dim reaches: the elements of all values that it passes through.

Dims that an equation passes on, from operands to results or the other way, are one dim of the
program: its batch, its positions, the features of its residual stream. Where two of them want the
same axis, one is gathered, and again wherever they meet. The one that is part of more of the
program should have it: the batch of a training step, the features of weights that are larger than
what they are multiplied with.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from sharding.mesh import overlap
from sharding.program import Program, Value
from sharding.rule import Factor, Kind
from sharding.spec import Sharding

# What reaches about as far as what reaches furthest, as a part of that.
_NEAR = 0.5


def _passes(factor: Factor) -> bool:
    return factor.size > 1 and factor.kind is Kind.PASS


class Reach:
    """Dims of values, joined where equations pass them on.

    Args:
      values: by their ids.
      links: with `values` and a `rule` each, see `propagation.Link`.
    """

    def __init__(self, values: Sequence[Value], links: Sequence[Any]):
        self._start: list[int] = []
        count = 0
        for value in values:
            self._start.append(count)
            count += value.rank
        self._parent = list(range(count))
        for link in links:
            self._join(link)
        self._total = [0] * count
        for value in values:
            for dim in {self.dim(value, d) for d in range(value.rank)}:
                self._total[dim] += prod(value.shape)

    def dim(self, value: Value, d: int) -> int:
        """The dim of the program that dim `d` of a value is, as a number."""
        return self._root(self._start[value.id] + d)

    def factor(self, link: Any, name: str) -> int:
        """The dim of the program that a factor of a link's rule is."""
        t, d = link.rule.where[name][0]
        return self.dim(link.values[t], d)

    def of(self, dim: int) -> int:
        """Elements of all values that have a dim of the program."""
        return self._total[dim]

    def _join(self, link: Any) -> None:
        """The places of each passing factor. Of a dim of several, the major one is what goes on.
        What is repeated, as a table of positions is, is no part of what it is added to."""
        rule = link.rule
        first: dict[str, int] = {}
        for t, (value, dims) in enumerate(zip(link.values, rule.tensors, strict=True)):
            if t in rule.spread:
                continue
            for d, names in enumerate(dims):
                name = next((f for f in names if _passes(rule.factors[f])), None)
                if name is not None:
                    place = self.dim(value, d)
                    self._parent[place] = self._root(first.setdefault(name, place))

    def _root(self, i: int) -> int:
        parent = self._parent
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i


def furthest(
    program: Program, annotations: Sequence[tuple[Value, Sharding]], reach: Reach
) -> dict[str, int]:
    """Of each axis of the program's arguments, the dim that reaches furthest of those that have it,
    through values that are not kept from having it there.

    Not a dim where as many elements have other axes, if there is one that reaches half as far: the
    features of a layer, which its weights have on another axis than the few weights of the next.

    Not of an axis that annotations inside of the program give to another dim, or keep from this
    one: they say where it should be, and what lies between them is for their neighbours to decide.
    """
    entering, leaving = (
        {value.id for value in values} for values in (program.body.inputs, program.body.outputs)
    )
    wanted: dict[str, list[int]] = {}
    for value, sharding in annotations:
        for d, dim in enumerate(sharding.dims if value.id in entering else ()):
            for axis in dim.axes if value.shape[d] > 1 else ():
                wanted.setdefault(axis, []).append(reach.dim(value, d))
    given = _said(annotations, wanted, reach)
    found = {}
    for axis, dims in wanted.items():
        reaches = {dim: reach.of(dim) - given[axis, dim].kept for dim in dims}
        far = _NEAR * max(reaches.values())
        alone = [dim for dim in dims if given[axis, dim].has > given[axis, dim].others]
        asked = [dim for dim in alone if reaches[dim] >= far] or dims
        found[axis] = max(asked, key=reaches.__getitem__)
    for value, sharding in annotations:
        for d, dim in enumerate(() if value.id in entering | leaving else sharding.dims):
            place = reach.dim(value, d)
            for axis, first in list(found.items()):
                has = any(overlap(axis, a) for a in dim.axes)
                if has != (place == first) and (has or not dim.open):
                    del found[axis]
    return found


class _Said(NamedTuple):
    """Elements of annotated values that have a dim of the program.

    Attributes:
      has: of those that have an axis there.
      kept: of those that keep it from there: the dim is closed, and does not have it.
      others: of those that are kept from it by other axes.
    """

    has: int = 0
    kept: int = 0
    others: int = 0


def _said(
    annotations: Sequence[tuple[Value, Sharding]], wanted: Mapping[str, Sequence[int]], reach: Reach
) -> Mapping[tuple[str, int], _Said]:
    """By axis and dim of the program that could have it, of several."""
    found = defaultdict[tuple[str, int], _Said](_Said)
    contested = {axis: {*dims} for axis, dims in wanted.items() if len({*dims}) > 1}
    for value, sharding in annotations if contested else ():
        size = prod(value.shape)
        for d, dim in enumerate(sharding.dims):
            here = reach.dim(value, d)
            for axis, dims in contested.items():
                if here not in dims:
                    continue
                has, kept, others = found[axis, here]
                if any(overlap(axis, a) for a in dim.axes):
                    has += size
                elif not dim.open:
                    kept, others = kept + size, others + (size if dim.axes else 0)
                found[axis, here] = _Said(has, kept, others)
    return found
