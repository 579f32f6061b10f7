"""How many bytes a value takes in memory: TPUs lay the two minor dims of an array out in tiles.

A tile has 128 columns, and as many rows as the dim needs, up to 8: what does not fill tiles is
padded. XLA chooses the minor dims so that little is; a convolution's units read features and batch
in a tile, so that its activations have those, whatever that pads.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import permutations
from math import prod

from sharding.mesh import MeshShape
from sharding.rule import Kind
from spmd.estimate.work import Line
from spmd.partition.plan import Compute, Key

COLUMNS, ROWS = 128, 8
WORDS = (8, 16, 32)  # bits of an element that masks are packed into

Shape = tuple[int, ...]


class Sizes:
    """Bytes of values on one device."""

    def __init__(self, lines: Sequence[Line], tiled: bool = False):
        """`tiled`: as on TPUs."""
        self.tiled = tiled
        self.activations = dict(_activations(lines)) if tiled else {}

    def of(self, key: Key, mesh: MeshShape) -> int:
        """Bytes of a value between instructions; of a program's argument: `argument`."""
        if not self.tiled:
            return key.local_bytes(mesh)
        shape = _local_shape(key, mesh)
        others = self.activations.get(shape)
        if others is None:
            return tiled_bytes(shape, key.value.itemsize)
        if self.packed(key, mesh):
            return tiled_bytes(shape, key.value.itemsize) // 8
        return activation_bytes(shape, key.value.itemsize, others)

    def argument(self, key: Key, mesh: MeshShape) -> int:
        """Bytes of an argument, which comes in the layout that pads least."""
        if not self.tiled:
            return key.local_bytes(mesh)
        return tiled_bytes(_local_shape(key, mesh), key.value.itemsize)

    def packed(self, key: Key, mesh: MeshShape) -> bool:
        """Whether XLA keeps a mask of activations (where a ReLU lets its operand pass) rather than
        those: where a spatial dim has as many elements as some word has bits, it packs them."""
        shape = _local_shape(key, mesh)
        others = self.activations.get(shape)
        if others is None or str(key.value.dtype) != "bool":
            return False
        return any(n in WORDS for d, n in enumerate(shape) if d not in others)

    def moved(self, key: Key, mesh: MeshShape) -> bool:
        """Whether a value is laid out for convolutions, other than an argument of its shape."""
        return self.tiled and _local_shape(key, mesh) in self.activations


def _local_shape(key: Key, mesh: MeshShape) -> Shape:
    return key.layout.local_shape(key.value.shape, mesh)


def _activations(lines: Sequence[Line]) -> Iterator[tuple[Shape, tuple[int, int]]]:
    """The local shapes that convolutions read and write, with their dims that are not spatial."""
    for line in lines:
        found = line.instruction
        if not line.contracts or not isinstance(found, Compute):
            continue
        rule = found.op.rule
        over = {
            f for f, factor in rule.factors.items()
            # a kernel of a single element passes over the spatial dims
            if factor.kind is Kind.PERMUTE or f in rule.spatial and factor.kind is Kind.PASS
        }  # fmt: skip
        keys = (*found.operands, *found.results)
        for key, dims in zip(keys, (*rule.operands, *rule.results), strict=True):
            spatial = [any(f in over for f in names) for names in dims]
            others = [d for d, is_spatial in enumerate(spatial) if not is_spatial]
            if any(spatial) and len(others) == 2:
                yield _local_shape(key, line.mesh), (others[0], others[1])


@lru_cache(maxsize=8192)
def tiled_bytes(shape: Shape, itemsize: int) -> int:
    """Bytes of an array of a local shape, its minor dims chosen so that the padding is least."""
    size = prod(shape)
    if len(shape) < 2 or not size:
        return size * itemsize
    return min(
        size // (shape[a] * shape[b]) * _tiles(shape[a], shape[b], itemsize)
        for a, b in permutations(range(len(shape)), 2)
    )  # fmt: skip


@lru_cache(maxsize=8192)
def activation_bytes(shape: Shape, itemsize: int, others: tuple[int, int]) -> int:
    """The same of what convolutions read or write: batch and features, the dims in `others`, lie
    in the tiles. A batch of one leaves its place to a spatial dim."""
    a, b = (shape[d] for d in others)
    if 1 in (a, b):
        return tiled_bytes(shape, itemsize)
    size, least = prod(shape), 2 * _packed(itemsize)  # rows of the smallest tile that they read
    tiles = min(_tiles(max(a, least), b, itemsize), _tiles(max(b, least), a, itemsize))
    return size // (a * b) * tiles if size else 0


def _tiles(rows: int, columns: int, itemsize: int) -> int:
    """Bytes of a matrix in tiles."""
    tall = ROWS
    while tall // 2 >= max(rows, _packed(itemsize)):
        tall //= 2
    return -(-rows // tall) * tall * -(-columns // COLUMNS) * COLUMNS * itemsize


def _packed(itemsize: int) -> int:
    """Rows of narrow elements that share a row of registers, which are 4 bytes wide."""
    return max(4 // max(itemsize, 1), 1)
