"""`spmd.jit` as `jax.jit`: static and keyword arguments, pytrees, decorators, errors of types."""

import dataclasses
import functools
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spmd
from sharding import ArgumentError, P, SpmdError
from tests.e2e.dropin_case import X, both, named, on_mesh
from tests.oracle import assert_close


def message(error: type[Exception], action) -> str:
    with pytest.raises(error) as caught:
        action()
    return str(caught.value)


@both
def test_static_arguments_by_number_name_default_and_from_the_end(jit) -> None:
    def f(x, power=2, *, shift=0):
        assert isinstance(power, int) and isinstance(shift, int)
        return x**power + shift

    by_name = jit(f, static_argnames=("power", "shift"))
    assert_close(by_name(X), X**2, 1e-6, "defaults")
    assert_close(by_name(X, 3), X**3, 1e-6, "a name covers the position")
    assert_close(by_name(X, power=3, shift=1), X**3 + 1, 1e-6, "by keyword")
    both_ways = jit(f, static_argnums=1, static_argnames=("power", "shift"))
    assert_close(both_ways(X, power=3), X**3, 1e-6, "positional parameter passed by keyword")
    last = jit(lambda x, y, n: x * n + y, static_argnums=-1)
    assert_close(last(X, X, 3), 4 * X, 1e-6, "negative position")
    first = jit(lambda n, x: x * n, static_argnums=0)
    assert_close(first(3, X), 3 * X, 1e-6, "first")
    scattered = jit(lambda a, x, b, y: (x * a, y * b), static_argnums=(0, 2))
    assert_close(scattered(2, X, 3, X)[1], 3 * X, 1e-6, "two")
    number_to_name = jit(lambda x, n: x * n, static_argnums=1)
    assert_close(number_to_name(X, n=3), 3 * X, 1e-6, "a number covers the keyword")


@both
def test_static_arguments_are_compared_by_type_hash_and_equality(jit) -> None:
    class Config:
        def __init__(self, scale):
            self.scale = scale

        def __hash__(self):
            return hash(self.scale)

        def __eq__(self, other):
            return isinstance(other, Config) and self.scale == other.scale

    traced = []

    def f(x, config):
        traced.append(config)
        return x * getattr(config, "scale", config)

    function = jit(f, static_argnums=1)
    for config, count in [(Config(2), 1), (Config(2), 1), (Config(3), 2), (2, 3), (2.0, 4)]:
        function(X, config)
        assert len(traced) == count, config
    assert function(jnp.arange(8), 2).dtype == jnp.int32
    assert function(jnp.arange(8), 2.0).dtype == jnp.float32


@both
def test_static_arguments_of_methods(jit) -> None:
    class Model:
        def __init__(self, scale):
            self.scale = scale

        @functools.partial(jit, static_argnums=0)
        def apply(self, x):
            return x * self.scale

        @functools.partial(jit, static_argnames=("self", "n"))
        def power(self, x, n=2):
            return x**n

        @staticmethod
        @jit
        def double(x):
            return 2 * x

        @classmethod
        @functools.partial(jit, static_argnums=0)
        def named(cls, x):
            return x * len(cls.__name__)

    assert_close(Model(2).apply(X), 2 * X, 0, "method")
    assert_close(Model(3).apply(X), 3 * X, 0, "another instance")
    assert_close(Model(3).power(X, n=3), X**3, 1e-6, "keyword")
    assert_close(Model.double(X), 2 * X, 0, "static method")
    assert_close(Model.named(X), 5 * X, 0, "class method")
    bound = jit(Model(4).apply)
    assert_close(bound(X), 4 * X, 0, "bound method")


def test_a_static_argument_that_cannot_be_hashed() -> None:
    for jit, error in ((jax.jit, ValueError), (on_mesh, ArgumentError)):
        function = jit(lambda x, s: x, static_argnums=1)
        for call in (function, function.lower):
            with pytest.raises(error):
                call(X, [1])
    assert message(ArgumentError, lambda: function(X, [1])) == (
        "static argument 1 is [1], a list\n"
        "  why: a static argument is part of what a program is compiled for, and must be hashable\n"
        "  fix: pass a tuple, a string, a number or a frozen object, or do not make it static"
    )
    with pytest.raises(ValueError, match="from inside"):  # other errors are left alone
        on_mesh(lambda x, s: _fail(), static_argnums=1)(X, 1)


