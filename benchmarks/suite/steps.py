"""Runs the programs of all systems: compares what they compute, and times their steps.

The truth is the same function under plain `jax.jit` on one device. Two arrays of floating numbers
agree when the norm of their difference is at most `TOLERANCE` of the norm of the true one (or 4
units in the last place, for dtypes of low precision); integers and booleans agree when equal.
The norm is over whole arrays, since systems add up in different orders: a step of an optimiser may
turn rounding errors of a tiny gradient into an update of full size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.suite.case import Case
from benchmarks.suite.systems import Bound
from benchmarks.suite.targets import on_one

TOLERANCE = 1e-3  # of the norm
_SMALLEST = 1e-6  # of the elements of an array that counts as all zero
STEPS, FEWEST = 100, 5  # timed steps of each system


class Differs(Exception):
    """A system computes something else than the unsharded program."""


def unsharded(case: Case, args: tuple[Any, ...]) -> Any:
    """What the function returns under plain `jax.jit` on one device."""
    alone = on_one(case.mesh)
    with jax.set_mesh(alone):  # for constraints that name axes
        given = jax.device_put(args, jax.NamedSharding(alone, jax.P()))
        return _without_keys(jax.jit(case.fun)(*given))


def _without_keys(tree: Any) -> Any:
    """The data of keys of random numbers in their place."""

    def one(x: jax.Array) -> Any:
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return jax.tree.map(one, tree)


def difference(found: Any, true: Any) -> float:
    """The largest difference of two pytrees of arrays, as a share of the norm.

    Args:
      true: on one device, where they are compared, since there may be billions of elements.

    Raises:
      Differs: naming the array, when one does not agree.
    """
    if jax.tree.structure(found) != jax.tree.structure(true):
        raise Differs("the results have another structure")
    largest = 0.0
    for (path, want), got in zip(
        jax.tree_util.tree_leaves_with_path(true), jax.tree.leaves(found), strict=True
    ):
        name = f"result{jax.tree_util.keystr(path)}"
        if got.shape != want.shape or got.dtype != want.dtype:
            raise Differs(f"{name} is {got.dtype}{got.shape}, not {want.dtype}{want.shape}")
        if not jnp.issubdtype(want.dtype, jnp.inexact):
            apart = int(np.sum(np.asarray(got) != np.asarray(want)))
            if apart:
                raise Differs(f"{name} differs in {apart} of {want.size} elements")
            continue
        share, allowed = _share(got, want, name), max(TOLERANCE, 4 * float(_eps(want)))
        if share > allowed:
            raise Differs(f"{name} differs by {share:.2g} of its norm; {allowed:.2g} is allowed")
        largest = max(largest, share)
    return largest


def _eps(x: np.ndarray) -> Any:
    return jnp.finfo(x.dtype).eps


def _share(got: np.ndarray, want: np.ndarray, name: str) -> float:
    if isinstance(want, jax.Array):
        got = jax.device_put(got, want.sharding)
    same, apart, norm = _norms(got, want)
    if not same:
        raise Differs(f"{name} has other infinities or NaNs")
    return float(apart) / max(float(norm), _SMALLEST * (want.size or 1) ** 0.5)


@jax.jit
def _norms(got: jax.Array, want: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(whether the same elements are finite, norm of the difference, norm), of finite ones."""
    kind = jnp.complex64 if jnp.iscomplexobj(want) else jnp.float32
    finite = jnp.isfinite(want)
    same = (jnp.isfinite(got) == finite).all()
    got, want = got.astype(kind), want.astype(kind)
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(jnp.abs(jnp.where(finite, x, 0)))))  # noqa: E731
    return same, norm(got - want), norm(want)


def run(
    programs: Mapping[str, Any], bound: Bound, tell: Callable[[str], None], seconds: float
) -> dict[str, tuple[float, float] | Exception]:
    """Runs the programs in turn, so that what slows the machine slows all.

    Args:
      programs: executables by system; all take the arguments of `bound`.
      tell: called with what is done.
      seconds: of steps of all systems together, beyond the fewest.

    Returns:
      By system (median seconds of a step, difference from the unsharded program), or the error.
    """
    drawn = bound.case.draw()
    tell("unsharded")
    true = unsharded(bound.case, drawn)
    args = jax.device_put(drawn, bound.in_shardings)
    jax.block_until_ready(args)
    found: dict[str, tuple[float, float] | Exception] = {}
    apart: dict[str, float] = {}
    for system, program in programs.items():
        tell(f"{system}: results")
        try:
            _, result = _step(program, bound, args)
            apart[system] = difference(_without_keys(result), true)
        except Exception as error:
            found[system] = error
    tell("steps")
    times = _times({s: p for s, p in programs.items() if s in apart}, bound, args, seconds)
    return {**found, **{s: (times[s], apart[s]) for s in apart}}


def _times(
    programs: Mapping[str, Any], bound: Bound, args: tuple[Any, ...], limit: float
) -> dict[str, float]:
    """Median seconds of a step, by system; the programs have run once."""
    taken: dict[str, list[float]] = {system: [] for system in programs}
    begin = time.perf_counter()
    for turn in range(STEPS):
        if turn >= FEWEST and time.perf_counter() - begin > limit:
            break
        # every other turn backwards, so that none always follows the same one
        for system in list(programs) if turn % 2 else list(programs)[::-1]:
            taken[system].append(_step(programs[system], bound, args)[0])
    return {system: statistics.median(seconds) for system, seconds in taken.items()}


def _step(program: Any, bound: Bound, args: tuple[Any, ...]) -> tuple[float, Any]:
    """(seconds, result) of one call; memory that it takes over is that of copies."""
    given = list(args)
    for number in bound.case.donate:
        given[number] = _copied(args[number], bound.in_shardings[number])
    jax.block_until_ready(given)
    begin = time.perf_counter()
    result = jax.block_until_ready(program(*given))
    return time.perf_counter() - begin, result


def _copied(tree: Any, shardings: Any) -> Any:
    return jax.jit(lambda x: jax.tree.map(jnp.copy, x), out_shardings=shardings)(tree)
