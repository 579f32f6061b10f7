"""`Sharding`: how one value is laid out on a mesh, with one canonical text that parses back.

Text form, per dim major to minor: mesh axes joined by `+`, `-` for none, `?` for a dim that
propagation may still extend, `@<N>` for a priority other than 0:

    [data+fsdp, -, tensor?, ?@1] partial{tensor:add} pinned{stage}

`partial` axes hold addends (or other monoid operands) that are still to be reduced: the P of
OneFlow's SBP, "unreduced" in Shardy. `pinned` axes must stay unused by the value.
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from sharding.errors import Problem, SpecError, did_you_mean
from sharding.mesh import MeshShape, axes_size, overlap, split_ref, split_to_fit

MONOIDS = ("add", "mul", "max", "min", "and", "or")

_DIM = re.compile(r"^(?P<axes>-|[^?@]*)(?P<open>\?)?(?:@(?P<priority>\d+))?$")
_TEXT = re.compile(
    r"^\[(?P<dims>[^\]]*)\](?: partial\{(?P<partial>[^}]*)\})?(?: pinned\{(?P<pinned>[^}]*)\})?$"
)


@dataclass(frozen=True, slots=True)
class DimSharding:
    """Axes of one array dim, major to minor; `open` lets propagation append further axes.

    Attributes:
      axes: axis references, major to minor.
      open: whether propagation may extend the list.
      priority: 0 first; dims of a larger number wait until the smaller ones have propagated.
    """

    axes: tuple[str, ...] = ()
    open: bool = False
    priority: int = 0

    def __str__(self) -> str:
        text = "+".join(self.axes) or ("" if self.open else "-")
        return text + ("?" if self.open else "") + (f"@{self.priority}" if self.priority else "")


@dataclass(frozen=True, slots=True)
class Sharding:
    """The sharding of one value. Frozen, hashable, validated when built.

    Attributes:
      dims: one `DimSharding` per array dim.
      partial: (axis, monoid) pairs, sorted: the value is the monoid's reduction over the axis.
      pinned: axes that must not be used by this value.

    Raises:
      SpecError: an axis is used twice, or a monoid is unknown.
    """

    dims: tuple[DimSharding, ...]
    partial: tuple[tuple[str, str], ...] = ()
    pinned: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "partial", tuple(sorted(self.partial)))
        object.__setattr__(self, "pinned", tuple(sorted(self.pinned)))
        used = [a for d in self.dims for a in d.axes]
        used += [a for a, _ in self.partial] + list(self.pinned)
        problems = [
            _used_twice(a, str(self)) for i, a in enumerate(used)
            if any(overlap(a, b) for b in used[:i])
        ]
        problems += [_bad_monoid(a, m) for a, m in self.partial if m not in MONOIDS]
        if problems:
            raise SpecError(*problems)

    @staticmethod
    def open(rank: int) -> "Sharding":
        """Nothing known: every dim may be sharded by propagation."""
        return Sharding((DimSharding(open=True),) * rank)

    @staticmethod
    def replicated(rank: int) -> "Sharding":
        return Sharding((DimSharding(),) * rank)

    @staticmethod
    def closed(*dims: tuple[str, ...]) -> "Sharding":
        return Sharding(tuple(DimSharding(tuple(axes)) for axes in dims))

    @staticmethod
    def parse(text: str) -> "Sharding":
        """The inverse of `str`.

        Raises:
          SpecError: the text is not in the canonical form.
        """
        match = _TEXT.match(text.strip())
        if match is None:
            raise SpecError(_unparsable(text))
        body = match["dims"].strip()
        dims = tuple(_parse_dim(part.strip(), text) for part in body.split(",")) if body else ()
        partial = []
        for part in (match["partial"] or "").split(","):
            if part.strip():
                axis, _, monoid = part.strip().rpartition(":")
                partial.append((axis, monoid))
        pinned = tuple(p.strip() for p in (match["pinned"] or "").split(",") if p.strip())
        return Sharding(dims, tuple(partial), pinned)

    @property
    def layout(self) -> "Layout":
        return Layout(tuple(d.axes for d in self.dims), self.partial)

    def __str__(self) -> str:
        text = "[" + ", ".join(map(str, self.dims)) + "]"
        text += _partial_text(self.partial)
        if self.pinned:
            text += " pinned{" + ", ".join(self.pinned) + "}"
        return text


class Layout(NamedTuple):
    """Where a value's elements are, now: a `Sharding` without openness and priorities.

    The partitioner works on layouts: nothing is left to be propagated, but a value may be partial.

    Attributes:
      dims: per array dim, mesh axes major to minor.
      partial: sorted (axis, monoid) pairs.
    """

    dims: tuple[tuple[str, ...], ...]
    partial: tuple[tuple[str, str], ...] = ()

    @property
    def used(self) -> frozenset[str]:
        return frozenset(a for d in self.dims for a in d) | {a for a, _ in self.partial}

    def local_shape(self, shape: tuple[int, ...], mesh: MeshShape) -> tuple[int, ...]:
        """Shape on every device: ceil(size / shards) per dim."""
        return local_shape(self.dims, tuple(shape), mesh)

    def reduced(self) -> "Layout":
        """The same without partial axes."""
        return Layout(self.dims) if self.partial else self

    def __str__(self) -> str:
        text = "[" + ", ".join("+".join(axes) or "-" for axes in self.dims) + "]"
        return text + _partial_text(self.partial)


@lru_cache(maxsize=65536)
def local_shape(
    dims: tuple[tuple[str, ...], ...], shape: tuple[int, ...], mesh: MeshShape
) -> tuple[int, ...]:
    return tuple(
        -(-n // axes_size(mesh, axes)) if axes else n for n, axes in zip(shape, dims, strict=True)
    )


def fitted(sharding: Sharding, shape: tuple[int, ...], mesh: MeshShape) -> Sharding:
    """With dims of fewer elements than devices on the major part of their axes that makes as many
    shards: 4 heads over an axis of 8 lie over `tensor:(1)4`, so that no device has padding alone.
    Where no part does, they stay as they are: no part of 8 makes 6."""
    dims = tuple(
        replace(dim, axes=_fitted(dim.axes, n, mesh))
        for dim, n in zip(sharding.dims, shape, strict=True)
    )
    return sharding if dims == sharding.dims else replace(sharding, dims=dims)


def _fitted(axes: tuple[str, ...], n: int, mesh: MeshShape) -> tuple[str, ...]:
    if not 1 < n < axes_size(mesh, axes):
        return axes
    taken, _ = split_to_fit(mesh, axes, n)
    return taken if axes_size(mesh, taken) == n else axes


def check_axes(sharding: Sharding, mesh: MeshShape, what: str) -> list[Problem]:
    """Problems with axes that the mesh does not have; `what` names the annotated value."""
    refs = [a for d in sharding.dims for a in d.axes]
    refs += [a for a, _ in sharding.partial] + list(sharding.pinned)
    return [
        unknown_axis(split_ref(ref)[0], mesh, what)
        for ref in refs
        if split_ref(ref)[0] not in mesh.names
    ]


def unknown_axis(
    name: str, mesh: MeshShape, what: str, logical: tuple[str, ...] = ()
) -> Problem:
    """A name that is neither an axis of the mesh nor one of the `logical` names with a rule."""
    close = did_you_mean(name, (*mesh.names, *logical))
    rules = f" and axis_rules names {', '.join(logical)}" if logical else ""
    return Problem(
        f"{what} names axis {name!r}",
        f"the mesh has the axes {mesh}{rules}{close}",
        f"use a mesh axis, or map {name!r} to one with axis_rules=[({name!r}, ...)]",
    )


def _partial_text(partial: tuple[tuple[str, str], ...]) -> str:
    return " partial{" + ", ".join(f"{a}:{m}" for a, m in partial) + "}" if partial else ""


def _parse_dim(part: str, text: str) -> DimSharding:
    match = _DIM.match(part)
    if match is None or (not part):
        raise SpecError(_unparsable(text))
    axes = match["axes"]
    names = () if axes in ("", "-") else tuple(axes.split("+"))
    return DimSharding(names, bool(match["open"]), int(match["priority"] or 0))


def _unparsable(text: str) -> Problem:
    return Problem(
        f"sharding text {text!r}",
        "it is not of the form [axis+axis, -, ?] partial{axis:monoid} pinned{axis}",
        "write one entry per dim: axes joined by '+', '-' for none, '?' for open",
    )


def _used_twice(axis: str, text: str) -> Problem:
    return Problem(
        f"sharding {text} uses axis {axis!r} twice",
        "the devices along one axis can hold the parts of one dim only",
        f"keep {axis!r} in one place and remove it from the others",
    )


def _bad_monoid(axis: str, monoid: str) -> Problem:
    return Problem(
        f"partial axis {axis!r} has monoid {monoid!r}",
        f"partial values are reduced by one of {', '.join(MONOIDS)}",
        "use one of these",
    )
