"""Mesh axes as text: names, sizes, and the sub-axes that a reshape of a sharded dim needs.

An *axis reference* is a plain string: a mesh axis `tensor`, or a sub-axis `tensor:(2)4`. The
sub-axis `(m)k` of an axis of size n is the middle dimension when the axis is reshaped to
[m, k, n / (m k)] (the notation of Shardy). Strings hash fast, sort, and print as they parse.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd, prod
from typing import Any

from sharding import nodes
from sharding.errors import MeshError, Problem

# Characters of the canonical text of a sharding; a name that holds one could not be parsed back.
_RESERVED = re.compile(r"[\[\]{},+?@\s]|^-$")
_SUB_AXIS = re.compile(r"^(?P<name>.+):\((?P<pre>\d+)\)(?P<size>\d+)$")


def split_ref(ref: str) -> tuple[str, int, int | None]:
    """(axis name, pre-size, size) of an axis reference; size is None for a whole axis."""
    match = _SUB_AXIS.match(ref) if ":" in ref else None
    if match is None:
        return ref, 1, None
    return match["name"], int(match["pre"]), int(match["size"])


class _One(type):
    """Equal instances are one object, kept: what is asked of them again and again is looked up by
    it. There are as many as meshes, and ways to split their axes."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        return _MADE.setdefault((made.axes, made.manual, made.across), made)


_MADE: dict[Any, "MeshShape"] = {}


