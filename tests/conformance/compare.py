"""When a partitioned result counts as that of the unsharded program."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.conformance.harnesses import key_data

# Of the scale of the result: some units in the last place, since sums over shards are reordered.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}


class Looser(NamedTuple):
    """Harnesses whose results legitimately vary more, and why."""

    pattern: str
    factor: float
    reason: str


LOOSER: tuple[Looser, ...] = ()


def tolerance(harness: str, dtype: Any) -> float:
    """Relative error that is accepted for a floating dtype."""
    looser = [row.factor for row in LOOSER if re.search(row.pattern, harness)]
    return TOLERANCE[_real(dtype)] * max(looser, default=1.0)


def _real(dtype: Any) -> str:
    return jnp.finfo(dtype).dtype.name


def mismatch(got: jax.Array, want: np.ndarray, harness: str, pointwise: bool) -> str:
    """What is wrong with a result; empty where nothing is. Every device's copy must be right.

    Args:
      want: of the unsharded program; random keys as integers.
      pointwise: nothing is summed, so each element is compared with its own size instead of the
        largest one.
    """
    got = key_data(got)
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{got.dtype}{list(got.shape)} instead of {want.dtype}{list(want.shape)}"
    scale = None if pointwise else _scale(want)
    seen: dict[str, np.ndarray] = {}
    for piece in got.addressable_shards:
        here, key = np.asarray(piece.data), repr(piece.index)
        if key in seen and seen[key].tobytes() == here.tobytes():
            continue
        seen[key] = here
        wrong = differing(here, want[piece.index], tolerance(harness, want.dtype), scale) if (
            jnp.issubdtype(want.dtype, jnp.inexact)
        ) else here != want[piece.index]  # fmt: skip
        if wrong.any():
            return _text(here, want[piece.index], wrong, piece)
    return ""


def order_ties(results: Sequence[np.ndarray], axis: int) -> list[np.ndarray]:
    """Results of a sort that is not stable, rows of equal keys in an order that is always the same:
    which of them comes first is not defined."""
    order = np.lexsort([_wide(x) for x in reversed(results)], axis)
    return [np.take_along_axis(x, order, axis) for x in results]


def _wide(x: np.ndarray) -> np.ndarray:
    """In a dtype that numpy can sort."""
    return x.astype(np.float64) if x.dtype.kind == "V" else x


def _scale(want: np.ndarray) -> float:
    return float(_size(want).max(initial=0))


def _size(x: np.ndarray) -> np.ndarray:
    """Absolute values; what is not finite counts as 0."""
    parts = [np.real(x), np.imag(x)] if jnp.issubdtype(x.dtype, jnp.complexfloating) else [x]
    finite = [np.where(np.isfinite(p), p, 0).astype(np.float64) for p in parts]
    return np.abs(finite[0]) if len(finite) == 1 else np.hypot(*finite)


def differing(
    got: np.ndarray, want: np.ndarray, relative: float, scale: float | None
) -> np.ndarray:
    """Where `got` is not `want`: NaN and infinities are equal, the rest within the tolerance."""
    tiny = float(jnp.finfo(want.dtype).tiny)  # what is smaller may be flushed to zero
    bound = relative * (_size(want) if scale is None else scale) + tiny
    if jnp.issubdtype(want.dtype, jnp.complexfloating):
        return _outside(np.real(got), np.real(want), bound) | _outside(
            np.imag(got), np.imag(want), bound
        )
    return _outside(got, want, bound)


def _outside(got: np.ndarray, want: np.ndarray, bound: Any) -> np.ndarray:
    a, b = got.astype(np.float64), want.astype(np.float64)
    with np.errstate(invalid="ignore"):
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        near = np.isfinite(a) & np.isfinite(b) & (np.abs(a - b) <= bound)
    return ~(same | near)


def _text(got: np.ndarray, want: np.ndarray, wrong: np.ndarray, piece: Any) -> str:
    at = tuple(int(i) for i in np.argwhere(wrong)[0]) if wrong.ndim else ()
    return (
        f"{int(wrong.sum())} of {wrong.size} elements on device {piece.device.id}: "
        f"{got[at]!r} instead of {want[at]!r} at {list(at)} of {_index(piece.index, want.shape)}"
    )


def _index(index: Any, shape: tuple[int, ...]) -> str:
    parts = [f"{s.start or 0}:{(s.start or 0) + n}" for s, n in zip(index, shape, strict=True)]
    return f"[{', '.join(parts)}]"
