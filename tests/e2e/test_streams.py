"""Pass `streams`: two halves of a batch, one of which computes while the other's sums are sent."""

import dataclasses
import importlib.util
import random
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import spmd
from sharding import ArgumentError, shard
from spmd import chains, streams, target
from spmd.chips import CHIPS
from spmd.collectives import summarize
from spmd.estimate.fusion import held
from spmd.estimate.timeline import timeline
from spmd.estimate.work import lines, totals
from spmd.hardware import Machine
from spmd.partition.local import LocalView
from spmd.partition.parts import with_parts
from spmd.partition.plan import PART, Compute, Move, Parts, ProgramPlan, RegionPlan
from tests.e2e.test_random_programs import draw
from tests.oracle import check, make_mesh

LAYERS, BATCH, SEQUENCE, WIDTH, HIDDEN = 3, 8, 4, 16, 32
KINDS = frozenset(("all_reduce", "reduce_scatter", "all_gather", "permute"))
# Of links so slow, and arithmetic, that even small sums are worth hiding.
CHIP = dataclasses.replace(
    CHIPS["cpu"], family="tpu", overlaps=KINDS, link_bandwidth=1e6, flops=(("float32", 1e6),),
    hbm_bandwidth=1e12, scatters=True, unasked=KINDS,
)  # fmt: skip


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated devices, whose compiler does not know what TPUs' is told, are such chips."""
    monkeypatch.setitem(CHIPS, "cpu", CHIP)
    monkeypatch.setattr(target, "_APART", {})


def arr(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32) / 4


WEIGHTS = {"up": arr(LAYERS, WIDTH, HIDDEN), "down": arr(LAYERS, HIDDEN, WIDTH)}
TENSOR = {"up": P(None, None, "tensor"), "down": P(None, "tensor")}
X = arr(BATCH, SEQUENCE, WIDTH)


def layer(x: Any, w: Any) -> tuple[Any, None]:
    normed = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    return x + jax.nn.silu(normed @ w["up"]) @ w["down"], None


def attending(x: Any, w: Any) -> tuple[Any, None]:
    """Positions meet each other, examples do not."""
    scores = jnp.einsum("bsd,btd->bst", x, x)
    return layer(jnp.einsum("bst,btd->bsd", jax.nn.softmax(scores), x), w)


def model(weights: Any, x: Any, body: Any = layer) -> Any:
    return jnp.mean(lax.scan(body, x, weights)[0] ** 2)


def remat(weights: Any, x: Any) -> Any:
    return model(weights, x, jax.checkpoint(layer))


def layers(weights: Any, x: Any) -> Any:
    for i in range(LAYERS):
        x, _ = layer(x, jax.tree.map(lambda w, i=i: w[i], weights))
    return x


def unrolled(weights: Any, x: Any) -> Any:
    return jnp.mean(layers(weights, x) ** 2)


def planned(fun: Any, *args: Any, out: Any = None, **options: Any) -> ProgramPlan:
    mesh = make_mesh(tensor=4)
    jitted = spmd.jit(fun, mesh=mesh, in_shardings=(TENSOR, P()), out_shardings=out, **options)
    return jitted.trace(*args).propagate().partition().plan


def in_parts(plan: ProgramPlan) -> Iterator[tuple[Move | Compute, Parts, int]]:
    for one, trips in plan.body.walk():
        if one.parts is not None:
            yield one, one.parts, trips


def halved(plan: ProgramPlan) -> dict[tuple[int, ...], list[int | None]]:
    """Dims along which moved values are divided, by their shapes."""
    found: dict[tuple[int, ...], list[int | None]] = {}
    for one, parts, _ in in_parts(plan):
        if isinstance(one, Move):
            found.setdefault(one.value.shape, []).append(parts.operands[0])
    return found


def body_of(plan: ProgramPlan) -> RegionPlan:
    (loop,) = (one for one in plan.body.code if isinstance(one, Compute) and one.regions)
    return loop.regions[0]


@pytest.mark.parametrize("fun", [model, remat, unrolled])
def test_gradients_are_those_of_one_device(chip: None, fun: Any) -> None:
    both = jax.value_and_grad(fun, argnums=(0, 1))
    found = check(both, [WEIGHTS, X], make_mesh(tensor=4), (TENSOR, P()))
    assert streams.streams(found.plan)


