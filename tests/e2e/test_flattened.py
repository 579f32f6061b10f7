"""Several sharded dims made one, as tokens of a batch are for a layer or a loss, and back."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spmd
from sharding import MeshShape, P, shard
from sharding.mesh import refine, refine_refs
from tests.oracle import check, kinds, make_mesh

BATCH, LENGTH, WIDTH = 8, 16, 32
PLACE = P("data", "seq")
SHAPE = (BATCH, LENGTH, WIDTH)


def draw(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def flat(x: Any) -> Any:
    return x.reshape(-1, x.shape[-1])


def test_every_shard_gets_whole_rows_by_an_all_to_all() -> None:
    """Of 8 x 16 tokens a device has 4 x 4; of the flat ones, 16 in a row: those of one example."""
    x, w = draw(*SHAPE), draw(WIDTH, WIDTH)

    def fun(x: Any, w: Any) -> Any:
        return jnp.tanh(flat(x) @ w).reshape(x.shape)

    planned = check(fun, (x, w), make_mesh(data=2, seq=4), (PLACE, P()), PLACE)
    assert kinds(planned) == {("all_to_all", ("seq",)): (2, 2 * x.nbytes / 8 * 3 / 4)}
    text = str(planned.explain("%2"))
    assert "dim 0 on seq\n    x dim 1: in_shardings" in text
    assert "not taken" not in text


def layer(x: Any, w: Any) -> Any:
    return (flat(x) @ w).reshape(*x.shape[:2], -1)


GATHERED = LENGTH * WIDTH * 4 * BATCH // 2 * 3 // 4  # of all positions of a device's examples


def test_what_columns_gather_is_gathered_before_it_is_flattened() -> None:
    """The columns need all tokens of a device's examples: no exchange of them comes first."""
    args = draw(*SHAPE), draw(WIDTH, 256)
    places = (PLACE, P(None, "seq")), P("data", None, "seq")
    planned = check(layer, args, make_mesh(data=2, seq=4), *places)
    assert kinds(planned) == {("all_gather", ("seq",)): (1, GATHERED)}
    off = check(
        layer, args, make_mesh(data=2, seq=4), *places, disable_passes=["direct_moves"],
    )  # fmt: skip
    assert kinds(off) == {
        ("all_to_all", ("seq",)): (1, GATHERED / 4),
        ("all_gather", ("seq",)): (1, GATHERED),
    }


@pytest.mark.parametrize(
    "between",
    [
        lambda y: jnp.swapaxes(y, 0, 1),
        lambda y: -y.reshape(BATCH, -1, WIDTH).reshape(-1, WIDTH).T * 2,
        lambda y: jnp.expand_dims(y, 1)[:, 0].T,
    ],
)
def test_so_is_what_is_rearranged_further(between: Callable[[Any], Any]) -> None:
    args = draw(*SHAPE), draw(256, WIDTH)

    def fun(x: Any, w: Any) -> Any:
        return w @ between(flat(x))

    places = (PLACE, P("seq")), P("seq", "data")
    planned = check(fun, args, make_mesh(data=2, seq=4), *places)
    assert kinds(planned) == {("all_gather", ("seq",)): (1, GATHERED)}


def test_what_is_narrower_after_a_cast_is_gathered_there() -> None:
    def fun(x: Any, w: Any) -> Any:
        return flat(x).astype(jnp.bfloat16) @ w

    args = draw(*SHAPE), draw(WIDTH, 256).astype(jnp.bfloat16)
    places = (PLACE, P(None, "seq")), P("data", "seq")
    planned = check(fun, args, make_mesh(data=2, seq=4), *places, tolerance=0.02)
    assert kinds(planned) == {
        ("all_to_all", ("seq",)): (1, GATHERED / 4),
        ("all_gather", ("seq",)): (1, GATHERED / 2),
    }


def test_what_others_gathered_is_flattened_for_nothing() -> None:
    def fun(x: Any, w: Any) -> Any:
        return shard(x, "data", None, None) * 2, layer(x, w)

    args = draw(*SHAPE), draw(WIDTH, 256)
    places = (PLACE, P(None, "seq")), (P("data"), P("data", None, "seq"))
    planned = check(fun, args, make_mesh(data=2, seq=4), *places)
    assert kinds(planned) == {("all_gather", ("seq",)): (1, GATHERED)}


def test_what_another_reads_as_it_is_exchanged_stays_so() -> None:
    """The flat tokens are a result as well, which no move of the operand makes."""

    def fun(x: Any, w: Any) -> Any:
        y = flat(x)
        return layer(x, w), y

    args = draw(*SHAPE), draw(WIDTH, 256)
    places = (PLACE, P(None, "seq")), (P("data", None, "seq"), P(("data", "seq")))
    planned = check(fun, args, make_mesh(data=2, seq=4), *places)
    assert kinds(planned)[("all_to_all", ("seq",))] == (1, GATHERED / 4)


