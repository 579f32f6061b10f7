"""`checkify`: checks that are values, and checks that stop a program."""

from typing import Any

import jax
import numpy as np
import pytest
from jax import lax
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P

import spmd
from tests.oracle import check, kinds, make_mesh, raised_in_thread

EVEN = np.arange(64, dtype=np.float32).reshape(16, 4)


def mesh() -> Any:
    return make_mesh(x=2, y=4)


def _checked(x: Any) -> Any:
    checkify.check(x.min() >= 0, "min {m}", m=x.min())

    def body(c: Any, _: Any) -> Any:
        checkify.check(c.max() < 65, "max {m}", m=c.max())
        return c + 1, c.sum()

    return lax.scan(body, x, length=4)


@pytest.mark.parametrize("errors", [checkify.user_checks, checkify.all_checks])
def test_checkify_inside_and_outside(errors: Any) -> None:
    jit = lambda f: spmd.jit(f, mesh=mesh(), in_shardings=P("x", "y"))  # noqa: E731
    for x, message in ((EVEN, "max 65.0"), (EVEN - 1, "min -1.0"), (EVEN / 2, None)):
        for checked in (jit(checkify.checkify(_checked, errors)),
                        checkify.checkify(jit(_checked), errors)):  # fmt: skip
            error, out = checked(x)
            assert (error.get() or "").startswith(message or "") and bool(error.get()) == bool(
                message
            )
            np.testing.assert_allclose(out[0], _checked_result(x))


def _checked_result(x: Any) -> Any:
    return x + 4


def test_checks_that_are_not_functionalised() -> None:
    def debug(x: Any) -> Any:
        checkify.debug_check(x.min() > 1e9, "never tested {x}", x=x)
        return x * 2

    moved = kinds(check(debug, [EVEN], mesh(), P("x", "y")))
    assert "all_gather" not in {kind for kind, _ in moved}
    function = spmd.jit(_checked, mesh=mesh(), in_shardings=P("x"))
    with pytest.raises(ValueError, match="not functionalized"):
        function(EVEN)
    jax.config.update("jax_experimental_unsafe_xla_runtime_errors", True)
    try:
        function = spmd.jit(_checked, mesh=mesh(), in_shardings=P("x"))
        assert raised_in_thread(function, EVEN / 2) is None
        assert "min -1.0" in str(raised_in_thread(function, EVEN / 2 - 1))
    finally:
        jax.config.update("jax_experimental_unsafe_xla_runtime_errors", False)
