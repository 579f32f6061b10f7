"""`memory_limit`: what is gathered is let go, and gathered again for those who read it later."""

import importlib.util
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import spmd
from spmd import regather
from spmd.partition.plan import Compute, Move, ProgramPlan
from spmd.planning import _Planning
from tests.e2e.test_random_programs import draw
from tests.oracle import check, kinds, make_mesh

LAYERS, WIDTH, BATCH, DEVICES = 6, 64, 512, 4
WEIGHTS = WIDTH * WIDTH * 4
GATHERED = WEIGHTS * (DEVICES - 1) / DEVICES  # what each device sends for one, by the ring model
SPECS = ([P("fsdp")] * LAYERS, P("fsdp")), [P("fsdp")] * LAYERS


def arr(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32) / 4


ARGS = ([arr(WIDTH, WIDTH) for _ in range(LAYERS)], arr(BATCH, WIDTH))


def step(ws: Any, x: Any) -> Any:
    def loss(ws: Any) -> Any:
        h = x
        for w in ws:
            h = jnp.tanh(h @ w)
        return jnp.mean(h**2)

    return jax.tree.map(lambda w, g: w - 0.1 * g, ws, jax.grad(loss)(ws))


def planned(limit: int | None, **options: Any) -> spmd.Partitioned:
    ins, outs = SPECS
    jitted = spmd.jit(step, mesh=make_mesh(fsdp=DEVICES), in_shardings=ins, out_shardings=outs,
                      memory_limit=limit, **options)  # fmt: skip
    return jitted.trace(*ARGS).propagate().partition()


def gathered(found: spmd.Partitioned) -> tuple[int, float]:
    return kinds(found)["all_gather", ("fsdp",)]


def test_weights_of_layers_are_gathered_twice_where_both_ways_do_not_fit() -> None:
    """All but the first layer's, whose input needs no gradient, and the last one's, which the way
    back begins with."""
    free = planned(None)
    assert gathered(free) == (LAYERS, LAYERS * GATHERED)
    ins, outs = SPECS
    limit = free.peak_memory - (LAYERS - 2) * WEIGHTS // 2
    found = check(step, ARGS, make_mesh(fsdp=DEVICES), ins, outs, memory_limit=limit)
    assert found.peak_memory <= limit
    assert LAYERS < gathered(found)[0] < 2 * LAYERS - 2  # as many as it takes, and no more
    least = planned(1)
    assert gathered(least) == (2 * LAYERS - 2, (2 * LAYERS - 2) * GATHERED)
    assert least.peak_memory < free.peak_memory - (LAYERS - 3) * WEIGHTS
    assert any(d.kind == "over limit" for d in least.diagnostics)


def test_the_second_gather_waits_and_is_told_apart() -> None:
    found = planned(1)
    later = [i for i, _ in found.plan.moves() if i.copy]
    assert len(later) == LAYERS - 2
    made = {key for i in found.plan.body.code for key in i.writes}
    read = {key for i in found.plan.body.code for key in i.reads}
    assert all(move.after[0] in made and move.writes[0] in read for move in later)
    barriers = found.lower().as_text().count(":2 = stablehlo.optimization_barrier")
    assert barriers == len(later)  # each of a shard and of what it waits for
    text = str(found)
    assert all(f"of [fsdp, -], after {move.after[0].value}" in text for move in later)


def test_not_where_it_fits_and_not_when_it_is_off() -> None:
    free = planned(None)
    assert gathered(planned(free.peak_memory)) == gathered(free)
    off = planned(1, disable_passes=["regathers"])
    assert gathered(off) == gathered(free)


def test_every_instruction_can_be_checked_alone() -> None:
    assert spmd.check(planned(1), *ARGS).ok


