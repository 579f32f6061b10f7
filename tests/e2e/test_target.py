"""What the compiler of a chip is told, and what users hear when it does not understand."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spmd
from sharding import ArgumentError, P
from spmd.chips import CHIPS, EXCHANGES_AHEAD
from spmd.options import Options
from spmd.target import chip_of, compiler_of, compiler_options
from tests.oracle import check, make_mesh

X, W = np.ones((8, 4), np.float32), np.ones((4, 6), np.float32)
UNKNOWN = "xla_no_such_option"
TOLD, SPARSE = ((UNKNOWN, "true"),), ((UNKNOWN, "yes"),)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated devices are told something that no compiler knows."""
    chip = dataclasses.replace(CHIPS["cpu"], options=((UNKNOWN, "true"),))
    monkeypatch.setitem(CHIPS, "cpu", chip)


def test_devices_are_of_a_chip() -> None:
    found = chip_of(make_mesh(x=2))
    assert found is not None and found.name == "cpu"
    assert chip_of(make_mesh(x=2).abstract_mesh) is None


def test_options_of_the_user_win(told: None) -> None:
    mesh = make_mesh(x=2)
    assert compiler_options(Options(mesh)) == {UNKNOWN: "true"}
    given = Options(mesh, compiler_options=((UNKNOWN, "false"), ("xla_other", 1)))
    assert compiler_options(given) == {UNKNOWN: "false", "xla_other": 1}
    assert compiler_options(Options(mesh, disable_passes=("async_collectives",))) == {}


@pytest.mark.parametrize("limit, percent", [
    (None, None), (3 * 2**30, "30"), (1000, "1"), (9 * 2**30 - 1, "89"), (9 * 2**30, None),
    (2**40, None),
])  # fmt: skip
def test_the_scheduler_of_tpus_keeps_to_the_memory_limit(
    monkeypatch: pytest.MonkeyPatch, limit: int | None, percent: str | None
) -> None:
    chip = dataclasses.replace(CHIPS["cpu"], family="tpu", usable_bytes=10 * 2**30)
    monkeypatch.setitem(CHIPS, "cpu", chip)
    mesh = make_mesh(x=2)
    name = "xla_tpu_scheduler_percent_shared_memory_limit"
    want = {} if percent is None else {name: percent}
    assert compiler_options(Options(mesh, memory_limit=limit)) == want
    off = ("bounded_schedule",)
    assert compiler_options(Options(mesh, memory_limit=limit, disable_passes=off)) == {}


def test_simulated_devices_have_no_such_scheduler() -> None:
    assert compiler_options(Options(make_mesh(x=2), memory_limit=1000)) == {}


def test_a_compiler_that_knows_no_memory_limit_is_explained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chip = dataclasses.replace(CHIPS["cpu"], family="tpu", usable_bytes=10 * 2**30)
    monkeypatch.setitem(CHIPS, "cpu", chip)
    options = {"mesh": make_mesh(x=2), "in_shardings": P("x"), "memory_limit": 2**30}
    with pytest.raises(ArgumentError) as error:
        spmd.jit(jnp.tanh, **options)(np.ones(8, np.float32))
    lines = str(error.value).splitlines()
    assert lines[0] == "an order of operations within memory_limit, which TPUs are asked for"
    assert lines[1].startswith(
        "  why: this compiler does not take the option xla_tpu_scheduler_percent_shared_memory_"
    )
    assert lines[2] == (
        '  fix: spmd.jit(..., disable_passes=["bounded_schedule"]) compiles without it'
    )


