"""Where pass `streams` lets things be whole: what compilers wait for, and what costs more."""

import dataclasses
from typing import Any

import pytest

from spmd import streams, target
from spmd.chips import CHIPS
from tests.e2e.test_streams import CHIP, WEIGHTS, X, layers, model, planned


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
