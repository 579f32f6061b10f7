"""`jax.shard_map` inside of a program: bodies, collectives and gradients against `jax.jit`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas
from jax.sharding import AxisType

import spmd
from sharding import shard
from sharding.errors import MeshError, RuleError, SpecError
from sharding.mesh import MeshShape
from sharding.program import build
from sharding.stated import annotations_in
from tests.oracle import P, check, kinds, make_mesh

MESH = make_mesh(x=2, y=4)
BOTH, ONE = frozenset("xy"), frozenset("x")


def arr(*shape: int) -> np.ndarray:
    return (np.random.default_rng(len(shape)).normal(size=shape) * 0.5).astype(np.float32)


def mapped(f: Callable, ins: Any, outs: Any, axes: frozenset[str] = BOTH, **options: Any) -> Any:
    return jax.shard_map(
        f, mesh=MESH, in_specs=ins, out_specs=outs, axis_names=axes, **options
    )  # fmt: skip


def agrees(f: Callable, *args: Any, specs: Any = None, **options: Any) -> spmd.Partitioned:
    return check(f, args, MESH, specs, tolerance=2e-5, **options)


COLLECTIVES: dict[str, Callable] = {
    "psum": lambda a: lax.psum(a, "y") + lax.psum(a, ("x", "y")),
    "pmean, pmax, pmin": lambda a: lax.pmean(a, "x") * lax.pmax(a, "y") - lax.pmin(a, ("y", "x")),
    "all_gather": lambda a: a + lax.all_gather(a, "y").sum(0),
    "all_gather tiled": lambda a: a + lax.all_gather(a, ("y", "x"), axis=1, tiled=True)[:, 3:5],
    "psum_scatter": lambda a: a + lax.psum_scatter(a[:4], "y", scatter_dimension=0),
    "psum_scatter tiled": lambda a: a[:2] + lax.psum_scatter(a, "y", tiled=True),
    "all_to_all": lambda a: a + lax.all_to_all(a.reshape(4, 2, 2), "y", 0, 1).reshape(8, 2),
    "all_to_all tiled": lambda a: lax.all_to_all(a, "y", 0, 1, tiled=True),
    "ppermute": lambda a: lax.ppermute(a, "y", [(0, 3), (1, 2), (2, 0)]),
    "axis_index": lambda a: a * lax.axis_index("x") + lax.axis_index(("y", "x")),
    "axis_size": lambda a: a / lax.axis_size("y"),
}


TYPED: dict[str, tuple[Callable, Any]] = {
    "unreduced, summed": (lambda a: lax.psum(lax.pcast(a, "x", to="unreduced"), "x"), P()),
    "unreduced, scattered": (
        lambda a: lax.psum_scatter(lax.pcast(a, "x", to="unreduced"), "x", tiled=True), P("x")
    ),
    "reduced": (
        lambda a: lax.pcast(
            lax.pcast(lax.psum(a, "x"), "x", to="reduced"), "x", to="varying"
        ),
        P("x"),
    ),
    "gathered, invarying": (lambda a: lax.all_gather(a, "x", tiled=True, to="invarying"), P()),
    "gathered, stacked, invarying": (lambda a: lax.all_gather(a, "x", to="invarying")[0], P()),
    "gathered, reduced": (
        lambda a: lax.all_gather(a, "x", tiled=True, to="reduced") * lax.axis_index("x"), P("x")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TYPED)
def test_types_of_manual_values(name: str) -> None:
    """Collectives that JAX binds by what varies over the axis, and their transposes."""
    f = mapped(TYPED[name][0], P("x"), TYPED[name][1], ONE)
    made = agrees(lambda a: (f(a), jax.grad(lambda a: (f(a) ** 2).sum())(a)), arr(8, 8))
    assert {axes for _, axes in kinds(made)} == {("x",)}
    agrees(f, arr(8, 8), specs=(P("x", "y"),))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", COLLECTIVES)
def test_collectives(name: str, check_vma: bool) -> None:
    f = mapped(COLLECTIVES[name], P("x", "y"), P("x", "y"), check_vma=check_vma)
    agrees(lambda a: f(jnp.sin(a)), arr(16, 8))


def test_groups_of_an_axis() -> None:
    def f(a: Any) -> Any:
        pairs = lax.psum(a, "y", axis_index_groups=[[0, 1], [2, 3]])
        return pairs + lax.all_gather(a, "y", axis_index_groups=[[0, 3], [1, 2]]).sum(0)

    made = agrees(mapped(f, P("y"), P("y"), check_vma=False), arr(16, 4))
    assert kinds(made)["all_reduce", ("y",)] == (1, 4 * 4 * 4)  # 2 of 4: 2 * 64 B / 2


def test_axis_name_of_vmap_beside_an_axis() -> None:
    f = jax.vmap(lambda r: r / (4 + lax.psum(r, ("i", "x"))), axis_name="i")
    agrees(mapped(f, P("x"), P("x"), check_vma=False), arr(8, 4))
    agrees(mapped(f, P("x"), P("x"), ONE, check_vma=False), arr(8, 4), specs=(P("x", "y"),))


def row_parallel(a: Any, w: Any) -> Any:
    f = mapped(lambda a, w: lax.psum(a @ w, "y"), (P("x", "y"), P("y")), P("x"))
    return f(jnp.sin(a), w)


def test_specs_reach_arguments_and_results() -> None:
    """Nothing but the body's own collective; arguments and results lie as its specs say."""
    made = agrees(row_parallel, arr(8, 16), arr(16, 4))
    assert kinds(made) == {("all_reduce", ("y",)): (1, 2 * 4 * 4 * 4 * 3 / 4)}
    assert [s.spec for s in made.in_shardings] == [P("x", "y"), P("y")]
    assert made.out_shardings.spec == P("x")