def test_a_layer_runs_in_halves_of_its_batch(chip: None) -> None:
    """All of it: the carry stays in parts, and so does all between one sum and the next."""
    plan = planned(model, WEIGHTS, X)
    assert halved(plan) == {(BATCH, SEQUENCE, WIDTH): [0]}
    body = body_of(plan)
    assert all(one.parts is not None for one in body.code if X.size in map(_size, one.reads))
    (loop,) = (one for one in plan.body.code if isinstance(one, Compute) and one.regions)
    assert loop.parts == Parts(2, (0, None, None), (0,))
    lines = str(plan).splitlines()
    (reduced,) = (line for line in lines if "all_reduce" in line)
    assert "of [-, -, -] partial{tensor:add}, in 2 parts" in reduced
    assert any("= scan(" in line and "), in 2 parts  #" in line for line in lines)


def _size(key: Any) -> int:
    return int(np.prod(key.value.shape))


def test_nothing_is_joined_that_nobody_reads_whole(chip: None) -> None:
    mesh = make_mesh(tensor=4)
    jitted = spmd.jit(jax.grad(remat), mesh=mesh, in_shardings=(TENSOR, P()), out_shardings=TENSOR)
    assert streams.streams(jitted.trace(WEIGHTS, X).propagate().partition().plan)
    text = jitted.lower(WEIGHTS, X).as_text()
    assert text.count("stablehlo.concatenate") == 1  # what the loss is made of, between the loops


def test_half_of_a_sequence_would_not_do_where_positions_meet(chip: None) -> None:
    """Of one example, both halves of the sequence are waited for by attention, in the next step."""

    def run(weights: Any, x: Any) -> Any:
        return model(weights, x, attending)

    assert not streams.streams(planned(run, WEIGHTS, X[:1]))
    assert halved(planned(model, WEIGHTS, X[:1])) == {(1, SEQUENCE, WIDTH): [1]}
    assert halved(planned(run, WEIGHTS, X)) == {(BATCH, SEQUENCE, WIDTH): [0]}
    check(run, [WEIGHTS, X], make_mesh(tensor=4), (TENSOR, P()))


def test_weights_that_are_gathered_are_no_chain(chip: None) -> None:
    """They can be there before they are needed."""
    specs = {"up": P(None, "fsdp"), "down": P(None, "fsdp")}
    mesh = make_mesh(fsdp=4)
    jitted = spmd.jit(model, mesh=mesh, in_shardings=(specs, P("fsdp")))
    plan = jitted.trace(WEIGHTS, X).propagate().partition().plan
    assert any(step.kind == "all_gather" for move, _ in plan.moves() for step in move.plan.steps)
    assert not streams.streams(plan)


@pytest.mark.parametrize("batch", [1, 7])
def test_what_has_no_halves_stays_whole(chip: None, batch: int) -> None:
    """Along the sequence neither, which is odd; and the sums of norms are needed whole."""
    x = arr(batch, 3, WIDTH)
    assert halved(planned(model, WEIGHTS, x)) == {}
    check(model, [WEIGHTS, x], make_mesh(tensor=4), (TENSOR, P()))


def test_as_many_bytes_in_twice_as_many_collectives(chip: None) -> None:
    whole = planned(model, WEIGHTS, X, disable_passes=["streams"])
    halves = planned(model, WEIGHTS, X)
    before, after = (totals(lines(plan))["all_reduce", ("tensor",)] for plan in (whole, halves))
    assert before == (LAYERS, after[1]) and after[0] == 2 * LAYERS
    mesh = make_mesh(tensor=4)
    jitted = spmd.jit(model, mesh=mesh, in_shardings=(TENSOR, P()))
    (emitted,) = summarize(jitted.trace(WEIGHTS, X).propagate().partition().collectives)
    assert (emitted.count, emitted.bytes) == after


def test_predicted_is_that_one_half_is_waited_for(chip: None) -> None:
    """Where the links take longer than all else."""
    machine = Machine(dataclasses.replace(CHIP, link_bandwidth=1e3), (4,))
    found = []
    for off in (["streams"], []):
        plan = planned(model, WEIGHTS, X, disable_passes=off)
        all_lines = lines(plan)
        spans = timeline(plan, all_lines, held(plan, all_lines), machine).spans
        found.append([span.exposed for span in spans if span.wire])
    assert found[1] == pytest.approx([seconds / 2 for seconds in found[0]], rel=1e-3)


def test_sums_that_end_in_shards(chip: None) -> None:
    """The sequence is sharded between layers: scatters and gathers are halved."""
    mesh = make_mesh(data=2, tensor=4)

    def run(weights: Any, x: Any) -> Any:
        def body(x: Any, w: Any) -> tuple[Any, None]:
            x, _ = layer(x, w)
            return shard(x, P("data", "tensor")), None

        return model(weights, x, body)

    both = jax.value_and_grad(run, argnums=(0, 1))
    found = check(both, [WEIGHTS, X], mesh, (TENSOR, P("data", "tensor")))
    kinds = {s.kind for one, *_ in in_parts(found.plan) if isinstance(one, Move)
             for s in one.plan.steps}  # fmt: skip
    assert {"all_gather", "reduce_scatter"} <= kinds


