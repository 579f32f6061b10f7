"""`memory_limit`: weights that loops over layers gather twice are gathered once, where they fit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import spmd
from sharding.errors import ArgumentError, GatherError, SpmdError, StrictError
from spmd.partition.saved import gathers
from tests.oracle import check, kinds, make_mesh

LAYERS, WIDTH, BATCH, DEVICES = 4, 32, 256, 4
STACK = LAYERS * WIDTH * WIDTH * 4  # bytes of one kind of weights, whole
GATHERED = STACK * (DEVICES - 1) / DEVICES  # what each device sends for one, by the ring model
SPECS = (({"a": P(None, "fsdp"), "b": P(None, None, "fsdp")}, P("fsdp")), (P(), {
    "a": P(None, "fsdp"), "b": P(None, None, "fsdp")}))  # fmt: skip
PLENTY = 1 << 40
PASSES = ("loop_sums", "loop_invariants")


def arr(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32) / 4


def mesh() -> Any:
    return make_mesh(fsdp=DEVICES)


def layer(x: Any, w: Any) -> tuple[Any, None]:
    return x + jnp.tanh(jnp.tanh(x @ w["a"]) @ w["b"]), None


def step(w: Any, x: Any) -> Any:
    def loss(w: Any) -> Any:
        return jnp.mean(jax.lax.scan(jax.checkpoint(layer), x, w)[0] ** 2)

    value, grad = jax.value_and_grad(loss)(w)
    return value, jax.tree.map(lambda p, g: p - 0.1 * g, w, grad)


ARGS = ({"a": arr(LAYERS, WIDTH, WIDTH), "b": arr(LAYERS, WIDTH, WIDTH) + 0.1}, arr(BATCH, WIDTH))


def planned(limit: int | None, fun: Any = step, **options: Any) -> spmd.Partitioned:
    ins, outs = SPECS
    jitted = spmd.jit(fun, mesh=mesh(), in_shardings=ins, out_shardings=outs, memory_limit=limit,
                      **options)  # fmt: skip
    return jitted.trace(*ARGS).propagate().partition()


def gathered(partitioned: spmd.Partitioned) -> tuple[int, float]:
    return kinds(partitioned)["all_gather", ("fsdp",)]


@pytest.mark.parametrize("limit, count, stacks", [(None, 4 * LAYERS, 4), (PLENTY, 2, 2)])
def test_a_stack_is_gathered_once_for_both_ways(
    limit: int | None, count: int, stacks: int
) -> None:
    ins, outs = SPECS
    found = check(step, ARGS, mesh(), ins, outs, memory_limit=limit)
    assert gathered(found) == (count, stacks * GATHERED)


def test_as_much_as_fits() -> None:
    """One of two stacks of the same size, where the limit is below what both take."""
    most = planned(PLENTY).peak_memory
    assert gathered(planned(most)) == (2, 2 * GATHERED)
    one = planned(most - 1)
    assert gathered(one) == (1 + 2 * LAYERS, 3 * GATHERED)
    assert planned(None).peak_memory < one.peak_memory < most
    assert gathered(planned(one.peak_memory - 1)) == (4 * LAYERS, 4 * GATHERED)
    ins, outs = SPECS
    check(step, ARGS, mesh(), ins, outs, memory_limit=one.peak_memory)


def test_the_pass_can_be_switched_off() -> None:
    off = planned(PLENTY, disable_passes=["saved_gathers"])
    assert gathered(off) == (4 * LAYERS, 4 * GATHERED)


def test_what_is_gathered_once_already_stays() -> None:
    """A forward pass alone: gathering the stack before it sends the same, and holds more."""
    forward = lambda w, x: jax.lax.scan(layer, x, w)[0]  # noqa: E731
    jitted = spmd.jit(forward, mesh=mesh(), in_shardings=SPECS[0], memory_limit=PLENTY)
    assert gathered(jitted.trace(*ARGS).propagate().partition()) == (2 * LAYERS, 2 * GATHERED)


def test_two_loops_that_read_a_stack_in_other_orders() -> None:
    def twice(w: Any, x: Any) -> Any:
        x = jax.lax.scan(layer, x, w)[0]
        return jax.lax.scan(layer, x, w, reverse=True)[0].sum(), w

    ins, outs = SPECS
    found = check(twice, ARGS, mesh(), ins, outs, memory_limit=PLENTY)
    assert gathered(found) == (2, 2 * GATHERED)


def test_a_program_that_does_not_fit_says_so() -> None:
    peak = planned(None).peak_memory
    (found,) = (d for d in planned(1000).diagnostics if d.kind == "over limit")
    assert str(found) == (
        f"over limit: the program: its predicted peak is {peak:,} B per device, {peak - 1000:,} B"
        " more than memory_limit=1,000; shard more of what `spmd.report` lists as largest, or"
        " recompute it with jax.checkpoint"
    )
    assert not [d for d in planned(peak).diagnostics if d.kind == "over limit"]


def test_what_takes_memory_is_given_up_where_there_is_none() -> None:
    """Gradients of all layers as partial sums are whole; reduced in each step they are sharded."""

    def accumulate(w: Any, xs: Any) -> Any:
        def add(total: Any, x: Any) -> tuple[Any, None]:
            return total + jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w) ** 2))(w), None

        return jax.lax.scan(add, jnp.zeros_like(w), xs)[0]

    args = (arr(64, 64), arr(40, 64, 64))
    ins, outs = (P("fsdp"), P(None, "fsdp")), P("fsdp")

    def at(limit: int | None, *off: str) -> spmd.Partitioned:
        options: dict[str, Any] = {"memory_limit": limit, "disable_passes": off}
        return check(accumulate, args, mesh(), ins, outs, **options)

    most = at(None)
    less = at(most.peak_memory - 1)
    ways = [at(None, *off) for off in (("loop_sums",), ("loop_invariants",), PASSES)]
    fitting = {way.wire_bytes for way in ways if way.peak_memory < most.peak_memory}
    assert less.wire_bytes == min(fitting) < max(fitting)
    assert less.peak_memory < most.peak_memory and less.wire_bytes > most.wire_bytes
    assert not [d for d in less.diagnostics if d.kind == "over limit"]
    assert at(most.peak_memory).wire_bytes == most.wire_bytes
    jitted = spmd.jit(accumulate, mesh=mesh(), in_shardings=ins, out_shardings=outs,
                      memory_limit=1000)  # fmt: skip
    smallest = jitted.trace(*args).propagate().partition()
    assert smallest.peak_memory <= less.peak_memory
    assert [d for d in smallest.diagnostics if d.kind == "over limit"]


def test_strict_refuses_a_program_that_does_not_fit() -> None:
    wide = ({"a": arr(2, 1024, 1024), "b": arr(2, 1024, 1024)}, arr(16, 1024))
    jitted = spmd.jit(step, mesh=mesh(), in_shardings=SPECS[0], memory_limit=1000, strict=True)
    with pytest.raises(SpmdError, match="more than memory_limit=1,000"):
        jitted.trace(*wide).propagate().partition()


def test_a_call_says_that_there_is_too_little_memory() -> None:
    small = spmd.jit(lambda x: x * 2, mesh=mesh(), in_shardings=P("fsdp"), memory_limit=10)
    with pytest.warns(match="over limit: the program: its predicted peak is"):
        small(arr(8, 4))
    strict = spmd.jit(lambda x: x * 2, mesh=mesh(), in_shardings=P("fsdp"), memory_limit=10,
                      strict=True)  # fmt: skip
    with pytest.raises(StrictError, match="accepts no program above memory_limit"):
        strict(arr(8, 4))


def test_what_an_operation_needs_whole_is_told_all_the_same() -> None:
    def both(w: Any, x: Any) -> Any:
        ordered = lambda x, w: (x + jnp.tanh(x @ jnp.sort(w, axis=0)), None)  # noqa: E731
        x = jax.lax.scan(ordered, x, w)[0]
        return jax.lax.scan(ordered, x, w, reverse=True)[0]

    args = (arr(LAYERS, WIDTH, WIDTH), arr(BATCH, WIDTH))
    jitted = spmd.jit(both, mesh=mesh(), in_shardings=(P(None, "fsdp"), P("fsdp")),
                      on_gather="error", memory_limit=PLENTY)  # fmt: skip
    with pytest.raises(GatherError):
        jitted.trace(*args).propagate().partition()


def test_a_small_stack_is_gathered_where_a_large_one_does_not_fit() -> None:
    """The large one is gathered more often, and so worth more for its memory: it is tried first."""
    small, large = (WIDTH, WIDTH), (WIDTH, 8 * WIDTH)

    def wide(x: Any, w: Any) -> tuple[Any, None]:
        return x + jnp.tanh(x @ w["up"]) @ w["down"], None

    def fun(w: Any, x: Any) -> Any:
        for _ in range(3):
            x = jax.lax.scan(wide, x, w["wide"])[0]
        for _ in range(2):
            x = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, w["narrow"])[0]
        return x

    args = ({"wide": {"up": arr(LAYERS, *large), "down": arr(LAYERS, *large[::-1])},
             "narrow": arr(LAYERS, *small)}, arr(2048, WIDTH))  # fmt: skip
    ins = ({"wide": {"up": P(None, None, "fsdp"), "down": P(None, "fsdp")},
            "narrow": P(None, None, "fsdp")}, P("fsdp"))  # fmt: skip

    def at(limit: int | None) -> spmd.Partitioned:
        return check(fun, args, mesh(), ins, P("fsdp"), memory_limit=limit)

    plain = at(None)
    room = at(plain.peak_memory + 2 * STACK)
    assert plain.wire_bytes - room.wire_bytes == GATHERED


def test_axes_that_a_plan_splits() -> None:
    """Two heads on an axis of four are sharded over a part of it; the weights over another axis."""

    def heads(w: Any, x: Any) -> Any:
        def layer(x: Any, w: Any) -> tuple[Any, None]:
            y = (x @ w).reshape(BATCH, 2, WIDTH // 2)
            return x + jnp.tanh(y).reshape(BATCH, WIDTH), None

        return jax.grad(lambda w: jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, w)[0] ** 2))(w)

    grid = make_mesh(fsdp=2, tensor=4)
    args = (arr(LAYERS, WIDTH, WIDTH), arr(BATCH, WIDTH))
    ins = (P(None, "fsdp", "tensor"), P("fsdp"))
    found = [check(heads, args, grid, ins, ins[0], 1e-4, memory_limit=x) for x in (None, PLENTY)]
    assert found[1].wire_bytes <= found[0].wire_bytes


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "16GiB"])
def test_limits_that_are_none(limit: Any) -> None:
    with pytest.raises(ArgumentError) as error:
        spmd.jit(step, mesh=mesh(), memory_limit=limit)
    assert str(error.value) == (
        f"memory_limit={limit!r}\n  why: it is the number of bytes that a device has for the"
        " program\n  fix: pass a positive int, such as 16 * 2**30, or None"
    )


def test_what_is_found_and_what_it_is_worth() -> None:
    """A stack is gathered twice, slice by slice; what each of 2 x 2 steps reads whole, 4 times."""
    found = {g.value.name: (g.saved, g.held) for g in gathers(planned(None).plan)}
    assert found == {"w['a']": (GATHERED, STACK), "w['b']": (GATHERED, STACK)}

    def same_weights(w: Any, x: Any) -> Any:
        one = jax.tree.map(lambda x: x[0], w)
        for _ in range(2):
            x = jax.lax.scan(lambda x, _: layer(x, one), x, None, length=2)[0]
        return x, w

    out = spmd.jit(same_weights, mesh=mesh(), in_shardings=SPECS[0])
    shared = list(gathers(out.trace(*ARGS).propagate().partition().plan))
    assert [(g.saved, g.held) for g in shared] == [(3 * GATHERED / LAYERS, STACK / LAYERS)] * 2


def accumulated(w: Any, xs: Any) -> Any:
    """The gradients of microbatches, each with a forward and a backward loop over the layers."""

    def add(total: Any, x: Any) -> tuple[Any, None]:
        grad = jax.grad(lambda w: jnp.mean(jax.lax.scan(jax.checkpoint(layer), x, w)[0] ** 2))(w)
        return jax.tree.map(jnp.add, total, grad), None

    zeros = jax.tree.map(jnp.zeros_like, w)
    return jax.tree.map(lambda p, g: p - 0.1 * g, w, jax.lax.scan(add, zeros, xs)[0])


MICRO = (ARGS[0], arr(3, BATCH, WIDTH))


@pytest.mark.parametrize("limit, count, stacks", [(None, 3 * 4 * LAYERS, 12), (PLENTY, 2, 2)])
def test_a_stack_is_gathered_once_for_all_microbatches(
    limit: int | None, count: int, stacks: int
) -> None:
    ins, outs = (SPECS[0][0], P(None, "fsdp")), SPECS[0][0]
    found = check(accumulated, MICRO, mesh(), ins, outs, memory_limit=limit)
    assert gathered(found) == (count, stacks * GATHERED)


def test_of_microbatches_as_much_as_fits() -> None:
    ins, outs = (SPECS[0][0], P(None, "fsdp")), SPECS[0][0]

    def at(limit: int | None) -> spmd.Partitioned:
        return check(accumulated, MICRO, mesh(), ins, outs, memory_limit=limit)

    most = at(PLENTY).peak_memory
    one = at(most - 1)
    assert gathered(one) == (1 + 3 * 2 * LAYERS, 7 * GATHERED)
    assert at(None).peak_memory < one.peak_memory < most


def test_weights_that_each_microbatch_gathers() -> None:
    """No stack: a weight that every step of a loop gathers for both ways."""

    def add(total: Any, x: Any, w: Any) -> tuple[Any, None]:
        return total + jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w) @ w.T))(w), None

    def run(w: Any, xs: Any) -> Any:
        return jax.lax.scan(lambda t, x: add(t, x, w), jnp.zeros_like(w), xs)[0]

    args = (arr(WIDTH, WIDTH), arr(3, BATCH, WIDTH))
    for limit, count in ((None, 3), (PLENTY, 1)):
        found = check(run, args, mesh(), (P("fsdp"), P(None, "fsdp")), P("fsdp"),
                      memory_limit=limit)  # fmt: skip
        assert gathered(found) == (count, count * GATHERED / LAYERS)


def test_what_no_loop_takes_is_left_alone() -> None:
    """A value that the program gathers itself, once, is nothing to plan again for."""
    run = lambda w, x: jnp.tanh(jnp.tanh(x @ w["a"][0]) @ w["b"][0])  # noqa: E731
    out = spmd.jit(run, mesh=mesh(), in_shardings=SPECS[0])
    assert not list(gathers(out.trace(*ARGS).propagate().partition().plan))


def test_layers_without_a_loop() -> None:
    """Each is gathered where it runs and again on the way back, or once."""

    def run(ws: Any, x: Any) -> Any:
        def loss(ws: Any) -> Any:
            y = x
            for w in ws:
                y = jax.checkpoint(layer)(y, w)[0]
            return jnp.mean(y**2)

        return jax.grad(loss)(ws)

    one = {"a": arr(WIDTH, WIDTH), "b": arr(WIDTH, WIDTH) + 0.1}
    spec = {"a": P("fsdp"), "b": P(None, "fsdp")}
    for limit, count in ((None, 8), (PLENTY, 4)):
        found = check(run, ([one, one], arr(BATCH, WIDTH)), mesh(), ([spec, spec], P("fsdp")),
                      [spec, spec], memory_limit=limit)  # fmt: skip
        assert gathered(found) == (count, count * GATHERED / LAYERS)
