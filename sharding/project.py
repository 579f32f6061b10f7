"""Dims <-> factors: the only code that translates between them.

The engine never sees an operation: it projects the shardings of an equation's tensors onto
factors, decides there, and projects back.
"""

from collections.abc import Mapping, Sequence

from sharding.mesh import (
    MeshShape,
    axes_size,
    axis_size,
    merge_refs,
    overlap,
    split_ref,
    split_to_fit,
)
from sharding.rule import Kind, Rule

Axes = tuple[str, ...]


def to_factors(
    rule: Rule, tensor: int, dims: tuple[Axes, ...], mesh: MeshShape
) -> dict[str, Axes]:
    """Axes per factor that one tensor's sharding expresses; sub-axes where a dim was split.

    What an uneven or strided layout cannot express in factors is left out.
    """
    found: dict[str, Axes] = {}
    for names, axes in zip(rule.tensors[tensor], dims, strict=True):
        if not axes or not names:
            continue
        if len(names) == 1:
            found[names[0]] = axes
            continue
        alone = names[0] in rule.alone
        parts, left = _divided(rule, names[1:] if alone else names, axes, mesh)
        whole = left or any(rule.factors[name].kind is Kind.FIXED for name in parts)
        found.update({names[0]: axes} if alone and whole else parts)
    return found


def _divided(
    rule: Rule, names: Sequence[str], axes: Axes, mesh: MeshShape
) -> tuple[dict[str, Axes], Axes]:
    """Axes per factor of one dim, major to minor, and what does not fit."""
    parts: dict[str, Axes] = {}
    for name in names:
        size = rule.factors[name].size
        taken, axes = split_to_fit(mesh, axes, size)
        if taken:
            parts[name] = taken
        if not axes or axes_size(mesh, taken) != size:
            break
    return parts, axes


def to_dims(
    rule: Rule, tensor: int, factors: Mapping[str, Axes], mesh: MeshShape
) -> tuple[Axes, ...]:
    """The dims of one tensor under an assignment of axes to factors."""
    dims = []
    for names in rule.tensors[tensor]:
        if len(names) == 1:
            dims.append(factors.get(names[0], ()))
        else:
            joined = tuple(a for name in names for a in factors.get(name, ()))
            dims.append(merge_refs(mesh, joined))
    return tuple(dims)


def expressible(
    rule: Rule, tensor: int, factors: Mapping[str, Axes], mesh: MeshShape
) -> bool:
    """Whether a tensor's dims stay contiguous: even shards, and majors whole before minors."""
    for name, others in rule.alone.items():
        if factors.get(name) and any(factors.get(other) for other in others):
            return False
    for names in rule.tensors[tensor]:
        if len(names) < 2:
            continue
        whole = True
        for name in names:
            if name in rule.alone:
                continue
            axes = factors.get(name, ())
            size = rule.factors[name].size
            shards = axes_size(mesh, axes)
            if axes and (not whole or size % shards):
                return False
            whole = whole and shards == size
    return True


def extension(current: Axes, wanted: Axes, mesh: MeshShape) -> Axes | None:
    """What to append to `current` to reach `wanted`; None where it is no prefix of it."""
    for i, ref in enumerate(current):
        if i >= len(wanted):
            return None
        if ref == wanted[i]:
            continue
        name, pre, _ = split_ref(ref)
        other, other_pre, _ = split_ref(wanted[i])
        size, total = axis_size(mesh, ref), axis_size(mesh, wanted[i])
        last = i == len(current) - 1
        if not last or name != other or pre != other_pre or size >= total or total % size:
            return None
        return (f"{name}:({pre * size}){total // size}", *wanted[i + 1 :])
    return wanted[len(current) :]


def clashes(axis: str, used: Axes) -> bool:
    """Whether `axis` shares devices with any of `used`."""
    return axis in used or any(overlap(axis, other) for other in used)
