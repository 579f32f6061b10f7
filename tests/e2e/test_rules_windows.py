"""Convolutions and window reductions: rules by brute force, collectives of whole programs."""

import random
import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core.primitives import select_and_gather_add_p, select_and_scatter_p

from sharding.rules.halo import Window
from tests.e2e.rule_harness import check_rules
from tests.oracle import P, check, kinds, make_mesh

CASES: dict[str, tuple[Callable, tuple, str, bool]] = {}


def case(name: str, fun: Callable, *args: Any, names: str, exact: bool = True) -> None:
    assert name not in CASES
    CASES[name] = (fun, args, names, exact)


def arr(*shape: int, dtype: Any = "float32") -> np.ndarray:
    """Small integers: sums are exact in any order, and there are ties."""
    rng = np.random.default_rng(zlib.crc32(repr(shape).encode()))
    return rng.integers(-4, 5, shape).astype(dtype)


def distinct(*shape: int) -> np.ndarray:
    """No ties: which of two equal elements of a window wins depends on its shape in XLA."""
    order = np.random.default_rng(0).permutation(int(np.prod(shape)))
    return order.reshape(shape).astype(np.float32)


def conv(
    name: str, lhs: np.ndarray, rhs: np.ndarray, strides: Any, padding: Any, base: Any = None,
    dilation: Any = None, numbers: Any = None, exact: bool = True, **options: Any,
) -> None:  # fmt: skip
    numbers = numbers and lax.ConvDimensionNumbers(*numbers)

    def fun(x: Any, k: Any) -> Any:
        return lax.conv_general_dilated(
            x, k, strides, padding, base, dilation, numbers, **options
        )

    case(name, fun, lhs, rhs, names="conv_general_dilated", exact=exact)


HALF = "bfloat16"
COMPLEX = arr(1, 4, 7) + 1j * arr(1, 4, 7)[:, ::-1]
conv("same", arr(2, 4, 8, 7), arr(8, 4, 3, 2), (1, 1), "SAME")
conv("strided", arr(1, 1, 17, 3), arr(1, 1, 3, 1), (2, 1), [(1, 2), (0, 0)])
conv("one-element", arr(3, 4, 6), arr(3, 4, 1), (1,), "SAME")
conv("one-element-strided", arr(1, 1, 13), arr(1, 1, 1), (2,), "SAME")
conv("long-kernel", arr(1, 2, 11), arr(3, 2, 9), (1,), [(8, 0)])
conv("atrous", arr(1, 1, 12), arr(2, 1, 3), (1,), [(5, 5)], None, (5,))
conv("cropped", arr(1, 1, 15), arr(1, 1, 3), (1,), [(-2, -3)])
conv("transposed", arr(1, 1, 8, 5), arr(1, 1, 3, 4), (1, 1), [(1, 2), (2, 3)], (2, 3))
conv("transposed-strided", arr(1, 1, 9), arr(1, 1, 2), (2,), [(2, 3)], (3,), (2,))
conv("transposed-sparse", arr(1, 1, 3), arr(1, 1, 1), (1,), [(1, 3)], (4,))
conv("transposed-gaps", arr(1, 1, 4), arr(1, 1, 1), (4,), [(1, 3)], (4,))
conv("from-one-element", arr(2, 1, 1), arr(1, 1, 4), (1,), [(3, 3)])
conv("patches", arr(2, 1, 16), arr(1, 1, 8), (8,), "VALID")
conv("empty", arr(0, 3, 8), arr(4, 3, 3), (1,), "SAME")
conv("empty-space", arr(2, 3, 0), arr(4, 3, 3), (1,), [(4, 4)])
# The kernel is as long as what it slides over: the gradient of a kernel.
conv("kernel-gradient", arr(3, 2, 11), arr(2, 2, 11), (1,), [(1, 1)])
conv("kernel-gradient-strided", arr(1, 1, 15), arr(1, 1, 8), (1,), [(1, 1)], None, (2,))
conv("kernel-gradient-transposed", arr(1, 1, 5), arr(1, 1, 9), (1,), [(1, 2)], (2,))
conv("kernel-gradient-uneven", arr(1, 1, 9), arr(1, 1, 7), (2,), [(2, 1)], (2,))
# Groups
conv("feature-groups", arr(2, 8, 5), arr(12, 2, 3), (1,), "SAME", feature_group_count=4)
conv("depthwise", arr(2, 7, 5), arr(7, 1, 3), (1,), "SAME", feature_group_count=7)
conv("batch-groups", arr(8, 3, 5), arr(8, 3, 3), (1,), "SAME", batch_group_count=4)
# Dim orders and dtypes
conv("order", arr(7, 1, 5, 2), arr(4, 2, 3, 3), (1, 1), "SAME",
     numbers=((1, 3, 0, 2), (2, 1, 0, 3), (3, 0, 2, 1)))  # fmt: skip
