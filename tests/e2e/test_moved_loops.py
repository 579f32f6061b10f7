"""Loops over a sharded dim whose steps need one another: the axis shards what is in a slice."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import spmd
from sharding import P
from spmd.partition import around, moved
from tests.oracle import check, kinds, make_mesh

RNG = np.random.default_rng(0)
TIME, WIDTH = 256, 64
OFF = {"disable_passes": ["moved_axes"]}


def arr(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


X = arr(TIME, WIDTH)
ONCE = X.nbytes / 8 * 7 / 8  # what an all-to-all of it sends; a gather sends eight times as much


def smooth(carry: Any, row: Any) -> Any:
    carry = carry * 0.9 + row * 0.1
    return carry, carry


def smoothed(x: Any) -> Any:
    return lax.scan(smooth, jnp.zeros(x.shape[1:]), x)[1]


CASES: list[tuple[Callable[[Any], Any], int, int]] = [
    (smoothed, 2, 1),
    (lambda x: lax.scan(smooth, jnp.ones(WIDTH), x, reverse=True)[1], 2, 1),
    (lambda x: lax.scan(smooth, jnp.zeros(WIDTH), x, unroll=4)[1], 2, 1),
    (lambda x: jax.checkpoint(smoothed)(jnp.tanh(x)), 2, 1),
    (lambda x: jax.vmap(smoothed, 1, 1)(x.reshape(TIME, 2, WIDTH // 2)).reshape(x.shape), 2, 1),
    (lambda x: x + lax.scan(lambda c, r: (smooth(c, r["a"])[0], r["b"] - c), X[0] * 0,
                            {"a": x, "b": jnp.sin(x)})[1], 2, 2),
]  # fmt: skip


@pytest.mark.parametrize(("fun", "moved", "gathered"), CASES)
def test_a_recurrence_over_sharded_positions_runs_by_columns(
    fun: Callable[[Any], Any], moved: int, gathered: int
) -> None:
    planned = check(fun, (X,), make_mesh(s=8), (P("s"),), P("s"))
    assert kinds(planned) == {("all_to_all", ("s",)): (moved, moved * ONCE)}
    off = kinds(check(fun, (X,), make_mesh(s=8), (P("s"),), P("s"), **OFF))
    assert off == {("all_gather", ("s",)): (gathered, gathered * 8 * ONCE)}


def test_and_so_does_its_gradient() -> None:
    """There and back, and there and back once more: nothing between needs its rows."""

    def fun(x: Any) -> Any:
        return jax.grad(lambda x: (smoothed(x) ** 2).sum())(x)

    planned = check(fun, (X,), make_mesh(s=8), (P("s"),), P("s"))
    assert kinds(planned) == {("all_to_all", ("s",)): (2, 2 * ONCE)}


def test_what_is_carried_alone_comes_in_parts() -> None:
    """Of the last one every device has its columns."""

    def fun(x: Any) -> Any:
        return lax.scan(lambda c, r: (jnp.maximum(c * 0.9, r), None), jnp.zeros(WIDTH), x)[0]

    planned = check(fun, (X,), make_mesh(s=8), (P("s"),), P())
    whole = X[0].nbytes * 7 / 8
    assert kinds(planned) == {("all_to_all", ("s",)): (1, ONCE), ("all_gather", ("s",)): (1, whole)}


def indexed(x: Any) -> Any:
    return lax.scan(lambda c, i: smooth(c, x[i]), jnp.zeros(WIDTH), jnp.arange(len(x)))[1]


def written(x: Any) -> Any:
    def step(i: Any, state: Any) -> Any:
        carry, made = state
        carry = carry * 0.9 + x[i]
        return carry, made.at[i].set(carry)

    return lax.fori_loop(0, len(x), step, (jnp.zeros(WIDTH), jnp.zeros_like(x)))[1]


def counted(x: Any) -> Any:
    """The same as a loop whose predicate, a region of its own, is passed all that is carried."""

    def step(state: Any) -> Any:
        i, carry, made = state
        carry = carry * 0.9 + x[i]
        return i + 1, carry, made.at[i].set(carry)

    start = 0, jnp.zeros(WIDTH), jnp.zeros_like(x)
    return lax.while_loop(lambda state: state[0] < len(x), step, start)[2]


def overwritten(x: Any) -> Any:
    return lax.fori_loop(1, len(x), lambda i, y: y.at[i].add(y[i - 1] * 0.9), x)


def branching(x: Any) -> Any:
    """Both branches are passed the row, in one layout."""

    def step(c: Any, row: Any) -> Any:
        i, h = c
        odd, even = lambda h, row: h * 0.5 + row, lambda h, row: h - jnp.sin(row)
        h = lax.cond(i % 2 > 0, odd, even, h, row)
        return (i + 1, h), h

    return lax.scan(step, (0, jnp.zeros(WIDTH)), x)[1]


def noisy(x: Any) -> Any:
    """Every device draws its columns of the noise."""

    def step(c: Any, row: Any) -> Any:
        return smooth(c, row["x"] + jax.random.normal(row["key"], c.shape))

    keys = jax.random.split(jax.random.key(0), len(x))
    return lax.scan(step, jnp.zeros(WIDTH), {"x": x, "key": keys})[1]


@pytest.mark.parametrize("fun", [indexed, written, counted, overwritten, branching, noisy])
def test_so_does_what_a_loop_takes_from_rows_or_writes_to_them(fun: Callable[[Any], Any]) -> None:
    planned = check(fun, (X,), make_mesh(s=8), (P("s"),), P("s"))
    assert kinds(planned) == {("all_to_all", ("s",)): (2, 2 * ONCE)}
    off = spmd.jit(fun, mesh=make_mesh(s=8), in_shardings=(P("s"),), out_shardings=P("s"), **OFF)
    assert off.trace(X).propagate().partition().wire_bytes >= 8 * ONCE


def test_the_gradient_of_indexed_rows_comes_back_by_columns() -> None:
    def fun(x: Any) -> Any:
        return jax.grad(lambda x: (indexed(x) ** 2).sum())(x)

    planned = check(fun, (X,), make_mesh(s=8), (P("s"),), P("s"))
    assert kinds(planned) == {("all_to_all", ("s",)): (2, 2 * ONCE)}


@pytest.mark.parametrize("steps", [around.STEPS, around.STEPS + 1])
def test_how_often_something_is_sent_counts_in_loops_of_many_steps(steps: int) -> None:
    def fun(x: Any) -> Any:
        return lax.fori_loop(0, steps, lambda i, x: jnp.tanh(x - x.mean()), x)

    stage = spmd.jit(fun, mesh=make_mesh(s=8), in_shardings=P("s"), out_shardings=P("s"))
    plan = stage.trace(X[:, 0]).propagate().partition().plan
    (waited, _), (sent, _) = (moved._spent(plan.body, {}, delays=on) for on in (True, False))
    many = steps > around.STEPS
    assert waited - sent == pytest.approx(many * steps * around.LATENCY)


def test_what_steps_only_add_up_is_reduced_once_and_does_not_keep_them() -> None:
    """The gradient of a decay that all share: a sum of examples in each step, but only added."""

    def loss(decay: Any, x: Any) -> Any:
        def step(c: Any, row: Any) -> Any:
            c = c * jax.nn.sigmoid(decay) + row
            return c, c

        return (lax.scan(step, jnp.zeros(x.shape[1:]), x)[1] ** 2).mean()

    decay, x = arr(6), arr(TIME, 128, 6)
    places = P(), P("s")
    planned = check(jax.grad(loss, (0, 1)), (decay, x), make_mesh(s=8), places, places)
    assert kinds(planned) == {
        ("all_to_all", ("s",)): (2, 2 * x.nbytes / 8 * 7 / 8),
        ("all_reduce", ("s",)): (1, 2 * decay.nbytes * 7 / 8),
    }


def test_slices_of_what_all_have_are_no_reason_to_stay() -> None:
    """A Kalman filter of 32 series: its matrix is whole, gains and variances are of each."""

    def filtered(z: Any) -> Any:
        def step(state: Any, row: Any) -> Any:
            mean, spread = state
            mean, spread = mean @ (jnp.eye(4) * 0.9), spread * 0.81 + 0.1
            gain = spread / (spread + 1)
            mean = mean + gain[:, None] * (row - mean)
            return (mean, (1 - gain) * spread), mean

        return lax.scan(step, (jnp.zeros(z.shape[1:]), jnp.ones(z.shape[1])), z)[1]

    z = arr(TIME, 32, 4)
    planned = check(filtered, (z,), make_mesh(s=8), (P("s"),), P("s"))
    assert kinds(planned) == {("all_to_all", ("s",)): (2, 2 * z.nbytes / 8 * 7 / 8)}


NORMAL = 1024


@pytest.mark.parametrize(
    "step",
    [
        lambda c, row: (c * 0.9 + row) / (1 + jnp.linalg.norm(c)),
        lambda c, row: c[::-1] * 0.9 + row,
        lambda c, row: jnp.roll(c, 1) * 0.9 + row,
        lambda c, row: jnp.cumsum(c) * 0.1 + row,
        lambda c, row: jnp.sort(c) * 0.9 + row,
        lambda c, row: jax.nn.softmax(c + row),
    ],
    ids=["norm", "reversed", "rolled", "summed up", "sorted", "softmax"],
)
def test_steps_that_would_wait_for_one_another_are_not_cut(step: Callable[[Any, Any], Any]) -> None:
    """Columns meet in each of 4,096 steps: a gather takes less than as many sums of a few bytes."""

    def fun(x: Any) -> Any:
        return lax.scan(lambda c, row: (step(c, row),) * 2, jnp.zeros(NORMAL), x)[1]

    x = jax.ShapeDtypeStruct((4096, NORMAL), jnp.float32)
    stage = spmd.jit(fun, mesh=make_mesh(s=8), in_shardings=P("s"), out_shardings=P("s"))
    found = kinds(stage.trace(x).propagate().partition())
    assert found == {("all_gather", ("s",)): (1, 4096 * NORMAL * 4 * 7 / 8)}


def test_a_cell_that_normalises_runs_by_examples_where_they_divide() -> None:
    def fun(x: Any) -> Any:
        def step(c: Any, row: Any) -> Any:
            c = jax.nn.standardize(c * 0.5 + row)
            return c, c

        return lax.scan(step, jnp.zeros(x.shape[1:]), x)[1]

    x = arr(TIME, 8, WIDTH)
    planned = check(fun, (x,), make_mesh(s=8), (P("s"),), P("s"), tolerance=1e-4)
    assert kinds(planned) == {("all_to_all", ("s",)): (2, 2 * x.nbytes / 8 * 7 / 8)}


def gru(w: Any, x: Any) -> Any:
    """x [batch, time, width]"""

    def cell(h: Any, z: Any) -> Any:
        keep = jax.nn.sigmoid(z @ w["zk"] + h @ w["hk"])
        h = keep * h + (1 - keep) * jnp.tanh(z @ w["zn"] + h @ w["hn"])
        return h, h

    start = jnp.zeros((x.shape[0], WIDTH))
    return lax.scan(cell, start, x.swapaxes(0, 1))[1].swapaxes(0, 1)


WEIGHTS = {name: arr(WIDTH, WIDTH) for name in ("zk", "hk", "zn", "hn")}


def test_a_gru_with_its_positions_sharded_runs_by_examples() -> None:
    """And each device its own, in place of all of them."""
    x, place = arr(8, TIME, WIDTH), P(None, "s")
    planned = check(gru, (WEIGHTS, x), make_mesh(s=8), ({k: P() for k in WEIGHTS}, place), place)
    assert kinds(planned) == {("all_to_all", ("s",)): (2, 2 * x.nbytes / 8 * 7 / 8)}
    off = spmd.jit(gru, mesh=make_mesh(s=8), out_shardings=place, **OFF,
                   in_shardings=({k: P() for k in WEIGHTS}, place))  # fmt: skip
    without = off.trace(WEIGHTS, x).propagate().partition()
    assert planned.peak_memory < without.peak_memory / 3


@pytest.mark.parametrize("axes", [{"s": 8}, {"d": 2, "s": 4}])
def test_linear_attention_by_chunks_runs_by_heads(axes: dict[str, int]) -> None:
    """States of chunks are added up from the first to the last, on the way back the other way."""
    batch, heads, chunks, size = 2, 8, 16, 4
    q, k, v = (arr(batch, heads, chunks, size, size) for _ in "qkv")
    place = P(*(a if a in axes else None for a in ("d", None, "s")))

    def attend(q: Any, k: Any, v: Any) -> Any:
        states = jnp.moveaxis(k.swapaxes(-1, -2) @ v, 2, 0)
        start = jnp.zeros(states.shape[1:])
        _, before = lax.scan(lambda s, z: (s * 0.9 + z, s), start, states)
        return q @ jnp.moveaxis(before, 0, 2)

    def gradients(*args: Any) -> Any:
        return jax.grad(lambda *args: (attend(*args) ** 2).sum(), (0, 1, 2))(*args)

    planned = check(gradients, (q, k, v), make_mesh(**axes), (place,) * 3, (place,) * 3)
    shards = axes["s"]
    once = q.nbytes / 8 * (shards - 1) / shards
    assert kinds(planned) == {("all_to_all", ("s",)): (4, 4 * once)}


def test_columns_that_no_axis_divides_are_gathered() -> None:
    x = arr(TIME, 30)
    planned = check(smoothed, (x,), make_mesh(s=8), (P("s"),), P("s"))
    assert kinds(planned) == {("all_gather", ("s",)): (1, x.nbytes * 7 / 8)}


def test_so_are_layers_that_are_sharded_one_by_one() -> None:
    """Parts of a layer's weights would be gathered again in its step."""
    weights, x = arr(8, WIDTH, WIDTH), arr(512, WIDTH)

    def fun(weights: Any, x: Any) -> Any:
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, weights)[0]

    planned = check(fun, (weights, x), make_mesh(s=8), (P("s"), P("s")), P("s"))
    assert kinds(planned) == {("all_gather", ("s",)): (1, weights.nbytes * 7 / 8)}


def test_the_diagnostic_names_the_loop() -> None:
    stage = spmd.jit(smoothed, mesh=make_mesh(s=8), in_shardings=(P("s"),), out_shardings=P("s"))
    (told,) = stage.trace(X).propagate().partition().diagnostics
    assert told.kind == "moved" and "the first around scan: all-to-alls" in told.text
    assert "test_moved_loops.py:" in told.source and "(smoothed)" in told.source
