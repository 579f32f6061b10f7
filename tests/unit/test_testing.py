"""Assertions about communication: what they count, and what they say when they fail."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import spmd
from sharding import shard
from sharding.errors import ArgumentError, ArgumentTypeError
from spmd import golden, testing
from spmd.testing import (
    BudgetError,
    assert_collectives,
    assert_peak_memory,
    assert_same_plan,
    assert_sharding,
    assert_wire_bytes,
)
from tests.oracle import P, make_mesh

MESH = {"data": 2, "tensor": 4}
X, W1, W2 = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 256), (256, 1024), (1024, 256)))
REDUCED = 2 * (64 // 2) * 256 * 4 * 3 / 4  # bytes of one all-reduce of the result over 4 devices


def mlp(x, w1, w2):
    return jax.nn.relu(x @ w1) @ w2


def line_of(text: str) -> str:
    """`test_testing.py:12`, of a line of this file."""
    lines = pathlib.Path(__file__).read_text().splitlines()
    return f"unit/test_testing.py:{next(i for i, s in enumerate(lines, 1) if text in s)}"


@pytest.fixture
def step():
    return spmd.jit(mlp, mesh=MESH, in_shardings=(P("data"), P(None, "tensor"), None))


def failure(assertion, *args, **kwargs) -> str:
    with pytest.raises(BudgetError) as caught:
        assertion(*args, **kwargs)
    assert isinstance(caught.value, AssertionError)
    return str(caught.value)


def test_counts_by_kind(step):
    assert_collectives(step, X, W1, W2, all_reduce=1, all_gather=0, others=0)
    assert_collectives(step, X, W1, W2, others=1)
    assert_collectives(step, X, W1, W2)  # nothing is said of any kind


def test_the_failure_of_a_count_shows_lines(step):
    text = failure(assert_collectives, step, X, W1, W2, all_reduce=0, all_gather=2)
    assert text == (
        "2 problems\n"
        "(1) all_reduce: expected 0, got 1\n"
        f"  why: {line_of('jax.nn.relu(x @ w1)')} (mlp) all_reduce(tensor) x1 49,152 B\n"
        "  fix: annotate what lies between, or correct the number if the program is right\n"
        "(2) all_gather: expected 2, got 0\n"
        "  why: there is none; the program has all_reduce(tensor) x1 49,152 B\n"
        "  fix: annotate what lies between, or correct the number if the program is right"
    )
    text = failure(assert_collectives, step, X, W1, W2, others=0)
    assert text.startswith("others: expected 0, got 1\n")


def test_axes(step):
    assert_collectives(step, X, W1, W2, axis="tensor", all_reduce=1)
    assert_collectives(step, X, W1, W2, axis="data", all_reduce=0)
    text = failure(assert_collectives, step, X, W1, W2, axis="data", all_reduce=1)
    assert text.startswith("all_reduce over data: expected 1, got 0\n")
    total = spmd.jit(jnp.sum, mesh=MESH, in_shardings=P("data", "tensor"))
    assert_collectives(total, X, axis="data", all_reduce=1)  # over both at once
    assert_collectives(total, X, axis=("tensor", "data"), all_reduce=1)
    assert_collectives(total, X, axis=("data",), all_reduce=0)
    with pytest.raises(ArgumentError, match=r"axis 'dta'\n.*did you mean 'data'"):
        assert_collectives(total, X, axis="dta", all_reduce=1)


def test_loops_count_every_iteration():
    def f(x, w):
        return lax.scan(lambda c, _: (shard(jnp.tanh(c @ w), "data"), None), x, None, length=5)[0]

    square = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    step = spmd.jit(f, mesh=MESH, in_shardings=(P("data"), P("tensor", None)))
    found = testing.collectives_of(step, X, square)
    assert_collectives(step, X, square, all_reduce=5)
    assert {c.kind: c.count for c in found}["all_reduce"] == 5


def test_wire_bytes(step):
    assert_wire_bytes(step, X, W1, W2, at_most=REDUCED)
    assert_wire_bytes(step, X, W1, W2, exactly=REDUCED, kind="all_reduce", axis="tensor")
    assert_wire_bytes(step, X, W1, W2, axis="data", exactly=0)
    text = failure(assert_wire_bytes, step, X, W1, W2, at_most=REDUCED - 1, axis="tensor")
    assert text == (
        "wire bytes over tensor: expected at most 49,151 B, got 49,152 B\n"
        f"  why: {line_of('jax.nn.relu(x @ w1)')} (mlp) all_reduce(tensor) x1 49,152 B\n"
        "  fix: annotate what lies between, or correct the budget if the program is right"
    )
    text = failure(assert_wire_bytes, step, X, W1, W2, exactly=1, kind="permute")
    assert text.startswith("permute: expected exactly 1 B, got 0 B\n  why: nothing is sent\n")


def test_every_stage(step):
    traced = step.trace(X, W1, W2)
    for stage in (traced, traced.propagate(), traced.propagate().partition()):
        assert_collectives(stage, all_reduce=1)
    with pytest.raises(ArgumentError, match="arguments beside a Traced"):
        assert_collectives(traced, X, all_reduce=1)
    with pytest.raises(ArgumentTypeError, match="a function\n"):
        assert_collectives(mlp, all_reduce=1)


def test_keyword_arguments_of_the_function():
    step = spmd.jit(lambda x, *, n: x.sum() * n, mesh=MESH, in_shardings=P("data"))
    assert_collectives(step, X, kwargs={"n": 2.0}, all_reduce=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: assert_collectives(s, all_reduces=1), "'all_reduces' is no kind.*\n.*'all_red"),
        (lambda s: assert_collectives(s, source="xla"), "source='xla'"),
        (lambda s: assert_peak_memory(s, at_most=1, source="xla"), "source='xla'"),
        (lambda s: assert_wire_bytes(s), "no budget"),
        (lambda s: assert_wire_bytes(s, at_most=1, exactly=1), "at_most and exactly"),
        (lambda s: assert_wire_bytes(s, at_most=1, kind="gather"), "'gather' is no kind"),
    ],
)
def test_misuse(step, call, message):
    with pytest.raises(ArgumentError, match=message):
        call(step.trace(X, W1, W2))


def test_peak_memory(step):
    partitioned = step.trace(X, W1, W2).propagate().partition()
    assert_peak_memory(step, X, W1, W2, at_most=partitioned.peak_memory)
    text = failure(assert_peak_memory, step, X, W1, W2, at_most=partitioned.peak_memory - 1)
    assert re.match(r"peak memory per device: expected at most [\d,]+ B, got [\d,]+ B\n", text)


def test_shardings_of_arrays_and_results():
    mesh = make_mesh(**MESH)
    x = jax.device_put(jnp.ones((8, 8)), jax.sharding.NamedSharding(mesh, P("data")))
    assert_sharding(x, P("data"))
    assert_sharding(x, P("data", None))
    assert_sharding({"a": x, "b": [x, x]}, {"a": P("data"), "b": P("data")})
    assert_sharding((x, 1.0), (P("data"), None))
    assert_sharding(x.sharding, P("data"))
    text = failure(assert_sharding, {"a": x, "b": x}, {"a": P("data"), "b": P(None, "tensor")})
    assert text == (
        "['b']: expected P(None, 'tensor'), got P('data',)\n"
        "  why: the mesh is {'data': 2, 'tensor': 4}\n"
        "  fix: say where it lies with in_shardings, out_shardings or shard(...)"
    )
    text = failure(assert_sharding, jnp.ones(3), P("data"))
    assert text.startswith("the array: expected P('data',), got SingleDeviceSharding(")


def test_shardings_of_stages(step):
    propagated = step.trace(X, W1, W2).propagate()
    assert_sharding(propagated, P("data"))
    assert_sharding(propagated.partition(), P("data", None))
    assert_sharding(propagated.in_shardings, (P("data"), P(None, "tensor"), P("tensor")))
    failure(assert_sharding, propagated, P("tensor"))


def test_golden_plans(step, tmp_path):
    path = tmp_path / "deep" / "mlp.txt"
    text = failure(assert_same_plan, step, X, W1, W2, path=path)
    assert text.startswith("mlp.txt does not exist\n") and "--update-golden" in text
    assert_same_plan(step, X, W1, W2, path=path, update=True)
    assert_same_plan(step, X, W1, W2, path=path, update=False)
    assert ".py" not in path.read_text() and "all_reduce(tensor) 49,152 B" in path.read_text()
    other = spmd.jit(mlp, mesh=MESH, in_shardings=(P("data"), P("tensor"), None))
    text = failure(assert_same_plan, other, X, W1, W2, path=path)
    added = [line for line in text.splitlines() if line.lstrip().startswith("+ ")]
    assert any(line_of("jax.nn.relu(x @ w1)") in line for line in added), text
    assert "- %3 [data, tensor] = dot_general(x [data, -], w1 [-, tensor])" in text


def test_golden_files_are_beside_the_test_and_follow_the_option(step, monkeypatch, tmp_path):
    monkeypatch.setattr(golden, "_calling_folder", lambda: tmp_path)
    monkeypatch.setattr(golden, "update_by_default", True)
    assert_same_plan(step, X, W1, W2, path="mlp.txt")
    assert (tmp_path / "mlp.txt").exists()
    monkeypatch.setattr(golden, "update_by_default", None)
    monkeypatch.setenv("SPMD_UPDATE_GOLDEN", "1")
    (tmp_path / "mlp.txt").unlink()
    assert_same_plan(step, X, W1, W2, path="mlp.txt")
    assert (tmp_path / "mlp.txt").exists()


def test_a_relative_path_is_from_the_folder_of_the_caller():
    assert golden._calling_folder().name == "unit"
