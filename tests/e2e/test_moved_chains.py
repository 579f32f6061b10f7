"""Random chains in which axes may shard another dim: their values, and that nothing is cheaper."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractMesh

import spmd
from sharding import P, shard
from spmd.cost import ANY
from spmd.partition import moved, planner, stretch
from spmd.partition.around import Surroundings
from tests.oracle import check, kinds, make_mesh

RNG = np.random.default_rng(0)


def arr(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def annotated(value: Any) -> bool:
    """By the user: it stays where it is."""
    found = value.op.rule.annotation if value.op.control is None else None
    return found is not None and not found.all_open


def exhaustive(fun: Any, args: Any, places: Any, out: Any, most: int = 7) -> tuple[float, float]:
    """The cost of what the cuts choose, and of the cheapest where values along the stretches have
    the axis on either dim, by trying all of up to `most`."""
    mesh = make_mesh(s=4)
    stage = spmd.jit(fun, mesh=mesh, in_shardings=places, out_shardings=out)
    found = stage.trace(*args).propagate().result
    layouts = [[found.of(v).layout for v in values] for values in
               (found.program.body.inputs, found.program.body.outputs)]  # fmt: skip

    def cost(plan: Any) -> float:
        return sum(moved._spent(plan.body, {}))

    stretches: list[Any] = []

    class Seen(moved.Stretch):
        def __init__(self, *args: Any):
            super().__init__(*args)
            stretches.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moved, "Stretch", Seen)
        patch.setattr(planner, "cheaper", lambda *_: True)
        chosen = cost(planner.make_plan(found, *layouts))
    costs = [cost(planner.make_plan(found, *layouts, ("moved_axes",)))]
    for each in stretches:
        made = [v for i in sorted(each.ops) for v in each.ops[i].outputs]
        free = [v for v in made if each.member(v) and each.layouts(v)[1] >= 0 and not annotated(v)
                and not v.op.scope.manual and v.id not in each.around.ends]  # fmt: skip
        for picks in itertools.product((0, 1), repeat=min(len(free), most)):
            assumed = {v.id: each.around.layouts[each.layouts(v)[p]]
                       for v, p in zip(free, picks, strict=False)}  # fmt: skip
            costs.append(cost(planner.make_plan(found, *layouts, ("moved_axes",), assumed)))
    return chosen, min(costs)


A, B, WIDE = arr(64, 64), arr(512, 512), arr(64, 256)


def rows(y: Any) -> Any:
    return jnp.einsum("tc,tu->uc", y, A)


def step(y: Any) -> Any:
    return jnp.sin(rows(y))


def by_hand(y: Any) -> Any:
    mesh, rows = make_mesh(s=4), P("s")
    return jax.shard_map(lambda y: jnp.sin(y @ B) @ B, mesh=mesh, in_specs=rows, out_specs=rows)(y)


def decay(carry: Any, row: Any) -> Any:
    return carry / 2 + row, carry * row


def recur(carry: Any, row: Any) -> Any:
    return (jnp.tanh(carry @ B + row),) * 2


def onward(state: Any) -> Any:
    i, y = state
    return i + 1, y.at[i].add(jnp.sin(y[i + 1]))


STEPS: dict[str, Callable[[Any, Any], Any]] = {
    "sin": lambda y, x: jnp.sin(y),
    "rows": lambda y, x: rows(y),
    "wide": lambda y, x: jnp.einsum("uc,tu->tc", jnp.einsum("tc,tu->uc", y, WIDE), WIDE),
    "features": lambda y, x: y @ B,
    "fft": lambda y, x: jnp.abs(jnp.fft.fft(y, axis=0)),
    "mask": lambda y, x: jnp.where(jnp.arange(64)[:, None] >= jnp.arange(512), y, 0),
    "add": lambda y, x: y + x,
    "turned": lambda y, x: jnp.sin(y.T).T,
    "annotated": lambda y, x: shard(y, "s", None),
    "manual": lambda y, x: by_hand(y),
    "loop": lambda y, x: lax.scan(lambda y, _: (step(y), None), y, None, length=3)[0],
    "invariant": lambda y, x: lax.fori_loop(0, 3, lambda i, z: z + rows(y) * i, jnp.zeros_like(y)),
    "stacked": lambda y, x: lax.scan(lambda y, _: (step(y), y), y, None, length=3)[1].sum(0),
    "scanned": lambda y, x: lax.scan(decay, y[0], y)[1],
    "backwards": lambda y, x: lax.scan(decay, x[0], y, reverse=True)[1] + x,
    "recurrent": lambda y, x: lax.scan(recur, jnp.zeros(512), y)[1],
    "indexed": lambda y, x: lax.scan(lambda c, i: decay(c, y[i]), y[0], jnp.arange(64))[1],
    "written": lambda y, x: lax.fori_loop(1, 64, lambda i, z: z.at[i].add(z[i - 1] / 2), y),
    "counted": lambda y, x: lax.while_loop(lambda s: s[0] < 63, onward, (0, y))[1],
    "branch": lambda y, x: lax.cond(x[0, 0] > 0, step, jnp.cos, y),
}  # fmt: skip


# For which axes split, so that layouts cannot be told beforehand.
SPLIT = {"split": lambda y, x: jnp.sin(y.reshape(64, 2, 256)).reshape(64, 512)}


def drawn(seed: int, steps: dict[str, Callable[[Any, Any], Any]]) -> tuple[Any, Any, Any, Any]:
    rng = random.Random(seed)
    names = rng.choices(list(steps), k=rng.randint(2, 5))

    def fun(x: Any) -> Any:
        y = x
        for name in names:
            y = steps[name](y, x)
        return y

    return fun, (arr(64, 512),), (P("s"),), rng.choice((P("s"), P(), P(None, "s")))


SEEDS = range(100)


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_along_a_stretch_is_cheaper(seed: int) -> None:
    chosen, best = exhaustive(*drawn(seed, STEPS))
    assert chosen <= best * (1 + 1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_not_decided_together_counts(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(stretch, "WINDOW", 4)
    chosen, best = exhaustive(*drawn(seed, STEPS), most=0)  # as without the pass
    assert chosen <= best * (1 + 1e-9)


def test_what_knows_its_axis_by_name_keeps_its_shards() -> None:
    """Its weights are those of the stretch, and so their columns go through the region."""
    (x,) = args = (arr(64, 512),)

    def fun(x: Any) -> Any:
        return rows(by_hand(rows(x @ B)) @ B)

    planned = check(fun, args, make_mesh(s=4), (P("s"),), P("s"))
    once = x.nbytes / 4 * 3 / 4
    assert kinds(planned) == {("all_to_all", ("s",)): (4, 4 * once)}


@pytest.mark.parametrize("window", [1, 512])
def test_the_way_back_counts(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    """To what is not decided with an equation, and to what stays for other reasons."""
    monkeypatch.setattr(stretch, "WINDOW", window)
    mesh, places = AbstractMesh((4,), ("s",)), (P("s"),)
    stage = spmd.jit(lambda x: shard(rows(x), "s", None), mesh=mesh, in_shardings=places)
    propagated = stage.trace(jax.ShapeDtypeStruct((64, 512), jnp.float32)).propagate().result
    around = Surroundings(planner._Planner(propagated, propagated.mesh, ("moved_axes",), ANY))
    (product,) = [op for op in around.program.ops() if op.rule.flops > 1]
    (dim,) = around.others(product, "s", taken=False)
    whole = 64 * 512 * 4
    gathered, there_and_back = whole * 3 / 4, 2 * whole / 4 * 3 / 4
    gain = stretch.Stretch(around, product, "s", dim).gain
    # what steps and copies cost aside
    assert gain == pytest.approx(gathered - there_and_back, abs=whole / 10)


@pytest.mark.parametrize("seed", SEEDS)
def test_chains_have_the_values_of_the_unsharded_program(seed: int) -> None:
    fun, args, places, out = drawn(seed, {**STEPS, **SPLIT})
    check(fun, args, make_mesh(s=4), places, out)
