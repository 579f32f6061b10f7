"""Windows at constant places: values by brute force, and what moves."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from sharding.program import build
from tests.e2e.rule_harness import check_rules
from tests.oracle import check, kinds, make_mesh

RNG = np.random.default_rng(0)
MESH = make_mesh(x=2, y=4)


ROWS = lax.ScatterDimensionNumbers((0, 1), (), (0,))


def arr(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RNG.integers(-9, 9, shape).astype(dtype)


WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda at, y: at.add(y), "subtract": lambda at, y: at.subtract(y),
    "multiply": lambda at, y: at.multiply(y), "min": lambda at, y: at.min(y),
    "max": lambda at, y: at.max(y), "set": lambda at, y: at.set(y),
}  # fmt: skip


def primitives(fun: Callable[..., Any], *args: Any) -> list[str]:
    return [op.primitive.name for op in build(jax.make_jaxpr(fun)(*args)).ops()]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n", [16, 13])
def test_inner_windows(way: str, n: int) -> None:
    x, y = arr(n, 7), arr(n - 2, 3)
    check_rules(lambda x, y: WAYS[way](x.at[1:-1, 2:5], y), x, y, names="write")


@pytest.mark.parametrize("window", [
    np.s_[3:], np.s_[:9], np.s_[5:7], np.s_[1:-1, 0], np.s_[:, 1:4],
])  # fmt: skip
def test_ends_rows_and_columns(window: Any) -> None:
    x = arr(16, 6, dtype=np.int32)
    y = arr(*x[window].shape, dtype=np.int32)
    check_rules(lambda x, y: x.at[window].set(y), x, y, names="write")


def test_only_a_row_moves() -> None:
    """A step of a wave equation on a grid: neighbours exchange rows."""
    x, y = arr(64, 32), arr(62, 30)
    for place in (P(("x", "y")), P("y", "x")):
        check(lambda x, y: x.at[1:-1, 1:-1].add(y), (x, y), MESH, (place, P()), place)
    planned = check(
        lambda x: x.at[1:-1].add(x[2:] - 2 * x[1:-1] + x[:-2]), (x,), make_mesh(y=4), (P("y"),),
        P("y"),
    )  # fmt: skip
    row = 32 * 4
    found = kinds(planned)
    assert set(found) == {("permute", ("y",))} and found["permute", ("y",)][1] <= 6 * row


def test_gradients() -> None:
    x, y = arr(16, 6), arr(14, 4)

    def loss(x: Any, y: Any) -> Any:
        z = x.at[1:-1, 1:-1].set(jnp.sin(y)).at[2:].multiply(2.0)
        return (z**2).sum()

    grad = jax.grad(loss, (0, 1))
    assert not {"gather", "scatter", "scatter-mul"} & {*primitives(grad, x, y)}
    check(grad, (x, y), make_mesh(y=4), (P("y"), P()), (P("y"), P()))


def test_whole_arrays_are_written_in_place() -> None:
    """Where the dim is not sharded nothing but the window is touched."""
    planned = check(
        lambda x, y: x.at[:, 2:4].set(y), (arr(16, 8), arr(16, 2)), make_mesh(y=4),
        (P("y"), P("y")), P("y"),
    )  # fmt: skip
    text = planned.lower().as_text()
    assert "dynamic_update_slice" in text and "select" not in text
    assert not planned.collectives


@pytest.mark.parametrize("fun", [
    lambda x, y: x.at[jnp.array([14])].set(y[:1]),  # a row
    lambda x, y: x.at[jnp.array([1, 3])].set(y[:2]),  # several windows
    lambda x, y: lax.dynamic_update_slice(x, y, (1, 0)),
    lambda x, y: lax.scatter(x, y[:1, 0].astype(int), y, ROWS),  # where the data says
])  # fmt: skip
def test_others_stay(fun: Any) -> None:
    assert "write" not in primitives(fun, arr(16, 6), arr(14, 6))


def test_windows_that_reach_outside_are_dropped() -> None:
    def fun(x: Any, y: Any) -> Any:
        return lax.scatter(x, np.array([5]), y, ROWS, mode="drop")

    assert "write" not in primitives(fun, arr(16, 6), arr(14, 6))
    check(fun, (arr(16, 6), arr(14, 6)), make_mesh(y=4), (P("y"), P()), P("y"))


def test_places_that_a_long_program_computes_are_not_looked_into() -> None:
    """Whether a place is constant is told by what makes it, however much made that."""

    def fun(x: Any, i: Any) -> Any:
        for _ in range(1500):
            i = lax.bitwise_and(lax.add(i, i), 7)
        return lax.gather(x, i[None], lax.GatherDimensionNumbers((0, 1), (), (0,)), (2, 6))

    assert "gather" in primitives(fun, arr(16, 6), np.int32(3))
