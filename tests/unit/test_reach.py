"""Which dim has an axis that two want: that which more of the program has, from the start."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

import spmd
from sharding import P, shard
from sharding.reach import furthest

MESH = AbstractMesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))


def arr(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def propagate(fun: Callable, *args: Any, **options: Any) -> Any:
    return spmd.jit(fun, mesh=MESH, **options).trace(*args).propagate()


def made_by(found: Any, primitive: str) -> list[str]:
    return [
        str(found.result.of(op.outputs[0])) for op in found.result.program.ops()
        if op.eqn is not None and op.eqn.primitive.name == primitive
    ]  # fmt: skip


# --- dims of a program ----------------------------------------------------------------------------


def test_dims_that_equations_pass_on_are_one() -> None:
    def run(x: Any, w: Any) -> Any:
        return jnp.tanh(x @ w).reshape(8, 2, 4, 6).sum(2)

    result = propagate(run, arr(16, 4, 5), arr(5, 6)).result
    x, w = result.program.body.inputs
    (out,) = result.program.body.outputs
    reach = result.reach
    assert reach.dim(x, 0) == reach.dim(out, 0) != reach.dim(x, 1)
    assert reach.dim(w, 1) == reach.dim(out, 2) != reach.dim(w, 0)
    # x, the product and its hyperbolic tangent, then 8 x 2 x 4 x 6 and the sum
    assert reach.of(reach.dim(x, 0)) == 16 * 4 * 5 + 3 * 16 * 4 * 6 + 8 * 2 * 6
    # what is contracted is a dim of each operand alone
    assert reach.of(reach.dim(w, 0)) == 5 * 6


def test_loops_over_layers_pass_the_batch_on() -> None:
    def run(ws: Any, x: Any) -> Any:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    result = propagate(run, arr(3, 8, 8), arr(16, 8)).result
    x, (out,) = result.program.body.inputs[1], result.program.body.outputs
    reach = result.reach
    assert reach.dim(x, 0) == reach.dim(out, 0)


@pytest.mark.parametrize(
    "inside, known",
    [((None, None), True), (("fsdp", None), True), ((P.UNCONSTRAINED, "fsdp"), False)],
    ids=["whole", "batch", "features"],
)
def test_annotations_inside_that_say_otherwise(inside: Any, known: bool) -> None:
    """An axis that they give to another dim, or keep from the batch, is for neighbours."""

    def run(w: Any, x: Any) -> Any:
        return jnp.tanh(shard(x @ w, *inside)) @ w.T

    found = propagate(run, arr(8, 8), arr(64, 8), in_shardings=(P("fsdp"), P("fsdp")))
    annotations = [(value, s) for value, s in found.traced.annotations]
    reach = found.result.reach
    batch = reach.dim(found.result.program.body.inputs[1], 0)
    first = furthest(found.result.program, annotations, reach)
    expected = {"fsdp": batch} if known and inside != (None, None) else {}
    assert first == expected


def test_values_that_are_kept_from_an_axis_along_a_dim_do_not_count() -> None:
    """A cache that is sharded along its positions has the batch too, but not on that axis: the
    scores go with the positions, and the queries, which are small, are gathered."""

    def run(q: Any, cache: Any, length: Any) -> Any:
        scores = jnp.einsum("bd,btd->bt", q, cache)
        scores = jnp.where(jnp.arange(64) < length[:, None], scores, -1e9)
        return jnp.einsum("bt,btd->bd", jax.nn.softmax(scores), cache)

    args = (arr(8, 16), arr(8, 64, 16), arr(8, dtype=jnp.int32))
    specs = (P("fsdp"), P(None, "fsdp"), P("fsdp"))
    found = propagate(run, *args, in_shardings=specs, out_shardings=P("fsdp"))
    assert set(made_by(found, "exp")) == {"[?, fsdp?]"}
    annotations, result = found.traced.annotations, found.result
    reach, cache = result.reach, result.program.body.inputs[1]
    assert reach.of(reach.dim(cache, 0)) > reach.of(reach.dim(cache, 1))
    assert furthest(result.program, annotations, reach) == {"fsdp": reach.dim(cache, 1)}


# --- what comes of it -----------------------------------------------------------------------------


def test_a_bias_does_not_speak_for_what_it_is_added_to() -> None:
    """It is repeated along the batch, explicitly or not."""
    for add in (lambda x, b: x + b, lambda x, b: x + jnp.broadcast_to(b, x.shape)):
        found = propagate(
            lambda x, b, add=add: add(jnp.cumsum(x, 0), b), arr(64, 8), arr(8),
            in_shardings=(P("fsdp"), P("fsdp")),
        )  # fmt: skip
        assert found.out_shardings.spec == P("fsdp")
    alone = propagate(lambda x, b: x + b, arr(64, 8), arr(8), in_shardings=(None, P("fsdp")))
    assert alone.out_shardings.spec == P(None, "fsdp")


def test_two_that_are_repeated_along_each_other_s_dims() -> None:
    """Neither speaks before the batch does, which comes by another way."""

    def run(v: Any, t: Any, w: Any) -> Any:
        scaled = jax.lax.broadcast_in_dim(v, (64, 1, 1), (0,)) * t[None]
        return jnp.tanh(scaled @ w)

    args = (arr(64), arr(4, 8), arr(8, 8))
    found = propagate(run, *args, in_shardings=(P("fsdp"), P(None, "fsdp"), None))
    assert found.out_shardings.spec == P("fsdp")


def test_what_a_barrier_keeps_together_is_not_one_shape() -> None:
    """The batch goes through it, though one of its operands has more dims."""

    def run(x: Any, kernel: Any) -> Any:
        return jax.lax.optimization_barrier((x, kernel))[0] * 2

    found = propagate(run, arr(64, 8), arr(3, 3, 8, 8), in_shardings=(P("fsdp"), None))
    levels = {e.level for e in found.result.events}
    assert found.out_shardings.spec == P("fsdp") and levels == {0}


def test_positions_do_not_reach_through_what_their_table_is_added_to() -> None:
    """A table of positions that is sharded along them is gathered, and not the batch."""

    def run(table: Any, places: Any, tokens: Any) -> Any:
        x = table[tokens] + places
        scores = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", x, x))
        return jnp.tanh(jnp.einsum("bqk,bkd->bqd", scores, x))

    args = (arr(64, 32), arr(64, 32), arr(16, 64, dtype=jnp.int32))
    found = propagate(run, *args, in_shardings=(P(), P("fsdp"), P("fsdp")))
    assert found.out_shardings.spec == P("fsdp")
    result = found.result
    reach, tokens = result.reach, result.program.body.inputs[2]
    # scores have positions twice, and count once
    assert reach.of(reach.dim(tokens, 1)) <= reach.of(reach.dim(tokens, 0))


def test_an_index_with_a_dim_of_size_one_more_is_no_larger_copy() -> None:
    """The rows of a table go where the tokens are, and not where its transposition would be."""

    def run(table: Any, tokens: Any) -> Any:
        return jnp.tanh(table[tokens]) @ table.T

    args = (arr(64, 32), arr(1024, dtype=jnp.int32))
    found = propagate(run, *args, in_shardings=(P("fsdp"), P("fsdp")))
    assert found.out_shardings.spec == P("fsdp")


def test_small_weights_wait_for_the_batch() -> None:
    """The first product is contested, and waits; the second's weights must not take the residual
    stream meanwhile."""

    def run(x: Any, w: Any, v: Any) -> Any:
        h = x @ w
        return h + jnp.tanh(h) @ v

    args = (arr(512, 16), arr(16, 32), arr(32, 32))
    specs = (P("fsdp"), P(None, "fsdp"), P(None, "fsdp"))
    found = propagate(run, *args, in_shardings=specs)
    assert made_by(found, "dot_general") == ["[fsdp?, ?]"] * 2


@pytest.mark.parametrize("wide", [512, 1 << 20])
def test_weights_larger_than_what_they_multiply_stay(wide: int) -> None:
    """Eight rows through a wide layer: the rows are gathered, and not the weights; even where the
    rest of the program has more of the rows."""
    args = (arr(8, wide), arr(512, 4096))
    found = propagate(
        lambda x, w: jnp.tanh(x[:, :512] @ w), *args, in_shardings=(P("fsdp"), P(None, "fsdp"))
    )
    assert made_by(found, "dot_general") == ["[?, fsdp?]"]


def test_a_table_does_not_speak_for_what_is_read_from_it() -> None:
    """It is larger than the indices; what is read, larger still, would have to be moved back."""

    def run(table: Any, tokens: Any, w: Any) -> Any:
        return jnp.tanh(table[tokens] @ w).sum(1)

    args = (arr(64, 256), arr(512, dtype=jnp.int32), arr(256, 256))
    found = propagate(run, *args, in_shardings=(P(None, "fsdp"), P("fsdp"), P(None, "fsdp")))
    assert made_by(found, "gather") == ["[fsdp?, ?]"]
    assert found.out_shardings.spec == P("fsdp")
