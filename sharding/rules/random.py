"""Random numbers: values are a function of key and global index, never of the mesh."""

from collections.abc import Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sharding import _jax
from sharding.rule import (
    Factor,
    Kind,
    Local,
    OpInfo,
    Rule,
    names,
    pointwise_rule,
    register,
    replicated_rule,
)

p = _jax.primitives

# Implementations whose values under vmap depend on the whole batch of keys.
_BATCH_DEPENDENT = ("rbg", "unsafe_rbg")


@register(p.random_seed_p, p.random_fold_in_p, _jax.random_clone_p)
def _per_key(op: OpInfo) -> Rule:
    """Every key is made on its own; no communication."""
    if _impl(op).name in _BATCH_DEPENDENT and op.primitive is p.random_fold_in_p:
        return replicated_rule(op)
    return pointwise_rule([a.shape for a in op.in_avals], [a.shape for a in op.out_avals])


@register(_jax.random_wrap_p)
def _wrap(op: OpInfo) -> Rule:
    """Key dims pass; the trailing dims that hold one key's data are gathered."""
    keys, data = _key_and_data(op.in_avals[0].shape, len(op.out_avals[0].shape))
    return Rule((keys[0] + data[0],), (keys[0],), keys[1] | data[1], early=True)


@register(_jax.random_unwrap_p)
def _unwrap(op: OpInfo) -> Rule:
    """Key dims pass; the trailing dims that hold one key's data are made whole."""
    keys, data = _key_and_data(op.out_avals[0].shape, len(op.in_avals[0].shape))
    return Rule((keys[0],), (keys[0] + data[0],), keys[1] | data[1], early=True)


def _key_and_data(shape: tuple[int, ...], rank: int) -> Any:
    """(dims, factors) of the keys, and of one key's data, for the shape of both."""
    keys, data = shape[:rank], shape[rank:]
    left = {f"k{i}": Factor(n) for i, n in enumerate(keys)}
    right = {f"e{i}": Factor(n, Kind.FIXED) for i, n in enumerate(data)}
    return (tuple((f,) for f in left), left), (tuple((f,) for f in right), right)


@register(p.random_bits_p)
def _random_bits(op: OpInfo) -> Rule:
    """Every shard makes the bits of its own block of global indices; no communication."""
    return _counted(op, _local_bits)


@register(p.random_split_p)
def _random_split(op: OpInfo) -> Rule:
    """As random_bits: a new key is a hash of the old one and the new one's global index."""
    return _counted(op, _local_split)


def _counted(op: OpInfo, local: Any) -> Rule:
    """Keys pass, and so do the new dims where values are hashes of their global index."""
    impl = _impl(op)
    if impl.name in _BATCH_DEPENDENT:
        return replicated_rule(op)
    shape = op.in_avals[0].shape
    keys, new = names("k", len(shape)), names("d", len(op.params["shape"]))
    counted = impl.name == "threefry2x32" and _partitionable(op)
    kind = Kind.PASS if counted else Kind.FIXED
    factors = {k: Factor(n) for k, n in zip(keys, shape, strict=True)}
    factors |= {d: Factor(n, kind) for d, n in zip(new, op.params["shape"], strict=True)}
    return Rule(
        (tuple((k,) for k in keys),), (tuple((f,) for f in (*keys, *new)),), factors,
        local=local, local_when=frozenset(new),
    )  # fmt: skip


def _local_bits(ctx: Local, op: OpInfo, keys: Any) -> Sequence[Any]:
    dtype = op.out_avals[0].dtype
    high, low = _local_hashes(ctx, op, keys)
    if op.params["bit_width"] == 64:
        return [lax.shift_left(high.astype(dtype), jnp.asarray(32, dtype)) | low.astype(dtype)]
    return [(high ^ low).astype(dtype)]


def _local_split(ctx: Local, op: OpInfo, keys: Any) -> Sequence[Any]:
    data = jnp.stack(_local_hashes(ctx, op, keys), axis=-1)
    return [_jax.random_wrap_p.bind(data, impl=_impl(op))]


def _local_hashes(ctx: Local, op: OpInfo, keys: Any) -> tuple[Any, Any]:
    """Threefry of every local key and the local block of counts, as two halves."""
    shape, rank = op.params["shape"], len(op.in_avals[0].shape)
    offsets = [ctx.offset(f"d{i}") for i in range(len(shape))]
    counts = local_counts(shape, ctx.local_out(0)[rank:], offsets)

    def one(key: Any) -> tuple[Any, Any]:
        return tuple(p.threefry2x32_p.bind(key[0], key[1], *counts))

    for _ in range(rank):
        one = jax.vmap(one)
    return one(_jax.random_unwrap_p.bind(keys))


def local_counts(
    shape: Sequence[int], local: Sequence[int], offsets: Sequence[Any]
) -> tuple[Any, Any]:
    """High and low 32 bits of the row-major global index of every element of a local block.

    Without 64-bit types, which JAX may have disabled.

    Args:
      shape: of the whole array, without padding.
      local: shape of the block.
      offsets: traced; the block's first index per dim.
    """
    high = low = jnp.zeros(tuple(local), jnp.uint32)
    wide = prod(shape) > 1 << 32
    for d, offset in enumerate(offsets):
        stride = prod(shape[d + 1 :])
        at = lax.broadcasted_iota(jnp.uint32, tuple(local), d)
        at = at + jnp.asarray(offset).astype(jnp.uint32)
        stride_low, stride_high = np.uint32(stride & 0xFFFFFFFF), np.uint32(stride >> 32)
        term = at * stride_low
        low = low + term
        if wide:
            carry = (low < term).astype(jnp.uint32)
            high = high + lax.mulhi(at, jnp.full_like(at, stride_low)) + at * stride_high + carry
    return high, low


@register(p.random_gamma_p)
def _random_gamma(op: OpInfo) -> Rule:
    """Key dims pass; further dims of the samples share a key, are split off it in order, and are
    gathered."""
    keys, shape = op.in_avals[0].shape, op.in_avals[1].shape
    dims = names("d", len(shape))
    factors = {
        d: Factor(n, Kind.PASS if i < len(keys) else Kind.FIXED)
        for i, (d, n) in enumerate(zip(dims, shape, strict=True))
    }
    sample = tuple((d,) for d in dims)
    return Rule((sample[: len(keys)], sample), (sample,), factors, local=_local_gamma)


def _local_gamma(ctx: Local, op: OpInfo, keys: Any, a: Any) -> Sequence[Any]:
    # Sampling rejects in a loop, whose end is not promised for the garbage in padding.
    for d in range(len(op.in_avals[0].shape)):
        a = ctx.mask(a, 1, f"d{d}", 1)
    return ctx.bind(keys, a)


@register(p.rng_bit_generator_p)
def _rng_bit_generator(op: OpInfo) -> Rule:
    """One sequential state: every device makes all bits. `rng_uniform` has no rule at all: its
    hidden state would differ between devices."""
    return replicated_rule(op)


def _impl(op: OpInfo) -> Any:
    """The random implementation of an equation's keys."""
    keys = op.out_avals[0] if op.primitive is p.random_seed_p else op.in_avals[0]
    return _jax.key_impl(keys.dtype)


def _partitionable(op: Any) -> bool:
    """Whether the equation was traced with threefry's counts by global index."""
    return op.eqn.ctx.threefry_partitionable
