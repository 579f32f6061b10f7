"""Where partial sums are reduced: the cheapest place of all, by minimum cuts."""

import itertools
import math
import random
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

import spmd
from sharding import P, shard
from spmd.partition import sums
from spmd.partition.cut import Edge, source_side


def cut_value(edges: list[Edge], side: set[Any]) -> float:
    return sum(capacity for a, b, capacity in edges if a in side and b not in side)


def smallest_cut(edges: list[Edge], source: Any, sink: Any) -> float:
    """By trying all of them."""
    inner = sorted({n for a, b, _ in edges for n in (a, b)} - {source, sink})
    return min(
        cut_value(edges, {source, *chosen})
        for count in range(len(inner) + 1) for chosen in itertools.combinations(inner, count)
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_no_cut_is_smaller(seed: int) -> None:
    rng = random.Random(seed)
    nodes = ["s", *"abcdefg", "t"]
    edges: list[Edge] = [
        (a, b, math.inf if rng.random() < 0.2 and a != "s" and b != "t" else rng.randint(0, 9))
        for a in nodes[:-1] for b in nodes[1:] if a != b and rng.random() < 0.4
    ]  # fmt: skip
    found = source_side(edges, "s", "t")
    assert "s" in found and "t" not in found
    assert cut_value(edges, found) == smallest_cut(edges, "s", "t")
    smaller = [n for n in found - {"s"} if cut_value(edges, found - {n}) <= cut_value(edges, found)]
    assert not smaller, "of several such cuts the one next to the source"


WHOLE = P()


def sent(fun: Any, args: Any, ins: Any, outs: Any = WHOLE) -> list[tuple[str, float]]:
    """(kind, float32 elements) of the reductions over four devices."""
    mesh = AbstractMesh((4,), ("tensor",))
    options = {"mesh": mesh, "in_shardings": ins, "out_shardings": outs}
    stage = spmd.jit(fun, **options).trace(*args).propagate().partition()
    found: dict[str, float] = {}
    for c in stage.collectives:
        ring = 3 / 4 * (2 if c.kind == "all_reduce" else 1)
        found[c.kind] = found.get(c.kind, 0) + c.bytes / ring / 4
    return list(found.items())


def arrays(*shapes: tuple[int, ...], dtype: Any = jnp.float32) -> list[Any]:
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


ROWS = P("tensor")
COLUMNS = P(None, "tensor")


def test_sums_that_meet_share_one_reduction() -> None:
    def three(a: Any, b: Any, c: Any) -> Any:
        return jnp.sin(a.sum(0) + 2 * (b.sum(0) - c.sum(0)))

    assert sent(three, arrays((16, 64), (16, 64), (16, 64)), (ROWS,) * 3) == [("all_reduce", 64)]


def test_what_is_whole_is_added_to_a_sum_before_its_reduction() -> None:
    def fun(a: Any, b: Any, whole: Any) -> Any:
        return jnp.sin((whole + a.sum(0)) + b.sum(0))

    args = arrays((16, 64), (16, 64), (64,))
    assert sent(fun, args, (ROWS, ROWS, P())) == [("all_reduce", 64)]
    assert sent(fun, args, (ROWS, ROWS, ROWS), ROWS) == [("reduce_scatter", 64)]


def test_a_sum_becomes_smaller_before_its_reduction() -> None:
    def fun(x: Any, w: Any, mask: Any) -> Any:
        return jnp.sin(((x @ w) * mask).sum(1))

    args = arrays((16, 32), (32, 64), (16, 64))
    assert sent(fun, args, (COLUMNS, ROWS, P())) == [("all_reduce", 16)]


def test_two_small_readers_of_a_sum_are_reduced_instead_of_it() -> None:
    def fun(x: Any, w: Any, u: Any, v: Any) -> Any:
        y = x @ w
        return jnp.sin(y @ u), jnp.cos(y @ v)

    args = arrays((16, 32), (32, 64), (64, 4), (64, 8))
    assert sent(fun, args, (COLUMNS, ROWS, P(), P())) == [("all_reduce", 16 * 4 + 16 * 8)]
    wide = arrays((16, 32), (32, 64), (64, 40), (64, 48))
    assert sent(fun, wide, (COLUMNS, ROWS, P(), P())) == [("all_reduce", 16 * 64)]


def test_a_reader_that_needs_a_sum_whole_spares_the_others_theirs() -> None:
    def fun(x: Any, w: Any, u: Any) -> Any:
        y = x @ w
        return jnp.sin(y), jnp.sin(y @ u)

    args = arrays((16, 32), (32, 64), (64, 4))
    assert sent(fun, args, (COLUMNS, ROWS, P())) == [("all_reduce", 16 * 64)]


def test_a_product_of_sums_is_linear_in_neither() -> None:
    args = arrays((16, 64), (16, 64))

    def square(a: Any, b: Any) -> Any:
        s = a.sum(0)
        return (s * s).sum()

    def product(a: Any, b: Any) -> Any:
        return jnp.sin(a.sum(0) * b.sum(0))

    assert sent(square, args, (ROWS, ROWS)) == [("all_reduce", 64)]
    assert sent(product, args, (ROWS, ROWS)) == [("all_reduce", 128)]


def test_sums_widen_before_their_reduction_where_that_is_smaller() -> None:
    def fun(x: Any, w: Any) -> Any:
        return jnp.sin((x @ w).astype(jnp.float32).sum(1))

    args = arrays((16, 32), (32, 64), dtype=jnp.bfloat16)
    assert sent(fun, args, (COLUMNS, ROWS)) == [("all_reduce", 16)]
    assert sent(lambda x, w: jnp.sin((x @ w).astype(jnp.float32)), args, (COLUMNS, ROWS)) == [
        ("all_reduce", 16 * 64 / 2)  # in the narrower dtype
    ]


def test_sums_are_not_rounded_before_their_reduction() -> None:
    def fun(x: Any, w: Any) -> Any:
        return (x @ w).astype(jnp.bfloat16)

    assert sent(fun, arrays((16, 32), (32, 64)), (COLUMNS, ROWS)) == [("all_reduce", 16 * 64)]


def test_nothing_is_reduced_after_it_was_enlarged() -> None:
    def fun(x: Any, w: Any) -> Any:
        return jnp.broadcast_to(jnp.sum(x, 0), (64, 64)) + w

    assert sent(fun, arrays((16, 64), (64, 64)), (ROWS, P())) == [("all_reduce", 64)]


def test_work_that_an_axis_shares_is_not_repeated_for_a_sum() -> None:
    """The second product is sharded over the axis: what enters it is reduced first, though the
    product is smaller."""

    def rows(x: Any, w: Any, u: Any) -> Any:
        return shard(jnp.sin(x @ w @ u), "tensor", None)

    def columns(x: Any, w: Any, u: Any) -> Any:
        return jnp.sin(x @ w @ u)

    args = arrays((16, 32), (32, 64), (64, 32))
    assert sent(rows, args, (COLUMNS, ROWS, P()), ROWS) == [("reduce_scatter", 16 * 64)]
    assert sent(columns, args, (COLUMNS, ROWS, COLUMNS), COLUMNS) == [("all_reduce", 16 * 64)]


def test_what_a_sum_is_multiplied_with_is_not_gathered() -> None:
    def fun(x: Any, w: Any, mask: Any) -> Any:
        return jnp.sin(((x @ w) * mask).sum(1))

    args = arrays((16, 32), (32, 64), (16, 64))
    assert sent(fun, args, (COLUMNS, ROWS, ROWS), ROWS) == [("reduce_scatter", 16 * 64)]


def test_addends_that_cannot_be_spread_stay_where_they_are() -> None:
    def fun(a: Any, b: Any, c: Any) -> Any:
        return jnp.sin(a.sum(0) + shard(jnp.cos(c), "tensor") + b.sum(0))

    args = arrays((16, 62), (16, 62), (62,))
    assert dict(sent(fun, args, (ROWS, ROWS, P())))["reduce_scatter"] == 2 * 64
    args = arrays((16, 64), (16, 64), (64,))
    assert sent(fun, args, (ROWS, ROWS, P())) == [("all_reduce", 64)]


def test_decisions_cost_what_the_best_of_all_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every group of a program against all ways to decide it."""
    settled: list[list[Edge]] = []

    def source(edges: Any, source: Any, sink: Any) -> set[Any]:
        settled.append(list(edges))
        return source_side(settled[-1], source, sink)

    monkeypatch.setattr(sums, "source_side", source)

    def fun(x: Any, w: Any, v: Any, u: Any) -> Any:
        y = x @ w
        z = (2 * y + x @ v).sum(1)
        return jnp.sin(z), y @ u

    args = arrays((16, 32), (32, 64), (32, 64), (64, 4))
    assert sent(fun, args, (COLUMNS, ROWS, ROWS, P())) == [("all_reduce", 16 + 16 * 4)]
    assert len(settled) == 1
    (edges,) = settled
    found = cut_value(edges, source_side(edges, "source", "sink"))
    nodes = {n for a, b, _ in edges for n in (a, b)}
    assert len(nodes) <= 16 and found == smallest_cut(edges, "source", "sink")


def test_a_gradient_stays_a_sum_through_the_annotation_of_what_it_is_of() -> None:
    """The user annotated the wide value, and said nothing of its gradient: that is projected to
    the narrow one before it is reduced."""

    def loss(narrow: Any, wide: Any, up: Any) -> Any:
        inputs = shard(narrow @ wide, None, None)
        return jnp.sin(shard(inputs @ up, None, "tensor")).sum()

    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((16, 8), (8, 64), (64, 32))]
    assert sent(jax.grad(loss), args, (P(), P(), P(None, "tensor"))) == [("all_reduce", 16 * 8)]


def test_a_sum_that_the_user_annotates_is_reduced_there() -> None:
    def fun(x: Any, w: Any, down: Any) -> Any:
        return shard(x @ w, None, None) @ down

    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((16, 32), (32, 64), (64, 8))]
    assert sent(fun, args, (P(None, "tensor"), P("tensor"), P())) == [("all_reduce", 16 * 64)]
