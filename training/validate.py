"""Checks of a whole configuration against itself, the devices and the files, before anything runs.

Every check gives the problems it finds as a list; nothing is raised and nothing is written.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from models.shardings import (
    PARALLELISMS,
    components,
    default_mesh,
    dim_sizes,
    required_axes,
    rules_for,
    shards,
)
from models.transformer import TransformerConfig
from sharding.errors import Problem, did_you_mean
from spmd.mesh_text import read_across
from training.config import CheckpointConfig, LogConfig, MeshConfig, RunConfig
from training.errors import quoted
from training.files import nearest
from training.folders import name_problem
from training.mesh_text import AXES, across_problem, read_mesh
from training.metrics import NO_TENSORBOARD, has_tensorboard
from training.profiling import check_profile

__all__ = ["AXES", "MOST_DEVICES", "resolve_mesh", "validate"]

_SEED_END = 2**32

# The option that sets the size of a dim; dims that are always sharded alike have one entry.
_DIM_FLAGS = {
    "batch": "--batch",
    "residual_sequence": "--sequence",
    "residual_embed": "--embed-dim",
    "embed": "--embed-dim",
    "kv_heads": "--num-kv-heads",
    "mlp": "--mlp-dim",
    "vocab": "--vocab-size",
}

_INT_END = 2**31  # of the sizes of dims, and of the counters of steps
MOST_DEVICES = 4096  # that are simulated
_LONGEST_NAME = 255  # bytes
_MOST_HEADS = 256  # that are proposed

# key -> (test, what the value must be)
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    **{
        key: (lambda value: 1 <= value < _INT_END, "from 1 to 2^31 - 1")
        for key in (
            "num_layers embed_dim mlp_dim num_heads num_kv_heads head_dim sequence batch steps"
            " eval_every eval_batches log_every keep max_skipped save_failures"
        ).split()
    },
    **{
        key: (lambda value: 0 <= value < _INT_END, "from 0 to 2^31 - 1")
        for key in "checkpoint_every sample_bytes vocab_size".split()
    },
    **{
        key: (lambda value: value >= 0, "0 or more")
        for key in "temperature weight_decay memory_limit".split()
    },
    "devices": (lambda value: 1 <= value <= MOST_DEVICES, f"from 1 to {MOST_DEVICES}"),
    **{
        key: (lambda value: 0 <= value < 1, "at least 0 and below 1")
        for key in ("dropout", "beta1", "beta2", "warmup")
    },
    **{
        key: (lambda value: value > 0, "above 0")
        for key in ("learning_rate", "clip_norm", "rope_base")
    },
    **{
        key: (lambda value: 1 <= value <= 86_400, "from 1 to 86400 seconds")
        for key in ("start_timeout", "peer_timeout", "exit_timeout", "step_timeout")
    },
    "validation": (lambda value: 0 < value < 1, "between 0 and 1, neither included"),
    "seed": (lambda value: 0 <= value < _SEED_END, f"from 0 to {_SEED_END - 1}"),
}


def validate(
    run: RunConfig, devices: int, nodes: int | None = None, processes: int = 1
) -> list[Problem]:
    """All that cannot work in `run`.

    Args:
      devices: how many there are, of all processes together.
      nodes: the slices or nodes that they lie in; None where they are simulated.
      processes: how many there are.
    """
    problems, run = _ranges(run)
    problems += _model(run.model)
    problems += _folders(run.checkpoint)
    problems += _log(run.log, run.train.steps)
    unknown = _parallelism(run.mesh.parallelism)
    mesh, mesh_problems = read_mesh(run.mesh.mesh, devices) if run.mesh.mesh else ({}, [])
    problems += unknown + mesh_problems
    if unknown or mesh_problems:
        return problems
    mesh = resolve_mesh(run, devices)
    across = read_across(run.mesh.mesh, mesh)
    if problem := across_problem(run.mesh.mesh, across, nodes, processes):
        problems.append(problem)
    return problems + _axes_used(mesh, run.mesh) + _divisible(run, mesh)


def resolve_mesh(run: RunConfig, devices: int) -> dict[str, int]:
    """The mesh axes and their sizes, of a configuration that `validate` has no problem with."""
    if run.mesh.mesh:
        return read_mesh(run.mesh.mesh, devices)[0]
    return default_mesh(run.mesh.parallelism, devices, run.model)


def _axes_used(mesh: Mapping[str, int], config: MeshConfig) -> list[Problem]:
    parallelism = config.parallelism
    shown = f"--mesh {config.mesh or ','.join(f'{name}={n}' for name, n in mesh.items())}"
    used = {
        axis
        for _, axes in rules_for(parallelism, mesh)
        for axis in ((axes,) if isinstance(axes, str) else axes or ())
    }
    problems = []
    for name in [name for name, size in mesh.items() if size != 1 and name not in used]:
        why = (
            f"--parallelism {parallelism} shards nothing over {name!r}: its {mesh[name]} devices"
            " would all do the same work"
        )
        problems.append(Problem(shown, why, f"leave {name!r} out, or mix in a table that uses it"))
    for choice in required_axes(parallelism):
        if not set(choice) & set(mesh):
            why = f"--parallelism {parallelism} needs the axis {' or '.join(choice)}"
            problems.append(Problem(shown, why, f"add {choice[0]}=2, or change the parallelism"))
    return problems


def _parallelism(text: str) -> list[Problem]:
    return [
        Problem(
            f"--parallelism {quoted(text)}",
            f"there is no table {quoted(part)!r}{did_you_mean(part, PARALLELISMS)}",
            f"join tables with +, from {', '.join(PARALLELISMS)}",
        )
        for part in components(text)
        if part not in PARALLELISMS
    ]


def _divisible(run: RunConfig, mesh: Mapping[str, int]) -> list[Problem]:
    """Every dim must divide evenly: JAX has no uneven arrays at the boundary of a program."""
    problems = []
    sizes = dim_sizes(run.model, run.train.batch, run.data.sequence)
    for name, axes in rules_for(run.mesh.parallelism, mesh):
        parts = shards(axes, mesh)
        if name not in _DIM_FLAGS or sizes[name] % parts == 0:
            continue
        size, flag = sizes[name], _DIM_FLAGS[name]
        axis_names = (axes,) if isinstance(axes, str) else axes or ()
        product = " x ".join(f"{axis}={mesh[axis]}" for axis in axis_names)
        why = f"it is split over {product}, {parts} ways, and {size} = "
        why += f"{size // parts} x {parts} + {size % parts}"
        below = 0 if name == "vocab" else size // parts * parts  # the data needs all its ids
        near = [str(n) for n in (below, (size // parts + 1) * parts) if n]
        fix = f"use {flag} {' or '.join(near)}, or another --mesh"
        problems.append(Problem(f"{flag} {size}", why, fix))
    return problems


def _ranges(run: RunConfig) -> tuple[list[Problem], RunConfig]:
    """What is out of range, and `run` with defaults instead, which other checks calculate with."""
    problems = []
    for component in dataclasses.fields(run):
        part, default = getattr(run, component.name), getattr(RunConfig(), component.name)
        for key, (test, needed) in _RANGES.items():
            if hasattr(part, key) and not test(getattr(part, key)):
                flag, usual = f"--{key.replace('_', '-')}", getattr(default, key)
                value = getattr(part, key)
                what = f"{flag} {f'{value:g}' if isinstance(value, float) else value}"
                problems.append(
                    Problem(what, f"it must be {needed}", f"for instance {flag} {usual}")
                )
                part = dataclasses.replace(part, **{key: usual})
        run = dataclasses.replace(run, **{component.name: part})
    return problems, run


def _model(model: TransformerConfig) -> list[Problem]:
    problems = []
    heads, kv_heads = model.num_heads, model.num_kv_heads
    if heads % kv_heads:
        why = f"each key/value head serves as many query heads, and {heads} / {kv_heads} leaves"
        why += f" {heads % kv_heads}"
        what = f"--num-heads {heads} --num-kv-heads {kv_heads}"
        legal = [str(n) for n in range(1, min(heads, _MOST_HEADS) + 1) if heads % n == 0]
        problems.append(Problem(what, why, f"use --num-kv-heads {' or '.join(legal)}"))
    if model.head_dim % 2:
        why = "rotary embeddings rotate pairs of entries, so it must be even"
        fix = f"use --head-dim {model.head_dim + 1}"
        problems.append(Problem(f"--head-dim {model.head_dim}", why, fix))
    return problems


def _folders(checkpoint: CheckpointConfig) -> list[Problem]:
    problems = []
    folder, name = checkpoint.checkpoint_dir, checkpoint.run_name
    given = f"--checkpoint-dir {quoted(folder)}"
    if name and (problem := name_problem(checkpoint.output_root, name)):
        problems.append(problem)
    elif name and folder:
        why = "both say where the run has its folder"
        what = f"--run-name {name} {given}"
        problems.append(Problem(what, why, "keep one of them"))
    elif name:
        folder = os.path.join(checkpoint.output_root, name)
        given = f"--run-name {name} --output-root {quoted(checkpoint.output_root)}"
    if "://" in folder:
        why = "checkpoints are committed by a rename, which object stores do not have"
        problems.append(Problem(given, why, "name a folder of a file system that is mounted"))
    elif "\0" in folder or os.path.exists(folder) and not os.path.isdir(folder):
        problems.append(Problem(given, "it is not a folder", "name a folder, or a new one"))
    elif any(len(os.fsencode(part)) > _LONGEST_NAME for part in folder.split(os.sep)):
        why = f"file systems keep names of at most {_LONGEST_NAME} bytes"
        problems.append(Problem(given, why, "use a shorter name"))
    elif checkpoint.resume == "must" and not folder:
        fix = "name the folder of the run to continue: --checkpoint-dir runs/..."
        problems.append(Problem("--resume must", "no --checkpoint-dir is given", fix))
    elif checkpoint.resume == "must" and not os.path.isdir(folder):
        why = "--resume must needs a checkpoint, and the folder does not exist"
        why += nearest(Path(folder))
        problems.append(Problem(given, why, "name the folder of the run to continue"))
    return problems


def _log(log: LogConfig, steps: int) -> list[Problem]:
    problems = [NO_TENSORBOARD] if log.tensorboard and not has_tensorboard() else []
    return problems + (check_profile(log.profile, steps) if log.profile else [])
