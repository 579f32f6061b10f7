"""Which devices take part in a collective, and which mesh axes they span.

XLA prints replica groups in four ways, all of them read here:

    {{0,1},{2,3}}                      the groups themselves
    [2,4]<=[8]                         iota: ids 0..7 reshaped to two groups of four
    [4,2]<=[2,4]T(1,0)                 iota of shape [2,4], transposed, as four groups of two
    mesh['a'=2,'b'=4] {'b'}            the groups along axis b; `'b':(2)2` is a part of an axis,
                                       and an axis itself where the name is `'b:(2)2'`

and `source_target_pairs={{0,1},{1,0}}` for a collective-permute. `{}` means all devices.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from sharding.errors import ArgumentError, Problem

Groups = tuple[tuple[int, ...], ...]

_EXPLICIT = re.compile(r"replica_groups=\{((?:\{[\d,\s]*\},?\s*)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=@?mesh[\[<](?P<axes>[^\]>]*)[\]>]"
    r"(?:,\s*device_ids=\((?P<ids>[^)]*(?:\([^)]*\))?)\))?\s*\{(?P<over>[^}]*)\}"
)
# Names may hold what parts of axes are written with: a refined mesh has axes 'data:(1)2'.
_NAME = r"(?:'([^']+)'|([\w.\-]+))"
_MESH_AXIS = re.compile(_NAME + r"=(\d+)")
_OVER_AXIS = re.compile(_NAME + r"(?::\((\d+)\)(\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?\s*)*)\}")
_DEVICE_ORDER = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?$")


def replica_groups(attributes: str, num_devices: int) -> Groups:
    """The groups an instruction's attributes name; `num_devices` is what `{}` stands for."""
    if found := _EXPLICIT.search(attributes):
        listed = re.findall(r"\{([\d,\s]*)\}", found.group(1))
        return tuple(_ints(group) for group in listed) or (tuple(range(num_devices)),)
    if found := _IOTA.search(attributes):
        ids = _iota(_ints(found.group(2)), _ints(found.group(3) or ""))
        return _rows(ids.reshape(_ints(found.group(1))))
    if found := _MESH.search(attributes):
        return _mesh_groups(found.group("axes"), found.group("ids"), found.group("over"))
    if "replica_groups=" in attributes:
        printed = attributes[attributes.index("replica_groups=") :][:80]
        raise ArgumentError(
            Problem(
                f"replica groups printed as {printed!r}",
                "this is none of the forms that the reader of HLO text knows",
                "read the form in `replica_groups` of spmd/reporting/hlo_groups.py",
            )
        )
    return (tuple(range(num_devices)),)


def source_target_pairs(attributes: str) -> Groups:
    """The (source, target) device pairs of a collective-permute."""
    found = _PAIRS.search(attributes)
    return tuple(_ints(pair) for pair in re.findall(r"\{(\d+,\d+)\}", found[1])) if found else ()


def connected(pairs: Groups) -> Groups:
    """Sets of devices that pairs link, sorted: the groups within which a permute moves data."""
    groups: list[set[int]] = []
    for pair in pairs:
        touching = [group for group in groups if group & set(pair)]
        groups = [group for group in groups if group not in touching]
        groups.append(set(pair).union(*touching))
    return tuple(sorted(tuple(sorted(group)) for group in groups))


def mesh_axes_of(
    groups: Sequence[Sequence[int]], mesh_shape: Mapping[str, int]
) -> tuple[str, ...] | None:
    """The mesh axes that replica groups span, in mesh order.

    Device ids are positions in the mesh, row-major, `mesh_shape` being ordered major to minor.
    () when every group is one device. None when the groups are not the groups along whole mesh
    axes: a part of an axis, uneven groups, or devices outside the mesh.
    """
    sizes = tuple(mesh_shape.values())
    ids = [device for group in groups for device in group]
    if not ids or max(ids) >= math.prod(sizes):
        return None
    coordinates = np.array(np.unravel_index(list(groups[0]), sizes))
    varying = [dim for dim, row in enumerate(coordinates) if len(set(row.tolist())) > 1]
    grid = np.arange(math.prod(sizes)).reshape(sizes)
    expected = {frozenset(group) for group in _along(grid, varying)}
    if {frozenset(group) for group in groups} != expected or len(groups) != len(expected):
        return None
    return tuple(name for dim, name in enumerate(mesh_shape) if dim in varying)


