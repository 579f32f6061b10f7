"""Pass `split_scatters`: columns of which every device gets an odd number of tiles, by rows."""

import dataclasses
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spmd
from sharding import P
from sharding.mesh import MeshShape
from spmd.chips import CHIPS
from spmd.partition import scatters
from spmd.partition.plan import Move, Parts, rewritten
from spmd.partition.scatters import by_rows
from spmd.partition.verify import verify
from tests.oracle import check, make_mesh

RNG = np.random.default_rng(0)
INNER = 1024  # of a product, long: to gather its operands is no way
CHIP = dataclasses.replace(CHIPS["cpu"], family="tpu", scatters=True, link_bandwidth=1.0)
BY_ROWS = [("reduce_scatter", -2), ("all_to_all", -2)]


@pytest.fixture
def tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated devices are taken for a TPU's, whose compiler keeps scatters among all."""
    monkeypatch.setitem(CHIPS, "cpu", CHIP)


def steps(stage: spmd.Partitioned) -> list[tuple[str, int]]:
    """What a plan's collectives are, and the dims that they act on, from the last."""
    moves = [one for one, _ in stage.plan.body.walk() if isinstance(one, Move)]
    return [(s.kind, s.dim - m.value.rank) for m in moves for s in m.plan.steps]


def planned(
    shape: tuple[int, ...], columns: int, dtype: Any, off: Any = (), **mesh: int
) -> spmd.Partitioned:
    """A product [*shape, columns] of which every device has an addend, its columns scattered."""
    x = jax.ShapeDtypeStruct((*shape, INNER), dtype)
    w = jax.ShapeDtypeStruct((INNER, columns), dtype)
    lead = (None,) * len(shape)
    specs = (P(*lead, "x"), P("x"))
    f = spmd.jit(jnp.matmul, mesh=make_mesh(**mesh or {"x": 4}), in_shardings=specs,
                 out_shardings=P(*lead, "x"), disable_passes=off)  # fmt: skip
    return f.trace(x, w).propagate().partition()


@pytest.mark.parametrize("shape, columns, dtype, want", [
    ((64,), 512, jnp.bfloat16, BY_ROWS),
    ((64,), 1536, jnp.float16, BY_ROWS),
    ((2, 64), 512, jnp.bfloat16, BY_ROWS),
    ((64, 64), 512, jnp.bfloat16, BY_ROWS),
    ((64, 2), 512, jnp.bfloat16, [("reduce_scatter", -3), ("all_to_all", -3)]),
    ((64,), 1024, jnp.bfloat16, [("reduce_scatter", -1)]),  # pairs of tiles
    ((64,), 256, jnp.bfloat16, [("reduce_scatter", -1)]),  # half a tile
    ((64,), 768, jnp.bfloat16, [("reduce_scatter", -1)]),
    ((64,), 512, jnp.float32, [("reduce_scatter", -1)]),
    ((32,), 512, jnp.bfloat16, [("reduce_scatter", -1)]),  # half a pair of tiles of rows
])  # fmt: skip
def test_odd_numbers_of_tiles_go_by_rows(
    tpu: None, shape: tuple[int, ...], columns: int, dtype: Any, want: list[tuple[str, int]]
) -> None:
    stage = planned(shape, columns, dtype)
    verify(stage.plan)
    assert steps(stage) == want
    whole = planned(shape, columns, dtype, ("split_scatters",))
    assert steps(whole) == [("reduce_scatter", -1)]
    # of the parts that are exchanged all but its own leave a device
    size = int(np.prod(shape)) * columns * jnp.dtype(dtype).itemsize
    extra = size / 4 * 3 / 4 if len(want) > 1 else 0
    assert stage.wire_bytes == whole.wire_bytes + extra == size * 3 / 4 + extra


def test_padded_tiles_are_none() -> None:
    mesh = MeshShape((("x", 4),))
    found = [scatters._odd_tiles(size, ("x",), mesh) for size in (511, 512, 513, 514)]
    assert found == [False, True, False, False]


def test_scatters_in_two_parts_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among all devices of a chip whose compiler keeps none: parts and an exchange take longer."""
    monkeypatch.setitem(CHIPS, "cpu", dataclasses.replace(CHIP, scatters=False))
    assert steps(planned((64,), 512, jnp.bfloat16)) == [("reduce_scatter", -1)]
    assert steps(planned((64,), 512, jnp.bfloat16, x=4, y=2)) == BY_ROWS


@pytest.mark.parametrize("microseconds, want", [(33, BY_ROWS), (31, [("reduce_scatter", -1)])])
def test_what_is_sent_in_no_time_stays(
    microseconds: float, want: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exchange puts in order what it sends, 8 us for each of four devices."""
    sent = 64 * 512 * 2 * 3 / 4
    chip = dataclasses.replace(CHIP, link_bandwidth=sent / 2 / (microseconds * 1e-6))
    monkeypatch.setitem(CHIPS, "cpu", chip)
    assert steps(planned((64,), 512, jnp.bfloat16)) == want


