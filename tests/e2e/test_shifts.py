"""Rotations and windows of padded arrays, and their gradients, are exchanges with neighbours."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import spmd
from spmd.checking.unsharded import evaluate
from tests.oracle import check, make_mesh

MESH = make_mesh(x=2, y=4)
WIDTH = 3


def arr(n: int) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((n, WIDTH)).astype(np.float32)


def sent(stage: Any) -> dict[str, float]:
    """Kind of collective -> bytes."""
    found: dict[str, float] = {}
    for record in stage.collectives:
        found[record.kind] = found.get(record.kind, 0) + record.bytes
    return found


def rotations(stage: Any) -> int:
    return len(re.findall(r"= rotate\(", str(stage)))


@pytest.mark.parametrize("shift", [1, -1, 3, 8, 16, 17, 0])
@pytest.mark.parametrize("n", [8, 16, 24])
def test_a_roll_is_one_exchange_forwards_and_backwards(n: int, shift: int) -> None:
    def both(x: Any) -> Any:
        y, back = jax.vjp(lambda x: jnp.roll(x, shift, axis=0), x)
        return y, back(jnp.cos(y))

    stage = check(both, [arr(n)], MESH, P(("x", "y")), P(("x", "y")), tolerance=0)
    by = min(shift % n, -shift % n)
    assert rotations(stage) == (2 if by else 0)
    # every row that comes from another shard is sent once, a whole shard at most
    rows = min(by, n // 8)
    assert sent(stage) == ({"permute": 2 * rows * WIDTH * 4} if by else {})


@pytest.mark.filterwarnings("ignore:boundary")
@pytest.mark.parametrize("n", [7, 9, 19, 3])
@pytest.mark.parametrize("shift", [1, -1, 5])
def test_uneven_dims_go_round_without_their_padding(n: int, shift: int) -> None:
    def both(x: Any) -> Any:
        y, back = jax.vjp(lambda x: jnp.roll(jnp.sin(x), shift, axis=0), x)
        return jnp.exp(y), back(jnp.cos(y))

    check(both, [arr(n)], MESH, P("y"), tolerance=1e-6)


def test_what_else_reads_a_piece_still_gets_it() -> None:
    def fun(x: Any) -> Any:
        last, rest = x[-1:], x[:-1]
        return jnp.concatenate([last, rest]), last * 2

    stage = check(fun, [arr(16)], MESH, P("y"), tolerance=0)
    assert rotations(stage) == 1
    assert len(re.findall(r"= slice\(", str(stage))) == 1


@pytest.mark.parametrize("fun", [
    lambda x: jnp.concatenate([x[1:], x[:-1]]),
    lambda x: jnp.concatenate([x[:4], x[4:]]),
    lambda x: jnp.concatenate([x[8:], 2 * x[:8]]),
    lambda x: jnp.concatenate([x[9:], x[:8]]),
    lambda x: jnp.concatenate([x[8:, 1:], x[:8, 1:]]),
    lambda x: jnp.concatenate([x[8::2], x[:8:2]]),
    lambda x: jnp.concatenate([x[8:], x[:8], x[:1]]),
    lambda x: jnp.pad(x[:4], ((12, 0), (0, 0))) + jnp.pad(x[4:], ((4, 0), (0, 0))),
    lambda x: jnp.pad(x[:4], ((12, 0), (0, 0)), constant_values=1.0)
    + jnp.pad(x[4:], ((0, 4), (0, 0))),
])  # fmt: skip
def test_other_pieces_are_no_rotation(fun: Any) -> None:
    assert rotations(check(fun, [arr(16)], MESH, P("y"), tolerance=0)) == 0


@pytest.mark.parametrize("dtype", ["bool", "int8", "bfloat16", "complex64", "key"])
def test_dtypes(dtype: str) -> None:
    x = jax.random.split(jax.random.key(0), 16) if dtype == "key" else arr(16).astype(dtype)
    stage = check(lambda x: jnp.roll(x, 5, axis=0), [x], MESH, P("y"), tolerance=0)
    assert rotations(stage) == 1


def test_inside_of_loops_and_of_several_dims() -> None:
    def fun(x: Any) -> Any:
        def tick(x: Any, _: Any) -> tuple[Any, Any]:
            x = jnp.roll(jnp.sin(x), (1, -2), axis=(0, 1))
            return x, x.sum()

        return jax.lax.scan(tick, x, length=3)

    x = np.random.default_rng(0).standard_normal((8, 12)).astype(np.float32)
    stage = check(fun, [x], MESH, P("x", "y"))
    assert rotations(stage) == 2


def test_the_unsharded_program_knows_rotations_too() -> None:
    """`spmd.check` runs equations of the program one by one."""
    stage = check(lambda x: jnp.roll(x, 3, axis=0), [arr(16)], MESH, P("y"))
    program = stage.propagated.result.program
    (got,) = jax.jit(lambda x: evaluate(program.body, [x]))(arr(16))
    np.testing.assert_array_equal(got, np.roll(arr(16), 3, axis=0))


@pytest.mark.parametrize("spec", [P(), P("y")])
def test_rotations_are_differentiated_and_batched_like_the_program_they_are_of(spec: P) -> None:
    def fun(x: Any) -> Any:
        return jnp.roll(jnp.sin(x), 1, axis=0)

    inside = jax.shard_map(fun, mesh=MESH, in_specs=P("y"), out_specs=P("y"), axis_names={"y"})
    for each in (fun, inside):
        function = spmd.jit(each, mesh=MESH, in_shardings=spec)
        x = arr(16)
        for transformed in (
            lambda f, x: jax.grad(lambda x: (f(x) ** 2).sum())(x),
            lambda f, x: jax.vmap(f)(jnp.stack([x, 2 * x])),
            lambda f, x: jax.jvp(f, (x,), (x,))[1],
        ):
            got, want = transformed(function, x), transformed(jax.jit(each), x)
            np.testing.assert_allclose(got, want, rtol=1e-6)


# --- windows of a padded array --------------------------------------------------------------------


def taps(x: Any, weights: Any) -> Any:
    """A short causal convolution, as recurrent models write it."""
    past = jnp.pad(x, ((2, 0), (0, 0)))
    return sum(past[i : i + x.shape[0]] * weights[i] for i in range(3))


def test_windows_of_a_padded_array_fetch_a_few_rows_forwards_and_backwards() -> None:
    def both(x: Any, weights: Any) -> Any:
        y, back = jax.vjp(taps, x, weights)
        return y, back(jnp.cos(y))[0]

    weights = np.random.default_rng(1).standard_normal((3, WIDTH)).astype(np.float32)
    stage = check(both, [arr(16), weights], MESH, (P("y"), P()), P("y"))
    # forwards 2 rows and 1 row, backwards the same; no array of 18 rows is left
    assert sent(stage) == {"permute": 2 * 3 * WIDTH * 4}
    assert "[18," not in str(stage.propagated)


@pytest.mark.parametrize("fun", [
    lambda x: jnp.pad(x, ((3, 0), (0, 0)), constant_values=2.0)[1:17],
    lambda x: jnp.pad(x, ((3, 5), (1, 0)), mode="constant")[4:20],
    lambda x: jax.lax.pad(x, 1.0, ((2, 2, 1), (0, 0, 0)))[3:19],
    lambda x: (jnp.pad(x, ((1, 0), (0, 0))) + jnp.pad(2 * x, ((0, 1), (0, 0))))[:16],
])  # fmt: skip
def test_what_is_left_of_a_pad_is_a_pad(fun: Any) -> None:
    stage = check(fun, [arr(16)], MESH, P("y"), tolerance=0)
    assert "= slice(" not in str(stage.propagated)


@pytest.mark.parametrize("fun", [
    lambda x: jnp.pad(x, ((3, 0), (0, 0)))[::2],
    lambda x: jnp.pad(x, ((3, 0), (0, 0)))[3:4],
    lambda x: jnp.pad(x, ((3, 0), (0, 0)))[:, :2],
    lambda x: (jnp.pad(x, ((1, 0), (0, 0))) + 1)[:16],
])  # fmt: skip
def test_other_slices_stay(fun: Any) -> None:
    assert "= slice(" in str(check(fun, [arr(16)], MESH, P("y"), tolerance=0).propagated)
