"""Which values are sums of others that can be reduced together."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

import spmd
from sharding import P, shard
from sharding.program import Program, build
from spmd.partition.addends import Addends

X = jnp.ones((8, 8))


def leaves(fun: Any) -> int:
    """Of how many reduced values the result of a function is the sum, and of nothing else."""
    program: Program = build(jax.make_jaxpr(fun)(X, X))
    return len(Addends(program).leaves(program.body.outputs[0]))


def test_sums_and_what_is_linear_in_them() -> None:
    assert leaves(lambda x, w: x @ w) == 1
    assert leaves(lambda x, w: x @ w + 2 * (w @ x).T) == 2
    assert leaves(lambda x, w: x @ w + w) == 0
    assert leaves(lambda x, w: jnp.tanh(x @ w) + w @ x) == 0


def test_a_sum_that_others_read_is_reduced_for_them() -> None:
    assert leaves(lambda x, w: (y := x @ w) + 2 * y) == 0
    assert leaves(lambda x, w: x @ w + (y := w @ x) + 2 * y) == 0


def test_nothing_is_reduced_after_it_was_enlarged() -> None:
    assert leaves(lambda x, w: jnp.broadcast_to(jnp.sum(x, 0), (8, 8)) + x @ w) == 0
    assert leaves(lambda x, w: jnp.sum(x, 0)[:4] + jnp.sum(w, 0)[4:]) == 2


def sent(fun: Any, args: Any, ins: Any) -> list[tuple[str, float]]:
    """(kind, elements) of all-reduces over four devices."""
    mesh = AbstractMesh((4,), ("tensor",))
    options = {"mesh": mesh, "in_shardings": ins, "out_shardings": P()}
    stage = spmd.jit(fun, **options).trace(*args).propagate().partition()
    return [(c.kind, c.bytes / (2 * 3 / 4) / 4) for c in stage.collectives]


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
