"""`spmd.jit` as `jax.jit`: donated arguments."""

import jax
import jax.numpy as jnp
import pytest

from sharding import P
from sharding._jax import jit as _jit
from sharding.errors import DonationError
from tests.e2e.dropin_case import X, both, named, on_mesh
from tests.oracle import assert_close


def fresh(*spec) -> jax.Array:
    return jax.device_put(X + 1, named(*spec))


@both
def test_donated_arguments_are_gone_and_others_stay(jit) -> None:
    function = jit(lambda state, x: (state + x, x.sum()), donate_argnums=0)
    for _ in range(3):  # the first call, and those of the fast path
        state, x = fresh("data"), fresh("data")
        out, _ = function(state, x)
        assert state.is_deleted() and not x.is_deleted() and not out.is_deleted()
    if jit is on_mesh or not _jit.BAD_BUFFERS_CRASH:
        with pytest.raises(RuntimeError, match="has been deleted"):
            function(state, x)
    with pytest.raises(RuntimeError, match="has been deleted"):
        state + 1


def test_a_deleted_argument_is_named() -> None:
    function = on_mesh(lambda state, x: {"a": state["a"] + x}, donate_argnums=0)
    state, x = {"a": fresh("data")}, fresh("data")
    compiled = function.lower(state, x).compile()
    function(state, x)
    x.delete()
    for call in (function, compiled, on_mesh(lambda state, x: state["a"] + x)):
        with pytest.raises(DonationError) as error:
            call(state, x)
        assert str(error.value) == (
            "2 problems\n"
            "(1) state['a'], float32[8,16], has been deleted\n"
            "  why: it was donated to an earlier call, whose result took its memory, or deleted by "
            "hand\n"
            "  fix: use the result of that call, or do not donate it\n"
            "(2) x, float32[8,16], has been deleted\n"
            "  why: it was donated to an earlier call, whose result took its memory, or deleted by "
            "hand\n"
            "  fix: use the result of that call, or do not donate it"
        )


@both
def test_donation_by_name_of_keywords_trees_and_beside_static_arguments(jit) -> None:
    function = jit(
        lambda n, params, x: ({k: v * n for k, v in params.items()}, x + 1),
        static_argnums=0, donate_argnames=("params",),
    )  # fmt: skip
    for call in (lambda p, x: function(2, p, x), lambda p, x: function(2, x=x, params=p)):
        params, x = {"a": fresh("data"), "b": fresh()}, fresh()
        out, _ = call(params, x)
        assert params["a"].is_deleted() and params["b"].is_deleted() and not x.is_deleted()
        assert_close(out["a"], 2 * (X + 1), 1e-6, "value")
    both_ways = jit(lambda x, y: (x + 1, y + 1), donate_argnums=1)
    x, y = fresh(), fresh()
    both_ways(x, y=y)
    assert y.is_deleted() and not x.is_deleted()


@both
def test_unusable_donation_is_a_warning(jit) -> None:
    function = jit(lambda x: x.sum(), donate_argnums=0)
    with pytest.warns(UserWarning, match="Some donated buffers were not usable"):
        function(X + 1)


@both
def test_one_array_cannot_be_donated_twice(jit) -> None:
    if jit is jax.jit and _jit.BAD_BUFFERS_CRASH:
        pytest.skip("ends the process with this version of JAX")
    function = jit(lambda x, y: (x + 1, y + 2), donate_argnums=(0, 1))
    x = fresh("data")
    with pytest.raises(RuntimeError, match="donate"):
        function(x, x)


def test_an_array_that_is_donated_twice_is_named() -> None:
    function = on_mesh(lambda a, b: (a["w"] + 1, b + 2), donate_argnums=0)
    x = fresh("data")
    for call in (function, function.lower({"w": x}, x).compile()):
        with pytest.raises(DonationError) as error:
            call({"w": x}, x)
        assert str(error.value) == (
            "a['w'] and b are one array, float32[8,16], and it is donated\n"
            "  why: its memory can be donated once, and nothing else may read it in that call\n"
            "  fix: pass a copy, jnp.copy(b), or do not donate it"
        )
    undonated = on_mesh(lambda a, b, c: a + b + c, donate_argnums=2)
    assert_close(undonated(x, x, fresh("data")), 3 * (X + 1), 0, "shared, not donated")


@both
def test_donation_inside_of_another_function_is_ignored(jit) -> None:
    inner = jit(lambda x: x + 1, donate_argnums=0)
    x = fresh("data")
    outer = jit(lambda x: inner(x) + x)
    assert_close(outer(x), 2 * (X + 1) + 1, 1e-6, "nested")
    assert not x.is_deleted()


def test_donation_under_a_transformation_is_ignored() -> None:
    """jax.jit donates there: the caller of a gradient may lose an array it still needs."""
    x = fresh("data")
    jax.grad(lambda x: on_mesh(lambda x: x + 1, donate_argnums=0)(x).sum())(x)
    assert not x.is_deleted()


def test_donation_saves_memory_and_is_said_by_every_stage() -> None:
    function = on_mesh(lambda s, x: (s + x, x.sum()), donate_argnums=0, in_shardings=P("data"))
    traced = function.trace(X, X)
    lowered = function.lower(X, X)
    compiled = lowered.compile()
    for stage in (traced, lowered, compiled):
        assert stage.donate_argnums == (0,)
        assert [info.donated for info in jax.tree.leaves(stage.args_info)] == [True, False]
    assert compiled.memory_analysis().alias_size_in_bytes >= X.nbytes // 2
    state = fresh("data")
    compiled(state, fresh("data"))
    assert state.is_deleted()


def test_an_argument_that_is_moved_and_donated() -> None:
    """Moved from another mesh over the same devices: the copy is what the program may reuse."""
    function = on_mesh(lambda s: s + 1, donate_argnums=0)
    other = jax.make_mesh((8,), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(X, jax.sharding.NamedSharding(other, P("all")))
    for _ in range(2):
        assert_close(function(x), X + 1, 0, "moved")
    x = jnp.copy(X)  # on one device, uncommitted
    assert_close(function(x), X + 1, 0, "uncommitted")
