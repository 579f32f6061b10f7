"""Products that are only transposed are reduced after that: the values, and the bytes, stay."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
import spmd
from sharding import P
from spmd.chips import CHIPS
from spmd.collectives import summarize
from spmd.partition.plan import Compute, Move, ProgramPlan
from spmd.partition.transposed import reduce_transposed
from spmd.partition.verify import verify
from tests.oracle import make_mesh

RNG = np.random.default_rng(0)


def gradient(w: Any, x: Any) -> Any:
    return jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w) ** 2))(w)


def in_a_loop(w: Any, x: Any) -> Any:
    """Of stacked weights, a layer per step: products and transpositions are inside."""

    def layer(y: Any, u: Any) -> tuple[Any, None]:
        return jnp.tanh(y @ u), None

    return jax.grad(lambda w: jnp.sum(jax.lax.scan(layer, x, w)[0]))(w)


def read_twice(w: Any, x: Any) -> Any:
    product = x.T @ w
    return product.T, product * 2


def not_a_sum(w: Any, x: Any) -> Any:
    return jnp.max(x[:, :, None] * w[None, :, :], axis=0).T


def staged(fun: Any, shapes: Any, mesh: Any, ins: Any, outs: Any) -> tuple[spmd.Partitioned, Any]:
    args = tuple(RNG.standard_normal(s).astype(np.float32) / 4 for s in shapes)
    function = spmd.jit(fun, mesh=mesh, in_shardings=ins, out_shardings=outs)
    return function.trace(*args).propagate().partition(), args


def late(whole: spmd.Partitioned) -> spmd.Partitioned:
    plan = reduce_transposed(whole.plan)
    verify(plan)
    return dataclasses.replace(whole, plan=plan)


def order(plan: ProgramPlan) -> list[str]:
    """What reduces, and what transposes."""
    found = []
    for one, _ in plan.body.walk():
        if isinstance(one, Move):
            found += [s.kind for s in one.plan.steps if s.kind in ("all_reduce", "reduce_scatter")]
        elif isinstance(one, Compute) and one.op.primitive.name == "transpose":
            found.append("transpose")
    return found


def compare(whole: spmd.Partitioned, args: Any, want: Any) -> None:
    for stage in (whole, late(whole)):
        found = stage.lower().compile()(*jax.device_put(args, stage.in_shardings))
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("out, kind", [
    (P(), "all_reduce"), (P("x"), "reduce_scatter"), (P(None, "x"), "reduce_scatter"),
])  # fmt: skip
@pytest.mark.parametrize("rows, columns", [(24, 16), (7, 9)])
def test_gradients_of_weights(out: P, kind: str, rows: int, columns: int) -> None:
    shapes = (rows, columns), (32, rows)
    whole, args = staged(gradient, shapes, make_mesh(x=4, y=2), (P(), P("x")), out)
    assert order(whole.plan) == [kind, "transpose"]
    assert order(late(whole).plan) == ["transpose", kind]
    before, after = (
        [(c.kind, c.count, c.bytes) for c in summarize(stage.collectives)]
        for stage in (whole, late(whole))
    )
    assert before == after
    compare(whole, args, gradient(*args))


def test_two_axes_and_loops() -> None:
    mesh = make_mesh(x=2, y=4)
    ins, out = (P(None, None, "y"), P("x")), P(None, "x", "y")
    whole, args = staged(in_a_loop, ((3, 16, 16), (8, 16)), mesh, ins, out)
    changed = order(late(whole).plan)
    assert "transpose" in changed and changed != order(whole.plan)
    compare(whole, args, in_a_loop(*args))


@pytest.mark.parametrize("fun, shapes, ins", [
    (read_twice, ((32, 8), (32, 24)), (P("x"), P("x"))),
    (not_a_sum, ((24, 8), (32, 24)), (P(), P("x"))),
])  # fmt: skip
def test_others_stay(fun: Any, shapes: Any, ins: Any) -> None:
    whole, _ = staged(fun, shapes, make_mesh(x=4), ins, P())
    assert {"all_reduce", "transpose"} <= {*order(whole.plan)}
    assert reduce_transposed(whole.plan) == whole.plan


@pytest.mark.parametrize("family, changed", [("cpu", False), ("gpu", False), ("tpu", True)])
@pytest.mark.parametrize("off", [(), ("transposed_sums",)])
def test_for_compilers_that_merge_products_with_transpositions(
    family: str, changed: bool, off: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHIPS, "cpu", dataclasses.replace(CHIPS["cpu"], family=family))
    function = spmd.jit(gradient, mesh=make_mesh(x=4), in_shardings=(P(), P("x")),
                        out_shardings=P(), disable_passes=off)  # fmt: skip
    args = np.ones((24, 16), np.float32), np.ones((32, 24), np.float32)
    plan = function.trace(*args).propagate().partition().plan
    assert order(plan) == (
        ["transpose", "all_reduce"] if changed and not off else ["all_reduce", "transpose"]
    )


@sharding.rule("a b -> b a")
def exponential(x: Any) -> Any:
    return jnp.exp(x.T)


@sharding.rule("a b -> b a", fixed="a")
def normalised(x: Any) -> Any:
    return (x / jnp.linalg.norm(x, axis=0, keepdims=True)).T


@pytest.mark.parametrize("fun, place", [(exponential, P(None, "x")), (normalised, P("y", "x"))])
def test_what_is_not_linear_reads_the_sum(fun: Any, place: P) -> None:
    """Functions under `sharding.rule` that permute dims, and do more than that."""
    whole, _ = staged(lambda x, w: fun(x @ w), ((16, 32), (32, 24)), make_mesh(x=4, y=2),
                      (place, P("x")), P())  # fmt: skip
    assert "all_reduce" in order(whole.plan)
    assert reduce_transposed(whole.plan) == whole.plan
