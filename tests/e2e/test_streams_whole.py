"""Where pass `streams` lets things be whole: what compilers wait for, and what costs more."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import sharding
from sharding import P, shard
from spmd import streams, target
from spmd.chips import CHIPS
from spmd.partition.plan import Compute
from tests.e2e.test_streams import CHIP, TENSOR, WEIGHTS, X, layer, layers, model, planned
from tests.oracle import check, make_mesh


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated devices are such chips."""
    monkeypatch.setitem(CHIPS, "cpu", CHIP)
    monkeypatch.setattr(target, "_APART", {})


@pytest.mark.parametrize("batch, found", [(2, False), (4, True)])
def test_single_examples_are_not_scattered(
    batch: int, found: bool, chip: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XLA makes all-reduces of scatters of those; sums of them are fine where they run beside."""
    assert streams.streams(planned(model, WEIGHTS, X[:batch, :2]))
    kinds = frozenset(("permute", "all_gather"))
    monkeypatch.setitem(CHIPS, "cpu", dataclasses.replace(CHIP, overlaps=kinds))
    assert streams.streams(planned(model, WEIGHTS, X[:batch, :2])) == found


@sharding.rule("b s w -> b s w, b s w")
def waves(x: Any) -> Any:
    return jnp.sin(x), jnp.cos(x)


@pytest.mark.parametrize("kinds", [CHIP.overlaps, frozenset(("permute", "all_gather"))])
def test_equations_with_several_results_are_part_of_a_stream(
    kinds: frozenset[str], chip: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(weights: Any, x: Any) -> Any:
        def both(x: Any, w: Any) -> tuple[Any, None]:
            a, b = waves(layer(x, w)[0])
            return a * b, None

        return jax.lax.scan(both, x, weights)[0]

    monkeypatch.setitem(CHIPS, "cpu", dataclasses.replace(CHIP, overlaps=kinds))
    stage = check(run, [WEIGHTS, X], make_mesh(tensor=4), (TENSOR, P()))
    (parts,) = (one.parts for one, _ in stage.plan.body.walk()
                if isinstance(one, Compute) and len(one.results) == 2)  # fmt: skip
    assert parts is not None and parts.results == (0, 0)


@pytest.mark.parametrize("gathered, found", [(True, True), (False, False)])
def test_gathers_of_single_examples_run_beside(
    gathered: bool, found: bool, chip: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are needed whole are no scatter: of two examples each is a part."""
    kinds = frozenset(("permute", "all_gather"))
    monkeypatch.setitem(CHIPS, "cpu", dataclasses.replace(CHIP, overlaps=kinds))
    spec = P(None, None, "tensor") if gathered else P()

    def run(weights: Any, x: Any) -> Any:
        def positions(x: Any, w: Any) -> tuple[Any, None]:
            return shard(layer(x, w)[0], *spec), None

        return jax.lax.scan(positions, shard(x, *spec), weights)[0]

    assert streams.streams(planned(run, WEIGHTS, X[:2, :2])) == found


@pytest.mark.parametrize("change", [
    {"overlaps": frozenset(("permute",))}, {"unasked": frozenset(("permute",))}, {"family": "gpu"},
])  # fmt: skip
def test_not_where_the_compiler_waits_for_every_collective(
    change: Any, chip: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor where it has to be asked to gather ahead: before v5e."""
    assert streams.streams(planned(model, WEIGHTS, X))
    monkeypatch.setitem(CHIPS, "cpu", dataclasses.replace(CHIP, **change))
    assert not streams.streams(planned(model, WEIGHTS, X))


def test_not_where_it_saves_less_than_it_costs(
    chip: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result of the last layer is joined."""
    assert streams.streams(planned(layers, WEIGHTS, X))
    changes = {"hbm_bandwidth": 1e3}, {"link_bandwidth": 1e12}, {"flops": (("float32", 1e15),)}
    for change in changes:
        monkeypatch.setitem(CHIPS, "cpu", dataclasses.replace(CHIP, **change))
        assert not streams.streams(planned(layers, WEIGHTS, X)), change
