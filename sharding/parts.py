"""Parts of arrays at places that a device knows when it runs, in as few equations as that takes.

`jax.numpy` does all of this; but in a program of a thousand exchanges its checks of negative
places, and its conversions of constants, are more equations than the exchanges.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from sharding._jax import primitives as p


def pick(table: Sequence[int], index: Any) -> Any:
    """The entry of `table` at a traced index: int32, no lookup where the entries form a line."""
    steps = {b - a for a, b in zip(table, table[1:], strict=False)} or {0}
    if len(steps) == 1:
        (step,) = steps
        return plus(times(index, step), table[0]) if step else np.int32(table[0])
    return lax.squeeze(cut(np.asarray(table, np.int32), index, 1, 0), (0,))


def times(index: Any, n: int) -> Any:
    """`index * n` in int32."""
    if not isinstance(index, Tracer):
        return np.int32(index * n)
    return index if n == 1 else lax.mul(index, np.int32(n))


def plus(index: Any, n: int) -> Any:
    """`index + n` in int32."""
    if not isinstance(index, Tracer):
        return np.int32(index + n)
    return index if n == 0 else lax.add(index, np.int32(n))


def cut(x: Any, start: Any, size: int, dim: int) -> Any:
    """`size` elements of a dim from `start` on, an int32; within the dim, as XLA bounds it."""
    starts = [start if d == dim else np.int32(0) for d in range(x.ndim)]
    sizes = tuple(size if d == dim else n for d, n in enumerate(x.shape))
    return p.dynamic_slice_p.bind(x, *starts, slice_sizes=sizes)


def written(x: Any, part: Any, start: Any, dim: int) -> Any:
    """`x` with `part` in place of its elements from `start` on, as in `cut`."""
    starts = [start if d == dim else np.int32(0) for d in range(x.ndim)]
    return p.dynamic_update_slice_p.bind(x, part, *starts)


def fixed(value: Any, dtype: Any) -> Any:
    """A scalar of this dtype; no equation where the value is known while tracing."""
    if isinstance(value, Tracer):
        return jnp.asarray(value, dtype)
    return np.asarray(value, dtype)


def where(mask: Any, x: Any, fill: Any) -> Any:
    """`x`, and the scalar `fill` where `mask`, of its shape, is not set."""
    return lax.select(mask, x, lax.broadcast(fixed(fill, x.dtype), x.shape))
