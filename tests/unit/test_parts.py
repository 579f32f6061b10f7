"""Parts of arrays at traced places: what they hold, and how few equations they take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding import parts


@pytest.mark.parametrize(
    ("table", "equations"),
    [((3, 3, 3), 0), ((0, 1, 2), 0), ((5, 6, 7), 1), ((0, -4, -8), 1), ((1, 4, 7), 2),
     ((2, 0, 7), 2), ((9,), 0)],
)  # fmt: skip
def test_pick_gives_the_entry(table, equations):
    def picked(index):
        return jnp.asarray(parts.pick(table, index))

    for i, entry in enumerate(table):
        assert int(jax.jit(picked)(jnp.int32(i))) == entry
    jaxpr = jax.make_jaxpr(lambda index: parts.pick(table, index))(jnp.int32(0))
    assert len(jaxpr.eqns) == equations, jaxpr


def test_places_that_are_known_take_no_equation():
    assert parts.times(np.int32(3), 4) == 12
    assert parts.plus(np.int32(3), 4) == 7
    assert isinstance(parts.fixed(0, jnp.bfloat16), np.ndarray)


@pytest.mark.parametrize("dim", [0, 1])
def test_cut_and_written_are_bounded_as_by_xla(dim):
    x = np.arange(20.0).reshape(4, 5)
    for start in (-2, 0, 1, 9):
        at = min(max(start, 0), x.shape[dim] - 2)
        found = jax.jit(lambda s: parts.cut(x, s, 2, dim))(start)
        np.testing.assert_array_equal(found, np.take(x, [at, at + 1], axis=dim))
        part = np.full((2, 5) if dim == 0 else (4, 2), -1.0)
        wanted = x.copy()
        wanted[(slice(None),) * dim + (slice(at, at + 2),)] = -1.0
        found = jax.jit(lambda s, y: parts.written(jnp.asarray(x), y, s, dim))(start, part)
        np.testing.assert_array_equal(found, wanted)


def test_where_takes_fills_known_and_traced():
    x = jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)
    mask = x > 2
    for fill in (7, jnp.float32(7)):
        found = jax.jit(lambda f: parts.where(mask, x, f))(fill)
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, jnp.where(mask, x, jnp.bfloat16(7)))
