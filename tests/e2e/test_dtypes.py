"""Every dtype goes through every collective, and conversions between them are pointwise."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import spmd
from sharding.mesh import MeshShape
from sharding.spec import Layout
from spmd.partition.apply import all_gather, apply, on_first_device, reduce_over
from spmd.partition.reshard import plan
from tests.oracle import check, kinds, make_mesh

DTYPES = (
    "bool", "int2", "uint2", "int4", "uint4", "int8", "uint16", "int32", "float4_e2m1fn",
    "float8_e3m4", "float8_e4m3fn", "float8_e5m2fnuz", "float8_e8m0fnu", "bfloat16", "float16",
    "float32", "complex64",
)  # fmt: skip
MESH = MeshShape((("x", 2), ("y", 4)))
SHAPE = (7, 6)  # neither divides
WHOLE = Layout(((), ()))
MOVES = [
    (Layout((("x", "y"), ())), WHOLE, "all_gather"),
    (Layout((("y",), ())), Layout(((), ("y",))), "all_to_all"),
    (Layout((("x", "y"), ())), Layout((("y", "x"), ())), "permute"),
    (Layout(((), ()), (("y", "add"),)), WHOLE, "all_reduce"),
    (Layout(((), ()), (("y", "add"),)), Layout((("y",), ())), "reduce_scatter"),
]


def _drawn(dtype: Any) -> Any:
    """Zeros and ones: sums of four are exact in every dtype but those without a zero."""
    flags = np.random.default_rng(0).integers(0, 2, SHAPE)
    return jnp.asarray(flags + (dtype == jnp.float8_e8m0fnu), jnp.float32).astype(dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3b11fnuz", "float8_e5m2"])
def test_extremes_keep_nan_in_no_more_bytes(dtype: str) -> None:
    """Every pattern of bits of a float of 8 bits, and the extremes of wider ones."""
    dtype, rng = jnp.dtype(dtype), np.random.default_rng(0)
    if dtype.itemsize == 1:
        values = np.arange(256, dtype=np.uint8).view(dtype)
    else:
        least, most = jnp.finfo(dtype).tiny, jnp.finfo(dtype).max
        values = np.array([0, -1, 2, -least, least, -most, most, np.inf, -np.inf, np.nan], dtype)
    x = rng.choice(values, (8, 512))
    x[:, 0] = np.nan
    for whole, best in ((jnp.max, np.fmax), (jnp.min, np.fmin)):
        function = spmd.jit(partial(whole, axis=0), mesh=make_mesh(y=8), in_shardings=P("y"))
        made, sent = function.trace(x).propagate().partition(), max(dtype.itemsize, 2)
        assert kinds(made) == {("all_reduce", ("y",)): (1, 2 * 512 * sent * 7 / 8)}
        got = function(x)
        nans = np.isnan(x.astype(np.float32)).any(0)
        want = np.where(nans, np.nan, best.reduce(x.astype(np.float32), 0))
        np.testing.assert_array_equal(np.asarray(got, np.float32), want)


def _per_device(x: Any) -> dict[str, Any]:
    """What every collective makes of `x`, whole again on every device."""
    found: dict[str, Any] = {}
    ordered = not jnp.iscomplexobj(x)
    adds = x.dtype not in (jnp.bool_, jnp.float8_e8m0fnu)
    for src, dst, kind in MOVES:
        if src.partial and not adds:
            continue
        steps = plan(src, dst, SHAPE, 4, MESH).steps
        assert kind in {s.kind for s in steps}
        part = apply(plan(WHOLE, Layout(src.dims), SHAPE, 4, MESH).steps, x, WHOLE, SHAPE, MESH)
        part = apply(steps, part, src, SHAPE, MESH)
        found[kind] = apply(plan(dst, WHOLE, SHAPE, 4, MESH).steps, part, dst, SHAPE, MESH)
    monoids = ("and", "or") if x.dtype == jnp.bool_ else ("max", "min", "mul")
    for monoid in monoids if ordered else ("mul",):
        found[monoid] = reduce_over(x, ("y",), monoid)
    found["gathered"] = all_gather(x, ("y",), 0)[:7]
    (found["sent"],) = on_first_device(lambda x: [x], [x], MESH)
    return jax.tree.map(lambda a: jnp.expand_dims(a, 0), found)


@pytest.mark.parametrize("name", DTYPES)
def test_collectives(name: str) -> None:
    x = _drawn(jnp.dtype(getattr(jnp, name)))
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    body = jax.shard_map(
        _per_device, mesh=mesh, in_specs=P(), out_specs=P(("x", "y")), check_vma=False
    )
    wide = np.complex64 if name == "complex64" else np.float32
    for kind, copies in jax.jit(body)(x).items():
        want = np.asarray(x).astype(wide)
        if kind in ("all_reduce", "reduce_scatter"):
            want = (want * 4).astype(x.dtype).astype(wide)  # two bits wrap around
        if kind == "mul":
            want = want**4
        assert copies.dtype == x.dtype
        for copy in np.asarray(copies).astype(wide):
            np.testing.assert_array_equal(copy, want, err_msg=kind)


def test_conversions() -> None:
    names = [name for name in DTYPES if not name.startswith("complex")]

    def fun(x: Any) -> list[Any]:
        narrow = [x.astype(getattr(jnp, name)) for name in names]
        return [n.astype(jnp.float32) + i for i, n in enumerate(narrow)]

    x = np.random.default_rng(0).integers(0, 2, (16, 8)).astype(np.float32)
    outs = [P("x", "y")] * len(names)
    assert not kinds(check(fun, [x], make_mesh(x=2, y=4), (P("x", "y"),), outs))


def test_bitcasts_to_other_widths() -> None:
    x = np.arange(8 * 8, dtype=np.int32).reshape(8, 8) * 65537

    def fun(x: Any) -> list[Any]:
        halves = lax.bitcast_convert_type(x, jnp.uint8)
        return [
            halves, lax.bitcast_convert_type(halves, jnp.int32), lax.population_count(x),
            lax.clz(x), lax.bitcast_convert_type(x, jnp.float32) * 0,
        ]  # fmt: skip

    assert not kinds(check(fun, [x], make_mesh(x=2, y=4), (P("x", "y"),), [P("x", "y")] * 5))
