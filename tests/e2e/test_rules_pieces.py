"""Cutting and joining along sharded dims: values by brute force, and what moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from sharding import shard
from tests.e2e.rule_harness import check_rules
from tests.oracle import check, kinds, make_mesh

MESH = make_mesh(x=2, y=4)


def arr(*shape: int, dtype=np.float32) -> np.ndarray:
    x = np.random.default_rng(0).integers(1, 100, shape)
    return x.astype(dtype)


SLICES = {
    "tail": ((3,), (17,), (1,)),
    "head": ((0,), (9,), (1,)),
    "inner": ((5,), (11,), (1,)),
    "strided": ((1,), (17,), (3,)),
    "every other": ((0,), (17,), (2,)),
    "one": ((12,), (13,), (1,)),
    "two": ((7,), (9,), (1,)),
    "none": ((4,), (4,), (1,)),
}


@pytest.mark.parametrize("name", SLICES)
def test_slice(name: str) -> None:
    dtype = {"one": np.bool_, "two": np.int8}.get(name, np.float32)
    (start,), (limit,), (stride,) = SLICES[name]
    check_rules(
        lambda t: lax.slice(t, (start, 1), (limit, 4), (stride, 1)), arr(17, 5, dtype=dtype),
        names="slice",
    )  # fmt: skip


@pytest.mark.parametrize("n", [8, 7, 3, 1])
def test_rev(n: int) -> None:
    check_rules(lambda t: lax.rev(t, (0,)), arr(n, 3), names="rev")
    check_rules(lambda t: lax.rev(t, (0, 1)), arr(n, 6), names="rev")


PADS = [(1, 2, 0), (3, -1, 0), (-2, 5, 0), (-1, -2, 0), (0, 0, 1), (2, 1, 2), (-1, 3, 1),
        (-3, -3, 4), (9, 0, 0), (-7, 1, 0), (-7, -8, 1)]  # fmt: skip


@pytest.mark.parametrize("config", PADS, ids=str)
@pytest.mark.parametrize("n", [8, 7, 1])
def test_pad(config: tuple[int, int, int], n: int) -> None:
    low, high, interior = config
    if n + low + high + max(n - 1, 0) * interior < 0 or (n == 1 and low + high < 0):
        pytest.skip("nothing is left")
    check_rules(
        lambda t, v: lax.pad(t, v, (config, (0, 0, 0), (1, 0, 0))), arr(n, 3, 2), np.float32(-5),
        names="pad",
    )  # fmt: skip


def test_elements_that_shards_spread_alike_are_padded_in_place() -> None:
    """As when `associative_scan` interleaves: nothing larger than the result is made, and cut."""
    for config in ((0, 1, 1), (1, 0, 1)):
        planned = check(
            lambda x, config=config: lax.pad(x, 0.0, [config]), (arr(64),), make_mesh(y=4),
            (P("y"),), P("y"),
        )  # fmt: skip
        text = str(planned.jaxpr)
        assert "dynamic_slice" not in text and "f32[32] = pad" in text, text
        assert not planned.collectives


@pytest.mark.parametrize("sizes", [(4, 4), (3, 6), (8, 1), (1, 1, 1, 1), (0, 5, 2), (1, 9, 3, 20)])
def test_concatenate(sizes: tuple[int, ...]) -> None:
    for axis in (0, 1):
        shapes = [(n, 3) if axis == 0 else (3, n) for n in sizes]
        check_rules(
            lambda *ts, axis=axis: lax.concatenate(ts, axis), *(arr(*s) for s in shapes),
            names="concatenate",
        )  # fmt: skip


@pytest.mark.parametrize("sizes", [(4, 4), (3, 6), (2, 9, 3), (8, 1)])
def test_split(sizes: tuple[int, ...]) -> None:
    check_rules(lambda t: lax.split(t, sizes, 1), arr(3, sum(sizes)), names="slice")


def test_stack_unstack_tile() -> None:
    check_rules(lambda a, b: jnp.stack([a, b], 1), arr(3, 5), arr(3, 5), names="stack")
    check_rules(lambda t: jnp.unstack(t, axis=1), arr(5, 3), names="unstack")
    check_rules(lambda t: jnp.tile(t, (3, 1, 2)), arr(3, 5, 1), names="tile")


ROWS = P("y")


def moved(fun, *args, spec=ROWS):
    partitioned = check(lambda *ts: shard(fun(*ts), *spec), args, MESH, in_shardings=spec)
    return {kind: n for (kind, _), n in kinds(partitioned).items()}


ROW = 1000 * 4
X = arr(64, 1000)


def test_neighbours_exchange_what_crosses_the_border() -> None:
    # Shard i has rows 16 i ..., and wants rows 4 + 14 i ... of a slice.
    assert moved(lambda t: t[4:60], X) == {"permute": (1, 2 * ROW)}
    assert moved(lambda t: t[:, 3:], X) == {}
    assert moved(lambda t: t[::2], X) == {}
    assert moved(lambda t: jnp.flip(t, 0), X) == {"permute": (1, 16 * ROW)}
    flipped = check(lambda t: jnp.flip(t), (X,), MESH, P("x", "y"), P("x", "y"))
    assert kinds(flipped) == {("permute", ("x", "y")): (1, 8 * ROW)}
    # 80 rows: shard 1 wants 4 rows of shard 0, and shard 2 of shard 3.
    assert moved(lambda t: jnp.pad(t, ((8, 8), (0, 0))), X) == {"permute": (1, 4 * ROW)}
    # Each shard sends its part of the one and of the other to somebody.
    joined = moved(lambda t, u: jnp.concatenate([t, u]), X, X)
    assert joined == {"permute": (2, 2 * 16 * ROW)}
    halves = moved(lambda t: jnp.add(*jnp.split(t, 2)), X)
    assert halves == {"permute": (4, 4 * 8 * ROW)}


def test_one_element_comes_from_its_owner() -> None:
    partitioned = check(lambda t: t[5], (X,), MESH, in_shardings=P("y"), out_shardings=P())
    assert kinds(partitioned) == {("all_reduce", ("y",)): (1, 2 * ROW * 3 / 4)}


def test_what_a_library_function_moves_has_the_line_of_its_caller() -> None:
    partitioned = check(lambda t: jnp.roll(t, 1, 0), (X,), MESH, in_shardings=P("y"))
    assert partitioned.collectives
    for record in partitioned.collectives:
        assert record.source.startswith("e2e/test_rules_pieces.py:"), record
        assert partitioned.why(record).collectives


def test_a_shift_by_one_and_its_transpose_gather_nothing() -> None:
    def f(t, u):
        return jax.vjp(lambda t: jnp.roll(t, 1, 0), t)[1](u)

    partitioned = check(f, (X, X), MESH, in_shardings=(P("y"), P("y")), out_shardings=(P("y"),))
    # One row to the neighbour; the last one's goes around.
    assert {k for k, _ in kinds(partitioned)} == {"permute"}
    assert partitioned.wire_bytes == ROW


@pytest.mark.parametrize("start", (-7, -1, 1, 3, 9))
def test_a_slice_that_reaches_outside_is_clamped_before_it_is_divided(start: int) -> None:
    # XLA merges the two slices, and clamps the sum of their starts alone.
    def f(t, s):
        return lax.dynamic_slice(t, (s,), (4,))

    for spec in (P(), P("y")):
        check(f, (arr(16), np.int32(start)), MESH, (spec, P()), P("y"))


RESHAPES = [
    ((6, 4), (24,)), ((24,), (6, 4)), ((6, 4), (8, 3)), ((3, 4), (4, 3)), ((2, 6, 5), (12, 5)),
    ((7, 3, 1, 4), (21, 4)), ((5, 6), (5, 2, 3)), ((15, 2), (2, 15)), ((8, 6), (48,)),
    ((6, 10), (4, 15)), ((1, 7, 2), (14, 1)), ((10, 3, 4, 6), (5, 6, 24)),
]  # fmt: skip


@pytest.mark.parametrize("src, dst", RESHAPES, ids=str)
def test_reshape(src: tuple[int, ...], dst: tuple[int, ...]) -> None:
    check_rules(lambda t: lax.reshape(t, dst), arr(*src), names="reshape")


def test_uneven_heads_exchange_what_crosses_the_border() -> None:
    # 6 heads of 4 over 4 shards: 6 elements a shard become 2 heads, 8 elements.
    def f(t):
        return shard(t.reshape(1000, 6, 4), None, "y").reshape(1000, 24)

    there_and_back = moved(f, arr(1000, 24), spec=P(None, "y"))
    assert set(there_and_back) == {"permute"}
    assert there_and_back["permute"][1] <= 2 * 6 * 1000 * 4