def _fail():
    raise ValueError("from inside")


@both
def test_argument_numbers_and_names_are_checked_against_the_signature(jit) -> None:
    for options in (
        dict(static_argnums=5), dict(static_argnames="z"), dict(donate_argnums=5),
        dict(donate_argnames="z"), dict(static_argnames="y", donate_argnums=1),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            jit(lambda x, y: x, **options)


class Point(NamedTuple):
    x: jax.Array
    y: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Box:
    value: jax.Array
    label: str = dataclasses.field(default="none", metadata={"static": True})


@both
def test_pytrees_and_none_leaves_in_and_out(jit) -> None:
    def f(tree, *rest, point, **more):
        assert tree["none"] is None and more["extra"] is None
        return {"sum": tree["a"] + rest[0][0] + point.y, "none": None, "point": point, "empty": ()}

    function = jit(f)
    got = function({"a": X, "none": None}, [X, ()], point=Point(X, 2 * X), extra=None)
    assert got["none"] is None and got["empty"] == () and isinstance(got["point"], Point)
    assert_close(got["sum"], 4 * X, 1e-6, "sum")
    boxed = jit(lambda box: Box(box.value + 1, box.label + "!"))
    assert_close(boxed(Box(X, "a")).value, X + 1, 0, "dataclass")
    assert [boxed(Box(X, label)).label for label in "ab"] == ["a!", "b!"]
    assert jit(lambda: None)() is None
    assert jit(lambda x: None)(X) is None
    assert_close(jit(lambda: X + 1)(), X + 1, 0, "no arguments")


def test_shardings_are_pytree_prefixes() -> None:
    def f(params, x):
        return {"y": x @ params["layer"]["w"] + params["layer"]["b"], "loss": x.sum()}

    params = {"layer": {"w": jnp.ones((16, 8)), "b": jnp.ones(8)}}
    out = dict(y=named("data"), loss=named())
    for prefix in (
        (named(), named("data")),
        ({"layer": named()}, named("data")),
        ({"layer": {"w": named(None, "tensor"), "b": None}}, None),
        [named(), named("data")],
        None,
    ):
        got = {
            jit: jit(f, in_shardings=prefix, out_shardings=out)(params, X)
            for jit in (jax.jit, on_mesh)
        }
        for key in out:
            assert_close(got[on_mesh][key], got[jax.jit][key], 1e-5, key)
            assert got[on_mesh][key].sharding == got[jax.jit][key].sharding, key
    single = on_mesh(f, in_shardings=P(), out_shardings=P())(params, X)
    assert single["y"].sharding.is_fully_replicated


def test_what_is_wrong_with_the_count_of_shardings_is_said_with_keywords() -> None:
    function = on_mesh(lambda x, y, *more: x + y, in_shardings=(P("data"), P("data")))
    assert message(ArgumentError, lambda: function(X, y=X)) == (
        "in_shardings has 2 entries, and 1 argument came by position (y by keyword)\n"
        "  why: in_shardings says where positional arguments lie, static ones not counted; keyword "
        "arguments are inferred\n"
        "  fix: pass y by position"
    )
    assert message(ArgumentError, lambda: function(X, X, X)) == (
        "in_shardings has 2 entries, and 3 arguments came by position\n"
        "  why: in_shardings says where positional arguments lie, static ones not counted; keyword "
        "arguments are inferred\n"
        "  fix: give in_shardings one entry per positional argument, or one for all of them"
    )
    # jax.jit refuses keyword arguments beside in_shardings; here they are inferred.
    got = on_mesh(lambda x, y: x + y, in_shardings=P("data"))(X, y=X)
    assert_close(got, 2 * X, 0, "keyword beside in_shardings")
    assert got.sharding == named("data")


class Slots:
    __slots__ = ()

    def __call__(self, x):
        return x + 1


UNREFERABLE = Slots()


@both
def test_a_wrapped_function_looks_like_the_function(jit) -> None:
    @jit
    def plain(x: jax.Array, n: int = 2) -> jax.Array:
        """Doc."""
        return x * n

    @jit()
    def factory(x):
        return x

    partial = jit(functools.partial(lambda n, x: x * n, 3))
    assert (plain.__name__, plain.__doc__) == ("plain", "Doc.")
    assert plain.__qualname__.endswith(".plain") and plain.__module__ == __name__
    assert plain.__wrapped__(2) == 4
    assert list(inspect.signature(plain).parameters) == ["x", "n"]
    assert "plain" in repr(plain) and isinstance(repr(partial), str)
    assert_close(factory(X), X, 0, "factory")
    assert_close(partial(X), 3 * X, 0, "partial")
    assert callable(plain) and isinstance(plain, jax.stages.Wrapped)

    class Callable:
        def __call__(self, x):
            return x + 1

    assert_close(jit(Callable())(X), X + 1, 0, "callable object")
    assert_close(jit(jnp.sum)(X), X.sum(), 1e-5, "function of the library")
    assert_close(jit(jax.jit(jnp.sin))(X), jnp.sin(X), 1e-5, "jitted function")
    if jit is on_mesh:  # jax.jit crashes on what cannot be referenced weakly
        assert_close(jit(UNREFERABLE)(X), X + 1, 0, "callable without weak references")
    nested = jit(jit(jnp.sin))
    assert_close(nested(X), jnp.sin(X), 1e-5, "twice")


def test_repr_names_the_function_and_the_mesh() -> None:
    def model(x):
        return x

    assert repr(on_mesh(model)).endswith("<locals>.model over data=2, tensor=4>")
    assert repr(spmd.jit(model)).endswith("<locals>.model over the mesh that is set>")


def _generator(x):
    yield x


@both
def test_what_is_no_function_and_what_is_no_array_is_a_type_error(jit) -> None:
    for fun in (3, "f", (i for i in range(3)), _generator, X, staticmethod(lambda x: x)):
        with pytest.raises(TypeError):
            jit(fun)
    for argument in ("hello", object(), {1, 2}, np.array(["a"]), [X, "a"]):
        for call in (jit(lambda x: x), jit(lambda x: x).lower):
            with pytest.raises(TypeError):
                call(argument)
    with pytest.raises(TypeError, match="not a valid JAX type"):
        jit(lambda x: "text")(X)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'y'"):
        jit(lambda x, y: x)(X)
    with pytest.raises(OverflowError):
        jit(lambda x: x)(2**40)
    with pytest.raises(TypeError):
        jit(lambda x: x)(X, mesh=3)


def test_arguments_of_a_wrong_type_are_named_all_at_once() -> None:
    function = on_mesh(lambda tree, y: tree["a"])
    assert message(TypeError, lambda: function({"a": "x", "b": X}, y={3})) == (
        "2 problems\n"
        "(1) tree['a'] is 'x', a str\n"
        "  why: arguments of a compiled function are arrays, scalars, or pytrees of them\n"
        "  fix: pass an array, make the argument static (static_argnums, static_argnames), or "
        "register its class as a pytree\n"
        "(2) y is {3}, a set\n"
        "  why: arguments of a compiled function are arrays, scalars, or pytrees of them\n"
        "  fix: pass an array, make the argument static (static_argnums, static_argnames), or "
        "register its class as a pytree"
    )
    assert message(TypeError, lambda: on_mesh(3)) == (
        "spmd.jit was given a int\n  why: it compiles functions\n  fix: pass a callable"
    )
    assert message(OverflowError, lambda: function({"a": 2**40}, X)) == (
        "tree['a'] is 1099511627776\n"
        "  why: Python integers become int32 arrays, which cannot hold it\n"
        "  fix: pass a float, make tree['a'] static, or enter jax.enable_x64(True)"
    )
    with pytest.raises(SpmdError):
        on_mesh(lambda x: x)("hello")


@both
def test_values_of_traced_arguments_cannot_be_used_by_python(jit) -> None:
    def branch(flag, x):
        return x if flag else -x

    with pytest.raises(jax.errors.TracerBoolConversionError, match="argument flag") as error:
        jit(branch)(True, X)
    assert "function branch at" in str(error.value)
    with pytest.raises(jax.errors.TracerArrayConversionError):
        jit(lambda x: np.sin(x))(X)
    with pytest.raises(jax.errors.TracerIntegerConversionError):
        jit(lambda x, i: [x][i])(X, 0)
