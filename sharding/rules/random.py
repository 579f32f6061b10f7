"""Random numbers: values are a function of key and global index, never of the mesh."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache, partial, reduce
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import define_prng_impl

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
from sharding.rules.hashes import HASHES, Hash, multiply_high

p = _jax.primitives


def _batch_dependent(op: OpInfo) -> bool:
    """Whether values under vmap depend on the whole batch of keys: there is one generator."""
    name = _impl(op).name
    return name == "unsafe_rbg" or (name == "rbg" and op.primitive is p.random_bits_p)


@register(_jax.random_clone_p)
def _clone(op: OpInfo) -> Rule:
    return _per_key(op)


@register(p.random_seed_p)
def _random_seed(op: OpInfo) -> Rule:
    """Every key is made on its own; no communication."""
    return _per_key(op, _local_seed)


@register(p.random_fold_in_p)
def _random_fold_in(op: OpInfo) -> Rule:
    """Every key is made on its own; no communication."""
    return replicated_rule(op) if _batch_dependent(op) else _per_key(op, _local_fold_in)


def _per_key(op: OpInfo, local: Any = None) -> Rule:
    rule = pointwise_rule([a.shape for a in op.in_avals], [a.shape for a in op.out_avals])
    return dataclasses.replace(rule, local=local, always=True) if _replaced(op) else rule


def _replaced(op: OpInfo) -> bool:
    """Whether `local` functions have to do what the primitive does."""
    name = _impl(op).name
    return name in HASHES and HASHES[name].replaced


def _local_seed(ctx: Local, op: OpInfo, seeds: Any) -> Sequence[Any]:
    """The first words of zero's hash of the seed."""
    impl = _impl(op)
    (words,) = impl.key_shape
    high = lax.shift_right_logical(seeds, jnp.asarray(32, seeds.dtype)).astype(jnp.uint32)
    low = seeds.astype(jnp.uint32)
    found = HASHES[impl.name].words([jnp.zeros_like(low)] * words, high, low)[:words]
    return [_jax.random_wrap_p.bind(jnp.stack(found, axis=-1), impl=impl)]


def _local_fold_in(ctx: Local, op: OpInfo, keys: Any, data: Any) -> Sequence[Any]:
    """The new key of which the count is the data."""
    impl = _impl(op)
    words = _jax.random_unwrap_p.bind(keys)
    *words, low = jnp.broadcast_arrays(*jnp.moveaxis(words, -1, 0), data.astype(jnp.uint32))
    found = HASHES[impl.name].key(words, jnp.zeros_like(low), low)
    return [_jax.random_wrap_p.bind(jnp.stack(found, axis=-1), impl=impl)]


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
    if _batch_dependent(op):
        return replicated_rule(op)
    shape = op.in_avals[0].shape
    keys, new = names("k", len(shape)), names("d", len(op.params["shape"]))
    kind = Kind.PASS if _counts(op) else Kind.FIXED
    factors = {k: Factor(n) for k, n in zip(keys, shape, strict=True)}
    factors |= {d: Factor(n, kind) for d, n in zip(new, op.params["shape"], strict=True)}
    return Rule(
        (tuple((k,) for k in keys),), (tuple((f,) for f in (*keys, *new)),), factors,
        local=local, local_when=frozenset(new), always=_replaced(op),
    )  # fmt: skip


def _counts(op: OpInfo) -> bool:
    """Whether values are hashes of their global index."""
    found = HASHES.get(_impl(op).name)
    return found is not None and (not found.legacy or _partitionable(op))


def _local_bits(ctx: Local, op: OpInfo, keys: Any) -> Sequence[Any]:
    found = HASHES[_impl(op).name]
    words = _hashed(ctx, op, keys, op.params["shape"], found.words)
    return [_bits(found, words, op.params["bit_width"])]


def _bits(found: Hash, words: Sequence[Any], width: int) -> Any:
    dtype = jnp.dtype(f"uint{width}")
    if width == 64:
        high, low = (w.astype(dtype) for w in found.wide(words))
        return lax.shift_left(high, jnp.asarray(32, dtype)) | low
    return reduce(lax.bitwise_xor, words).astype(dtype)


def _local_split(ctx: Local, op: OpInfo, keys: Any) -> Sequence[Any]:
    return [_new_keys(ctx, op, keys, op.params["shape"])]


def _new_keys(ctx: Local, op: OpInfo, keys: Any, shape: Sequence[int]) -> Any:
    """The local block of the keys that every local key is split into."""
    impl = _impl(op)
    words = _hashed(ctx, op, keys, shape, HASHES[impl.name].key)
    return _jax.random_wrap_p.bind(jnp.stack(words, axis=-1), impl=impl)


