"""Compares `spmd.jit` with `jax.jit`, under Shardy and under GSPMD, on one training step.

    python -m benchmarks.compare [--parallelism fsdp tensor] [--json out.json]

All three compile the same annotated transformer with the same shardings of parameters, optimiser
state and batch, in and out. Compared are the bytes on the wire as the compiled program executes
them, memory, the time of a step, and the time to compile. On simulated devices the wire is memory:
step times there say how much work a program does, not how fast its network would be.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.linen.spmd import logical_to_mesh_sharding
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

import sharding
import spmd
from benchmarks.suite.measure import peak_bytes
from models.shardings import PARALLELISMS, Rules, default_mesh, rules_for
from models.transformer import TransformerConfig
from spmd.reporting.hlo import collectives_in_hlo, summarize
from spmd.simulate import simulate
from training.config import DataConfig, RunConfig, TrainConfig
from training.state import init_state, train_step

SYSTEMS = ("spmd.jit", "jax.jit Shardy", "jax.jit GSPMD")
PHASES = ("trace", "propagate", "partition", "lower", "compile")
MODEL = TransformerConfig(
    num_layers=4, embed_dim=256, mlp_dim=768, num_heads=8, num_kv_heads=4, head_dim=32
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is compiled: a training step, its arguments as shapes, and their shardings."""

    run: RunConfig
    mesh: Mesh
    rules: Rules
    arguments: tuple[Any, Any]  # training state, batch
    in_shardings: tuple[Any, Any]
    out_shardings: tuple[Any, Any]  # training state, metrics


@dataclasses.dataclass
class Result:
    """What one system makes of a problem. Bytes are of one device, times in seconds."""

    parallelism: str
    mesh: dict[str, int]
    system: str
    wire_bytes: dict[str, float] = dataclasses.field(default_factory=dict)  # by kind
    executions: dict[str, int] = dataclasses.field(default_factory=dict)  # by kind
    temporary_bytes: int | None = None
    peak_bytes: float | None = None
    step_time_s: float | None = None
    first_loss: float | None = None
    phases_s: dict[str, float] = dataclasses.field(default_factory=dict)
    error: str = ""


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    # XLA says for every program that GSPMD is on its way out; the tables should stay readable.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    simulate(options.devices)
    console = Console()
    results: list[Result] = []
    for parallelism in options.parallelism:
        problem = make_problem(parallelism, options)
        compared = compare(parallelism, problem, options.repeats)
        console.print(table(parallelism, compared))
        for failed in (result for result in compared if result.error):
            console.print(f"{failed.system}: {failed.error}", style="red", markup=False)
        results += compared
    if options.json:
        rows = [dataclasses.asdict(result) for result in results]
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if any(result.error for result in results) else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    known = list(PARALLELISMS)
    parser.add_argument("--parallelism", nargs="+", choices=known, default=known)
    parser.add_argument("--devices", type=int, default=8, help="simulated without accelerators")
    parser.add_argument("--batch", type=int, default=16, help="examples per step")
    parser.add_argument("--sequence", type=int, default=128, help="positions per example")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps of each system")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser.parse_args(argv)


def make_problem(parallelism: str, options: argparse.Namespace) -> Problem:
    """The training step under one kind of parallelism, with shardings from the axis rules."""
    run = RunConfig(
        model=MODEL,
        data=DataConfig(sequence=options.sequence),
        train=TrainConfig(batch=options.batch),
    )
    sizes = default_mesh(parallelism, options.devices, MODEL)
    devices = np.asarray(jax.devices()[: options.devices]).reshape(tuple(sizes.values()))
    mesh = Mesh(devices, tuple(sizes))
    rules = rules_for(parallelism, mesh.axis_names)
    state = jax.eval_shape(partial(init_state, run), jax.ShapeDtypeStruct((), np.uint32))
    batch = jax.ShapeDtypeStruct((options.batch, options.sequence + 1), np.int32)
    specs = (nn.get_partition_spec(state), PartitionSpec("batch"))
    state_specs, batch_sharding = logical_to_mesh_sharding(specs, mesh, rules)
    # one sharding for every leaf: the boxes of the parameters hold one leaf each
    state_shardings = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(state_specs))
    replicated = NamedSharding(mesh, PartitionSpec())
    metrics = jax.eval_shape(partial(train_step, run), state, batch)[1]
    outputs = (state_shardings, jax.tree.map(lambda _: replicated, metrics))
    return Problem(run, mesh, rules, (state, batch), (state_shardings, batch_sharding), outputs)


def compare(parallelism: str, problem: Problem, repeats: int) -> list[Result]:
    """Compiles with every system, then times their steps in turn."""
    mesh = dict(problem.mesh.shape)
    results = [Result(parallelism, mesh, system) for system in SYSTEMS]
    programs = {}
    for result in results:
        try:
            programs[result.system] = _compile(result, problem)
        except Exception as error:  # one system's failure must not hide what the others do
            result.error = f"{type(error).__name__}: {error}"
    _time_steps(results, programs, problem, repeats)
    return results


