"""Mesh axes that shard another dim for a part of the program: values, collectives, and when."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractMesh

import spmd
from benchmarks.suite import unannotated
from benchmarks.suite.case import LARGE
from sharding import P, shard
from spmd import planning
from spmd.chips import CHIPS
from spmd.cost import Traits
from spmd.options import Options
from spmd.partition import around, moved, planner, stretch
from spmd.target import traits
from tests.oracle import check, kinds, make_mesh

RNG = np.random.default_rng(0)
BATCH, ROWS, HEADS, DIM = 2, 32, 8, 4
OFF = {"disable_passes": ["moved_axes"]}
ROW = P(None, "s")


def arr(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def weights(heads: int = HEADS, *layers: int) -> dict[str, np.ndarray]:
    made = {n: arr(*layers, heads * DIM, heads, DIM) for n in "qkv"}
    return {**made, "o": arr(*layers, heads, DIM, heads * DIM)}


def attend(w: Any, x: Any, where: Callable[[Any], Any] = lambda q: q) -> Any:
    q, k, v = (jnp.einsum("btc,chd->bthd", x, w[n]) for n in "qkv")
    scores = jnp.einsum("bqhd,bkhd->bhqk", where(q), k)
    causal = jnp.arange(x.shape[1])[:, None] >= jnp.arange(x.shape[1])
    made = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(causal, scores, -1e9)), v)
    return x + jnp.einsum("bqhd,hdc->bqc", made, w["o"])


def placed(w: Any) -> Any:
    return jax.tree.map(lambda _: P(), w)


def total(partitioned: Any) -> float:
    return partitioned.wire_bytes


X = arr(BATCH, ROWS, HEADS * DIM)


def test_attention_with_its_positions_sharded_runs_by_heads() -> None:
    """The causal mask, of nothing, is made again; nothing is gathered."""
    w = weights()
    planned = check(attend, (w, X), make_mesh(s=8), (placed(w), ROW), ROW)
    once = X.nbytes / 8 * 7 / 8
    assert kinds(planned) == {("all_to_all", ("s",)): (4, 4 * once)}
    off = check(attend, (w, X), make_mesh(s=8), (placed(w), ROW), ROW, **OFF)
    assert kinds(off)["all_gather", ("s",)] == (2, 2 * 8 * once)


@pytest.mark.parametrize("between", [1, 1000])
def test_however_much_there_is_between_the_two_products(between: int) -> None:
    """As in two layers that are no loop: all of it is one stretch."""

    def fun(x: Any) -> Any:
        x = jnp.reshape(x, (*x.shape[:2], HEADS, DIM))
        scores = jnp.einsum("bqhd,bkhd->bhqk", x, x)
        for _ in range(between):
            scores = scores * 0.999
        return jnp.einsum("bhqk,bkhd->bqhd", scores, x).reshape(*x.shape[:2], -1)

    function = spmd.jit(fun, mesh=make_mesh(s=8), in_shardings=(ROW,), out_shardings=ROW)
    planned = function.trace(X).propagate().partition()
    assert kinds(planned) == {("all_to_all", ("s",)): (2, 2 * X.nbytes / 8 * 7 / 8)}


def test_and_so_do_its_gradients() -> None:
    """Of three projections and the result, and the three that lead back; of its gradient once."""
    w = weights()
    gradients = jax.grad(lambda w, x: (attend(w, x) ** 2).sum(), (0, 1))
    planned = check(gradients, (w, X), make_mesh(s=8), (placed(w), ROW), (placed(w), ROW))
    found = kinds(planned)
    assert found["all_to_all", ("s",)] == (8, 8 * X.nbytes / 8 * 7 / 8)
    sums = sum(v.nbytes for v in w.values()) * 2 * 7 / 8  # of the gradients of weights
    assert total(planned) == found["all_to_all", ("s",)][1] + sums


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("axes", [{"s": 8}, {"d": 2, "s": 4}])
def test_layers_in_a_loop(remat: bool, axes: dict[str, int]) -> None:
    """What the loop stacks for the way back lies by heads too: one more all-to-all would be two of
    all scores."""
    w, rows = weights(HEADS, 3), P("d" if "d" in axes else None, "s")
    x = arr(BATCH, 8 * ROWS, HEADS * DIM)

    def loss(w: Any, x: Any) -> Any:
        body = jax.checkpoint(attend) if remat else attend
        return (lax.scan(lambda x, w: (body(w, x), None), x, w)[0] ** 2).sum()

    args, places = (w, x), (placed(w), rows)
    planned = check(jax.grad(loss), args, make_mesh(**axes), places, placed(w))
    off = check(jax.grad(loss), args, make_mesh(**axes), places, placed(w), **OFF)
    count = (12 if remat else 8) * 3
    assert kinds(planned)["all_to_all", ("s",)][0] == count
    assert total(planned) < 0.6 * total(off)


def test_what_is_annotated_stays() -> None:
    w = weights()

    def f(w: Any, x: Any) -> Any:
        return attend(w, x, lambda q: shard(q, None, "s", None, None))

    planned = check(f, (w, X), make_mesh(s=8), (placed(w), ROW), ROW)
    assert kinds(planned)["all_to_all", ("s",)][0] == 4  # beyond the annotation
    def scores(w: Any, x: Any) -> Any:
        q, k = (jnp.einsum("btc,chd->bthd", x, w[n]) for n in "qk")
        return shard(jnp.einsum("bqhd,bkhd->bhqk", q, k), None, None, "s", None)

    planned = check(scores, (w, X), make_mesh(s=8), (placed(w), ROW), P(None, None, "s"))
    assert {kind for kind, _ in kinds(planned)} == {"all_gather"}


def test_heads_that_do_not_divide_stay() -> None:
    w = weights(4)
    x = arr(BATCH, ROWS, 4 * DIM)
    planned = check(attend, (w, x), make_mesh(s=8), (placed(w), ROW), ROW)
    assert {kind for kind, _ in kinds(planned)} == {"all_gather"}
    assert not planned.diagnostics


def mixed(a: Any, b: Any, x: Any) -> Any:
    """Along positions, as mixers multiply: x [batch, positions, features]."""
    return x + jnp.einsum("buc,uv->bvc", jnp.tanh(jnp.einsum("btc,tu->buc", x, a)), b)


@pytest.mark.parametrize(("features", "lanes"), [(1024, 128), (512, 128), (512, 64), (64, 1)])
def test_a_product_along_a_sharded_dim(
    monkeypatch: pytest.MonkeyPatch, features: int, lanes: int
) -> None:
    """Rows stay long enough for vector units: 128 elements of 1,024 on each device, or none."""
    monkeypatch.setattr(planning, "traits", lambda options: Traits({}, lanes))
    a, b, x = arr(16, 32), arr(32, 16), arr(2, 16, features)
    planned = check(mixed, (a, b, x), make_mesh(s=8), (P(), P(), ROW), ROW)
    once = x.nbytes / 8 * 7 / 8
    by_features = {("all_to_all", ("s",)): (2, 2 * once)}
    assert (kinds(planned) == by_features) == (features // 8 >= lanes)


def test_work_tips_the_balance() -> None:
    """Two devices gather as much as they exchange, and would multiply twice as much."""
    a, b, x = arr(16, 512), arr(512, 16), arr(2, 16, 1024)
    planned = check(mixed, (a, b, x), make_mesh(s=2), (P(), P(), ROW), ROW)
    assert kinds(planned) == {("all_to_all", ("s",)): (2, x.nbytes / 2)}


def test_little_is_not_worth_it() -> None:
    """Less than a fifth of what the program sends is not, beside what is sent anyway."""

    def f(a: Any, b: Any, x: Any, z: Any) -> Any:
        return mixed(a, b, x), z

    a, b, x = arr(16, 32), arr(32, 16), arr(2, 16, 1024)
    for features, moves in ((1024, True), (16384, False)):
        args, places = (a, b, x, arr(8, features)), (P(), P(), ROW, P("s"))
        planned = check(f, args, make_mesh(s=8), places, (ROW, P()))
        assert (("all_to_all", ("s",)) in kinds(planned)) == moves
        assert bool(planned.diagnostics) == moves


def test_the_sum_of_a_product_that_all_devices_need() -> None:
    """Of [64, 32] x [32, 2100] contracted over sharded dims a sum sends everything twice."""
    x, w = arr(2048, 64), arr(64, 2100)
    places = (P(None, "d"), P("s"))
    planned = check(jnp.matmul, (x, w), make_mesh(d=2, s=4), places, P())
    off = check(jnp.matmul, (x, w), make_mesh(d=2, s=4), places, P(), **OFF)
    assert {kind for kind, _ in kinds(planned)} == {"all_to_all", "all_gather"}
    assert total(planned) < 0.51 * total(off)


def test_a_loop_that_adds_up_reduces_once() -> None:
    """The cut takes the reduction for one in each step; the plan knows better, and is kept."""
    w, x = arr(64, 64), arr(16, 8, 64)

    def loss(w: Any, x: Any) -> Any:
        return (lax.scan(lambda c, x: (jnp.tanh(c @ w + x), None), x[0], x)[0] ** 2).sum()

    places = (P(), P(None, "s"))
    planned = check(jax.grad(loss), (w, x), make_mesh(s=8), places, P())
    assert kinds(planned) == {("all_reduce", ("s",)): (1, 2 * w.nbytes * 7 / 8)}


def test_branches_and_calls() -> None:
    w = weights()

    def f(w: Any, x: Any, flag: Any) -> Any:
        made = lax.cond(flag, attend, lambda w, x: attend(w, 2 * x), w, x)
        return jax.jit(attend)(w, made)

    args, places = (w, X, np.array(True)), (placed(w), ROW, P())
    planned = check(f, args, make_mesh(s=8), places, ROW)
    assert {kind for kind, _ in kinds(planned)} == {"all_to_all"}


def test_regions_that_are_manual_stay() -> None:
    """What knows an axis by name has its own shards of it."""
    w, mesh = weights(), make_mesh(s=8)

    def f(w: Any, x: Any) -> Any:
        q, k = (jnp.einsum("btc,chd->bthd", x, w[n]) for n in "qk")
        local = jax.shard_map(lambda q: q * (1 + lax.axis_index("s")), mesh=mesh,
                              in_specs=P(None, "s"), out_specs=P(None, "s"))  # fmt: skip
        return jnp.einsum("bqhd,bkhd->bqk", local(q), k)

    check(f, (w, X), mesh, (placed(w), ROW), ROW)


def reshards(
    stage: Any, waits: dict[str, float], *without: str, lanes: int = 1
) -> list[tuple[Any, float]]:  # fmt: skip
    """Of the plan where some collectives are waited for in part: reshards, and how often each runs.

    Args:
      stage: traced, with the shardings of all arguments and results.
    """
    found = stage.propagate().result
    body = found.program.body
    ins, outs = ([found.of(v).layout for v in values] for values in (body.inputs, body.outputs))
    plan = planner.make_plan(found, ins, outs, without, traits=Traits(waits, lanes))
    return [(one.plan, runs) for one, runs in plan.body.walk() if isinstance(one, moved.Move)]


def plans(shards: int, **waits: float) -> set[str]:
    """Kinds of collectives of attention where some are waited for in part."""
    mesh = AbstractMesh((shards,), ("s",))
    shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), weights(shards))
    x = jax.ShapeDtypeStruct((BATCH, 8 * shards, shards * DIM), jnp.float32)
    stage = spmd.jit(attend, mesh=mesh, in_shardings=(placed(shapes), ROW), out_shardings=ROW)
    found = reshards(stage.trace(shapes, x), waits)
    return {step.kind for plan, _ in found for step in plan.steps}


def test_what_runs_beside_computation_is_cheaper() -> None:
    """Where gathers alone run ahead, keys and values of eight devices are gathered; of 16 an eighth
    is less."""
    assert plans(8) == {"all_to_all"}
    assert plans(8, all_gather=1 / 6) == {"all_gather"}
    assert plans(16, all_gather=1 / 6) == {"all_to_all"}
    assert plans(8, all_gather=1 / 6, all_to_all=2 / 3) == {"all_gather"}
    assert plans(8, all_gather=1 / 6, all_to_all=1 / 6) == {"all_to_all"}


def test_gathers_that_hide_each_but_not_together() -> None:
    """Layers over tokens and channels in turn: by what is waited for, single stretches are not
    worth their all-to-alls; decided by all that is sent, they wait for less in sum."""
    ahead = dict.fromkeys(("permute", "all_gather", "all_reduce", "reduce_scatter"), 1 / 6)
    waits = ahead | {"all_to_all": 2 / 3}
    (program,) = [p for p in unannotated.PROGRAMS if p.name == "mixer_columns_fsdp"]
    case = program.make(LARGE._replace(devices=8))
    mesh = AbstractMesh((*case.mesh.values(),), (*case.mesh,))
    traced = spmd.jit(case.fun, mesh=mesh, in_shardings=case.in_specs,
                      out_shardings=case.out_specs).trace(*case.args)  # fmt: skip

    def waited(*without: str) -> float:
        found = reshards(traced, waits, *without, lanes=128)
        return sum(runs * around.waited(plan, waits) for plan, runs in found)

    assert waited() == waited(around.HIDDEN) < 0.5 * waited("moved_axes")


def test_devices_that_gather_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    gathers = dataclasses.replace(CHIPS["cpu"], overlaps=frozenset(("all_gather",)))
    monkeypatch.setitem(CHIPS, "cpu", gathers)
    w = weights()
    planned = check(attend, (w, X), make_mesh(s=8), (placed(w), ROW), ROW)
    assert {kind for kind, _ in kinds(planned)} == {"all_gather"}


def test_what_chips_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams give sums something to run beside, on v5e too, which waits for those of others."""
    mesh, ahead = make_mesh(s=8), {"permute": 1 / 6, "all_gather": 1 / 6}
    asked, before = ahead | {"all_to_all": 2 / 3}, {"permute": 1 / 6}
    sums = dict.fromkeys(("all_reduce", "reduce_scatter"), 1 / 6)
    assert traits(Options(mesh.abstract_mesh)) == Traits()
    for name, on, whole, unasked in [
        ("v2", {}, {}, before), ("v3", {}, {}, before), ("v4", {}, {}, before),
        ("v5e", sums, {}, ahead | sums), ("v5p", sums, sums, before), ("v6e", sums, sums, before),
    ]:  # fmt: skip
        chip = dataclasses.replace(CHIPS[name], kind=CHIPS["cpu"].kind)
        monkeypatch.setitem(CHIPS, "cpu", chip)
        assert traits(Options(mesh)) == Traits(asked | on, 128), name
        assert traits(Options(mesh, disable_passes=("streams",))).waits == asked | whole, name
        assert traits(Options(mesh, disable_passes=("async_collectives",))).waits == unasked, name
    monkeypatch.setitem(CHIPS, "cpu", dataclasses.replace(CHIPS["h100"], kind=CHIPS["cpu"].kind))
    found = traits(Options(mesh))
    assert ({*found.waits.values()}, found.lanes) == ({1 / 6}, 8)


