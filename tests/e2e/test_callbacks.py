"""Callbacks and other effects happen as often as in the unsharded program, with global values."""

import contextlib
import io
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import buffer_callback, io_callback
from jax.sharding import PartitionSpec as P

import spmd
from sharding import RuleError
from tests.oracle import kinds, make_mesh, raised_in_thread

X = np.arange(60, dtype=np.float32).reshape(15, 4)  # 15 does not divide
EVEN = np.arange(64, dtype=np.float32).reshape(16, 4)
LIKE = jax.ShapeDtypeStruct(X.shape, X.dtype)

SEEN: list[np.ndarray] = []


def note(*args: Any) -> None:
    SEEN.extend(np.asarray(a).copy() for a in args)


def twice(x: Any) -> Any:
    note(x)
    return np.asarray(x) * 2


@pytest.fixture(autouse=True)
def _nothing_seen() -> Iterator[None]:
    SEEN.clear()
    yield
    jax.effects_barrier()


def mesh() -> Any:
    return make_mesh(x=2, y=4)


def compare(fun: Callable, *args: Any, ordered: bool = True) -> Any:
    """What the host saw, and every result, are those of the unsharded program."""
    SEEN.clear()
    wanted = jax.jit(fun)(*args)
    jax.effects_barrier()
    want = list(SEEN)
    SEEN.clear()
    function = spmd.jit(fun, mesh=mesh(), in_shardings=P("x", "y"))
    with pytest.warns() if any(len(a) % 8 for a in args) else contextlib.nullcontext():
        got = function(*args)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    jax.effects_barrier()
    seen, keys = list(SEEN), [] if ordered else [lambda a: (a.shape, a.tolist())]
    for key in keys:
        seen, want = sorted(seen, key=key), sorted(want, key=key)
    assert len(seen) == len(want)
    for a, b in zip(seen, want, strict=True):
        np.testing.assert_array_equal(a, b)
    return function.trace(*args).propagate().partition()


@pytest.mark.parametrize("ordered", [False, True])
def test_debug_callback_once_with_the_whole_value(ordered: bool) -> None:
    def fun(x: Any) -> Any:
        jax.debug.callback(note, x * 2, 3, ordered=ordered)
        return x + 1

    partitioned = compare(fun, X)
    assert any("gather" in d.kind and "whole" in d.text for d in partitioned.diagnostics)


