"""Linear algebra: batch dims pass; dims of matrices are gathered by plan.

Every device runs the same algorithm on its own problems, so that results do not depend on the mesh.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from sharding import _jax
from sharding.rule import Dims, Factor, Kind, Local, OpInfo, Rule, names, register

p = _jax.primitives

# Per operand, how many trailing dims one problem has; all others are batch dims.
_RANKS = {
    p.cholesky_p: (2,),
    _jax.cholesky_update_p: (2, 1),
    p.eig_p: (2,),
    p.eigh_p: (2,),
    _jax.geqp3_p: (2, 1),
    _jax.geqrf_p: (2,),
    p.hessenberg_p: (2,),
    p.householder_product_p: (2, 1),
    p.lu_p: (2,),
    _jax.lu_pivots_to_permutation_p: (1,),
    _jax.ormqr_p: (2, 1, 2),
    p.qr_p: (2,),
    p.schur_p: (2,),
    p.svd_p: (2,),
    _jax.symmetric_product_p: (2, 2),
    p.triangular_solve_p: (2, 2),
    p.tridiagonal_p: (2,),
    p.tridiagonal_solve_p: (1, 1, 1, 2),
}


def _batched(
    op: OpInfo, rank: int, more: Sequence[tuple[int, int, str]] = ()
) -> tuple[tuple[Dims, ...], tuple[Dims, ...], dict[str, Factor]]:
    """(operands, results, factors): batch dims b0.. shared by all tensors, other dims FIXED.

    Args:
      rank: how many dims of the first operand are not batch dims.
      more: (tensor, dim, name) for dims with a factor of their own that passes; results are
        numbered after operands, dims are counted from the end.
    """
    avals = (*op.in_avals, *op.out_avals)
    batch = names("b", len(avals[0].shape) - rank)
    factors = {b: Factor(n) for b, n in zip(batch, avals[0].shape, strict=False)}
    tensors = []
    for t, aval in enumerate(avals):
        dims = [(b,) for b in batch]
        for d in range(len(batch) - len(aval.shape), 0):
            name = next((n for u, e, n in more if (u, e) == (t, d)), "")
            factors[name or f"f{t}{d}"] = Factor(aval.shape[d], Kind.PASS if name else Kind.FIXED)
            dims.append((name or f"f{t}{d}",))
        tensors.append(tuple(dims))
    return tuple(tensors[: len(op.in_avals)]), tuple(tensors[len(op.in_avals) :]), factors


@register(
    p.cholesky_p, _jax.cholesky_update_p, p.eig_p, p.eigh_p, _jax.geqp3_p, _jax.geqrf_p,
    p.hessenberg_p, p.householder_product_p, p.lu_p, _jax.lu_pivots_to_permutation_p, p.qr_p,
    p.schur_p, p.svd_p, p.tridiagonal_p,
)  # fmt: skip
def _decomposition(op: OpInfo) -> Rule:
    """Batch dims pass, the matrix is FIXED."""
    operands, results, factors = _batched(op, _RANKS[op.primitive][0])
    batch = frozenset(f for f in factors if f[0] == "b")
    return Rule(operands, results, factors, local=_local_decomposition, local_when=batch)


def _local_decomposition(ctx: Local, op: OpInfo, *xs: Any) -> Sequence[Any]:
    """Matrices that are padding are zero: an iteration need not end for what is there."""
    operands = list(xs)
    for i, x in enumerate(xs):
        for d in range(x.ndim - _RANKS[op.primitive][i]):
            operands[i] = ctx.mask(operands[i], i, f"b{d}", 0)
    return ctx.bind(*operands)


def _solve(op: OpInfo, dim: int) -> Rule:
    """Batch dims pass, and so does the dim of the last operand that holds independent problems.
    Linear in that operand."""
    last = len(op.in_avals) - 1
    parts = _batched(op, _RANKS[op.primitive][0], [(last, dim, "c"), (last + 1, dim, "c")])
    return Rule(*parts, linear=((last,),))


@register(p.tridiagonal_solve_p)
def _tridiagonal_solve(op: OpInfo) -> Rule:
    """Columns of the right-hand side pass."""
    return _solve(op, -1)


@register(p.triangular_solve_p)
def _triangular_solve(op: OpInfo) -> Rule:
    """Columns of b pass in A X = B, rows in X A = B."""
    return _solve(op, -1 if op.params["left_side"] else -2)


@register(_jax.ormqr_p)
def _ormqr(op: OpInfo) -> Rule:
    """Columns of c pass in Q C, rows in C Q."""
    return _solve(op, -1 if op.params["left"] else -2)


@register(_jax.symmetric_product_p)
def _symmetric_product(op: OpInfo) -> Rule:
    """`alpha A A^T + beta C`: the contracted dim k of A is REDUCE; C counts in the first shard."""
    operands, results, factors = _batched(op, 2, [(0, -1, "k")])
    factors["k"] = Factor(factors["k"].size, Kind.REDUCE, "add")
    return Rule(
        operands, results, factors, local=_local_symmetric_product, local_when=frozenset({"k"}),
        flops=2 * op.in_avals[0].shape[-2] ** 2,
    )  # fmt: skip


def _local_symmetric_product(ctx: Local, op: OpInfo, a: Any, c: Any) -> Sequence[Any]:
    first = ctx.index(ctx.axes("k")) == 0
    return ctx.bind(ctx.mask(a, 0, "k", 0), jnp.where(first, c, jnp.zeros((), c.dtype)))
