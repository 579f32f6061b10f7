"""Passes over loops: values against the unsharded program, and what is sent without them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import spmd
from sharding import ArgumentError, P, shard
from spmd import target
from spmd.options import PASSES
from spmd.partition.stacks import own_stacks
from tests.oracle import check, kinds, make_mesh

STEPS = 40


def arr(*shape: int, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape) * 0.1, jnp.float32)


def sent(stage: spmd.Partitioned) -> dict[str, int]:
    """Kind of collective -> how often it runs."""
    counts: dict[str, int] = {}
    for record in stage.collectives:
        counts[record.kind] = counts.get(record.kind, 0) + record.count
    return counts


def both(fun: Callable, args: Any, ins: Any, outs: Any, **axes: int) -> tuple[Any, Any]:
    """The program with the passes and without them, each checked in value."""
    mesh = make_mesh(**(axes or {"x": 4}))
    return (
        check(fun, args, mesh, ins, outs),
        check(fun, args, mesh, ins, outs, disable_passes=PASSES),
    )


# --- sums ---------------------------------------------------------------------------------------


def accumulate(w: Any, batches: Any) -> Any:
    """Gradients of several batches, added up."""

    def micro(total: Any, x: Any) -> Any:
        return total + jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w) ** 2))(w), None

    return lax.scan(micro, jnp.zeros_like(w), batches)[0]


def test_gradients_of_batches_are_reduced_once() -> None:
    args = arr(64, 32), arr(6, 256, 64, seed=1)
    ours, without = both(accumulate, args, (P(), P(None, "x")), P())
    assert sent(ours) == {"all_reduce": 1}
    assert sent(without) == {"all_reduce": 6}


def test_a_sum_goes_where_it_is_wanted_at_once() -> None:
    args = arr(64, 32), arr(40, 256, 64, seed=1)
    ours, without = both(accumulate, args, (P(), P(None, "x")), P("x"))
    assert sent(ours) == {"reduce_scatter": 1}
    assert sent(without)["reduce_scatter"] == 40


def test_memory_has_to_be_worth_it() -> None:
    """Six batches do not pay for a whole gradient where a shard of it will do."""
    args = arr(64, 32), arr(6, 256, 64, seed=1)
    ours, without = both(accumulate, args, (P(), P(None, "x")), P("x"))
    assert sent(ours) == sent(without) == {"reduce_scatter": 6}


def test_a_loop_whose_steps_nobody_counts() -> None:
    def fun(w: Any, x: Any, n: Any) -> Any:
        step = lambda i, total: total + jnp.tanh(x @ w).T @ x  # noqa: E731
        return lax.fori_loop(0, n, step, jnp.zeros((32, 64)))

    for n in (0, 1, 5):
        args = arr(64, 32), arr(256, 64, seed=1), np.int32(n)
        ours, _ = both(fun, args, (P(), P("x"), P()), P())
        assert sent(ours) == {"all_reduce": 1}


def test_sums_of_sums_and_a_start_that_is_not_zero() -> None:
    def fun(w: Any, xs: Any, start: Any) -> Any:
        def step(total: Any, x: Any) -> Any:
            y = jnp.tanh(x @ w)
            return 0.5 * (total + y.T @ x) + (x.T @ y).T, None

        return lax.scan(step, start, xs)[0]

    args = arr(64, 32), arr(6, 256, 64, seed=1), arr(32, 64, seed=2)
    ours, without = both(fun, args, (P(), P(None, "x"), P()), P())
    assert sent(ours) == {"all_reduce": 1}
    assert sent(without) == {"all_reduce": 12}


def test_a_sum_that_starts_from_a_number() -> None:
    """A literal of the program, of which one device has to have more than the others."""
    fun = lambda x: lax.scan(lambda c, y: (c + jnp.sin(y).sum(), None), 0.5, x)[0]  # noqa: E731
    ours, _ = both(fun, (arr(6, 16),), (P(None, "x"),), P())
    assert sent(ours) == {"all_reduce": 1}


def test_a_sum_that_a_step_reads_is_reduced_there() -> None:
    def fun(w: Any, xs: Any) -> Any:
        def step(total: Any, x: Any) -> Any:
            total = total + jnp.tanh(x @ w).T @ x
            return total, jnp.max(total)

        return lax.scan(step, jnp.zeros((32, 64)), xs)

    args = arr(64, 32), arr(6, 256, 64, seed=1)
    ours, without = both(fun, args, (P(), P(None, "x")), P())
    assert sent(ours) == sent(without) == {"all_reduce": 6}


def test_a_sum_that_a_predicate_reads_is_reduced_there() -> None:
    def fun(w: Any, x: Any) -> Any:
        def more(carry: Any) -> Any:
            return (carry[0] < 9) & (jnp.sum(carry[1]) < 1e6)

        def step(carry: Any) -> Any:
            return carry[0] + 1, carry[1] + jnp.tanh(x @ w).T @ x

        return lax.while_loop(more, step, (0, jnp.zeros((32, 64))))[1]

    ours, without = both(fun, (arr(64, 32), arr(256, 64, seed=1)), (P(), P("x")), P())
    assert sent(ours) == sent(without)


def test_an_annotated_gradient_is_where_it_is_asked_for() -> None:
    def fun(w: Any, xs: Any) -> Any:
        def step(total: Any, x: Any) -> Any:
            return total + shard(jnp.tanh(x @ w).T @ x, "x", None), None

        return lax.scan(step, jnp.zeros((32, 64)), xs)[0]

    args = arr(64, 32), arr(40, 256, 64, seed=1)
    ours, _ = both(fun, args, (P(), P(None, "x")), P("x"))
    assert sent(ours)["reduce_scatter"] == 40


def test_sums_over_two_axes_in_nested_loops() -> None:
    def fun(w: Any, xs: Any) -> Any:
        outer = lambda total, x: (total + accumulate(w, x), None)  # noqa: E731
        return lax.scan(outer, jnp.zeros_like(w), xs)[0]

    args = arr(64, 32), arr(3, 5, 256, 64, seed=1)
    ours, without = both(fun, args, (P(), P(None, None, ("x", "y"))), P(), x=2, y=4)
    assert sum(sent(without).values()) >= 15
    assert sum(sent(ours).values()) <= 3


def layers(ws: Any, x: Any) -> Any:
    """The loss of layers in a loop, each of them computed again in the backward pass."""
    layer = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
    return jnp.sum(lax.scan(layer, x, ws)[0] ** 2)


def test_gradients_of_batches_through_a_loop_over_layers_are_reduced_once() -> None:
    def fun(ws: Any, xs: Any) -> Any:
        micro = lambda total, x: (total + jax.grad(layers)(ws, x), None)  # noqa: E731
        return lax.scan(micro, jnp.zeros_like(ws), xs)[0]

    args = arr(3, 64, 64), arr(5, 256, 64, seed=1)
    ours, without = both(fun, args, (P(), P(None, "x")), P())
    assert sent(ours) == {"all_reduce": 1}
    assert sent(without) == {"all_reduce": 15}


def half(weights: Any) -> Any:
    return weights.astype(jnp.bfloat16)


@pytest.mark.parametrize("loss", [
    lambda w, x: jnp.sum(jnp.tanh(half(x) @ half(w).reshape(64, -1)).astype(jnp.float32) ** 2),
    lambda w, x: layers(half(w), half(x)).astype(jnp.float32),
    lambda w, x: layers(w, x),
], ids=["one layer", "layers cast before their loop", "not cast"])  # fmt: skip
def test_what_is_computed_in_half_precision_and_added_up_in_full_is_reduced_once(
    loss: Callable,
) -> None:
    """Mixed precision: float32 weights are cast for each microbatch, and so are gradients."""

    def fun(w: Any, xs: Any) -> Any:
        micro = lambda total, x: (total + jax.grad(loss)(w, x), None)  # noqa: E731
        return lax.scan(micro, jnp.zeros_like(w), xs)[0]

    args = arr(3, 64, 64), arr(5, 256, 64, seed=1)
    ours = check(fun, args, make_mesh(x=4), (P(), P(None, "x")), P(), 2e-2)
    assert sent(ours) == {"all_reduce": 1}
    assert ours.wire_bytes == 2 * args[0].nbytes * 3 / 4  # in float32


@pytest.mark.parametrize(("cast", "scatters"), [(lambda w: w, 1), (half, 24)])
def test_memory_of_sums_is_worth_what_is_sent_in_half_precision(
    cast: Callable, scatters: int
) -> None:
    """A whole gradient on each device saves 24 scatters of it, or of half of its bytes."""

    def fun(w: Any, xs: Any) -> Any:
        loss = lambda w, x: jnp.sum(jnp.tanh(cast(x) @ cast(w)).astype(jnp.float32) ** 2)  # noqa: E731
        micro = lambda total, x: (total + jax.grad(loss)(w, x), None)  # noqa: E731
        return lax.scan(micro, jnp.zeros_like(w), xs)[0]

    args = arr(64, 64), arr(24, 256, 64, seed=1)
    ours = check(fun, args, make_mesh(x=4), (P("x"), P(None, "x")), P("x"), 2e-2)
    assert sent(ours)["reduce_scatter"] == scatters


def test_gradients_that_divide_the_layers_are_scattered_after_the_loop() -> None:
    args = arr(4, 64, 64), arr(256, 64, seed=1)
    ours, without = both(jax.grad(layers), args, (P("x"), P("x")), P("x"))
    assert sent(ours)["reduce_scatter"] == 1 and "all_reduce" not in sent(ours)
    assert sent(without)["all_reduce"] == 4


def test_a_sum_is_reduced_before_it_is_enlarged() -> None:
    def fun(x: Any) -> Any:
        sums = jnp.sum(x, 0), jnp.sum(x * x, 0)
        return jnp.tanh(sum(jnp.broadcast_to(each, (4096, 8)) for each in sums))

    ours = check(fun, (arr(64, 8),), make_mesh(x=4), (P("x"),), P())
    assert ours.wire_bytes <= 2 * 2 * 8 * 4


def test_what_a_mean_gets_back_is_reduced_before_it_is_spread() -> None:
    def loss(x: Any) -> Any:
        y = (x - x.mean()) * lax.rsqrt(jnp.square(x).mean() - x.mean() ** 2 + 1e-5)
        return jnp.sum(jnp.sin(y))

    ours = check(jax.grad(loss), (arr(64, 64),), make_mesh(x=8), (P("x"),), P("x"))
    assert set(sent(ours)) == {"all_reduce"} and ours.wire_bytes < 100


# --- invariants ---------------------------------------------------------------------------------


def recurrence(params: Any, xs: Any) -> Any:
    """A step of training of a recurrent network."""

    def loss(params: Any) -> Any:
        def cell(h: Any, x: Any) -> Any:
            h = jnp.tanh(x @ params["wx"] + h @ params["wh"] + params["b"])
            return h, h

        start = jnp.zeros((xs.shape[1], params["wh"].shape[0]))
        return jnp.mean(lax.scan(cell, start, xs)[1] ** 2)

    return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))


def recurrent_args() -> Any:
    params = {"wx": arr(32, 64), "wh": arr(64, 64, seed=1), "b": arr(64, seed=2)}
    return params, arr(STEPS, 256, 32, seed=3)


def test_gradients_of_a_recurrent_network_are_reduced_once() -> None:
    ins = (None, P(None, "x"))
    ours, without = both(recurrence, recurrent_args(), ins, None)
    assert sent(ours) == {"all_reduce": 3}
    assert sent(without)["all_reduce"] >= STEPS


def test_sharded_weights_are_gathered_before_the_loop() -> None:
    ins = (dict.fromkeys(("wx", "wh", "b"), P("x")), P(None, "x"))
    ours, without = both(recurrence, recurrent_args(), ins, ins[0])
    assert sent(ours)["all_gather"] <= 6
    assert sent(ours)["reduce_scatter"] <= 3
    assert sum(sent(without).values()) >= 2 * STEPS
    assert ours.wire_bytes < 0.1 * without.wire_bytes


def test_a_few_steps_gather_each_for_themselves() -> None:
    def fun(w: Any, xs: Any) -> Any:
        return lax.scan(lambda c, x: (c, jnp.tanh(x @ w)), 0, xs)[1]

    args = arr(64, 64), arr(4, 4096, 64, seed=1)
    ours, without = both(fun, args, (P("x"), P(None, "x")), P(None, "x"))
    assert sent(ours) == sent(without) == {"all_gather": 4}


def test_an_unknown_pass_is_an_error() -> None:
    with pytest.raises(ArgumentError) as error:
        spmd.jit(accumulate, disable_passes=["loop_sum"])
    assert str(error.value) == (
        "disable_passes=['loop_sum']\n"
        "  why: there is no pass 'loop_sum' (did you mean 'loop_sums'?)\n"
        f"  fix: choose from {', '.join(PASSES)}, as a sequence"
    )
    with pytest.raises(ArgumentError, match="as a sequence"):
        spmd.jit(accumulate, disable_passes="loop_sums")


def test_the_oracle_follows_a_sum_through_its_loop() -> None:
    args = arr(64, 32), arr(6, 256, 64, seed=1)
    report = spmd.check(
        accumulate, *args, mesh=make_mesh(x=4), in_shardings=(P(), P(None, "x")), out_shardings=P()
    )
    assert report.ok, str(report)


# --- stacks -----------------------------------------------------------------------------------


def twice(x: Any) -> Any:
    """Two loops that stack results of one shape, the second of which counts down."""

    def step(x: Any, _: Any) -> tuple[Any, Any]:
        return jnp.sin(x), (x, x.sum())

    y, (up, sums) = lax.scan(step, x, length=3)
    y, (down, _) = lax.scan(step, y, length=3, reverse=True)
    return up, down, sums


def test_a_later_loop_stacks_what_is_alike_in_a_shape_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(target._SUITED, "cpu", (("own_stacks", own_stacks),))

    def stacks(**options: Any) -> int:
        """How many stacks of [2, 8] per step have a dim of one element more."""
        stage = check(twice, (arr(8, 8),), make_mesh(x=4), P("x"), **options)
        return stage.lower().as_text().count("tensor<3x1x2x8xf32>) -> tensor<3x2x8xf32>")

    assert stacks() == 1
    assert stacks(disable_passes=["own_stacks"]) == 0


@pytest.mark.parametrize("after", [True, False])
def test_what_is_gathered_after_a_loop_is_gathered_before_it(after: bool) -> None:
    """A policy that is played for a few steps and then trained: its weights, gathered for that in
    any case, take no more memory when they are there earlier. Otherwise four steps are too few."""

    def fun(w: Any, x: Any) -> Any:
        y, _ = lax.scan(lambda y, _: (jnp.tanh(y @ w), None), x, None, length=4)
        return jnp.sin(y @ w) if after else y

    args, specs = (arr(16, 16), arr(32, 16)), (P(None, "y"), P("y"))
    planned = check(fun, args, make_mesh(y=8), specs, P("y"))
    assert sent(planned) == {"all_gather": 1 if after else 4}


def test_a_loop_that_ends_when_it_has_converged_gathers_its_weights_once() -> None:
    """Nobody knows how often it runs: tens of times, solvers do. What is cut again in each step
    stays as it is."""

    def fixed_point(w: Any, x: Any) -> Any:
        def step(state: Any) -> Any:
            z = jnp.tanh(state[0] @ w + x)
            return z, jnp.abs(z - state[0]).max()

        return lax.while_loop(lambda s: s[1] > 1e-3, step, (jnp.zeros_like(x), jnp.float32(1)))[0]

    w = np.full((512, 512), 1e-3, np.float32)
    x = np.random.default_rng(0).standard_normal((64, 512), np.float32)
    planned = check(fixed_point, (w, x), make_mesh(d=8), (P("d"), P("d")), P("d"))
    assert kinds(planned) == {
        ("all_gather", ("d",)): (1, w.nbytes * 7 / 8), ("all_reduce", ("d",)): (1, 7.0),
    }  # fmt: skip


@pytest.mark.parametrize(("steps", "gathers"), [(3, 3), (40, 1)])
def test_a_while_loop_that_counts_gathers_as_a_scan_does(steps: int, gathers: int) -> None:
    """In a few steps weights that are whole are not worth their memory."""

    def fun(w: Any, x: Any) -> Any:
        def step(state: Any) -> Any:
            return state[0] + 1, jnp.tanh(state[1] @ w)

        return lax.while_loop(lambda s: s[0] < steps, step, (0, x))[1]

    w, x = arr(256, 256), arr(4096, 256)
    planned = check(fun, (w, x), make_mesh(d=8), (P("d"), P("d")), P("d"))
    assert kinds(planned) == {("all_gather", ("d",)): (gathers, gathers * w.nbytes * 7 / 8)}