@pytest.mark.parametrize("name, count", [
    ("v2", 2), ("v3", 2), ("v4", 2), ("v5e", 1), ("v5p", 8), ("v6e", 8), ("h100", 0), ("cpu", 0),
])  # fmt: skip
def test_what_compilers_are_asked_to_start_ahead(
    name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHIPS, "cpu", dataclasses.replace(CHIPS[name], kind=CHIPS["cpu"].kind))
    told = compiler_options(Options(make_mesh(x=2)))
    assert len(told) == count and {*told.values()} <= {"true"}
    assert (EXCHANGES_AHEAD in told) == (count > 0)
    assert ("xla_enable_async_all_gather" in told) == (name in ("v2", "v3", "v4"))
    sparse = [option for option in told if "sparse_core" in option]
    assert len(sparse) == (7 if name in ("v5p", "v6e") else 0)
    assert not CHIPS[name].as_it_is().options and not CHIPS[name].as_it_is().offloaded


def test_predictions_are_of_the_compiler_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    chip = dataclasses.replace(CHIPS["v3"], kind=CHIPS["cpu"].kind)
    monkeypatch.setitem(CHIPS, "cpu", chip)
    options = Options(make_mesh(x=2))
    assert compiler_of(options).beside == {"permute", "all_gather", "all_to_all"}
    off = Options(make_mesh(x=2), disable_passes=("async_collectives",))
    assert compiler_of(off).beside == {"permute"}


