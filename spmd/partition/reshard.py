"""Resharding as search: the cheapest sequence of collectives from one layout to another.

States are layouts, edges are single collectives; Dijkstra over wire bytes finds the plan. No case
is special: what cannot be done in one step is done in several, and replicating everything is only
ever chosen when it is the cheapest. Follows the idea of Rink et al. (arXiv 2112.01075).
"""

import heapq
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import permutations
from math import gcd, prod
from typing import NamedTuple

from sharding.errors import Problem, VerificationError
from sharding.mesh import MeshShape, axes_size, axis_size, refine, refine_refs, split_axis
from sharding.spec import Layout
from spmd import cost

Dims = tuple[tuple[str, ...], ...]


# Steps in which no device sends anything.
LOCAL = frozenset(("owner", "addend", "spread", "slice"))


class Step(NamedTuple):
    """One collective, or a local slice.

    Attributes:
      kind: owner, addend, spread, slice, all_gather, all_to_all, reduce_scatter, all_reduce,
        permute.
      axes: mesh axes it runs over, or parts of one, major to minor.
      dim: dim it acts on (gathered, sliced, scattered; all_to_all: gathered).
      to_dim: all_to_all: the dim that is split.
      monoid: of reductions.
      after: layout when done.
      bytes: wire bytes per device.
      parts: sizes of the groups of devices in which it is done one after the other, far ones first;
        () for all at once.
    """

    kind: str
    axes: tuple[str, ...]
    dim: int
    to_dim: int
    monoid: str
    after: Layout
    bytes: float
    parts: tuple[int, ...] = ()


class Plan(NamedTuple):
    """Steps from one layout to another, and their cost in link bytes."""

    steps: tuple[Step, ...]
    cost: float

    @property
    def bytes(self) -> float:
        return sum(step.bytes for step in self.steps)


@lru_cache(maxsize=1 << 18)
def plan(src: Layout, dst: Layout, shape: tuple[int, ...], itemsize: int, mesh: MeshShape) -> Plan:
    """The cheapest plan from `src` to `dst`.

    Args:
      shape: global shape.
      itemsize: bytes per element.

    Raises:
      VerificationError: `dst` is partial over an axis that `src` is not, by another monoid than
        add.
    """
    if src == dst:
        return Plan((), 0.0)
    if any(monoid != "add" for _, monoid in set(dst.partial) - set(src.partial)):
        raise VerificationError(_not_partial(src, dst))
    found = _search(src, dst, shape, itemsize, mesh, _steps)
    if found is None:
        raise VerificationError(_unreachable(src, dst, shape))
    parts = _by_parts(src, dst, shape, itemsize, mesh)
    return found if parts is None or parts.cost >= found.cost else parts


def _search(
    src: Layout, dst: Layout, shape: tuple[int, ...], itemsize: int, mesh: MeshShape,
    steps: Callable[..., Iterator[Step]],
) -> Plan | None:  # fmt: skip
    """The cheapest path of these steps."""
    best: dict[Layout, float] = {src: 0.0}
    came: dict[Layout, tuple[Layout, Step]] = {}
    queue: list[tuple[float, int, Layout]] = [(0.0, 0, src)]
    order = 0
    while queue:
        at_cost, _, at = heapq.heappop(queue)
        if at == dst:
            return Plan(_path(src, dst, came), at_cost)
        if at_cost > best[at]:
            continue
        for step in steps(at, dst, shape, itemsize, mesh):
            total = at_cost + step_cost(step, at, shape, itemsize, mesh)
            if total < best.get(step.after, float("inf")):
                best[step.after] = total
                came[step.after] = (at, step)
                order += 1
                heapq.heappush(queue, (total, order, step.after))
    return None


