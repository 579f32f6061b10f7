"""`spmd.check` finds planted faults at exactly the operation that has them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import spmd
from sharding import shard
from spmd.partition import apply, interpret, local
from spmd.partition.plan import Compute, Move, RegionPlan
from spmd.partition.reshard import Plan
from tests.oracle import P, make_mesh

MESH = {"data": 2, "tensor": 4}
X = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
UP = np.random.default_rng(1).normal(size=(8, 16)).astype(np.float32)
DOWN = np.random.default_rng(2).normal(size=(16, 8)).astype(np.float32)
SPECS = (P("data"), P(None, "tensor"), P("tensor"))


def block(x, up, down):
    hidden = jnp.tanh(x @ up)
    return x + hidden @ down  # the sum over tensor is made here


def plain(x, up, down):
    return jnp.sin(block(x, up, down)).sum()


def scanned(x, up, down):
    return lax.scan(lambda c, _: (block(c, up, down), c.sum()), x, None, length=3)


def branched(x, up, down):
    return lax.cond(x.sum() > -1e9, lambda c: block(c, up, down), jnp.sin, x)


def rematerialised(x, up, down):
    return jax.checkpoint(block)(x, up, down) * 2


def looped(x, up, down):
    return lax.fori_loop(0, 2, lambda i, c: block(c, up, down), x)


def nested(x, up, down):
    def body(c, _):
        return lax.cond(c.sum() > 1e9, jnp.cos, jax.checkpoint(lambda c: block(c, up, down)), c), c

    return lax.scan(body, x, None, length=2)


@jax.custom_vjp
def project(h, down):
    return h @ down


project.defvjp(
    lambda h, down: (project(h, down), (h, down)),
    lambda saved, g: (g @ saved[1].T, saved[0].T @ g),
)


def differentiated(x, up, down):
    def loss(x):
        return jnp.sum(project(jnp.tanh(x @ up), down) ** 2)

    return jax.value_and_grad(loss)(x)


PROGRAMS = [plain, scanned, branched, rematerialised, looped, nested, differentiated]


def partition(fun: Callable, *args: Any, specs: Any = SPECS, **mesh: int) -> spmd.Partitioned:
    function = spmd.jit(fun, mesh=make_mesh(**(mesh or MESH)), in_shardings=specs)
    return function.trace(*args).propagate().partition()


def edited(region: RegionPlan, change: Callable[[Any], Any]) -> RegionPlan:
    """The plan with every instruction replaced by `change(instruction)`."""
    code = []
    for one in region.code:
        if isinstance(one, Compute) and one.regions:
            inner = tuple(edited(r, change) for r in one.regions)
            one = dataclasses.replace(one, regions=inner)
        code.append(change(one))
    return dataclasses.replace(region, code=tuple(code))


def planted(partitioned: spmd.Partitioned, change: Callable[[Any], Any]) -> spmd.Partitioned:
    plan = dataclasses.replace(partitioned.plan, body=edited(partitioned.plan.body, change))
    return dataclasses.replace(partitioned, plan=plan)


def reductions(partitioned: spmd.Partitioned) -> list[Move]:
    moves = [one for one, _ in partitioned.plan.body.walk() if isinstance(one, Move)]
    return [m for m in moves if any(s.kind == "all_reduce" for s in m.plan.steps)]


def found(partitioned: spmd.Partitioned, *args: Any) -> spmd.CheckReport:
    return spmd.check(partitioned, *args, raise_on_error=False)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_right_program_is_right_in_every_operation(program):
    report = spmd.check(program, X, UP, DOWN, mesh=make_mesh(**MESH), in_shardings=SPECS)
    assert report.ok and report.first is None and report.results == ()
    assert report.operations >= 5
    assert str(report).startswith(f"ok: {report.operations} operations on data=2, tensor=4 give")


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_dropped_reduction_is_found_where_it_was_dropped(program):
    partitioned = partition(program, X, UP, DOWN)
    moves = reductions(partitioned)
    assert moves
    for target in moves:
        wrong = dataclasses.replace(target, plan=Plan((), 0.0))
        change = lambda one, t=target, w=wrong: w if one is t else one  # noqa: E731
        report = found(planted(partitioned, change), X, UP, DOWN)
        assert not report.ok
        assert report.first.instruction == wrong, f"{target.value}\n{report}"


@pytest.mark.parametrize(
    ("program", "where"),
    [
        (scanned, ("scan, iteration 0",)),
        (branched, ("cond, branch 1",)),
        (rematerialised, ("remat2",)),
        (nested, ("scan, iteration 0", "cond, branch 0", "remat2")),
    ],
)
def test_the_place_names_loops_iterations_branches_and_calls(program, where):
    partitioned = partition(program, X, UP, DOWN)
    (target,) = [m for m in reductions(partitioned) if m.reason and "(block)" in m.reason.source]
    wrong = dataclasses.replace(target, plan=Plan((), 0.0))
    faulty = planted(partitioned, lambda one: wrong if one is target else one)
    first = found(faulty, X, UP, DOWN).first
    assert first.operation == "reshard" and "(block)" in first.source
    places = [p.split(" at ")[0] + p.partition(")")[2] for p in first.where]
    assert [p.replace("checkpoint", "remat2") for p in places] == list(where)


def test_the_iteration_is_the_first_that_is_wrong():
    def steps(x, ys):
        def step(c, y):  # each step reads the sum: it is reduced there
            return jnp.abs(c) + jnp.tanh(y @ x).sum(), None

        return lax.scan(step, jnp.float32(0), ys)[0]

    ys = np.zeros((4, 8), np.float32)
    ys[2:] = 1  # before that the sums are of zeros
    partitioned = partition(steps, X.T, ys, specs=(P(None, "tensor"), None))
    # one target: what is summed in the body
    (target,) = [m for m in reductions(partitioned) if m.reason is not None]
    wrong = dataclasses.replace(target, plan=Plan((), 0.0))
    faulty = planted(partitioned, lambda one: wrong if one is target else one)
    assert found(faulty, X.T, ys).first.where[0].endswith("iteration 2")
    partly = spmd.check(faulty, X.T, ys, raise_on_error=False, iterations=2)
    assert partly.first.operation == "scan"  # no iteration that was compared is wrong


def test_collectives_that_do_nothing_are_found_at_their_first_use(monkeypatch):
    monkeypatch.setitem(apply._APPLY, "all_reduce", lambda step, x, *rest: x)
    with pytest.raises(spmd.CheckError) as caught:
        spmd.check(plain, X, UP, DOWN, mesh=make_mesh(**MESH), in_shardings=SPECS)
    first = caught.value.report.first
    assert first.operation == "all_reduce(tensor)" and first.op.primitive.name == "add"
    assert first.where == () and first.difference.wrong == 2 * 4 * X.size // 2


def test_a_wrong_slice_offset(monkeypatch):
    right = apply._APPLY["slice"]

    def shifted(step, x, before, shape, mesh):
        return right(step, jnp.roll(x, 1, step.dim), before, shape, mesh)

    monkeypatch.setitem(apply._APPLY, "slice", shifted)

    def sliced(x, y):
        return jnp.cos(shard(jnp.sin(y), "tensor") * 2) + x.sum()

    partitioned = partition(sliced, X, np.arange(8.0, dtype=np.float32), specs=(P("data"), P()))
    report = found(partitioned, X, np.arange(8.0, dtype=np.float32))
    assert report.first.operation == "slice(tensor)", str(report)


@pytest.mark.parametrize(("reduce", "name"), [(jnp.sum, "reduce_sum"), (jnp.max, "reduce_max")])
def test_a_wrong_mask(monkeypatch, reduce, name):
    monkeypatch.setattr(local.LocalView, "mask", lambda self, x, *rest: x)
    uneven = X[:3]
    partitioned = partition(
        lambda x: (jnp.sin(x), reduce(shard(jnp.exp(x), "data"), 0)), uneven, specs=(P(),)
    )
    report = found(partitioned, uneven)
    assert report.first.operation == name and report.first.error == np.inf


def test_a_wrong_halo(monkeypatch):
    right = local.fetch
    monkeypatch.setattr(
        local, "fetch",
        lambda x, dim, axes, size, starts, *rest: right(
            x, dim, axes, size, [s + 1 for s in starts], *rest
        ),
    )  # fmt: skip

    def smooth(x):
        y = jnp.tanh(x)
        return jnp.exp(y[1:] - y[:-1])

    x = np.linspace(0, 1, 64, dtype=np.float32)
    report = found(partition(smooth, x, specs=(P("tensor"),)), x)
    assert report.first.operation == "slice", str(report)
    assert report.first.op.params["start_indices"] == (1,)  # the first of the two


def test_a_wrong_local_function_of_one_of_two_equal_operations():
    def sums(x):
        return jnp.cumsum(jnp.sin(jnp.cumsum(x, 0)), 0)

    partitioned = partition(sums, X, specs=(P("data"),))
    _, second = [
        one for one, _ in partitioned.plan.body.walk()
        if isinstance(one, Compute) and one.op.primitive.name == "cumsum"
    ]  # fmt: skip
    rule = second.op.rule
    assert rule.local is not None
    second.op.rule = dataclasses.replace(
        rule, local=lambda ctx, op, *xs: [y + 0.01 for y in rule.local(ctx, op, *xs)]
    )
    report = found(partitioned, X)
    assert report.first.op is second.op
    assert report.results[0].name == "result"


def test_a_fault_of_the_whole_program_alone(monkeypatch):
    right = interpret.execute

    def wrong(instruction, mesh, read):
        made = right(instruction, mesh, read)
        is_tanh = isinstance(instruction, Compute) and instruction.op.primitive.name == "tanh"
        return [(key, x * 1.5 if is_tanh else x) for key, x in made]

    monkeypatch.setattr(interpret, "execute", wrong)
    report = found(partition(plain, X, UP, DOWN), X, UP, DOWN)
    assert not report.ok and report.first.together
    assert report.first.operation == "tanh"
    assert "every operation is right on its own" in str(report)


def test_the_error_says_which_result_operation_layouts_and_line(monkeypatch):
    monkeypatch.setitem(apply._APPLY, "all_reduce", lambda step, x, *rest: x)

    def total(x):
        return {"loss": x.sum()}

    ones = np.ones((4, 8), np.float32)
    with pytest.raises(spmd.CheckError) as caught:
        spmd.check(total, ones, mesh=make_mesh(tensor=4), in_shardings=(P("tensor"),))
    assert isinstance(caught.value, AssertionError)
    line = total.__code__.co_firstlineno + 1
    # Each of 4 devices has the sum of 8 ones; 32 was planted as 16, 8, 4 and 4.
    assert str(caught.value) == (
        "the partitioned program does not give what the unsharded one gives\n"
        "  result['loss']: 1 of 1 elements wrong, by up to 7.5e-01 of the largest; 8.0 instead of "
        "32.0 at []\n"
        "  why: first operation that is wrong: all_reduce(tensor) of result['loss'], at the "
        "boundary\n"
        "    rule   [] partial{tensor:add} to []\n"
        "    makes  result['loss'] f32[] []\n"
        "    wrong  4 of 4 elements; the worst at [] on device tensor=2: 4.0 instead of 32.0\n"
        "  fix: if the operation has a rule of yours, correct it; if the numbers differ by "
        "rounding that grew, pass tolerance=; else report it as a defect, with this text"
    )
    assert f"test_check.py:{line} " in caught.value.report.first.source
