"""A training step over two processes with four devices each; more is in `tests/multihost`."""

import numpy as np

from tests.multihost.launch import run
from tests.multihost.program import CASES


def test_losses_are_those_of_one_process() -> None:
    """Sums of other processes come in another order."""
    losses, row, _ = CASES["training"]()
    first, second = (process["training"] for process in run(["training"], 2, limit_s=120))
    assert first == second and not first[2]
    np.testing.assert_allclose(first[0], losses, rtol=1e-6)
    np.testing.assert_allclose(first[1], row, rtol=1e-5)