conv("three-dims", arr(1, 1, 4, 5, 6), arr(1, 1, 3, 2, 3), (1, 2, 1), "SAME")
conv("complex", COMPLEX.astype("complex64"), arr(1, 4, 3, dtype="complex64"), (1,), "SAME")
conv("half", arr(1, 2, 8, dtype=HALF), arr(1, 2, 3, dtype=HALF), (1,), "SAME",
     preferred_element_type=jnp.float32)  # fmt: skip
conv("int8", arr(1, 2, 8, dtype="int8"), arr(1, 2, 3, dtype="int8"), (1,), "SAME",
     preferred_element_type=jnp.int32)  # fmt: skip


Sliding = tuple[tuple[int, ...], tuple[int, ...], Any, tuple[int, ...], tuple[int, ...]]
PLACES: dict[str, tuple[tuple[int, ...], Sliding]] = {
    "overlapping": ((3, 17), ((1, 3), (1, 2), ((0, 0), (1, 2)), (1, 1), (1, 1))),
    "dilated": ((9, 7), ((3, 2), (1, 2), ((3, 2), (-1, 2)), (2, 3), (2, 1))),
    "cumulative": ((9,), ((9,), (1,), ((8, 0),), (1,), (1,))),
    "all": ((7, 7), ((5, 9), (1, 1), ((-1, -1), (0, 2)), (1, 1), (1, 1))),
}  # fmt: skip


def sum_and_max(x: Any, y: Any) -> Any:
    return lax.add(x[0], y[0]), lax.max(x[1], y[1])


def slide(x: Any, init: Any, function: Callable, how: Sliding) -> Any:
    window, strides, padding, base, dilation = how
    return lax.reduce_window(x, init, function, window, strides, padding, base, dilation)


for where, (shape, how) in PLACES.items():
    case(f"sum-{where}", lambda x, how=how: slide(x, 0.0, lax.add, how), arr(*shape),
         names="reduce_window_sum")  # fmt: skip
    case(f"max-{where}", lambda x, how=how: slide(x, -jnp.inf, lax.max, how), arr(*shape),
         names="reduce_window_max")  # fmt: skip
    if where not in ("overlapping", "dilated"):
        continue
    # What starts from no identity of its function shows where padding is counted in.
    case(f"two-{where}", lambda x, y, how=how: slide((x, y), (1.0, 2.0), sum_and_max, how),
         arr(*shape), arr(*shape)[::-1], names="reduce_window")  # fmt: skip
    case(
        f"gather-{where}",
        lambda x, y, how=how: select_and_gather_add_p.bind(
            x, y, select_prim=lax.le_p, window_dimensions=how[0], window_strides=how[1],
            padding=how[2], base_dilation=how[3], window_dilation=how[4],
        ),
        arr(*shape), distinct(*shape), names="select_and_gather_add",
    )  # fmt: skip
OVERLAPPING = PLACES["overlapping"][1]
case("min-int", lambda x: slide(x, np.int32(2**31 - 1), lax.min, OVERLAPPING),
     arr(3, 17, dtype="int32"), names="reduce_window_min")  # fmt: skip
case("max-bool", lambda x: slide(x, np.False_, lax.max, PLACES["all"][1]), arr(7, 7) > 3,
     names="reduce_window_max")  # fmt: skip
case("no-windows", lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 5), (1, 1), "VALID"),
     arr(4, 3), names="reduce_window_sum")  # fmt: skip


def scatter(name: str, shape: tuple, window: tuple, stride: tuple, padding: Any) -> None:
    """The gradient of a pool, with ties."""
    def pooled(x: Any) -> Any:
        return lax.reduce_window(x, -jnp.inf, lax.max, window, stride, padding)

    def fun(x: Any, ct: Any) -> Any:
        return jax.vjp(pooled, x)[1](ct)

    counts = jax.eval_shape(pooled, jnp.zeros(shape)).shape
    case(f"scatter-{name}", fun, arr(*shape), arr(*counts), names="select_and_scatter_add")


