"""`spmd.jit` as `jax.jit`: where arguments and results lie, on which mesh, in which memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

import spmd
from sharding import ArgumentError, MeshError, P, SpecError, shard
from sharding.errors import GatherError
from tests.e2e.dropin_case import MESH, X, both, named, on_mesh
from tests.oracle import assert_close, make_mesh

EXPLICIT = jax.make_mesh((2, 4), ("data", "tensor"))


def message(error: type[Exception], action) -> str:
    with pytest.raises(error) as caught:
        action()
    return str(caught.value)


@both
def test_arguments_that_nobody_placed_are_moved(jit) -> None:
    function = jit(lambda x, y: x + y, in_shardings=named("data"), out_shardings=named("data"))
    for x in (X, np.asarray(X), jax.device_put(X, named("data")), jnp.copy(X)):
        for _ in range(2):
            got = function(x, np.asarray(X))
            assert_close(got, 2 * X, 0, "moved")
            assert got.sharding == named("data") and got.committed
    assert_close(jit(lambda s, x: s * x)(2.0, jax.device_put(X, named("data"))), 2 * X, 0, "scalar")


@both
def test_arguments_that_somebody_placed_elsewhere_are_an_error(jit) -> None:
    on_mesh_of_eight = jax.device_put(X, named("data"))
    alone = jax.device_put(X, jax.devices()[5])
    small = jax.device_put(X, NamedSharding(make_mesh(data=2), P("data")))
    backwards = Mesh(MESH.devices.reshape(-1)[::-1].reshape(2, 4), MESH.axis_names)
    for other in (alone, small, jax.device_put(X, NamedSharding(backwards, P("data")))):
        function = jit(lambda x, y: x + y)
        for call in (function, function.lower):
            with pytest.raises(ValueError):
                call(on_mesh_of_eight, other)
    function = jit(lambda x: x * 2, in_shardings=named("data"))
    for call in (function, function.lower):
        with pytest.raises(ValueError):
            call(jax.device_put(X, named(None, "tensor")))


def test_devices_in_another_order_are_named() -> None:
    backwards = Mesh(MESH.devices.reshape(-1)[::-1].reshape(2, 4), MESH.axis_names)
    x = jax.device_put(X, NamedSharding(backwards, P("data")))
    assert message(MeshError, lambda: on_mesh(lambda x: x + 1)(x)) == (
        "x lies on devices 0, 1, 2, 3, 4, 5, 6, 7 in another order, committed\n"
        "  why: the mesh data=2, tensor=4 has the devices 0, 1, 2, 3, 4, 5, 6, 7 in its own order\n"
        "  fix: put x on the mesh with jax.device_put(x, NamedSharding(mesh, P(...))), or make the "
        "mesh from the devices of the arguments"
    )


def test_shardings_of_another_mesh_are_an_error_and_not_read_by_their_names() -> None:
    backwards = Mesh(MESH.devices.reshape(-1)[::-1].reshape(2, 4), MESH.axis_names)
    turned = make_mesh(data=4, tensor=2)
    function = on_mesh(
        lambda x, y: x + y,
        in_shardings=(NamedSharding(backwards, P("data")), SingleDeviceSharding(jax.devices()[3])),
        out_shardings=NamedSharding(turned, P("data")),
    )
    assert message(SpecError, lambda: function(X, X)) == (
        "2 problems\n"
        "(1) in_shardings of x is a sharding over the mesh data=2, tensor=4 of devices 7, 6, 5, 4, "
        "3, 2, 1, 0 (and 1 more like it)\n"
        "  why: spmd.jit runs over the mesh data=2, tensor=4 of devices 0, 1, 2, 3, 4, 5, 6, 7: "
        "one program runs on one list of devices\n"
        "  fix: make the shardings from the mesh that spmd.jit is given, or write P('data') "
        "without a mesh\n"
        "(2) in_shardings of y is a sharding over device 3\n"
        "  why: spmd.jit runs over the mesh data=2, tensor=4 of devices 0, 1, 2, 3, 4, 5, 6, 7: "
        "one program runs on one list of devices\n"
        "  fix: give a PartitionSpec, or a NamedSharding of the mesh"
    )
    turned_out = on_mesh(lambda x: x, out_shardings=NamedSharding(turned, P("data")))
    assert "out_shardings of result is a sharding over the mesh data=4, tensor=2" in message(
        SpecError, lambda: turned_out(X)
    )
    same = NamedSharding(Mesh(MESH.devices, MESH.axis_names), P("data"))
    assert on_mesh(lambda x: x, in_shardings=same)(X).sharding == named("data")
    partial = on_mesh(lambda x: x, out_shardings=P("data", unreduced={"tensor"}))
    assert "out_shardings of result is P('data', unreduced={'tensor'}" in message(
        SpecError, lambda: partial(X)
    )


@pytest.mark.parametrize("jit", [jax.jit, spmd.jit], ids=["jax.jit", "spmd.jit"])
def test_the_mesh_is_that_of_shardings_of_the_context_or_of_arguments(jit) -> None:
    assert jit(lambda x: x + 1, in_shardings=named("data"))(X).sharding == named("data")
    assert jit(lambda x: x + 1, out_shardings=named("data"))(X).sharding == named("data")
    small = make_mesh(data=4)
    with jax.set_mesh(small):
        got = jit(lambda x: x + 1, in_shardings=P("data"))(X)
        assert got.sharding == NamedSharding(small, P("data"))
    with jax.set_mesh(MESH):
        function = jit(lambda x: jax.lax.with_sharding_constraint(x + 1, P(None, "tensor")))
        assert function(X).sharding.is_equivalent_to(named(None, "tensor"), 2)
    placed = jax.device_put(X, named("data"))
    assert jit(lambda x: x + 1)(placed).sharding == named("data")


def test_one_function_under_several_meshes() -> None:
    traces = []

    @spmd.jit
    def f(x):
        traces.append(1)
        return shard(x, "data") + 1

    meshes = [make_mesh(data=2), make_mesh(data=8), MESH]
    for mesh in [*meshes, *meshes]:
        with jax.set_mesh(mesh):
            assert f(X).sharding == NamedSharding(mesh, P("data"))
    assert len(traces) == 3 and f._cache_size() == 0 + 3
    assert "spmd.jit has no mesh" in message(MeshError, lambda: f(X))


@both
def test_out_shardings_say_where_results_lie_and_none_leaves_it_open(jit) -> None:
    def f(x):
        return {"a": x * 2, "b": x.T, "c": x.sum()}

    shardings = {"a": named(None, "tensor"), "b": None, "c": named()}
    got = jit(f, in_shardings=named("data"), out_shardings=shardings)(X)
    assert got["a"].sharding == named(None, "tensor")
    assert got["b"].sharding.is_equivalent_to(named(None, "data"), 2)
    free = jit(f, in_shardings=named("data"), out_shardings={**shardings, "b": None})
    assert_close(free(X)["b"], X.T, 0, "free")
    row = jit(lambda x: x * 2, in_shardings=named("data"), out_shardings=named("data", None))(X)
    assert row.sharding.spec in (P("data"), P("data", None))


def test_unconstrained_dims_at_the_boundary_are_inferred() -> None:
    function = on_mesh(
        lambda x: x * 2, in_shardings=P("data", P.UNCONSTRAINED),
        out_shardings=P(P.UNCONSTRAINED, "tensor"),
    )  # fmt: skip
    assert function(X).sharding == named("data", "tensor")


@both
def test_arguments_that_are_results_are_forwarded(jit) -> None:
    x = jax.device_put(X, named("data"))
    same, twice, (again,) = jit(lambda x: (x, x, [x]))(x)
    for got in (same, twice, again):
        assert got.sharding == x.sharding
        assert_close(got, X, 0, "forwarded")
    y, z = jit(lambda x, y: (y, x))(x, jax.device_put(X + 1, named(None, "tensor")))
    assert (y.sharding, z.sharding) == (named(None, "tensor"), named("data"))
    moved = jit(lambda x: x, out_shardings=named(None, "tensor"))(x)
    assert moved.sharding == named(None, "tensor")
    constant, made = jit(lambda x: (3.0, jnp.zeros(8)))(x)
    assert constant == 3 and made.shape == (8,)


def test_all_that_does_not_fit_is_said_at_once() -> None:
    function = on_mesh(
        lambda x, y, z: (x, y + z),
        in_shardings=(P("dta"), P("data", "data"), P(None, None, "data")),
        out_shardings=(P("tensr"), None),
    )
    text = message(SpecError, lambda: function(X, X, X))
    assert text.startswith("4 problems\n")
    for part in ("x names axis 'dta'", "uses axis 'data' twice", "3 entries", "axis 'tensr'"):
        assert part in text, part


@both
def test_uneven_arguments_placed_on_purpose(jit) -> None:
    with pytest.raises(ValueError):
        jax.device_put(jnp.ones(7), named("data"))
    assert_close(jit(lambda x: x * 2)(jnp.ones(7)), 2 * jnp.ones(7), 0, "uneven, not placed")


def test_a_mesh_of_explicit_axes_is_the_mesh_of_the_results() -> None:
    """`jax.make_mesh` makes Explicit axes where it is not told."""
    sharding = NamedSharding(EXPLICIT, P("data"))
    for jit in (jax.jit, lambda f, **o: spmd.jit(f, mesh=EXPLICIT, **o)):
        placed = jax.device_put(X, sharding)
        got = jit(lambda x: jnp.sin(x) * 2)(placed)
        assert got.sharding.is_equivalent_to(sharding, 2) and got.sharding.mesh == EXPLICIT
        assert jax.typeof(got).sharding.spec == P("data", None)
        assert_close(got + placed, jnp.sin(X) * 2 + X, 1e-6, "mixes with others of that mesh")
        for _ in range(2):
            got = jit(lambda x: x * 2, in_shardings=sharding, out_shardings=sharding)(X)
            assert got.sharding == sharding
    compiled = spmd.jit(lambda x: x, mesh=EXPLICIT, in_shardings=P("data")).lower(X).compile()
    assert compiled.in_shardings == (sharding,) == compiled.input_shardings[0]
    # What Explicit axes call ambiguous, inference decides.
    with jax.set_mesh(EXPLICIT):
        w = jax.device_put(jnp.ones((16, 16)), NamedSharding(EXPLICIT, P("tensor")))
        got = spmd.jit(lambda x, w: x @ w)(jax.device_put(X, sharding), w)
    assert_close(got, X @ jnp.ones((16, 16)), 1e-5, "contracted over a sharded dim")


@pytest.mark.parametrize("jit", [jax.jit, spmd.jit], ids=["jax.jit", "spmd.jit"])
def test_programs_that_only_explicit_axes_understand(jit) -> None:
    seen = []

    def f(x, w):
        seen.append(jax.typeof(x).sharding.spec)
        y = jax.sharding.reshard(x, P(None, "data"))
        z = jnp.einsum("ij,jk->ik", y, w, out_sharding=P("data", "tensor"))
        made = jnp.ones((8, 16), out_sharding=P("data", "tensor"))
        seen.append(jax.typeof(z).sharding.spec)
        return z + made

    with jax.set_mesh(EXPLICIT):
        x = jax.device_put(X, NamedSharding(EXPLICIT, P("data")))
        w = jax.device_put(jnp.ones((16, 16)), NamedSharding(EXPLICIT, P("data", "tensor")))
        function = jit(f)
        for _ in range(2):
            got = function(x, w)
            assert_close(got, X @ jnp.ones((16, 16)) + 1, 1e-5, "value")
            assert got.sharding == NamedSharding(EXPLICIT, P("data", "tensor"))
    assert seen[-2:] == [P("data", None), P("data", "tensor")]


def test_explicit_axes_inside_of_control_flow_and_gradients() -> None:
    def loss(w, x):
        def body(h, _):
            h = jnp.einsum("ij,jk->ik", h, w, out_sharding=P("data"))
            return jnp.tanh(h), h.sum()

        h, sums = jax.lax.scan(body, jax.sharding.reshard(x, P("data")), None, length=3)
        return (h**2).sum() + sums.sum()

    w = jnp.eye(16) / 2
    with jax.set_mesh(EXPLICIT):
        for f in (loss, jax.grad(loss)):
            assert_close(spmd.jit(f)(w, X), jax.jit(f)(w, X), 1e-5, "explicit")


@both
def test_constraints_with_the_mesh_and_inside_of_a_context(jit) -> None:
    def f(x):
        x = jax.lax.with_sharding_constraint(x, named("data"))
        return jax.lax.with_sharding_constraint(x + 1, named(P.UNCONSTRAINED, "tensor"))

    got = jit(f)(X)
    assert_close(got, X + 1, 0, "value")
    assert got.sharding.is_equivalent_to(named("data", "tensor"), 2)


@both
def test_memory_kinds_of_arguments_and_results(jit) -> None:
    host, device = named("data", memory_kind="pinned_host"), named("data")
    x = jax.device_put(X, host)
    fetch = lambda x: jax.device_put(x, jax.memory.Space.Device) * 2  # noqa: E731
    for options in ({}, dict(in_shardings=host)):
        function = jit(fetch, **options)
        for _ in range(2):
            got = function(x)
            assert_close(got, 2 * X, 0, "fetched")
            assert got.sharding.memory_kind == "device"
        assert function.lower(x).compile().input_shardings[0][0].memory_kind == "pinned_host"
    got = jit(lambda x: x * 2, in_shardings=device, out_shardings=host)(X)
    assert got.sharding == host
    offload = jit(lambda x: jax.device_put(x + 1, host))
    assert offload(jax.device_put(X, device)).sharding.memory_kind == "pinned_host"
    inside = jit(lambda x: jax.device_put(jax.device_put(x + 1, host), device) * 2)
    assert_close(inside(jax.device_put(X, device)), 2 * (X + 1), 0, "to the host and back")
    with pytest.raises(ValueError, match="memory"):
        jit(lambda x: x, in_shardings=device)(x)
    keep = jit(lambda x: x)
    for sharding in (host, device, host, device):
        assert keep(jax.device_put(X, sharding)).sharding == sharding


@both
def test_placing_several_values_inside(jit) -> None:
    def f(x, y):
        return jax.device_put((x + 1, y * 2), (named("data"), named(None, "tensor")))

    a, b = jit(f)(jax.device_put(X, named()), X)
    assert_close(a, X + 1, 0, "first")
    assert_close(b, X * 2, 0, "second")
    if jit is on_mesh:  # jax.jit keeps the first where its argument lies
        assert (a.sharding, b.sharding) == (named("data"), named(None, "tensor"))


@both
def test_default_device_does_not_move_a_program_of_a_mesh(jit) -> None:
    with jax.default_device(jax.devices()[3]):
        x = jnp.arange(8.0)
        assert x.devices() == {jax.devices()[3]}
        got = jit(lambda x: x + 1, in_shardings=named("data"))(x)
    assert got.sharding == named("data")


def test_devices_and_backends_are_those_of_the_mesh() -> None:
    for options in (dict(device=jax.devices()[1]), dict(backend="cpu")):
        text = message(ArgumentError, lambda options=options: on_mesh(jnp.sin, **options))
        assert text.endswith(
            "  why: the devices of a partitioned program are those of its mesh\n"
            "  fix: make the mesh from them: jax.make_mesh(sizes, names, devices=...)"
        )


def test_gathers_can_be_forbidden_and_all_are_listed() -> None:
    def f(x):
        return jnp.linalg.cholesky(x), jnp.fft.fft(x.astype(jnp.complex64))

    x = jnp.eye(16)
    planned = on_mesh(f, in_shardings=P("data"))
    assert planned(x)[0].shape == (16, 16)
    diagnostics = planned.trace(x).propagate().partition().diagnostics
    gathers = [d for d in diagnostics if d.kind == "gather"]
    assert len(gathers) == 1
    function = on_mesh(f, in_shardings=P(None, "data"), on_gather="error")
    line = f.__code__.co_firstlineno + 1
    at = f"e2e/test_dropin_placement.py:{line} ({f.__qualname__})"
    assert message(GatherError, lambda: function(x)) == (
        "2 problems\n"
        f"(1) result of div at {at}: cholesky needs dim 1 (of 16) whole: gathered over data, 512 B "
        "per device\n"
        '  why: on_gather="error" lets no operation gather a sharded dim\n'
        "  fix: keep it whole from the start, or accept this with on_gather='plan'\n"
        f"(2) result of convert_element_type at {at}: fft needs dim 1 (of 16) whole: gathered over "
        "data, 1,024 B per device\n"
        '  why: on_gather="error" lets no operation gather a sharded dim\n'
        "  fix: shard dim 0 (of 16) instead, along which it runs in parts"
    )
    fine = on_mesh(lambda x: x @ x, in_shardings=P("data"), on_gather="error")
    assert_close(fine(x), x, 0, "contractions are no gathers of this kind")
    assert message(ArgumentError, lambda: on_mesh(f, on_gather="warn")) == (
        "on_gather='warn'\n"
        "  why: a dim that an operation needs whole is either gathered by plan or an error\n"
        '  fix: use on_gather="plan" or on_gather="error"'
    )
