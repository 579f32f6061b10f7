"""What several operations could gather is gathered once, where that is cheaper for all of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh

import spmd
from sharding import P
from tests.oracle import check, kinds, make_mesh

RNG = np.random.default_rng(0)
X = RNG.standard_normal((32, 64), np.float32)
G = [RNG.standard_normal((32, 16), np.float32) for _ in range(4)]
PLACES = (P("data", "tensor"), [P("data", "tensor")] * 4)
WEIGHTS = [P("data", "tensor")] * 4


def gradients(x: Any, g: Any) -> Any:
    """Of four projections of one input: each sums over the rows, which `data` shards."""
    return [lax.dot_general(x, each, (((0,), (0,)), ((), ()))) for each in g]


def test_one_input_is_gathered_and_not_each_gradient() -> None:
    mesh = make_mesh(data=2, tensor=4)
    shared = check(gradients, (X, G), mesh, PLACES, WEIGHTS)
    # X, 16 x 64 on a device, over `tensor`; each product, 64 x 4 there, over `data`
    assert kinds(shared) == {
        ("all_gather", ("tensor",)): (1, 16 * 64 * 4 * 3 / 4),
        ("reduce_scatter", ("data",)): (4, 4 * 64 * 4 * 4 / 2),
    }
    alone = check(gradients, (X, G), mesh, PLACES, WEIGHTS, disable_passes=["shared_gathers"])
    assert alone.wire_bytes > shared.wire_bytes


def test_one_reader_gathers_what_is_smaller() -> None:
    """With one projection it is cheaper to gather its gradient, 16 x 16, and to leave X alone."""
    planned = check(
        gradients, (X, G[:1]), make_mesh(data=2, tensor=4), (PLACES[0], PLACES[1][:1]),
        WEIGHTS[:1],
    )  # fmt: skip
    gathered = kinds(planned)["all_gather", ("tensor",)]
    assert gathered == (1, 16 * 16 * 4 * 3 / 4), planned


def test_narrow_readers_before_a_wide_one() -> None:
    """Queries of many heads need the input whole in any case: keys and values of few, which come
    before them, read it so too, however much there is to multiply."""
    x, *g = (jax.ShapeDtypeStruct((4096, n), jnp.float32) for n in (2048, 512, 512, 2048))
    planned = spmd.jit(
        gradients, mesh=AbstractMesh((4, 4), ("data", "tensor")),
        in_shardings=(PLACES[0], WEIGHTS[:3]), out_shardings=WEIGHTS[:3],
    ).trace(x, g).propagate().partition()  # fmt: skip
    # X, 1024 x 2048 when it is whole; products of 2048 x 3072, a quarter of them on a device
    assert kinds(planned) == {
        ("all_gather", ("tensor",)): (1, 1024 * 2048 * 4 * 3 / 4),
        ("reduce_scatter", ("data",)): (3, 2048 * 3072 // 4 * 4 * 3 / 4),
    }


def test_gradients_of_projections() -> None:
    """The whole of it, with what comes back to the input, under two ways of sharding weights."""

    def loss(x: Any, w: Any) -> Any:
        return sum((jax.numpy.tanh(x @ each) ** 2).sum() for each in w)

    w = [RNG.standard_normal((64, 16), np.float32) / 8 for _ in range(4)]
    for spec in (P("data", "tensor"), P("tensor", "data")):
        mesh, places = make_mesh(data=2, tensor=4), (P("data", "tensor"), [spec] * 4)
        check(jax.grad(loss, (0, 1)), (X, w), mesh, places, places)


def test_readers_that_want_one_axis_on_two_dims_share_nothing() -> None:
    """A trace of a square: each operand's rows are the other's columns."""
    x = RNG.standard_normal((8, 8), np.float32)
    check(lambda x: jnp.einsum("ab,ba->", x, x), (x,), make_mesh(x=2), (P(None, "x"),), P())


def test_an_operation_that_reads_a_value_twice_is_one_reader() -> None:
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    planned = [
        spmd.jit(
            lambda a: a @ a, mesh=AbstractMesh((4, 2), ("x", "y")), in_shardings=P("y", "x"),
            out_shardings=P("x", "y"), disable_passes=off,
        ).trace(x).propagate().partition()
        for off in ((), ("shared_gathers",))
    ]  # fmt: skip
    assert planned[0].wire_bytes <= planned[1].wire_bytes


def test_what_was_decided_for_other_operands_counts() -> None:
    """The gradient of a layer that widens to heads multiplies its input, gathered for all that read
    it, with cotangents: these need not be gathered in its stead."""

    def loss(w: Any, x: Any) -> Any:
        for each in w:
            x = jnp.tanh(jnp.einsum("bsd,def->bsef", x, each)).sum(2)
        return x.sum()

    w, x = [jax.ShapeDtypeStruct((256, 4, 256), jnp.float32)] * 3, (16, 512, 256)
    places = [P("a", "b", "c")] * 3
    sent = [
        spmd.jit(
            jax.grad(loss), mesh=AbstractMesh((2, 2, 2, 2), ("a", "b", "c", "d")),
            in_shardings=(places, P("d", "c", "b")), out_shardings=places, disable_passes=off,
        ).trace(w, jax.ShapeDtypeStruct(x, jnp.float32)).propagate().partition().wire_bytes
        for off in ((), ("shared_gathers",))
    ]  # fmt: skip
    assert sent[0] <= sent[1]
