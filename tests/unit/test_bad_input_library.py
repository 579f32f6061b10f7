"""The bad-input matrix, as far as it is the library's: each row by its number.

Rows that are decided otherwise than by an error have their decision here, too. Rows of train.py
are in tests/e2e/test_bad_input.py.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

import spmd
from sharding import ArgumentError, MeshError, P, SpecError, shard
from tests.oracle import make_mesh

X = jax.ShapeDtypeStruct((8, 6), jnp.float32)
MESH = AbstractMesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def traced(function=lambda x: x + 1, x=X, mesh=MESH, **options):
    return spmd.jit(function, mesh=mesh, **options).trace(x)


def duplicate_names():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "a"))
    return spmd.jit(lambda x: x, mesh=mesh)(1.0)


NO_SPEC = (
    "  why: a dim is sharded over named axes\n"
    "  fix: write an axis name, a tuple of names, None, P.UNCONSTRAINED or Priority(...)"
)
TUPLE = "  why: a tuple is a pytree of shardings, with one for each part of an argument\n"
UNFIT = "  why: the devices along one axis can hold the parts of one dim only\n"

# (row, action, error, message)
CASES = [
    (3, lambda: traced(mesh={"a": 0}), MeshError,
     "mesh axis 'a' has size 0\n  why: every axis holds at least one device\n"
     "  fix: give 'a' a size of 1 or more"),
    (4, lambda: traced(mesh={"a": -1}), MeshError,
     "mesh axis 'a' has size -1\n  why: every axis holds at least one device\n"
     "  fix: give 'a' a size of 1 or more"),
    (5, duplicate_names, MeshError,
     "mesh axis 'a' is named at positions 0, 1\n"
     "  why: an annotation that says the name would mean two axes\n"
     "  fix: give every mesh axis a name of its own"),
    (7, lambda: traced(in_shardings=P("dta")), SpecError,
     "x names axis 'dta'\n"
     "  why: the mesh has the axes data=2, tensor=4 (did you mean 'data'?)\n"
     "  fix: use a mesh axis, or map 'dta' to one with axis_rules=[('dta', ...)]"),
    (8, lambda: traced(in_shardings=P("data", "data")), SpecError,
     "x has spec P('data', 'data'), which uses axis 'data' twice\n"
     f"{UNFIT}  fix: keep 'data' in one dim and remove it from the others"),
    (9, lambda: traced(in_shardings=P(("data", "data"))), SpecError,
     "x has spec P(('data', 'data')), which uses axis 'data' twice\n"
     f"{UNFIT}  fix: keep 'data' in one dim and remove it from the others"),
    (10, lambda: traced(in_shardings=P(None, None, "data")), SpecError,
     "x has spec P(None, None, 'data') for an array of shape (8, 6)\n"
     "  why: the spec has 3 entries, the array 2 dims\n  fix: give at most 2 entries"),
    (14, lambda: traced(lambda x: shard(x, 0)), SpecError, f"entry 0 of the spec is 0\n{NO_SPEC}"),
    (14, lambda: traced(lambda x: shard(x, "")), SpecError,
     f"entry 0 of the spec is ''\n{NO_SPEC}"),
    (14, lambda: traced(in_shardings=P(1)), SpecError, f"entry 0 of the spec is 1\n{NO_SPEC}"),
    (15, lambda: traced(in_shardings=("data", None)), ArgumentError,
     f"in_shardings holds the tuple ('data', None)\n{TUPLE}"
     "  fix: for one sharding write P('data', None)"),
    (15, lambda: traced(in_shardings=(("data", None),)), ArgumentError,
     f"in_shardings holds the tuple ('data', None)\n{TUPLE}"
     "  fix: for one sharding write P('data', None)"),
    (15, lambda: traced(out_shardings=(("data", "tensor"), None)), ArgumentError,
     f"out_shardings holds the tuple (('data', 'tensor'), None)\n{TUPLE}"
     "  fix: for one sharding write P(('data', 'tensor'), None)"),
    (15, lambda: traced(in_shardings="data"), SpecError,
     "sharding 'data' is a str\n  why: a sharding says which mesh axes each dim lies on\n"
     "  fix: pass PartitionSpec, NamedSharding or None"),
    (17, lambda: traced(x=1.0, in_shardings=P("data")), SpecError,
     "x has spec P('data') for an array of shape ()\n"
     "  why: the spec has 1 entries, the array 0 dims\n  fix: give at most 0 entries"),
    (24, lambda: traced(x=2**40), OverflowError,
     "x is 1099511627776\n  why: Python integers become int32 arrays, which cannot hold it\n"
     "  fix: pass a float, make x static, or enter jax.enable_x64(True)"),
    (25, lambda: traced(lambda p: p["w"], {"w": np.array(["abc"])}), ArgumentError,
     "p['w'] is array(['abc'], dtype='<U3'), a ndarray\n"
     "  why: arguments of a compiled function are arrays, scalars, or pytrees of them\n"
     "  fix: pass an array, make the argument static (static_argnums, static_argnames), or register"
     " its class as a pytree"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "action", "error", "message"), CASES, ids=[c[0] for c in CASES])
def test_bad_input_has_its_message(row, action, error, message):
    with pytest.raises(error) as caught:
        action()
    assert str(caught.value) == message
    assert len(message.splitlines()) <= 6


def test_arguments_on_other_devices():
    """Row 20."""
    halves = [Mesh(np.array(part), ("data",)) for part in np.array(jax.devices()).reshape(2, 4)]
    x, y = (jax.device_put(jnp.ones(8), NamedSharding(half, P("data"))) for half in halves)
    with pytest.raises(MeshError) as caught:
        spmd.jit(lambda x, y: x + y, mesh=make_mesh(data=2, tensor=4))(x, y)
    assert [problem.what for problem in caught.value.problems] == [
        "x lies on devices 0, 1, 2, 3, committed", "y lies on devices 4, 5, 6, 7, committed"
    ]  # fmt: skip


def test_a_collective_over_an_axis_that_no_mesh_has():
    """Row 21: the error is JAX's, raised before there is a program; a note says what it means."""
    inner = jax.shard_map(
        lambda x: jax.lax.psum(x, "rows"), mesh=MESH, in_specs=P("data"), out_specs=P()
    )
    with pytest.raises(AssertionError) as caught:
        traced(inner)
    note = (
        "JAX says no more than that where psum, pmax, pmin or ppermute name an axis that no mesh"
        " around them has; here the mesh is data=2, tensor=4"
    )
    assert note in caught.value.__notes__


