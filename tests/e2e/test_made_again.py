"""What costs next to nothing to make of something at hand is made again there, and not moved."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import spmd
from spmd.partition.plan import Compute, Move
from tests.oracle import check, kinds, make_mesh

DEVICES, WIDTH, BATCH = 4, 32, 256
GATHERED = WIDTH * WIDTH * 4 * (DEVICES - 1) / DEVICES


def arr(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32) / 4


def gathers(found: spmd.Partitioned) -> tuple[int, float]:
    return kinds(found)["all_gather", ("fsdp",)]


def with_weights(fun: Any) -> spmd.Partitioned:
    """Of weights and examples over one axis."""
    args = (arr(WIDTH, WIDTH), arr(BATCH, WIDTH))
    return check(fun, args, make_mesh(fsdp=DEVICES), (P("fsdp"), P("fsdp")), P("fsdp"))


@pytest.mark.parametrize(
    "change",
    [lambda w: w.T, lambda w: 2 - w, lambda w: (w + 1).reshape(4, -1).reshape(w.shape).T],
    ids=["transposed", "pointwise", "several"],
)
def test_of_weights_that_are_gathered_already(change: Any) -> None:
    found = with_weights(lambda w, x: jnp.tanh(x @ w) @ change(w))
    assert gathers(found) == (1, GATHERED)


def test_kernels_of_one_element_are_gathered_once_for_both_ways() -> None:
    """On the way back they would be reversed, were they longer."""

    def loss(w: Any, x: Any) -> Any:
        layout = ("NHWC", "HWIO", "NHWC")
        made = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layout)
        return jnp.sum(jnp.tanh(made) ** 2)

    places = P(None, None, None, "fsdp"), P("fsdp")
    for size, times in ((1, 1), (3, 2)):
        args = arr(size, size, WIDTH, WIDTH), arr(16, 8, 8, WIDTH)
        found = check(jax.grad(loss, (0, 1)), args, make_mesh(fsdp=DEVICES), places, places)
        assert gathers(found) == (times, times * size**2 * GATHERED)


def test_tied_embeddings_are_gathered_once() -> None:
    """The table is read by rows, and its transposition multiplies."""

    def loss(table: Any, tokens: Any) -> Any:
        logits = jax.nn.log_softmax(jnp.tanh(table[tokens]) @ table.T)
        return -jnp.mean(jnp.take_along_axis(logits, tokens[:, None], 1))

    args = (arr(64, WIDTH), np.arange(1024, dtype=np.int32) % 64)
    mesh = make_mesh(fsdp=DEVICES)
    found = check(jax.grad(loss), args, mesh, (P("fsdp"), P("fsdp")), P("fsdp"))
    assert gathers(found) == (1, 2 * GATHERED)


@pytest.mark.parametrize(
    "change",
    [jnp.exp, lambda w: jnp.abs(w) ** 1.3, jax.lax.optimization_barrier],
    ids=["exponential", "power", "kept apart"],
)
def test_not_what_is_dear_or_was_asked_for(change: Any) -> None:
    found = with_weights(lambda w, x: jnp.tanh(x @ w) @ change(w))
    assert gathers(found)[0] == 2


def test_not_what_another_operand_has_a_part_in() -> None:
    found = with_weights(lambda w, x: jnp.tanh(x @ w) @ (w * w[:1]))
    assert gathers(found)[0] == 2


def test_not_what_has_to_move_for_it() -> None:
    """The transposition of weights that nothing else gathers is gathered itself, once."""
    found = with_weights(lambda w, x: x @ jnp.tanh(w).T)
    assert gathers(found) == (1, GATHERED)
    made = [i.op for i, _ in found.plan.body.walk() if isinstance(i, Compute)]
    assert len(made) == len(set(map(id, made)))


def test_what_comes_of_nothing_in_several_steps() -> None:
    """The gradient of rows that are set tells them apart by a number for each, `iota + 1`, which
    the scatter needs whole."""
    order = np.random.default_rng(0).permutation(BATCH).astype(np.int32)

    def fun(x: Any, order: Any) -> Any:
        return jax.grad(lambda x: (jnp.zeros_like(x).at[order].set(x) ** 2).sum())(x)

    found = check(fun, (arr(BATCH, WIDTH), order), make_mesh(fsdp=DEVICES), (P("fsdp"), P("fsdp")))
    moves = [i for i, _ in found.plan.body.walk() if isinstance(i, Move)]
    numbers = [m for m in moves if m.value.dtype == np.uint32]
    assert not sum(m.plan.bytes for m in numbers), str(found)


def test_with_what_is_made_of_nothing() -> None:
    found = with_weights(lambda w, x: jnp.tanh(x @ w) @ (w * jnp.arange(WIDTH, dtype=w.dtype)))
    assert gathers(found) == (1, GATHERED)
