"""Pass `turned_scatters`: dims whose shards are an odd number of tiles are scattered in front."""

import dataclasses
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spmd
from sharding import P
from spmd.chips import CHIPS
from spmd.partition.plan import Move
from tests.oracle import check, make_mesh

RNG = np.random.default_rng(0)
INNER = 512  # of a product, long: to gather its operands is no way


@pytest.fixture
def tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated devices are taken for a TPU's, whose compiler is told nothing."""
    monkeypatch.setitem(CHIPS, "cpu", dataclasses.replace(CHIPS["cpu"], family="tpu"))


def turned(stage: spmd.Partitioned) -> list[bool]:
    """Of every reduce-scatter of a plan, whether it is turned."""
    moves = [one for one, _ in stage.plan.body.walk() if isinstance(one, Move)]
    return [s.turned for m in moves for s in m.plan.steps if s.kind == "reduce_scatter"]


def planned(shape: tuple[int, ...], columns: int, dtype: Any, spec: Any, off: Any = ()) -> Any:
    """A product [*shape, columns] of which each of four devices has an addend."""
    x = jax.ShapeDtypeStruct((*shape, INNER), dtype)
    w = jax.ShapeDtypeStruct((INNER, columns), dtype)
    ins = (P(*(None,) * len(shape), "x"), P("x"))
    f = spmd.jit(jnp.matmul, mesh=make_mesh(x=4), in_shardings=ins, out_shardings=spec,
                 disable_passes=off)  # fmt: skip
    return f.trace(x, w).propagate().partition()


@pytest.mark.parametrize("columns, dtype, want", [
    (512, jnp.bfloat16, True), (1536, jnp.bfloat16, True), (512, jnp.float16, True),
    (1024, jnp.bfloat16, False),  # pairs of tiles
    (256, jnp.bfloat16, False),  # half a tile
    (768, jnp.bfloat16, False),
    (512, jnp.float32, False),
])  # fmt: skip
@pytest.mark.parametrize("shape", [(8,), (2, 8)])
def test_odd_numbers_of_tiles_are_turned(
    tpu: None, shape: tuple[int, ...], columns: int, dtype: Any, want: bool
) -> None:
    spec = P(*(None,) * len(shape), "x")
    assert turned(planned(shape, columns, dtype, spec)) == [want]
    assert turned(planned(shape, columns, dtype, spec, ("turned_scatters",))) == [False]


def test_other_dims_stay(tpu: None) -> None:
    assert turned(planned((128,), 512, jnp.bfloat16, P("x"))) == [False]
    assert turned(planned((2, 128), 512, jnp.bfloat16, P(None, "x"))) == [False]


def test_other_compilers_scatter_what_they_are_told() -> None:
    assert turned(planned((8,), 512, jnp.bfloat16, P(None, "x"))) == [False]


@pytest.mark.parametrize("shape", [(8,), (2, 8)])
@pytest.mark.parametrize("mesh, axes", [({"x": 4}, ("x",)), ({"x": 2, "y": 2}, ("x", "y")),
                                        ({"x": 8}, ("x",))])  # fmt: skip
def test_values_are_those_of_the_unsharded_program(
    tpu: None, shape: tuple[int, ...], mesh: Any, axes: tuple[str, ...]
) -> None:
    """Among all devices a scatter goes in two parts, each of them turned."""
    devices, lead = int(np.prod([*mesh.values()])), (None,) * len(shape)
    # whole numbers: all sums are exact
    x = RNG.integers(-1, 2, (*shape, INNER)).astype(jnp.bfloat16)
    w = RNG.integers(-1, 2, (INNER, 3 * 128 * devices)).astype(jnp.bfloat16)
    specs, out = (P(*lead, axes), P(axes)), P(*lead, axes)

    stage = check(jnp.matmul, (x, w), make_mesh(**mesh), specs, out)
    assert any(turned(stage))


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='needs the TPU compiler: pip install "spmd-compiler[tpu]"',
)
@pytest.mark.parametrize("chip", ["v3:2x2", "v5e:2x4", "v5p:2x2x2"])
def test_the_compiler_for_tpus_keeps_turned_scatters(chip: str) -> None:
    """Of a projection whose weights lie along `tensor`."""
    x = jax.ShapeDtypeStruct((4096, 8192), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((8192, 640 * 4), jnp.bfloat16)

    def schedule(*off: str) -> Any:
        return spmd.aot(
            jnp.matmul, x, w, mesh={"data": 2, "tensor": 4}, topology=chip, disable_passes=off,
            in_shardings=(P(None, "tensor"), P("tensor")), out_shardings=P(None, "tensor"),
        ).schedule  # fmt: skip

    kept, made = schedule(), schedule("turned_scatters")
    assert [t.kind for t in made.transfers] == ["all_reduce"]
    assert "all_reduce" not in {t.kind for t in kept.transfers}
    assert kept.seconds < 0.97 * made.seconds