def test_a_collective_outside_of_a_mesh():
    """Row 22: JAX's own error, as from jax.jit."""
    with pytest.raises(NameError, match="unbound axis name: rows"):
        traced(lambda x: jax.lax.psum(x, "rows"))


# Decided otherwise


def test_dims_that_do_not_divide_work_and_say_what_they_cost():
    """Rows 11, 13: held on the largest even prefix at the boundary, with a diagnostic; sharded
    and padded inside. A dim of size 1 is held whole, which costs nothing."""
    step = traced(in_shardings=P(None, "tensor")).propagate().partition()
    assert step.in_shardings[0].spec == P()
    assert {d.kind for d in step.diagnostics} == {"boundary"}  # of x, and of the result
    assert "into 4 shards over tensor: held whole" in step.diagnostics[0].text
    narrow = jax.ShapeDtypeStruct((1, 6), jnp.float32)
    step = traced(x=narrow, in_shardings=P("tensor")).propagate().partition()
    assert (step.in_shardings[0].spec, step.diagnostics) == (P(), ())


def test_a_constraint_that_does_not_divide_is_kept_not_dropped():
    """Row 12: jax.jit replicates the value without a word."""

    def f(x):
        return jax.lax.with_sharding_constraint(x * 2, NamedSharding(MESH, P(None, "tensor"))) + 1

    step = traced(f).propagate().partition()
    assert "[-, tensor] = sharding_constraint" in str(step)


def test_zero_and_the_empty_name_are_gone_before_anybody_can_see_them():
    """Row 14: JAX's constructor turns them into None."""
    assert P(0) == P("") == P(None)


def test_empty_arrays_have_costs():
    """Row 16."""
    step = spmd.jit(lambda x: x @ x.T, mesh=MESH, in_shardings=P("data"))
    found = spmd.report(step, jax.ShapeDtypeStruct((0, 4), jnp.float32), machine="v5e:2x4")
    assert (found.flops.total, found.utilisation) == (0.0, 0.0)


def test_wide_arrays_are_narrowed_as_jax_jit_does():
    """Rows 23, 24: code that runs under jax.jit passes them everywhere."""
    mesh = make_mesh(data=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's own, of the cast
        for x in (np.array([1e300]), np.array([2**40 + 1])):
            ours, theirs = spmd.jit(lambda x: x, mesh=mesh)(x), jax.jit(lambda x: x)(x)
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int4", "bool", "complex64"])
def test_unusual_dtypes_work(dtype):
    """Row 26."""
    step = traced(lambda x: (x, x[:2]), jax.ShapeDtypeStruct((8, 4), dtype), in_shardings=P("data"))
    assert step.propagate().partition().in_shardings[0].spec == P("data")