def test_another_layout_is_resharded_once() -> None:
    """One all-to-all brings the operand to the spec."""
    f = lambda a: mapped(jnp.cumsum, P("x"), P("x"), ONE)(shard(a * 2, None, "x"))  # noqa: E731
    made = agrees(f, arr(8, 8), specs=(P(None, "x"),))
    assert kinds(made) == {("all_to_all", ("x",)): (1, 8 * 4 * 4 / 2)}


def test_an_operand_of_two_regions_lies_as_each_wants() -> None:
    def f(a: Any) -> Any:
        rows = mapped(lambda a: a - lax.pmean(a, "x"), P("x"), P("x"), ONE)(a)
        return rows, mapped(lambda a: a - lax.pmean(a, "x"), P(None, "x"), P(None, "x"), ONE)(a)

    made = agrees(f, arr(8, 8))
    assert [s.spec for s in made.out_shardings] == [P("x"), P(None, "x")]


def test_unmentioned_axes() -> None:
    """Operands are whole over them; results are the same over them."""
    f = mapped(lambda a: (a.sum(0), a * 2), P("y"), (P(None), P("x")), check_vma=False)
    agrees(lambda a: f(jnp.ones_like(a) * a[0]), arr(8, 8), specs=(P(None, "x"),))


def on_y(a: Any, dim: int = 1) -> Any:
    """What collectives along the dim cannot keep: shards over y."""
    return shard(a, *[None] * dim, "y")


