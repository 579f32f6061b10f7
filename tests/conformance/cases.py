"""Cases: which dims of which arrays of a program are sharded, over which mesh."""

import random
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

import spmd
from sharding import _jax
from sharding.annotate import shard

Shapes = Sequence[tuple[int, ...]]

# Sizes of the axes x and y.
MESHES: tuple[tuple[int, ...], ...] = ((2,), (3,), (4,), (8,), (2, 2))
PAIRS = 6  # of dims per harness, over the mesh of two axes


class Place(NamedTuple):
    """One dim of an argument or result, and the mesh axis that shards it."""

    side: str  # "in" or "out"
    tensor: int
    dim: int
    axis: str

    def __str__(self) -> str:
        return f"{self.side}{self.tensor}.{self.dim}={self.axis}"


class Case(NamedTuple):
    """Dims that are sharded at once; its text is unique in a harness and mesh."""

    places: tuple[Place, ...]

    def __str__(self) -> str:
        return " ".join(map(str, self.places))


def mesh_text(sizes: Sequence[int]) -> str:
    """(2, 2) is `2x2`."""
    return "x".join(map(str, sizes))


def parse_mesh(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split("x"))


@cache
def make_mesh(sizes: tuple[int, ...]) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(devices, ("x", "y")[: len(sizes)], axis_types=(AxisType.Auto,) * len(sizes))


def cases(ins: Shapes, outs: Shapes, sizes: Sequence[int], seed: str) -> list[Case]:
    """On one axis every dim in turn; on two, pairs of dims of one argument or of two.

    Dims of size 1 and 0 are among them. Of many pairs a sample is taken that `seed` decides.
    """
    if len(sizes) == 1:
        return [Case((place,)) for place in (*_places("in", ins), *_places("out", outs))]
    pairs = [
        Case((a, b._replace(axis="y"))) for a, b in combinations(list(_places("in", ins)), 2)
    ]
    rng = random.Random(zlib.crc32(seed.encode()))
    return pairs if len(pairs) <= PAIRS else [pairs[i] for i in _few(rng, len(pairs))]


def _few(rng: random.Random, count: int) -> list[int]:
    return sorted(rng.sample(range(count), PAIRS))


def _places(side: str, shapes: Shapes) -> Iterator[Place]:
    for tensor, shape in enumerate(shapes):
        for dim in range(len(shape)):
            yield Place(side, tensor, dim, "x")


def partitioned(closed: Any, args: Sequence[Any], case: Case, mesh: Mesh) -> spmd.Partitioned:
    """The program with the case's dims sharded.

    Dims that divide are sharded from the boundary on. The boundary keeps others whole, so those
    are annotated inside: on the argument as it comes in, on the result before it goes out.
    """
    fun = _jax.as_fun(closed)
    shapes = {"in": [v.shape for v in closed.in_avals], "out": [v.shape for v in closed.out_avals]}
    at_boundary: dict[tuple[str, int], PartitionSpec] = {}
    inside: dict[tuple[str, int], PartitionSpec] = {}
    for key in {(p.side, p.tensor) for p in case.places}:
        places = [p for p in case.places if (p.side, p.tensor) == key]
        shape = shapes[key[0]][key[1]]
        even = all(shape[p.dim] and shape[p.dim] % mesh.shape[p.axis] == 0 for p in places)
        spec: list[str | None] = [None] * len(shape)
        for place in places:
            spec[place.dim] = place.axis
        (at_boundary if even else inside)[key] = PartitionSpec(*spec)

    def annotated(side: str, values: Sequence[Any]) -> list[Any]:
        specs = [inside.get((side, i)) for i in range(len(values))]
        return [x if s is None else shard(x, s) for x, s in zip(values, specs, strict=True)]

    def program(*values: Any) -> list[Any]:
        return annotated("out", fun(*annotated("in", values)))

    function = spmd.jit(
        program,
        mesh=mesh,
        in_shardings=tuple(at_boundary.get(("in", i)) for i in range(len(args))),
        out_shardings=[at_boundary.get(("out", i)) for i in range(len(closed.out_avals))],
    )
    return function.trace(*args).propagate().partition()
