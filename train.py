"""Trains a small language model with `spmd.jit` over all devices of this machine.

Without arguments: eight simulated devices, and the text of Python's own standard library.

    python train.py
    python train.py --parallelism tensor_sequence --mesh data=2,tensor=4 --num-kv-heads 4
    python train.py --config run.toml --checkpoint-dir runs/a --resume must
    python train.py --aot v5p:4x4x4 --mesh fsdp=16,tensor=4 --num-kv-heads 4 --batch 64
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from pathlib import Path

import jax
from rich.console import Console

from sharding.errors import MeshError, Problem, SpmdError
from spmd.ahead.compile import aot_partitioned
from spmd.ahead.libtpu import described_mesh
from spmd.hardware import Machine
from spmd.simulate import simulate
from training import elastic
from training.checkpoint import Checkpoints, identity
from training.checkpoint.resume import find_step
from training.checkpoint.store import Found
from training.cli import parse
from training.config import RunConfig
from training.data import Corpus, load_corpus, unigram_entropy
from training.errors import ConfigError, Interrupted, TrainingError
from training.loop import Loop
from training.program import Plan, make_mesh, plan
from training.report import print_config, print_plan
from training.sample import sample
from training.throughput import flops_per_token
from training.validate import resolve_mesh, validate


def main(argv: list[str]) -> int:
    """Runs the command line `argv` (without the program's name); the exit code."""
    # A file or a pipe has no width of its own, and tables would be folded to 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 120)
    errors = Console(stderr=True, soft_wrap=True)
    checkpoints = None
    try:
        run, mesh_sizes = configure(argv)
        if run.mesh.aot:
            return compile_ahead(console, run, mesh_sizes)
        corpus = load_corpus(run.data)
        print_config(console, run, corpus)
        kept = run.checkpoint
        checkpoints = Checkpoints(Path(kept.checkpoint_dir), kept.keep, kept.save_failures)
        resumed = resume(console, errors, run, corpus, checkpoints)
        planned = plan(run, make_mesh(mesh_sizes))
        print_plan(console, planned)
        train(console, planned, corpus, checkpoints, resumed)
    except SpmdError as error:
        errors.print(f"error: {error}", markup=False, highlight=False, style="red")
        return error.exit_code if isinstance(error, TrainingError) else 1
    except Interrupted as error:
        again = resume_command(argv, checkpoints)
        errors.print(
            f"interrupted and saved; go on with:\n  {again}", markup=False, highlight=False
        )
        return error.exit_code
    except KeyboardInterrupt:
        errors.print("interrupted; there was nothing to save")
        return 130
    finally:
        if checkpoints is not None:
            checkpoints.close()
    return 0


def configure(argv: list[str]) -> tuple[RunConfig, dict[str, int]]:
    """The resolved configuration and the mesh axis sizes.

    Raises:
      ConfigError: all that is wrong with the options.
    """
    run, problems = parse(argv)
    unfit: list[Problem] = []
    simulate(max(run.mesh.devices, 1))
    devices = jax.device_count()
    if run.mesh.aot:
        try:
            devices = Machine.parse(run.mesh.aot).devices
        except MeshError as error:
            problems += error.problems
    else:
        run, devices, unfit = elastic.refit(run, devices)
        problems += unfit
    problems += [] if unfit else validate(run, devices)
    if problems:
        raise ConfigError(*problems)
    sizes = resolve_mesh(run, devices)
    model, checkpoint = run.model, run.checkpoint
    if model.dtype == "auto":
        # A CPU has no bfloat16 arithmetic of its own.
        on_cpu = not run.mesh.aot and jax.default_backend() == "cpu"
        model = dataclasses.replace(model, dtype="float32" if on_cpu else "bfloat16")
    if not checkpoint.checkpoint_dir:
        folder = time.strftime("runs/%Y%m%d-%H%M%S")
        checkpoint = dataclasses.replace(checkpoint, checkpoint_dir=folder)
    shown = ",".join(f"{name}={size}" for name, size in sizes.items())
    mesh = dataclasses.replace(run.mesh, mesh=shown, devices=devices)
    return dataclasses.replace(run, mesh=mesh, model=model, checkpoint=checkpoint), sizes


def compile_ahead(console: Console, run: RunConfig, mesh_sizes: dict[str, int]) -> int:
    """Compiles the step for `--aot`, and prints what the TPU compiler says about it.

    Returns:
      0, or 1 when the step does not fit into the memory of a device.
    """
    mesh, layout = described_mesh(Machine.parse(run.mesh.aot), mesh_sizes)
    with console.status("planning"):
        planned = plan(run, mesh)
    print_config(console, run)
    print_plan(console, planned)
    tokens = run.train.batch * run.data.sequence
    flops = flops_per_token(run.model, run.data.sequence) * tokens
    with console.status("compiling") as status:
        found = aot_partitioned(
            planned.partitioned, layout, model_flops=flops, progress=status.update
        )
    console.print(str(found), markup=False, highlight=False, soft_wrap=True)
    return 0 if found.fits else 1


def resume(
    console: Console, errors: Console, run: RunConfig, corpus: Corpus, checkpoints: Checkpoints
) -> Found | None:
    """The verified step to go on from, or None to start afresh; what was passed over is told."""

    def warn(problem: Problem) -> None:
        errors.print(f"warning: {problem}", markup=False, highlight=False, style="yellow")

    with console.status("verifying checkpoints"):
        return find_step(checkpoints, run.checkpoint.resume, identity(run, corpus), warn)


def train(
    console: Console, planned: Plan, corpus: Corpus, checkpoints: Checkpoints, resumed: Found | None
) -> None:
    """Compiles, trains to the last step, validates and samples."""
    checkpoints.about = elastic.about(planned)
    elastic.print_change(console, resumed.about if resumed else {}, checkpoints.about)
    checkpoints.open()
    started = time.perf_counter()
    with console.status("compiling"):
        step, evaluate = planned.compile_step(), planned.compile_evaluate()
        if resumed is None:
            state = planned.init()
        else:
            state = checkpoints.restore(resumed.step, planned.abstract_state())
    took = time.perf_counter() - started
    origin = "a new run" if resumed is None else f"step {resumed.step}"
    console.print(
        f"compiled in {took:.1f} s; from {origin}; checkpoints in {checkpoints.folder}",
        highlight=False,
    )
    record = identity(planned.run, corpus)
    loop = Loop(planned, corpus, step, evaluate, checkpoints, record, console)
    state = loop.run(state)
    loss = loop.validate(int(state.step), state)
    entropy = unigram_entropy(corpus.validation)
    console.print(
        f"unigram entropy of the validation bytes {entropy:.4f} nats;"
        f" validation loss / entropy = {loss / entropy:.1%}",
        highlight=False,
    )
    if planned.run.sample.sample_bytes:
        text, cache = sample(planned, state.params)
        console.print(f"sample (cache {cache}):", highlight=False, markup=False)
        console.print(text.decode("utf-8", "replace"), highlight=False, markup=False)


def resume_command(argv: list[str], checkpoints: Checkpoints | None) -> str:
    """The command that continues the run that `argv` started."""
    words = ["python", "train.py", *argv]
    if "--checkpoint-dir" not in " ".join(argv) and checkpoints is not None:
        words += ["--checkpoint-dir", str(checkpoints.folder)]
    return shlex.join([*words, "--resume", "must"])  # the last --resume wins


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
