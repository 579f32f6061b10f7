"""Programs that nobody wrote for several devices: what they send is what their dims ask for."""

import math
from typing import Any

import jax
import pytest

from benchmarks.suite.case import RUNS, Case
from benchmarks.suite.everyday import PROGRAMS
from benchmarks.suite.fragments import PROGRAMS as FRAGMENTS
from benchmarks.suite.planned import planned

DEVICES = 8
BY_NAME = {program.name: program for program in (*PROGRAMS, *FRAGMENTS)}


def sent(name: str) -> tuple[Case, dict[str, float]]:
    """A program, and the wire bytes of each kind of collective."""
    case = BY_NAME[name].make(RUNS)
    found: dict[str, float] = {}
    for record in planned(case).collectives:
        found[record.kind] = found.get(record.kind, 0.0) + record.bytes
    return case, found


def size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name, steps, rows", [
    ("wave", 10, 7), ("fdtd", 8, 4), ("burgers", 8, 6), ("jacobi", 8, 2), ("life", 8, 6),
])  # fmt: skip
def test_grids_exchange_rows(name: str, steps: int, rows: int) -> None:
    """A few with each neighbour in each step, however long the grid."""
    case, found = sent(name)
    row = math.prod(case.args[0].shape[1:]) * 4
    assert set(found) == {"permute"}
    assert found["permute"] <= steps * rows * row


def test_columns_are_sorted_where_they_are_whole() -> None:
    case, found = sent("percentiles")
    assert found["all_to_all"] == size(case.args) / DEVICES * 7 / 8
    assert sum(found.values()) < 1.1 * found["all_to_all"]


@pytest.mark.parametrize("name", ["heads", "windows"])
def test_dims_made_one_come_and_go_by_an_all_to_all(name: str) -> None:
    case, found = sent(name)
    assert found == {"all_to_all": 2 * size(case.args[-1]) / DEVICES * 3 / 4}


def test_minibatches_are_worked_on_in_parts() -> None:
    """Each row moves once, and in every step the gradients are reduced."""
    case, found = sent("minibatches")
    rows, gradients = size(case.args[1:]), 8 * 2 * size(case.args[0]) * 7 / 8
    assert found.pop("all_to_all") == rows / DEVICES * 7 / 8
    assert found == {"all_reduce": pytest.approx(gradients, rel=1e-3)}
    # Drawn by columns, which are exchanged for rows in every step.
    _, found = sent("shuffled")
    assert found.pop("all_to_all") == 2 * rows / DEVICES * 7 / 8
    assert found == {"all_reduce": pytest.approx(gradients, rel=1e-3)}


def test_flat_tokens_are_those_of_features() -> None:
    """Logits are 16 times as large: none is moved."""
    case, found = sent("tokens")
    head, features, ids = map(size, case.args)
    assert found.pop("all_to_all") == (features + ids) / DEVICES * 3 / 4
    assert found == {"all_reduce": 2 * head * 7 / 8}


def test_series_stay_where_they_are() -> None:
    assert sent("autocorrelation")[1] == {}


def test_gradients_of_a_loop_are_reduced_once() -> None:
    """All-reduced: twice what the parameters take."""
    case, found = sent("ode")
    assert set(found) == {"all_reduce"}
    assert found["all_reduce"] == pytest.approx(2 * size(case.args[0]) * 7 / 8, rel=1e-3)


@pytest.mark.parametrize("name", ["contrast", "accumulate", "policy"])
def test_fully_sharded_weights_are_gathered_at_most_twice(name: str) -> None:
    """And their gradients scattered once, with some activations: less than four times in all."""
    case, found = sent(name)
    weights = size(case.args[0]) * 7 / 8
    assert found["all_gather"] <= 2.2 * weights and sum(found.values()) <= 4 * weights


# --- pieces of programs --------------------------------------------------------------------------


def test_loops_over_examples_send_what_they_add_up() -> None:
    assert sent("rows")[1] == {}
    case, found = sent("examples")
    assert found == {"all_reduce": 2 * size(case.args[0]) * 7 / 8}


def test_chunks_of_queries_gather_keys_and_values() -> None:
    """And scatter their gradients."""
    case, found = sent("chunks")
    once = size(case.args[1:]) * 7 / 8
    assert found == {"all_gather": once, "reduce_scatter": once}


def test_order_is_known_everywhere_at_once() -> None:
    case, found = sent("ranks")
    assert found == {"all_gather": size(case.args) * 7 / 8}


def test_two_batches_are_joined_in_two_rounds() -> None:
    case, found = sent("views")
    assert found == {"permute": size(case.args) / DEVICES}


def test_few_examples_come_to_the_weights() -> None:
    """Nothing is exchanged between two layers."""
    assert set(sent("autoencoder")[1]) == {"all_gather", "reduce_scatter"}