@pytest.mark.parametrize("columns, ahead", [(8, True), (600, False)])
def test_few_exchanges_are_waited_for(
    columns: int, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XLA holds more where it starts them, and gains little: here beside a gather of columns."""
    chip = dataclasses.replace(CHIPS["v5e"], kind=CHIPS["cpu"].kind)
    monkeypatch.setitem(CHIPS, "cpu", chip)
    ins, outs = (P("x"), P("x")), (P(None, "x"), P())
    options: Any = dict(mesh=make_mesh(x=4), in_shardings=ins, out_shardings=outs)
    function = spmd.jit(lambda x, y: (jnp.tanh(x), jnp.tanh(y)), **options)
    plan = function.trace(np.ones((8, 8)), np.ones((8, columns))).propagate().partition().plan
    assert (EXCHANGES_AHEAD in compiler_options(Options(make_mesh(x=4)), plan)) == ahead
    assert EXCHANGES_AHEAD in compiler_options(Options(make_mesh(x=4)))


@pytest.mark.parametrize(
    "name, fun, asked",
    [
        ("sum", lambda x, w: jnp.tanh(x @ w).sum(), False),
        ("rows", lambda x, w: jnp.tanh(x @ w), True),
        ("scatter", lambda x, w: jnp.tanh(x @ w).sum(0), True),
    ],
)
def test_where_communication_is_next_to_nothing_the_compiler_is_left_as_it_is(
    name: str, fun: Any, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would copy early what is needed late. Scatters need the SparseCores."""
    chip = dataclasses.replace(CHIPS["v5p"], kind=CHIPS["cpu"].kind)
    monkeypatch.setitem(CHIPS, "cpu", chip)
    mesh = make_mesh(x=4)
    outs = P("x") if name == "scatter" else P()
    function = spmd.jit(fun, mesh=mesh, in_shardings=(P("x"), P()), out_shardings=outs)
    plan = function.trace(np.ones((4096, 512)), np.ones((512, 512))).propagate().partition().plan
    assert bool(compiler_options(Options(mesh), plan)) == asked
    assert compiler_options(Options(mesh))


def test_exchanges_that_the_user_wrote_are_started_too(monkeypatch: pytest.MonkeyPatch) -> None:
    chip = dataclasses.replace(CHIPS["v5e"], kind=CHIPS["cpu"].kind)
    monkeypatch.setitem(CHIPS, "cpu", chip)
    mesh = make_mesh(x=4)

    def swap(x: Any) -> Any:
        return jax.lax.all_to_all(x, "x", 1, 0, tiled=True)

    inside = jax.shard_map(swap, mesh=mesh, in_specs=P("x"), out_specs=P(None, "x"))
    traced = spmd.jit(inside, mesh=mesh, in_shardings=P("x")).trace(np.ones((8, 8), np.float32))
    plan = traced.propagate().partition().plan
    assert EXCHANGES_AHEAD in compiler_options(Options(mesh), plan)


def test_a_compiler_that_does_not_understand_is_explained(told: None) -> None:
    x = np.arange(8, dtype=np.float32)
    options = {"mesh": make_mesh(x=2), "in_shardings": P("x"), "out_shardings": P()}
    with pytest.raises(ArgumentError) as error:
        spmd.jit(jnp.tanh, **options)(x)
    lines = str(error.value).splitlines()
    assert lines[0] == "collectives beside computation, which TPUs are asked for"
    assert lines[1].startswith(f"  why: this compiler does not take the option {UNKNOWN}: ")
    assert lines[2] == (
        '  fix: spmd.jit(..., disable_passes=["async_collectives"]) compiles without it'
    )
    without = spmd.jit(jnp.tanh, disable_passes=["async_collectives"], **options)
    np.testing.assert_allclose(without(x), np.tanh(x), rtol=1e-6)


def test_what_the_user_says_wrong_stays_the_error_of_jax(told: None) -> None:
    options = {"mesh": make_mesh(x=2), "compiler_options": {UNKNOWN: "true"}}
    with pytest.raises(Exception, match=UNKNOWN) as error:
        spmd.jit(jnp.tanh, **options)(np.ones(8, np.float32))
    assert not isinstance(error.value, ArgumentError)


def barriers(fun: Any, *args: Any, **options: Any) -> int:
    """Barriers in the program of one device."""
    stage = spmd.jit(fun, in_shardings=P("x"), **options).trace(*args).propagate().partition()
    return str(stage.lower().as_text()).count("optimization_barrier")


def test_products_that_are_transposed_are_kept_on_simulated_devices() -> None:
    mesh = make_mesh(x=2)

    def gradient(x: Any, w: Any) -> Any:
        return jax.grad(lambda w: jnp.sin(x @ w).sum())(w)

    assert barriers(gradient, X, W, mesh=mesh) == 1
    assert barriers(gradient, X, W, mesh=mesh, disable_passes=["keep_products"]) == 0
    check(gradient, [X, W], mesh, P("x"))


def read_twice(x: Any, w: Any) -> Any:
    product = x @ w
    return product.T, product * 2


@pytest.mark.parametrize("fun", [lambda x, w: x @ w + 1, lambda x, w: x.T, read_twice])
def test_other_values_are_not_kept(fun: Any) -> None:
    assert barriers(fun, X, W, mesh=make_mesh(x=2)) == 0


@pytest.mark.parametrize("options, kept, off, split", [
    ((), False, (), True),
    ((), True, (), False),
    (TOLD, True, (), False),
    (TOLD, True, ("async_collectives",), False),  # as the compilers for v2 and v3 do
    (TOLD, False, (), True),  # v4, v5e
    (SPARSE, True, (), False),  # SparseCores do as they are told
    (SPARSE, True, ("async_collectives",), True),
    ((), False, ("split_scatters",), False),
])  # fmt: skip
def test_scatters_are_split_for_compilers_that_do_not_keep_them(
    options: Any, kept: bool, off: tuple[str, ...], split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse = frozenset(("reduce_scatter",)) if options is SPARSE else frozenset()
    chip = dataclasses.replace(
        CHIPS["cpu"], family="tpu", options=options, scatters=kept, offloaded=sparse
    )
    monkeypatch.setitem(CHIPS, "cpu", chip)
    specs = {"in_shardings": (P(None, "x"), P("x")), "out_shardings": P("x")}
    traced = spmd.jit(jnp.matmul, mesh=make_mesh(x=8), disable_passes=off, **specs).trace(
        np.ones((16, 16), np.float32), np.ones((16, 64), np.float32)
    )
    moves = [move for move, _ in traced.propagate().partition().plan.moves()]
    (scatter,) = (s for move in moves for s in move.plan.steps if s.kind == "reduce_scatter")
    assert bool(scatter.parts) is split