def _by_parts(
    src: Layout, dst: Layout, shape: tuple[int, ...], itemsize: int, mesh: MeshShape
) -> Plan | None:
    """Two dims that swap axes of different sizes: a part of the larger goes over by an all-to-all,
    so that both have as many shards as they should, and then shards change places. None where no
    two dims do."""
    parts = _swapped_parts(src, dst, mesh)
    if not parts:
        return None
    fine = refine(mesh, parts)
    begin, end = (
        Layout(tuple(refine_refs(mesh, fine, axes) for axes in layout.dims), layout.partial)
        for layout in (src, dst)
    )
    found = _search(begin, end, shape, itemsize, fine, _swaps)
    if found is None:
        return None
    return found._replace(steps=(*found.steps[:-1], found.steps[-1]._replace(after=dst)))


def _swapped_parts(src: Layout, dst: Layout, mesh: MeshShape) -> set[str]:
    """Parts of the axes that two dims swap: as large as the axes have in common, and the rest."""
    homes = {axis: d for d, axes in enumerate(dst.dims) for axis in axes}
    moved = {(d, homes.get(axis, d)): axis for d, axes in enumerate(src.dims) for axis in axes}
    parts: set[str] = set()
    for (d, e), axis in moved.items():
        other = moved.get((e, d))
        if d != e and other is not None and ":" not in axis:
            common = gcd(axis_size(mesh, axis), axis_size(mesh, other))
            parts.update(split_axis(mesh, axis, common) or ())
    return parts


def _swaps(
    at: Layout, dst: Layout, shape: tuple[int, ...], itemsize: int, mesh: MeshShape
) -> Iterator[Step]:
    yield from _all_to_alls(at, dst, shape, itemsize, mesh)
    yield from _permutes(at, dst, local_bytes(at, shape, itemsize, mesh), mesh)


def step_cost(
    step: Step, before: Layout, shape: tuple[int, ...], itemsize: int, mesh: MeshShape
) -> float:
    """Wire bytes, memory traffic and a constant per collective, in link bytes."""
    touched = local_bytes(before, shape, itemsize, mesh)
    touched += local_bytes(step.after, shape, itemsize, mesh)
    latency = 0.0 if step.kind in LOCAL else cost.STEP_BYTES
    sent = cost.priced(step.kind, step.axes, step.bytes, mesh)
    return sent + latency + cost.compute(0, touched)


def local_bytes(layout: Layout, shape: tuple[int, ...], itemsize: int, mesh: MeshShape) -> int:
    return prod(layout.local_shape(shape, mesh)) * itemsize


def _path(src: Layout, dst: Layout, came: dict) -> tuple[Step, ...]:
    steps = []
    at = dst
    while at != src:
        at, step = came[at]
        steps.append(step)
    return tuple(reversed(steps))


def _steps(
    at: Layout, dst: Layout, shape: tuple[int, ...], itemsize: int, mesh: MeshShape
) -> Iterator[Step]:
    size = local_bytes(at, shape, itemsize, mesh)
    yield from _addends(at, dst, shape, mesh)
    yield from _reductions(at, dst, shape, size, mesh)
    yield from _slices(at, dst, shape, mesh)
    yield from _gathers(at, shape, itemsize, mesh)
    yield from _all_to_alls(at, dst, shape, itemsize, mesh)
    yield from _permutes(at, dst, size, mesh)


def _reductions(
    at: Layout, dst: Layout, shape: tuple[int, ...], size: int, mesh: MeshShape
) -> Iterator[Step]:
    pending = [(a, m) for a, m in at.partial if (a, m) not in dst.partial]
    for axis, monoid in pending:
        if monoid == "add":
            for d in range(len(shape)):
                dims = _appended(at, d, axis, dst, shape, mesh)
                if dims is not None:
                    after = Layout(dims, _without(at.partial, (axis,)))
                    padded = _padded(size, at, dims, d, shape, mesh)
                    wire = cost.reduce_scatter(padded, axis_size(mesh, axis))
                    yield Step("reduce_scatter", (axis,), d, d, monoid, after, wire)
    for monoid in {m for _, m in pending}:
        axes = tuple(a for a, m in pending if m == monoid)
        # One all-reduce over all axes that stay whole, and each alone.
        whole = tuple(a for a in axes if not any(a in d for d in dst.dims))
        for group in {whole, *((a,) for a in axes)} - {()}:
            after = Layout(at.dims, _without(at.partial, group))
            wire = cost.all_reduce(size, axes_size(mesh, group))
            yield Step("all_reduce", group, -1, -1, monoid, after, wire)