REGIONS: dict[str, Callable] = {
    "contraction": lambda a, w: jnp.sin(a) @ w - lax.pmean(jnp.sin(a) @ w, "x"),
    "reduction": lambda a, w: a + lax.psum((a @ w).sum(0), "x")[:8],
    "extreme": lambda a, w: lax.pmax(a @ w, "x") - lax.pmin(a @ w, "x"),
    "exchange": lambda a, w: lax.all_to_all(on_y(a @ w), "x", 1, 0, tiled=True)[:4] @ w[:, :6].T,
    "exchange of two": lambda a, w: lax.all_to_all(on_y(a, 0)[None], "x", 1, 0, tiled=True)[0],
    "gather": lambda a, w: lax.all_gather(on_y(a @ w), "x", axis=1, tiled=True) * w[0, 0],
    "scatter": lambda a, w: lax.psum_scatter(on_y(a @ w), "x", scatter_dimension=1, tiled=True),
    "sort": lambda a, w: jnp.sort(a, 1) + jnp.argmax(a @ w, 0)[:8],
    "index": lambda a, w: a.at[jnp.array([0, 1])].add(w[0, :8])[jnp.array([1, 0, 1])],
    "random": lambda a, w: a + jax.random.normal(
        jax.random.fold_in(jax.random.key(0), lax.axis_index("x")), a.shape
    ),
    "loop": lambda a, w: lax.fori_loop(0, 3, lambda i, c: c + lax.psum(jnp.sin(c), "x") / 9, a),
    "scan": lambda a, w: lax.scan(
        lambda c, r: (c + lax.ppermute(c, "x", [(0, 1), (1, 0)]), r * c), a[0], a
    )[1],
    "while": lambda a, w: lax.while_loop(
        lambda c: lax.psum(jnp.abs(c).sum(), "x") > 1e-2, lambda c: c * 0.5, a
    ),
    "while: vmapped": jax.vmap(
        lambda r, w: lax.while_loop(
            lambda c: lax.psum(jnp.abs(c).sum(), "x") > 1, lambda c: c * 0.5, r
        ),
        in_axes=(0, None),
    ),
    "branch": lambda a, w: lax.cond(
        lax.axis_index("x") == 0, lambda c: c * 2, lambda c: c + jnp.sort(c, 0), a
    ),
    "call": lambda a, w: jax.jit(lambda a: lax.pmean(a, "x") + a)(a),
    "remat": lambda a, w: jax.grad(
        lambda a: jax.checkpoint(lambda a: jnp.sin(a) * lax.psum(jnp.cos(a), "x"))(a).sum()
    )(a),
    "solve": lambda a, w: jax.scipy.sparse.linalg.cg(lambda v: v * 3 + a @ (a.T @ v), a)[0],
    "high-level primitive": lambda a, w: jnp.frexp(a)[0],
    "annotation": lambda a, w: shard(a * 2, None, "y") @ w,
}  # fmt: skip


# With check_vma JAX itself refuses branches that vary over different axes.
CHECKED = [(name, vma) for name in REGIONS for vma in (True, False) if name != "branch" or not vma]


@pytest.mark.parametrize(("name", "check_vma"), CHECKED)
def test_partly_manual(name: str, check_vma: bool) -> None:
    """Manual over x; y is the partitioner's, outside and inside of the body."""
    f = mapped(REGIONS[name], (P("x"), P()), P("x"), ONE, check_vma=check_vma)
    made = agrees(
        lambda a, w: f(jnp.sin(a), w), arr(8, 8), arr(8, 12), specs=(P("x", "y"), P("y"))
    )
    body = next(op for op in made.plan.program.body.ops if op.primitive.name == "shard_map")
    assert any(
        "y" in axes
        for instruction, _ in made.plan.body.walk()
        for key in getattr(instruction, "operands", ())
        if key.value in body.regions[0].inputs
        for axes in key.layout.dims
    ), "y does nothing inside"


@pytest.mark.parametrize("name", ["sort", "loop", "branch", "solve", "high-level primitive"])
def test_fully_manual(name: str) -> None:
    f = mapped(REGIONS[name], (P("x"), P()), P("x"), check_vma=False)
    agrees(lambda a, w: f(jnp.sin(a), w), arr(8, 8), arr(8, 12), specs=(P("x", "y"), None))


def test_uneven_dims_of_a_partly_manual_body() -> None:
    """6 local rows over 4 shards are padded inside; they enter and leave whole."""
    f = mapped(lambda a: jnp.tanh(shard(a * 2, "y")).cumsum(0), P("x"), P("x"), ONE)
    made = agrees(f, arr(12, 5), specs=(P("x"),))
    assert all(c.axes == ("y",) for c in made.collectives)
    g = mapped(lambda a: shard(jnp.tanh(shard(a, "y")), "y"), P("x"), P("x"), ONE)
    agrees(g, arr(12, 5), specs=(P("x"),))


def test_nested() -> None:
    def inner(z: Any) -> Any:
        return z - lax.pmean(z, "y")

    def outer(a: Any, w: Any) -> Any:
        spec = P(None, "y")
        z = jax.shard_map(inner, in_specs=spec, out_specs=spec, axis_names={"y"})(jnp.sin(a) @ w)
        return z + lax.psum(z, "x")

    made = agrees(mapped(outer, (P("x"), P()), P("x"), ONE), arr(8, 8), arr(8, 12))
    assert kinds(made)["all_reduce", ("x",)][0] == 1


