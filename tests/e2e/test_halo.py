"""`fetch`: whatever ranges the shards want, they get what gathering and slicing would give."""

import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sharding.mesh import MeshShape
from spmd.collectives import count
from spmd.partition.apply import linear_index
from spmd.partition.halo import fetch, hops
from tests.oracle import make_mesh

MESH = make_mesh(x=2, y=4)
SHAPE = MeshShape((("x", 2), ("y", 4)))


def padded(x: np.ndarray, axes: tuple[str, ...], dim: int) -> np.ndarray:
    """Padding of the last shards is poison."""
    shards = int(np.prod([MESH.shape[a] for a in axes]))
    more = -x.shape[dim] % shards
    poison = np.full([more if d == dim else n for d, n in enumerate(x.shape)], 99, x.dtype)
    return np.concatenate([x, poison], dim)


def program(axes, dim, size, starts, width, fill):
    def local(x):
        index = linear_index(axes, SHAPE)
        return fetch(x, dim, axes, size, starts, width, fill, index, SHAPE)

    spec = P(*([None] * dim), axes)
    return jax.shard_map(local, mesh=MESH, in_specs=spec, out_specs=spec, check_vma=False)


def check(axes, dim, size, starts, width, fill=0, dtype=np.float32):
    shape = [3, 2]
    shape[dim] = size
    x = np.arange(1, np.prod(shape) + 1).reshape(shape).astype(dtype)
    got = jax.jit(program(axes, dim, size, starts, width, fill))(padded(x, axes, dim))
    whole = np.full([n if d != dim else size + 200 for d, n in enumerate(shape)], fill, dtype)
    inside = [slice(None)] * 2
    inside[dim] = slice(100, 100 + size)
    whole[tuple(inside)] = x
    want = [np.take(whole, np.arange(100 + s, 100 + s + width), axis=dim) for s in starts]
    np.testing.assert_array_equal(np.asarray(got), np.concatenate(want, dim))


def test_random_ranges() -> None:
    rng = random.Random(0)
    orders = [("x",), ("y",), ("x", "y"), ("y", "x")]
    for axes, _ in itertools.product(orders, range(12)):
        shards = int(np.prod([MESH.shape[a] for a in axes]))
        size, width = rng.randint(1, 20), rng.randint(1, 12)
        starts = [rng.randint(-8, size + 8) for _ in range(shards)]
        check(axes, rng.randint(0, 1), size, starts, width, fill=rng.choice([0, -7]))


@pytest.mark.parametrize("step", [1, 2, 3, -2, 0])
@pytest.mark.parametrize("size", [8, 7, 3, 1])
def test_ranges_in_a_line(step: int, size: int) -> None:
    for base, width in [(0, 2), (-1, 4), (3, 1), (-9, 3)]:
        check(("y",), 0, size, [base + step * i for i in range(4)], width, fill=5)


def test_dtypes() -> None:
    for dtype in (np.bool_, np.int8, np.complex64, jnp.bfloat16):
        check(("y",), 0, 8, [-1, 1, 3, 5], 4, dtype=dtype)


def collectives(axes, size, starts, width):
    fun = program(axes, 0, size, starts, width, 0)
    jaxpr = jax.make_jaxpr(fun)(jnp.zeros((-(-size // 4) * 4, 100_000)))
    return {c.kind: (c.count, c.bytes) for c in count(jaxpr.jaxpr, dict(MESH.shape))}


def test_a_halo_moves_the_halo_and_nothing_else() -> None:
    row = 100_000 * 4
    found = collectives(("y",), 32, [8 * i - 1 for i in range(4)], 10)
    assert found == {"permute": (2, 2 * row)}
    assert collectives(("y",), 32, [8 * i - 3 for i in range(4)], 8) == {"permute": (1, 3 * row)}
    assert collectives(("y",), 32, [8 * i + 2 for i in range(4)], 4) == {}
    # A shift by more than a shard; a reversal: every shard sends one block and receives one.
    assert collectives(("y",), 32, [8 * i - 16 for i in range(4)], 8) == {"permute": (1, 8 * row)}
    reversal = collectives(("y",), 32, [8 * (3 - i) for i in range(4)], 8)
    assert reversal == {"permute": (1, 8 * row)}


@pytest.mark.parametrize("block, width", [(14, 16), (16, 14)])
def test_blocks_of_another_size_are_a_window_of_what_is_joined(block: int, width: int) -> None:
    """Nothing is filled with zeros, and written over, first."""
    size = 4 * min(block, width)
    starts = [i * width for i in range(4)]
    padded_size = 4 * block
    jaxpr = jax.make_jaxpr(program(("y",), 0, size, starts, width, 0))(jnp.zeros((padded_size, 2)))
    assert "dynamic_update_slice" not in str(jaxpr) and "dynamic_slice" in str(jaxpr)
    (exchange,) = count(jaxpr.jaxpr, dict(MESH.shape))
    assert (exchange.kind, exchange.count, exchange.bytes) == ("permute", 1, 6 * 2 * 4)
    check(("y",), 0, size, starts, width)


def test_everyone_wants_everything() -> None:
    found = collectives(("y",), 32, [0] * 4, 32)
    assert found == {"all_gather": (1, 24 * 100_000 * 4)}


def test_a_shift_is_one_exchange_per_neighbour() -> None:
    for size, shards in itertools.product((1, 5, 8, 9), (2, 4)):
        block = -(-size // shards)
        for shift in range(-block, block + 1):
            starts = tuple(i * block + shift for i in range(shards))
            moving = [hop for hop in hops(size, block, shards, starts, block) if hop.moves]
            assert len(moving) <= 1
            for hop in moving:
                assert 0 < hop.length <= abs(shift)
                assert all(abs(source - receiver) == 1 for source, receiver in hop.pairs)


@pytest.mark.parametrize("shift", [1, -3])
def test_what_is_joined_is_cut_once(shift: int) -> None:
    """Of its own block a device takes all but a few elements: all, which nothing moves first."""
    starts = [32 * i - shift for i in range(4)]
    jaxpr = str(jax.make_jaxpr(program(("y",), 0, 128, starts, 32, 0))(jnp.zeros((128, 2))))
    assert f"f32[{32 + abs(shift)},2] = concatenate" in jaxpr
    assert f"f32[{32 - abs(shift)},2]" not in jaxpr
    check(("y",), 0, 128, starts, 32)