def _addends(
    at: Layout, dst: Layout, shape: tuple[int, ...], mesh: MeshShape
) -> Iterator[Step]:
    """A whole value as a sum over axes: one shard has all of it, the others nothing. A sharded
    dim likewise: every shard has its part, and zeros for the others'."""
    missing = tuple(p for p in dst.partial if p not in at.partial)
    axes = tuple(a for a, _ in missing)
    if missing and at.used.isdisjoint(axes):
        after = Layout(at.dims, tuple(sorted((*at.partial, *missing))))
        yield Step("addend", axes, -1, -1, "add", after, 0.0)
    for d, axes in enumerate(at.dims):
        even = axes and shape[d] % axes_size(mesh, axes) == 0
        if even and (axes[-1], "add") in missing:
            dims = (*at.dims[:d], axes[:-1], *at.dims[d + 1 :])
            after = Layout(dims, tuple(sorted((*at.partial, (axes[-1], "add")))))
            yield Step("spread", axes[-1:], d, d, "add", after, 0.0)


def _slices(at: Layout, dst: Layout, shape: tuple[int, ...], mesh: MeshShape) -> Iterator[Step]:
    # Several axes at once where the dim is uneven: single ones need not be aligned.
    for d, axes in enumerate(dst.dims):
        have = len(at.dims[d])
        if axes[:have] != at.dims[d]:
            yield from _finer(at, d, axes, shape, mesh)
            continue
        for end in range(have + 1, len(axes) + 1):
            new = axes[have:end]
            if at.used.isdisjoint(new) and _aligned(at.dims[d], new, shape[d], mesh):
                dims = (*at.dims[:d], axes[:end], *at.dims[d + 1 :])
                yield Step("slice", new, d, d, "", Layout(dims, at.partial), 0.0)


def _finer(
    at: Layout, d: int, wanted: tuple[str, ...], shape: tuple[int, ...], mesh: MeshShape
) -> Iterator[Step]:
    """A dim that changes its axes has both for a while: smaller shards change places, and what
    is gathered then is no more than what is needed."""
    new = tuple(a for a in wanted if a not in at.used)
    if new and _aligned(at.dims[d], new, shape[d], mesh):
        dims = (*at.dims[:d], (*at.dims[d], *new), *at.dims[d + 1 :])
        yield Step("slice", new, d, d, "", Layout(dims, at.partial), 0.0)


def _gathers(
    at: Layout, shape: tuple[int, ...], itemsize: int, mesh: MeshShape
) -> Iterator[Step]:
    for d, axes in enumerate(at.dims):
        for keep in range(len(axes)):
            if not _aligned(axes[:keep], axes[keep:], shape[d], mesh):
                continue
            dims = (*at.dims[:d], axes[:keep], *at.dims[d + 1 :])
            after = Layout(dims, at.partial)
            shards = axes_size(mesh, axes[keep:])
            out = local_bytes(at, shape, itemsize, mesh) * shards
            yield Step("all_gather", axes[keep:], d, d, "", after, cost.all_gather(out, shards))