def test_a_loop_hands_its_stacks_over_in_parts(chip: None) -> None:
    """What the way forward saves for the way back."""
    grads = jax.grad(model)
    plan = planned(grads, WEIGHTS, X, out=TENSOR)
    forward, backward = (c for c in plan.body.code if isinstance(c, Compute) and c.regions)
    assert forward.parts is not None and backward.parts is not None
    made = zip(forward.results, forward.parts.results, strict=True)
    read = zip(backward.operands, backward.parts.operands, strict=True)
    stacks = {key for key, dim in made if dim == 1}
    assert stacks and stacks <= {key for key, dim in read if dim == 1}


def test_every_instruction_can_be_checked_alone(chip: None) -> None:
    mesh = make_mesh(tensor=4)
    jitted = spmd.jit(jax.grad(remat), mesh=mesh, in_shardings=(TENSOR, P()))
    stage = jitted.trace(WEIGHTS, X).propagate().partition()
    assert streams.streams(stage.plan)
    assert spmd.check(stage, WEIGHTS, X).ok


@pytest.mark.parametrize("fun", [model, remat])
def test_sums_become_scatters_and_gathers_where_only_those_run_beside(
    fun: Any, chip: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = frozenset(("permute", "all_gather"))
    monkeypatch.setitem(CHIPS, "cpu", dataclasses.replace(CHIP, overlaps=kinds))
    both = jax.value_and_grad(fun, argnums=(0, 1))
    found = check(both, [WEIGHTS, X], make_mesh(tensor=4), (TENSOR, P()))
    whole = planned(both, WEIGHTS, X, disable_passes=["streams"])
    sent = [step for one, *_ in in_parts(found.plan) if isinstance(one, Move)
            for step in one.plan.steps]  # fmt: skip
    assert {step.kind for step in sent} == {"reduce_scatter", "all_gather"}
    assert {step.dim for step in sent} == {1}  # the sequence: the batch is in parts
    after, before = totals(lines(found.plan)), totals(lines(whole))
    assert sum(size for _, size in after.values()) == sum(size for _, size in before.values())


def test_the_compiler_is_told_to_keep_two_sums_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHIPS, "cpu", CHIP)
    mesh = make_mesh(tensor=4)
    jitted = spmd.jit(model, mesh=mesh, in_shardings=(TENSOR, P()))
    stage = jitted.trace(WEIGHTS, X).propagate().partition()
    name = "xla_jf_crs_combiner_threshold_in_bytes"
    assert target.compiler_options(stage.options, stage.plan) == {name: "1000000"}
    with pytest.raises(ArgumentError) as error:  # simulated devices have another compiler
        jitted(WEIGHTS, X)
    what, why, fix = str(error.value).splitlines()
    assert what == "sums of two streams that stay two, which TPUs are asked for"
    assert why.startswith(f"  why: this compiler does not take the option {name}: ")
    assert fix == '  fix: spmd.jit(..., disable_passes=["streams"]) compiles without it'
    without = spmd.jit(model, mesh=mesh, in_shardings=(TENSOR, P()), disable_passes=["streams"])
    np.testing.assert_allclose(without(WEIGHTS, X), model(WEIGHTS, X), rtol=1e-5)


def test_what_the_user_exchanges_by_hand_stays_as_written(chip: None) -> None:
    """All of the region, in which other axes are ours."""
    mesh = make_mesh(data=2, tensor=4)

    def by_hand(weights: Any, x: Any) -> Any:
        def run(w: Any, x: Any) -> Any:
            return lax.pmean(jnp.mean(lax.scan(layer, x, w)[0] ** 2), "data")

        specs = (P(), P("data"))
        mapped = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P(), axis_names={"data"})
        return mapped(weights, x)

    found = check(by_hand, [WEIGHTS, X], mesh, (TENSOR, P("data")))
    sent = {step.kind for move, _ in found.plan.moves() for step in move.plan.steps}
    assert "all_reduce" in sent
    assert not streams.streams(found.plan)


