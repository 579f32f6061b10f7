"""Mesh axes that come to a dim which another operand has them on, and to short results."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding import P
from spmd import planning
from spmd.cost import Traits
from spmd.partition import moved, planner
from spmd.partition.stretch import Stretch
from tests.oracle import check, kinds, make_mesh

RNG = np.random.default_rng(0)
ROWS, COLUMNS = P("d"), P(None, "d")


def arr(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def exchanged(x: np.ndarray, shards: int = 8) -> float:
    """Wire bytes of an all-to-all."""
    return x.nbytes / shards * (shards - 1) / shards


def network(w1: Any, w2: Any, x: Any) -> Any:
    return jnp.maximum(x @ w1, 0) @ w2


@pytest.mark.parametrize("width", [64, 256])
def test_fsdp_of_few_examples_stays_with_its_weights(width: int) -> None:
    """What is elementwise between two products has the weights' dim: examples are gathered, and
    only results go back."""
    w1, w2, x = arr(width, 512), arr(512, 64), arr(128, width)
    planned = check(network, (w1, w2, x), make_mesh(d=8), (COLUMNS, ROWS, ROWS), ROWS)
    assert kinds(planned) == {
        ("all_gather", ("d",)): (1, x.nbytes * 7 / 8),
        ("reduce_scatter", ("d",)): (1, 128 * 64 * 4 * 7 / 8),
    }


def test_and_so_does_the_way_back() -> None:
    """The step of a network of two layers: nothing is exchanged for an activation function."""
    w1, w2, x = arr(64, 512), arr(512, 64), arr(128, 64)
    step = jax.grad(lambda w1, w2, x: (network(w1, w2, x) ** 2).sum(), (0, 1))
    planned = check(step, (w1, w2, x), make_mesh(d=8), (COLUMNS, ROWS, ROWS), (COLUMNS, ROWS))
    assert {kind for kind, _ in kinds(planned)} == {"all_gather", "all_reduce"}


def test_many_examples_stay_where_they_are() -> None:
    """Weights are less than what they are multiplied with."""
    w1, w2, x = arr(8, 16), arr(16, 8), arr(4096, 8)
    planned = check(network, (w1, w2, x), make_mesh(d=8), (COLUMNS, ROWS, ROWS), ROWS)
    weights = (w1.nbytes + w2.nbytes) * 7 / 8
    assert kinds(planned) == {("all_gather", ("d",)): (2, weights)}


def median(x: Any) -> Any:
    return jnp.take(jnp.sort(x, -1), x.shape[1] // 2, axis=-1)


@pytest.mark.parametrize("lanes", [1, 128])
def test_short_results_are_no_reason_to_gather(
    monkeypatch: pytest.MonkeyPatch, lanes: int
) -> None:
    """A median of each row: rows come whole to some device, and then their medians to all."""
    monkeypatch.setattr(planning, "traits", lambda options: Traits({}, lanes))
    x = arr(64, 2048)
    planned = check(median, (x,), make_mesh(d=8), (COLUMNS,), P())
    assert kinds(planned) == {
        ("all_to_all", ("d",)): (1, exchanged(x)), ("all_gather", ("d",)): (1, 64 * 4 * 7 / 8),
    }  # fmt: skip


def test_narrow_rows_that_are_much_stay_on_tpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a sum over segments, eight columns on each device would take as long as 128 there."""
    table, edges = arr(512, 64), RNG.integers(0, 512, 4096).astype(np.int32)

    def sums(table: Any, edges: Any) -> Any:
        return jax.ops.segment_sum(jnp.tanh(table[edges]), edges, 512)

    found = {}
    for lanes in (1, 128):
        monkeypatch.setattr(planning, "traits", lambda options, n=lanes: Traits({}, n))
        planned = check(sums, (table, edges), make_mesh(d=8), (ROWS, ROWS), ROWS)
        found[lanes] = {kind for kind, _ in kinds(planned)}
    assert found == {1: {"all_gather", "all_to_all"}, 128: {"all_gather", "reduce_scatter"}}


@pytest.mark.parametrize("rows", [512, 8])
def test_little_that_is_sent_starts_no_stretch(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two medians, one of which may be of less than a 64th of the other."""
    begun: set[tuple[int, ...]] = set()

    class Noted(Stretch):
        def __init__(self, around: Any, start: Any, *where: Any):
            begun.add(start.inputs[0].shape)
            super().__init__(around, start, *where)

    monkeypatch.setattr(moved, "Stretch", Noted)
    both = lambda x, y: (median(x), median(y))  # noqa: E731
    check(both, (arr(128, 2048), arr(rows, 256)), make_mesh(d=8), (COLUMNS,) * 2, P())
    assert begun == {(128, 2048), (512, 256)} - ({(512, 256)} if rows == 8 else set())


def spread(*args: Any) -> Any:
    """As a variational autoencoder has them: of each example means and spreads."""
    mean, log = jnp.split(network(*args), 2, -1)
    return jnp.mean(mean + jnp.exp(log / 2)) ** 2


LAYERS = arr(64, 512), arr(512, 64), arr(128, 64)
WAYS = {
    "taken": (spread, LAYERS, (COLUMNS, ROWS, ROWS), P(), [("taken_dims",)]),
    "free": (median, (arr(64, 2048),), (COLUMNS,), P(), []),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_plan_with_taken_dims_that_is_no_better_is_made_without(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moved once with them and once without: what is left is what paid. Where none was taken, the
    second would be the first."""
    fun, args, ins, out, without = WAYS[way]
    tried: list[tuple[str, ...]] = []
    real = planner._Planner

    def noted(*args: Any, without: Any, **rest: Any) -> Any:
        tried.append(tuple(without))
        return real(*args, without=without, **rest)

    monkeypatch.setattr(planner, "_Planner", noted)
    monkeypatch.setattr(planner, "cheaper", lambda *_: False)
    planned = check(fun, args, make_mesh(d=8), ins, out)
    assert [*dict.fromkeys(tried)] == [(), ("moved_axes",), *without]
    assert "moved" not in {told.kind for told in planned.diagnostics}
