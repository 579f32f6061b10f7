"""Rules of indexing, sorting, cumulation, random numbers and data flow.

Every factor is sharded in turn, over one axis or two, evenly and not (see `rule_harness`).
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import sharding.rules.data_flow  # noqa: F401 (registers its rules)
from sharding.rules.random import local_counts
from tests.e2e.rule_harness import check_rules

CASES: dict[str, tuple[Callable, tuple, str, bool]] = {}


def case(name: str, fun: Callable, *args: Any, names: str, exact: bool = True) -> None:
    assert name not in CASES
    CASES[name] = (fun, args, names, exact)


@functools.cache
def arr(*shape: int, dtype: str = "float32") -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(repr(shape).encode()))
    if dtype == "bool":
        return rng.random(shape) < 0.5
    # Small integers: sums are exact in any order.
    low = 0 if dtype.startswith("u") else -9
    return rng.integers(low, 10, shape).astype(dtype)


def ids(*shape: int, n: int, dtype: str = "int32", low: int = -4, high: int = 4) -> np.ndarray:
    """Indices from `low` to n + `high`: some out of bounds, some negative."""
    return np.random.default_rng(n).integers(low, n + high, shape).astype(dtype)


MODES = ("clip", "fill", "promise_in_bounds")
UNWRAPPED = {"wrap_negative_indices": False}



def _rows(t: Any, i: Any, mode: str) -> Any:
    """Rows of `t`, with the indices as they are: jax.numpy would convert them to int32 first."""
    numbers = lax.GatherDimensionNumbers((1,), (0,), (0,))
    return lax.gather(t, i[:, None], numbers, (1, t.shape[1]), mode=mode)


def _add_rows(t: Any, i: Any, u: Any, mode: str) -> Any:
    numbers = lax.ScatterDimensionNumbers((1,), (0,), (0,))
    return lax.scatter_add(t, i[:, None], u, numbers, mode=mode)


# gather
for mode in MODES:
    for n in (8, 7, 2) if mode == "fill" else (7,):
        case(
            f"embedding-{mode}-{n}",
            lambda t, i, mode=mode: t.at[i].get(mode=mode, **UNWRAPPED),
            arr(n, 6), ids(5, 3, n=n), names="gather",
        )  # fmt: skip
    case(
        f"gather-int-{mode}",
        lambda t, i, mode=mode: t.at[i].get(mode=mode, **UNWRAPPED),
        arr(7, dtype="int8"), ids(6, n=7, dtype="int8"), names="gather",
    )  # fmt: skip
    case(
        f"gather-bool-{mode}",
        lambda t, i, mode=mode: t.at[i].get(mode=mode, **UNWRAPPED),
        arr(6, 3, dtype="bool"), ids(5, n=6), names="gather",
    )  # fmt: skip
    case(
        f"gather-two-indexed-{mode}",
        lambda t, i, j, mode=mode: t.at[i, :, j].get(mode=mode, **UNWRAPPED),
        arr(7, 3, 6), ids(5, n=7), ids(5, n=6), names="gather",
    )  # fmt: skip
    case(f"gather-unsigned-{mode}", lambda t, i, mode=mode: _rows(t, i, mode), arr(7, 3),
         np.array([0, 6, 7, 3, 4_000_000_000, 2**31], np.uint32), names="gather")  # fmt: skip
    case(
        f"gather-batched-{mode}",
        lambda t, i, mode=mode: jax.vmap(lambda a, b: a.at[b].get(mode=mode, **UNWRAPPED))(t, i),
        arr(5, 7, 3), ids(5, 6, n=7), names="gather",
    )  # fmt: skip
case(
    "gather-fill-0",
    lambda t, i: t.at[i].get(mode="fill", fill_value=0, **UNWRAPPED),
    arr(7, 6), ids(5, 3, n=7), names="gather",
)  # fmt: skip
case(
    "gather-fill-5",
    lambda t, i: t.at[i].get(mode="fill", fill_value=5, **UNWRAPPED),
    arr(7, 6), ids(5, 3, n=7), names="gather",
)  # fmt: skip
case(
    "gather-windows",  # indexed dims: of size 1 and kept, partly sliced, whole
    lambda t, i: lax.gather(
        t, i, lax.GatherDimensionNumbers((1, 2, 3), (), (0, 1, 2)), (1, 3, 5), mode="fill"
    ),
    arr(7, 6, 5), ids(4, 3, n=3, low=-1, high=2) * np.array([1, 1, 0]), names="gather",
)  # fmt: skip
case(
    "gather-windows-clip",
    lambda t, i: lax.gather(
        t, i, lax.GatherDimensionNumbers((0, 3), (0,), (1, 0)), (1, 3, 5), mode="clip"
    ),
    arr(7, 6, 5), ids(4, 3, 2, n=7), names="gather",
)  # fmt: skip
case("take-along-axis", lambda t, i: jnp.take_along_axis(t, i, 1), arr(5, 7), ids(5, 6, n=7),
     names="gather")  # fmt: skip
case("take-wide", lambda t, i: jnp.take(t, i, axis=1, mode="clip"), arr(5, 300),
     ids(6, n=200, dtype="uint8", low=0, high=55), names="gather")  # fmt: skip
case("index-keys", lambda k, i: jax.random.wrap_key_data(k)[i], arr(6, 2, dtype="uint32"),
     ids(5, n=6, low=0, high=0), names="gather random_wrap")  # fmt: skip

# scatter
METHODS = ("set", "add", "subtract", "mul", "min", "max")
NAMES = {"set": "scatter", "add": "scatter-add", "subtract": "scatter-sub", "mul": "scatter-mul",
         "min": "scatter-min", "max": "scatter-max"}  # fmt: skip


def _update(method: str, mode: str) -> Callable:
    return lambda t, i, u: getattr(t.at[i], method)(u, mode=mode, **UNWRAPPED)


for method in METHODS:
    name = NAMES[method]
    for mode in MODES:
        # Distinct places for `set`: which of two updates wins is not defined.
        where = np.array([3, -1, 6, 7, 0, 9]) if method == "set" else ids(6, n=7)
        if method == "set" and mode == "clip":
            where = np.array([3, -1, 5, 9, 1, 2])
        case(f"{method}-rows-{mode}", _update(method, mode), arr(7, 5), where, arr(6, 5),
             names=name)  # fmt: skip
    if method in ("subtract", "min"):
        continue  # their code is that of add and max
    case(f"{method}-int", _update(method, "drop"), arr(8, 3, dtype="int32"),
         np.array([[1, 9], [-7, 4], [0, 7]]), arr(3, 2, 3, dtype="int32"), names=name)  # fmt: skip
    case(
        f"{method}-batched",
        lambda t, i, u, method=method: jax.vmap(_update(method, "drop"))(t, i, u),
        arr(5, 7, 2), np.argsort(arr(5, 9), 1)[:, :6] - 1, arr(5, 6, 2), names=name,
    )  # fmt: skip
    case(
        f"{method}-two-indexed",
        lambda t, i, j, u, method=method: getattr(t.at[i, :, j], method)(u, mode="drop"),
        arr(7, 3, 6), np.array([0, 6, 2, 8, 3]), np.array([5, 0, 6, 1, 3]), arr(5, 3), names=name,
    )  # fmt: skip
case(
    "scatter-windows",
    lambda t, i, u: lax.scatter_add(
        t, i, u, lax.ScatterDimensionNumbers((1, 2), (0,), (0, 1)), mode="clip"
    ),
    arr(7, 6, 5), ids(4, 2, n=6), arr(4, 3, 5), names="scatter-add",
)  # fmt: skip
case(
    "scatter-size-1-window",
    lambda t, i, u: lax.scatter(
        t, i, u, lax.ScatterDimensionNumbers((1, 2), (), (0,)), mode="fill"
    ),
    arr(7, 6), np.array([[6], [-1], [2], [7]]), arr(4, 1, 6), names="scatter",
)  # fmt: skip
for mode in MODES:
    case(f"scatter-unsigned-{mode}", lambda t, i, u, mode=mode: _add_rows(t, i, u, mode),
         arr(7, 3), np.array([0, 6, 7, 3, 4_000_000_000], np.uint32), arr(5, 3),
         names="scatter-add")  # fmt: skip
case(
    "scatter-bool",
    lambda t, i, u: t.at[i].max(u), arr(7, dtype="bool"), ids(5, n=7), arr(5, dtype="bool"),
    names="scatter-max",
)  # fmt: skip
case(
    "scatter-apply", lambda t, i: t.at[i].apply(lambda v: v * v + 1), arr(7, 3),
    np.array([0, 3, 6]), names="scatter",
)  # fmt: skip
case("segment-sum", lambda v, s: jax.ops.segment_sum(v, s, 6), arr(9, 4), ids(9, n=6),
     names="scatter-add")  # fmt: skip

# dynamic_slice and dynamic_update_slice
for start in (-2, 3, 20):
    for size in (1, 3, 6):
        case(
            f"dynamic-slice-{start}-{size}",
            lambda t, s, size=size: lax.dynamic_slice(t, (s, jnp.int32(0), s), (size, 5, 6)),
            arr(7, 5, 6), np.int32(start), names="dynamic_slice",
        )  # fmt: skip
        case(
            f"dynamic-update-{start}-{size}",
            lambda t, u, s: lax.dynamic_update_slice(t, u, (s, jnp.int32(0), s)),
            arr(7, 5, 6), arr(size, 5, 2), np.int32(start), names="dynamic_update_slice",
        )  # fmt: skip
case("dynamic-slice-bool", lambda t, s: lax.dynamic_slice(t, (s,), (3,)), arr(7, dtype="bool"),
     np.uint8(4), names="dynamic_slice")  # fmt: skip
case("dynamic-update-int8", lambda t, u, s: lax.dynamic_update_slice(t, u, (s,)),
     arr(200, dtype="int8"), arr(5, dtype="int8"), np.uint8(250),
     names="dynamic_update_slice")  # fmt: skip


def _index_keys(data: Any, s: Any) -> Any:
    keys = jax.random.wrap_key_data(data)
    return lax.dynamic_update_slice(keys, lax.dynamic_slice(keys, (s,), (2,)), (s + 1,))


case("dynamic-keys", _index_keys, arr(7, 2, dtype="uint32"), np.int32(3),
     names="dynamic_slice dynamic_update_slice")  # fmt: skip

# sorting
case("sort", lambda a, b, c: lax.sort((a, b, c), dimension=1, num_keys=2), arr(5, 6, 3),
     arr(5, 6, 3, dtype="int32"), np.arange(90, dtype=np.int32).reshape(5, 6, 3),
     names="sort")  # fmt: skip
TIES = np.where(arr(5, 30) > 7, np.nan, np.where(arr(5, 30) < -6, -np.inf, arr(5, 30)))
for k in (1, 3, 9):
    case(f"top-k-{k}", lambda t, k=k: lax.top_k(t, k), arr(5, 30), names="top_k")
    case(f"top-k-nan-{k}", lambda t, k=k: lax.top_k(t, k), TIES.astype("float32"), names="top_k")
case("top-k-axis", lambda t: lax.top_k(t, 2, axis=0), arr(30, 3, dtype="int32"), names="top_k")
case("top-k-lowest", lambda t: lax.top_k(t, 2), np.full((3, 30), -(2**31), np.int32), names="top_k")
case("top-k-minus-inf", lambda t: lax.top_k(t, 2), np.full(30, -np.inf, np.float32), names="top_k")
case("approx-max-k", lambda t: lax.approx_max_k(t, 3), arr(5, 30), names="approx_top_k")

# cumulative
for fun in (lax.cumsum, lax.cumprod, lax.cummax, lax.cummin, lax.cumlogsumexp):
    for reverse in (False, True):
        for n in (8, 7) if fun is lax.cumsum else (5,):
            name = fun.__name__
            x = arr(3, n, 2) if name != "cumprod" else 1 + arr(3, n, 2) / 20
            case(
                f"{name}-{n}-{reverse}",
                lambda x, fun=fun, reverse=reverse: fun(x, axis=1, reverse=reverse),
                x.astype("float32"), names=name, exact=name in ("cummax", "cummin"),
            )  # fmt: skip
case("cumsum-int8", lambda x: lax.cumsum(x, reverse=True), arr(27, dtype="int8"), names="cumsum")
case("cummax-int", lambda x: lax.cummax(x), arr(13, dtype="int32"), names="cummax")

# random
KEY = np.array([3, 7], np.uint32)


def _bits(data: Any, dtype: Any, shape: tuple) -> Any:
    return jax.random.bits(jax.random.wrap_key_data(data), shape, dtype)


for width in (8, 16, 32):
    case(f"bits-{width}", lambda k, width=width: _bits(k, f"uint{width}", (5, 7, 3)), KEY,
         names="random_bits")  # fmt: skip
case("bits-batched", lambda k: jax.vmap(jax.vmap(lambda k: _bits(k, "uint32", (6,))))(k),
     arr(5, 3, 2, dtype="uint32"), names="random_bits random_wrap")  # fmt: skip
case("bits-scalar", lambda k: jax.vmap(lambda k: _bits(k, "uint32", ()))(k),
     arr(5, 2, dtype="uint32"), names="random_bits")  # fmt: skip


def _keys(data: Any) -> Any:
    keys = jax.vmap(jax.random.wrap_key_data)(data)
    more = jax.vmap(lambda k: jax.random.split(k, (3, 6)))(keys)
    folded = jax.vmap(jax.random.fold_in)(keys, jnp.arange(len(data)))
    return jax.random.key_data(more), jax.random.clone(folded)


case("keys", _keys, arr(5, 2, dtype="uint32"),
     names="random_split random_fold_in random_wrap random_unwrap random_clone")  # fmt: skip
case("seed", jax.vmap(jax.random.key), arr(7, dtype="int32"), names="random_seed")
case(
    "gamma",
    lambda k, a: jax.vmap(lambda k, a: jax.random.gamma(jax.random.wrap_key_data(k), a))(k, a),
    arr(5, 2, dtype="uint32"), np.abs(arr(5, 3)) + 0.5, names="random_gamma", exact=False,
)  # fmt: skip
case(
    "rbg", lambda k: jax.random.bits(jax.random.wrap_key_data(k, impl="rbg"), (5, 6)),
    arr(4, dtype="uint32"), names="random_bits",
)  # fmt: skip

# data flow
case("barrier", lambda x, y: lax.optimization_barrier((x, y)), arr(5, 3), arr(7),
     names="optimization_barrier")  # fmt: skip
case("device-put", lambda x, y: jax.device_put((x * 2, y)), arr(5, 3), arr(7), names="device_put")


@pytest.mark.parametrize("name", CASES)
def test_rule_agrees_with_the_whole_primitive(name: str) -> None:
    fun, args, names, exact = CASES[name]
    check_rules(fun, *args, names=names, exact=exact)


def test_64_bits() -> None:
    with jax.enable_x64(True):
        check_rules(lambda k: _bits(k, "uint64", (5, 7)), KEY, names="random_bits")
        wide = np.array([0, 6, 7, -1, 3, 2**32 + 1, -(2**40)])
        for mode in MODES:
            check_rules(lambda t, i, m=mode: _rows(t, i, m), arr(7, 2), wide, names="gather")
            check_rules(lambda t, i, u, m=mode: _add_rows(t, i, u, m), arr(7, 2), wide, arr(7, 2),
                  names="scatter-add")  # fmt: skip


def test_without_partitionable_threefry_only_keys_pass() -> None:
    with jax.threefry_partitionable(False):
        keys = arr(5, 2, dtype="uint32")
        check_rules(jax.vmap(lambda k: _bits(k, "uint16", (5,))), keys, names="random_bits")


@pytest.mark.parametrize("shape", [(1 << 20, 1 << 14), (3, 1 << 33), (5, 1 << 30, 7), (6, 5)])
def test_counts_are_64_bit_global_indices(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        local = [min(n, 3) for n in shape]
        offsets = [int(rng.integers(0, n - m + 1)) for n, m in zip(shape, local, strict=True)]
        high, low = local_counts(shape, local, [np.uint32(o & 0xFFFFFFFF) for o in offsets])
        index = np.zeros(local, np.uint64)
        for d, offset in enumerate(offsets):
            along = np.arange(local[d], dtype=np.uint64) + np.uint64(offset)
            stride = np.uint64(np.prod(shape[d + 1 :], dtype=np.uint64))
            index += (along * stride).reshape([-1 if i == d else 1 for i in range(len(shape))])
        got = (np.asarray(high).astype(np.uint64) << np.uint64(32)) | np.asarray(low)
        if max(shape) <= 1 << 32:
            np.testing.assert_array_equal(got, index)
