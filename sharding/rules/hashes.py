"""Generators whose values are hashes of a key and a count, and the arithmetic they are made of.

XLA cannot compile the high half of a product in a program for several devices, so that it is worked
out here from smaller products, and what is made of it too.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sharding import _jax
from sharding.rule import Local, OpInfo, Rule, pointwise_rule, register

p = _jax.primitives


def multiply_high(a: Any, b: Any) -> Any:
    """The high half of the product of integers, from four products of their halves."""
    bits = jnp.iinfo(a.dtype).bits
    if jnp.issubdtype(a.dtype, jnp.signedinteger):
        unsigned = jnp.dtype(f"uint{bits}")
        high = multiply_high(a.astype(unsigned), b.astype(unsigned)).astype(a.dtype)
        zero = jnp.zeros((), a.dtype)
        return high - jnp.where(a < 0, b, zero) - jnp.where(b < 0, a, zero)
    half = jnp.asarray(bits // 2, a.dtype)
    mask = jnp.asarray((1 << bits // 2) - 1, a.dtype)
    (a_low, a_high), (b_low, b_high) = ((x & mask, x >> half) for x in (a, b))
    middle = a_high * b_low + (a_low * b_low >> half)
    other = a_low * b_high + (middle & mask)
    return a_high * b_high + (middle >> half) + (other >> half)


# Philox (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011)

_ROUNDS = 10
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MULTIPLIERS = {2: (0xD256D193,), 4: (0xD2511F53, 0xCD9E8D57)}


def _philox(key: Sequence[Any], counts: Sequence[Any]) -> list[Any]:
    """Philox of 2 or 4 words; keys have half as many."""
    words = list(counts)
    by = [np.uint32(m) for m in _MULTIPLIERS[len(words)]]
    for number in range(_ROUNDS):
        keys = [k + np.uint32(_WEYL[i] * number & 0xFFFFFFFF) for i, k in enumerate(key)]
        low = [x * m for x, m in zip(words[::2], by, strict=True)]
        high = [multiply_high(x, m) for x, m in zip(words[::2], by, strict=True)]
        # Each pair gets the product of the other.
        mixed = [h ^ x ^ k for h, x, k in zip(high[::-1], words[1::2], keys, strict=True)]
        words = [w for pair in zip(mixed, low[::-1], strict=True) for w in pair]
    return words


def _elementwise(local: Callable[..., Sequence[Any]] | None = None) -> Callable[[OpInfo], Rule]:
    def rule(op: OpInfo) -> Rule:
        """Pointwise."""
        found = pointwise_rule([a.shape for a in op.in_avals], [a.shape for a in op.out_avals])
        return found if local is None else replace(found, local=local, always=True)

    return rule


def _local_mulhi(ctx: Local, op: OpInfo, a: Any, b: Any) -> Sequence[Any]:
    return [multiply_high(a, b)]


def _local_philox(ctx: Local, op: OpInfo, *words: Any) -> Sequence[Any]:
    keys = len(words) // 3
    same = jnp.broadcast_arrays(*words)
    return _philox(same[:keys], same[keys:])


register(_jax.mulhi_p)(_elementwise(_local_mulhi))
register(_jax.philox2x32_p, _jax.philox4x32_p)(_elementwise(_local_philox))
register(p.threefry2x32_p, _jax.threefry4x32_p)(_elementwise())


# Random keys


class Hash(NamedTuple):
    """How an implementation makes bits and keys of a key and a count (of 64 bits, as two halves).

    Attributes:
      words: (key words, high, low) -> words, of which the exclusive or is the bits.
      wide: words -> the halves of 64 bits.
      key: (key words, high, low) -> words of a new key.
      legacy: without `threefry_partitionable`, values are hashes of the whole shape.
      replaced: JAX's own lowering does not compile for several devices, see above.
    """

    words: Callable[[Sequence[Any], Any, Any], Sequence[Any]]
    wide: Callable[[Sequence[Any]], tuple[Any, Any]]
    key: Callable[[Sequence[Any], Any, Any], Sequence[Any]]
    legacy: bool = False
    replaced: bool = False


def _threefry2x32(key: Sequence[Any], high: Any, low: Any) -> Sequence[Any]:
    return p.threefry2x32_p.bind(*key, high, low)


def _threefry4x32(key: Sequence[Any], counts: Sequence[Any]) -> Sequence[Any]:
    return _jax.threefry4x32_p.bind(*key, *counts)


def _zeros(counts: Any) -> tuple[Any, Any]:
    zero = jnp.zeros_like(counts)
    return zero, zero


# Implementations by name; those that are not here have a sequential generator.
HASHES = {
    "threefry2x32": Hash(_threefry2x32, lambda w: (w[0], w[1]), _threefry2x32, legacy=True),
    "threefry4x32": Hash(
        lambda k, high, low: _threefry4x32(k, (high, low, *_zeros(low))),
        lambda w: (w[0] ^ w[2], w[1] ^ w[3]),
        lambda k, high, low: _threefry4x32(k, (*_zeros(low), high, low)),
    ),
    "philox4x32": Hash(
        lambda k, high, low: _philox(k, (high, low, *_zeros(low))),
        lambda w: (w[0], w[1]),
        lambda k, high, low: _philox(k, (*_zeros(low), high, low))[:2],
        replaced=True,
    ),
    "philox2x32": Hash(
        lambda k, high, low: _philox(k, (high, low)),
        lambda w: (w[0], w[1]),
        lambda k, high, low: _philox(k, (high, low))[:1],
        replaced=True,
    ),
}
