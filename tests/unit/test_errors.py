"""Every error that a user can run into, by its literal text."""

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, AxisType

import spmd
from sharding import ArgumentError, MeshError, P, RuleError, SpecError, rule, shard
from tests.oracle import make_mesh

X = jax.ShapeDtypeStruct((8, 6), jnp.float32)


def abstract(**axes: int) -> AbstractMesh:
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


MESH = abstract(data=2, tensor=4)


def message(error: type[Exception], action) -> str:
    with pytest.raises(error) as caught:
        action()
    return str(caught.value)


def test_no_mesh() -> None:
    assert message(MeshError, lambda: spmd.jit(lambda x: x)(1.0)) == (
        "spmd.jit has no mesh\n"
        "  why: a program is partitioned over the axes of a mesh\n"
        '  fix: pass mesh=jax.make_mesh((8,), ("data",)), or enter jax.set_mesh(mesh)'
    )


def test_running_on_an_abstract_mesh() -> None:
    assert message(MeshError, lambda: spmd.jit(lambda x: x, mesh=MESH)(jnp.ones(8))) == (
        "the mesh data=2, tensor=4 is abstract\n"
        "  why: it describes 8 devices and names none, so nothing can run on it\n"
        "  fix: pass a jax.sharding.Mesh to run; use .trace(...).propagate().partition() to plan"
    )


def test_something_that_is_no_mesh() -> None:
    assert message(MeshError, lambda: spmd.jit(lambda x: x, mesh="data")) == (
        "mesh is a str\n"
        "  why: a program is partitioned over named mesh axes\n"
        "  fix: pass jax.sharding.Mesh, jax.sharding.AbstractMesh or a dict of axis sizes"
    )


def test_arguments_on_other_devices_than_the_mesh() -> None:
    mesh = make_mesh(data=2)
    x = jax.device_put(jnp.ones(8), jax.devices()[5])
    assert message(MeshError, lambda: spmd.jit(lambda x: x + 1, mesh=mesh)(x)) == (
        "x lies on device 5, committed\n"
        "  why: the mesh data=2 has the devices 0, 1\n"
        "  fix: put x on the mesh with jax.device_put(x, NamedSharding(mesh, P(...))), or make "
        "the mesh from the devices of the arguments"
    )


def test_unknown_axis_twice_used_axis_and_long_spec_are_reported_together() -> None:
    function = spmd.jit(
        lambda params, x: x, mesh=MESH,
        in_shardings=({"w": P("dta"), "b": P("data", "data")}, P(None, None, "data")),
    )  # fmt: skip
    assert message(SpecError, lambda: function.trace({"w": X, "b": X}, X)) == (
        "3 problems\n"
        "(1) params['b'] has spec P('data', 'data'), which uses axis 'data' twice\n"
        "  why: the devices along one axis can hold the parts of one dim only\n"
        "  fix: keep 'data' in one dim and remove it from the others\n"
        "(2) params['w'] names axis 'dta'\n"
        "  why: the mesh has the axes data=2, tensor=4 (did you mean 'data'?)\n"
        "  fix: use a mesh axis, or map 'dta' to one with axis_rules=[('dta', ...)]\n"
        "(3) x has spec P(None, None, 'data') for an array of shape (8, 6)\n"
        "  why: the spec has 3 entries, the array 2 dims\n"
        "  fix: give at most 2 entries"
    )


def test_an_annotation_inside_names_its_source_line() -> None:
    def f(x):
        return shard(x, "modle")

    text = message(SpecError, lambda: spmd.jit(f, mesh=MESH).trace(X))
    line = f.__code__.co_firstlineno + 1
    assert text.startswith(
        f"the annotation at unit/test_errors.py:{line} "
        "(test_an_annotation_inside_names_its_source_line.<locals>.f) names axis 'modle'\n"
    )


def test_a_spec_longer_than_the_rank_inside() -> None:
    assert message(SpecError, lambda: shard(jnp.ones((2, 3)), None, None, "data")) == (
        "shard(x, ...) has spec P(None, None, 'data') for an array of shape (2, 3)\n"
        "  why: the spec has 3 entries, the array 2 dims\n"
        "  fix: give at most 2 entries"
    )


