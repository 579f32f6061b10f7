"""Reshard plans, carried out on 8 devices: every element arrives, whatever the two layouts."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from sharding.mesh import MeshShape
from sharding.spec import Layout
from spmd.boundary import partition_spec
from spmd.partition.apply import apply, linear_index
from spmd.partition.reshard import plan

MESHES = [(("x", 8),), (("x", 2), ("y", 4)), (("x", 2), ("y", 2), ("z", 2))]


def draw_dims(rng: random.Random, axes: list[str], rank: int) -> tuple[tuple[str, ...], ...]:
    dims: list[list[str]] = [[] for _ in range(rank)]
    for axis in rng.sample(axes, rng.randint(0, len(axes))):
        rng.choice(dims).append(axis)
    return tuple(map(tuple, dims))


def run(mesh: MeshShape, src: Layout, dst: Layout, x: np.ndarray) -> np.ndarray:
    """Lays out `x` as `src` by slicing, applies the plan, and gathers the result dim by dim."""
    shape = x.shape
    steps = plan(src, dst, shape, 4, mesh).steps
    jax_mesh = jax.make_mesh(
        tuple(n for _, n in mesh.axes), mesh.names, axis_types=(AxisType.Auto,) * len(mesh.axes)
    )

    def body(whole: jax.Array) -> jax.Array:
        whole = partial_share(whole, src, mesh)
        local = apply(
            plan(_whole(src), src._replace(partial=()), shape, 4, mesh).steps,
            whole,
            _whole(src),
            shape,
            mesh,
        )
        local = poison_padding(local, src, shape, mesh)
        local = apply(steps, local, src, shape, mesh)
        assert local.shape == dst.local_shape(shape, mesh)
        return jnp.expand_dims(local, 0)

    spec = partition_spec(Layout((mesh.names,)))
    out = jax.jit(
        jax.shard_map(
            body,
            mesh=jax_mesh,
            in_specs=(partition_spec(_whole(src)),),
            out_specs=spec,
            check_vma=False,
        )
    )(x)
    assert out.sharding.is_equivalent_to(NamedSharding(jax_mesh, spec), out.ndim)
    return np.asarray(out)


def partial_share(x: jax.Array, src: Layout, mesh: MeshShape) -> jax.Array:
    """Addends of `x` over the partial axes: index + 1, so that the sum is known."""
    for axis, _ in src.partial:
        x = x * (linear_index((axis,), mesh) + 1)
    return x


def poison_padding(x: jax.Array, layout: Layout, shape: tuple, mesh: MeshShape) -> jax.Array:
    for d, axes in enumerate(layout.dims):
        at = jax.lax.broadcasted_iota(jnp.int32, x.shape, d)
        at = at + linear_index(axes, mesh) * x.shape[d]
        x = jnp.where(at < shape[d], x, jnp.nan)
    return x


def expected(x: np.ndarray, src: Layout, dst: Layout, mesh: MeshShape) -> list[np.ndarray]:
    """Per device, the block of the whole array that `dst` puts there."""
    sizes = dict(mesh.axes)
    blocks = []
    for coordinate in np.ndindex(*[n for _, n in mesh.axes]):
        at = dict(zip(mesh.names, coordinate, strict=True))
        block = x.copy()
        for axis, monoid in src.partial:
            done = (axis, monoid) not in dst.partial
            block = block * (sizes[axis] * (sizes[axis] + 1) / 2 if done else at[axis] + 1)
        for d, axes in enumerate(dst.dims):
            index, shards = 0, 1
            for axis in axes:
                index, shards = index * sizes[axis] + at[axis], shards * sizes[axis]
            local = -(-x.shape[d] // shards)
            block = np.take(
                block,
                range(min(index * local, x.shape[d]), min((index + 1) * local, x.shape[d])),
                axis=d,
            )
        blocks.append(block)
    return blocks


def _whole(layout: Layout) -> Layout:
    return Layout(((),) * len(layout.dims))


@pytest.mark.parametrize("seed", range(40))
def test_every_element_arrives(seed: int) -> None:
    rng = random.Random(seed)
    mesh = MeshShape(rng.choice(MESHES))
    rank = rng.randint(1, 3)
    shape = tuple(rng.choice([1, 3, 5, 7, 8, 12, 16]) for _ in range(rank))
    axes = list(mesh.names)
    partial = tuple((a, "add") for a in axes if rng.random() < 0.3)
    free = [a for a in axes if (a, "add") not in partial]
    src = Layout(draw_dims(rng, free, rank), partial)
    kept = tuple(p for p in partial if rng.random() < 0.3)
    dst = Layout(draw_dims(rng, [a for a in axes if (a, "add") not in kept], rank), kept)
    x = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
    got = run(mesh, src, dst, x)
    for device, want in enumerate(expected(x, src, dst, mesh)):
        block = got[device][tuple(slice(0, n) for n in want.shape)]
        np.testing.assert_allclose(block, want, err_msg=f"{src} -> {dst} of {shape} on {mesh}")


@pytest.mark.parametrize("dims, partial", [
    ((("x",), ()), ("x",)),  # each has its part
    (((), ("y", "x")), ("x",)),
    ((("x",), ("y",)), ("x", "y")),
    (((), ("y",)), ("x",)),  # one has it all
    (((), ()), ("x", "y")),
])  # fmt: skip
def test_a_whole_value_becomes_a_sum_without_a_collective(dims: tuple, partial: tuple) -> None:
    mesh, shape = MeshShape((("x", 2), ("y", 4))), (8, 16)
    kept = tuple(tuple(a for a in dim if a not in partial) for dim in dims)
    src, dst = Layout(dims), Layout(kept, tuple((a, "add") for a in partial))
    found = plan(src, dst, shape, 4, mesh)
    assert found.bytes == 0 and {s.kind for s in found.steps} <= {"addend", "spread"}
    x = np.arange(128, dtype=np.float32).reshape(shape)
    got = run(mesh, src, dst, x).reshape(2, 4, *dst.local_shape(shape, mesh))
    over = tuple(mesh.names.index(a) for a in partial)
    blocks = np.asarray(expected(x, _whole(src), Layout(kept), mesh))
    want = blocks.reshape(got.shape).max(over)
    np.testing.assert_array_equal(got.sum(over), want)


def test_moving_an_axis_to_another_dim_is_one_all_to_all() -> None:
    mesh = MeshShape((("x", 8),))
    found = plan(Layout((("x",), ())), Layout(((), ("x",))), (64, 64), 4, mesh)
    assert [s.kind for s in found.steps] == ["all_to_all"]
    assert found.bytes == 64 * 64 * 4 / 8 * 7 / 8


def test_partial_into_sharded_is_one_reduce_scatter() -> None:
    mesh = MeshShape((("x", 8),))
    found = plan(Layout(((), ()), (("x", "add"),)), Layout((("x",), ())), (64, 64), 4, mesh)
    assert [s.kind for s in found.steps] == ["reduce_scatter"]
    assert found.bytes == 64 * 64 * 4 * 7 / 8


def test_swapping_axes_never_replicates() -> None:
    mesh = MeshShape((("x", 2), ("y", 4)))
    found = plan(Layout((("x",), ("y",))), Layout((("y",), ("x",))), (64, 64), 4, mesh)
    assert found.bytes < 64 * 64 * 4 / 8 * 4
    assert "all_gather" not in [s.kind for s in found.steps]


@pytest.mark.parametrize("sizes", [(2, 4), (4, 2)])
@pytest.mark.parametrize("shape", [(64, 64), (64, 24, 3), (9, 64), (7, 5)])
def test_swapping_axes_of_unequal_size_moves_a_part_of_one(sizes: tuple, shape: tuple) -> None:
    """Half of each shard goes over, then each moves once; what does not divide goes otherwise."""
    mesh = MeshShape((("x", sizes[0]), ("y", sizes[1])))
    rest = ((),) * (len(shape) - 2)
    src, dst = Layout((("x",), ("y",), *rest)), Layout((("y",), ("x",), *rest))
    found = plan(src, dst, shape, 4, mesh)
    if shape[0] % 8 == 0 and shape[1] % 8 == 0:
        block = np.prod(shape) * 4 / 8
        assert [s.kind for s in found.steps] == ["all_to_all", "permute"]
        assert found.bytes == block / 2 + block
    x = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
    got = run(mesh, src, dst, x)
    for device, want in enumerate(expected(x, src, dst, mesh)):
        block = got[device][tuple(slice(0, n) for n in want.shape)]
        np.testing.assert_array_equal(block, want)


def test_renaming_an_axis_of_the_same_size_is_one_permute() -> None:
    mesh = MeshShape((("x", 2), ("y", 2), ("z", 2)))
    found = plan(Layout((("x",), ())), Layout((("y",), ())), (64, 64), 4, mesh)
    assert [s.kind for s in found.steps] == ["permute"]


@pytest.mark.parametrize("sizes", [(2, 4), (4, 2)])
@pytest.mark.parametrize("n", [64, 60, 7])
def test_other_axes_of_other_sizes_go_by_small_shards(sizes: tuple[int, int], n: int) -> None:
    """Cut finer, exchanged, and gathered as far as needed: less than to gather and to cut."""
    mesh = MeshShape((("x", sizes[0]), ("y", sizes[1])))
    src, dst = Layout((("x",),)), Layout((("y",),))
    found = plan(src, dst, (n,), 4, mesh)
    if n == 64:
        assert [s.kind for s in found.steps] == ["slice", "permute", "all_gather"]
        assert found.bytes == n * 4 / 8 + n * 4 / sizes[1] * (sizes[0] - 1) / sizes[0]
    x = np.arange(1, n + 1, dtype=np.float32)
    got = run(mesh, src, dst, x)
    for device, want in enumerate(expected(x, src, dst, mesh)):
        np.testing.assert_array_equal(got[device][: len(want)], want)


@pytest.mark.parametrize("shape", [(7, 8), (8, 7), (7, 5), (5, 16)])
def test_an_uneven_dim_is_trimmed_and_padded_by_all_to_all(shape: tuple[int, int]) -> None:
    mesh = MeshShape((("x", 2), ("y", 4)))
    src, dst = Layout((("y",), ())), Layout(((), ("y",)))
    assert [s.kind for s in plan(src, dst, shape, 4, mesh).steps] == ["all_to_all"]
    x = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
    got = run(mesh, src, dst, x)
    for device, want in enumerate(expected(x, src, dst, mesh)):
        block = got[device][tuple(slice(0, n) for n in want.shape)]
        np.testing.assert_array_equal(block, want)