def test_ordered_prints_keep_their_order() -> None:
    """Which `jax.jit` refuses on more than one device."""

    def fun(x: Any) -> Any:
        for i in range(12):
            y = jnp.sin(jnp.full((1 + 37 * i % 50, 8), i) + x[0, 0])
            jax.debug.print("{} {rows}", i, rows=jnp.isfinite(y).sum() // 8, ordered=True)
            jax.debug.callback(note, i, ordered=True)
        return x

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        spmd.jit(fun, mesh=mesh(), in_shardings=P("x", "y"))(EVEN)
        jax.effects_barrier()
    assert out.getvalue().splitlines() == [f"{i} {1 + 37 * i % 50}" for i in range(12)]
    assert [int(s) for s in SEEN] == list(range(12))


def test_print_of_a_partial_sum_is_of_the_sum() -> None:
    out = io.StringIO()

    def fun(x: Any) -> Any:
        jax.debug.print("sum {}", x.sum())
        return x

    with contextlib.redirect_stdout(out):
        spmd.jit(fun, mesh=mesh(), in_shardings=P("x", "y"))(EVEN)
        jax.effects_barrier()
    assert out.getvalue() == "sum 2016.0\n"


def test_partitioned_print_shows_parts_and_moves_nothing() -> None:
    def fun(x: Any, y: Any) -> Any:
        jax.debug.callback(note, x + 1, y, partitioned=True)
        return x

    function = spmd.jit(fun, mesh=mesh(), in_shardings=(P("x", "y"), P("y", "x")))
    function(EVEN, EVEN)
    jax.effects_barrier()
    assert len(SEEN) == 16
    firsts = sorted((s.shape, int(s[0, 0])) for s in SEEN)
    wide = [((8, 1), 32 * i + j + 1) for i in range(2) for j in range(4)]
    tall = [((4, 2), 16 * j + 2 * i) for i in range(2) for j in range(4)]
    assert firsts == sorted(wide + tall)
    assert not kinds(function.trace(EVEN, EVEN).propagate().partition())


def test_partitioned_print_never_shows_padding_or_addends() -> None:
    def fun(x: Any) -> Any:
        jax.debug.callback(note, x * 2, partitioned=True)
        return x

    with pytest.warns():
        spmd.jit(fun, mesh=mesh(), in_shardings=P(("x", "y")))(X)
    jax.effects_barrier()
    assert len(SEEN) == 8 and all(np.array_equal(seen, X * 2) for seen in SEEN)
    SEEN.clear()

    def summed(x: Any) -> Any:
        jax.debug.callback(note, x.sum(0), partitioned=True)
        return x

    spmd.jit(summed, mesh=mesh(), in_shardings=P(("x", "y")))(EVEN)
    jax.effects_barrier()
    assert len(SEEN) == 8 and all(np.array_equal(seen, EVEN.sum(0)) for seen in SEEN)


def test_partitioned_and_ordered_is_an_error() -> None:
    def fun(x: Any) -> Any:
        jax.debug.print("{}", x, partitioned=True, ordered=True)
        return x

    with pytest.raises(RuleError, match="no order among devices"):
        spmd.jit(fun, mesh=mesh(), in_shardings=P("x"))(EVEN)


@pytest.mark.parametrize("call", [jax.pure_callback, io_callback])
def test_results_reach_every_device_bit_by_bit(call: Callable) -> None:
    kinds_of = ("float32", "bfloat16", "float8_e4m3fn", "int4", "int8", "uint32", "bool",
                "complex64")  # fmt: skip
    like = [jax.ShapeDtypeStruct((3, 5), jnp.dtype(k)) for k in kinds_of]
    like += [jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((0, 3), jnp.float32)]
    values = [(np.arange(15).reshape(3, 5) % 7).astype(s.dtype) for s in like[:-2]]
    values += [np.float32(-0.0), np.zeros((0, 3), np.float32)]
    values[0][0] = np.nan
    values[1][1] = -0.0

    def host(x: Any) -> Any:
        note(x)
        return values

    fun = lambda x: call(host, like, x * 2)  # noqa: E731
    got = spmd.jit(fun, mesh=mesh(), in_shardings=P("x"))(EVEN)
    jax.effects_barrier()
    assert len(SEEN) == 1
    for a, b in zip(got, values, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        for shard in a.addressable_shards:
            assert np.asarray(shard.data).tobytes() == b[shard.index].tobytes()


def test_callbacks_in_loops() -> None:
    def scanned(x: Any) -> Any:
        def body(c: Any, i: Any) -> Any:
            jax.debug.callback(note, i + c[0, 0])
            row = jax.ShapeDtypeStruct((4,), x.dtype)
            seen = io_callback(twice, row, c.sum(0), ordered=True)
            return jax.pure_callback(twice, LIKE, c) / 2 + 1, seen

        return lax.scan(body, x, jnp.arange(3.0))

    compare(scanned, X, ordered=False)

    def looped(x: Any) -> Any:
        def body(c: Any) -> Any:
            return io_callback(twice, LIKE, c[0], ordered=True), c[1] + 1

        def more(c: Any) -> Any:
            flag = jax.ShapeDtypeStruct((), bool)
            return io_callback(lambda i: (note(i), i < 3)[1], flag, c[1], ordered=True)

        return lax.while_loop(more, body, (x, 0))

    compare(looped, X)


def test_callbacks_in_branches_and_remat() -> None:
    def branched(x: Any) -> Any:
        def taken(x: Any) -> Any:
            jax.debug.callback(note, x, ordered=True)
            return x

        return lax.cond(x.sum() > 0, taken, lambda x: x * jax.pure_callback(twice, LIKE, x), x)

    compare(branched, X)

    def rematted(x: Any) -> Any:
        def inner(x: Any) -> Any:
            jax.debug.callback(note, x, ordered=True)
            return x * x

        return jax.grad(lambda x: jax.checkpoint(inner)(x).sum())(x)

    compare(rematted, X)


@pytest.mark.parametrize(
    "method", ["sequential", "sequential_unrolled", "expand_dims", "broadcast_all"]
)
def test_pure_callback_under_vmap(method: str) -> None:
    def fun(x: Any) -> Any:
        row = jax.ShapeDtypeStruct((4,), x.dtype)
        call = lambda r, y: jax.pure_callback(  # noqa: E731
            lambda r, y: (note(r), np.asarray(r) + np.asarray(y))[1], row, r, y, vmap_method=method
        )
        return jax.vmap(call, in_axes=(0, None))(x, x[0])

    compare(fun, X, ordered=False)


def test_effects_under_transformations_of_the_compiled_function() -> None:
    def fun(x: Any) -> Any:
        jax.debug.callback(note, x)
        return jnp.sin(x)

    for jit in (jax.jit, lambda f: spmd.jit(f, mesh=mesh(), in_shardings=P("x", "y"))):
        SEEN.clear()
        jax.block_until_ready((
            jax.grad(lambda x, jit=jit: jit(fun)(x).sum())(EVEN),
            jax.jit(jit(fun))(EVEN),
            lax.scan(lambda c, _, jit=jit: (jit(fun)(c), None), jnp.asarray(EVEN), length=3)[0],
            jit(jit(fun))(EVEN),
        ))  # fmt: skip
        jax.effects_barrier()
        assert [s.shape for s in SEEN] == [(16, 4)] * 6


def test_unused_callbacks() -> None:
    def fun(x: Any) -> Any:
        jax.pure_callback(twice, LIKE, x)  # pure: dropped
        jax.debug.callback(note)
        io_callback(twice, LIKE, x + 1)
        return x

    compare(fun, X)
    assert len(SEEN) == 1


def test_an_argument_that_is_only_printed_is_kept() -> None:
    def fun(x: Any, y: Any) -> Any:
        jax.debug.callback(note, y)
        return x

    compare(fun, EVEN, EVEN + 1)
    assert len(SEEN) == 1


def test_effects_barrier_waits() -> None:
    def slow(x: Any) -> None:
        time.sleep(0.3)
        note(x)

    def fun(x: Any) -> Any:
        jax.debug.callback(slow, x)
        return x

    spmd.jit(fun, mesh=mesh(), in_shardings=P("x"))(EVEN)
    jax.effects_barrier()
    assert len(SEEN) == 1


@pytest.mark.parametrize("call", [jax.pure_callback, io_callback])
def test_a_failing_callback_stops_every_device(call: Callable) -> None:
    def fail(x: Any) -> Any:
        raise ValueError("my own error")

    def wrong(x: Any) -> Any:
        return np.zeros(3, np.float32)

    like = jax.ShapeDtypeStruct(EVEN.shape, EVEN.dtype)
    for host, message in ((fail, "my own error"), (wrong, "was announced")):
        fun = lambda x, host=host: call(host, like, x).sum()  # noqa: E731
        function = spmd.jit(fun, mesh=mesh(), in_shardings=P("x"))
        assert message in str(raised_in_thread(function, EVEN))


def test_a_failure_is_seen_though_nobody_reads_the_results() -> None:
    def fail(x: Any) -> Any:
        raise ValueError("my own error")

    def fun(x: Any) -> Any:
        io_callback(fail, jax.ShapeDtypeStruct((), x.dtype), x)
        return x.sum()

    function = spmd.jit(fun, mesh=mesh(), in_shardings=P("x"))
    assert "my own error" in str(raised_in_thread(function, EVEN))


def test_buffer_callback() -> None:
    def fill(context: Any, out: Any, x: Any) -> None:
        note(x)
        np.asarray(out)[...] = np.asarray(x) * 3

    for effect in (False, True):
        call = buffer_callback.buffer_callback(fill, LIKE, has_side_effect=effect)
        compare(lambda x, call=call: call(x * 2), X)


def test_inspected_shardings_are_those_of_the_whole_array() -> None:
    found: list[Any] = []

    def fun(x: Any) -> Any:
        jax.debug.inspect_array_sharding(x * 2, callback=found.append)
        jax.debug.inspect_array_sharding(x.sum(), callback=found.append)
        return x

    partitioned = spmd.jit(fun, mesh=mesh(), in_shardings=P("x", "y"))
    partitioned(EVEN)
    assert sorted(str(s.spec) for s in found) == sorted(map(str, (P("x", "y"), P())))
    assert all(s.mesh == mesh() for s in found)
    moved = kinds(partitioned.trace(EVEN).propagate().partition())
    assert {kind for kind, _ in moved} <= {"all_reduce"}