scatter("tiles", (16,), (2,), (2,), [(0, 0)])
scatter("overlapping", (3, 17), (1, 3), (1, 2), [(0, 0), (1, 1)])
scatter("two-dims", (9, 13), (4, 2), (1, 3), [(2, 1), (0, 1)])
scatter("gaps", (19,), (2,), (5,), [(0, 0)])
scatter("one-window", (3, 7), (1, 6), (1, 2), [(0, 0), (0, 0)])
scatter("long", (13,), (11,), (1,), [(5, 5)])


def scattered(function: Callable) -> Callable:
    scalar = jax.make_jaxpr(lax.ge)(1.0, 1.0).jaxpr
    combine = jax.make_jaxpr(function)(1.0, 1.0).jaxpr
    return lambda x, s: select_and_scatter_p.bind(
        x, s, np.float32(3), select_jaxpr=scalar, select_consts=(), scatter_jaxpr=combine,
        scatter_consts=(), window_dimensions=(1, 3), window_strides=(1, 5),
        padding=((0, 0), (0, 0)),
    )  # fmt: skip


case("scatter-add-from-3", scattered(lax.add), arr(1, 17), arr(1, 3), names="select_and_scatter")
case("scatter-mul", scattered(lax.mul), arr(3, 17), arr(3, 3), names="select_and_scatter")


@pytest.mark.parametrize("name", CASES)
def test_rule_agrees_with_the_whole_primitive(name: str) -> None:
    fun, args, names, exact = CASES[name]
    check_rules(fun, *args, names=names, exact=exact)


def covered(w: Window, first: int, count: int) -> np.ndarray:
    """What `count` windows from `first` on cover, of elements 1, 2 ... dilated and padded."""
    low = w.padding[0]
    places = np.arange(first * w.stride, (first + count - 1) * w.stride + w.extent) - low
    inside = (places % w.base == 0) & (places >= 0) & (places // w.base < w.size)
    return np.where(inside, places // w.base + 1, 0)


def test_parts_are_what_the_windows_of_a_shard_cover() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        base, dilation = rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2])
        padding = rng.randint(-3, 6), 0
        size, window, stride = rng.randint(1, 20), rng.randint(1, 6), rng.randint(1, 4)
        w = Window(size, 0, window, stride, padding, base, dilation)
        shards, count = rng.choice([2, 3, 4, 8]), rng.randint(1, 4)
        part = w.part(shards, count)
        for i in range(shards):
            at = part.starts[i] + np.arange(part.width)
            got = np.where((at >= 0) & (at < w.size), at + 1, 0)
            dilated = np.zeros((part.width - 1) * base + 1, int)
            dilated[::base] = got
            lead = part.leads[i if len(part.leads) > 1 else 0]
            place = np.arange(part.span) - lead
            here = (place >= 0) & (place < len(dilated))
            got = np.where(here, dilated[np.clip(place, 0, len(dilated) - 1)], 0)
            np.testing.assert_array_equal(got, covered(w, i * count, count), f"{w} {part}")
            if part.even:
                low, high = part.padding
                assert low + len(dilated) + high == part.span


# Whole programs: values, and what is sent.

MESH = make_mesh(h=4)
ROWS = P(None, "h")
IMAGE = np.random.default_rng(1).normal(size=(2, 16, 16, 8)).astype(np.float32)
KERNEL = np.random.default_rng(2).normal(size=(3, 3, 8, 6)).astype(np.float32)
ROW = 2 * 16 * 8 * 4  # bytes of a row of IMAGE
NHWC = ("NHWC", "HWIO", "NHWC")


def conv3(x: Any, k: Any, **options: Any) -> Any:
    options = {"window_strides": (1, 1), "padding": "SAME"} | options
    return lax.conv_general_dilated(x, k, dimension_numbers=NHWC, **options)


def test_a_convolution_sends_two_rows() -> None:
    partitioned = check(conv3, (IMAGE, KERNEL), MESH, (ROWS, P()), ROWS)
    assert kinds(partitioned) == {("permute", ("h",)): (2, 2 * ROW)}


def squares(x: Any, k: Any) -> Any:
    return (conv3(x, k) ** 2).sum()


