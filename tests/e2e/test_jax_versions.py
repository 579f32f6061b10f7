"""What ordinary programs hold in some versions of JAX only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import spmd
from sharding import P
from tests.e2e.rule_harness import check_rules
from tests.oracle import assert_close, check, make_mesh

MESH = make_mesh(data=4, tensor=2)
X = np.random.default_rng(0).uniform(0.5, 3, (8, 12)).astype(np.float32)


@pytest.mark.parametrize("name", ["log2", "one_minus_square", "polynomial"])
def test_new_pointwise_primitives(name: str) -> None:
    function = getattr(lax, name, None)
    if function is None:
        pytest.skip(f"this JAX has no lax.{name}")
    if name == "polynomial":
        coefficients = [X + 1, 2 * X, X - 2]
        check_rules(lambda x, *c: function(x, c), X, *coefficients, names=name, exact=False)
    else:
        check_rules(function, X, names=name, exact=False)
    check(jax.grad(lambda x: (function(x, [x, 2.0 * x]) if name == "polynomial" else function(x))
                   .sum()), (X,), MESH, (P("data", "tensor"),))  # fmt: skip


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.searchsorted(jnp.arange(4.0), x),
        lambda x: jnp.digitize(x, jnp.arange(4.0)),
        lambda x: jnp.frexp(x),
        lambda x: jnp.ldexp(x, jnp.arange(12)),
        lambda x: jnp.empty_like(x) * 0 + x,
        lambda x: jnp.nonzero(x > 1, size=40, fill_value=0),
    ],
    ids=["searchsorted", "digitize", "frexp", "ldexp", "empty_like", "nonzero"],
)
def test_functions_that_may_be_high_level_primitives(function) -> None:
    for spec in (P("data"), P(None, "data"), P("data", "tensor")):
        check(function, (X,), MESH, (spec,))


def test_high_level_primitives_are_expanded_after_differentiation() -> None:
    """frexp has a derivative of its own; the bit operations it stands for have none."""

    def loss(x):
        mantissa, _ = jnp.frexp(x)
        return (mantissa**2).sum()

    want = jax.grad(loss)(X)
    assert np.abs(want).min() > 0
    function = spmd.jit(loss, mesh=MESH, in_shardings=P("data"))
    assert_close(jax.grad(function)(X), want, 1e-5, "grad of the call")
    inside = spmd.jit(jax.grad(loss), mesh=MESH, in_shardings=P("data"))
    assert_close(inside(X), want, 1e-5, "grad inside of the call")
