"""Axes that cannot stay since others have moved: a second look, and the better of both plans."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import spmd
from sharding import P
from spmd.partition import moved, planner
from tests.oracle import check, kinds, make_mesh

MESH = make_mesh(data=2, model=4)
BATCH, LENGTH, WIDTH, STATE = 8, 128, 64, 8
RNG = np.random.default_rng(0)


def arr(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


SIZES = {"in": WIDTH, "step": WIDTH, "b": STATE, "c": STATE, "decay": STATE, "out": WIDTH}
WEIGHTS, X = {name: arr(WIDTH, n) for name, n in SIZES.items()}, arr(BATCH, LENGTH, WIDTH)


def loss(p: Any, x: Any) -> Any:
    """A selective state space, as Mamba has it, whose positions are sharded."""

    def step(h: Any, row: Any) -> Any:
        u, dt, b, c = row
        h = jnp.exp(-dt[..., None] * p["decay"] ** 2) * h + (dt * u)[..., None] * b[:, None]
        return h, (h * c[:, None]).sum(-1)

    rows = x @ p["in"], jax.nn.softplus(x @ p["step"]), x @ p["b"], x @ p["c"]
    start = jnp.zeros((BATCH, WIDTH, STATE))
    _, y = lax.scan(step, start, tuple(row.swapaxes(0, 1) for row in rows))
    return ((y.swapaxes(0, 1) @ p["out"]) ** 2).mean()


PLACES = P(), P("data", "model")


def plan() -> spmd.Partitioned:
    function = spmd.jit(jax.grad(loss), mesh=MESH, in_shardings=PLACES, out_shardings=P())
    return function.trace(WEIGHTS, X).propagate().partition()


def test_where_one_has_moved_another_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scan runs by other dims; then its products had better, too, and no gather is left of
    what each position has."""
    planned = check(jax.grad(loss), (WEIGHTS, X), MESH, PLACES, P())
    assert ("all_gather", ("model",)) not in kinds(planned)
    monkeypatch.setattr(moved, "ROUNDS", 1)
    assert planned.wire_bytes < 0.5 * plan().wire_bytes


def test_of_both_plans_the_one_that_sends_less(monkeypatch: pytest.MonkeyPatch) -> None:
    real = moved.spent
    with monkeypatch.context() as patch:
        patch.setattr(planner, "spent", lambda *args, **how: -real(*args, **how))
        worse = str(plan().plan)
    assert worse != str(plan().plan)
    monkeypatch.setattr(moved, "ROUNDS", 1)
    assert worse == str(plan().plan)