def test_the_gradient_of_an_image_sends_rows() -> None:
    partitioned = check(jax.grad(squares), (IMAGE, KERNEL), MESH, (ROWS, P()), ROWS)
    assert kinds(partitioned) == {("permute", ("h",)): (4, 2 * ROW + 2 * ROW * 6 / 8)}


def test_the_gradient_of_a_kernel_sends_rows_and_reduces_the_kernel() -> None:
    partitioned = check(jax.grad(squares, 1), (IMAGE, KERNEL), MESH, (ROWS, P()), P())
    assert kinds(partitioned) == {
        ("permute", ("h",)): (4, 4 * ROW),  # the image's halo, forward and backward
        ("all_reduce", ("h",)): (1, 2 * KERNEL.nbytes * 3 / 4),
    }


def test_halos_of_two_dims_bring_the_corners() -> None:
    mesh = make_mesh(h=2, w=4)
    partitioned = check(jax.grad(squares, (0, 1)), (IMAGE, KERNEL), mesh, (P(None, "h", "w"), P()))
    assert {kind for kind, _ in kinds(partitioned)} == {"permute", "all_reduce"}


def test_patches_and_pools_that_tile_send_nothing() -> None:
    def embed(x: Any, k: Any) -> Any:
        x = nn.max_pool(x, (2, 2), (2, 2))
        return conv3(x, k, window_strides=(2, 2), padding="VALID")

    kernel = np.ones((2, 2, 8, 3), np.float32)
    grad = jax.grad(lambda x, k: (embed(x, k) ** 2).sum())
    assert not kinds(check(grad, (IMAGE, kernel), MESH, (ROWS, P()), ROWS))
    assert not kinds(check(lambda x: nn.avg_pool(x, (2, 2), (2, 2)), (IMAGE,), MESH, (ROWS,), ROWS))


def test_large_patches_send_nothing() -> None:
    def embed(x: Any, k: Any) -> Any:
        return conv3(x, k, window_strides=(8, 8))

    kernel = np.ones((8, 8, 8, 3), np.float32)
    assert not kinds(check(embed, (IMAGE, kernel), make_mesh(h=2), (ROWS, P()), ROWS))


def test_a_pool_of_everything_is_a_reduction() -> None:
    def pool(x: Any) -> Any:
        return nn.avg_pool(x, (16, 16)), nn.max_pool(x, (16, 16))

    assert kinds(check(pool, (IMAGE,), MESH, (ROWS,), P())) == {
        ("all_reduce", ("h",)): (2, 2 * 2 * (2 * 8 * 4) * 3 / 4)
    }


def test_depthwise_channels_send_nothing() -> None:
    kernel = np.ones((3, 3, 1, 8), np.float32)
    grad = jax.grad(lambda x, k: (conv3(x, k, feature_group_count=8) ** 2).sum(), (0, 1))
    channels = P(None, None, None, "h")
    partitioned = check(grad, (IMAGE, kernel), MESH, (channels, channels), (channels, channels))
    assert not kinds(partitioned)


def test_input_channels_are_reduced() -> None:
    specs = P(None, None, None, "h"), P(None, None, "h")
    partitioned = check(conv3, (IMAGE, KERNEL), MESH, specs, P())
    assert {kind for kind, _ in kinds(partitioned)} == {"all_reduce"}


class Block(nn.Module):
    """What a vision model is made of, upsampling included."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        skip = x
        x = nn.Conv(8, (3, 3), strides=(2, 2), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        x = nn.max_pool(x, (3, 3), (1, 1), "SAME")
        x = nn.ConvTranspose(8, (4, 4), strides=(2, 2))(x)
        return nn.avg_pool(x + skip, (3, 3), (2, 2), "SAME").mean((1, 2))


def test_a_block_sharded_in_space_gathers_nothing() -> None:
    model = Block()
    variables = model.init(jax.random.key(0), IMAGE)

    def loss(params: Any, x: Any) -> Any:
        y, _ = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return (y**2).sum()

    partitioned = check(
        jax.value_and_grad(loss), (variables["params"], IMAGE), make_mesh(data=2, h=4),
        (None, P("data", "h")), None, 1e-4,
    )  # fmt: skip
    assert {kind for kind, _ in kinds(partitioned)} == {"permute", "all_reduce"}
    assert not partitioned.diagnostics