def _hashed(
    ctx: Local, op: OpInfo, keys: Any, shape: Sequence[int], words: Callable
) -> Sequence[Any]:
    """Words of every local key and the local block of counts; its dims are factors d0, d1 ..."""
    rank = len(op.in_avals[0].shape)
    offsets = [ctx.offset(f"d{i}") for i in range(len(shape))]
    counts = local_counts(shape, ctx.local_out(0)[rank:], offsets)

    def one(key: Any) -> tuple[Any, ...]:
        return tuple(words([key[i] for i in range(key.shape[0])], *counts))

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
            high = high + multiply_high(at, stride_low) + at * stride_high + carry
    return high, low


@register(_jax.iota_2x32_shape_p)
def _iota_2x32_shape(op: OpInfo) -> Rule:
    """Both halves of the global index: made again in any layout."""
    shape = op.params["shape"]
    dims = names("d", len(shape))
    result = tuple((d,) for d in dims)
    return Rule(
        (), (result, result), {d: Factor(n) for d, n in zip(dims, shape, strict=True)},
        local=_local_iota_2x32_shape,
    )  # fmt: skip


def _local_iota_2x32_shape(ctx: Local, op: OpInfo) -> Sequence[Any]:
    shape = op.params["shape"]
    offsets = [ctx.offset(f"d{i}") for i in range(len(shape))]
    return local_counts(shape, ctx.local_out(0), offsets)


@register(p.random_gamma_p)
def _random_gamma(op: OpInfo) -> Rule:
    """Key dims pass. Further dims of the samples share a key, which is split into one per sample:
    they pass where new keys are hashes of their global index, and are gathered otherwise."""
    keys, shape = op.in_avals[0].shape, op.in_avals[1].shape
    if _batch_dependent(op):
        return replicated_rule(op)
    new = names("d", len(shape) - len(keys))
    dims = (*names("k", len(keys)), *new)
    kind = Kind.PASS if _counts(op) else Kind.FIXED
    factors = {
        d: Factor(n, kind if d in new else Kind.PASS) for d, n in zip(dims, shape, strict=True)
    }
    sample = tuple((d,) for d in dims)
    return Rule(
        (sample[: len(keys)], sample), (sample,), factors, local=_local_gamma,
        always=_replaced(op),
    )  # fmt: skip


def _local_gamma(ctx: Local, op: OpInfo, keys: Any, a: Any) -> Sequence[Any]:
    rank = len(op.in_avals[0].shape)
    new = names("d", a.ndim - rank)
    # Sampling rejects in a loop, whose end is not promised for the garbage in padding.
    for factor in (*names("k", rank), *new):
        a = ctx.mask(a, 1, factor, 1)
    if not _replaced(op) and not any(map(ctx.axes, new)):
        return ctx.bind(keys, a)
    keys = _new_keys(ctx, op, keys, op.in_avals[1].shape[rank:])
    if _replaced(op):
        words = _jax.random_unwrap_p.bind(keys)
        keys = jax.random.wrap_key_data(words, impl=_stand_in(_impl(op)))
    one = partial(_jax.gamma_one, log_space=op.params["log_space"])
    return [jax.vmap(one)(keys.reshape(-1), a.reshape(-1)).reshape(a.shape)]


@lru_cache
def _stand_in(impl: Any) -> Any:
    """An implementation with the values of `impl`, made of its hash, for what draws inside."""
    found = HASHES[impl.name]

    def hashed(key: Any, shape: Sequence[int], words: Callable) -> Sequence[Any]:
        return words(list(key), *local_counts(shape, shape, [0] * len(shape)))

    def missing(*_: Any) -> Any:
        raise NotImplementedError

    return define_prng_impl(
        key_shape=impl.key_shape, seed=missing, fold_in=missing, name=impl.name, tag=impl.tag,
        split=lambda key, shape: jnp.stack(hashed(key, shape, found.key), axis=-1),
        random_bits=lambda key, width, shape: _bits(found, hashed(key, shape, found.words), width),
    )  # fmt: skip


@register(p.rng_bit_generator_p)
def _rng_bit_generator(op: OpInfo) -> Rule:
    """One sequential state: every device makes all bits."""
    return replicated_rule(op)


@register(p.rng_uniform_p)
def _rng_uniform(op: OpInfo) -> Rule:
    """The state is hidden, and every device has its own: one device makes the values of all."""
    return dataclasses.replace(
        replicated_rule(op), always=True,
        local=lambda ctx, op, *bounds: ctx.on_first_device(ctx.bind, *bounds),
    )  # fmt: skip


def _impl(op: OpInfo) -> Any:
    """The random implementation of an equation's keys."""
    keys = op.out_avals[0] if op.primitive is p.random_seed_p else op.in_avals[0]
    return _jax.key_impl(keys.dtype)


def _partitionable(op: Any) -> bool:
    """Whether the equation was traced with threefry's counts by global index."""
    return op.eqn.ctx.threefry_partitionable