@pytest.mark.parametrize("axes", [BOTH, ONE])
def test_collectives_that_a_cpu_has_not(axes: frozenset[str]) -> None:
    """Planned at local shapes; where y is free, rows stay sharded over it."""

    def body(a: Any) -> Any:
        at, two = jnp.array([0, 2], jnp.int32), jnp.full(2, 2, jnp.int32)
        a = lax.pbroadcast(a, "x", 0)
        return lax.ragged_all_to_all(a, a * 0, at, two, at, two, axis_name="x")

    f = spmd.jit(mapped(body, P("x"), P("x"), axes, check_vma=False), mesh=MESH)
    placed = jax.device_put(arr(8, 8), jax.NamedSharding(MESH, P("x", "y")))
    made = f.trace(placed).propagate().partition()
    local = "f32[4,2]" if axes == ONE else "f32[4,8]"
    for name in ("pbroadcast[", "ragged_all_to_all["):
        line = next(t for t in str(made.jaxpr).splitlines() if name in t)
        assert local in line


@pytest.mark.parametrize("axes", [BOTH, ONE])
def test_callbacks_happen_per_manual_shard(axes: frozenset[str]) -> None:
    seen: list[float] = []

    def body(a: Any) -> Any:
        jax.debug.callback(lambda x: seen.append(float(x.sum())), a)
        return a * 2

    a = arr(8, 8)
    spmd.jit(mapped(body, P("x"), P("x"), axes), mesh=MESH, in_shardings=P("x", "y"))(a)
    jax.effects_barrier()
    want = sorted([float(a[:4].sum()), float(a[4:].sum())] * (1 if axes == ONE else 4))
    np.testing.assert_allclose(sorted(seen), want, 1e-5)


def test_kernels_run_as_they_are_where_all_axes_are_manual() -> None:
    def kernel(x: Any, y: Any) -> None:
        y[...] = x[...] * lax.axis_index("x")

    call = pallas.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct((4, 2), jnp.float32), interpret=True
    )
    f = mapped(call, P("x", "y"), P("x", "y"), check_vma=False)
    agrees(f, arr(8, 8))
    with pytest.raises(RuleError, match="pallas_call"):
        partly = mapped(lambda a: call(a[:, :2]), P("x"), P("x"), ONE, check_vma=False)
        spmd.jit(partly, mesh=MESH)(arr(8, 8))


def test_axes_that_are_split_elsewhere() -> None:
    """A reshape splits y into sub-axes; collectives over y use both."""

    def body(a: Any) -> Any:
        ring = lax.ppermute(a, "y", [(i, (i + 1) % 4) for i in range(4)])
        return a * lax.axis_index("y") + lax.psum(a, "y") + ring + lax.all_gather(a, "y").sum(0)

    def f(a: Any) -> Any:
        return a.reshape(2, 8, 8).transpose(1, 0, 2) + 1, mapped(body, P("y"), P("y"))(a)

    made = agrees(f, arr(16, 8), specs=(P("y"),))
    assert made.plan.mesh.names == ("x", "y:(1)2", "y:(2)2")


def loss(a: Any, w: Any) -> Any:
    f = mapped(lambda a, w: lax.psum(a @ w, "y"), (P("x", "y"), P("y")), P("x"), check_vma=False)
    return (f(jnp.sin(a), w) ** 2).sum()


def partly(a: Any, w: Any) -> Any:
    f = mapped(lambda a, w: lax.psum((jnp.sin(a) @ w) ** 2, "x"), (P("x"), P()), P(), ONE)
    return f(a, w).sum()