def test_the_diagnostic_says_what_moved() -> None:
    w = weights()
    stage = spmd.jit(attend, mesh=make_mesh(s=8), in_shardings=(placed(w), ROW), strict=True)
    (told,) = stage.trace(w, X).propagate().partition().diagnostics
    count = told.text.split()[5]
    assert 8 < int(count) < 30
    assert (told.kind, told.value, told.bytes) == ("moved", "s", 0.0)
    assert told.text == (
        f"shards another dim of what {count} operations read and make, the first around "
        "dot_general: all-to-alls take it there and back, for less than gathers or sums would send"
    )
    assert told.remedy == "annotate what should stay, or disable_passes=['moved_axes']"
    assert "test_moved_axes.py:" in told.source and "(attend)" in told.source


def crowd(count: int) -> Any:
    def fun(x: Any) -> list[Any]:
        """One value with many readers, none of which can keep the axis."""
        h = jnp.tanh(x)
        return [jnp.sin(jnp.sort(h + i, axis=0)) for i in range(count)]

    x = jax.ShapeDtypeStruct((16, 1024), jnp.float32)
    return spmd.jit(fun, mesh=AbstractMesh((8,), ("s",)), in_shardings=(P("s"),),
                    out_shardings=[P("s")] * count).trace(x).propagate()  # fmt: skip


