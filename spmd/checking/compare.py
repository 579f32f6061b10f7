"""When two arrays count as the same: exactly for integers, within rounding for floats."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

# Of the size of a number: some units in the last place, since sums over shards are reordered.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}

Tolerance = float | Mapping[str, float] | None


def tolerance_of(dtype: Any, given: Tolerance = None) -> float:
    """The relative error that counts as rounding; 0 for what is no float."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return 0.0
    real = jnp.finfo(dtype).dtype.name
    if isinstance(given, Mapping):
        given = {jnp.dtype(k).name: v for k, v in given.items()}.get(real)
    if given is not None:
        return float(given)
    return TOLERANCE.get(real, 4 * float(jnp.finfo(dtype).eps))


class Difference(NamedTuple):
    """Where two arrays differ in their bits.

    Attributes:
      error: largest difference relative to the largest element; inf where one is not finite.
      wrong: number of elements that differ by more than rounding.
      total: number of elements.
      at: index of the one that differs most.
      got, want: its values.
    """

    error: float
    wrong: int
    total: int
    at: tuple[int, ...]
    got: Any
    want: Any


def difference(
    got: np.ndarray, want: np.ndarray, tolerance: float, inside: Any = None, size: Any = None
) -> Difference | None:
    """How `got` differs from `want`; None where it is the same, NaN being equal to NaN.

    Args:
      inside: bool, which elements count; by default all.
      size: per element what rounding is relative to, or one number; by default its own size.
        Integers must be equal, unless it is infinite.
    """
    inside = np.ones(want.shape, bool) if inside is None else inside
    if not jnp.issubdtype(want.dtype, jnp.inexact):
        off = (got != want) & inside
        if not off.any():
            return None
        error = np.where(off, np.abs(got.astype(np.float64) - want.astype(np.float64)), 0)
        wrong = off if size is None or not np.isinf(size).all() else np.zeros_like(off)
        return _found(error, off, wrong, inside, got, want)
    a, b = _wide(got), _wide(want)
    with np.errstate(invalid="ignore", over="ignore"):
        off = ~((a == b) | (np.isnan(a) & np.isnan(b))) & inside
        if not off.any():
            return None
        finite = np.isfinite(a) & np.isfinite(b)
        error = np.where(off, np.where(finite, np.abs(a - b), np.inf), 0)
        bound = tolerance * (magnitude(want) if size is None else size)
    bound = bound + float(jnp.finfo(want.dtype).tiny)  # what is smaller may be flushed to zero
    return _found(error, off, off & ~(error <= bound), inside, got, want)


def magnitude(x: np.ndarray) -> np.ndarray:
    """Absolute values in float64; what is not finite, and what is no number, counts as 0."""
    with np.errstate(invalid="ignore", over="ignore"):
        wide = np.abs(_wide(x))
    return np.where(np.isfinite(wide), wide, 0)


def largest(x: np.ndarray) -> float:
    """The largest finite magnitude."""
    return float(magnitude(x).max(initial=0))


def _wide(x: np.ndarray) -> np.ndarray:
    complex_ = jnp.issubdtype(x.dtype, jnp.complexfloating)
    return x.astype(np.complex128 if complex_ else np.float64)


def _found(
    error: np.ndarray, off: np.ndarray, wrong: np.ndarray, inside: np.ndarray,
    got: np.ndarray, want: np.ndarray,
) -> Difference:  # fmt: skip
    chosen = wrong if wrong.any() else off
    at = np.unravel_index(np.argmax(np.where(chosen, error, -1)), error.shape)
    at = tuple(int(i) for i in at)
    scale = largest(np.where(inside, want, np.zeros((), want.dtype))) or 1.0
    worst = float(error[at])
    return Difference(
        worst / scale, int(wrong.sum()), int(inside.sum()), at, got[at][()], want[at][()]
    )
