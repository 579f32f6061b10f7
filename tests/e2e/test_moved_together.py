"""What is moved as it is and rearranged, moved once: values, collectives, and what stays apart."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sharding import P
from sharding.spec import Layout
from spmd.partition.direct import direct_moves
from spmd.partition.plan import Key, Move
from tests.oracle import check, kinds, make_mesh

MESH, BOTH = make_mesh(x=2, y=4), P("x", "y")
OFF = {"disable_passes": ["direct_moves"]}


def arr(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32) / 8


X = arr(64, 128)
ROWS = X.nbytes / 4 / 2  # of a device's columns, those that the other half has
ONCE = {("all_reduce", ("y",)): (1, 2 * 64 * 32 * 4 * 3 / 4), ("all_gather", ("x",)): (1, ROWS)}


def times(count: int, found: dict[Any, tuple[int, float]]) -> dict[Any, tuple[int, float]]:
    return {kind: (count * n, count * size) for kind, (n, size) in found.items()}


def orthogonal(x: Any) -> Any:
    """A step of Newton and Schulz, as Muon has them."""
    return 1.5 * x - 0.5 * (x @ x.T) @ x


def test_rows_for_products_with_themselves_are_gathered_once() -> None:
    planned = check(orthogonal, (X,), MESH, (BOTH,), BOTH)
    assert kinds(planned) == ONCE
    assert str(planned.plan).count("= transpose(") == 1
    off = kinds(check(orthogonal, (X,), MESH, (BOTH,), BOTH, **OFF))
    assert off == ONCE | {("all_gather", ("x",)): (2, 2 * ROWS)}


def test_step_after_step_and_in_a_loop() -> None:
    planned = check(lambda x: orthogonal(orthogonal(x)), (X,), MESH, (BOTH,), BOTH)
    assert kinds(planned) == times(2, ONCE)
    planned = check(lambda x: lax.fori_loop(0, 3, lambda _, x: orthogonal(x), x), (X,), MESH,
                    (BOTH,), BOTH)  # fmt: skip
    assert kinds(planned) == times(3, ONCE)


def test_pairs_of_rows_and_a_product_with_them() -> None:
    """One dim more is no rearrangement that anything is exchanged for."""
    mesh, rows = make_mesh(d=8), P("d")

    def kernel(x: Any) -> Any:
        return jnp.exp(-((x[:, None] - x[None]) ** 2).sum(-1)) @ x

    gathered = X.nbytes * 7 / 8
    planned = check(kernel, (X,), mesh, (rows,), rows)
    assert kinds(planned) == {("all_gather", ("d",)): (1, gathered)}
    off = check(kernel, (X,), mesh, (rows,), rows, **OFF)
    assert kinds(off) == {("all_gather", ("d",)): (2, 2 * gathered)}


def test_what_was_rearranged_is_still_there_for_others() -> None:
    """The transposition is a result as well, where it was."""

    def f(x: Any) -> Any:
        t = x.T
        return (x @ t) @ x, t

    planned = check(f, (X,), MESH, (BOTH,), (BOTH, P("y", "x")))
    assert kinds(planned) == ONCE
    assert str(planned.plan).count("= transpose(") == 2


def test_through_several_operations() -> None:
    def f(x: Any) -> Any:
        return (x @ -(2.0 * x).T) @ x

    planned = check(f, (X,), MESH, (BOTH,), BOTH)
    assert kinds(planned) == ONCE


def test_three_of_one() -> None:
    """A transposition, what is transposed, and what that is made of."""

    def f(x: Any) -> Any:
        y = 2.0 * x
        t = y.T
        return ((x @ t) @ y) + (x @ x.T) @ x, t

    planned = check(f, (X,), MESH, (BOTH,), (BOTH, P("y", "x")))
    assert kinds(planned)["all_gather", ("x",)] == (1, ROWS)
    assert str(planned.plan).count("[-, y] = mul(") == 1


def test_what_is_made_again_later_is_made_once() -> None:
    def f(x: Any) -> Any:
        y = 2.0 * x
        return (x @ y.T) @ x + (x @ x.T) @ y

    planned = check(f, (X,), MESH, (BOTH,), BOTH)
    assert kinds(planned)["all_gather", ("x",)] == (1, ROWS)
    assert str(planned.plan).count("[-, y] = mul(") == 1


def rearranged() -> tuple[list[Any], list[Key], Any, Move]:
    """A plan in which rows are gathered twice: its code, what it is passed, its body, and the
    second gather, of what is as it was."""
    body = check(orthogonal, (X,), MESH, (BOTH,), BOTH, **OFF).plan.body
    inputs = [Key(v, at) for v, at in zip(body.region.inputs, body.inputs, strict=True)]
    (late,) = (one for one in body.code if isinstance(one, Move) and one.value is inputs[0].value)
    return [*body.code], inputs, body, late


def test_what_is_moved_later_has_to_be_there_before() -> None:
    """Here rows come by way of columns, which are there after the transposition was gathered."""
    code, inputs, body, late = rearranged()
    assert direct_moves(code, inputs, body.outputs, body.mesh) != code
    by = Layout(((), ("y", "x")))
    code[code.index(late) : code.index(late) + 1] = [replace(late, dst=by), replace(late, src=by)]
    assert direct_moves(code, inputs, body.outputs, body.mesh) == code


def test_what_was_moved_before_is_at_hand() -> None:
    code, inputs, body, late = rearranged()
    code.remove(late)
    found = direct_moves([late, *code], inputs, body.outputs, body.mesh)
    gathers = [one for one in found if isinstance(one, Move)
               and one.plan.steps[0].kind == "all_gather"]  # fmt: skip
    assert gathers == [found[0]] == [late]


def test_gradients() -> None:
    grad = jax.grad(lambda x: (orthogonal(x) ** 3).sum())
    on = check(grad, (X,), MESH, (BOTH,), BOTH)
    off = check(grad, (X,), MESH, (BOTH,), BOTH, **OFF)
    assert on.wire_bytes < off.wire_bytes