def test_what_many_read_is_moved_once_and_looked_at_in_linear_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[int] = []

    class Seen(moved.Stretch):
        def __init__(self, *args: Any):
            super().__init__(*args)
            looks.append(len(self.ops))

    monkeypatch.setattr(moved, "Stretch", Seen)
    for count in (50, 800):
        looks.clear()
        found = crowd(count).partition()
        once = 16 * 1024 * 4 / 8 * 7 / 8
        # there once for each that are decided together, back for each
        assert found.wire_bytes <= (count + 1 + count // 50) * once
        assert sum(looks) <= (moved.LOOKS + 2) * (3 * count + stretch.WINDOW)
        (told,) = [d for d in found.diagnostics if d.kind == "moved"]
        assert told.value == "s"


def test_memory_that_it_takes_is_given_up() -> None:
    """Where only the plan without moved axes fits."""

    def fun(x: Any) -> tuple[Any, Any, Any]:
        y = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))[:, 1:-1] + 0.5 * x
        y = y[:, ::-1] + 0.5 * x
        y = y - y.max(1, keepdims=True) + 0.5 * x
        y = jnp.sort(y, axis=1) + 0.5 * x
        return y, x, y.sum()

    args, outs = (arr(4, 32, 512),), (ROW, P("s"), P())

    def planned(**options: Any) -> Any:
        given = dict(mesh=make_mesh(s=4), in_shardings=(ROW,), out_shardings=outs)
        stage = spmd.jit(fun, **given, **options)
        return stage.trace(*args).propagate().partition()

    free, off = planned(), planned(**OFF)
    assert off.peak_memory < free.peak_memory and free.wire_bytes < off.wire_bytes
    limit = (off.peak_memory + free.peak_memory) // 2
    assert planned(memory_limit=limit).peak_memory == off.peak_memory


def test_constants_are_whole() -> None:
    """And so the sum of a product with one is that of one operand alone."""
    a = jnp.asarray(arr(32, 64))

    def fun(x: Any) -> Any:
        return jnp.sort(jnp.tanh(jnp.einsum("btc,tu->buc", x, a)), axis=1)

    x = arr(2, 32, 1024)
    planned = check(fun, (x,), make_mesh(s=8), (ROW,), ROW)
    assert {kind for kind, _ in kinds(planned)} == {"all_to_all"}