def test_examples_that_are_fewer_than_shards_take_a_part_of_the_axis() -> None:
    """Two examples per device, four shards of their tokens: the minor half of the axis goes to
    the examples, and the major half stays."""
    x, w = draw(4, LENGTH, WIDTH), draw(WIDTH, WIDTH)

    def fun(x: Any, w: Any) -> Any:
        return jnp.tanh(flat(x) @ w).reshape(x.shape)

    planned = check(fun, (x, w), make_mesh(data=2, seq=4), (PLACE, P()), PLACE)
    assert kinds(planned) == {("all_to_all", ("seq:(2)2",)): (2, 2 * x.nbytes / 8 / 2)}


def test_examples_that_are_whole_shards_stay() -> None:
    x = draw(2, LENGTH, WIDTH)
    planned = check(
        lambda x: jnp.tanh(flat(x)).reshape(x.shape), (x,), make_mesh(data=2, seq=4), (PLACE,),
        PLACE,
    )  # fmt: skip
    assert not planned.collectives


def test_a_flat_result_that_is_asked_for_in_two_dims_is_cut_in_place() -> None:
    """Of the two axes that the result wants, the flat operand can bring one: it stays there."""
    x = draw(BATCH * LENGTH, WIDTH)
    planned = check(
        lambda x: shard(jnp.tanh(x), "data", None).reshape(SHAPE), (x,),
        make_mesh(data=2, seq=4), (P("data"),), PLACE,
    )  # fmt: skip
    assert not planned.collectives


def test_what_the_other_side_cannot_hold_is_left_alone() -> None:
    """[5, 16] as [10, 8]: eight shards of the 8 are no part of a dim of the 5 or the 16."""
    x = draw(5, 16)
    planned = check(
        lambda x: jnp.tanh(jnp.sin(x).reshape(10, 8)).sum(0), (x,), make_mesh(x=8), None, P("x")
    )
    assert not planned.collectives
    there = spmd.jit(
        lambda x: x.reshape(5, 16), mesh=make_mesh(x=8), in_shardings=P(None, "x")
    ).trace(draw(10, 8)).propagate()  # fmt: skip
    assert there.out_shardings.spec == P()


@pytest.mark.parametrize("shape, dim", [
    ((2, 64, 8), 1), ((4, 32, 8), 1), ((2, 4, 16, 8), 2),
])  # fmt: skip
def test_parts_of_an_axis_that_are_divided_again(shape: tuple[int, ...], dim: int) -> None:
    """Into two dims, of which one takes a part of the part."""
    x = draw(*shape)
    planned = check(
        lambda x: jnp.tanh(jnp.sin(x).reshape(-1, 8)).reshape(4, 2, 16, 8).sum(3), (x,),
        make_mesh(x=8), (P(*(None,) * dim, "x"),),
    )  # fmt: skip
    assert planned.wire_bytes < x.nbytes * 7 / 8 / 2


def test_what_is_whole_is_cut_in_place() -> None:
    """An argument that nobody placed is not sharded for what is made of it."""
    planned = check(
        lambda x: x.reshape(4, 8), (draw(32),), make_mesh(x=2, y=4), None, P(None, "y")
    )
    assert not planned.collectives


@pytest.mark.parametrize("fun, shape, place", [
    (lambda x: (jnp.tanh(x.reshape(36)), jnp.tanh(x.reshape(3, 2, 6))), (6, 6), P(None, "x")),
    (lambda x: x.reshape(6, 2, 3).reshape(6, 6).reshape(36).reshape(3, 12), (6, 6), P(None, "x")),
    (lambda x: (jnp.tanh(x.reshape(2, 3)), jnp.tanh(x.reshape(3, 2))), (6,), P("x")),
])  # fmt: skip
def test_parts_that_are_no_parts_of_one_another(
    fun: Callable[[Any], Any], shape: tuple[int, ...], place: Any
) -> None:
    """Six shards as two times three, and as three times two."""
    check(fun, (draw(*shape),), make_mesh(x=6), (place,))


def test_an_axis_that_does_not_divide_the_dims_is_refused() -> None:
    """Eight shards of three rows of eight: the major dim takes none of them."""
    found = spmd.jit(
        lambda x: x.reshape(24), mesh=make_mesh(x=8), in_shardings=P(None, "x")
    ).trace(draw(3, 8)).propagate()  # fmt: skip
    assert found.out_shardings.spec == P()
    reasons = {rejection.reason for rejection in found.result.rejections}
    assert reasons == {"the shards would not be contiguous"}
    assert all(event.link < 0 for event in found.result.events)  # the annotation alone


def test_parts_that_are_no_products_of_parts_are_left_out() -> None:
    mesh = MeshShape((("x", 6),))
    refined = refine(mesh, {"x:(1)2", "x:(2)3", "x:(1)3", "x:(3)2"})
    assert refined.axes == (("x:(1)2", 2), ("x:(2)3", 3))
    assert refine_refs(mesh, refined, ("x",)) == ("x:(1)2", "x:(2)3")
    assert refine_refs(mesh, refined, ("x:(1)3",)) == ()