DERIVED: dict[str, Callable] = {
    "grad": jax.grad(lambda a, w: (row_parallel(a, w) ** 2).sum(), (0, 1)),
    "grad: vma unchecked": jax.grad(loss, (0, 1)),
    "grad: partly manual": jax.value_and_grad(partly, (0, 1)),
    "grad: unmentioned scalar": jax.grad(
        lambda a, w: mapped(lambda a, s: lax.psum(a * s, "y"), (P("x", "y"), P()), P("x"))(
            a, w.sum()
        ).sum(),
        (0, 1),
    ),
    "jvp": lambda a, w: jax.jvp(row_parallel, (a, w), (a, w)),
    "vjp": lambda a, w: jax.vjp(row_parallel, a, w)[1](row_parallel(a, w)),
    "hessian": lambda a, w: jax.hessian(
        lambda v: mapped(lambda v: lax.psum((v**3).sum(), "x"), P("x"), P(), ONE)(v)
    )(a[0]),
    "scan, remat": jax.value_and_grad(
        lambda a, w: lax.scan(
            lambda c, _: (jax.checkpoint(row_parallel)(c, w) / 3, None), a, length=2
        )[0].sum(),
        (0, 1),
    ),
    "vmap": lambda a, w: jax.vmap(row_parallel, in_axes=(0, None))(jnp.stack([a, a + 1]), w),
    "vmap: spmd_axis_name": lambda a, w: jax.vmap(
        mapped(lambda a: a / (3 + lax.psum(a, "y")), P(None, "y"), P(None, "y")),
        spmd_axis_name="x",
    )(jnp.stack([a, w])),
    "cond": lambda a, w: lax.cond(a.sum() > 0, row_parallel, lambda a, w: a, a, w),
}  # fmt: skip


@pytest.mark.parametrize("name", DERIVED)
def test_transformations(name: str) -> None:
    agrees(DERIVED[name], arr(8, 8), arr(8, 8), specs=(P("x"), P("y")))


@pytest.mark.parametrize("name", ["grad", "vmap", "jvp"])
def test_transformations_of_the_program(name: str) -> None:
    f = spmd.jit(row_parallel, mesh=MESH)
    args = arr(8, 8), arr(8, 8)
    of = {
        "grad": lambda f: jax.jit(jax.grad(lambda a, w: (f(a, w) ** 2).sum(), (0, 1))),
        "vmap": lambda f: lambda a, w: jax.vmap(f, in_axes=(0, None))(jnp.stack([a, w]), w),
        "jvp": lambda f: lambda a, w: jax.jvp(f, (a, w), (w, a)),
    }[name]
    for got, want in zip(*(jax.tree.leaves(of(g)(*args)) for g in (f, row_parallel)), strict=True):
        np.testing.assert_allclose(got, want, 1e-4, 1e-5)


def test_mesh_from_the_context() -> None:
    plain = partial(jax.shard_map, in_specs=P("x"), out_specs=P())
    f = lambda a: plain(lambda a: lax.psum(a, "x"))(a)  # noqa: E731
    a = arr(8, 4)
    explicit = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    for mesh in (MESH, explicit):
        np.testing.assert_allclose(spmd.jit(f, mesh=mesh)(a), a[:4] + a[4:], 1e-6)
    with jax.set_mesh(MESH):
        np.testing.assert_allclose(spmd.jit(f)(a), a[:4] + a[4:], 1e-6)


def test_program_inside_of_a_shard_map() -> None:
    inner = spmd.jit(lambda a: jnp.sin(a) @ a.T, mesh=MESH)
    for axes in (BOTH, ONE):
        f = mapped(inner, P("x"), P("x"), axes)
        a = arr(8, 6)
        want = np.concatenate([np.sin(b) @ b.T for b in (a[:4], a[4:])])
        np.testing.assert_allclose(jax.jit(f)(a), want, 1e-5)
        np.testing.assert_allclose(spmd.jit(f, mesh=MESH)(a), want, 1e-5)


def test_another_mesh_is_an_error() -> None:
    f = mapped(lambda a: lax.psum(a, "x"), P("x"), P())
    other = make_mesh(x=4, y=2)
    with pytest.raises(MeshError, match="leave mesh out of the shard_map"):
        spmd.jit(f, mesh=other)(arr(8, 4))
    program = build(jax.make_jaxpr(f)(arr(8, 4)))
    with pytest.raises(MeshError, match="over the mesh x=2, y=4"):
        annotations_in(program, MeshShape.of(other), ())


def test_annotation_with_a_manual_axis_is_an_error() -> None:
    f = mapped(lambda a: shard(a, "x"), P("x"), P("x"), ONE)
    with pytest.raises(SpecError, match=r"names x\n.*manual over x: arrays are local there"):
        spmd.jit(f, mesh=MESH)(arr(8, 4))
