"""Time of a warm call: `spmd.jit` beside `jax.jit`, alternating, on 8 simulated devices.

    python -m benchmarks.dispatch
"""

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

CALLS, ROUNDS = 60, 15


def measure(count: int) -> tuple[float, float]:
    """Seconds per call of `jax.jit` and of `spmd.jit` for `count` arguments.

    The least of several rounds: other work on the machine can only add.
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
    for function in functions:
        jax.block_until_ready(function(*args))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for function, spent in zip(functions, times, strict=True):
            spent.append(_per_call(function, args))
    return min(times[0]), min(times[1])


def _per_call(function: Callable, args: tuple) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        out = function(*args)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / CALLS


def main() -> None:
    simulate(8)
    table = Table("arguments", "jax.jit us", "spmd.jit us", "ratio")
    for count in (1, 10, 100):
        theirs, ours = measure(count)
        table.add_row(
            str(count), f"{theirs * 1e6:.0f}", f"{ours * 1e6:.0f}", f"{ours / theirs:.2f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
