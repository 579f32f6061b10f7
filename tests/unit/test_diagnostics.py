"""What annotations leave undone, by its literal text, and `strict`, which refuses it."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import spmd
from sharding import P, StrictError, shard
from spmd.partition.findings import LARGE, forbid_waste

MESH = {"data": 2, "tensor": 4}
FILE = "unit/test_diagnostics.py"


def arr(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def staged(fun: Any, *args: Any, ins: Any = None, mesh: Any = None, **options: Any) -> Any:
    function = spmd.jit(fun, mesh=mesh or MESH, in_shardings=ins, **options)
    return function.trace(*args).propagate().partition()


def found(*args: Any, **options: Any) -> list[tuple[str, str, float]]:
    return [(d.kind, d.value, d.bytes) for d in staged(*args, **options).diagnostics]


def product(x, w):
    return jnp.tanh(x @ w)


def at(fun: Any, line: int = 1) -> str:
    return f"{FILE}:{fun.__code__.co_firstlineno + line} ({fun.__qualname__})"


def test_a_parameter_left_replicated() -> None:
    args = arr(512, 1024), arr(1024, 4096)
    (one,) = staged(product, *args, ins=(P("data"), None), mesh={"data": 8}).diagnostics
    # 16 MiB on each of 8 devices, which an eighth would do.
    assert one.bytes == (16 << 20) * 7 / 8
    assert str(one) == (
        "replicated: w: 16,777,216 B on every device: no axis divides it, and data could by 8; "
        "in_shardings P(None, 'data') for w; an annotation without axes says that it is meant to "
        "be whole"
    )
    both = found(product, *args, ins=(P("data"), P(None, "data")), mesh={"data": 8})
    assert [kind for kind, _, _ in both] == ["conflict"]
    assert found(product, *args, ins=(P("data"), P()), mesh={"data": 8}) == []


def test_an_activation_left_replicated_is_told_where_it_begins() -> None:
    def f(x, y, z):
        whole = x[:, None] * y[None, :]
        return jnp.sum(jnp.tanh(whole) + 1.0), z

    args, ins = (arr(2048), arr(2048), arr(8)), (None, None, P("data"))
    (one,) = staged(f, *args, ins=ins, mesh={"data": 8}).diagnostics
    assert one.bytes == (16 << 20) * 7 / 8
    assert str(one) == (
        f"replicated: result of mul at {at(f)}: 16,777,216 B on every device: no axis divides it, "
        f"and data could by 8; shard(x, 'data', None) on the result of mul at {at(f)}; an "
        "annotation without axes says that it is meant to be whole"
    )

    def meant(x, y, z):
        whole = x[:, None] * y[None, :]
        return shard(jnp.tanh(whole), None, None), z

    assert found(meant, *args, ins=ins, mesh={"data": 8}) == []


def test_an_axis_that_nothing_uses() -> None:
    args = arr(512, 1024), arr(1024, 4096)
    (one,) = staged(product, *args, ins=(P("data"), P())).diagnostics
    # x and the result on data: (2 + 8) MiB / 2; w whole: 16 MiB. All 4 along tensor hold them.
    assert one.bytes == (21 << 20) * 3 / 4
    assert str(one) == (
        "unused axis: tensor: all 4 devices along it hold and do the same, 22,020,096 B of "
        "arguments and results; in_shardings P(None, 'tensor') for w"
    )
    assert found(product, arr(8, 16), arr(16, 16), ins=(P("data"), P())) == []


def test_a_padded_dim() -> None:
    def f(x):
        return jnp.sum(jnp.tanh(shard(x * 2.0, "tensor", None)))

    (one,) = [
        d for d in staged(f, arr(5, 1 << 20), mesh={"tensor": 4}).diagnostics if d.kind == "padded"
    ]
    # 5 rows of 4 MiB in 4 shards of 2: 3 of 8 places are padding, of 8 MiB.
    assert one.bytes == 3 << 20
    assert str(one) == (
        "padded: x: dim 0 of size 5 over tensor takes 8 places, 38% of them padding: 3,145,728 B "
        "per device; make its size a multiple of 4, or in_shardings P(None, 'tensor') for x"
    )
    padded = [k for k, _, _ in found(f, arr(31, 1 << 20), mesh={"tensor": 4})]
    assert "padded" not in padded  # 1 of 32


def accumulate(w, xs):
    def body(acc, x):
        return acc + x.T @ x, None

    return jax.lax.scan(body, w, xs)[0]


def test_addends_that_are_reduced_in_each_step() -> None:
    ins = (P(), P(None, "data"))
    args = arr(512, 512), arr(16, 256, 512)
    assert found(accumulate, *args, ins=ins, mesh={"data": 2}) == []
    without = {"disable_passes": ["loop_sums"]}
    (one,) = staged(accumulate, *args, ins=ins, mesh={"data": 2}, **without).diagnostics
    line = accumulate.__code__.co_firstlineno + 2
    source = f"{FILE}:{line} (accumulate.<locals>.body)"
    # 2**20 B at 2 devices: a reduce-scatter and an all-gather of half of it each.
    assert one.bytes == 15 * (1 << 20)
    assert str(one) == (
        f"reduced early: result of dot_general at {source}: reduced over data in each of 16 steps "
        "of a scan that only adds it up: 16,777,216 B per device, 1,048,576 B were it reduced "
        f"once; shard(x, 'data', None) on the result of add at {source}, so that each step sends "
        "half"
    )

    def used(w, xs):
        def body(acc, x):
            acc = acc + x.T @ x
            return acc, jnp.max(acc)

        return jax.lax.scan(body, w, xs)

    assert found(used, *args, ins=ins, mesh={"data": 2}) == []

    def used_before(w, xs):
        return jax.lax.scan(lambda acc, x: (acc + x.T @ x, jnp.max(acc)), w, xs)

    assert found(used_before, *args, ins=ins, mesh={"data": 2}) == []


def test_a_conflict_that_was_inferred() -> None:
    def f(x, a, w):
        hidden = x @ a
        return hidden @ w

    args = arr(1024, 256), arr(256, 1024), arr(1024, 8192)
    ins = (P("tensor"), P(), P(None, "tensor"))
    (one,) = staged(f, *args, ins=ins, mesh={"tensor": 4, "data": 1}).diagnostics
    # hidden has 4 MiB: a device lacks 3/4 of it.
    assert one.bytes == 3 << 20 and not one.stated
    assert str(one) == (
        f"conflict: result of dot_general at {at(f)}: dot_general cannot put tensor on dim 0 of "
        "result as %3 does (tensor is used by another dim, or kept for one): gathered, 3,145,728 "
        f"B per device at {at(f, 2)}; shard(x, None, None) on the result of dot_general at {at(f)}"
    )


def test_a_conflict_that_annotations_state() -> None:
    args, ins = (arr(1024, 1024), arr(1024, 4096)), (P("tensor"), P(None, "tensor"))
    (one,) = staged(product, *args, ins=ins, mesh={"tensor": 4}, strict=True).diagnostics
    assert one.stated
    assert str(one) == (
        "conflict: tensor: annotations put it on x and on another dim of dot_general: gathered, "
        f"3,145,728 B per device at {at(product)}; meant so where memory is scarce (ZeRO-3); else "
        "leave tensor out of x"
    )


def test_the_dearest_comes_first() -> None:
    made = staged(product, arr(1024, 1024), arr(1024, 4096))
    assert [d.bytes for d in made.diagnostics] == sorted(
        (d.bytes for d in made.diagnostics), reverse=True
    )
    assert [(d.kind, d.value) for d in made.diagnostics] == [
        ("unused axis", "tensor"), ("unused axis", "data"), ("replicated", "w"), ("replicated", "x")
    ]


def test_strict_names_every_offender() -> None:
    with pytest.raises(StrictError) as error:
        staged(product, arr(512, 1024), arr(1024, 4096), ins=(P("data"), None), strict=True)
    assert str(error.value) == (
        "2 problems\n"
        "(1) unused axis: tensor: all 4 devices along it hold and do the same, 22,020,096 B of "
        "arguments and results\n"
        "  why: strict=True accepts nothing that costs a device 1,048,576 B or more\n"
        "  fix: in_shardings P(None, 'tensor') for w\n"
        "(2) replicated: w: 16,777,216 B on every device: no axis divides it, and tensor could by "
        "4\n"
        "  why: strict=True accepts nothing that costs a device 1,048,576 B or more\n"
        "  fix: in_shardings P(None, 'tensor') for w; an annotation without axes says that it is "
        "meant to be whole"
    )
    assert len(error.value.problems) == 2
    ins = (P("data"), P(None, "tensor"))
    staged(product, arr(512, 1024), arr(1024, 4096), ins=ins, strict=True)


def test_strict_lets_trivia_pass() -> None:
    def f(x, w, b, scale):
        return jax.nn.relu(x @ w + b) * scale

    args = arr(512, 1024), arr(1024, 4096), arr(4096), arr()
    ins = (P("data"), P(None, "tensor"), None, None)
    assert found(f, *args, ins=ins, strict=True) == []
    small = staged(lambda x: jax.lax.linalg.cholesky(x), arr(8, 8), ins=P("data"), strict=True)
    assert all(d.bytes < LARGE for d in small.diagnostics)
    forbid_waste(small.diagnostics)


def test_strict_is_part_of_what_a_program_is_made_for() -> None:
    x, w = jnp.ones((512, 1024)), jnp.ones((1024, 4096))
    mesh = jax.make_mesh((8,), ("data",))
    spmd.jit(product, mesh=mesh, in_shardings=(P("data"), None))(x, w)
    with pytest.raises(StrictError, match="replicated: w"):
        spmd.jit(product, mesh=mesh, in_shardings=(P("data"), None), strict=True)(x, w)
    with pytest.raises(StrictError, match="replicated"):
        jax.jit(spmd.jit(product, mesh=mesh, in_shardings=(P("data"), None), strict=True))(x, w)
