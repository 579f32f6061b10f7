"""What only a GPU shows: its kernels under our rules, its memory, and steps as fast as `jax.jit`'s.

    python -m pytest tests/device --accelerator

One GPU is enough: the mesh then has axes of size 1, and the partitioned program must be the
unsharded one in all but its trace. With more, batch and heads are really sharded.
"""

import functools
import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sharding
import spmd
from benchmarks.suite import registry
from benchmarks.suite.case import RUNS
from benchmarks.suite.measure import peak_bytes
from benchmarks.suite.targets import on_one
from spmd.reporting.hlo import collectives_in_hlo
from tests.oracle import check, make_mesh

BATCH, LENGTH, HEADS, DIM = 4, 256, 8, 64
LENGTHS = dict(query_seq_lengths=np.array([64, 256, 100, 1], np.int32),
               key_value_seq_lengths=np.array([256, 30, 99, 128], np.int32))  # fmt: skip
ALONE = ("uneven_heads", "experts", "graph", "cnn", "lstm")  # programs of the suite


@pytest.fixture(autouse=True)
def on_gpu() -> None:
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")


def mesh() -> Mesh:
    count = 4 if len(jax.devices()) >= 4 else 1
    return make_mesh(data=2 if count == 4 else 1, heads=2 if count == 4 else 1)


def draw(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(jnp.bfloat16)


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize("options", [
    {}, dict(is_causal=True), LENGTHS, dict(is_causal=True, local_window_size=(31, 0)),
], ids=["plain", "causal", "lengths", "window"])  # fmt: skip
def test_attention_of_cudnn(options: dict, kv_heads: int) -> None:
    def both(q: Any, k: Any, v: Any) -> Any:
        attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn", **options)
        out, back = jax.vjp(attend, q, k, v)
        return out.astype(jnp.float32), [g.astype(jnp.float32) for g in back(jnp.cos(out))]

    rows = (P("data", None, "heads"),) * 3
    args = [draw(BATCH, LENGTH, heads, DIM) for heads in (HEADS, kv_heads, kv_heads)]
    partitioned = check(both, args, mesh(), rows, tolerance=2e-2)
    assert "custom_partitioning" not in str(partitioned)
    compiled = spmd.jit(both, mesh=mesh(), in_shardings=rows).lower(*args).compile()
    assert "__cudnn$fmha" in compiled.as_text()


def test_a_kernel_of_pallas_on_the_gpu_itself() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import attention
    mha = functools.partial(attention.mha, segment_ids=None, causal=True)
    fun = sharding.rule("b q h d, b k h d, b k h d -> b q h d", fixed="q k d")(mha)
    args = [draw(BATCH, LENGTH, HEADS, DIM) for _ in range(3)]
    check(fun, args, mesh(), (P("data", None, "heads"),) * 3, tolerance=2e-2)


def test_given_memory_is_taken_over() -> None:
    home = NamedSharding(mesh(), P("data"))
    step = spmd.jit(lambda x: x + 1, mesh=mesh(), in_shardings=home, donate_argnums=0)
    x = jax.device_put(jnp.zeros((BATCH, 1 << 20)), home)
    where = {s.data.unsafe_buffer_pointer() for s in x.addressable_shards}
    y = step(x)
    assert x.is_deleted()
    assert {s.data.unsafe_buffer_pointer() for s in y.addressable_shards} == where


def test_random_bits_do_not_depend_on_the_machine() -> None:
    fun = lambda key: jax.random.normal(key, (BATCH, 1000))  # noqa: E731
    got = spmd.jit(fun, mesh=mesh(), out_shardings=P("data"))(jax.random.key(3))
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        want = jax.random.bits(jax.random.key(3), (BATCH, 1000))
    bits = spmd.jit(lambda key: jax.random.bits(key, (BATCH, 1000)), mesh=mesh(),
                    out_shardings=P("data"))(jax.random.key(3))  # fmt: skip
    np.testing.assert_array_equal(bits, want)
    assert np.isfinite(np.asarray(got)).all()


def test_callbacks_and_printing(capfd: pytest.CaptureFixture[str]) -> None:
    def fun(x: Any) -> Any:
        jax.debug.print("sum {s}", s=x.sum())
        return jax.pure_callback(np.cbrt, jax.ShapeDtypeStruct(x.shape, x.dtype), x,
                                 vmap_method="expand_dims")  # fmt: skip

    x = np.arange(8, dtype=np.float32)
    np.testing.assert_allclose(spmd.jit(fun, mesh=mesh())(x), np.cbrt(x), rtol=1e-6)
    jax.effects_barrier()
    assert "sum 28.0" in capfd.readouterr().out


@pytest.mark.parametrize("name", ALONE)
def test_programs_cost_what_they_cost_without_us(name: str) -> None:
    """On one device: the same result, the same memory within 2 %, no collectives."""
    (program,) = registry.matching(f"^{name}$")
    case = program.make(RUNS)
    alone = on_one(case.mesh)
    args = case.draw()
    with jax.set_mesh(alone):
        plain = jax.jit(case.fun).lower(*case.args).compile()
    ours = spmd.jit(case.fun, mesh=alone, axis_rules=case.axis_rules, in_shardings=case.in_specs,
                    out_shardings=case.out_specs).lower(*case.args).compile()  # fmt: skip
    for got, want in zip(jax.tree.leaves(ours(*args)), jax.tree.leaves(plain(*args)), strict=True):
        if jnp.issubdtype(want.dtype, jnp.floating):
            got, want = (np.asarray(x, np.float64) for x in (got, want))
            assert np.linalg.norm(got - want) <= 2e-3 * max(float(np.linalg.norm(want)), 1e-6)
    moving = [each.kind for each in collectives_in_hlo(ours.as_text())]
    assert not moving
    ours_bytes, plain_bytes = (peak_bytes(c.memory_analysis(), False) for c in (ours, plain))
    assert ours_bytes <= 1.02 * plain_bytes


def test_a_large_layer_is_as_fast_as_with_jax_jit() -> None:
    """Within 5 %: medians of steps that take turns."""

    def step(w: Any, x: Any) -> Any:
        loss = lambda w: jnp.mean(jnp.square(jax.nn.gelu(x @ w["up"]) @ w["down"]))  # noqa: E731
        return jax.tree.map(lambda p, g: p - 0.1 * g, w, jax.grad(loss)(w))

    w = {"up": draw(4096, 16384) * 0.01, "down": draw(16384, 4096) * 0.01}
    given = jax.device_put((w, draw(8192, 4096)))
    specs = ({"up": P(None, "heads"), "down": P("heads")}, P("data"))
    ours, plain = spmd.jit(step, mesh=mesh(), in_shardings=specs), jax.jit(step)
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for turn in range(30):
        for name, run in (("ours", ours), ("plain", plain))[:: 1 if turn % 2 else -1]:
            begin = time.perf_counter()
            jax.block_until_ready(run(*given))
            times[name].append(time.perf_counter() - begin)
    found = {name: float(np.median(each[5:])) for name, each in times.items()}
    assert found["ours"] <= 1.05 * found["plain"], found

