"""How long matrix units take for a contraction or convolution.

They multiply square tiles: a TPU holds a tile of one operand and streams rows of the other past it,
so that a dim of 32 takes as long as one of 128 (the scaling book, "How to Think About TPUs").
"""

from math import prod
from typing import NamedTuple

import jax

from sharding.mesh import MeshShape, axes_size
from sharding.rule import Kind
from spmd.chips import Chip
from spmd.partition.plan import Compute

_DEFAULT = jax.lax.Precision.DEFAULT
# Rows that are streamed together.
_ROWS = 8
# Features of a convolution that are few.
_FOLDED = 16


class Product(NamedTuple):
    """Elements of the local dims of one product of matrices [rows, inner] and [inner, columns].

    Attributes:
      batch: of the rows, those that are no places of a convolution.
    """

    rows: int
    batch: int
    inner: int
    columns: int


def arithmetic(found: Compute, flops: float, mesh: MeshShape, chip: Chip) -> float:
    """Seconds of the arithmetic of a contraction or convolution. What comes out of a contraction
    passes the vector units, unless it stays in the core's own memory.

    Args:
      flops: of one run on one device.
    """
    seconds = flops / rate(found, chip) / _filled(found, mesh, chip.tile)
    key = found.results[0]
    size = key.local_bytes(mesh)
    if not chip.results or found.op.rule.spatial or size < chip.vmem_bytes:
        return seconds
    return max(seconds, size / key.value.itemsize / chip.results)


def rate(found: Compute, chip: Chip) -> float:
    """FLOP/s in its operands' dtype, or the nearest that the chip multiplies."""
    known = dict(chip.flops)
    dtype = str(found.operands[0].value.dtype)
    exact = found.op.params.get("precision") not in (None, _DEFAULT, (_DEFAULT, _DEFAULT))
    if chip.family == "tpu" and not exact and dtype == "float32":
        dtype = "bfloat16"  # XLA's default on TPUs: one pass in bfloat16
    return known.get(dtype, known.get("float32", chip.flops[0][1]))


def _filled(found: Compute, mesh: MeshShape, tile: int) -> float:
    """The part of the matrix units that works, with the operand in tiles that fills them better."""
    product = _product(found, mesh)
    if not tile or 0 in product:
        return 1.0
    by_columns = _part(product.columns, tile) * _part(product.rows, _ROWS)
    # A batch that fills half a tile is filled up with places.
    lying = product.rows if 2 * product.batch >= tile else product.batch
    by_rows = _part(lying, tile) * _part(product.columns, _ROWS)
    return _part(product.inner, tile) * max(by_columns, by_rows)


def _part(size: int, unit: int) -> float:
    """Of the units of a size, the part that is not padding."""
    return size / (-(-size // unit) * unit)


def _product(found: Compute, mesh: MeshShape) -> Product:
    """A kernel that slides over its operand is one matrix for each of its elements; with few
    features its elements are folded into them."""
    rule, axes = found.op.rule, found.assignment.axes
    left, right, out = (
        {name for names in dims for name in names}
        for dims in (rule.operands[0], rule.operands[1], rule.results[0])
    )

    def size(names: set[str]) -> int:
        return prod(
            -(-factor.size // axes_size(mesh, axes.get(name, ())))
            for name, factor in rule.factors.items()
            if name in names and factor.kind is not Kind.FIXED
        )

    rows, columns = left & out - right, right & out - left
    inner = size(left & right - out)
    if rule.spatial and inner <= _FOLDED:
        fixed = [f for name, f in rule.factors.items() if f.kind is Kind.FIXED and name in right]
        inner *= prod(factor.size for factor in fixed)
    return Product(size(rows), size(rows - rule.spatial), inner, size(columns))