def _compile(result: Result, problem: Problem) -> Callable:
    # nothing that an earlier system traced may be reused
    jax.clear_caches()
    build = _compile_spmd if result.system == "spmd.jit" else _compile_jax
    compiled = build(problem, result)
    totals = summarize(collectives_in_hlo(compiled.as_text()))
    result.wire_bytes = {kind: total.wire_bytes for kind, total in totals.items()}
    result.executions = {kind: total.count for kind, total in totals.items()}
    memory = compiled.memory_analysis()
    result.temporary_bytes = getattr(memory, "temp_size_in_bytes", None)
    result.peak_bytes = peak_bytes(memory, described=False)
    return compiled


def _compile_spmd(problem: Problem, result: Result) -> Any:
    with _timed(result, "trace"):
        traced = spmd.jit(
            partial(train_step, problem.run),
            mesh=problem.mesh,
            axis_rules=problem.rules,
            in_shardings=problem.in_shardings,
            out_shardings=problem.out_shardings,
            donate_argnums=(0,),
        ).trace(*problem.arguments)
    with _timed(result, "propagate"):
        propagated = traced.propagate()
    with _timed(result, "partition"):
        partitioned = propagated.partition()
    with _timed(result, "lower"):
        lowered = partitioned.lower()
    with _timed(result, "compile"):
        return lowered.compile()


def _compile_jax(problem: Problem, result: Result) -> Any:
    with _partitioner(result.system), sharding.constrain_with(problem.mesh, problem.rules):
        with _timed(result, "trace"):
            traced = jax.jit(
                partial(train_step, problem.run),
                in_shardings=problem.in_shardings,
                out_shardings=problem.out_shardings,
                donate_argnums=(0,),
            ).trace(*problem.arguments)
        with _timed(result, "lower"):
            lowered = traced.lower()
        # XLA propagates and partitions while it compiles
        with _timed(result, "compile"):
            return lowered.compile()


@contextmanager
def _partitioner(system: str) -> Iterator[None]:
    before = jax.config.values["jax_use_shardy_partitioner"]
    jax.config.update("jax_use_shardy_partitioner", system == "jax.jit Shardy")
    try:
        yield
    finally:
        jax.config.update("jax_use_shardy_partitioner", before)


@contextmanager
def _timed(result: Result, phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    result.phases_s[phase] = time.perf_counter() - start


def _time_steps(
    results: list[Result], programs: dict[str, Callable], problem: Problem, repeats: int
) -> None:
    """Median time of a step; the systems take turns, so that what slows the machine slows all."""
    rng = np.random.default_rng(0)
    shape = problem.arguments[1].shape
    tokens = rng.integers(0, MODEL.vocab_size, shape, dtype=np.int32)
    batch = jax.device_put(tokens, problem.in_shardings[1])
    create = jax.jit(partial(init_state, problem.run), out_shardings=problem.in_shardings[0])
    states = {system: create(np.uint32(0)) for system in programs}
    times: dict[str, list[float]] = {system: [] for system in programs}
    running = [result for result in results if result.system in programs]
    for turn in range(repeats + 1):
        # every other turn backwards, so that none always follows the same one
        for result in running if turn % 2 else reversed(running):
            start = time.perf_counter()
            outputs = programs[result.system](states[result.system], batch)
            states[result.system], metrics = jax.block_until_ready(outputs)
            times[result.system].append(time.perf_counter() - start)
            if turn == 0:
                result.first_loss = float(metrics["loss"])
    for result in running:
        # the first step also loads the program
        result.step_time_s = statistics.median(times[result.system][1:] or [float("nan")])


def table(parallelism: str, results: list[Result]) -> Table:
    """One row per quantity, one column per system; ratios are to `spmd.jit`."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in results[0].mesh.items())
    shown = Table(title=f"{parallelism}  ({mesh})", title_justify="left")
    shown.add_column("per device and step")
    for result in results:
        shown.add_column(result.system, justify="right")
    for kind in sorted({kind for result in results for kind in result.wire_bytes}):
        shown.add_row(f"{kind} MB (times)", *(_wire(result, kind) for result in results))
    totals = [None if each.error else sum(each.wire_bytes.values()) for each in results]
    rows: list[tuple[str, list[float | None], float]] = [
        ("wire MB", totals, 1e6),
        ("temporary memory MB", [each.temporary_bytes for each in results], 1e6),
        ("peak memory MB", [each.peak_bytes for each in results], 1e6),
        ("step ms", [each.step_time_s for each in results], 1e-3),
    ]
    for name, values, unit in rows:
        shown.add_row(name, *_with_ratios(values, unit))
    shown.add_row("first loss", *(_number(each.first_loss, 1, ".6f") for each in results))
    for phase in PHASES:
        seconds = [each.phases_s.get(phase) for each in results]
        shown.add_row(f"{phase} s", *(_number(value, 1, ".2f") for value in seconds))
    return shown


def _wire(result: Result, kind: str) -> str:
    if kind not in result.wire_bytes:
        return "-"
    return f"{result.wire_bytes[kind] / 1e6:.3f} ({result.executions[kind]})"


def _with_ratios(values: list[float | None], unit: float) -> list[str]:
    base = values[0]
    return [
        _number(value, unit, ".3f") + (f" ({value / base:.2f}x)" if base and value else "")
        for value in values
    ]


def _number(value: float | None, unit: float, form: str) -> str:
    return "-" if value is None else format(value / unit, form)


if __name__ == "__main__":
    sys.exit(main())
