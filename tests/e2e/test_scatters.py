"""Reduce-scatters in parts: the values of whole ones, and as many bytes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spmd
from sharding import P
from spmd.collectives import summarize
from spmd.estimate.work import lines, totals
from spmd.partition.scatters import split_scatters
from tests.oracle import make_mesh


def gradient(w: Any, x: Any) -> Any:
    return jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w) ** 2))(w)


def staged(mesh: Any, rows: int = 16) -> tuple[spmd.Partitioned, tuple[Any, Any]]:
    rng = np.random.default_rng(0)
    args = rng.standard_normal((rows, 24)), rng.standard_normal((256, rows))
    args = tuple(np.asarray(a * 0.1, np.float32) for a in args)
    axes = tuple(mesh.axis_names)
    function = spmd.jit(
        gradient, mesh=mesh, in_shardings=(P(), P(axes)), out_shardings=P(axes[-1])
    )  # fmt: skip
    return function.trace(*args).propagate().partition(), args


@pytest.mark.parametrize("devices, parts", [(4, 2), (6, 2), (8, 2), (7, 1), (2, 1)])
def test_parts_give_what_the_whole_gives(devices: int, parts: int) -> None:
    whole, args = staged(make_mesh(x=devices), rows=2 * devices)
    split = dataclasses.replace(whole, plan=split_scatters(whole.plan))
    (before,) = summarize(whole.collectives)
    (after,) = summarize(split.collectives)
    assert (before.kind, before.count) == ("reduce_scatter", 1)
    assert (after.kind, after.count) == ("reduce_scatter", parts)
    assert after.bytes == pytest.approx(before.bytes)
    want = gradient(*args)
    for stage in (whole, split):
        found = stage.lower().compile()(*jax.device_put(args, stage.in_shardings))
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def test_a_scatter_among_some_devices_stays_whole() -> None:
    whole, _ = staged(make_mesh(x=2, y=4))
    assert split_scatters(whole.plan) == whole.plan


def test_estimates_count_the_parts() -> None:
    whole, _ = staged(make_mesh(x=8))
    plans = whole.plan, split_scatters(whole.plan)
    found = [totals(lines(plan))["reduce_scatter", ("x",)] for plan in plans]
    assert [count for count, _ in found] == [1, 2] and found[0][1] == found[1][1]
