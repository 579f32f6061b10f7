"""FLOPs of compiled modules, against counts by hand and XLA's own."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.suite.case import array
from benchmarks.suite.flops import flops
from spmd.reporting.hlo_text import parse_module


def _flops(fun, *args) -> float:
    found = flops(parse_module(str(jax.jit(fun).lower(*args).compile().as_text())))
    assert found.exact
    return found.count


def test_flops_of_matmuls_in_loops_and_fusions():
    def fun(x, w, batched):
        y = jax.lax.fori_loop(0, 7, lambda _, y: jnp.tanh(y @ w) + 1, x)
        return jnp.einsum("bij,bjk->bik", batched, batched).sum() + y.sum()

    found = _flops(fun, array(64, 32), array(32, 32), array(5, 48, 48))
    assert found == 7 * 2 * 64 * 32 * 32 + 5 * 2 * 48**3


def test_flops_of_nested_loops():
    def inner(y, w):
        return jax.lax.fori_loop(0, 3, lambda _, z: jnp.sin(z @ w), y), None

    found = _flops(lambda x, ws: jax.lax.scan(inner, x, ws)[0], array(16, 32), array(4, 32, 32))
    assert found == 4 * 3 * 2 * 16 * 32 * 32


def test_of_branches_the_dearest_counts():
    def fun(n, x):
        return jax.lax.switch(n, [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x], x)

    assert _flops(fun, jax.ShapeDtypeStruct((), jnp.int32), array(64, 64)) == 2 * 2 * 64**3


def test_a_loop_of_unknown_length_counts_once_and_is_told():
    def fun(x):
        return jax.lax.while_loop(lambda x: x.sum() < 1e6, lambda x: x @ x, x)

    compiled = jax.jit(fun).lower(array(32, 32)).compile()
    found = flops(parse_module(str(compiled.as_text())))
    assert found == (2 * 32**3, False)


def test_flops_of_a_convolution_leave_padding_out():
    """5 positions, window of 3, one element of padding on each side: 3 * 5 - 2 meetings."""

    def fun(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1,), "SAME")

    assert _flops(fun, array(2, 4, 5), array(6, 4, 3)) == 2 * 2 * 4 * 6 * (3 * 5 - 2)


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (2, 1), "padding": [(1, 2), (0, 3)]},
        {"window_strides": (1, 1), "padding": "VALID", "rhs_dilation": (2, 3)},
        {"window_strides": (1, 2), "padding": [(2, -1), (1, 1)], "lhs_dilation": (3, 2)},
        {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 4},
        {"window_strides": (1, 1), "padding": "SAME", "batch_group_count": 2},
    ],
)
def test_flops_of_convolutions_are_xlas(options):
    """XLA's own count, where there is no loop and nothing else to count."""
    groups = options.get("feature_group_count", 1)

    def fun(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, **options)

    lowered = jax.jit(fun).lower(array(4, 8, 10, 12), array(8, 8 // groups, 3, 3))
    analysis = lowered.cost_analysis() or {}
    module = parse_module(str(lowered.compile().as_text()))
    assert flops(module).count == analysis["flops"] > 0


MATMULS_AS_OTHERS_WRITE_THEM = """HloModule m

%fused (a: bf16[4,64,32], b: bf16[4,32,16]) -> bf16[4,64,16] {
  %a = bf16[4,64,32]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[4,32,16]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = bf16[4,64,16]{2,1,0:T(8,128)(2,1)S(1)} convolution(%a, %b), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}

ENTRY %main (a: bf16[4,64,32], b: bf16[4,32,16], x: f32[8,16], y: f32[16,24]) -> bf16[4,64,16] {
  %a = bf16[4,64,32]{2,1,0} parameter(0)
  %b = bf16[4,32,16]{2,1,0} parameter(1)
  %x = f32[8,16]{1,0} parameter(2)
  %y = f32[16,24]{1,0} parameter(3)
  %g = (f32[8,24]{1,0}, s8[1024]{0}) custom-call(%x, %y), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %f = bf16[4,64,16]{2,1,0} fusion(%a, %b), kind=kOutput, calls=%fused
}
"""  # noqa: E501


def test_flops_of_matmuls_of_other_compilers():
    """TPU: a batched matmul is a convolution over the batch. GPU: a matmul is a library call."""
    found = flops(parse_module(MATMULS_AS_OTHERS_WRITE_THEM)).count
    assert found == 2 * 4 * 64 * 32 * 16 + 2 * 8 * 16 * 24
