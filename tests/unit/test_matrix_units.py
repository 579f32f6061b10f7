"""Predicted seconds of matrix units against their peak, and against what the TPU compiler says."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AbstractMesh

import spmd
from sharding import P
from spmd.chips import CHIPS
from spmd.estimate.matrix import arithmetic
from spmd.estimate.work import contracts, lines

BF16 = jnp.bfloat16
VOXELS = ("NDHWC", "DHWIO", "NDHWC")


def full(
    fun: Any, *shapes: tuple[int, ...], chip: str = "v5p", spec: Any = None, results: bool = False
) -> float:
    """Of the first product of a function, among four devices: the part of the peak rate that is
    reached.

    Args:
      results: whether they take time to leave the units.
    """
    args = [jax.ShapeDtypeStruct(dims, BF16) for dims in shapes]
    jitted = spmd.jit(fun, mesh=AbstractMesh((4,), ("x",)), in_shardings=spec)
    plan = jitted.trace(*args).propagate().partition().plan
    line = next(x for x in lines(plan) if x.contracts)
    assert contracts(line.instruction)
    found = CHIPS[chip] if results else replace(CHIPS[chip], results=0.0)
    seconds = arithmetic(line.instruction, line.flops.total, line.mesh, found)
    return line.flops.total / found.peak("bfloat16") / seconds


def voxels(x: Any, kernel: Any) -> Any:
    return lax.conv_general_dilated(x, kernel, (1, 1, 1), "SAME", dimension_numbers=VOXELS)


@pytest.mark.parametrize(
    ("rows", "inner", "columns", "want"),
    [
        (512, 256, 128, 1.0),
        (512, 32, 128, 1 / 4),
        (512, 256, 32, 1.0),  # the rows lie in the units, 32 columns are streamed past them
        (40, 256, 32, 40 / 128),  # 128 by 32 rather than 40 by 128
        (512, 130, 128, 130 / 256),
        (1, 256, 128, 1 / 8),
    ],
)
def test_what_does_not_fill_the_units(rows: int, inner: int, columns: int, want: float) -> None:
    found = full(jnp.dot, (rows, inner), (inner, columns), spec=(P(), P()))
    assert found == pytest.approx(want)


def test_units_see_what_is_on_one_device() -> None:
    whole = full(jnp.dot, (512, 256), (256, 128), spec=(P(), P()))
    divided = full(jnp.dot, (512, 256), (256, 128), spec=(P(None, "x"), P("x")))
    assert (whole, divided) == (1, 64 / 128)


def test_batches_fill_nothing() -> None:
    heads = full(jnp.matmul, (64, 512, 32), (64, 32, 512), spec=(P("x"), P("x")))
    assert heads == 32 / 128


def test_units_of_v6e_are_larger_and_gpus_have_small_ones() -> None:
    shapes = (512, 128), (128, 256)
    found = [full(jnp.dot, *shapes, chip=chip, spec=(P(), P())) for chip in ("v5p", "v6e", "h100")]
    assert found == [1, 1 / 2, 1]


def test_a_kernel_is_a_matrix_for_each_of_its_elements() -> None:
    # libtpu 0.0.42 estimates 6.1 % of v5p's peak for 32 features of 32, 12.3 % for 32 of 64.
    image = 4, 32, 16, 16
    same = full(voxels, (*image, 32), (3, 3, 3, 32, 32), spec=(P("x"), P()))
    wider = full(voxels, (*image, 64), (3, 3, 3, 64, 32), spec=(P("x"), P()))
    assert (same, wider) == (1 / 16, 1 / 8)


def test_the_gradient_of_a_kernel_sums_over_places() -> None:
    def gradient(x: Any, kernel: Any, g: Any) -> Any:
        return jax.linear_transpose(lambda k: voxels(x, k), kernel)(g)

    shapes = (4, 32, 16, 16, 32), (3, 3, 3, 32, 64), (4, 32, 16, 16, 64)
    assert full(gradient, *shapes, spec=(P(), P(), P())) == 64 / 128


@pytest.mark.parametrize(
    ("chip", "inner", "estimated"),
    # What libtpu 0.0.42 estimates of products of 64 pairs [2048, inner] and [inner, 2048].
    [("v5p", 64, 0.090), ("v5p", 128, 0.178), ("v5e", 64, 0.070), ("v5e", 256, 0.268),
     ("v3", 128, 0.276), ("v6e", 64, 0.033), ("v6e", 256, 0.128)],
)  # fmt: skip
def test_results_of_short_sums_wait_to_leave(chip: str, inner: int, estimated: float) -> None:
    shapes = (256, 2048, inner), (256, inner, 2048)
    found = full(jnp.matmul, *shapes, chip=chip, spec=(P("x"), P("x")), results=True)
    assert found == pytest.approx(estimated, rel=0.1)


def test_large_batches_of_a_convolution_fill_units() -> None:
    """In place of features, of which 32 are a quarter; 64 examples on a device do, 32 do not."""
    kernel = 3, 3, 3, 128, 32
    for batch, want in ((64, 1.0), (32, 32 / 128)):
        found = full(voxels, (4 * batch, 4, 4, 4, 128), kernel, spec=(P("x"), P()))
        assert found == want


def test_kernels_of_few_features_are_folded() -> None:
    """Of colours, say: 27 elements of 3."""
    found = full(voxels, (256, 4, 4, 4, 3), (3, 3, 3, 3, 128), spec=(P("x"), P()))
    assert found == 81 / 128


@pytest.mark.parametrize("size", [256, 8])
def test_what_stays_in_the_cores_own_memory_waits_for_nothing(size: int) -> None:
    shapes = (4 * size, 2048, 64), (4 * size, 64, 2048)
    found = full(jnp.matmul, *shapes, chip="v5e", spec=(P("x"), P("x")), results=True)
    assert (found == 64 / 128) == (size * 2048 * 2048 * 2 < CHIPS["v5e"].vmem_bytes)
