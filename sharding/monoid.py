"""Identities of the monoids that reduce: what padding holds where it must not matter."""

from typing import Any

import jax.numpy as jnp
import numpy as np

# What stands for a monoid where one device along an axis has the value and others anything.
_AT = "at "


def at(place: int) -> str:
    """The value is that of the device at `place` along the axis, whatever others hold."""
    return f"{_AT}{place}"


def owner(monoid: str) -> int | None:
    """Where along the axis the value is, if one device has it; None for monoids that reduce."""
    return int(monoid.removeprefix(_AT)) if monoid.startswith(_AT) else None


def identity(monoid: str, dtype: Any) -> Any:
    """The element that a monoid ignores, as a scalar of `dtype`.

    add, mul, and (bitwise), or, xor; max and min, which order complex numbers by their real part
    first and have no identity among NaNs.
    """
    dtype = jnp.dtype(dtype)
    if monoid in ("max", "min"):
        return _extreme(dtype, monoid == "max")
    neutral = {"mul": 1, "and": -1}.get(monoid, 0)  # -1 has all bits set
    return np.asarray(neutral).astype(dtype)[()]


def _extreme(dtype: Any, lowest: bool) -> Any:
    """The lowest or the highest value of a dtype."""
    if dtype == jnp.bool_:
        return np.bool_(not lowest)
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        return np.asarray(info.min if lowest else info.max).astype(dtype)[()]
    infinite = -np.inf if lowest else np.inf
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.asarray(complex(infinite, infinite)).astype(dtype)[()]
    found = np.asarray(infinite).astype(dtype)[()]
    if np.isinf(found):
        return found
    info = jnp.finfo(dtype)  # a narrow type without infinities
    return info.min if lowest else info.max
