"""Contractions: dot_general. Free and batch dims pass through, contracted dims are reduced."""

from sharding import _jax
from sharding.rule import Dims, Factor, Kind, OpInfo, Rule, register

p = _jax.primitives


@register(p.dot_general_p)
def _dot_general(op: OpInfo) -> Rule:
    """`bmk,bkn->bmn`: batch b, free m and n PASS, contracted k REDUCE by add."""
    lhs, rhs = (a.shape for a in op.in_avals)
    (lhs_k, rhs_k), (lhs_b, rhs_b) = op.params["dimension_numbers"]
    boolean = op.out_avals[0].dtype == bool
    factors: dict[str, Factor] = {}
    left: list[str] = [""] * len(lhs)
    right: list[str] = [""] * len(rhs)
    for i, (a, b) in enumerate(zip(lhs_b, rhs_b, strict=True)):
        left[a] = right[b] = f"b{i}"
        factors[f"b{i}"] = Factor(lhs[a])
    for i, (a, b) in enumerate(zip(lhs_k, rhs_k, strict=True)):
        left[a] = right[b] = f"k{i}"
        factors[f"k{i}"] = Factor(lhs[a], Kind.REDUCE, "or" if boolean else "add")
    free_left = [d for d in range(len(lhs)) if not left[d]]
    free_right = [d for d in range(len(rhs)) if not right[d]]
    for i, d in enumerate(free_left):
        left[d] = f"m{i}"
        factors[left[d]] = Factor(lhs[d])
    for i, d in enumerate(free_right):
        right[d] = f"n{i}"
        factors[right[d]] = Factor(rhs[d])
    out = [left[d] for d in lhs_b]
    out += [left[d] for d in free_left] + [right[d] for d in free_right]

    def dims(names: list[str]) -> Dims:
        return tuple((n,) for n in names)

    return Rule(  # fmt: skip
        (dims(left), dims(right)), (dims(out),), factors,
        linear=() if boolean else ((0,), (1,)), flops=2,
    )
