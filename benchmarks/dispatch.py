"""Time of a warm call: `spmd.jit` beside `jax.jit`, alternating, on 8 simulated devices.

    python -m benchmarks.dispatch
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

import spmd
from spmd.simulate import simulate

COUNTS = (1, 10, 300)
ROUNDS, CALLS = 300, 10


def measure(count: int, rounds: int = ROUNDS) -> tuple[float, float, float]:
    """Seconds per call of `jax.jit` and of `spmd.jit` for `count` arguments, and their ratio.

    The two alternate in short rounds, and each goes first in half of them, so that other work on
    the machine meets both; the ratio is the median of the rounds' ratios, the times are the least.
    """
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    args = tuple(jax.device_put(jnp.ones(8), sharding) for _ in range(count))

    def f(*xs: Any) -> Any:
        return tuple(x + 1 for x in xs)

    functions = (
        jax.jit(f, in_shardings=(sharding,) * count),
        spmd.jit(f, mesh=mesh, in_shardings=(PartitionSpec("data"),) * count),
    )
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds):
        for which in (0, 1) if i % 2 else (1, 0):
            times[which].append(_per_call(functions[which], args))
    ratios = [ours / theirs for theirs, ours in zip(*times, strict=True)]
    return min(times[0]), min(times[1]), statistics.median(ratios)


def _per_call(function: Callable, args: tuple) -> float:
    out = jax.block_until_ready(function(*args))
    start = time.perf_counter()
    for _ in range(CALLS):
        out = function(*args)
    spent = time.perf_counter() - start
    jax.block_until_ready(out)
    return spent / CALLS


def main() -> None:
    simulate(8)
    table = Table("argument leaves", "jax.jit us", "spmd.jit us", "median ratio")
    for count in COUNTS:
        theirs, ours, ratio = measure(count)
        table.add_row(str(count), f"{theirs * 1e6:.0f}", f"{ours * 1e6:.0f}", f"{ratio:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
