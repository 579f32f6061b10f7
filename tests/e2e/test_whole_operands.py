"""Operands that are whole on every device where results are sharded: each takes its part of them,
and nothing is exchanged."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sharding import P
from tests.oracle import check, kinds, make_mesh

MESH = make_mesh(x=2, y=4)
MASK = np.tril(np.ones((64, 64), np.float32))


def arr(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


X, Y = arr(40, 3), arr(24, 3)
KEYS = jax.random.split(jax.random.key(3), 40)

# name -> what is made of X and Y, some rows that eight devices divide
CASES: dict[str, Callable[[Any, Any], Any]] = {
    "slice": lambda x, y: x[5:37],
    "strided slice": lambda x, y: x[1:32:4],
    "constant": lambda x, y: jnp.asarray(MASK)[7:47, :3],
    "pad": lambda x, y: jnp.pad(x, ((9, 15), (0, 0)), constant_values=2.0),
    "pad by less than nothing": lambda x, y: lax.pad(x, 1.0, ((-3, 3, 0), (0, 0, 0))),
    "pad inside": lambda x, y: lax.pad(y, 1.0, ((-1, 2, 1), (0, 0, 0))),
    "reverse": lambda x, y: x[::-1],
    "join": lambda x, y: jnp.concatenate([x, y]),
    "join equal ones": lambda x, y: jnp.concatenate([x, x]),
    "tile": lambda x, y: jnp.tile(x, (2, 1)),
    "rotate": lambda x, y: jnp.roll(x, 7, 0),
    "rotate back": lambda x, y: jnp.roll(x, -13, 0),
    "write": lambda x, y: x.at[6:30].set(y),
    "keys": lambda x, y: jnp.roll(KEYS, 9),
}


@pytest.mark.parametrize("axes", ["y", ("x", "y"), ("y", "x")], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_each_device_takes_its_part(name: str, axes: Any) -> None:
    planned = check(CASES[name], (X, Y), MESH, (P(), P()), P(axes))
    assert kinds(planned) == {}


def test_rows_of_a_table_of_positions() -> None:
    """As in a model whose sequence is sharded, and whose table is longer than that."""
    x, table = arr(2, 32, 6), arr(50, 6)
    planned = check(lambda x, table: x + table[:32], (x, table), MESH,
                    (P("x", "y"), P()), P("x", "y"))  # fmt: skip
    assert kinds(planned) == {}


@pytest.mark.parametrize("n", [40, 39, 5])
def test_of_some_operands_each_takes_its_part_and_of_others_what_neighbours_have(n: int) -> None:
    """Dims that do not divide, too."""
    whole, x = arr(n, 3), arr(24, 3)
    planned = check(lambda whole, x: jnp.concatenate([whole, x]).sum(0), (whole, x), MESH,
                    (P(), P("y")), P())  # fmt: skip
    assert {kind for kind, _ in kinds(planned)} <= {"permute", "all_reduce"}

    def places(whole: Any, x: Any) -> Any:
        return (jnp.concatenate([x, whole, x]) * jnp.arange(48 + n)[:, None]).sum(0)

    check(places, (whole, x), MESH, (P(), P("y")), P())
    check(lambda whole, x: jnp.roll(whole, 2, 0).sum(0), (whole, x), MESH, (P(), P("y")), P())


def test_what_goes_round_a_dim_that_does_not_divide() -> None:
    """The last shard ends in padding."""
    planned = check(lambda whole, x: (jnp.roll(whole, 2, 0) * x[:39]).sum(0), (X[:39], X), MESH,
                    (P(), P("y")), P())  # fmt: skip
    assert {kind for kind, _ in kinds(planned)} == {"all_reduce"}


def test_what_is_made_from_nothing_is_exchanged_by_nobody() -> None:
    planned = check(lambda x: jnp.concatenate([jnp.ones((8, 3)), x]), (X,), MESH, (P("y"),),
                    P("y"))  # fmt: skip
    assert kinds(planned) == {("permute", ("y",)): (1, 6 * 3 * 4.0)}


def test_what_is_made_from_nothing_is_not_made_larger_for_it() -> None:
    """Half of a result of zeros, say: on every device it would take what all of them have."""
    x = arr(64, 3)
    planned = check(lambda x: jnp.concatenate([x, jnp.zeros_like(x)]), (x,), MESH, (P("y"),),
                    P("y"))  # fmt: skip
    assert not any("= broadcast_in_dim(0.0)" in line and "[-, -]" in line
                   for line in str(planned.plan).splitlines())  # fmt: skip
    assert planned.wire_bytes == 2 * 16 * 3 * 4


def test_little_is_padded_by_little() -> None:
    """What a device takes of a few rows is not cut from an array as large as all of the result."""
    few, many = arr(8, 3), arr(4000, 3)
    planned = check(lambda few, many: jnp.concatenate([many, few]), (few, many), MESH,
                    (P(), P("y")), P("y"))  # fmt: skip
    padded = re.findall(r"f32\[(\d+),3\] = pad", str(planned.jaxpr))
    assert padded and max(map(int, padded)) <= 8 + 2 * 1002
