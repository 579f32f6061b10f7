"""The collective counter on programs compiled by XLA for 8 simulated devices.

Numbers are derived by hand from the local shapes; the arithmetic is beside them.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.reporting.hlo import KindTotal, collectives_in_hlo, summarize, wire_bytes

MESH_SHAPE = {"data": 2, "tensor": 4}
BLOCK = 8 * 8 * 4  # bytes of the local f32[8,8] that every program below starts from
RING = [(0, 1), (1, 2), (2, 3), (3, 0)]


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), tuple(MESH_SHAPE))


def compile_local(mesh, f, *dtypes):
    """HLO of `f`, applied on every device to local arrays of shape [8, 8]."""
    spec = P("data", "tensor")
    mapped = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    arguments = [jax.ShapeDtypeStruct((16, 32), dtype) for dtype in dtypes or (jnp.float32,)]
    return jax.jit(mapped).lower(*arguments).compile().as_text()


def found(text):
    """(kind, mesh axes, count, wire bytes) of every collective, sorted."""
    return sorted(
        (c.kind, c.mesh_axes(MESH_SHAPE), c.count, c.wire_bytes) for c in collectives_in_hlo(text)
    )


def test_one_of_each(mesh):
    def f(x):
        x = lax.psum(x, "tensor")
        x = lax.all_gather(jnp.sin(x), "data", tiled=True)
        x = lax.psum_scatter(jnp.sin(x), "data", tiled=True)
        x = lax.ppermute(jnp.sin(x), "tensor", RING)
        return lax.all_to_all(jnp.sin(x), "tensor", 0, 1, tiled=True)

    assert found(compile_local(mesh, f)) == [
        ("all-gather", ("data",), 1, 1 / 2 * 2 * BLOCK),
        ("all-reduce", ("tensor",), 1, 2 * 3 / 4 * BLOCK),
        ("all-to-all", ("tensor",), 1, 3 / 4 * BLOCK),
        ("collective-permute", ("tensor",), 1, BLOCK),
        ("reduce-scatter", ("data",), 1, 1 / 2 * 2 * BLOCK),
    ]


def test_psum_of_a_tuple_over_both_axes(mesh):
    def f(x, y):
        a, b = lax.psum((x, y[:2]), ("data", "tensor"))
        return a + b.sum()

    text = compile_local(mesh, f, jnp.float32, jnp.float32)
    # whether XLA combines the two or not: 2 * 7/8 * (256 + 2 * 8 * 4)
    assert wire_bytes(text) == 2 * 7 / 8 * (BLOCK + 64)
    assert {axes for _, axes, _, _ in found(text)} == {("data", "tensor")}


def test_scan(mesh):
    def f(x):
        return lax.scan(lambda c, _: (jnp.sin(lax.psum(c, "tensor")), None), x, length=5)[0]

    assert found(compile_local(mesh, f)) == [("all-reduce", ("tensor",), 5, 5 * 2 * 3 / 4 * BLOCK)]


def test_nested_scan(mesh):
    def inner(c, _):
        return jnp.sin(lax.psum(c, "data")), None

    def outer(c, _):
        c = lax.scan(inner, c, length=3)[0]
        return lax.ppermute(c, "tensor", RING), None

    text = compile_local(mesh, lambda x: lax.scan(outer, x, length=4)[0])
    assert found(text) == [
        ("all-reduce", ("data",), 12, 12 * 2 * 1 / 2 * BLOCK),
        ("collective-permute", ("tensor",), 4, 4 * BLOCK),
    ]


@pytest.mark.parametrize(
    ("start", "holds", "step", "times"),
    [
        (0, lambda i: i < 10, 3, 4),  # 0 3 6 9
        (9, lambda i: i >= 0, -2, 5),  # 9 7 5 3 1
        (7, lambda i: i > 0, -1, 7),
        (0, lambda i: i != 6, 2, 3),  # 0 2 4
    ],
)
def test_while(mesh, start, holds, step, times):
    def f(x):
        def body(carry):
            i, y = carry
            return i + step, jnp.sin(lax.psum(y, "tensor"))

        return lax.while_loop(lambda carry: holds(carry[0]), body, (start, x))[1]

    assert found(compile_local(mesh, f)) == [
        ("all-reduce", ("tensor",), times, times * 2 * 3 / 4 * BLOCK)
    ]


def test_while_that_depends_on_data_counts_once_and_says_so(mesh):
    def f(x):
        body = lambda y: jnp.sin(lax.psum(y, "tensor"))  # noqa: E731
        return lax.while_loop(lambda y: y[0, 0] > 0, body, x)

    (collective,) = collectives_in_hlo(compile_local(mesh, f))
    assert (collective.count, collective.exact) == (1, False)


def test_cond_in_a_scan_counts_the_branch_that_moves_most(mesh):
    def body(c, i):
        branches = [
            lambda y: y * 2,
            lambda y: lax.psum(y, "data"),
            lambda y: lax.psum(y, "tensor"),
        ]
        return lax.switch(i % 3, branches, c), None

    text = compile_local(mesh, lambda x: lax.scan(body, x, jnp.arange(6))[0])
    # over data 2 * 1/2, over tensor 2 * 3/4
    assert found(text) == [("all-reduce", ("tensor",), 6, 6 * 2 * 3 / 4 * BLOCK)]


def test_bf16_psum_counts_as_executed(mesh):
    text = compile_local(mesh, lambda x: lax.psum(x, "tensor"), jnp.bfloat16)
    (collective,) = collectives_in_hlo(text)
    width = {"bf16": 2, "f32": 4}[collective.dtypes[0]]
    assert collective.payload_bytes == 64 * width


def test_groups_of_an_automatically_partitioned_program(mesh):
    rows, columns = NamedSharding(mesh, P("tensor")), NamedSharding(mesh, P(None, "tensor"))
    product = jax.jit(jnp.dot, in_shardings=(columns, rows), out_shardings=NamedSharding(mesh, P()))
    square = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    text = product.lower(square, square).compile().as_text()
    # a contraction over the sharded dim: 2 * 3/4 * 16 * 16 * 4
    assert found(text) == [("all-reduce", ("tensor",), 1, 1536)]


def test_trip_counts_do_not_depend_on_what_xla_states(mesh):
    def body(c, _):
        return jnp.sin(lax.psum(c, "data")), None

    text = compile_local(mesh, lambda x: lax.scan(body, x, length=6, unroll=2)[0])
    stated = re.compile(r',?"known_trip_count":\{"n":"\d+"\}')
    assert stated.search(text)
    assert collectives_in_hlo(stated.sub("", text)) == collectives_in_hlo(text)
    assert summarize(collectives_in_hlo(text)) == {"all-reduce": KindTotal(6, 6 * BLOCK)}
