"""How much of the peak rate products reach: as the TPU compiler schedules them, and as predicted.

    python -m benchmarks.matrix_units --target v5e:2x2 --target v5p:2x2x1

Products of many pairs of matrices along a short dim, as attention's scores are, and convolutions of
few features: what `spmd/estimate/matrix.py` knows of matrix units comes from such. Each device has
its part of a batch, and nothing is sent. Needs the extra `tpu`, and no TPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import track
from rich.table import Table

import spmd
from spmd.ahead.compile import aot_partitioned
from spmd.ahead.libtpu import described_mesh, prepare
from spmd.hardware import Machine

PAIRS, ROWS = 64, 2048  # of a device
INNER, FEATURES = (32, 64, 128, 256, 1024), (32, 64, 128)


def convolution(x: Any, kernel: Any) -> Any:
    """x [batch, height, width, features]; kernel [3, 3, features, features]."""
    names = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=names)


def products(devices: int) -> dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], float]]:
    """By name: the function, shapes of its operands, and operations of a device."""
    found: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], float]] = {}
    for k in INNER:
        shapes = [(devices * PAIRS, ROWS, k), (devices * PAIRS, k, ROWS)]
        found[f"along {k}"] = jnp.matmul, shapes, 2.0 * PAIRS * ROWS * ROWS * k
    for f in FEATURES:
        shapes = [(devices * PAIRS, 64, 64, f), (3, 3, f, f)]
        found[f"3x3, {f} features"] = convolution, shapes, 2.0 * PAIRS * 64 * 64 * 9 * f * f
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", action="append", help="repeatable; default: v5e:2x2")
    console = Console()
    prepare()
    for target in parser.parse_args().target or ["v5e:2x2"]:
        machine = Machine.parse(target)
        mesh, layout = described_mesh(machine, {"data": machine.devices})
        peak = machine.chip.peak("bfloat16")
        table = Table("product", "compiled", "predicted", title=f"{target}, parts of the peak rate")
        found = products(machine.devices)
        for name in track(found, target, console=console, transient=True):
            fun, shapes, work = found[name]
            args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
            kernel = P() if fun is convolution else P("data")
            jitted = spmd.jit(fun, mesh=mesh, in_shardings=(P("data"), kernel))
            planned = jitted.trace(*args).propagate().partition()
            times = (aot_partitioned(planned, layout).step_seconds,
                     spmd.report(planned, machine=machine).seconds)  # fmt: skip
            table.add_row(name, *(f"{work / peak / t:.3f}" if t else "" for t in times))
        console.print(table)


if __name__ == "__main__":
    main()
