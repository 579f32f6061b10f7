"""What the TPU compiler adds to memory or leaves out, each in a program small enough to count."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AbstractMesh

import spmd
from sharding import P, shard
from spmd.chips import CHIPS
from spmd.estimate import liveness
from spmd.estimate.fusion import Compiler, held
from spmd.estimate.latency import delayed
from spmd.estimate.tiles import activation_bytes, tiled_bytes
from spmd.estimate.vmem import on_chip
from spmd.estimate.work import lines
from spmd.partition.plan import Compute
from spmd.stages import Partitioned

F32, BF16 = jnp.float32, jnp.bfloat16
NHWC = ("NHWC", "HWIO", "NHWC")
MIB = 2**20
V3, V5E = (Compiler.of(CHIPS[name]) for name in ("v3", "v5e"))
V5P = Compiler.of(dataclasses.replace(CHIPS["v5p"], vmem_bytes=0.0))  # all temporaries count


def shape(*dims: int, dtype: Any = F32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def partition(f: Any, *args: Any, mesh: Any = None, specs: Any = None) -> Partitioned:
    mesh = mesh or {"x": 1}
    abstract = AbstractMesh(tuple(mesh.values()), tuple(mesh))
    return spmd.jit(f, mesh=abstract, in_shardings=specs).trace(*args).propagate().partition()


def peak(stage: Partitioned, compiler: Compiler = V3) -> float:
    return liveness.peak_bytes(stage.plan, (), compiler) / MIB


def conv(x: Any, k: Any) -> Any:
    return lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=NHWC)


# --- tiles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims, itemsize, size", [
    ((256, 128), 4, 256 * 128 * 4),
    ((2048, 16), 2, 2048 * 16 * 2),  # 2,048 columns of 16 rows
    ((4, 128, 128, 3), 2, 4 * 128 * 128 * 3 * 2),  # images come with their rows and columns minor
    ((2, 300), 4, 2 * 384 * 4),  # a tile of 2 rows; columns are padded
    ((1, 300), 2, 2 * 384 * 2),  # two rows of bfloat16 share a register
    ((5, 128), 4, 8 * 128 * 4),
    ((12, 128), 4, 16 * 128 * 4),
    ((7,), 4, 28),
    ((0, 5), 4, 0),
])  # fmt: skip
def test_arrays_are_padded_to_tiles_by_their_best_layout(
    dims: tuple[int, ...], itemsize: int, size: int
) -> None:
    assert tiled_bytes(dims, itemsize) == size


@pytest.mark.parametrize("dims, itemsize, padding", [
    ((2, 64, 64, 128), 2, 2),  # the least tile of convolutions has 4 rows of bfloat16
    ((4, 64, 64, 128), 2, 1),
    ((2, 64, 64, 128), 4, 1),
    ((16, 64, 64, 64), 2, 2),  # features are columns
    ((128, 32, 32, 64), 2, 1),  # where batch is, features are rows
    ((1, 64, 64, 128), 2, 1),  # a batch of one leaves its place to a spatial dim
])  # fmt: skip
def test_activations_of_convolutions_have_batch_and_features_in_tiles(
    dims: tuple[int, ...], itemsize: int, padding: int
) -> None:
    b, h, w, c = dims
    assert activation_bytes(dims, itemsize, (0, 3)) == b * h * w * c * itemsize * padding


def test_what_convolutions_read_and_write_is_padded_and_arguments_are_not() -> None:
    args = shape(2, 64, 64, 128, dtype=BF16), shape(3, 3, 128, 128, dtype=BF16)
    stage = partition(lambda x, k: conv(conv(x, k), k), *args)
    kernel = 9 * 128 * 128 * 2 / MIB
    assert peak(stage) == 2 + 2 * 2 + 2 * 2 + kernel  # x, and two results of twice their size
    assert peak(stage, Compiler()) == 2 + 2 + 2 + kernel


def test_few_features_of_a_convolution_of_a_single_element_are_padded_too() -> None:
    args = shape(8, 64, 64, 128), shape(1, 1, 128, 8)
    # 8 features are rows of a tile, of which a batch of 8 has 128 columns
    assert peak(partition(conv, *args)) == 16 + 128 * 8 * 4 / MIB + 16
    assert peak(partition(conv, *args), Compiler()) == 16 + 128 * 8 * 4 / MIB + 1


# --- what is held -------------------------------------------------------------------------------


def test_convolutions_take_elementwise_operands_in_unless_they_need_a_halo() -> None:
    args = shape(8, 64, 64, 128), shape(3, 3, 128, 128)
    mesh, kernel = {"x": 2}, 9 * 128 * 128 * 4 / MIB

    def f(x, k):
        made = conv(x, k)
        return made, conv(x + jnp.maximum(made, 0), k)

    batch = partition(f, *args, mesh=mesh, specs=(P("x"), P()))
    assert peak(batch) == 3 * 8 + kernel  # x and the results
    rows = partition(f, *args, mesh=mesh, specs=(P(None, "x"), P()))
    assert peak(rows) == 4 * 8 + kernel  # and what the second convolution reads


def test_a_product_is_not_computed_inside_of_a_convolution_that_needs_a_halo() -> None:
    args = shape(8, 64, 64, 16), shape(16, 16), shape(3, 3, 16, 16)
    specs = (P(None, "x"), P(), P())
    stage = partition(lambda x, w, k: conv(x @ w, k), *args, mesh={"x": 2}, specs=specs)
    found = lines(stage.plan)
    assert len(held(stage.plan, found, V3).writes[0]) == 1


def test_an_argument_is_copied_to_the_layout_in_which_a_halo_is_cut() -> None:
    args = shape(8, 64, 64, 128), shape(3, 3, 128, 128)
    kernel = 9 * 128 * 128 * 4 / MIB
    rows = partition(conv, *args, mesh={"x": 2}, specs=(P(None, "x"), P()))
    assert peak(rows) == 3 * 8 + kernel  # x, its copy, and the result
    assert peak(rows, Compiler()) == 2 * 8 + kernel
    batch = partition(conv, *args, mesh={"x": 2}, specs=(P("x"), P()))
    assert peak(batch) == 2 * 8 + kernel


def _read_often(count: int) -> Any:
    def f(x, y, z, w):
        made = jnp.maximum(x, y) + z
        return [made @ (w + i) for i in range(count)]

    return f


def test_what_is_made_of_much_and_read_often_is_written_once() -> None:
    args = (shape(512, 512),) * 4
    # Three sources read twice are 6 MiB of traffic, less than 3 read, one written, one read twice.
    assert peak(partition(_read_often(2), *args)) == 4 + 2
    # Read four times they are 12 MiB, against 3 + 1 + 4.
    assert peak(partition(_read_often(4), *args)) == 4 + 4 + 1


def test_exponentials_are_computed_again() -> None:
    def f(x):  # the scores are needed to the end
        scores = x @ x
        return scores, jax.nn.softmax(scores) @ x

    assert peak(partition(f, shape(512, 512))) == pytest.approx(3, abs=0.01)


def test_what_a_sum_and_a_product_read_of_exponentials_is_written_by_the_pass_of_the_sum() -> None:
    def f(x, y, sums):
        scores = x @ y
        share = jnp.exp(scores) / sums
        narrow = share.astype(BF16)
        changes = y @ x
        return (share * changes).sum(-1), narrow @ x.astype(BF16), scores

    x = shape(512, 512)
    stage = partition(f, x, x, shape(512, 1))
    found = lines(stage.plan)
    memory = liveness.profile(stage.plan, found, (), held(stage.plan, found, V3), V3)
    (narrow,) = [b for b in memory.buffers if b.bytes == MIB / 2 and not b.result]
    written = found[narrow.start].op
    assert written is not None and written.primitive is lax.reduce_sum_p
    # x, y, the scores, the changes, and the shares in bfloat16
    assert memory.peak / MIB == pytest.approx(4.5, abs=0.01)

    def softmax(x, y):  # the sum is part of the shares
        return jax.nn.softmax(x @ y).astype(BF16) @ x.astype(BF16)

    assert peak(partition(softmax, x, x)) == pytest.approx(3.5, abs=0.01)


def test_an_annotated_value_is_held_for_readers_that_do_not_take_it_in() -> None:
    x = shape(512, 512)
    for made in (lambda x: x * 2, lambda x: shard(x * 2, P())):
        stage = partition(lambda x, y, made=made: lax.sort(made(x)) @ y, x, x)
        found = lines(stage.plan)
        writes = held(stage.plan, found, V3).writes
        assert sum(map(len, writes)) == 3  # the operand of the sort, and two results


def test_exponentials_that_one_reader_needs_whole_are_held_from_their_line_on() -> None:
    def f(x, y):
        share = jnp.exp(x)
        narrow = share.astype(BF16)
        first = lax.sort(narrow)
        return first, (share * y).sum(-1), narrow @ narrow

    x = shape(512, 512)
    stage = partition(f, x, x)
    found = lines(stage.plan)
    assert not held(stage.plan, found, V3).sums


def test_masks_of_activations_are_bits_where_a_spatial_dim_is_as_long_as_a_word() -> None:
    def loss(x, k):
        z = conv(x, k)
        return jnp.sum(jnp.square(jnp.maximum(z, 0) * 2 + conv(jnp.maximum(z, 0), k)))

    def bools(side: int) -> list[float]:
        args = shape(8, side, 64, 128), shape(3, 3, 128, 128)
        stage = partition(jax.grad(loss, (0, 1)), *args)
        found = liveness.ordered(stage.plan, (), V3)
        return [b.bytes for b in found.memory.buffers if b.key.value.dtype == jnp.bool_]

    for side in (8, 16, 32):
        assert 8 * side * 64 * 128 // 8 in bools(side)
    assert bools(64) == []


# --- the core's own memory ----------------------------------------------------------------------


def test_temporaries_that_fit_the_cores_own_memory_take_none_of_the_devices() -> None:
    small = partition(lambda x: (x @ x) @ x, shape(2048, 2048))
    assert (peak(small, V3), peak(small, V5E)) == (3 * 16, 2 * 16)
    large = partition(lambda x: (x @ x) @ x, shape(8192, 8192))
    assert peak(large, V3) == peak(large, V5E) == 3 * 256


def test_what_is_moved_most_is_kept_on_the_chip_while_there_is_room() -> None:
    key = next(iter(partition(lambda x: x, shape(2)).plan.body.outputs))

    def kept(capacity: int, moved: list[int], *lives: tuple[int, int, int]) -> set[int]:
        buffers = [liveness.Buffer(key, *life) for life in lives]
        return set(on_chip(buffers, moved, 10, capacity))

    assert kept(10, [12, 18], (6, 0, 9), (6, 3, 4)) == {1}
    assert kept(10, [18, 12], (6, 0, 9), (6, 3, 4)) == {0}
    assert kept(10, [12, 18], (6, 0, 3), (6, 3, 6)) == {0, 1}  # one after the other
    assert kept(12, [12, 18], (6, 0, 9), (6, 3, 4)) == {0, 1}
    assert kept(5, [12], (6, 0, 1)) == set()


def test_of_temporaries_that_do_not_fit_together_those_that_are_read_most_are_on_the_chip() -> None:
    def f(x, y):
        once, often = lax.sort(y), lax.sort(x)
        made = [lax.sort(often, num_keys=1, dimension=d) for d in (0, 1)]
        return lax.sort(once, dimension=0), *made

    x = shape(4096, 4096)  # 64 MiB, of which v5e keeps one
    stage = partition(f, x, x)
    found = lines(stage.plan)
    memory = liveness.profile(stage.plan, found, (), held(stage.plan, found, V5E), V5E)
    outside = [b for b in memory.buffers if b.argument < 0 and not b.result]
    assert [(b.bytes / MIB, b.key.value is found[0].writes[0].value) for b in outside] == [
        (64, True)
    ]


def test_what_sparsecores_reduce_is_not_on_the_chip() -> None:
    def f(x, y):
        return (jnp.sort(x.T @ y) @ x.T).sum()

    stage = partition(f, shape(64, 2048), shape(64, 2048), mesh={"x": 4}, specs=(P("x"), P("x")))
    assert [c.kind for c in stage.collectives][0] == "all_reduce"
    found = lines(stage.plan)

    def outside(name: str) -> list[Any]:
        compiler = Compiler.of(CHIPS[name])
        kept = held(stage.plan, found, compiler)
        buffers = liveness.profile(stage.plan, found, (), kept, compiler).buffers
        return [b.key.layout.partial != () for b in buffers if b.bytes == 16 * MIB]

    assert "permute" in CHIPS["v5p"].overlaps - CHIPS["v5p"].offloaded
    assert sorted(outside("v5p")) == [False, True]  # both ends of the reduction; not what is sorted
    assert outside("v5e") == []


# --- beside collectives -------------------------------------------------------------------------


def _gradients(x: Any, y: Any, w: Any, v: Any) -> Any:
    return w - (x.T @ x), v - (y.T @ y)


MESH, SPECS = {"x": 4}, (P("x"), P("x"), P(), P())


def test_operand_and_result_of_a_reduction_beside_computation_are_held_while_others_run() -> None:
    args = (shape(64, 2048), shape(64, 2048), shape(2048, 2048), shape(2048, 2048))
    stage = partition(_gradients, *args, mesh=MESH, specs=SPECS)
    inputs, matrix = 2 * 16 * 2048 * 4 / MIB, 16
    # v3 waits for every reduction: a result takes its place, and one more product is there
    assert peak(stage) == 2 * matrix + inputs + 2 * matrix
    # w, v, and both ends of two reductions
    assert peak(stage, V5P) == 2 * matrix + inputs + 4 * matrix


def test_an_argument_that_meets_a_turned_reduction_is_copied() -> None:
    def f(x, y, w):
        return w - (x.T @ y).T

    args = shape(64, 2048), shape(64, 4096), shape(4096, 2048)
    stage = partition(f, *args, mesh={"x": 4}, specs=(P("x"), P("x"), P()))
    inputs, matrix = 16 * (2048 + 4096) * 4 / MIB, 32
    assert peak(stage, V5P) == inputs + matrix + 2 * matrix + matrix
    donated = liveness.peak_bytes(stage.plan, (False, False, True), V5P) / MIB
    assert donated == inputs + matrix + 2 * matrix + matrix
    straight = partition(lambda x, y, w: w - (x.T @ y), *args[:2], shape(2048, 4096),
                         mesh={"x": 4}, specs=(P("x"), P("x"), P()))  # fmt: skip
    assert peak(straight, V5P) == inputs + matrix + 2 * matrix


def test_a_donated_argument_is_turned_in_its_own_place_where_it_fits_the_chip() -> None:
    def f(x, y, w, v):
        return w - (x.T @ y).T, v - (x.T @ (y + 1)).T

    args = shape(64, 2048), shape(64, 4096), shape(4096, 2048), shape(4096, 2048)
    stage = partition(f, *args, mesh={"x": 4}, specs=(P("x"), P("x"), P(), P()))
    inputs, matrix = 16 * (2048 + 4096) * 4 / MIB, 32
    chip = Compiler.of(CHIPS["v5p"])  # keeps 48 MiB

    def found(*donated: bool) -> float:
        return liveness.peak_bytes(stage.plan, donated, chip) / MIB

    # w, v, and both ends of two reductions
    assert found(False, False, True, True) == pytest.approx(inputs + 6 * matrix)
    # and two copies, of which the chip keeps one
    assert found() == pytest.approx(inputs + 7 * matrix)


def test_what_reads_a_transfer_waits_while_there_is_other_work() -> None:
    def f(x, a):
        return (x.T @ x) * 2, a @ a @ a

    stage = partition(f, shape(64, 2048), shape(1024, 1024), mesh={"x": 4}, specs=(P("x"), P()))
    found = lines(stage.plan)
    kept = held(stage.plan, found, V5P)

    def order(compiler: Compiler) -> list[str]:
        return [line.op.primitive.name for line in delayed(found, kept, compiler) if line.op]

    assert order(V5P)[-1] == "mul"
    assert order(V3)[-1] != "mul"


def test_constants_do_not_wait_for_the_transfer_that_their_reader_waits_for() -> None:
    def f(x, a):
        reduced = x.T @ x
        return lax.dynamic_update_slice(jnp.zeros((4096, 2048)), reduced, (5, 0)), a @ a @ a

    stage = partition(f, shape(64, 2048), shape(1024, 1024), mesh={"x": 4}, specs=(P("x"), P()))
    found = lines(stage.plan)
    after = delayed(found, held(stage.plan, found, V5P), V5P)
    instructions = (line.instruction for line in after)
    names = [found.op.primitive for found in instructions if isinstance(found, Compute)]
    place = names.index(lax.dynamic_update_slice_p)
    assert names[place - 1] is lax.broadcast_in_dim_p
    assert names[-1] is lax.dynamic_update_slice_p
