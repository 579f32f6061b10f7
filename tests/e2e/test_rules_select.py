"""Rules of sorting, selection, reductions, cumulation and random numbers.

Values under every assignment (see `rule_harness`), and the collectives that they cost.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import spmd
from sharding import _jax, shard
from sharding.monoid import identity
from sharding.rules.sort import network
from tests.e2e.rule_harness import check_rules
from tests.oracle import P, check, kinds, make_mesh

CASES: dict[str, tuple[Callable, tuple, str, bool]] = {}
UNEVEN = pytest.mark.filterwarnings("ignore::sharding.errors.ShardingWarning")


def case(name: str, fun: Callable, *args: Any, names: str, exact: bool = True) -> None:
    assert name not in CASES
    CASES[name] = (fun, args, names, exact)


def arr(*shape: int, dtype: str = "float32", low: int = -9, high: int = 10) -> np.ndarray:
    """Small integers, of which many are equal."""
    drawn = np.random.default_rng(sum(shape)).integers(low, high, shape)
    return (drawn % 2 == 0) if dtype == "bool" else drawn.astype(dtype)


def odd(n: int, dtype: str = "float32") -> np.ndarray:
    """Zeros of both signs, NaNs and infinities among a few numbers."""
    values = np.array([0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 1, -2], dtype)
    return values[np.random.default_rng(n).integers(0, len(values), n)]


def bits(x: Any) -> Any:
    """Floats as the integers that show the signs of zeros."""
    return lax.bitcast_convert_type(x, jnp.uint32)


# sort: keys alone, several, payloads that show the order of equal keys; sizes around the shards
for n in (16, 5):
    case(f"sort-int-{n}", lax.sort, arr(n, dtype="int32"), names="sort")
case("sort-zeros", lambda x: bits(lax.sort(x)), odd(27), names="sort bitcast_convert_type")
case("sort-unstable", lambda x: lax.sort(x, is_stable=False), arr(13), names="sort")
case("sort-complex", lax.sort, (arr(11) + 1j * arr(11)[::-1]).astype("complex64"), names="sort")
case("argsort", lambda x: jnp.argsort(x, descending=True), odd(21), names="sort")
case(
    "sort-two-keys", lambda a, b, c: lax.sort((a, b, c), num_keys=2), odd(19),
    arr(19, dtype="int8", low=0, high=2), np.arange(19, dtype=np.int16), names="sort",
)  # fmt: skip
case("sort-size-1-dims", lambda x: lax.sort(x, dimension=1), arr(1, 13, 1), names="sort")
case("sort-rows", lambda x: lax.sort(x, dimension=0), arr(5, 3), names="sort")

# top_k: few and many winners, more than a shard has
for n, k in ((40, 2), (41, 2), (9, 4), (9, 7)):
    case(f"top-k-{n}-{k}", lambda x, k=k: lax.top_k(x, k), arr(3, n), names="top_k")
case("top-k-odd", lambda x: lax.top_k(x, 3), odd(30), names="top_k")
case("top-k-bfloat16", lambda x: lax.top_k(x.astype("bfloat16"), 3), arr(33), names="top_k")
case("top-k-columns", lambda x: lax.top_k(x, 2, axis=0), arr(29, 3, dtype="uint8", low=0),
     names="top_k")  # fmt: skip

# reductions that no collective knows
for fun, dtype in ((lax.reduce_and, "uint8"), (lax.reduce_or, "int32"), (lax.reduce_xor, "int8")):
    name = fun.__name__
    case(name, lambda x, fun=fun: fun(x, (0, 2)), arr(3, 5, 4, dtype=dtype, low=0), names=name)
case("reduce-xor-flags", lambda x: lax.reduce_xor(x, (0,)), arr(11, 3, dtype="bool"),
     names="reduce_xor")  # fmt: skip
COMPLEX = (arr(3, 7) + 1j * arr(7, 3).T).astype("complex64")
case("complex-extremes", lambda x: (lax.reduce_max(x, (1,)), lax.reduce_min(x, (0, 1))), COMPLEX,
     names="reduce_max reduce_min")  # fmt: skip
case("extremes-nan", lambda x: (lax.reduce_max(x, (0,)), lax.reduce_min(x, (0,))),
     odd(24).reshape(6, 4), names="reduce_max reduce_min")  # fmt: skip

# reduce: monoids that start elsewhere, and any function, in the order of the elements
FUNCTIONS = {"add": lax.add, "mul": lax.mul, "max": lax.max, "min": lax.min, "and": lax.bitwise_and,
             "or": lax.bitwise_or, "xor": lax.bitwise_xor}  # fmt: skip
for name, fun in FUNCTIONS.items():
    if name in ("min", "or"):  # as max, and
        continue
    case(f"reduce-{name}", lambda x, s, fun=fun: lax.reduce(x, s, fun, (0, 2)),
         arr(3, 2, 5, dtype="int32"), np.int32(3), names="reduce")  # fmt: skip
case("reduce-max-start", lambda x: lax.reduce(x, np.float32(4), lax.max, (0,)), arr(7, 3),
     names="reduce")  # fmt: skip
case("reduce-complex", lambda x: lax.reduce(x, np.complex64(2), lax.max, (1,)), COMPLEX,
     names="reduce")  # fmt: skip


def _last_positive(a: Any, b: Any) -> Any:
    """Associative, not commutative, without an identity that is given."""
    return jnp.where(b > 0, b, a)


def _affine(f: Any, g: Any) -> Any:
    """Composition of x -> a x + b, first f, then g: order matters in every element."""
    return f[0] * g[0], f[1] * g[0] + g[1]


def _best(a: Any, b: Any) -> Any:
    first = (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))
    return jnp.where(first, a[0], b[0]), jnp.where(first, a[1], b[1])


case("reduce-last", lambda x: (lax.reduce(x, np.float32(5), _last_positive, (0,)),
                               lax.reduce(x, np.float32(5), _last_positive, (0, 1))),
     np.minimum(arr(13, 6), 2), names="reduce")  # fmt: skip
case(
    "reduce-affine",
    # one dim: XLA defines no order between several
    lambda a, b: lax.reduce((a, b), (np.int32(2), np.int32(-3)), _affine, (2,)),
    arr(5, 2, 7, dtype="int32"), arr(5, 2, 7, dtype="int32")[::-1], names="reduce",
)  # fmt: skip
case(
    "reduce-best", lambda x, i: lax.reduce((x, i), (np.float32(-99), np.int32(0)), _best, (1,)),
    arr(3, 14), np.broadcast_to(np.arange(14, dtype=np.int32), (3, 14)), names="reduce",
)  # fmt: skip
case(
    "reduce-extent",  # a monoid for each of two operands
    lambda x: lax.reduce((x, x), (np.float32(1), np.float32(2)),
                         lambda a, b: (jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1])), (0,)),
    arr(11, 3), names="reduce",
)  # fmt: skip
case(
    "reduce-two-sums",
    lambda x: lax.reduce((x, 2 * x), (np.float32(1), np.float32(2)),
                         lambda a, b: (a[0] + b[0], b[1] + a[1]), (0,)),
    arr(11, 3), names="reduce",
)  # fmt: skip
case("reduce-nothing", lambda x: lax.reduce(x, np.float32(5), _last_positive, (1,)), arr(3, 0),
     names="reduce")  # fmt: skip

# arg-reductions
case("argmax", lambda x: (lax.argmax(x, 0, jnp.int32), lax.argmin(x > 0, 1, jnp.uint8)),
     arr(5, 7, dtype="int8"), names="argmax argmin")  # fmt: skip
case("argmax-odd", lambda x: (lax.argmax(x, 1, jnp.int8), lax.argmin(x, 0, jnp.int32)),
     odd(35).reshape(5, 7), names="argmax argmin")  # fmt: skip
case("argmax-lowest", lambda x: lax.argmax(x, 0, jnp.int32), np.full(13, -np.inf, np.float32),
     names="argmax")  # fmt: skip

# cumulative
SMALL = ((arr(13, 2) + 1j * arr(13, 2)[::-1]) / 30 + 0.5).astype("complex64")
for reverse in (False, True):
    for fun in (lax.cumsum, lax.cumprod, lax.cummin, lax.cumlogsumexp):
        name = fun.__name__
        case(
            f"{name}-{reverse}",
            lambda x, f=fun, r=reverse: f(x, axis=0, reverse=r), SMALL, names=name,
            exact=name in ("cummax", "cummin"),
        )  # fmt: skip
    case(f"cum-odd-{reverse}",
         lambda x, r=reverse: (lax.cummax(x, reverse=r), lax.cumlogsumexp(x, reverse=r)),
         odd(17), names="cummax cumlogsumexp", exact=False)  # fmt: skip
    case(f"cum-int-{reverse}",
         lambda x, r=reverse: (lax.cummax(x, axis=1, reverse=r), lax.cumprod(x, reverse=r)),
         arr(5, 9, dtype="uint8", low=0), names="cummax cumprod")  # fmt: skip

# what random numbers are made of
WIDE = arr(2, 5, 3).astype("int64") * 7919 * 65537
for dtype in ("uint32", "int32", "int16"):
    case(f"mulhi-{dtype}", lax.mulhi, *WIDE.astype(dtype), names="mulhi")
case("iota-2x32", lambda x: _jax.iota_2x32_shape_p.bind(shape=(5, 7)) + [x], arr(3),
     names="iota_2x32_shape")  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_rule_agrees_with_the_whole_primitive(name: str) -> None:
    fun, args, names, exact = CASES[name]
    check_rules(fun, *args, names=names, exact=exact)


@pytest.mark.parametrize("count", range(1, 11))
def test_network_sorts(count: int) -> None:
    """By the 0-1 principle; shards take part once in a round, and the lower keeps the lower."""
    rounds = network(count)
    for pairs in rounds:
        assert all(low < high for low, high in pairs)
        assert len({i for pair in pairs for i in pair}) == 2 * len(pairs)
    for flags in product((0, 1), repeat=count):
        found = list(flags)
        for low, high in (pair for pairs in rounds for pair in pairs):
            found[low], found[high] = sorted((found[low], found[high]))
        assert found == sorted(flags)


DTYPES = ("bool", "int8", "uint16", "int32", "float16", "bfloat16", "float8_e4m3fn", "complex64")
COMBINED = {"add": lax.add, "mul": lax.mul, "max": lax.max, "min": lax.min, **{
    name: FUNCTIONS[name] for name in ("and", "or", "xor")}}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_identity_changes_nothing(dtype: str) -> None:
    values = jnp.asarray([0, 1, 3, 200 if dtype == "uint16" else -5], dtype)
    for monoid, combine in COMBINED.items():
        bitwise = monoid in ("and", "or", "xor")
        if bitwise and jnp.issubdtype(values.dtype, jnp.inexact):
            continue
        if dtype == "bool" and monoid in ("add", "mul"):
            continue
        neutral = jnp.full(values.shape, identity(monoid, values.dtype))
        assert neutral.dtype == values.dtype
        np.testing.assert_array_equal(combine(neutral, values), values, err_msg=monoid)


def moved(partitioned: spmd.Partitioned) -> dict[str, float]:
    """Wire bytes by kind of collective."""
    total: dict[str, float] = {}
    for (kind, _), (_, wire) in kinds(partitioned).items():
        total[kind] = total.get(kind, 0) + wire
    return total


def gathers(partitioned: spmd.Partitioned) -> list[str]:
    return [d.text for d in partitioned.diagnostics if d.kind == "gather"]


def test_sort_exchanges_blocks() -> None:
    """6 rounds of a block between 8 shards; a gather would be 7."""
    x = arr(4096, dtype="int32", low=-999, high=999)
    made = check(lax.sort, (x,), make_mesh(y=8), (P("y"),), P("y"))
    assert moved(made) == {"permute": 6 * 512 * 4}
    both, rows = (odd(4096), np.arange(4096, dtype=np.int32)), (P("y"),) * 2
    pair = check(lambda *a: lax.sort(a), both, make_mesh(y=2), rows, rows)
    assert moved(pair) == {"permute": 2048 * (4 + 4)}
    # Numbers of rows are known everywhere: to gather the keys is less than to exchange both.
    order = check(jnp.argsort, (odd(4096),), make_mesh(y=2), (P("y"),), P("y"))
    assert moved(order) == {"all_gather": 2048 * 4}


def test_sort_gathers_where_the_order_of_equals_would_send_more() -> None:
    x, mesh = odd(4096), make_mesh(y=4)
    made = check(lambda x: bits(jnp.sort(x)), (x,), mesh, (P("y"),), P("y"))
    assert moved(made) == {"all_gather": 3 * 1024 * 4}
    # 3 rounds of 4 bytes and an index of 2
    (said,) = made.diagnostics
    assert (said.kind, said.bytes) == ("gather", 3 * 1024 * 4)
    assert said.text == (
        "sort gathers dim 0 (of 4096) over y, 12,288 B per device: 3 exchanges of blocks that keep "
        "the order of equals would send 18,432 B"
    )
    assert said.source.startswith("e2e/test_rules_select.py:")
    assert said.remedy.startswith("sort with stable=False ")
    made = check(lambda x: jnp.sort(x, stable=False), (x,), mesh, (P("y"),), P("y"))
    assert moved(made) == {"permute": 3 * 1024 * 4} and not made.diagnostics
    # Rows of 12 bytes on 8 shards: 6 rounds of 12 and an index of 2 are no more than 7 gathered.
    rows = (x, *[np.arange(4096, dtype=np.int32)] * 2)
    made = check(lambda *a: lax.sort(a), rows, make_mesh(y=8), (P("y"),) * 3, (P("y"),) * 3)
    assert moved(made) == {"permute": 6 * 512 * (12 + 2)} and not made.diagnostics


@UNEVEN
def test_programs_that_sort() -> None:
    def fun(x, key):
        order = jnp.argsort(x)
        return (
            x[order], jnp.median(x), jnp.quantile(x, 0.3), jnp.searchsorted(jnp.sort(x), x[:5]),
            jax.random.permutation(key, x), jnp.unique(x, size=9), jnp.lexsort((x, -x)),
        )  # fmt: skip

    for n in (64, 61):
        check(fun, (arr(n), jax.random.key(0)), make_mesh(x=2, y=4), (P(("x", "y")), None))


def test_top_k_gathers_winners_or_says_that_it_needs_all() -> None:
    few = check(lambda x: lax.top_k(x, 8), (arr(2, 512),), make_mesh(y=8), (P(None, "y"),))
    assert moved(few) == {"all_gather": 2 * 7 * 2 * 8 * 4} and not gathers(few)
    more = check(lambda x: lax.top_k(x, 40), (arr(2, 512),), make_mesh(y=8), (P(None, "y"),))
    assert moved(more) == {"all_gather": 7 * 2 * 64 * 4}
    assert gathers(more) == [
        "top_k gathers dim 1 (of 512) over y, 3,584 B per device: 40 winners of each shard with "
        "their indices are no less"
    ]
    most = check(lambda x: lax.top_k(x, 256), (arr(2, 512),), make_mesh(y=8), (P(None, "y"),))
    assert gathers(most) or "all_to_all" in moved(most)


def test_reductions_gather_partial_results_only() -> None:
    x = arr(8, 4096, dtype="int32")
    args, mesh, where = (x, -x), make_mesh(y=8), (P(None, "y"),) * 2
    one = 7 * 8 * 4  # one number of each of 8 rows from each of 7 shards
    made = check(lambda x, y: lax.reduce_or(x, (1,)), args, mesh, where)
    assert moved(made) == {"all_gather": one}
    made = check(lambda x, y: lax.reduce((x, y), (1, 2), _affine, (1,)), args, mesh, where)
    assert moved(made) == {"all_gather": 2 * one}
    made = check(lambda x, y: lax.argmax(x, 1, jnp.int32), args, mesh, where)
    assert moved(made) == {"all_gather": 2 * one}
    # Short rows: XLA adds a start that is no identity several times to long ones.
    few, start = (x[:, :16], -x[:, :16]), np.int32(3)
    made = check(lambda x, y: lax.reduce(x, start, lax.add, (1,)), few, mesh, where)
    assert moved(made) == {"all_reduce": 2 * 8 * 4 * 7 / 8}


# random numbers: every kind of key
HASHES = ("threefry2x32", "threefry4x32", "philox4x32", "philox2x32")


def _drawn(seeds: Any, impl: str) -> Any:
    """Values of one key and of a key for each seed, with dims over y and x, even and uneven."""
    keys = shard(jax.vmap(lambda s: jax.random.key(s, impl=impl))(seeds), "y")
    folded = jax.vmap(jax.random.fold_in)(keys, shard(seeds, "x"))
    each = jax.vmap(lambda k: jax.random.split(k, 6))(folded)
    more = jax.random.split(keys[0], (8, 3))
    data = [shard(jax.random.key_data(k), *dims) for k, dims in (
        (folded, ("y", None)), (each, ("x", "y", None)), (more, ("y", None, None)))]  # fmt: skip
    drawn = [
        shard(jax.random.bits(keys[1], (5, 8), "uint8"), "y", "x"),
        shard(jax.random.bits(keys[2], (7, 6), "uint32"), None, ("x", "y")),
        shard(jax.vmap(lambda k: jax.random.bits(k, (3,)))(folded), "x", "y"),
    ]
    return data, drawn


@UNEVEN
@pytest.mark.parametrize("impl", (*HASHES, "rbg", "unsafe_rbg"))
def test_random_values_do_not_depend_on_the_mesh(impl: str) -> None:
    seeds = arr(5, dtype="int32", low=0)
    check(lambda s: _drawn(s, impl), (seeds,), make_mesh(x=2, y=4))


@pytest.mark.parametrize("impl", HASHES[1:])
def test_random_bits_of_64(impl: str) -> None:
    def fun(seed):
        bits = jax.random.bits(jax.random.key(seed, impl=impl), (8, 6), "uint64")
        return shard(bits, "y", "x")

    with jax.enable_x64(True):
        check(fun, (np.int64(1 << 40 | 77),), make_mesh(x=2, y=4))


@UNEVEN
@pytest.mark.parametrize("impl", ("threefry2x32", "rbg"))
def test_gamma(impl: str) -> None:
    def fun(seeds, a):
        keys = jax.vmap(lambda s: jax.random.key(s, impl=impl))(seeds)
        return (
            shard(jax.vmap(jax.random.gamma)(keys, a), "x", "y"),
            shard(jax.random.loggamma(keys[0], a), "y", None),
        )  # fmt: skip

    args = arr(5, dtype="int32", low=0), np.abs(arr(5, 7)) + 0.5
    check(fun, args, make_mesh(x=2, y=4), tolerance=1e-4)


@pytest.mark.parametrize("impl", ("threefry2x32", "philox4x32"))
def test_no_communication_for_random_values(impl: str) -> None:
    def fun(key):
        return (
            jax.random.normal(key, (8, 6)), jax.random.split(key, 8),
            jax.random.gamma(key, 2.0, (8, 6)), jax.random.uniform(key, (16,), jnp.bfloat16),
        )  # fmt: skip

    outs = (P("y", "x"), P("y"), P("y", "x"), P(("x", "y")))
    made = check(fun, (jax.random.key(1, impl=impl),), make_mesh(x=2, y=4), None, outs)
    assert kinds(made) == {}


def test_hidden_state_is_that_of_one_device() -> None:
    """All copies agree, and values are in range; there is no seed to compare with."""
    mesh = make_mesh(x=2, y=4)
    fun = spmd.jit(lambda: lax.rng_uniform(1.0, 2.0, (5, 6)), mesh=mesh)
    out = fun()
    copies = np.stack([np.asarray(s.data) for s in out.addressable_shards])
    assert copies.shape == (8, 5, 6) and (copies == copies[0]).all()
    assert (copies >= 1).all() and (copies < 2).all() and len(np.unique(copies[0])) > 20