def test_other_compilers_scatter_what_they_are_told() -> None:
    assert steps(planned((64,), 512, jnp.bfloat16)) == [("reduce_scatter", -1)]


@pytest.mark.parametrize("shape", [(256,), (2, 128), (128, 2)])
@pytest.mark.parametrize("mesh, axes", [
    ({"x": 4}, ("x",)), ({"x": 8}, ("x",)), ({"x": 2, "y": 2}, ("x", "y")),
    ({"x": 2, "y": 4}, ("y",)),
])  # fmt: skip
def test_values_are_those_of_the_unsharded_program(
    tpu: None, shape: tuple[int, ...], mesh: Any, axes: tuple[str, ...]
) -> None:
    devices, lead = int(np.prod([mesh[a] for a in axes])), (None,) * len(shape)
    # whole numbers: all sums are exact
    x = RNG.integers(-1, 2, (*shape, INNER)).astype(jnp.bfloat16)
    w = RNG.integers(-1, 2, (INNER, 3 * 128 * devices)).astype(jnp.bfloat16)
    specs, out = (P(*lead, axes), P(axes)), P(*lead, axes)
    stage = check(jnp.matmul, (x, w), make_mesh(**mesh), specs, out)
    assert "all_to_all" in {kind for kind, _ in steps(stage)}


def test_rows_that_are_sharded_already(tpu: None) -> None:
    """In a loop, and a value that its reader wants on both axes."""
    mesh, spec = make_mesh(x=2, y=4), P("x", "y")
    x = RNG.integers(-1, 2, (128, INNER)).astype(jnp.bfloat16)
    w = RNG.integers(-1, 2, (3, INNER, 512)).astype(jnp.bfloat16)

    def run(x: Any, w: Any) -> Any:
        return jax.lax.scan(lambda c, u: (c, x @ u), None, w)[1]

    stage = check(run, (x, w), mesh, (P("x", "y"), P(None, "y")), P(None, *spec))
    assert steps(stage) == BY_ROWS


@pytest.mark.parametrize("shape, dim, want", [
    ((64,), 0, [("reduce_scatter", -1)]), ((64,), 1, [("reduce_scatter", -1)]),
    ((2, 64), 0, BY_ROWS), ((2, 64), 1, [("reduce_scatter", -1)]),
])  # fmt: skip
def test_a_dim_that_lies_in_parts_is_not_scattered(
    shape: tuple[int, ...], dim: int, want: list[tuple[str, int]]
) -> None:
    """Nor columns, of which each part has less."""
    stage = planned(shape, 512, jnp.bfloat16)

    def in_parts(one: Any, _: Any) -> Any:
        if not isinstance(one, Move):
            return one
        return dataclasses.replace(one, parts=Parts(2, (dim,), (dim,)))

    plan = by_rows(rewritten(stage.plan, in_parts), CHIP)
    assert steps(dataclasses.replace(stage, plan=plan)) == want


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='needs the TPU compiler: pip install "spmd-compiler[tpu]"',
)
@pytest.mark.parametrize("chip", ["v3:2x2", "v5e:2x4", "v5p:2x2x2"])
def test_the_compiler_for_tpus_makes_no_all_reduce_of_rows(chip: str) -> None:
    x = jax.ShapeDtypeStruct((4096, 8192), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((8192, 640 * 4), jnp.bfloat16)

    def schedule(*off: str) -> Any:
        return spmd.aot(
            jnp.matmul, x, w, mesh={"data": 2, "tensor": 4}, topology=chip, disable_passes=off,
            in_shardings=(P(None, "tensor"), P("tensor")), out_shardings=P(None, "tensor"),
        ).schedule  # fmt: skip

    rows, columns = schedule(), schedule("split_scatters")
    assert [t.kind for t in columns.transfers] == ["all_reduce"]
    assert {"reduce_scatter", "all_to_all"} <= {t.kind for t in rows.transfers} <= {
        "reduce_scatter", "all_to_all", "permute"  # what a ring of both directions has left
    }  # fmt: skip
    assert rows.exposed < 0.8 * columns.exposed
