"""Axes of size 1 shard nothing: they cost no collectives, and shardings still name them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import spmd
from benchmarks.suite import registry
from benchmarks.suite.case import RUNS
from benchmarks.suite.targets import on_one
from sharding import shard
from spmd.reporting.hlo import collectives_in_hlo
from tests.oracle import check, kinds, make_mesh

PROGRAMS = ("decode", "experts", "graph", "recurrence", "lstm", "uneven_heads", "cnn", "unet_2d")


def arr(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_on_one_device_has_no_collectives(name: str) -> None:
    (program,) = registry.matching(f"^{name}$")
    case = program.make(RUNS)
    partitioned = spmd.jit(
        case.fun, mesh=on_one(case.mesh), axis_rules=case.axis_rules,
        in_shardings=case.in_specs, out_shardings=case.out_specs,
    ).trace(*case.args).propagate().partition()  # fmt: skip
    assert kinds(partitioned) == {}
    assert collectives_in_hlo(partitioned.lower().compile().as_text()) == ()


def step(w: Any, x: Any) -> Any:
    def loss(w: Any) -> Any:
        def layer(h: Any, up: Any) -> Any:
            return shard(jnp.tanh(h @ up), "data", "tensor"), h.sum()

        h, sums = jax.lax.scan(layer, x, w)
        return jnp.mean(h**2) + sums.sum()

    value, grad = jax.value_and_grad(loss)(w)
    return value, jax.tree.map(lambda p, g: p - g, w, grad)


@pytest.mark.parametrize("sizes", [dict(data=1, tensor=4), dict(data=4, tensor=1)])
def test_what_the_other_axis_costs_is_what_it_costs_alone(sizes: dict[str, int]) -> None:
    w, x = arr(3, 8, 8), arr(12, 8)
    specs = (P(None, None, "tensor"), P("data", "tensor"))
    both = check(step, (w, x), make_mesh(**sizes), specs, (P(), specs[0]))
    (left,) = (axis for axis, size in sizes.items() if size > 1)
    alone = spmd.jit(
        step, mesh=make_mesh(**{left: 4, "one": 1}), in_shardings=_only(left, specs),
        out_shardings=(P(), *_only(left, specs[:1])), axis_rules={"data": None, "tensor": None}
        | {left: left},
    )  # fmt: skip
    expected = kinds(alone.trace(w, x).propagate().partition())
    assert kinds(both) == expected
    assert {axes for _, axes in kinds(both)} == {(left,)}


def _only(axis: str, specs: Any) -> Any:
    return tuple(P(*(entry if entry == axis else None for entry in spec)) for spec in specs)


def test_shardings_name_them() -> None:
    mesh = make_mesh(data=1, tensor=4)
    fun = spmd.jit(lambda x: x * 2, mesh=mesh, in_shardings=P("data", "tensor"))
    out = fun(arr(4, 8))
    assert out.sharding.spec == P("data", "tensor")
    assert fun.trace(arr(4, 8)).propagate().out_shardings.spec == P("data", "tensor")


def test_manual_regions_and_sub_axes() -> None:
    mesh = make_mesh(data=1, tensor=4)

    def fun(x: Any) -> Any:
        local = jax.shard_map(
            lambda y: jax.lax.psum(y + jax.lax.axis_index("data"), "data"),
            mesh=mesh, in_specs=P("data"), out_specs=P(), axis_names={"data"},
        )  # fmt: skip
        y = local(x).reshape(2, 4, 6)  # tensor is split into two sub-axes
        return y.sum(0), y

    check(fun, (arr(8, 6),), mesh, (P(("data", "tensor")),), (P("data"), P("data", "tensor")))
