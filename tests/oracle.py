"""The one helper that most tests call: partitioned against unsharded, in values and collectives."""

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

import spmd

P = PartitionSpec


def make_mesh(**axes: int) -> Mesh:
    """A mesh of the first simulated devices: `make_mesh(data=2, tensor=4)`."""
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes),
        devices=jax.devices()[: int(np.prod(list(axes.values())))],
    )  # fmt: skip


def check(
    fun: Callable,
    args: Sequence[Any],
    mesh: Mesh,
    in_shardings: Any = None,
    out_shardings: Any = None,
    tolerance: float | Sequence[float] = 1e-5,
    **options: Any,
) -> spmd.Partitioned:
    """Asserts that the partitioned program gives what the unsharded one gives.

    Floating results may differ by `tolerance`, or that of each result, of the largest element;
    others must be equal.

    Returns:
      The partitioned stage, for assertions about its collectives.
    """
    want = jax.jit(fun)(*args)
    function = spmd.jit(
        fun, mesh=mesh, in_shardings=in_shardings, out_shardings=out_shardings, **options
    )
    partitioned = function.trace(*args).propagate().partition()
    got = function(*args)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    leaves = jax.tree_util.tree_leaves_with_path(got)
    each = [tolerance] * len(leaves) if isinstance(tolerance, (int, float)) else tolerance
    for (path, a), b, allowed in zip(leaves, jax.tree.leaves(want), each, strict=True):
        assert_close(a, b, allowed, f"result{jax.tree_util.keystr(path)}\n{partitioned}")
    return partitioned


def assert_close(got: Any, want: Any, tolerance: float, what: str) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype, what
    if jnp.issubdtype(got.dtype, jax.dtypes.extended):
        got, want = jax.random.key_data(got), jax.random.key_data(want)
    got, want = np.asarray(got), np.asarray(want)
    if not np.issubdtype(got.dtype, np.inexact):
        np.testing.assert_array_equal(got, want, err_msg=what)
        return
    finite = np.isfinite(want)
    scale = np.abs(want[finite]).max(initial=0) or 1.0
    np.testing.assert_allclose(
        got.astype(np.complex128 if np.iscomplexobj(got) else np.float64),
        want.astype(np.complex128 if np.iscomplexobj(want) else np.float64),
        rtol=0, atol=tolerance * scale, err_msg=what,
    )  # fmt: skip


def draw_spec(rng: random.Random, axes: Sequence[str], shape: Sequence[int]) -> PartitionSpec:
    """A random spec: every axis goes to one dim, or to none; dims need not divide."""
    dims: list[list[str]] = [[] for _ in shape]
    for axis in rng.sample(list(axes), len(axes)):
        place = rng.randrange(-1, len(shape)) if shape else -1
        if place >= 0 and shape[place] > 1:
            dims[place].append(axis)
    return P(*[tuple(d) or None for d in dims])


def draw_specs(rng: random.Random, axes: Sequence[str], tree: Any) -> Any:
    """A random spec, or None (inferred), per leaf."""
    return jax.tree.map(
        lambda x: draw_spec(rng, axes, np.shape(x)) if rng.random() < 0.6 else None, tree
    )


def kinds(partitioned: spmd.Partitioned) -> dict[tuple[str, tuple[str, ...]], tuple[int, float]]:
    """(kind, axes) -> (count, wire bytes)."""
    from spmd.collectives import summarize

    return {(c.kind, c.axes): (c.count, c.bytes) for c in summarize(partitioned.collectives)}


def raised_in_thread(fun: Callable, x: Any) -> BaseException | None:
    """What a call raises. Failed effects stay failed in the thread that made them."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            jax.block_until_ready(fun(x))
            jax.effects_barrier()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None
