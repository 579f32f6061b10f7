"""Rules of contractions, linear algebra and Fourier transforms.

Values under every assignment (see `rule_harness`), and the collectives that they cost.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy as jsp
import numpy as np
import pytest
from jax import lax

from sharding import shard
from spmd.partition.local import LocalView
from tests.e2e.rule_harness import check_rules
from tests.oracle import P, check, kinds, make_mesh

CASES: dict[str, tuple[Callable, tuple, str, bool]] = {}
UNEVEN = pytest.mark.filterwarnings("ignore::sharding.errors.ShardingWarning")


def case(name: str, fun: Callable, *args: Any, names: str, exact: bool = False) -> None:
    assert name not in CASES
    CASES[name] = (fun, args, names, exact)


def arr(*shape: int, dtype: str = "float32") -> np.ndarray:
    rng = np.random.default_rng(sum(shape))
    x = rng.normal(size=shape)
    return (x + 1j * rng.normal(size=shape) if dtype[0] == "c" else x).astype(dtype)


def whole(*shape: int) -> np.ndarray:
    """Small integers: products and sums are exact in any order."""
    return np.random.default_rng(sum(shape)).integers(-4, 5, shape).astype(np.float32)


def matrices(n: int = 4, dtype: str = "float32") -> np.ndarray:
    """5 x 3 matrices with distinct eigenvalues, far from singular."""
    return arr(5, 3, n, n, dtype=dtype) / 4 + np.diag(np.arange(1, n + 1)).astype(dtype)


def symmetric(dtype: str = "float32") -> np.ndarray:
    a = matrices(dtype=dtype)
    return a @ a.conj().swapaxes(-1, -2)


# Decompositions of a batch: bit for bit what the whole batch gives.
lin = lax.linalg
DECOMPOSITIONS: dict[str, Callable] = {
    "cholesky": lambda a: lin.cholesky(a @ a.conj().mT),
    "eig": lambda a: lin.eig(a, compute_left_eigenvectors=False),
    "eigh": lambda a: lin.eigh(a, symmetrize_input=False, lower=True),
    "geqp3": lambda a: jsp.linalg.qr(a, pivoting=True),
    "geqrf": lambda a: lin.qr(a, full_matrices=False),
    "hessenberg": lin.hessenberg,
    "lu": lin.lu,
    "qr": lambda a: lin.qr(a[..., :3], full_matrices=True),
    "schur": lin.schur,
    "svd": lambda a: lin.svd(a[..., :3], full_matrices=True),
    "svd-values": lambda a: lin.svd(a, compute_uv=False),
    "tridiagonal": lambda a: lin.tridiagonal(a, lower=False),
}
for name, fun in DECOMPOSITIONS.items():
    primitive = {"geqp3": "qr", "geqrf": "qr", "svd-values": "svd"}.get(name, name)
    case(name, fun, matrices(), names=primitive, exact=True)
for name in ("cholesky", "eigh", "svd-values"):
    case(f"{name}-complex", DECOMPOSITIONS[name], matrices(dtype="complex64"),
         names=name.split("-")[0], exact=True)  # fmt: skip
case("householder", lambda a: lin.householder_product(*lin.hessenberg(a)), matrices(),
     names="householder_product", exact=True)  # fmt: skip
case("pivots", lambda a: lin.lu_pivots_to_permutation(lin.lu(a)[1], 6), matrices(),
     names="lu_pivots_to_permutation", exact=True)  # fmt: skip
case("update", lambda a, v: lin.cholesky_update(a.T, v), np.tril(symmetric()[0, 0]), arr(4),
     names="cholesky_update")  # fmt: skip

# Solves: columns (or rows) of the other operand are problems of their own.
for left in (False, True):
    rhs = arr(5, 3, 4, 7) if left else arr(5, 3, 7, 4)
    case(f"triangular-{left}", lambda a, b, left=left: lin.triangular_solve(
        a, b, left_side=left, lower=True, transpose_a=True), matrices(), rhs,
        names="triangular_solve")  # fmt: skip
    for transpose in (False, True):
        case(f"ormqr-{left}-{transpose}", lambda a, b, left=left, t=transpose: lin.ormqr(
            *jnp.linalg.qr(a, mode="raw"), b, left=left, transpose=t), matrices(), rhs,
            names="ormqr")  # fmt: skip
case("triangular-vector", lambda a, b: lin.triangular_solve(a, b[:, None], left_side=True),
     matrices()[0, 0], arr(4), names="triangular_solve")  # fmt: skip
case("tridiagonal-solve", lin.tridiagonal_solve, arr(5, 4), 9 + arr(5, 4), arr(5, 4), arr(5, 4, 7),
     names="tridiagonal_solve")  # fmt: skip
case(
    "symmetric-product",
    lambda a, c: lin.symmetric_product(a, c, alpha=2.0, beta=3.0, symmetrize_output=False),
    whole(3, 4, 9), whole(3, 4, 4), names="symmetric_product", exact=True,
)  # fmt: skip

# Fourier transforms: with batch dims, and of all dims, where dims swap places
SIGNAL, GRID = arr(3, 5, 8, dtype="complex64"), arr(9, 6, 7, dtype="complex64")
case("fft", lambda x: (jnp.fft.fft(x), jnp.fft.ifft2(x)), SIGNAL, names="fft")
case("rfft", lambda x: (jnp.fft.rfft2(x), jnp.fft.irfft(jnp.fft.rfft(x), 9)), arr(3, 5, 9),
     names="fft")  # fmt: skip
case("fft-grid", jnp.fft.ifftn, GRID, names="fft")
case("rfft-grid", lambda x: (jnp.fft.rfftn(x), jnp.fft.irfftn(jnp.fft.rfftn(x), x.shape)),
     arr(9, 6, 7), names="fft")  # fmt: skip

# Contractions with groups. Sizes: an empty group, and rows that are in none.
SIZES = np.array([3, 0, 5, 2, 1], np.int32)
DOT: dict[str, Any] = {"precision": lax.Precision.HIGHEST}


def ragged(dot: tuple, dim: int, groups: tuple = ()) -> Callable:
    numbers = lax.RaggedDotDimensionNumbers(dot, [dim], groups)
    return lambda a, b, s: lax.ragged_dot_general(a, b, s, numbers, **DOT)


case("ragged-m", lambda a, b, s: lax.ragged_dot(a, b, s, **DOT), whole(13, 3), whole(5, 3, 6),
     SIZES, names="ragged_dot_general", exact=True)  # fmt: skip
case("ragged-k", ragged((([0], [0]), ([], [])), 0), whole(13, 3), whole(13, 6), SIZES,
     names="ragged_dot_general", exact=True)  # fmt: skip
case("ragged-b", ragged((([2], [1]), ([0], [0])), 0), whole(13, 3, 2), whole(13, 2, 6), SIZES,
     names="ragged_dot_general", exact=True)  # fmt: skip
EACH = np.array([[3, 0, 5], [1, 4, 1], [0, 0, 7], [9, 0, 0], [2, 2, 2]], np.int32)
case(  # batch dims, sizes for each
    "ragged-m-each", ragged((([2], [2]), ([0], [1])), 1, (0,)),
    whole(5, 9, 2), whole(3, 5, 2, 6), EACH, names="ragged_dot_general", exact=True,
)  # fmt: skip
case(  # a free dim before the ragged one, the group dim last
    "ragged-m-free", ragged((([2], [0]), ([], [])), 1, (1,)),
    whole(5, 9, 2), whole(2, 3), EACH, names="ragged_dot_general", exact=True,
)  # fmt: skip
case("ragged-k-each", ragged((([1], [1]), ([0], [0])), 1), whole(5, 9, 2), whole(5, 9, 3), EACH,
     names="ragged_dot_general", exact=True)  # fmt: skip
case(  # two contracted dims, groups along the second for each place in the first
    "ragged-k-two", ragged((([0, 1], [1, 0]), ([], [])), 1),
    whole(5, 9, 2), whole(9, 5, 3), EACH, names="ragged_dot_general", exact=True,
)  # fmt: skip


def _gradients(a: Any, b: Any, s: Any) -> Any:
    fun = lambda a, b: jnp.sum(lax.ragged_dot(a, b, s, **DOT) ** 2)  # noqa: E731
    return jax.grad(fun, (0, 1))(a, b)


case("ragged-gradients", _gradients, whole(13, 3), whole(5, 3, 6), SIZES,
     names="ragged_dot_general", exact=True)  # fmt: skip

# Contractions with scales of blocks
E5M2, E8M0 = jnp.float8_e5m2, jnp.float8_e8m0fnu
SCALE = np.exp2(np.random.default_rng(0).integers(-2, 3, (3, 6, 8))).astype(np.float32)


def _scaled(a: Any, b: Any, s: Any, t: Any) -> Any:
    return lax.scaled_dot(
        a.astype(E5M2), b.astype(E5M2), lhs_scale=None if s is None else s.astype(E8M0),
        rhs_scale=None if t is None else t.astype(E8M0),
        dimension_numbers=(((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32,
    )  # fmt: skip


case("scaled", _scaled, whole(3, 6, 16), whole(3, 5, 16), SCALE, SCALE[:, :5], names="scaled_dot",
     exact=True)  # fmt: skip
case("scaled-one", lambda a, b, t: _scaled(a, b, None, t), whole(3, 6, 16), whole(3, 5, 16),
     SCALE[:, :5], names="scaled_dot", exact=True)  # fmt: skip
case("scaled-blocks", lambda a, b, s, t: _scaled(a, b, s, t[..., ::2]), whole(3, 6, 16),
     whole(3, 5, 16), SCALE, SCALE[:, :5], names="scaled_dot", exact=True)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_rule_agrees_with_the_whole_primitive(name: str) -> None:
    fun, args, names, exact = CASES[name]
    # jaxlib's LAPACK kernel of ormqr shares a buffer between threads: calls at the same time, of
    # one program or of several devices, now and then get a wrong row. Plain jax.jit has that too.
    attempts = 5 if names == "ormqr" else 1
    for attempt in range(1, attempts + 1):
        try:
            return check_rules(fun, *args, names=names, exact=exact)
        except AssertionError:
            if attempt == attempts:
                raise


SPD = symmetric() + 4 * np.eye(4, dtype=np.float32)
VECTORS = arr(5, 3, 4)
PROGRAMS: dict[str, Callable] = {
    "solve": lambda a, v: jnp.linalg.solve(a, v[..., None]),
    "inv": lambda a, v: jnp.linalg.inv(a),
    "det": lambda a, v: (jnp.linalg.det(a), jnp.linalg.slogdet(a)),
    "pinv": lambda a, v: jnp.linalg.pinv(a[..., :3]),
    "rank": lambda a, v: (jnp.linalg.matrix_rank(a), jnp.linalg.cond(a)),
    "norms": lambda a, v: (jnp.linalg.norm(a, 2, (-2, -1)), jnp.linalg.norm(v, axis=-1)),
    "power": lambda a, v: jnp.linalg.matrix_power(a / 9, 5),
    "eigh": lambda a, v: jnp.linalg.eigvalsh(a),
    "qr": lambda a, v: jnp.linalg.qr(a),
    "svd": lambda a, v: jnp.linalg.svd(a, compute_uv=False),
    "expm": lambda a, v: jsp.linalg.expm(a / 9),
    "cho_solve": lambda a, v: jsp.linalg.cho_solve(jsp.linalg.cho_factor(a), v[..., None]),
    "lu_solve": lambda a, v: jsp.linalg.lu_solve(jsp.linalg.lu_factor(a), v[..., None]),
    "triangular": lambda a, v: jsp.linalg.solve_triangular(a, v[..., None], lower=True),
    "polar": lambda a, v: jax.vmap(jax.vmap(lambda a: jsp.linalg.polar(a, method="svd")))(a),
    "lstsq": lambda a, v: jax.vmap(jax.vmap(lambda a, v: jnp.linalg.lstsq(a, v)[0]))(a, v),
    "gradient": lambda a, v: jax.grad(lambda a: jnp.sum(jnp.linalg.slogdet(a)[1]) + jnp.sum(
        jnp.linalg.cholesky(a)) + jnp.sum(jnp.linalg.eigvalsh(a) ** 2))(a),
    "fft": lambda a, v: (jnp.fft.rfft2(a), jnp.fft.irfft(jnp.fft.rfft(v), 5), jnp.fft.fftn(a)),
}  # fmt: skip


@UNEVEN
@pytest.mark.parametrize("name", PROGRAMS)
def test_program_agrees_whatever_is_sharded(name: str) -> None:
    """Batch dims, dims of matrices, evenly or not, over one axis or both."""

    def fun(a, v):
        return tuple(
            PROGRAMS[name](shard(a, *dims), v)
            for dims in (("y", None, None, None), (None, None, "y", "x"))
        )  # fmt: skip

    check(fun, (SPD, VECTORS), make_mesh(x=2, y=4), tolerance=1e-4)


@pytest.mark.parametrize("name", [n for n in PROGRAMS if n not in ("lstsq", "gradient", "fft")])
def test_batches_need_no_communication(name: str) -> None:
    a, v = (np.concatenate([x, x, x])[:8] for x in (SPD, VECTORS))
    made = check(
        PROGRAMS[name], (a, v), make_mesh(y=8), (P("y"), P("y")), P("y"), tolerance=1e-4
    )
    assert kinds(made) == {}


def _strict(bind: Callable) -> Callable:
    """A ragged contraction as kernels may have it: NaN where sizes are negative or more than there
    are rows, and in rows of no group."""

    def wrapped(ctx: Any, lhs: Any, rhs: Any, sizes: Any, **changed: Any) -> Any:
        numbers = ctx.op.params["ragged_dot_dimension_numbers"]
        (dim,), rows = numbers.lhs_ragged_dimensions, sizes.sum(-1)
        sane = (sizes >= 0).all() & (rows <= lhs.shape[dim]).all()
        (out,) = bind(ctx, jnp.where(sane, lhs, jnp.nan), rhs, sizes, **changed)
        if numbers.rhs_group_dimensions:
            at = lax.broadcasted_iota(jnp.int32, out.shape, rows.ndim)
            rows = rows.reshape(*rows.shape, *(1,) * (out.ndim - rows.ndim))
            out = jnp.where(at < rows, out, jnp.nan)
        return [out]

    return wrapped


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("ragged-") and "grad" not in n])
def test_ragged_kernels_get_sizes_that_make_sense(name: str, monkeypatch: Any) -> None:
    """With all rows in groups, and garbage in what pads them."""
    monkeypatch.setattr(LocalView, "bind", _strict(LocalView.bind))
    fun, (lhs, rhs, sizes), names, _ = CASES[name]
    rows = 9 if sizes.ndim == 2 else 13
    sizes = sizes.copy()
    sizes[..., -1] += rows - sizes.sum(-1)
    check_rules(fun, lhs, rhs, sizes, names=names)


def test_columns_are_solved_for_on_their_own() -> None:
    def fun(a, b):
        return lin.triangular_solve(a, b, left_side=True, lower=True), jnp.linalg.solve(a, b)

    made = check(fun, (SPD[0, 0], arr(4, 16)), make_mesh(y=8), (None, P(None, "y")), P(None, "y"))
    assert kinds(made) == {}


def test_gathering_a_matrix_is_reported() -> None:
    made = check(jnp.linalg.cholesky, (SPD[0],), make_mesh(y=4), (P(None, "y"),))
    assert [d.text for d in made.diagnostics if d.kind == "gather"]


def test_grid_swaps_dims_instead_of_gathering_one() -> None:
    x = arr(64, 32, dtype="complex64")
    made = check(jnp.fft.fft2, (x,), make_mesh(y=8), (P("y"),), P("y"))
    assert kinds(made) == {("all_to_all", ("y",)): (2, 2 * 8 * 32 * 8 * 7 / 8)}


# Contractions with groups, as experts of a layer: tokens over x, experts or features over y.
TOKENS, EXPERTS, WANTED = arr(32, 8), arr(4, 8, 16), np.array([9, 0, 13, 6], np.int32)


@pytest.mark.parametrize(
    "specs, out, cost",
    [
        ((P("x"), P(), P()), P("x"), {}),
        ((P("x"), P(None, None, "y"), P()), P("x", "y"), {}),
        ((P(None, "y"), P(None, "y"), P()), P(), {("all_reduce", ("y",)): 2 * 32 * 16 * 4 * 3 / 4}),
        # By columns of all experts: whole results are half of what their sums would send.
        ((P(), P("y"), P()), P(), {
            ("all_to_all", ("y",)): 4 * 8 * 16 * 4 / 4 * 3 / 4,
            ("all_gather", ("y",)): 32 * 16 * 4 * 3 / 4,
        }),
        ((P("x"), P("y"), P()), P("x"), {("all_reduce", ("y",)): 2 * 16 * 16 * 4 * 3 / 4}),
    ],
)
def test_experts(specs: Any, out: Any, cost: dict) -> None:
    args = (TOKENS, EXPERTS, WANTED)
    made = check(lax.ragged_dot, args, make_mesh(x=2, y=4), specs, out)
    assert {key: wire for key, (_, wire) in kinds(made).items()} == cost


def test_gradients_of_experts_stay_with_them() -> None:
    """The rows of an expert are summed where its weights are; tokens are sharded elsewhere."""

    def fun(a, b, s):
        return jax.grad(lambda b: jnp.sum(lax.ragged_dot(a, b, s) ** 2))(b)

    specs, mesh = (P("x"), P("y"), P()), make_mesh(x=2, y=4)
    off = {"disable_passes": ["moved_axes"]}
    made = check(fun, (TOKENS, EXPERTS, WANTED), mesh, specs, P("y"), **off)
    found = {key: wire for key, (_, wire) in kinds(made).items()}
    assert found["all_reduce", ("x",)] == 2 * 1 * 8 * 16 * 4 / 2
    assert set(found) == {("all_reduce", ("x",)), ("all_reduce", ("y",))}
    # Experts as small as these are exchanged for columns of all, and back.
    moved = check(fun, (TOKENS, EXPERTS, WANTED), mesh, specs, P("y"))
    assert moved.wire_bytes < made.wire_bytes