def test_places_along_several_dims_of_one_equation(chip: None) -> None:
    """Of embeddings, whose gradients are added up where tokens lie that two axes shard."""
    mesh = make_mesh(data=2, sequence=2, tensor=2)
    tokens = np.random.default_rng(0).integers(0, 8, (2 * BATCH, 2 * SEQUENCE))

    def loss(table: Any, weights: Any, tokens: Any) -> Any:
        return unrolled(weights, table[tokens])

    args, specs = [arr(8, WIDTH), WEIGHTS, tokens], (P(), TENSOR, P("data", "sequence"))
    found = check(jax.value_and_grad(loss), args, mesh, specs, (P(), P()))
    adding = [one for one, parts, _ in in_parts(found.plan) if isinstance(one, Compute)
              and one.op.rule.local is not None and parts.results == (None,)]  # fmt: skip
    assert adding, "the scatter runs in parts"


def test_a_part_has_its_place_inside_of_its_factor_and_outside_of_the_next() -> None:
    mesh = make_mesh(data=2, sequence=4)
    stage = spmd.jit(jnp.tanh, mesh=mesh).trace(X).propagate().partition()
    (one,) = (found for found in stage.plan.body.code if isinstance(found, Compute))
    fine = with_parts(stage.plan.mesh, 2)

    def places() -> Any:
        found = [LocalView(one, fine, i).index(("data", PART, "sequence")) for i in range(2)]
        return jnp.stack(found)[None, :, None]

    run = jax.shard_map(places, mesh=mesh, in_specs=(), out_specs=P("data", None, "sequence"))
    np.testing.assert_array_equal(run(), np.arange(16).reshape(2, 2, 4))


def test_weights_that_take_longest_to_read_are_read_once(
    chip: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of few examples wait for memory, and halves of them for as long each."""
    few = arr(2, 1, WIDTH)
    wide = {"up": arr(LAYERS, WIDTH, 4096), "down": arr(LAYERS, 4096, WIDTH)}
    slow = dataclasses.replace(
        CHIP, link_bandwidth=1e4, hbm_bandwidth=1e7, flops=(("float32", 1e9),)
    )
    monkeypatch.setitem(CHIPS, "cpu", slow)
    assert not streams.streams(planned(unrolled, wide, few))
    monkeypatch.setitem(CHIPS, "cpu", dataclasses.replace(slow, hbm_bandwidth=1e12))
    assert streams.streams(planned(unrolled, wide, few))


def test_what_is_the_same_in_every_step_is_joined_before_them(chip: None) -> None:
    def run(weights: Any, x: Any) -> Any:
        y = layers(weights, x)
        return lax.scan(lambda c, _: (jnp.tanh(c @ y.reshape(-1, WIDTH).T @ y.reshape(-1, WIDTH)),
                                      None), jnp.ones((4, WIDTH)), None, length=5)[0]  # fmt: skip

    plan = planned(run, WEIGHTS, X)
    loops = [one for one in plan.body.code if isinstance(one, Compute) and one.regions]
    assert streams.streams(plan) and all(loop.parts is None for loop in loops)
    check(run, [WEIGHTS, X], make_mesh(tensor=4), (TENSOR, P()))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='needs the TPU compiler: pip install "spmd-compiler[tpu]"',
)
def test_the_compiler_for_tpus_hides_one_half_behind_the_other() -> None:
    """Of a tensor-parallel layer's way forward most is waited for otherwise."""
    shapes = {"up": (4, 2048, 8192), "down": (4, 8192, 2048)}
    weights = {k: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for k, shape in shapes.items()}
    x = jax.ShapeDtypeStruct((8, 1024, 2048), jnp.bfloat16)
    options = dict(mesh={"tensor": 4}, topology="v5p:2x2x1", in_shardings=(TENSOR, P()),
                   out_shardings=P())  # fmt: skip
    halves = spmd.aot(model, weights, x, **options)
    whole = spmd.aot(model, weights, x, disable_passes=["streams"], **options)
    assert halves.schedule.exposed < 0.6 * whole.schedule.exposed
    assert halves.schedule.seconds < 0.95 * whole.schedule.seconds


# Of random programs some of which much can run in parts.
SEEDS = (*range(9), 19, 37, 57)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_programs_in_parts_wherever_that_can_be(
    seed: int, monkeypatch: pytest.MonkeyPatch, chip: None
) -> None:
    def everywhere(self: Any) -> Iterator[Any]:
        for one in self.body.code:
            for key in one.writes:
                yield from (self._closure(key, dim) for dim in range(key.value.rank))

    monkeypatch.setattr(chains.Search, "_together", everywhere)
    monkeypatch.setattr(chains.Stream, "gain", property(lambda self: float(len(self.parts))))
    case = draw(random.Random(seed))
    case.run()
