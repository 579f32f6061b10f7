"""Pointwise primitives: one factor per dim. The families are tables; linearity is stated here."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from sharding import _jax
from sharding.rule import (
    Factor,
    Kind,
    OpInfo,
    Rule,
    RuleFn,
    names,
    pointwise_rule,
    register,
)

p = _jax.primitives

# Linear in their operand: f(a + b) == f(a) + f(b).
LINEAR_UNARY = (p.neg_p, p.copy_p, p.real_p, p.imag_p, p.conj_p, p.stop_gradient_p, p.name_p)

# Linear in all operands together.
LINEAR_NARY = (p.add_p, p.add_jaxvals_p, p.sub_p)

# Flops per element are a convention: transcendental functions count as one.
UNARY = (
    p.abs_p, p.ceil_p, p.clz_p, p.floor_p, p.integer_pow_p, p.is_finite_p, p.not_p,
    p.population_count_p, p.reduce_precision_p, p.round_p, p.sign_p, p.square_p,
    *_jax.available("one_minus_square_p"),
)  # fmt: skip

# Compilers compute them once, however many read the result.
TRANSCENDENTAL = (
    p.acos_p, p.acosh_p, p.asin_p, p.asinh_p, p.atan_p, p.atanh_p, p.bessel_i0e_p,
    p.bessel_i1e_p, p.cbrt_p, p.cos_p, p.cosh_p, p.digamma_p, p.erf_p, p.erf_inv_p, p.erfc_p,
    p.exp_p, p.exp2_p, p.expm1_p, p.lgamma_p, p.log_p, p.log1p_p, p.logistic_p, p.rsqrt_p,
    p.sin_p, p.sinh_p, p.sqrt_p, p.tan_p, p.tanh_p, *_jax.available("log2_p"),
)  # fmt: skip

NARY = (
    p.and_p, p.atan2_p, p.clamp_p, p.complex_p, p.eq_p, p.eq_to_p, p.ge_p, p.gt_p, p.igamma_p,
    p.igamma_grad_a_p, p.igammac_p, p.le_p, p.le_to_p, p.lt_p, p.lt_to_p, p.max_p, p.min_p,
    p.ne_p, p.nextafter_p, p.or_p, p.polygamma_p, p.pow_p,
    p.regularized_incomplete_beta_p, p.rem_p, p.shift_left_p, p.shift_right_arithmetic_p,
    p.shift_right_logical_p, p.xor_p, p.zeta_p,
)  # fmt: skip


def _shapes(op: OpInfo) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    return [a.shape for a in op.in_avals], [a.shape for a in op.out_avals]


def _pointwise(*linear: tuple[int, ...], once: bool = False) -> RuleFn:
    def rule(op: OpInfo) -> Rule:
        return pointwise_rule(*_shapes(op), linear=linear, once=once)

    return rule


register(*UNARY, *NARY)(_pointwise())
register(*TRANSCENDENTAL)(_pointwise(once=True))
register(*LINEAR_UNARY)(_pointwise((0,)))
register(*LINEAR_NARY)(_pointwise((0, 1)))


@register(p.mul_p)
def _mul(op: OpInfo) -> Rule:
    """Linear in either operand; never in both at once. (Exact up to rounding for finite factors;
    an infinite one makes NaN of addends that differ in sign, as it would of any other sum.)"""
    return pointwise_rule(*_shapes(op), linear=((0,), (1,)))


@register(*_jax.available("polynomial_p"))
def _polynomial(op: OpInfo) -> Rule:
    """Linear in the coefficients together, which follow the variable."""
    return pointwise_rule(*_shapes(op), linear=(tuple(range(1, len(op.in_avals))),))


@register(p.div_p)
def _div(op: OpInfo) -> Rule:
    """Linear in the dividend where the divisor is a known finite number. (By zero the addends
    would become infinities of both signs; integer division truncates.)"""
    divisor = op.literal(1)
    finite = divisor is not None and np.ndim(divisor) == 0 and np.isfinite(divisor) and divisor != 0
    linear = ((0,),) if finite and _inexact(op.out_avals[0]) else ()
    return pointwise_rule(*_shapes(op), linear=linear)


@register(p.select_n_p)
def _select_n(op: OpInfo) -> Rule:
    """Linear in the cases together."""
    cases = tuple(range(1, len(op.in_avals)))
    shape = op.out_avals[0].shape
    which = op.in_avals[0].shape
    shapes = [which, *(a.shape for a in op.in_avals[1:])]
    return pointwise_rule(shapes, [shape], linear=(cases,))


@register(p.convert_element_type_p)
def _convert(op: OpInfo) -> Rule:
    """Linear where it widens a float. (Rounding partial sums to a narrower one would lose what the
    user's dtype promised.)"""
    src, dst = (a.dtype for a in (op.in_avals[0], op.out_avals[0]))
    return pointwise_rule(*_shapes(op), linear=((0,),) if _widens(src, dst) else ())


@register(p.bitcast_convert_type_p)
def _bitcast(op: OpInfo) -> Rule:
    """Pointwise on the dims that both sides have; the dim of the narrower elements is FIXED."""
    src, dst = op.in_avals[0].shape, op.out_avals[0].shape
    if len(src) == len(dst):
        return pointwise_rule([src], [dst])
    longer = src if len(src) > len(dst) else dst
    dims = names("d", len(longer))
    factors = {d: Factor(n) for d, n in zip(dims, longer, strict=True)}
    factors[dims[-1]] = Factor(longer[-1], Kind.FIXED)
    sides = [tuple((d,) for d in dims[: len(s)]) for s in (src, dst)]
    return Rule((sides[0],), (sides[1],), factors, early=True)


def _widens(src: Any, dst: Any) -> bool:
    """Whether every float of one type is one of the other."""
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in (src, dst)):
        return False
    few, many = jnp.finfo(src), jnp.finfo(dst)
    wider = few.maxexp <= many.maxexp and few.minexp >= many.minexp
    return wider and few.nmant <= many.nmant


def _inexact(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.inexact)
