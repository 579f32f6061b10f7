"""Trains a small language model with `spmd.jit` over all devices of this machine.

Without arguments: eight simulated devices, and the text of Python's own standard library.

    python train.py
    python train.py --parallelism tensor_sequence --mesh data=2,tensor=4 --num-kv-heads 4
    python train.py --config run.toml --checkpoint-dir runs/a --resume must
    srun python train.py --checkpoint-dir runs/a          # see spmd/runtime/README.md
    python train.py --aot v5p:4x4x4 --mesh fsdp=16,tensor=4 --num-kv-heads 4 --batch 64
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from functools import partial
from pathlib import Path

import jax
from rich.console import Console

from sharding.errors import MeshError, Problem, SpmdError
from sharding.mesh import MeshShape
from spmd.ahead.compile import aot_partitioned
from spmd.ahead.libtpu import described_mesh
from spmd.hardware import Machine
from spmd.mesh_text import mesh_text, read_across
from spmd.runtime import end, processes
from spmd.runtime.hybrid import count_nodes, make_mesh
from spmd.simulate import accelerators
from training import elastic, hosts
from training.checkpoint import Checkpoints, identity
from training.checkpoint.resume import find_step
from training.checkpoint.store import Found
from training.cli import parse
from training.config import RunConfig
from training.data import Corpus, load_corpus, unigram_entropy, vocabulary
from training.errors import ConfigError, DataError, DivergedError, Interrupted, StalledError
from training.folders import with_folder
from training.goodput import Goodput
from training.loop import Loop
from training.memory import check_memory
from training.program import Plan, plan
from training.report import print_config, print_plan
from training.sample import sample
from training.signals import StopRequest
from training.throughput import flops_per_token
from training.validate import resolve_mesh, validate


def main(argv: list[str]) -> int:
    """Runs the command line `argv` (without the program's name); the exit code."""
    # A file or a pipe has no width of its own, and tables would be folded to 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 120)
    errors = Console(stderr=True, soft_wrap=True)
    show = partial(errors.print, markup=False, highlight=False)
    fail = partial(end.fail, show=partial(show, style="red"))
    checkpoints, code = None, 0
    try:
        run, mesh_sizes = configure(argv)
        console.quiet = not processes.is_primary()
        if run.mesh.aot:
            code = compile_ahead(console, run, mesh_sizes)
        else:
            corpus = load_corpus(run.data)
            print_config(console, run, corpus)
            kept = run.checkpoint
            checkpoints = Checkpoints(Path(kept.checkpoint_dir), kept.keep, kept.save_failures)
            resumed = resume(console, errors, run, corpus, checkpoints)
            planned = prepare(console, run, mesh_sizes, corpus, resumed)
            train(console, planned, corpus, checkpoints, resumed)
    except SpmdError as error:
        code = getattr(error, "exit_code", 1)
        if isinstance(error, DivergedError) and checkpoints is not None:
            checkpoints.close()  # all are here, and a save that began before is good
        fail(code, f"error: {error}", at_once=isinstance(error, StalledError))
    except Interrupted as error:
        code, again = error.exit_code, resume_command(argv, checkpoints)
        if processes.is_primary():
            show(f"interrupted and saved; go on with:\n  {again}")
    except KeyboardInterrupt:
        code = 130
        fail(code, "interrupted; there was nothing to save")
    except Exception as error:
        end.uncaught(error)
        raise
    finally:
        if checkpoints is not None:
            checkpoints.close()
    end.finish()
    return code


def configure(argv: list[str]) -> tuple[RunConfig, dict[str, int]]:
    """The resolved configuration and the mesh axis sizes.

    Raises:
      ConfigError: all that is wrong with the options.
      DataError: the options are right, and the data that they name is not.
    """
    run, problems = parse(argv)
    problems += hosts.join(run, problems)
    devices, nodes = jax.device_count(), count_nodes() if accelerators() else None
    run, unreadable = with_vocabulary(run, problems)
    unfit: list[Problem] = []
    if run.mesh.aot:
        try:
            machine = Machine.parse(run.mesh.aot)
            devices, nodes = machine.devices, machine.slices
        except MeshError as error:
            problems += error.problems
    else:
        run, devices, unfit = elastic.refit(run, devices, nodes, processes.count())
        problems += unfit
    problems += [] if unfit else validate(run, devices, nodes, processes.count())
    if problems:
        raise ConfigError(*problems)
    if unreadable:
        raise unreadable
    sizes = resolve_mesh(run, devices)
    model, checkpoint = run.model, run.checkpoint
    if model.dtype == "auto":
        # A CPU has no bfloat16 arithmetic of its own.
        on_cpu = not run.mesh.aot and jax.default_backend() == "cpu"
        model = dataclasses.replace(model, dtype="float32" if on_cpu else "bfloat16")
    folder = with_folder(checkpoint).checkpoint_dir
    folder = processes.broadcast("the folder of the run", folder, hosts.AGREE_S)
    checkpoint = dataclasses.replace(checkpoint, checkpoint_dir=folder)
    shown = mesh_text(sizes, read_across(run.mesh.mesh, sizes))
    mesh = dataclasses.replace(run.mesh, mesh=shown, devices=devices)
    return dataclasses.replace(run, mesh=mesh, model=model, checkpoint=checkpoint), sizes


def with_vocabulary(run: RunConfig, problems: list[Problem]) -> tuple[RunConfig, DataError | None]:
    """The configuration with the vocabulary that its data needs.

    What is wrong with the options goes to `problems`. What is wrong with the data is returned:
    it has an exit code of its own, and is told when the options are right.
    """
    try:
        size = vocabulary(run.data)
    except ConfigError as error:
        problems += error.problems
    except DataError as error:
        return run, error
    else:
        model = dataclasses.replace(run.model, vocab_size=size)
        return dataclasses.replace(run, model=model), None
    return run, None


def compile_ahead(console: Console, run: RunConfig, mesh_sizes: dict[str, int]) -> int:
    """Compiles the step for `--aot`, and prints what the TPU compiler says about it.

    Returns:
      0, or 1 when the step does not fit into the memory of a device.
    """
    across = tuple(read_across(run.mesh.mesh, mesh_sizes).items())
    shape = MeshShape(tuple(mesh_sizes.items()), across=across)
    mesh, layout = described_mesh(Machine.parse(run.mesh.aot), shape)
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
        if processes.is_primary():
            errors.print(f"warning: {problem}", markup=False, highlight=False, style="yellow")

    expected = identity(run, corpus)
    if run.data.allow_data_change:
        del expected["text"]
    with console.status("verifying checkpoints"):
        return find_step(checkpoints, run.checkpoint.resume, expected, warn)


def prepare(
    console: Console,
    run: RunConfig,
    mesh_sizes: dict[str, int],
    corpus: Corpus,
    resumed: Found | None,
) -> Plan:
    """The partitioned step, on which all processes agree and which fits into memory."""
    planned = plan(run, make_mesh(mesh_sizes, read_across(run.mesh.mesh, mesh_sizes)))
    print_plan(console, planned)
    hosts.agree_on_plan(planned, corpus, resumed.step if resumed else None)
    check_memory(console, planned)
    return planned


def train(
    console: Console, planned: Plan, corpus: Corpus, checkpoints: Checkpoints, resumed: Found | None
) -> None:
    """Compiles, trains to the last step, validates and samples."""
    checkpoints.about = elastic.about(planned)
    elastic.print_change(console, resumed.about if resumed else {}, checkpoints.about)
    checkpoints.open()
    with StopRequest() as stop:
        started, goodput = time.perf_counter(), Goodput()
        with console.status("compiling"):
            with goodput.spent("compile"):
                step, evaluate = planned.compile_step(), planned.compile_evaluate()
            with goodput.spent("restore" if resumed else "compile"):
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
        loop = Loop(planned, corpus, step, evaluate, checkpoints, record, console, stop, goodput)
        state = loop.run(state)
    loss, entropy = loop.validation_loss, unigram_entropy(corpus.validation)
    console.print(
        f"unigram entropy of the validation {corpus.unit} {entropy:.4f} nats;"
        + (f" validation loss / entropy = {loss / entropy:.1%}" if entropy > 0 else ""),
        highlight=False,
    )
    if planned.run.sample.sample_bytes and corpus.tokenizer is not None:
        text, cache = sample(planned, corpus.tokenizer, state.params)
        console.print(f"sample (cache {cache}):", highlight=False, markup=False)
        console.print(text, highlight=False, markup=False)


def resume_command(argv: list[str], checkpoints: Checkpoints | None) -> str:
    """The command that continues the run that `argv` started."""
    words = ["python", "train.py", *argv]
    named = "--checkpoint-dir" in " ".join(argv) or parse(argv)[0].checkpoint.run_name
    if not named and checkpoints is not None:
        words += ["--checkpoint-dir", str(checkpoints.folder)]
    return shlex.join([*words, "--resume", "must"])  # the last --resume wins


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
