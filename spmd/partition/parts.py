"""Instructions in parts: what one device has is divided along one more axis, `PART`, along which
lie no devices. One part after the other is computed or moved, and values stay in parts, also from
step to step of a loop, until something reads them whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial, reduce
from typing import Any

import jax
from jax import lax

from sharding.mesh import MeshShape, axes_size
from sharding.project import to_factors
from sharding.rule import Factor, Kind
from sharding.spec import Layout
from spmd.partition.apply import apply
from spmd.partition.local import LocalView
from spmd.partition.placed import legal, makes, needs
from spmd.partition.plan import PART, Assignment, Compute, Key, Move, Parts


@partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["dim"])
@dataclass(frozen=True)
class Divided:
    """A local array as its equal parts along a dim; a pytree, so that loops carry it."""

    parts: tuple[Any, ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        found = list(self.parts[0].shape)
        found[self.dim] *= len(self.parts)
        return tuple(found)

    @property
    def dtype(self) -> Any:
        return self.parts[0].dtype


def joined(x: Any) -> Any:
    """The whole of a local array."""
    return lax.concatenate(x.parts, x.dim) if isinstance(x, Divided) else x


def divided(x: Any, dim: int, count: int) -> Divided:
    """A local array in parts."""
    if isinstance(x, Divided) and (x.dim, len(x.parts)) == (dim, count):
        return x
    x = joined(x)
    size = x.shape[dim] // count
    cuts = range(0, x.shape[dim], size)
    return Divided(tuple(lax.slice_in_dim(x, at, at + size, axis=dim) for at in cuts), dim)


@lru_cache(maxsize=256)
def with_parts(mesh: MeshShape, count: int) -> MeshShape:
    """The mesh with an axis for `count` parts, inside of all others."""
    return replace(mesh, axes=(*mesh.axes, (PART, count)))


def parts_of(one: Move | Compute, key: Key, dim: int, count: int, mesh: MeshShape) -> Parts | None:
    """How an instruction runs in parts where those of `key`, which it reads or writes, lie along
    `dim`; None where it cannot."""
    if isinstance(one, Move):
        return _parts_of_move(one, dim, count, mesh)
    return _parts_of_equation(one, key, dim, count, mesh)


def _parts_of_move(move: Move, dim: int, count: int, mesh: MeshShape) -> Parts | None:
    axes = move.src.dims[dim]
    kept = all(step.after.dims[dim] == axes for step in move.plan.steps)
    even = move.value.shape[dim] % (count * axes_size(mesh, axes)) == 0
    if not kept or not even or 0 in move.value.shape or move.after or move.dst.dims[dim] != axes:
        return None
    return Parts(count, (dim,), (dim,))


def _parts_of_equation(
    one: Compute, key: Key, dim: int, count: int, mesh: MeshShape
) -> Parts | None:
    rule, fine = one.op.rule, with_parts(mesh, count)
    if one.op.control is not None or one.op.eqn.effects or one.apart or any(one.unread):
        return None
    tensor = (*one.operands, *one.results).index(key)
    found = to_factors(rule, tensor, _divided(key.layout, dim).dims, fine)
    names = [name for name, axes in found.items() if axes and axes[-1] == PART]
    if rule.always or len(names) != 1 or not _apart(rule.factors[names[0]]):
        return None
    changed = _along(one.assignment, names[0])
    if rule.factors[names[0]].size % axes_size(fine, changed.axes[names[0]]):
        return None
    if not legal(rule, changed.axes, fine):
        return None
    plain = changed._replace(carried=())
    layouts = *needs(rule, plain, (), fine), *makes(rule, plain, fine)
    keys, first = (*one.operands, *one.results), len(one.operands)
    dims = [_dim_of_parts(k.layout, after) for k, after in zip(keys, layouts, strict=True)]
    sums = rule.factors[names[0]].kind is Kind.REDUCE
    if dims[tensor] != dim or -1 in dims or any((d is None) != sums for d in dims[first:]):
        return None
    return Parts(count, tuple(dims[:first]), tuple(dims[first:]), names[0])


def _apart(factor: Factor) -> bool:
    """Whether an equation computes the elements along a factor each on its own, or adds them up."""
    adds = factor.kind is Kind.REDUCE and factor.monoid == "add"
    return factor.size > 0 and (adds or factor.kind is Kind.PASS)


def _divided(layout: Layout, dim: int) -> Layout:
    dims = [(*axes, PART) if d == dim else axes for d, axes in enumerate(layout.dims)]
    return Layout(tuple(dims), layout.partial)


def _dim_of_parts(before: Layout, after: Layout) -> int | None:
    """The dim along which parts lie; None: nowhere; -1: they are not parts of what was there."""
    found = [d for d, axes in enumerate(after.dims) if PART in axes]
    if not found:
        return None if after.dims == before.dims else -1
    same = len(found) == 1 and after.dims == _divided(before, found[0]).dims
    return found[0] if same else -1


def _along(assignment: Assignment, factor: str) -> Assignment:
    axes = {**assignment.axes, factor: (*assignment.axes.get(factor, ()), PART)}
    return assignment._replace(factors=tuple(axes.items()))


def moved(move: Move, x: Any, mesh: MeshShape) -> Any:
    """A local array after a move, in parts where it says so."""
    steps, shape = move.plan.steps, move.value.shape
    if move.parts is None:
        return apply(steps, joined(x), move.src, shape, mesh)
    count, (dim,), _, _ = move.parts
    assert dim is not None
    parts = divided(x, dim, count).parts
    return Divided(tuple(apply(steps, part, move.src, shape, mesh) for part in parts), dim)


def part_of(one: Compute, parts: Parts) -> Compute:
    """What computes one part of an equation, on a mesh `with_parts`."""

    def lie(keys: Sequence[Key], dims: Sequence[int | None]) -> tuple[Key, ...]:
        return tuple(
            key if dim is None else key._replace(layout=_divided(key.layout, dim))
            for key, dim in zip(keys, dims, strict=True)
        )

    return replace(
        one, assignment=_along(one.assignment, parts.factor), parts=None,
        operands=lie(one.operands, parts.operands), results=lie(one.results, parts.results),
    )  # fmt: skip


def in_parts(one: Compute, operands: Sequence[Any], mesh: MeshShape) -> list[Any]:
    """Results of an equation, each part of them from its part of the operands."""
    assert one.parts is not None
    count, cuts, joins, _ = one.parts
    fine, part = with_parts(mesh, count), part_of(one, one.parts)
    pieces = [
        [joined(x)] * count if dim is None else divided(x, dim, count).parts
        for x, dim in zip(operands, cuts, strict=True)
    ]
    made = [LocalView(part, fine, i).run([xs[i] for xs in pieces]) for i in range(count)]
    return [
        reduce(lax.add, found) if dim is None else Divided(found, dim)
        for found, dim in zip(zip(*made, strict=True), joins, strict=True)
    ]


def build_in_parts(
    one: Compute, body: Callable[[Sequence[Any]], Sequence[Any]], operands: Sequence[Any],
    build: Callable[..., Sequence[Any]],
) -> Sequence[Any]:  # fmt: skip
    """A loop or call to which values come in parts, and which leaves some so: from step to step,
    and what it stacks.

    Args:
      body: emits its region.
      build: emits it, from the equation, the bodies and the operands.
    """
    op, parts = one.op, one.parts
    assert op.control is not None and parts is not None
    stacks = {port.inner for port in op.in_ports if port.stacked}
    carried = {out: inner for _, out, inner in op.control.carries(op)}
    given = {port.inner: parts.operands[port.outer] for port in op.in_ports}
    made = [(port.stacked, parts.results[port.outer]) for port in op.out_ports]

    def lies(x: Any, dim: int | None) -> Any:
        return joined(x) if dim is None else divided(x, dim, parts.count)

    def step(*args: Any) -> Sequence[Any]:
        found = body([_shifted(x, -1) if i in stacks else x for i, x in enumerate(args)])
        left = []
        for out, (x, (stacked, dim)) in enumerate(zip(found, made, strict=True)):
            dim = given[carried[out]] if out in carried else dim
            left.append(lies(x, dim - 1 if stacked and dim is not None else dim))
        return left

    found = build(op, [step], [*map(lies, operands, parts.operands)])
    return [_shifted(x, 1) if stacked else x for x, (stacked, _) in zip(found, made, strict=True)]


def _shifted(x: Any, by: int) -> Any:
    """The same with a leading dim more, or less."""
    return replace(x, dim=x.dim + by) if isinstance(x, Divided) else x
