"""Rings of matmuls against whole collectives, as the TPU compiler schedules them.

    python -m benchmarks.collective_matmul --target v5e:4x4 --target v5p:2x2x4

Two feed-forward layers of a transformer on a mesh of 4x4, forward only, by hand in four ways: the
sums all-reduced (Megatron), or the sequence sharded between layers (gather, matmul, matmul,
scatter), each with whole collectives and with rings: every device multiplies the part it has while
the next one arrives, or adds to the sum that it passes on (Wang et al., ASPLOS 2023). Rings go
both ways round at once. Needs the extra `tpu`, and no TPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.suite.measure import Result, examine
from benchmarks.suite.registry import programs
from benchmarks.suite.targets import Target
from spmd.options import Options
from spmd.target import compiler_options

BATCH, SEQUENCE, WIDTH, HIDDEN, LAYERS = 32, 2048, 2048, 8192, 2
AXIS = "tensor"
Layer = tuple[jax.Array, jax.Array]


def _turns(size: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pairs of `ppermute` for one place up, and down, the ring."""
    up = [(i, (i + 1) % size) for i in range(size)]
    return up, [(b, a) for a, b in up]


def matmul_scatter(h: jax.Array, w: jax.Array) -> jax.Array:
    """The sum over the axis of h @ w, scattered on dim 1: half of each part each way round."""
    size, here = lax.axis_size(AXIS), lax.axis_index(AXIS)
    part, half = h.shape[1] // size, h.shape[1] // size // 2

    def product(place: Any, first: int) -> jax.Array:
        return lax.dynamic_slice_in_dim(h, place % size * part + first, half, 1) @ w

    up, down = _turns(size)
    low, high = product(here - 1, 0), product(here + 1, half)
    for step in range(1, size):
        low = lax.ppermute(low, AXIS, up) + product(here - 1 - step, 0)
        high = lax.ppermute(high, AXIS, down) + product(here + 1 + step, half)
    return jnp.concatenate([low, high], 1)


def gather_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x, gathered on dim 1 over the axis, @ w."""
    size, here, part = lax.axis_size(AXIS), lax.axis_index(AXIS), x.shape[1]
    out = lax.empty((x.shape[0], size * part, w.shape[1]), x.dtype)

    def put(out: jax.Array, piece: jax.Array, place: Any) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(out, piece @ w, place % size * part, 1)

    out, below, above = put(out, x, here), x, x
    up, down = _turns(size)
    for step in range(1, size // 2 + 1):
        below = lax.ppermute(below, AXIS, up)
        out = put(out, below, here - step)
        if 2 * step < size:
            above = lax.ppermute(above, AXIS, down)
            out = put(out, above, here + step)
    return out


def _whole(x: jax.Array, layers: Sequence[Layer]) -> jax.Array:
    for into, out in layers:
        x = x + lax.psum(jax.nn.gelu(x @ into) @ out, AXIS)
    return x


def _whole_ring(x: jax.Array, layers: Sequence[Layer]) -> jax.Array:
    for into, out in layers:
        y = matmul_scatter(jax.nn.gelu(x @ into), out)
        x = x + lax.all_gather(y, AXIS, axis=1, tiled=True)
    return x


def _sequence(x: jax.Array, layers: Sequence[Layer]) -> jax.Array:
    for into, out in layers:
        h = jax.nn.gelu(lax.all_gather(x, AXIS, axis=1, tiled=True) @ into)
        x = x + lax.psum_scatter(h @ out, AXIS, scatter_dimension=1, tiled=True)
    return x


def _sequence_ring(x: jax.Array, layers: Sequence[Layer]) -> jax.Array:
    for into, out in layers:
        x = x + matmul_scatter(jax.nn.gelu(gather_matmul(x, into)), out)
    return x


WAYS: dict[str, tuple[Callable[..., jax.Array], P]] = {
    "all-reduce": (_whole, P("data")),
    "ring, all-gather": (_whole_ring, P("data")),
    "sequence: gather, scatter": (_sequence, P("data", AXIS)),
    "sequence: rings": (_sequence_ring, P("data", AXIS)),
}


def examined(way: str, place: Any) -> Result:
    """What the compiler makes of one way on the described devices of a place."""
    fun, spec = WAYS[way]
    weights = [(P(None, AXIS), P(AXIS))] * LAYERS
    mapped = jax.shard_map(
        fun, mesh=place.mesh, in_specs=(spec, weights), out_specs=spec, check_vma=False
    )

    def array(shape: tuple[int, ...], spec: P) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(place.mesh, spec)
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    shapes = (WIDTH, HIDDEN), (HIDDEN, WIDTH)
    layers = [tuple(map(array, shapes, specs)) for specs in weights]
    lowered = jax.jit(mapped).lower(array((BATCH, SEQUENCE, WIDTH), spec), layers)
    result = Result(way)
    options = compiler_options(Options(place.mesh)) or None
    examine(result, lowered.compile(options), place.mesh.shape, place.layout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", action="append", help="repeatable; default: v5e:4x4")
    console = Console()
    for name in parser.parse_args().target or ["v5e:4x4"]:
        target = Target(name)
        target.prepare()
        place = target.place(next(p for p in programs(()) if p.name == "megatron"))
        table = Table(title=f"{name}, ms")
        for head in ("way", "computation", "exposed communication", "together", "peak MiB"):
            table.add_column(head, justify="left" if head == "way" else "right")
        for way in track(WAYS, name, console=console, transient=True):
            found = examined(way, place)
            times = (found.compute_s, found.exposed_s, found.estimated_s)
            peak = (found.peak_bytes or 0) / 2**20
            table.add_row(way, *(f"{1e3 * (t or 0):.2f}" for t in times), f"{peak:,.0f}")
        console.print(table)


if __name__ == "__main__":
    main()
