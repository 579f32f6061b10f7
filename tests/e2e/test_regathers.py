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
from spmd.partition.plan import Move
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
    text = str(found)
    assert all(f"of [fsdp, -], after {move.after[0].value}" in text for move in later)


def test_not_where_it_fits_and_not_when_it_is_off() -> None:
    free = planned(None)
    assert gathered(planned(free.peak_memory)) == gathered(free)
    off = planned(1, disable_passes=["regathers"])
    assert gathered(off) == gathered(free)


def test_every_instruction_can_be_checked_alone() -> None:
    assert spmd.check(planned(1), *ARGS).ok


@pytest.mark.parametrize("seed", range(12))
def test_random_programs_that_may_hold_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever can be gathered again is, and they give what they give unsharded."""
    case = draw(random.Random(7700 + seed))
    monkeypatch.setattr("tests.e2e.random_case.check", _limited)
    monkeypatch.setattr("tests.e2e.random_case.waste", lambda plan: [])  # it sends twice
    case.run()


def _limited(*args: Any) -> spmd.Partitioned:
    return check(*args, memory_limit=1)


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
