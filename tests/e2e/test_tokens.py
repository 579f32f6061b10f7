"""Tokens order effects; they are no arrays, and cost nothing."""

import numpy as np
from jax import lax

from tests.oracle import P, check, kinds, make_mesh


def test_tokens() -> None:
    def fun(x):
        lax.after_all(lax.create_token(), lax.create_token())
        return x * 2

    x = np.ones((16, 4), np.float32)
    assert not kinds(check(fun, [x], make_mesh(data=2, tensor=4), P("data")))
