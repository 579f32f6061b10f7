"""Pass `combine_small`: small collectives of one kind go as one, and nobody counts them so."""

import itertools
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh

import spmd
from sharding import P, shard
from sharding.mesh import MeshShape
from sharding.op import Value
from sharding.spec import Layout
from spmd.partition import combined
from spmd.partition.apply import apply
from spmd.partition.combined import combine_small, together
from spmd.partition.plan import Compute, Move, Parts, ProgramPlan, RegionPlan, rewritten
from spmd.partition.reshard import Plan, plan
from spmd.testing import collectives_of
from tests.oracle import check, kinds, make_mesh

RNG = np.random.default_rng(0)
ROWS, COLUMNS = P("d"), P(None, "d")


def arr(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return (RNG.standard_normal(shape) * 8).astype(dtype)


def emitted(planned: spmd.Partitioned) -> dict[str, int]:
    """How many collectives of each kind the lowered program has."""
    found = re.findall(r"stablehlo\.(all_\w+|reduce_scatter)", planned.lower().as_text())
    return {kind: found.count(kind) for kind in sorted({*found})}


def layers(weights: Any, x: Any) -> Any:
    for w in weights:
        x = jnp.tanh(x @ w)
    return x


def test_weights_of_several_layers_are_gathered_as_one() -> None:
    """The plan, and all that is told of it, has four; the same bytes are sent."""
    weights, x = [arr(32, 32) / 64 for _ in range(4)], arr(256, 32)
    planned = check(layers, (weights, x), make_mesh(d=8), (ROWS, ROWS), ROWS)
    assert kinds(planned) == {("all_gather", ("d",)): (4, 4 * 32 * 32 * 4 * 7 / 8)}
    assert emitted(planned) == {"all_gather": 1}
    assert "slice" not in str(planned)


def test_their_gradients_are_scattered_as_one() -> None:
    weights, x = [arr(32, 32) / 64 for _ in range(4)], arr(256, 32)
    step = jax.grad(lambda weights, x: (layers(weights, x) ** 2).sum())
    planned = check(step, (weights, x), make_mesh(d=8), (ROWS, ROWS), ROWS, tolerance=1e-4)
    assert kinds(planned)["reduce_scatter", ("d",)][0] == 4
    assert emitted(planned) == {"all_gather": 1, "reduce_scatter": 1}


def test_in_each_step_of_a_loop() -> None:
    first, second, x = arr(3, 32, 64) / 64, arr(3, 64, 32) / 64, arr(256, 32)

    def fun(first: Any, second: Any, x: Any) -> Any:
        def body(x: Any, weights: Any) -> tuple[Any, None]:
            return jnp.tanh(x @ weights[0]) @ weights[1], None

        return jax.lax.scan(body, x, (first, second))[0]

    spec = P(None, "d")
    planned = check(fun, (first, second, x), make_mesh(d=8), (spec, spec, ROWS), ROWS)
    assert kinds(planned)["all_gather", ("d",)][0] == 6
    assert emitted(planned) == {"all_gather": 1}


def test_not_what_stays_the_same_in_a_loop_with_what_changes() -> None:
    """XLA gathers the masses of bodies once, before the loop: not so with their places."""
    places, masses = arr(64, 3) / 64, arr(64)

    def fun(places: Any, masses: Any) -> Any:
        def step(x: Any, _: Any) -> tuple[Any, None]:
            apart = x[None] - x[:, None]
            pull = apart * (masses[None, :, None] / ((apart**2).sum(-1, keepdims=True) + 1))
            return x + pull.sum(1) / 64, None

        return jax.lax.scan(step, places, length=4)[0]

    sent = []
    for off in ((), ("combine_small",)):
        planned = check(fun, (places, masses), make_mesh(d=8), (ROWS, ROWS), ROWS,
                        disable_passes=off)  # fmt: skip
        assert emitted(planned) == {"all_gather": 2}
        sent.append(sum(c.bytes for c in collectives_of(planned.lower().compile(), source="hlo")))
    assert sent == [(4 * places.nbytes + masses.nbytes) * 7 / 8] * 2


def transposed(*xs: Any) -> list[Any]:
    return [shard(x, None, "d") + 1 for x in xs]


def test_exchanges_of_arrays_of_all_shapes() -> None:
    xs = arr(16, 8), arr(8, 24), arr(40, 16)
    planned = check(transposed, xs, make_mesh(d=8), (ROWS,) * 3, [COLUMNS] * 3)
    assert emitted(planned) == {"all_to_all": 1}


def test_the_pass_can_be_switched_off() -> None:
    xs = arr(16, 8), arr(8, 24), arr(40, 16)
    off = {"disable_passes": ["combine_small"]}
    planned = check(transposed, xs, make_mesh(d=8), (ROWS,) * 3, [COLUMNS] * 3, **off)
    assert emitted(planned) == {"all_to_all": 3}


def test_not_what_needs_another() -> None:
    """What comes there and goes back: two exchanges one after the other, of both arrays."""

    def fun(*xs: Any) -> list[Any]:
        return [shard(jnp.sin(shard(x, "d", None)), None, "d") for x in xs]

    specs = (COLUMNS,) * 2, [COLUMNS] * 2
    planned = check(fun, (arr(16, 8), arr(32, 24)), make_mesh(d=8), *specs)
    assert kinds(planned)["all_to_all", ("d",)][0] == 4
    assert emitted(planned) == {"all_to_all": 2}


def test_not_other_dtypes_or_axes() -> None:
    mesh = make_mesh(a=2, b=4)
    xs = arr(16, 8), arr(16, 8).astype(np.int32), arr(16, 8)
    specs = P("a"), P("a"), P("b")
    fun = lambda *xs: [shard(x, None, None) * 2 for x in xs]  # noqa: E731
    planned = check(fun, xs, mesh, specs, [P()] * 3)
    assert emitted(planned) == {"all_gather": 3}
    orders = P(("a", "b")), P(("b", "a"))
    planned = check(fun, (arr(16, 8), arr(16, 8)), mesh, orders, [P()] * 2)
    assert emitted(planned) == {"all_gather": 2}


def test_not_integers_of_two_bits() -> None:
    """Which XLA moves as bytes."""
    xs = [jnp.ones((8 * n, 8), "int2") for n in (1, 2)]
    fun = lambda *xs: [shard(x, None, None).astype(jnp.int8) for x in xs]  # noqa: E731
    planned = check(fun, xs, make_mesh(d=8), (ROWS, ROWS), [P()] * 2)
    assert emitted(planned) == {"all_gather": 2}


def test_not_where_memory_may_be_short() -> None:
    xs = arr(16, 8), arr(8, 24), arr(40, 16)
    specs = (ROWS,) * 3, [COLUMNS] * 3
    planned = check(transposed, xs, make_mesh(d=8), *specs, memory_limit=10**9)
    assert emitted(planned) == {"all_to_all": 3}


def test_not_gathers_and_exchanges() -> None:
    mesh = make_mesh(d=8)
    fun = lambda x, y: (shard(x, None, None) * 2, shard(y, None, "d") * 2)  # noqa: E731
    planned = check(fun, (arr(16, 8), arr(16, 8)), mesh, (ROWS, ROWS), (P(), COLUMNS))
    assert emitted(planned) == {"all_gather": 1, "all_to_all": 1}


def test_random_keys_go_alone() -> None:
    keys = [jax.random.split(jax.random.key(i), 16) for i in range(2)]
    draw = lambda *keys: [jax.vmap(jax.random.normal)(shard(k, None)) for k in keys]  # noqa: E731
    planned = check(draw, keys, make_mesh(d=8), (ROWS, ROWS), [P()] * 2)
    assert emitted(planned) == {"all_gather": 2}


OTHERS = {
    "a copy": lambda move: {"copy": 1},
    "what waits": lambda move: {"after": move.reads},
    "in parts": lambda move: {"parts": Parts(2, (0,), (0,))},
    "several steps": lambda move: {"plan": Plan(move.plan.steps * 2, move.plan.cost)},
    "steps in parts": lambda move: {
        "plan": Plan((move.plan.steps[0]._replace(parts=(2, 4)),), move.plan.cost)
    },
    "nothing": lambda move: {"plan": Plan((move.plan.steps[0]._replace(bytes=0.0),), 0.0)},
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_other_passes_changed_goes_alone(other: str) -> None:
    xs = arr(16, 8), arr(8, 24), arr(40, 16)
    specs = (ROWS,) * 3, [COLUMNS] * 3
    whole = check(transposed, xs, make_mesh(d=8), *specs).plan

    def change(found: Move | Compute, body: RegionPlan) -> Move | Compute:
        changed = isinstance(found, Move) and found.value.shape == (8, 24)
        return replace(found, **OTHERS[other](found)) if changed else found

    def grouped(plan: ProgramPlan) -> set[tuple[int, ...]]:
        moves = (i for i in combine_small(plan).body.code if isinstance(i, Move))
        return {move.value.shape for move in moves if move.group}

    assert grouped(whole) == {(16, 8), (8, 24), (40, 16)}
    assert grouped(rewritten(whole, change)) == {(16, 8), (40, 16)}


def test_large_ones_go_alone_and_no_more_than_the_most_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent = 16 * 8 * 4 / 8 * 7 / 8
    xs = [arr(16, 8) for _ in range(5)]

    def count() -> dict[str, int]:
        jax.clear_caches()
        specs = (ROWS,) * 5, [COLUMNS] * 5
        return emitted(check(transposed, xs, make_mesh(d=8), *specs))

    monkeypatch.setattr(combined, "_MOST", 2 * sent)
    assert count() == {"all_to_all": 3}
    monkeypatch.setattr(combined, "_SMALL", sent - 1)
    assert count() == {"all_to_all": 5}


def test_effects_keep_their_order() -> None:
    """What is told of the first exchange waits for what the second one sends; all others wait."""
    said: list[tuple[str, float]] = []

    def tell(name: str, x: Any) -> None:
        say = lambda total: said.append((name, float(total)))  # noqa: E731
        jax.debug.callback(say, x.sum(), ordered=True)

    def fun(x: Any, y: Any, z: Any) -> Any:
        x = shard(x, None, "d") + 1
        tell("x", x)
        tell("z", z)
        y = shard(y * 2, None, "d")
        tell("y", y)
        return x, y

    ones = jnp.ones((16, 8))
    function = spmd.jit(fun, mesh=make_mesh(d=8), in_shardings=(ROWS, ROWS, ROWS))
    assert emitted(function.trace(ones, ones, ones).propagate().partition())["all_to_all"] == 1
    function(ones, ones, ones)
    jax.effects_barrier()
    assert said == [("x", 256.0), ("z", 128.0), ("y", 256.0)]


def test_not_for_other_chips() -> None:
    """Their compilers combine by themselves."""
    xs = arr(16, 8), arr(8, 24)
    mesh = AbstractMesh((8,), ("d",))
    specs = {"in_shardings": (ROWS, ROWS), "out_shardings": [COLUMNS] * 2}
    planned = spmd.jit(transposed, mesh=mesh, **specs).trace(*xs).propagate().partition()
    text = str(jax.make_jaxpr(planned.sharded)(*xs))
    assert text.count("all_to_all[") == 2


# --- the arithmetic, by brute force ---------------------------------------------------------------

KINDS = {
    "all_gather": lambda d, _: (d, None),
    "all_to_all": lambda d, e: (d, e),
    "reduce_scatter": lambda d, _: (None, d),
}


def layout(rank: int, dim: int | None, axes: tuple[str, ...], partial: bool) -> Layout:
    dims = tuple(axes if d == dim else () for d in range(rank))
    return Layout(dims, tuple((a, "add") for a in axes) if partial else ())


def moves_of(rng: Any, kind: str, axes: tuple[str, ...], dtype: Any, mesh: MeshShape) -> list[Move]:
    """Random moves by one collective of that kind: any dims, also such that do not divide."""
    found: list[Move] = []
    while len(found) < 3:
        rank = int(rng.integers(1, 4))
        if kind == "all_to_all" and rank == 1:
            continue
        d, e = rng.permutation(rank)[:2] if rank > 1 else (0, 0)
        shape = tuple(int(n) for n in rng.integers(1, 13, rank))
        before, after = KINDS[kind](d, e)
        src = layout(rank, before, axes, kind == "reduce_scatter")
        dst = layout(rank, after, axes, False)
        way = plan(src, dst, shape, np.dtype(dtype).itemsize, mesh)
        if [step.kind for step in way.steps] == [kind]:
            value = Value(len(found), jax.ShapeDtypeStruct(shape, dtype))
            found.append(Move(value, src, dst, way, None))
    return found


AXES = [("a",), ("b",), ("a", "b"), ("b", "a")]
DTYPES = [np.float32, jnp.bfloat16, np.int8, np.complex64]


def goes(kind: str, axes: tuple[str, ...], dtype: Any) -> bool:
    """Gathers alone go along several axes at once."""
    return kind == "all_gather" or len(axes) == 1


@pytest.mark.parametrize(
    ("kind", "axes", "dtype"), [c for c in itertools.product(KINDS, AXES, DTYPES) if goes(*c)]
)
def test_together_as_one_by_one(kind: str, axes: tuple[str, ...], dtype: Any) -> None:
    """Local arrays of every device, bit by bit, padding included."""
    devices = make_mesh(a=2, b=4)
    mesh = MeshShape((("a", 2), ("b", 4)))
    rng = np.random.default_rng(len(axes))
    for _ in range(4):
        moves = moves_of(rng, kind, axes, dtype, mesh)
        shapes = [m.src.local_shape(m.value.shape, mesh) for m in moves]
        xs = [rng.integers(-9, 9, (2, 4, *shape)).astype(dtype) for shape in shapes]
        assert_alike(moves, xs, mesh, devices)


def assert_alike(moves: list[Move], xs: list[np.ndarray], mesh: MeshShape, devices: Mesh) -> None:
    def one_by_one(*xs: Any) -> list[Any]:
        pairs = zip(moves, xs, strict=True)
        made = [apply(m.plan.steps, x[0, 0], m.src, m.value.shape, mesh) for m, x in pairs]
        return [x[None, None] for x in made]

    def as_one(*xs: Any) -> list[Any]:
        return [x[None, None] for x in together(moves, [x[0, 0] for x in xs], mesh)]

    spec = P("a", "b")
    want, got = (
        jax.jit(jax.shard_map(f, mesh=devices, in_specs=spec, out_specs=spec, check_vma=False))(*xs)
        for f in (one_by_one, as_one)
    )
    for x, y in zip(want, got, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
