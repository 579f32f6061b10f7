"""Rows that are taken from sharded ones, as minibatches are from a dataset, stay sharded."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sharding import P, decide
from tests.oracle import check, kinds, make_mesh

ROWS, WIDTH, STEPS = 8192, 64, 8
BATCH = ROWS // STEPS  # 65,536 elements
PLACES = (P(), P("data"))


def draw(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


W, X = draw(WIDTH, 8) / 8, draw(ROWS, WIDTH)


def learn(w: Any, x: Any) -> Any:
    return w - 1e-2 * jax.grad(lambda w: jnp.square(jnp.tanh(x @ w)).mean())(w)


def in_order(w: Any, x: Any) -> Any:
    return lax.scan(lambda w, x: (learn(w, x), None), w, x.reshape(STEPS, -1, WIDTH))[0]


def by_number(w: Any, x: Any) -> Any:
    def step(i: Any, w: Any) -> Any:
        return learn(w, lax.dynamic_slice_in_dim(x, i * (len(x) // STEPS), len(x) // STEPS))

    return lax.fori_loop(0, STEPS, step, w)


def drawn(w: Any, x: Any) -> Any:
    order = jax.random.permutation(jax.random.key(0), len(x)).reshape(STEPS, -1)
    return lax.scan(lambda w, i: (learn(w, x[i]), None), w, order)[0]


REDUCED = STEPS * 2 * W.nbytes * 7 / 8  # a gradient in each step


def test_minibatches_of_a_dataset_in_order() -> None:
    """Each step has its rows on all devices: once, by an all-to-all, before the loop."""
    planned = check(in_order, (W, X), make_mesh(data=8), PLACES, P())
    found = kinds(planned)
    assert found["all_to_all", ("data",)] == (1, X.nbytes / 8 * 7 / 8)
    assert found["all_reduce", ("data",)] == (STEPS, REDUCED)
    assert len(found) == 2


@pytest.mark.parametrize("fun", [by_number, drawn])
def test_minibatches_that_are_taken_in_each_step(fun: Callable[..., Any]) -> None:
    """A shard gives what it has of them, and they are scattered."""
    off = {"disable_passes": ["moved_axes"]}
    planned = check(fun, (W, X), make_mesh(data=8), PLACES, P(), **off)
    found = kinds(planned)
    assert found["reduce_scatter", ("data",)] == (STEPS, X.nbytes * 7 / 8)
    assert found["all_reduce", ("data",)] == (STEPS, REDUCED)
    assert len(found) == 2  # which rows are taken is worked out everywhere


def test_rows_that_are_drawn_may_be_taken_by_columns() -> None:
    """Each device has its columns of all rows, and gives them back for the rows of a batch."""
    planned = check(drawn, (W, X), make_mesh(data=8), PLACES, P())
    once = X.nbytes / 8 * 7 / 8
    assert kinds(planned)["all_to_all", ("data",)] == (1 + STEPS, 2 * once)


def test_results_of_a_loop_that_are_asked_for_in_order() -> None:
    x = draw(STEPS, BATCH, WIDTH)
    planned = check(
        lambda x, w: lax.map(lambda x: jnp.tanh(x @ w), x), (x, draw(WIDTH, WIDTH)),
        make_mesh(data=8), (P("data"), P()), P("data"), disable_passes=["own_steps"],
    )  # fmt: skip
    assert kinds(planned) == {("all_to_all", ("data",)): (2, 2 * x.nbytes / 8 * 7 / 8)}


def test_a_few_rows_are_had_everywhere() -> None:
    """Gradients of all the weights in every step are more than the work that is repeated."""
    planned = check(in_order, (W, X[:64]), make_mesh(data=8), PLACES, P())
    assert kinds(planned) == {("all_gather", ("data",)): (1, X[:64].nbytes * 7 / 8)}


def test_rows_that_are_sharded_otherwise_stay_so() -> None:
    """Tokens look up rows of a table: those of a batch are where the batch is."""
    tokens = np.random.default_rng(0).integers(0, ROWS, (16, 128), np.int32)
    planned = check(
        lambda table, tokens: table[tokens], (X, tokens), make_mesh(data=2, tensor=4),
        (P("tensor"), P("data")), P("data"),
    )  # fmt: skip
    assert {kind for kind, _ in kinds(planned)} == {"all_reduce"}


def test_rows_that_do_not_divide_are_had_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Minibatches of three, on eight devices."""
    monkeypatch.setattr(decide, "WORTH_KEEPING", 1)
    planned = check(in_order, (W, X[:24]), make_mesh(data=8), PLACES, P())
    assert kinds(planned) == {("all_gather", ("data",)): (1, X[:24].nbytes * 7 / 8)}


@pytest.mark.parametrize("fun", [in_order, by_number, drawn])
@pytest.mark.parametrize("rows", [8, 24, 40, 64, 72])
def test_values(fun: Callable[..., Any], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows that divide into shards, and others."""
    monkeypatch.setattr(decide, "WORTH_KEEPING", 1)
    for mesh in (make_mesh(data=8), make_mesh(data=2, x=4)):
        check(fun, (W, X[:rows]), mesh, PLACES, P())
