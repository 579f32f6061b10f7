"""Budgets of our program and of what XLA compiled agree; the pytest plugin, run by pytest."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import spmd
from models.shardings import rules_for
from spmd.collectives import summarize
from spmd.testing import (
    BudgetError,
    assert_collectives,
    assert_peak_memory,
    assert_wire_bytes,
    collectives_of,
)
from tests.e2e.test_parallelism import CONFIG, PARALLELISMS, loss_of, problem
from tests.oracle import P, make_mesh

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("parallelism", PARALLELISMS)
@pytest.mark.parametrize(
    "mesh", [{"data": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str
)
def test_our_program_and_the_compiled_one_send_the_same_bytes(parallelism, mesh):
    """By kind and axes, in number and to the byte, unless small ones are combined. XLA combines
    all-reduces, and one of several operands counts as several. It merges equal instructions too: of
    2d over data=2, tensor=4 one all-gather of 1,024 B, which the plan makes twice."""
    params, tokens, _ = problem(CONFIG)

    def planned(*off: str) -> spmd.Partitioned:
        step = spmd.jit(
            jax.value_and_grad(functools.partial(loss_of, CONFIG)), mesh=make_mesh(**mesh),
            axis_rules=rules_for(parallelism, mesh), disable_passes=off,
        )  # fmt: skip
        return step.trace(params, tokens).propagate().partition()

    partitioned = planned("combine_small")
    compiled = partitioned.lower().compile()
    combined = collectives_of(planned().lower().compile(), source="hlo")
    assert_wire_bytes(compiled, exactly=sum(c.bytes for c in combined), source="hlo")
    ours = {c[:2]: c[2:4] for c in summarize(collectives_of(partitioned))}
    theirs = {c[:2]: c[2:4] for c in summarize(collectives_of(compiled, source="hlo"))}
    if parallelism == "2d" and mesh == {"data": 2, "tensor": 4}:
        count, sent = ours["all_gather", ("data",)]
        ours["all_gather", ("data",)] = (count - 1, sent - 1024)
    assert ours == theirs and ours
    sent = sum(wire for _, wire in theirs.values())
    assert_wire_bytes(compiled, exactly=sent, source="hlo")
    with pytest.raises(BudgetError, match="expected at most"):
        assert_wire_bytes(compiled, at_most=sent - 1, source="hlo")


def test_assertions_on_compiled_programs():
    mesh = make_mesh(data=2, tensor=4)
    specs = (P("data", "tensor"), None)
    step = spmd.jit(lambda x, w: jnp.tanh(x @ w), mesh=mesh, in_shardings=specs)
    x, w = jnp.ones((8, 16)), jnp.ones((16, 32))
    compiled = step.lower(x, w).compile()
    for source in ("program", "hlo"):
        assert_collectives(compiled, all_reduce=1, others=0, axis="tensor", source=source)
        assert_collectives(step, x, w, all_reduce=1, source=source)
        assert_peak_memory(compiled, at_most=10**6, source=source)
    # 8 x 16 over 8, 16 x 32 over 4, 8 x 32 over 2, in float32: what every device has at least
    least = 8 * 16 // 8 * 4 + 16 * 32 // 4 * 4 + 8 * 32 // 2 * 4
    with pytest.raises(BudgetError, match="arguments 576 B, results 512 B"):
        assert_peak_memory(compiled, at_most=least - 1, source="hlo")


TEST = """
import jax, jax.numpy as jnp
import spmd
from jax.sharding import PartitionSpec as P
from spmd.testing import assert_collectives, assert_same_plan

def test_budget(spmd_mesh, simulated_devices):
    assert len(simulated_devices) == 4
    step = spmd.jit(jnp.sum, mesh=spmd_mesh(tensor=4), in_shardings=P("tensor"))
    assert float(step(jnp.ones(8))) == 8
    assert_collectives(step, jnp.ones(8), all_reduce=1)
    assert_same_plan(step, jnp.ones(8), path="golden/sum.txt")

def test_too_large(spmd_mesh):
    spmd_mesh(tensor=16)
"""
OPTION = """
def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="of the project itself")
"""


def run_pytest(folder: pathlib.Path, *options: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment = {k: v for k, v in environment.items() if k not in ("XLA_FLAGS", "NPROC")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "."]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    return done.stdout + done.stderr


LOADED = 'pytest_plugins = ["spmd.pytest_plugin"]' + OPTION


@pytest.mark.parametrize("conftest", ["", OPTION, LOADED], ids=["early", "with option", "loaded"])
def test_the_plugin(tmp_path, conftest):
    """Loaded early, as installed plugins are; with a project that has such an option of its own;
    and loaded by a conftest.py."""
    (tmp_path / "test_sum.py").write_text(TEST)
    (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "pytest.ini").write_text("[pytest]\nspmd_devices = 4\n")
    early = [] if "pytest_plugins" in conftest else ["-p", "spmd.pytest_plugin"]
    written = run_pytest(tmp_path, *early, "--update-golden")
    assert "1 failed, 1 passed" in written, written
    assert "needs 16 devices, and there are 4: run pytest with --spmd-devices=16" in written
    golden = tmp_path / "golden" / "sum.txt"
    assert "all_reduce(tensor) x1 6 B" in golden.read_text()
    golden.write_text(golden.read_text().replace("x1 6 B", "x1 7 B"))
    compared = run_pytest(tmp_path, *early, "-k", "budget", "--spmd-devices=4")
    assert "BudgetError: the program is not that of sum.txt" in compared, compared