def test_a_primitive_without_a_rule() -> None:
    mystery_p = Primitive("mystery")
    mystery_p.def_abstract_eval(lambda x: x)
    mlir.register_lowering(mystery_p, lambda ctx, x: [x])

    def f(x):
        return mystery_p.bind(x) + 1

    text = message(RuleError, lambda: spmd.jit(f, mesh=MESH).trace(X))
    line = f.__code__.co_firstlineno + 1
    assert text == (
        f"primitive 'mystery' at unit/test_errors.py:{line} "
        "(test_a_primitive_without_a_rule.<locals>.f) has no rule\n"
        "  why: without one its partitioning cannot be inferred; running it replicated would hold "
        "384 bytes of operands and results on every device\n"
        '  fix: register sharding.rule("a b -> a b")(mystery_p) with the dims that pass through, '
        'or accept the cost with fallback="replicate"'
    )
    accepted = spmd.jit(f, mesh=MESH, in_shardings=P("data"), fallback="replicate").trace(X)
    partitioned = accepted.propagate().partition()
    assert [c.kind for c in partitioned.collectives] == ["all_gather"]
    assert [d.kind for d in partitioned.diagnostics] == ["gather"]
    rule("a b -> a b")(mystery_p)
    ruled = spmd.jit(f, mesh=MESH, in_shardings=P("data")).trace(X).propagate().partition()
    assert ruled.collectives == ()


def test_shardings_of_another_structure() -> None:
    function = spmd.jit(lambda x: x, mesh=MESH, in_shardings=({"a": P()},))
    text = message(ArgumentError, lambda: function.trace(X))
    assert text.startswith("in_shardings has structure PyTreeDef(({'a': *},))\n")
    assert text.endswith(
        "fix: give in_shardings one entry per positional argument, or one for all of them"
    )


def test_what_is_not_callable() -> None:
    assert message(ArgumentError, lambda: spmd.jit(3, mesh=MESH)) == (
        "spmd.jit was given a int\n  why: it compiles functions\n  fix: pass a callable"
    )


def test_an_unknown_fallback() -> None:
    text = message(ArgumentError, lambda: spmd.jit(lambda x: x, mesh=MESH, fallback="gather"))
    assert text == (
        "fallback='gather'\n"
        "  why: a primitive without a rule is either an error or replicated\n"
        '  fix: use fallback="error" or fallback="replicate"'
    )


def test_axis_rules_that_are_no_pairs() -> None:
    text = message(SpecError, lambda: spmd.jit(lambda x: x, mesh=MESH, axis_rules=["batch"]))
    assert text == (
        "axis_rules[0] is 'batch'\n"
        "  why: a rule maps one logical name to mesh axes\n"
        "  fix: write ('name', 'axis'), ('name', ('axis', 'axis')) or ('name', None)"
    )


def test_a_second_rule() -> None:
    with pytest.raises(RuleError) as error:
        rule("a -> a")(jax.lax.sin_p)
    assert str(error.value) == (
        "a second rule for primitive sin\n"
        "  why: two rules for one primitive would be two truths\n"
        "  fix: change the rule that is there, or register it with replace=True"
    )


def test_a_rule_without_an_arrow() -> None:
    assert message(RuleError, lambda: rule("a b, b c")) == (
        "rule 'a b, b c'\n"
        "  why: operands and results are told apart by '->'\n"
        '  fix: write it like "b m k, b k n -> b m n"'
    )


def test_a_primitive_of_scalars_has_no_rule_to_suggest() -> None:
    scalar_p = Primitive("scalar")
    scalar_p.def_abstract_eval(lambda x: x)

    def f(x):
        return scalar_p.bind(x.sum())

    text = message(RuleError, lambda: spmd.jit(f, mesh=MESH).trace(X))
    assert text.endswith('  fix: accept the cost with fallback="replicate"')
