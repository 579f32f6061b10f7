"""`spmd.jit` as `jax.jit`: stages, what they tell, and executables made ahead of time."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import serialize_executable
from jax.experimental.layout import Format, Layout

from sharding import ArgumentError, P
from sharding.errors import ArgumentTypeError
from tests.e2e.dropin_case import X, both, named, on_mesh
from tests.oracle import assert_close

PARAMS = {"w": jnp.ones((16, 8)), "b": jnp.zeros(8)}


def f(params, x, n=2, *, scale):
    return {"y": (x @ params["w"] + params["b"]) * n, "sum": x.sum() * scale}


def structs(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


OPTIONS = dict(static_argnums=2, donate_argnames="params")
ignore_unusable = pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")


@ignore_unusable
@both
def test_every_stage_tells_what_that_of_jax_tells(jit) -> None:
    function = jit(f, **OPTIONS)
    args, kwargs = (structs(PARAMS), structs(X), 3), {"scale": 2.0}
    want = jax.jit(f, **OPTIONS).trace(*args, **kwargs)
    traced = function.trace(*args, **kwargs)
    assert traced.fun_name == "f"
    assert [v.aval.str_short() for v in traced.jaxpr.jaxpr.invars] == [
        "float32[8]", "float32[16,8]", "float32[8,16]", "float32[]",
    ]  # fmt: skip
    lowered, theirs = traced.lower(), want.lower()
    for stage, other in ((traced, want), (lowered, theirs), (lowered.compile(), theirs.compile())):
        assert stage.in_tree == other.in_tree and stage.out_tree == other.out_tree
        assert stage.donate_argnums == other.donate_argnums == (0, 1)
        assert jax.tree.structure(stage.args_info) == jax.tree.structure(other.args_info)
        for info, expected in zip(
            jax.tree.leaves(stage.args_info), jax.tree.leaves(other.args_info), strict=True
        ):
            assert (info.shape, info.dtype, info.donated) == (
                expected.shape, expected.dtype, expected.donated,
            )  # fmt: skip
        got, expected = (jax.tree.leaves(s.out_info) for s in (stage, other))
        assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in expected]
        got, expected = (jax.tree.leaves(s.in_avals) for s in (stage, other))
        assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in expected]
    assert jax.tree.structure(traced.out_avals) == jax.tree.structure(want.out_avals)
    info = function.eval_shape(*args, **kwargs)
    assert info["y"].shape == (8, 8) and info["sum"].dtype == jnp.float32


@both
def test_texts_and_analyses_of_lowered_and_compiled(jit) -> None:
    def g(x):
        with jax.named_scope("scope"):
            return jnp.sin(x) @ x.T

    lowered = jit(g).lower(X)
    assert "stablehlo.sine" in lowered.as_text()
    assert "stablehlo" in lowered.as_text("stablehlo")
    assert "HloModule jit_g" in lowered.as_text("hlo")
    assert "scope" in lowered.as_text(debug_info=True) and "scope" not in lowered.as_text()
    assert "sine" in str(lowered.compiler_ir("stablehlo"))
    assert lowered.compiler_ir("hlo") is not None
    assert lowered.cost_analysis()["flops"] > 0
    compiled = lowered.compile()
    assert "HloModule jit_g" in compiled.as_text()
    assert compiled.cost_analysis()["flops"] > 0
    assert compiled.memory_analysis().output_size_in_bytes > 0
    assert compiled.runtime_executable() is not None


def test_shardings_and_formats_of_an_executable() -> None:
    compiled = on_mesh(f, in_shardings=(None, P("data")), static_argnums=2).lower(
        PARAMS, X, 3, scale=2.0
    ).compile()  # fmt: skip
    (params, x), keywords = compiled.input_shardings
    assert x == named("data") and keywords["scale"] == named()
    assert params["w"] == compiled.in_shardings[0]["w"]
    assert compiled.output_shardings["y"] == compiled.out_shardings["y"] == named("data")
    assert compiled.out_info["y"].sharding == named("data")
    (_, x), _ = compiled.input_formats
    assert x.sharding == named("data") and x.layout.major_to_minor == (0, 1)
    assert compiled.output_formats["sum"].sharding == named()
    unused = on_mesh(lambda x, y: x).lower(X, X).compile()
    assert unused.input_shardings == ((named(), None), {})


@both
def test_an_executable_of_described_arguments_is_called_with_real_ones(jit) -> None:
    function = jit(f, static_argnums=2)
    compiled = function.lower(structs(PARAMS), structs(X), 3, scale=2.0).compile()
    for _ in range(2):
        got = compiled(PARAMS, X, scale=2.0)
        assert_close(got["y"], f(PARAMS, X, 3, scale=2.0)["y"], 1e-5, "y")
    duck = type("Duck", (), {"shape": (8, 16), "dtype": np.dtype("float32")})()
    assert jit(jnp.sin).lower(duck).compile()(X).shape == (8, 16)
    shaped = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=named("data"))
    compiled = jit(jnp.sin).lower(shaped).compile()
    assert compiled.input_shardings[0][0].is_equivalent_to(named("data"), 2)
    assert_close(compiled(jax.device_put(X, named("data"))), jnp.sin(X), 1e-5, "sharded")
    assert jit(lambda x: x).lower(np.float64(2)).compile()(np.float64(2)).dtype == jnp.float32


@both
def test_an_executable_rejects_other_arguments(jit) -> None:
    compiled = jit(lambda x, y: x + y["a"]).lower(X, {"a": X}).compile()
    for args in ((X,), (X, X), (X, {"b": X}), (X.astype(int), {"a": X}), (X[:4], {"a": X[:4]})):
        with pytest.raises(TypeError):
            compiled(*args)
    with pytest.raises(TypeError, match="Cannot apply JAX transformations"):
        jax.jit(lambda x: compiled(x, {"a": x}))(X)
    with pytest.raises(ValueError):
        compiled(jax.device_put(X, named(None, ("tensor", "data"))), {"a": X})
    assert_close(compiled(X, {"a": X}), 2 * X, 0, "still works")


def test_what_an_executable_rejects_is_named() -> None:
    compiled = on_mesh(lambda x, y: x + y["a"], in_shardings=P("data")).lower(X, {"a": X}).compile()
    with pytest.raises(ArgumentTypeError) as error:
        compiled(X.astype(int), {"a": X[:4]})
    assert str(error.value) == (
        "2 problems\n"
        "(1) x is int32[8,16]\n"
        "  why: compiled for float32[8,16]; an executable is of fixed types\n"
        "  fix: convert x, or lower and compile for its type\n"
        "(2) y['a'] is float32[4,16]\n"
        "  why: compiled for float32[8,16]; an executable is of fixed types\n"
        "  fix: convert y['a'], or lower and compile for its type"
    )
    with pytest.raises(ArgumentTypeError, match="called with arguments of structure"):
        compiled(X)
    with pytest.raises(ArgumentError) as error:
        compiled(X, {"a": jax.device_put(X, named(None, "tensor"))})
    assert str(error.value) == (
        "y['a'] lies on P(None, 'tensor'), committed\n"
        "  why: compiled for P('data'); an executable takes arguments where it has them\n"
        "  fix: move it with jax.device_put(y['a'], NamedSharding(mesh, P('data'))), or lower and "
        "compile for its sharding"
    )


@both
def test_options_of_the_compiler(jit) -> None:
    options = {"xla_embed_ir_in_executable": True}
    assert_close(jit(jnp.sin, compiler_options=options)(X), jnp.sin(X), 1e-5, "per function")
    lowered = jit(jnp.sin).lower(X)
    assert_close(lowered.compile(options)(X), jnp.sin(X), 1e-5, "per executable")
    assert_close(lowered.compile(compiler_options=options)(X), jnp.sin(X), 1e-5, "by name")
    for bad in (
        lambda: jit(jnp.sin, compiler_options={"no_such_option": 1})(X),
        lambda: jit(jnp.sin).lower(X).compile({"no_such_option": 1}),
    ):
        with pytest.raises(RuntimeError, match="No such compile option"):
            bad()
    inner = jit(lambda x: x + 1, compiler_options=options)
    with pytest.raises(ValueError, match="compiler_options"):
        jit(lambda x: inner(x) + 1)(X)
    with pytest.raises(ValueError, match="compiler_options"):
        jax.jit(lambda x: inner(x) + 1)(X)

@both
def test_layouts_of_arrays_can_be_asked_for(jit) -> None:
    columns = Format(Layout((1, 0)), named("data"))
    compiled = jit(lambda x: x * 2, in_shardings=columns, out_shardings=columns).lower(X).compile()
    assert compiled.input_formats[0][0].layout.major_to_minor == (1, 0)
    assert compiled.output_formats.layout.major_to_minor == (1, 0)
    got = compiled(jax.device_put(X, columns))
    assert got.format.layout.major_to_minor == (1, 0)
    assert_close(got, 2 * X, 0, "value")
    free = Format(Layout.AUTO, named("data"))
    compiled = jit(lambda x: x.T @ x, in_shardings=free).lower(structs(X)).compile()
    (wanted,), _ = compiled.input_formats
    assert_close(compiled(jax.device_put(X, wanted)), X.T @ X, 1e-5, "layout chosen by XLA")


def test_lowering_for_another_platform_and_for_a_mesh_without_devices() -> None:
    lowered = on_mesh(lambda x: jnp.sin(x).sum()).trace(X).lower(lowering_platforms=("tpu",))
    assert "stablehlo.sine" in lowered.as_text()
    import spmd

    plan = spmd.jit(lambda x: x.sum(0), mesh={"data": 64}, in_shardings=P("data"))
    wide = jax.ShapeDtypeStruct((128, 8), jnp.float32)
    assert "all_reduce" in plan.lower(wide).as_text()


@both
def test_programs_can_be_exported_and_executables_serialised(jit) -> None:
    def g(x):
        return jnp.sin(x) @ x.T

    function = jit(g, in_shardings=named("data"), out_shardings=named("data"))
    exported = jax.export.export(function)(X)
    x = jax.device_put(X, named("data"))
    again = exported
    if importlib.util.find_spec("flatbuffers"):
        again = jax.export.deserialize(exported.serialize())
    assert again.nr_devices == 8
    assert_close(jax.jit(again.call)(x), g(X), 1e-5, "exported")
    compiled = function.lower(X).compile()
    inner = compiled.compiled if jit is on_mesh else compiled
    loaded = serialize_executable.deserialize_and_load(*serialize_executable.serialize(inner))
    assert_close(loaded(x), g(X), 1e-5, "serialised")


def test_symbolic_dims_are_an_error() -> None:
    (n,) = jax.export.symbolic_shape("n")
    with pytest.raises(ArgumentError, match=r"x has shape \(n, 4\)\n.*symbolic dims"):
        jax.export.export(on_mesh(lambda x: x * 2))(jax.ShapeDtypeStruct((n, 4), jnp.float32))


def test_large_arrays_are_not_exported_unnoticed() -> None:
    large = jnp.ones((256, 256))
    with pytest.raises(ArgumentError, match=r"closes over float32\[256,256\]"):
        jax.export.export(on_mesh(lambda x: x @ large))(jnp.ones((8, 256)))


def test_names_of_the_user_reach_the_compiled_program() -> None:
    def layer(x, w):
        with jax.named_scope("attention"):
            y = jnp.tanh(x @ w)
        with jax.named_scope("loss"):
            return (y**2).sum()

    compiled = on_mesh(
        jax.grad(layer, argnums=1), in_shardings=(P("data"), P(None, "tensor"))
    ).lower(X, jnp.ones((16, 16))).compile()  # fmt: skip
    text = compiled.as_text()
    names = set(re.findall(r'op_name="([^"]*)"', text))
    assert any("attention" in n and n.endswith("dot_general") for n in names), names
    assert any("transpose" in n for n in names), names
    assert any("loss" in n for n in names), names
    assert "test_dropin_stages.py" in text and 'op_name="w"' in text
    reductions = [line for line in text.splitlines() if " all-reduce(" in line]
    assert reductions and all("op_name=" in line and "attention" in line for line in reductions)


def test_tracebacks_show_the_user_and_not_the_compiler() -> None:
    def inner(x):
        return x @ jnp.ones((3, 3))

    def outer(x):
        return inner(x) + 1

    function = on_mesh(outer)
    for call in (function, function.lower, function.trace, function.eval_shape):
        with pytest.raises(TypeError) as error:
            call(X)
        files = [entry.path.name for entry in error.traceback]
        functions = [entry.name for entry in error.traceback]
        assert functions[-4:-1] == ["outer", "inner", "_operator_matmul"] or "inner" in functions
        assert not {"dispatch.py", "tracing.py", "executable.py", "pjit.py"} & set(map(str, files))


def test_the_source_line_of_each_operation_is_that_of_the_user() -> None:
    def g(x):
        y = jnp.sin(x)
        return functools.reduce(jnp.add, [y, y])

    jaxpr = on_mesh(g, in_shardings=P("data")).trace(X).propagate().partition().jaxpr
    lines = str(jaxpr.pretty_print(source_info=True))
    assert lines.count("test_dropin_stages.py") >= 2 and "interpret.py" not in lines