@dataclass(frozen=True, eq=False)
class MeshShape(metaclass=_One):
    """The names and sizes of the mesh axes, major to minor; no device is involved.

    Attributes:
      axes: those that values may be sharded over.
      manual: those that the user's own collectives work on, inside of a `jax.shard_map`.
      across: of the axes that cross the slow network between slices or nodes, how many of these
        lie along each, its major part.

    Raises:
      MeshError: a name appears twice, is empty, or a size is below 1.
    """

    axes: tuple[tuple[str, int], ...]
    manual: tuple[tuple[str, int], ...] = ()
    across: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        problems = []
        for i, (name, size) in enumerate(self.axes):
            if not isinstance(name, str) or not name or _RESERVED.search(name):
                problems.append(_bad_name(name, i))
            elif name in names[:i]:
                problems.append(_duplicate(name, [j for j, n in enumerate(names) if n == name]))
            if size < 1:
                problems.append(
                    Problem(
                        f"mesh axis {name!r} has size {size}",
                        "every axis holds at least one device",
                        f"give {name!r} a size of 1 or more",
                    )
                )
        if problems:
            raise MeshError(*problems)

    def __reduce__(self) -> tuple[Any, ...]:
        return MeshShape, (self.axes, self.manual, self.across)

    @staticmethod
    def of(mesh: Any) -> "MeshShape":
        """From a `jax.sharding.Mesh`, an `AbstractMesh`, a mapping or a `MeshShape`."""
        if isinstance(mesh, MeshShape):
            return mesh
        if isinstance(mesh, Mapping):
            return MeshShape(tuple((name, int(size)) for name, size in mesh.items()))
        if hasattr(mesh, "axis_names"):
            sizes = getattr(mesh, "axis_sizes", None) or tuple(mesh.devices.shape)
            axes = tuple(zip(mesh.axis_names, sizes, strict=True))
            return MeshShape(axes, across=nodes.along(mesh))
        raise MeshError(
            Problem(
                f"mesh is a {type(mesh).__name__}",
                "a program is partitioned over named mesh axes",
                "pass jax.sharding.Mesh, jax.sharding.AbstractMesh or a dict of axis sizes",
            )
        )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.axes)

    @property
    def size(self) -> int:
        """Number of devices."""
        return prod(size for _, size in self.axes)

    def without(self, names: Collection[str]) -> "MeshShape":
        """The mesh where these axes, with their sub-axes, are manual."""
        if not names:
            return self
        taken = [a for a in self.axes if a[0] in names or split_ref(a[0])[0] in names]
        left = tuple(a for a in self.axes if a not in taken)
        return MeshShape(left, (*self.manual, *taken), self.across)

    def nodes_along(self, ref: str) -> int:
        """How many slices or nodes lie along an axis reference; 1 where it stays inside of one."""
        found = dict(self.across)
        name, pre, size = split_ref(ref)
        if ref in found or size is None:
            return found.get(ref, 1)
        left = max(found.get(name, 1) // pre, 1)  # the network is the major part of an axis
        return gcd(left, size)

    def like(self, other: "MeshShape") -> bool:
        """Whether both have the same axes, wherever these lie."""
        return (self.axes, self.manual) == (other.axes, other.manual)

    def manual_refs(self, name: str) -> tuple[str, ...]:
        """What a manual axis is made of, major to minor: itself, or its sub-axes."""
        return tuple(a for a, _ in self.manual if a == name or split_ref(a)[0] == name)

    def __str__(self) -> str:
        return ", ".join(f"{name}={size}" for name, size in self.axes) or "(no axes)"

    def placed_text(self) -> str:
        """`data=2@dcn, fsdp=4`: where the axes lie too. Of an axis that does not lie on the slow
        network alone the part that does is told: `data=4(2@dcn)`."""
        across = dict(self.across)
        parts = []
        for name, size in self.axes:
            count = across.get(name, 1)
            where = "" if count == 1 else "@dcn" if count == size else f"({count}@dcn)"
            parts.append(f"{name}={size}{where}")
        return ", ".join(parts) or "(no axes)"


@lru_cache(maxsize=65536)
def axis_size(mesh: MeshShape, ref: str) -> int:
    """Number of shards that the axis reference `ref` makes."""
    name, _, size = split_ref(ref)
    for axis, full in mesh.axes:
        # A refined mesh has sub-axes as axes of their own: the whole text is the name.
        if axis == ref:
            return full
        # A part of an axis, or of what is a part itself there.
        if size is not None and _contains(axis, ref):
            return size
    raise KeyError(ref)


def _contains(axis: str, part: str) -> bool:
    """Whether a part of an axis is one of `axis`, which may be a part itself."""
    name, pre, size = split_ref(axis)
    part_name, part_pre, part_size = split_ref(part)
    if name != part_name or part_size is None:
        return False
    return size is None or (pre <= part_pre and part_pre * part_size <= pre * size)


@lru_cache(maxsize=65536)
def axes_size(mesh: MeshShape, refs: tuple[str, ...]) -> int:
    """Number of shards that several axis references make together."""
    return prod(axis_size(mesh, ref) for ref in refs)


@lru_cache(maxsize=65536)
def overlap(a: str, b: str) -> bool:
    """Whether two axis references share devices: equal, or intersecting parts of one axis."""
    if a == b:
        return True
    name_a, pre_a, size_a = split_ref(a)
    name_b, pre_b, size_b = split_ref(b)
    if name_a != name_b:
        return False
    if size_a is None or size_b is None:
        return True
    return pre_a < pre_b * size_b and pre_b < pre_a * size_a


@lru_cache(maxsize=65536)
def split_axis(mesh: MeshShape, ref: str, major: int) -> tuple[str, str] | None:
    """`ref` as a major sub-axis of size `major` and the rest; None where it does not divide."""
    total = axis_size(mesh, ref)
    if major <= 1 or major >= total or total % major:
        return None
    name, pre, _ = split_ref(ref)
    return f"{name}:({pre}){major}", f"{name}:({pre * major}){total // major}"


def split_to_fit(mesh: MeshShape, refs: tuple[str, ...], size: int) -> tuple[
    tuple[str, ...], tuple[str, ...]
]:
    """Splits axes into a major part whose product divides `size` as far as it can, and the rest.

    The axis on the border is split into sub-axes by the greatest common divisor.
    """
    taken: list[str] = []
    for i, ref in enumerate(refs):
        n = axis_size(mesh, ref)
        if size % n == 0:
            taken.append(ref)
            size //= n
            continue
        parts = split_axis(mesh, ref, gcd(size, n))
        if parts is None:
            return tuple(taken), refs[i:]
        return (*taken, parts[0]), (parts[1], *refs[i + 1 :])
    return tuple(taken), ()


@lru_cache(maxsize=65536)
def merge_refs(mesh: MeshShape, refs: tuple[str, ...]) -> tuple[str, ...]:
    """Joins neighbouring sub-axes of one axis, so that every axis list has one form."""
    merged: list[str] = []
    sizes = dict(mesh.axes)
    for ref in refs:
        name, pre, size = split_ref(ref)
        if merged and size is not None and ref not in sizes:
            last, last_pre, last_size = split_ref(merged[-1])
            if last == name and last_size is not None and last_pre * last_size == pre:
                joined = last_size * size
                whole = last_pre == 1 and joined == sizes.get(name)
                part = f"{name}:({last_pre}){joined}"
                # Not across two axes of a refined mesh, of which it would be no part.
                if whole or any(_contains(axis, part) for axis in sizes):
                    merged[-1] = name if whole else part
                    continue
        merged.append(ref)
    return tuple(merged)


def refine(mesh: MeshShape, refs: set[str]) -> MeshShape:
    """The mesh in which every sub-axis in `refs` is a product of whole axes.

    The devices keep their order, so a refined mesh is the same devices, reshaped.
    """
    cuts: dict[str, set[int]] = {name: set() for name in mesh.names}
    for ref in refs:
        name, pre, size = split_ref(ref)
        if size is not None and name in cuts:
            cuts[name] |= {pre, pre * size}
    axes: list[tuple[str, int]] = []
    for name, full in mesh.axes:
        points = _nested(sorted(cuts[name] - {1, full}), full)
        if not points:
            axes.append((name, full))
            continue
        for low, high in zip([1, *points], [*points, full], strict=True):
            axes.append((f"{name}:({low}){high // low}", high // low))
    across = [(name, mesh.nodes_along(name)) for name, _ in axes]
    return MeshShape(tuple(axes), across=tuple((name, n) for name, n in across if n > 1))


def _nested(points: Sequence[int], full: int) -> list[int]:
    """Of the places where an axis is cut those that are multiples of the ones before: 2 and 3 of
    an axis of 6 are no parts of one another."""
    found = [1]
    for point in points:
        if point % found[-1] == 0 and full % point == 0:
            found.append(point)
    return found[1:]


@lru_cache(maxsize=65536)
def refine_refs(mesh: MeshShape, refined: MeshShape, refs: tuple[str, ...]) -> tuple[str, ...]:
    """Axis references of `mesh` as whole axes of `refined`."""
    result: list[str] = []
    names = refined.names
    for ref in refs:
        if ref in names:
            result.append(ref)
            continue
        name, pre, size = split_ref(ref)
        count = size if size is not None else axis_size(mesh, ref)
        parts, made = [], 1
        for candidate in names:
            cand_name, cand_pre, cand_size = split_ref(candidate)
            if cand_name == name and cand_size is not None:
                if pre <= cand_pre and cand_pre * cand_size <= pre * count:
                    parts.append(candidate)
                    made *= cand_size
        result += parts if made == count else ()  # or it is no product of whole axes there
    return tuple(result)


def _bad_name(name: object, position: int) -> Problem:
    return Problem(
        f"mesh axis {position} is named {name!r}",
        "annotations refer to mesh axes by name",
        "use a non-empty string without spaces and without any of []{},+?@, such as 'data'",
    )


def _duplicate(name: str, positions: list[int]) -> Problem:
    return Problem(
        f"mesh axis {name!r} is named at positions {', '.join(map(str, positions))}",
        "an annotation that says the name would mean two axes",
        "give every mesh axis a name of its own",
    )
