"""The estimates of work, memory and time against what can be counted by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AbstractMesh

import spmd
from sharding import P, shard
from spmd import collectives
from spmd.estimate import liveness
from spmd.estimate.fusion import Compiler, held
from spmd.estimate.timeline import Timeline, timeline
from spmd.estimate.work import lines, totals
from spmd.hardware import Machine
from spmd.stages import Partitioned

F32 = jnp.float32
NHWC = ("NHWC", "HWIO", "NHWC")
MIB = 2**20


def shape(*dims: int, dtype: Any = F32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def partition(
    f: Any, *args: Any, mesh: dict[str, int], specs: Any = None, **options: Any
) -> Partitioned:
    abstract = AbstractMesh(tuple(mesh.values()), tuple(mesh))
    jitted = spmd.jit(f, mesh=abstract, in_shardings=specs, **options)
    return jitted.trace(*args).propagate().partition()


def flops(stage: Partitioned) -> list[float]:
    sums = [0.0] * 4
    for line in lines(stage.plan):
        sums = [s + x * line.trips for s, x in zip(sums, line.flops, strict=True)]
    return sums


def peak(stage: Partitioned, donated: Any = ()) -> float:
    return liveness.peak_bytes(stage.plan, donated) / MIB


def times(stage: Partitioned, machine: str) -> Timeline:
    found = lines(stage.plan)
    return timeline(stage.plan, found, held(stage.plan, found), Machine.parse(machine))


# --- work ---------------------------------------------------------------------------------------


def test_a_divided_matmul_is_all_useful() -> None:
    stage = partition(jnp.dot, shape(64, 32), shape(32, 16), mesh={"x": 4}, specs=(P("x"), P()))
    assert flops(stage) == [2 * 64 * 32 * 16 / 4, 0, 0, 0]


def test_a_matmul_that_nothing_shards_is_replicated() -> None:
    stage = partition(jnp.dot, shape(64, 32), shape(32, 16), mesh={"x": 4}, specs=(P(), P()))
    work = 2 * 64 * 32 * 16
    assert flops(stage) == [work / 4, work * 3 / 4, 0, 0]


@pytest.mark.filterwarnings("ignore::sharding.ShardingWarning")
def test_padding_is_counted() -> None:
    def f(x, w):
        return jnp.dot(lax.with_sharding_constraint(x, P("x")), w)

    stage = partition(f, shape(6, 32), shape(32, 16), mesh={"x": 4})
    one = 2 * 32 * 16  # operations of a row: 6 rows on 4 devices are 2 on each, 8 in all
    assert flops(stage) == [1.5 * one, 0, 0.5 * one, 0]


def test_what_remat_repeats_is_recomputed() -> None:
    def loss(w, x):
        return jax.checkpoint(lambda x: jnp.sin(x @ w) @ w)(x).sum()

    stage = partition(jax.grad(loss), shape(32, 32), shape(64, 32), mesh={"x": 1})
    found = lines(stage.plan)
    dots = [line for line in found if line.op and line.op.primitive.name == "dot_general"]
    one = 2 * 64 * 32 * 32
    # The forward pass has two, of which the loss needs the sum only; the backward pass repeats one.
    assert [line.flops.recomputed for line in dots if line.op.recomputed] == [one]
    assert {line.flops.useful for line in dots if not line.op.recomputed} == {one}


def test_a_loop_counts_as_often_as_it_runs() -> None:
    def f(x, w):
        return lax.scan(lambda c, _: (c @ w, None), x, length=5)[0]

    stage = partition(f, shape(64, 32), shape(32, 32), mesh={"x": 4}, specs=(P("x"), P()))
    assert flops(stage)[:2] == [5 * 2 * 64 * 32 * 32 / 4, 0]


def test_the_three_convolutions_of_a_step_do_the_same_work() -> None:
    def loss(x, k):
        y = lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=NHWC)
        return jnp.sum(y * y)

    args = (shape(8, 16, 16, 4), shape(3, 3, 4, 6))
    stage = partition(jax.grad(loss, (0, 1)), *args, mesh={"x": 4}, specs=(P("x"), P()))
    found = [line.flops.total for line in lines(stage.plan) if line.op and line.flops.total
             and line.op.primitive is lax.conv_general_dilated_p]  # fmt: skip
    assert found == [2 * 8 * 16 * 16 * 6 * 4 * 9 / 4] * 3


def _conv(x, k):
    return lax.conv_general_dilated(x, k, (1,), "SAME")


def _branches(i, x):
    return lax.switch(i, [lambda x: x.sum(0), lambda x: x[0], lambda x: jnp.sort(x, 0)[0]], x)


LOCAL = {
    "halo of a convolution": (_conv, (shape(2, 3, 64), shape(5, 3, 3)), (P(None, None, "x"), None)),
    "cumulative sum": (lambda x: lax.cumsum(x), (shape(64, 8),), (P("x"),)),
    "sort": (lambda x: jnp.sort(x, 0), (shape(64, 8),), (P("x"),)),
    "shift": (lambda x: jnp.roll(x, 3, 0), (shape(64, 8),), (P("x"),)),
    "lookup": (lambda t, i: t[i], (shape(64, 8), shape(5, dtype=jnp.int32)), (P("x"), None)),
    "cond": (_branches, (shape(dtype=jnp.int32), shape(64, 8)), (None, P("x"))),
    "scan": (
        lambda x: lax.scan(lambda c, _: (jnp.roll(c, 1, 0), c.sum()), x, length=3),
        (shape(64, 8),), (P("x"),),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOCAL)
def test_collectives_of_local_functions_are_those_of_the_program(name: str) -> None:
    f, args, specs = LOCAL[name]
    stage = partition(f, *args, mesh={"x": 4}, specs=specs)
    summed = collectives.summarize(stage.collectives)
    counted = {(c.kind, c.axes): (c.count, c.bytes) for c in summed}
    assert totals(lines(stage.plan)) == counted
    assert counted  # there is something to count


def test_collectives_of_manual_regions_are_those_of_the_program() -> None:
    def f(x):
        summed = jax.shard_map(lambda x: lax.psum(x, "x"), in_specs=P("x"), out_specs=P())
        return summed(x)

    stage = partition(f, shape(64, 8), mesh={"x": 4})
    assert totals(lines(stage.plan)) == {("all_reduce", ("x",)): (1, 2 * 16 * 8 * 4 * 3 / 4)}


# --- memory -------------------------------------------------------------------------------------


def test_an_elementwise_chain_holds_its_argument_and_result() -> None:
    stage = partition(lambda x: jnp.tanh(jnp.exp(x) + 1) * 2, shape(MIB // 4), mesh={"x": 1})
    assert peak(stage) == 2


def test_a_donated_argument_becomes_the_result() -> None:
    stage = partition(lambda x: jnp.tanh(x) * 2, shape(MIB // 4), mesh={"x": 1})
    assert peak(stage, [True]) == 1


def test_a_shard_is_what_a_device_holds() -> None:
    stage = partition(lambda x: x * 2, shape(MIB // 4), mesh={"x": 4}, specs=(P("x"),))
    assert peak(stage) == 0.5


def test_products_are_held_until_they_are_read() -> None:
    def f(x):  # x, x @ x and (x @ x) @ x; then the first product is free, x is the caller's
        return x @ x @ x @ x

    assert peak(partition(f, shape(512, 512), mesh={"x": 1})) == 3


def test_the_carry_of_a_loop_is_one_buffer_beside_its_new_value() -> None:
    def f(x, w):
        return lax.scan(lambda c, _: (c @ w, None), x, length=9)[0]

    stage = partition(f, shape(512, 512), shape(512, 512), mesh={"x": 1})
    assert peak(stage) == 4  # x, w, the carry and the product
    assert peak(stage, [True, False]) == 3  # the carry takes the place of x


def test_stacked_results_of_a_loop_are_there_from_its_start() -> None:
    def f(x):
        return lax.scan(lambda c, _: (c, c @ c), x, length=8)[1]

    # x, the stack and a product; a carry that the body hands on takes no memory
    assert peak(partition(f, shape(512, 512), mesh={"x": 1})) == 1 + 8 + 1


def test_contractions_take_elementwise_operands_in_on_tpus_alone() -> None:
    stage = partition(lambda x, w: jnp.exp(x) @ w, shape(512, 512), shape(512, 512), mesh={"x": 1})
    assert liveness.peak_bytes(stage.plan) == 3 * MIB
    assert liveness.peak_bytes(stage.plan, compiler=Compiler(into_dots=False)) == 4 * MIB


def test_what_a_loop_stacks_does_not_take_the_place_of_what_it_runs_over() -> None:
    def f(x):  # the steps still read the one when they write the other
        return lax.scan(lambda c, row: (c, lax.sort(row)), 0.0, lax.sort(x))[1]

    stage = partition(f, shape(8, 512, 512), mesh={"x": 1})
    assert peak(stage) == 3 * 8 + 1  # x, sorted, the stack, and what a step sorts
    onto = partition(lambda x, y: lax.scan(lambda c, row: (c + row.sum(), None), y, lax.sort(x))[0],
                     shape(8, 512, 512), shape(8, 512, 512), mesh={"x": 1})  # fmt: skip
    assert peak(onto) == pytest.approx(4 * 8)  # x, y, sorted, and the carry beside it
    carry = partition(lambda x: lax.fori_loop(0, 8, lambda _, c: c * 2, lax.sort(x)),
                      shape(8, 512, 512), mesh={"x": 1})  # fmt: skip
    assert peak(carry) == 2 * 8  # the carry takes the place of its initial value


def test_weights_of_a_loop_are_converted_before_it() -> None:
    def f(x, ws):
        layer = jax.checkpoint(lambda x, w: (x @ w.astype(jnp.bfloat16), None))
        return lax.scan(layer, x, ws)[0]

    args = shape(512, 512, dtype=jnp.bfloat16), shape(8, 512, 512)
    stage = partition(f, *args, mesh={"x": 1})
    # x, 8 MiB of weights, and 4 MiB of them in bfloat16; the carry, and its new value
    assert peak(stage) == 8 + 4 + 3 * 0.5
    assert liveness.peak_bytes(stage.plan, compiler=Compiler(hoists=False)) / MIB < 8 + 2.1

    def used(x, ws):
        return lax.scan(lambda x, w: (x @ w.astype(jnp.bfloat16), w.sum()), x, ws)

    assert peak(partition(used, *args, mesh={"x": 1})) < 8 + 2.1


def test_a_reduction_beside_computation_has_a_place_of_its_own() -> None:
    args = shape(512, 512), shape(512, 512)
    stage = partition(jnp.dot, *args, mesh={"x": 4}, specs=(P(None, "x"), P("x")))
    beside = Compiler(beside=frozenset(("all_reduce",)))
    assert peak(stage) == 2 / 4 + 1
    assert liveness.peak_bytes(stage.plan, compiler=beside) / MIB == 2 / 4 + 2


def test_what_can_be_used_up_first_is_not_held() -> None:
    def f(x):  # four products that the program makes first, and sums up later
        made = [x @ x for _ in range(4)]
        return [(y @ x).sum() for y in made]

    stage = partition(f, shape(512, 512), mesh={"x": 1})
    assert peak(stage) == pytest.approx(3, abs=0.01)  # x, a product, and its product with x


def test_an_annotated_result_is_held_to_the_end() -> None:
    def f(x):
        y = shard(x @ x, P())
        return y, (y @ x) @ x

    stage = partition(f, shape(512, 512), mesh={"x": 1})
    assert peak(stage) == 4  # x, the first product to the end, and the two that follow


def test_an_annotated_result_that_is_fused_is_held() -> None:
    stage = partition(lambda x: shard(shard(x * 2, P()), P()), shape(MIB // 4), mesh={"x": 1})
    assert peak(stage) == 2


def test_the_profile_names_what_is_held() -> None:
    stage = partition(lambda x: (x @ x) @ x, shape(512, 512), mesh={"x": 1})
    found = lines(stage.plan)
    profile = liveness.profile(stage.plan, found, [], held(stage.plan, found))
    assert profile.over == (2 * MIB, 3 * MIB)
    assert [(str(b.key.value), b.bytes, b.argument, b.result) for b in profile.live(1)] == [
        ("x", MIB, 0, False), ("%1", MIB, -1, False), ("result", MIB, -1, True)
    ]  # fmt: skip


# --- time ---------------------------------------------------------------------------------------

BIG = 8192


def test_a_large_matmul_takes_its_operations_over_the_peak() -> None:
    args = (shape(BIG, BIG, dtype=jnp.bfloat16),) * 2
    stage = partition(jnp.dot, *args, mesh={"x": 4}, specs=(P("x"), P()))
    machine = Machine.parse("v5e:2x2")
    assert times(stage, "v5e:2x2").seconds == pytest.approx(
        2 * BIG**3 / 4 / machine.chip.peak("bfloat16")
    )


def test_an_elementwise_operation_takes_its_bytes_over_the_bandwidth() -> None:
    stage = partition(lambda x: x + 1, shape(BIG, BIG), mesh={"x": 4}, specs=(P("x"),))
    machine = Machine.parse("v5e:2x2")
    assert times(stage, "v5e:2x2").seconds == pytest.approx(
        2 * BIG * BIG * 4 / 4 / machine.chip.hbm_bandwidth
    )


def _gathered(x, w, v):
    return x @ w, v.sum(0)


def test_a_collective_hides_under_work_that_does_not_need_it() -> None:
    bf16 = jnp.bfloat16
    args = (shape(BIG, BIG, dtype=bf16), shape(BIG, BIG, dtype=bf16), shape(4, 65536))
    stage = partition(_gathered, *args, mesh={"x": 4}, specs=(P("x"), P(), P("x")),
                      out_shardings=(P("x"), P()))  # fmt: skip
    assert [c.kind for c in stage.collectives] == ["all_reduce"]
    found = lines(stage.plan)
    # GPUs reduce beside computation; with its default options XLA does not on TPUs.
    beside, before = times(stage, "h100:4"), times(stage, "v5e:2x2")
    assert sum(s.exposed for s in beside.spans) < sum(s.wire for s in beside.spans)
    assert [s.exposed for s in before.spans] == [s.wire for s in before.spans]
    for result in (beside, before):
        total = sum((s.compute + s.exposed) * line.trips
                    for s, line in zip(result.spans, found, strict=True))  # fmt: skip
        assert result.seconds == pytest.approx(total)


def test_a_collective_that_is_needed_at_once_is_exposed() -> None:
    stage = partition(lambda x: jnp.tanh(x.sum(0)) @ jnp.ones((4096, 4096)), shape(64, 4096),
                      mesh={"x": 4}, specs=(P("x"),))  # fmt: skip
    found = times(stage, "v5e:2x2")
    wire = sum(s.wire for s in found.spans)
    assert wire > 0
    assert sum(s.exposed for s in found.spans) == pytest.approx(wire)


def test_loops_take_their_trips() -> None:
    def f(x, w, n):
        return lax.scan(lambda c, _: (c @ w, None), x, length=n)[0]

    args = (shape(BIG, BIG, dtype=jnp.bfloat16),) * 2
    once, often = (
        times(partition(lambda x, w, n=n: f(x, w, n), *args, mesh={"x": 4}, specs=(P("x"), P())),
              "v5e:2x2").seconds
        for n in (1, 7)
    )  # fmt: skip
    assert often == pytest.approx(7 * once)


def test_exposed_time_is_no_longer_than_the_transfer() -> None:
    def f(x):  # two reductions over one axis queue for the same links
        return jnp.tanh(x.sum(0)) + jnp.tanh((x * x).sum(0))

    stage = partition(f, shape(64, 65536), mesh={"x": 4}, specs=(P("x"),))
    spans = times(stage, "h100:4").spans
    assert [s.wire > 0 for s in spans].count(True) == 2
    assert all(s.exposed <= s.wire * (1 + 1e-9) for s in spans)
    found = lines(stage.plan)
    total = sum((s.compute + s.exposed) * line.trips
                for s, line in zip(spans, found, strict=True))  # fmt: skip
    assert times(stage, "h100:4").seconds == pytest.approx(total)