def _let_go(plan: ProgramPlan) -> ProgramPlan:
    """With a copy for the later half of the readers of everything that is gathered."""
    code, chosen = plan.body.code, []
    made = {key: i for i, one in enumerate(code) for key in one.writes}
    for one in code:
        if not isinstance(one, Move) or not regather._gathers(one):
            continue
        (key,) = one.writes
        readers = [i for i, other in enumerate(code) if key in other.reads]
        late = tuple(readers[len(readers) // 2 :])
        if key in plan.body.outputs or not all(isinstance(code[i], Compute) for i in late):
            continue
        waited = [k for i in late[:1] for k in code[i].reads if k != key and k in made]
        if waited:
            after = max(waited, key=made.__getitem__)
            chosen.append(regather._Late(key, one, 0, late, after))
    return regather._again(plan, chosen)


# Of random programs some that gather for an operation which waits for something else.
SEEDS = (7000, 7006, 7015, 7025, 7044, 7046, 7069, 7087, 7099, 7126, 7162, 7200)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_programs_whose_gathers_are_all_let_go(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Planning, "smaller", lambda self, plan, limit: _let_go(plan))
    found = []
    monkeypatch.setattr("tests.e2e.random_case.check", lambda *args: _limited(found, *args))
    monkeypatch.setattr("tests.e2e.random_case.waste", lambda plan: [])  # it sends twice
    draw(random.Random(seed)).run()
    assert any(move.copy for one in found for move, _ in one.plan.moves())


def _limited(found: list[spmd.Partitioned], *args: Any) -> spmd.Partitioned:
    found.append(check(*args, memory_limit=1))
    return found[-1]


def test_what_a_loop_reads_while_most_is_held_is_not_let_go() -> None:
    """The peak is inside of the loop, which reads `big`; to let `w` go is enough."""

    def run(big: Any, w: Any, x: Any) -> Any:
        h = jnp.tanh(jnp.tanh(x @ w) @ big)

        def body(c: Any, _: Any) -> tuple[Any, None]:
            t = jnp.tanh(jnp.einsum("bj,ij->bi", c, big) @ big)
            u = jnp.tanh(jnp.tile(t, (1, 16)))
            return jnp.sort(u, -1)[:, :256], None

        h, _ = jax.lax.scan(body, h, None, length=3)
        h = jnp.tanh(jnp.einsum("bi,ji->bj", jnp.tanh(h), big))
        return jnp.einsum("bi,ji->bj", h, w)

    args = (arr(64, 256), arr(64, 64), arr(256, 64))
    options = {"mesh": make_mesh(fsdp=DEVICES), "in_shardings": (P("fsdp"),) * 3}
    free = spmd.jit(run, out_shardings=P("fsdp"), **options)
    free = free.trace(*args).propagate().partition()
    limit = free.peak_memory - 8192
    found = check(run, args, **options, out_shardings=P("fsdp"), memory_limit=limit)
    assert found.peak_memory <= limit
    assert [str(i.value) for i, _ in found.plan.moves() if i.copy] == ["w"]
    assert found.wire_bytes == free.wire_bytes + GATHERED


@pytest.mark.parametrize("change", [lambda w: w.T, lambda w: 2 * w], ids=["transposed", "scaled"])
def test_what_is_read_by_itself_waits_for_what_its_reader_waits_for(change: Any) -> None:
    def run(ws: Any, x: Any) -> Any:
        for w in ws:
            x = jnp.tanh(x @ w)
        for w in ws[::-1]:
            x = jnp.tanh(x @ change(w))
        return x

    ins, _ = SPECS
    mesh = make_mesh(fsdp=DEVICES)
    jitted = spmd.jit(run, mesh=mesh, in_shardings=ins, out_shardings=P("fsdp"), memory_limit=1)
    limit = jitted.trace(*ARGS).propagate().partition().peak_memory
    found = check(run, ARGS, mesh, ins, P("fsdp"), memory_limit=limit)
    assert sum(i.copy for i, _ in found.plan.moves()) == LAYERS - 1


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='needs the TPU compiler: pip install "spmd-compiler[tpu]"',
)
def test_the_compiler_for_tpus_keeps_both_gathers() -> None:
    """And holds less for it."""
    ws = [jax.ShapeDtypeStruct((2048, 2048), jnp.float32)] * 8
    x = jax.ShapeDtypeStruct((16384, 2048), jnp.float32)
    specs = ([P("fsdp")] * 8, P("fsdp"))
    options = dict(mesh={"fsdp": 4}, topology="v4:2x2x1", in_shardings=specs,
                   out_shardings=specs[0], donate_argnums=0)  # fmt: skip
    free = spmd.aot(step, ws, x, **options)
    small = spmd.aot(step, ws, x, memory_limit=1, **options)
    kept, repeated = ([t for t in found.transfers if t.kind == "all_gather"]
                      for found in (free, small))  # fmt: skip
    assert sum(t.count for t in kept) == 8 and sum(t.count for t in repeated) == 14
    assert small.needed_bytes <= free.needed_bytes - 4 * 2048 * 2048 * 4


def test_moves_that_a_pass_repeats_have_copies_of_their_own() -> None:
    found = planned(1)
    keys = [i.writes[0] for i in found.plan.body.code if isinstance(i, Move)]
    assert len(keys) == len(set(keys))
