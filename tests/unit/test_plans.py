"""Plans as data: readable goldens, and a verifier that finds every planted fault."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

import spmd
from sharding import Layout, P, VerificationError, shard
from spmd.partition.plan import Compute, Key, Move, ProgramPlan
from spmd.partition.verify import verify

MESH = AbstractMesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def block(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """One scanned feed-forward layer with remat."""
    def layer(x, w):
        h = jax.nn.relu(x @ w["up"])
        return shard(x + h @ w["down"], "data"), None

    x, _ = jax.lax.scan(jax.checkpoint(layer), x, params)
    return (x**2).sum()


def stages() -> tuple[Any, Any, Any]:
    params = {
        "up": jax.ShapeDtypeStruct((3, 16, 32), jnp.float32),
        "down": jax.ShapeDtypeStruct((3, 32, 16), jnp.float32),
    }
    specs = ({"up": P(None, None, "tensor"), "down": P(None, "tensor")}, P("data"))
    function = spmd.jit(jax.value_and_grad(block), mesh=MESH, in_shardings=specs)
    traced = function.trace(params, jax.ShapeDtypeStruct((8, 16), jnp.float32))
    propagated = traced.propagate()
    return traced, propagated, propagated.partition()


@pytest.mark.parametrize("stage", ["traced", "propagated", "partitioned"])
def test_stages_read_as_they_did(golden: Any, stage: str) -> None:
    at = ["traced", "propagated", "partitioned"].index(stage)
    golden.check(f"feed_forward_{stage}", str(stages()[at]))


def broken(plan: ProgramPlan, at: int, instruction: Any) -> ProgramPlan:
    code = list(plan.body.code)
    code[at] = instruction
    return replace(plan, body=replace(plan.body, code=tuple(code)))


def simple_plan() -> ProgramPlan:
    def f(x, w):
        return jnp.exp(x @ w) + 1

    structs = (jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 4), "float32"))
    specs = (P(None, "tensor"), P("tensor"))
    traced = spmd.jit(f, mesh=MESH, in_shardings=specs).trace(*structs)
    return traced.propagate().partition().plan


def find(plan: ProgramPlan, kind: type, name: str = "") -> tuple[int, Any]:
    return next(
        (i, x) for i, x in enumerate(plan.body.code)
        if isinstance(x, kind) and (kind is Move or x.op.primitive.name == name)
    )  # fmt: skip


def test_a_sound_plan_passes() -> None:
    verify(simple_plan())


def test_a_dropped_reduction_is_found() -> None:
    plan = simple_plan()
    at, exp = find(plan, Compute, "exp")
    partial = Layout(exp.operands[0].layout.dims, (("tensor", "add"),))
    planted = replace(exp, operands=(Key(exp.operands[0].value, partial),))
    with pytest.raises(VerificationError, match="is read by exp"):
        verify(broken(plan, at, planted))


def test_a_result_that_hides_its_partial_axes_is_found() -> None:
    plan = simple_plan()
    at, dot = find(plan, Compute, "dot_general")
    whole = Layout(dot.results[0].layout.dims)
    planted = replace(dot, results=(Key(dot.results[0].value, whole),))
    with pytest.raises(VerificationError, match="is made as"):
        verify(broken(plan, at, planted))


def test_a_move_that_ends_elsewhere_is_found() -> None:
    plan = simple_plan()
    at, move = find(plan, Move)
    planted = replace(move, plan=move.plan._replace(steps=()))
    with pytest.raises(VerificationError, match="ends as"):
        verify(broken(plan, at, planted))


def test_a_read_of_what_nothing_made_is_found() -> None:
    plan = simple_plan()
    at, exp = find(plan, Compute, "exp")
    other = Layout((("data",), ()))
    planted = replace(exp, operands=(Key(exp.operands[0].value, other),))
    with pytest.raises(VerificationError, match="nothing made it in that layout"):
        verify(broken(plan, at, planted))


def test_an_axis_used_twice_is_found() -> None:
    plan = simple_plan()
    at, exp = find(plan, Compute, "exp")
    twice = Layout((("data",), ("data",)))
    planted = replace(exp, results=(Key(exp.results[0].value, twice),))
    with pytest.raises(VerificationError, match="uses axes"):
        verify(broken(plan, at, planted))


def summed_plan() -> ProgramPlan:
    """A loop that carries a partial sum."""
    def f(w, xs):
        step = lambda total, x: (total + jnp.tanh(x @ w).T @ x, None)  # noqa: E731
        return jax.lax.scan(step, jnp.zeros((4, 16)), xs)[0]

    shapes = (16, 4), (6, 64, 16)
    structs = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    traced = spmd.jit(f, mesh=MESH, in_shardings=(P(), P(None, "tensor"))).trace(*structs)
    return traced.propagate().partition().plan


def test_a_sum_that_a_loop_carries_is_sound() -> None:
    plan = summed_plan()
    _, scan = find(plan, Compute, "scan")
    assert scan.results[0].layout.partial == (("tensor", "add"),)
    verify(plan)


def test_a_sum_that_a_loop_does_not_keep_is_found() -> None:
    plan = summed_plan()
    at, scan = find(plan, Compute, "scan")
    (body,) = scan.regions
    whole = Layout(((), ()))
    ends = replace(body, outputs=(Key(body.outputs[0].value, whole),))
    with pytest.raises(VerificationError, match="enters a region"):
        verify(broken(plan, at, replace(scan, regions=(ends,))))
    starts = replace(body, inputs=tuple(whole if x.partial else x for x in body.inputs))
    results = (Key(scan.results[0].value, whole),)
    with pytest.raises(VerificationError, match="leaves a region"):
        verify(broken(plan, at, replace(scan, regions=(starts,), results=results)))