def _all_to_alls(
    at: Layout, dst: Layout, shape: tuple[int, ...], itemsize: int, mesh: MeshShape
) -> Iterator[Step]:
    for d, axes in enumerate(at.dims):
        if not axes or not _aligned(axes[:-1], axes[-1:], shape[d], mesh):
            continue
        axis = axes[-1]
        moved = Layout((*at.dims[:d], axes[:-1], *at.dims[d + 1 :]), at.partial)
        for to in range(len(shape)):
            if to == d or axis not in dst.dims[to]:
                continue
            if not _aligned(moved.dims[to], (axis,), shape[to], mesh):
                continue
            dims = (*moved.dims[:to], (*moved.dims[to], axis), *moved.dims[to + 1 :])
            after = Layout(dims, at.partial)
            shards = axis_size(mesh, axis)
            size = _padded(local_bytes(at, shape, itemsize, mesh), at, after.dims, to, shape, mesh)
            yield Step("all_to_all", (axis,), d, to, "", after, cost.all_to_all(size, shards))


def _permutes(at: Layout, dst: Layout, size: int, mesh: MeshShape) -> Iterator[Step]:
    """The same shard sizes on other devices: axes renamed, or reordered within a dim."""
    counts = [axes_size(mesh, a) for a in at.dims]
    partial = {a for a, _ in at.partial}
    targets = []
    if counts == [axes_size(mesh, a) for a in dst.dims]:
        targets.append(dst.dims)
    for d, axes in enumerate(at.dims):
        if 1 < len(axes) <= 4:
            for order in permutations(axes):
                targets.append((*at.dims[:d], order, *at.dims[d + 1 :]))
    for dims in targets:
        if dims != at.dims and not any(a in partial for axes in dims for a in axes):
            after = Layout(dims, at.partial)
            axes = permuted_axes(at.dims, dims, mesh)
            yield Step("permute", axes, -1, -1, "", after, float(size))


def permuted_axes(src: Dims, dst: Dims, mesh: MeshShape) -> tuple[str, ...]:
    """Mesh axes along which a permutation moves data, in mesh order: `ppermute` numbers devices
    in that order, whatever the order of the axes it is given."""
    moved = {a for s, d in zip(src, dst, strict=True) if s != d for a in (*s, *d)}
    return tuple(a for a in mesh.names if a in moved)


def _appended(
    at: Layout, d: int, axis: str, dst: Layout, shape: tuple[int, ...], mesh: MeshShape
) -> Dims | None:
    """Dims with `axis` appended to dim d, when that is a prefix of the target and aligned."""
    axes = (*at.dims[d], axis)
    if dst.dims[d][: len(axes)] != axes or not _aligned(at.dims[d], (axis,), shape[d], mesh):
        return None
    return (*at.dims[:d], axes, *at.dims[d + 1 :])


@lru_cache(maxsize=65536)
def _aligned(major: tuple[str, ...], minor: tuple[str, ...], n: int, mesh: MeshShape) -> bool:
    """Whether shards over major+minor are whole parts of the shards over major.

    An uneven dim has ceil(n / shards) elements per shard: nested ceilings need not agree.
    """
    if not major:
        return True
    outer, inner = axes_size(mesh, major), axes_size(mesh, minor)
    return -(-n // outer) == inner * -(-n // (outer * inner))


def _padded(
    size: float, at: Layout, after: Dims, d: int, shape: tuple[int, ...], mesh: MeshShape
) -> float:
    """Bytes when dim d is padded to a multiple of its new shards."""
    before = -(-shape[d] // axes_size(mesh, at.dims[d]))
    new = -(-shape[d] // axes_size(mesh, after[d]))
    shards = axes_size(mesh, after[d]) // axes_size(mesh, at.dims[d])
    return size * (new * shards / before) if before else 0.0


def _without(partial: tuple, axes: tuple[str, ...]) -> tuple:
    return tuple((a, m) for a, m in partial if a not in axes)


def _not_partial(src: Layout, dst: Layout) -> Problem:
    return Problem(
        f"reshard from {src} to {dst}",
        "a whole value cannot become a partial one",
        "report this as a defect, with the program",
    )


def _unreachable(src: Layout, dst: Layout, shape: tuple[int, ...]) -> Problem:
    return Problem(
        f"no plan from {src} to {dst} for shape {shape}",
        "every layout is reachable through the replicated one",
        "report this as a defect, with the program",
    )
