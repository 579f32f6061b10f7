"""Loops over a sharded dim whose steps need nothing of one another: values, and what is sent."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import spmd
from sharding import P, shard
from sharding.errors import ShardingWarning
from spmd.estimate.work import lines
from tests.oracle import check, kinds, make_mesh

RNG = np.random.default_rng(0)
ROWS = P("d")
OFF = {"disable_passes": ["own_steps"]}


def arr(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def in_parts(planned: spmd.Partitioned) -> bool:
    """Whether some loop became a region over the axis `d`."""
    maps = (op for op in planned.plan.program.ops() if op.primitive.name == "shard_map")
    return any("d" in op.params["newly_manual_axes"] for op in maps)


def work(planned: spmd.Partitioned) -> float:
    return sum(line.flops.total * line.trips for line in lines(planned.plan) if line.contracts)


def mapped(w: Any, x: Any) -> Any:
    return lax.map(lambda row: jnp.tanh(row @ w), x)


W, X = arr(16, 16), arr(64, 16)


def test_a_map_over_examples_sends_nothing() -> None:
    found = check(mapped, (W, X), make_mesh(d=8), (P(), ROWS), ROWS)
    off = check(mapped, (W, X), make_mesh(d=8), (P(), ROWS), ROWS, **OFF)
    assert not kinds(found) and kinds(off)[("all_gather", ("d",))] == (1, X.nbytes * 7 / 8)
    assert 8 * work(found) == work(off) == 2 * 64 * 16 * 16


def test_the_diagnostic_says_so() -> None:
    found = check(mapped, (W, X), make_mesh(d=8), (P(), ROWS), ROWS)
    (told,) = found.diagnostics
    assert (told.kind, told.value, told.bytes) == ("own steps", "scan", 0.0)
    assert told.text == (
        "its steps need nothing of one another: every device runs those of its own rows, in a "
        "shard_map"
    )
    assert told.source.startswith("e2e/test_own_steps.py:")
    assert told.remedy.startswith("disable_passes=['own_steps'] leaves it one loop")
    spmd.jit(mapped, mesh=make_mesh(d=8), in_shardings=(P(), ROWS), strict=True)(W, X)


def test_its_gradient_is_summed_once() -> None:
    """The loop back runs over what the loop forward has stacked."""
    step = jax.grad(lambda w, x: (mapped(w, x) ** 2).sum(), (0, 1))
    found = check(step, (W, X), make_mesh(d=8), (P(), ROWS), (P(), ROWS))
    assert kinds(found) == {("all_reduce", ("d",)): (1, 2 * W.nbytes * 7 / 8)}


def attend(q: Any, k: Any, v: Any) -> Any:
    chunks = q.reshape(16, -1, q.shape[-1])
    return lax.map(lambda c: jax.nn.softmax(c @ k.T) @ v, chunks).reshape(q.shape)


def test_chunks_of_queries_meet_all_keys() -> None:
    qkv = arr(128, 8), arr(128, 8), arr(128, 8)
    once = qkv[0].nbytes * 7 / 8
    found = check(attend, qkv, make_mesh(d=8), (ROWS,) * 3, ROWS)
    assert kinds(found) == {("all_gather", ("d",)): (2, 2 * once)}
    back = jax.grad(lambda *qkv: (attend(*qkv) ** 2).sum(), (0, 1, 2))
    found = check(back, qkv, make_mesh(d=8), (ROWS,) * 3, (ROWS,) * 3)
    assert kinds(found) == {
        ("all_gather", ("d",)): (2, 2 * once), ("reduce_scatter", ("d",)): (2, 2 * once),
    }  # fmt: skip


def test_other_axes_are_shared_as_always() -> None:
    found = check(mapped, (W, X), make_mesh(d=4, t=2), (P(None, "t"), ROWS), P("d", "t"))
    assert not kinds(found) and work(found) == 2 * 64 * 16 * 16 / 8


def total(c: Any, row: Any) -> Any:
    return (c[0] + row.sum(), c[1] + jnp.int32(2)), row * 2


INDEPENDENT: dict[str, Callable[[Any], Any]] = {
    "sums": lambda x: lax.scan(total, (jnp.float32(3), jnp.int32(1)), x),
    "from the end": lambda x: lax.scan(total, (jnp.float32(3), jnp.int32(1)), x, reverse=True),
    "unrolled": lambda x: lax.scan(total, (jnp.float32(3), jnp.int32(1)), x, unroll=3),
    "batches": lambda x: lax.map(jnp.sin, x, batch_size=4),
    "trees": lambda x: lax.map(lambda t: {"a": t[0] + t[1].sum()}, (x, {"b": x}["b"])),
    "keys": lambda x: lax.map(lambda k: jax.random.normal(k, (3,)), jax.random.split(
        jax.random.key(0), 64)) + x[:, :3],
    "a weak type": lambda x: lax.scan(lambda c, r: (c + r.sum(), r * 2), 0.0, x),
    "with checkpoints": lambda x: jax.grad(lambda x: lax.map(jax.checkpoint(jnp.sin), x).sum())(x),
    "mapped over": lambda x: jax.vmap(lambda y: lax.map(jnp.cos, y), 1, 1)(x),
    "in a loop": lambda x: lax.fori_loop(0, 3, lambda i, x: lax.map(jnp.sin, x), x),
    "in a branch": lambda x: lax.cond(x[0, 0] > 0, lambda x: lax.map(jnp.sin, x), jnp.cos, x),
    "one after the other": lambda x: lax.map(jnp.sin, lax.map(jnp.cos, x)),
    "a carry that stays": lambda x: lax.scan(lambda c, r: (c, r * c), jnp.float32(3), x),
    "complex": lambda x: lax.scan(lambda c, r: (c + r.sum(), r), jnp.complex64(1j), x + 0j),
}  # fmt: skip


@pytest.mark.parametrize("axes", ["d", ("d", "e")])
@pytest.mark.parametrize("name", INDEPENDENT)
def test_what_steps_of_its_own_are(name: str, axes: Any) -> None:
    found = check(INDEPENDENT[name], (X,), make_mesh(d=4, e=2), (P(axes),))
    assert in_parts(found)
    gathered = sum(wire for (kind, _), (_, wire) in kinds(found).items() if kind == "all_gather")
    assert gathered < X.nbytes * 3 / 4


def seen(c: Any, row: Any) -> Any:
    return c + row.sum(), c * row


DEPENDENT: dict[str, Callable[[Any], Any]] = {
    "a prefix": lambda x: lax.scan(seen, jnp.float32(1), x),
    "a running sum": lambda x: lax.scan(lambda c, r: (c + r, c + r), x[0], x),
    "more of a running sum": lambda x: lax.scan(lambda c, r: ((n := c + r), n * 2), x[0], x),
    "a product": lambda x: lax.scan(lambda c, r: (c * r.sum(), r), jnp.float32(1), x),
    "an extreme": lambda x: lax.scan(lambda c, r: (jnp.maximum(c, r), r), x[0], x),
    "twice": lambda x: lax.scan(lambda c, r: (c + c + r.sum(), r), jnp.float32(1), x),
    "a counter that is read": lambda x: lax.scan(lambda i, r: (i + 1, r * i), 0, x),
    "a flag": lambda x: lax.scan(lambda c, r: (c ^ (r[0] > 0), r), jnp.bool_(True), x),
    "swapped": lambda x: lax.scan(
        lambda c, r: ((c[1] + r.sum(), c[0] + 1), r), (jnp.float32(0), jnp.float32(1)), x),
}  # fmt: skip


@pytest.mark.parametrize("name", DEPENDENT)
def test_what_needs_the_steps_before_it_stays_one_loop(name: str) -> None:
    found = check(DEPENDENT[name], (X,), make_mesh(d=8), (ROWS,))
    assert not in_parts(found)


@pytest.mark.parametrize("rows", [62, 4, 0])
def test_lengths_that_do_not_divide(rows: int) -> None:
    def fun(w: Any, x: Any) -> Any:
        return mapped(w, shard(jnp.sin(x), "d", None))

    found = check(fun, (W, arr(rows, 16)), make_mesh(d=8), None)
    assert not in_parts(found)


def test_axes_of_size_one_and_parts_of_axes() -> None:
    assert not in_parts(check(mapped, (W, X), make_mesh(d=1), (P(), ROWS)))

    def halves(x: Any) -> Any:  # of sixteen rows eight are the major dim, and four devices have two
        return lax.map(jnp.sin, x.reshape(4, 4, -1))

    check(halves, (arr(16, 4),), make_mesh(d=8), (ROWS,))


def test_effects_happen_in_their_order() -> None:
    said: list[float] = []

    def noisy(x: Any) -> Any:
        def one(row: Any) -> Any:
            jax.debug.callback(lambda n: said.append(float(n)), row[0], ordered=True)
            return row * 2

        return lax.map(one, x)

    spmd.jit(noisy, mesh=make_mesh(d=8), in_shardings=(ROWS,))(X).block_until_ready()
    jax.effects_barrier()
    assert said == X[:, 0].tolist()


def test_weights_that_are_more_than_the_examples_are_not_gathered() -> None:
    w = arr(16, 512)
    found = check(mapped, (w, X[:16]), make_mesh(d=8), (P(None, "d"), ROWS), P(None, "d"))
    assert not in_parts(found)


def outer(row: Any) -> Any:
    return jnp.outer(row, row)


DEARER = {
    "results elsewhere": (lambda x: lax.map(outer, x), P(None, "d")),
    "large sums": (lambda x: lax.scan(lambda c, r: (c + outer(r), None), jnp.zeros((64, 64)), x),
                   P()),
}  # fmt: skip


@pytest.mark.parametrize("name", DEARER)
def test_loops_stay_whole_where_that_is_less(name: str) -> None:
    fun, out = DEARER[name]
    x, mesh = arr(64, 64), make_mesh(d=8)
    found, off = (check(fun, (x,), mesh, (ROWS,), out, **how) for how in ({}, OFF))
    assert not in_parts(found) and found.wire_bytes == off.wire_bytes


def test_loops_stay_whole_where_parts_do_not_fit() -> None:
    """Weights are whole for the steps of its own; the loop as it was gathers examples, for more
    bytes and less memory."""
    args, places = (arr(64, 256), arr(256, 64)), (P(None, "d"), ROWS)

    def planned(limit: int | None, **how: Any) -> spmd.Partitioned:
        return check(mapped, args, make_mesh(d=8), places, ROWS, memory_limit=limit, **how)

    own, whole = planned(None), planned(None, **OFF)
    assert in_parts(own) and own.wire_bytes < whole.wire_bytes
    assert whole.peak_memory < own.peak_memory
    between = (whole.peak_memory + own.peak_memory) // 2
    assert in_parts(planned(own.peak_memory)) and not in_parts(planned(between))
    with pytest.warns(ShardingWarning):  # neither fits: the smaller
        assert not in_parts(planned(whole.peak_memory - 1))


def test_bodies_that_name_the_axis() -> None:
    mesh, two = make_mesh(d=8), make_mesh(d=4, e=2)

    def stated(axis: str) -> Callable[[Any], Any]:
        return lambda x: lax.map(lambda row: shard(jnp.sin(row), axis), x)

    def local(axis: str) -> Callable[[Any], Any]:
        fun = jax.shard_map(lambda row: row + lax.axis_index(axis), mesh=two, in_specs=P(axis),
                            out_specs=P(axis), axis_names={axis})  # fmt: skip
        return lambda x: lax.map(fun, x)

    assert not in_parts(check(stated("d"), (X,), mesh, (ROWS,)))
    assert in_parts(check(stated("e"), (X,), two, (ROWS,)))
    check(local("d"), (X,), two, (ROWS,))
    assert in_parts(check(local("e"), (X,), two, (ROWS,)))


def test_loops_that_are_traced_anew_each_time() -> None:
    """A predicate for each example makes another body: its loop is another one every time."""

    def fun(x: Any) -> Any:
        def steps(n: Any) -> Any:
            return lax.fori_loop(0, n, lambda i, s: lax.map(jnp.sin, s), x)

        return jax.vmap(steps)(jnp.arange(3))

    check(fun, (X,), make_mesh(d=8), (ROWS,))


@pytest.mark.parametrize("given", [True, False])
def test_under_the_mesh_that_is_set(given: bool) -> None:
    mesh = make_mesh(d=8)
    how = {"mesh": mesh} if given else {}
    with jax.set_mesh(mesh):
        found = spmd.jit(mapped, in_shardings=(P(), ROWS), **how)(W, X)
    np.testing.assert_allclose(found, jax.jit(mapped)(W, X), rtol=1e-5, atol=1e-6)


def test_inside_of_other_transformations() -> None:
    """The loop is part of another program, and partitioned with that."""
    mesh = make_mesh(d=8)
    fun = spmd.jit(mapped, mesh=mesh, in_shardings=(P(), ROWS), out_shardings=ROWS)
    step = jax.jit(jax.grad(lambda w, x: (fun(w, x) ** 2).sum()))
    want = jax.jit(jax.grad(lambda w, x: (mapped(w, x) ** 2).sum()))(W, X)
    x = jax.device_put(X, jax.NamedSharding(mesh, ROWS))
    np.testing.assert_allclose(step(W, x), want, rtol=1e-4, atol=1e-5)
    assert "all-gather" not in step.lower(W, x).compile().as_text()


def test_the_oracle_knows_them() -> None:
    fun = spmd.jit(mapped, mesh=make_mesh(d=8), in_shardings=(P(), ROWS))
    assert "give what they give unsharded" in str(spmd.check(fun, W, X))


def test_inside_of_what_is_manual_it_is_left_alone() -> None:
    def local(x: Any) -> Any:
        return lax.map(jnp.sin, x) + lax.axis_index("d")

    mesh = make_mesh(d=4, e=2)
    fun = jax.shard_map(local, mesh=mesh, in_specs=P("d"), out_specs=P("d"), axis_names={"d"})
    found = check(fun, (X,), mesh, (P(("d", "e")),))
    assert [op.primitive.name for op in found.plan.program.ops()].count("shard_map") == 1