def permute_axes_of(pairs: Groups, mesh_shape: Mapping[str, int]) -> tuple[str, ...] | None:
    """The mesh axes along which a permute moves data, in mesh order; None outside the mesh."""
    sizes = tuple(mesh_shape.values())
    if not pairs or max(itertools.chain(*pairs)) >= math.prod(sizes):
        return None
    source, target = np.array(np.unravel_index(np.array(pairs).T, sizes)).transpose(1, 0, 2)
    moves = (source != target).any(axis=1)
    return tuple(name for name, moved in zip(mesh_shape, moves, strict=True) if moved)


def _mesh_groups(axes: str, device_ids: str | None, over: str) -> Groups:
    """Groups of `mesh[axes], device_ids=(...) {over}`, parts of axes being `name:(pre)size`."""
    sizes = {quoted or name: int(size) for quoted, name, size in _MESH_AXIS.findall(axes)}
    parts = {name: [size] for name, size in sizes.items()}
    grouped = []
    for quoted, plain, pre, size in _OVER_AXIS.findall(over):
        name = quoted or plain
        if size:
            parts[name] = _refine(parts[name], int(pre), int(pre) * int(size))
        grouped.append((name, int(pre or 1), int(pre or 1) * int(size or sizes[name])))
    spans = [(name, *span) for name, split in parts.items() for span in _spans(split)]
    ids = _mesh_device_ids(device_ids, math.prod(sizes.values()))
    grid = ids.reshape([end // start for _, start, end in spans])
    # the order in which the axes are listed is the order of the devices within a group
    chosen = [
        dim
        for name, start, end in grouped
        for dim, span in enumerate(spans)
        if span[0] == name and start <= span[1] and span[2] <= end
    ]
    return _along(grid, chosen)


def _spans(split: Sequence[int]) -> list[tuple[int, int]]:
    """Sub-axis sizes major to minor as (product before, product up to and including)."""
    ends = list(itertools.accumulate(split, int.__mul__))
    return list(zip([1, *ends[:-1]], ends, strict=True))


def _refine(split: Sequence[int], *boundaries: int) -> list[int]:
    """Splits an axis so that every boundary (a product of leading parts) falls between parts."""
    ends = sorted({end for _, end in _spans(split)} | {b for b in boundaries if b > 1})
    return [end // start for start, end in zip([1, *ends[:-1]], ends, strict=True)]


def _mesh_device_ids(text: str | None, num_devices: int) -> np.ndarray:
    if text is None:
        return np.arange(num_devices)
    iota = _DEVICE_ORDER.match(text)
    if iota is None:
        return np.array(_ints(text))
    return _iota(_ints(iota.group(1)), _ints(iota.group(2) or ""))


def _along(grid: np.ndarray, dims: Sequence[int]) -> Groups:
    """Groups of the ids in `grid` that differ in `dims` only."""
    rest = [dim for dim in range(grid.ndim) if dim not in dims]
    width = math.prod(grid.shape[dim] for dim in dims)
    return _rows(grid.transpose([*rest, *dims]).reshape(-1, width))


def _iota(shape: Sequence[int], transpose: Sequence[int]) -> np.ndarray:
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose(transpose) if transpose else ids).reshape(-1)


def _rows(ids: np.ndarray) -> Groups:
    return tuple(tuple(int(device) for device in row) for row in ids)


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number.strip())
