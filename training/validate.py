"""Checks of a whole configuration against itself, the devices and the files, before anything runs.

Every check gives the problems it finds as a list; nothing is raised and nothing is written.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from math import prod
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
from training.config import CheckpointConfig, MeshConfig, RunConfig

__all__ = ["AXES", "resolve_mesh", "validate"]

AXES = ("data", "fsdp", "tensor", "sequence", "expert", "stage")
_SEED_END = 2**32

# The option that sets the size of a dim; dims that are always sharded alike have one entry.
_DIM_FLAGS = {
    "batch": "--batch",
    "residual_sequence": "--sequence",
    "residual_embed": "--embed-dim",
    "embed": "--embed-dim",
    "kv_heads": "--num-kv-heads",
    "mlp": "--mlp-dim",
    "vocab": "the number of byte values,",
}

# key -> (test, what the value must be)
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    **{
        key: (lambda value: value >= 1, "1 or more")
        for key in (
            "num_layers embed_dim mlp_dim num_heads num_kv_heads head_dim devices sequence batch"
            " steps eval_every eval_batches log_every keep save_failures"
        ).split()
    },
    **{
        key: (lambda value: value >= 0, "0 or more")
        for key in "checkpoint_every sample_bytes temperature weight_decay".split()
    },
    **{
        key: (lambda value: 0 <= value < 1, "at least 0 and below 1")
        for key in ("dropout", "beta1", "beta2", "warmup")
    },
    **{
        key: (lambda value: value > 0, "above 0")
        for key in ("learning_rate", "clip_norm", "rope_base")
    },
    "validation": (lambda value: 0 < value < 1, "between 0 and 1, neither included"),
    "seed": (lambda value: 0 <= value < _SEED_END, f"from 0 to {_SEED_END - 1}"),
}


def validate(run: RunConfig, devices: int) -> list[Problem]:
    """All that cannot work in `run` on `devices` devices."""
    problems, run = _ranges(run)
    problems += _model(run.model)
    problems += _files(run.checkpoint, run.data.data)
    unknown = _parallelism(run.mesh.parallelism)
    mesh, mesh_problems = _read_mesh(run.mesh.mesh, devices) if run.mesh.mesh else ({}, [])
    problems += unknown + mesh_problems
    if unknown or mesh_problems:
        return problems
    mesh = resolve_mesh(run, devices)
    return problems + _axes_used(mesh, run.mesh) + _divisible(run, mesh)


def resolve_mesh(run: RunConfig, devices: int) -> dict[str, int]:
    """The mesh axes and their sizes, of a configuration that `validate` has no problem with."""
    if run.mesh.mesh:
        return _read_mesh(run.mesh.mesh, devices)[0]
    return default_mesh(run.mesh.parallelism, devices, run.model)


def _read_mesh(text: str, devices: int) -> tuple[dict[str, int], list[Problem]]:
    """The sizes that `--mesh` names, with -1 filled in; and what is wrong with it."""
    shown = f"--mesh {text}"
    mesh, problems = _parse_mesh(text, shown)
    if problems:
        return mesh, problems
    known = prod(size for size in mesh.values() if size != -1)
    product = " x ".join(f"{name}={size}" for name, size in mesh.items())
    if -1 in mesh.values() and devices % known == 0:
        mesh = {name: devices // known if size == -1 else size for name, size in mesh.items()}
    elif -1 in mesh.values():
        why = f"the other sizes make {known}, which does not divide the {devices} devices"
        problems.append(Problem(shown, why, f"use sizes whose product divides {devices}"))
    elif known != devices:
        why = f"{product} needs {known} devices and there are {devices}"
        fix = f"use sizes with the product {devices}, or -1 for one of them"
        problems.append(Problem(shown, why, fix))
    return mesh, problems


def _parse_mesh(text: str, shown: str) -> tuple[dict[str, int], list[Problem]]:
    mesh: dict[str, int] = {}
    problems = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([a-z]+)\s*=\s*(-?\d{1,9})\s*", part)
        if not match:
            why = f"{part!r} is not of the form axis=size"
            problems.append(Problem(shown, why, "write it like data=2,tensor=4"))
            continue
        name, size = match[1], int(match[2])
        if name not in AXES:
            why = f"{name!r} is no mesh axis{did_you_mean(name, AXES)}"
            problems.append(Problem(shown, why, f"the axes are {', '.join(AXES)}"))
        if name in mesh:
            problems.append(Problem(shown, f"axis {name!r} is given twice", "give it one size"))
        if size == 0 or size < -1:
            why = f"axis {name!r} has size {size}, and an axis holds at least one device"
            problems.append(Problem(shown, why, "use 1 or more, or -1 for all that is left"))
        mesh[name] = size
    if list(mesh.values()).count(-1) > 1:
        why = "-1 stands for all devices that are left, so only one axis can have it"
        problems.append(Problem(shown, why, "give all axes but one a size"))
    return mesh, problems


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
            f"--parallelism {text}",
            f"there is no table {part!r}{did_you_mean(part, PARALLELISMS)}",
            f"mix {', '.join(PARALLELISMS)} with +",
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
        near = [str(n) for n in (size // parts * parts, (size // parts + 1) * parts) if n]
        fix = f"use {flag} {' or '.join(near)}, or another --mesh"
        fix = fix if flag.startswith("--") else f"use a --mesh whose sizes divide {size}"
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
        legal = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        problems.append(Problem(what, why, f"use --num-kv-heads {legal.replace(', ', ' or ')}"))
    if model.head_dim % 2:
        why = "rotary embeddings rotate pairs of entries, so it must be even"
        fix = f"use --head-dim {model.head_dim + 1}"
        problems.append(Problem(f"--head-dim {model.head_dim}", why, fix))
    return problems


def _files(checkpoint: CheckpointConfig, data: str) -> list[Problem]:
    problems = []
    folder = Path(checkpoint.checkpoint_dir)
    shown = f"--checkpoint-dir {checkpoint.checkpoint_dir}"
    if "\0" in checkpoint.checkpoint_dir or folder.exists() and not folder.is_dir():
        problems.append(Problem(shown, "it is not a folder", "name a folder, or a new one"))
    elif checkpoint.resume == "must" and not checkpoint.checkpoint_dir:
        fix = "name the folder of the run to continue: --checkpoint-dir runs/..."
        problems.append(Problem("--resume must", "no --checkpoint-dir is given", fix))
    elif checkpoint.resume == "must" and not folder.is_dir():
        siblings = _siblings(folder)
        why = f"--resume must needs a checkpoint, and the folder does not exist{siblings}"
        problems.append(Problem(shown, why, "name the folder of the run to continue"))
    if data and ("\0" in data or not Path(data).exists()):
        why = "there is no such file or folder" + ("" if "\0" in data else _siblings(Path(data)))
        problems.append(Problem(f"--data {data}", why, "name a text file, or a folder of them"))
    return problems


def _siblings(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    names = sorted(entry.name for entry in path.parent.iterdir())[:1000]
    return did_you_mean(path.name, names)