def test_parts_of_an_axis_of_a_mesh_that_is_set() -> None:
    x, mesh = draw(8, 3), make_mesh(x=8)
    with jax.set_mesh(mesh):
        check(lambda x: jnp.tanh(x.reshape(2, 4, 3)), (x,), mesh, (P("x"),))


def test_heads_beside_the_batch() -> None:
    """Attention over examples and heads as one dim."""
    x = draw(BATCH, LENGTH, 8, 4)

    def fun(x: Any) -> Any:
        h = x.transpose(0, 2, 1, 3).reshape(-1, LENGTH, 4)
        h = jax.nn.softmax(h @ h.swapaxes(1, 2)) @ h
        return h.reshape(BATCH, 8, LENGTH, 4).transpose(0, 2, 1, 3)

    place = P("data", None, "tensor")
    planned = check(fun, (x,), make_mesh(data=2, tensor=4), (place,), place)
    assert kinds(planned) == {("all_to_all", ("tensor",)): (2, 2 * x.nbytes / 8 * 3 / 4)}


def test_windows_of_rows_beside_the_batch() -> None:
    """Windows of 4 x 4 of an image whose rows are sharded, each a row of the flat array."""
    x, w = draw(BATCH, 32, 8, 4), draw(4, 4)

    def fun(x: Any, w: Any) -> Any:
        h = x.reshape(BATCH, 8, 4, 2, 4, 4).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 16, 4) @ w
        return h.reshape(BATCH, 8, 2, 4, 4, 4).transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)

    planned = check(fun, (x, w), make_mesh(data=2, seq=4), (PLACE, P()), PLACE)
    assert kinds(planned) == {("all_to_all", ("seq",)): (2, 2 * x.nbytes / 8 * 3 / 4)}


def test_features_are_moved_and_not_the_logits_made_of_them() -> None:
    """The loss of flat tokens and its gradient: features come to the flat order once, with the
    tokens' ids, and the gradient of the weights is reduced."""
    x, w = draw(*SHAPE), draw(WIDTH, 128)
    ids = np.random.default_rng(1).integers(0, 128, (BATCH, LENGTH), np.int32)

    def loss(w: Any, x: Any, ids: Any) -> Any:
        logits = (2 * (x @ w)).reshape(-1, 128)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), ids.reshape(-1, 1), 1)
        return -picked.mean()

    planned = check(
        jax.value_and_grad(loss), (w, x, ids), make_mesh(data=2, seq=4), (P(), PLACE, PLACE),
        (P(), P()),
    )  # fmt: skip
    found = kinds(planned)
    assert found.pop(("all_to_all", ("seq",))) == (2, (x.nbytes + ids.nbytes) / 8 * 3 / 4)
    assert found == {("all_reduce", ("data", "seq")): (2, (w.nbytes + 4) * 2 * 7 / 8)}


def normalise(x: Any) -> Any:
    h = flat(x)
    return ((h - h.mean(0)) / h.std(0)).reshape(x.shape)


def tied(x: Any) -> Any:
    """The flat dim and the dims that it was made of meet again."""
    return x + jnp.tanh(flat(x)).reshape(x.shape)


def columns(x: Any) -> Any:
    """A minor dim made one with features."""
    return jnp.tanh(x.reshape(BATCH, -1)).reshape(x.shape)


@pytest.mark.parametrize("fun", [normalise, tied, columns])
@pytest.mark.parametrize("place", [
    PLACE, P("seq", "data"), P(None, "seq"), P(None, ("data", "seq")), P("data", None, "seq"),
    P(None, "data", "seq"),
])  # fmt: skip
def test_values(fun: Callable[[Any], Any], place: Any) -> None:
    for batch in (1, 3, 4, 8):
        x = draw(BATCH, LENGTH, WIDTH)[:batch] if fun is not columns else draw(*SHAPE)
        if place[0] is None or batch % 4 == 0:
            check(fun, (x,), make_mesh(data=2, seq=4), (place,), place)


@pytest.mark.parametrize("split", [(2, 4), (4, 2), (2, 2, 2), (2, 12)])
@pytest.mark.parametrize("outs", [P("s"), None], ids=["sharded", "free"])
def test_a_sharded_dim_that_is_split_turned_and_joined(split: tuple[int, ...], outs: Any) -> None:
    """Its parts change places: an axis is cut in two ways, of which the one is no part of the
    other."""

    def fun(x: Any) -> Any:
        turned = x.reshape(*split, -1).transpose(*reversed(range(len(split))), len(split))
        return turned.reshape(x.shape)

    check(fun, (draw(int(np.prod(split)), 16),), make_mesh(s=8), (P("s"),), outs)
