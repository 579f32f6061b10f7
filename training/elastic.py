"""Going on with more or fewer devices than a run left: another mesh, and what it changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from math import log2, prod
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from models.shardings import rules_for, shards
from sharding.errors import MeshError, Problem
from spmd import chips
from spmd.hardware import Machine
from spmd.mesh_text import mesh_text, read_across
from spmd.reporting import units
from training.checkpoint.store import newest_about
from training.config import RunConfig
from training.folders import name_problem, with_folder
from training.program import Plan
from training.validate import validate

__all__ = ["about", "print_change", "refit"]


def refit(
    run: RunConfig, devices: int, nodes: int | None = None, processes: int = 1
) -> tuple[RunConfig, int, list[Problem]]:
    """The configuration that continues a run on `devices` devices, if those are not as many as
    its newest checkpoint was written on.

    With `--elastic` that is a mesh with the same axes: as many devices as possible are used, axes
    that do not divide the batch keep their sizes if they can, and all dims divide. Without it, and
    without a `--mesh` of the user's for the new number, nothing is chosen silently.

    Args:
      devices, nodes, processes: as of `training.validate.validate`.

    Returns:
      The configuration, the number of devices that it uses, and what is wrong.
    """
    config = run.checkpoint
    folder = config.checkpoint_dir
    if config.run_name and not name_problem(config.output_root, config.run_name):
        folder = with_folder(config).checkpoint_dir
    before = newest_about(Path(folder)) if folder else {}
    left = before.get("devices", devices)
    if config.resume == "never" or left == devices or "mesh" not in before:
        return run, devices, []
    if run.mesh.mesh and not any(
        p.what.startswith("--mesh ") for p in validate(run, devices, nodes, processes)
    ):
        return run, devices, []
    shown = f"{folder} is from {left} devices, and there are {devices}"
    if not config.elastic:
        why = f"the state was laid out on {_text(before['mesh'])}, and another mesh changes memory"
        why += " and time per step"
        fix = "use --elastic to go on on a mesh that fits, or name one with --mesh"
        return run, devices, [Problem(shown, why, fix)]
    # A process without a device in the mesh could not take part.
    fewest = devices if jax.process_count() > 1 else 1
    for used in range(devices, fewest - 1, -1):
        if fitted := _fitted(run, before["mesh"], used, nodes, processes):
            return fitted, used, []
    why = f"no mesh with the axes {', '.join(before['mesh'])} divides all dims of the model and"
    why += f" --batch {run.train.batch}"
    return run, devices, [Problem(shown, why, "name a mesh with --mesh, and a --parallelism")]


def about(plan: Plan) -> dict[str, Any]:
    """How a run is laid out and what that is predicted to take, for the manifests of its steps."""
    mesh, run = plan.mesh, plan.run
    machine = _machine(mesh)
    seconds = plan.partitioned.report(machine).seconds if machine else 0.0
    split = dict(rules_for(run.mesh.parallelism, mesh.axis_names)).get("batch")
    return {
        "mesh": dict(mesh.shape),
        "devices": mesh.devices.size,
        "device": mesh.devices.flat[0].device_kind,
        "processes": jax.process_count(),
        "batch": run.train.batch,
        "examples": run.train.batch // shards(split, mesh.shape),
        "memory": plan.partitioned.peak_memory,
        "seconds": seconds,
    }


def print_change(console: Console, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """What is different from the run that wrote a checkpoint; nothing if the mesh is the same.

    Args:
      before, now: from `about`; `before` may be empty.
    """
    if not before or before["mesh"] == now["mesh"]:
        return
    rows = [
        (
            "mesh",
            *(
                f"{_text(x['mesh'])} ({x['devices']} x {x['device']}"
                + (f", {x['processes']} processes)" if x["processes"] > 1 else ")")
                for x in (before, now)
            ),
        ),
        ("batch", *(f"{x['batch']}: {x['examples']} per device" for x in (before, now))),
        ("predicted memory per device", *(units.size(x["memory"]) for x in (before, now))),
        ("predicted time per step", *(_seconds(x["seconds"]) for x in (before, now))),
    ]
    console.print("the checkpoint was written on another mesh:")
    for name, was, is_now in rows:
        console.print(f"  {name}: {was} -> {is_now}", markup=False, highlight=False)
    idle = jax.device_count() - now["devices"]
    if idle:
        console.print(f"  {units.plural(idle, 'device')} left idle: no mesh uses all")


def _fitted(
    run: RunConfig, before: Mapping[str, int], devices: int, nodes: int | None, processes: int
) -> RunConfig | None:
    """`run` on the mesh nearest to `before` that validation has nothing against."""
    across = read_across(run.mesh.mesh, dict.fromkeys(before, 2))

    def on(sizes: Mapping[str, int]) -> RunConfig:
        text = mesh_text(sizes, across)
        return dataclasses.replace(run, mesh=dataclasses.replace(run.mesh, mesh=text))

    # What is wrong on a single device is not the mesh's fault, and told later.
    always = set(validate(on(dict.fromkeys(before, 1)), 1))
    fitted = (on(sizes) for sizes in _meshes(before, devices, across))
    return next(
        (e for e in fitted if set(validate(e, devices, nodes, processes)) <= always), None
    )


def _meshes(
    before: Mapping[str, int], devices: int, across: Mapping[str, int]
) -> Iterator[dict[str, int]]:
    """All sizes of the axes of `before` that multiply to `devices`, the likeliest first."""
    axes = list(before)
    # Nodes come and go last: what lay inside of one would lie across two.
    weights = {axis: 0.01 if axis in ("data", "fsdp") else 1 for axis in axes}
    weights |= dict.fromkeys(across, 2)
    found = [dict(zip(axes, sizes, strict=True)) for sizes in _factors(devices, len(axes))]

    def distance(mesh: dict[str, int]) -> float:
        # The batch absorbs what comes and goes; other axes decide what a device holds at all.
        return sum(
            abs(log2(mesh[axis] / before[axis])) * weights[axis] for axis in axes
        )

    yield from sorted(found, key=distance)


def _factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    if count == 0:
        yield from [()] if number == 1 else []
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _factors(number // first, count - 1):
                yield (first, *rest)


def _machine(mesh: Any) -> Machine | None:
    """The machine of a mesh's devices, for predictions; None where nobody described it."""
    devices = list(mesh.devices.flat)
    chip = chips.of_kind(devices[0].device_kind)
    if chip is None:
        return None
    text = f"{chip.name}:{len(devices)}"
    if chip.family == "gpu" and (nodes := len({d.process_index for d in devices})) > 1:
        text = f"{chip.name}:{nodes}x{len(devices) // nodes}"
    elif chip.family == "tpu":
        slices = len({getattr(d, "slice_index", 0) for d in devices})
        dims = zip(*(d.coords[: chip.rank] for d in devices), strict=True)
        text = f"{chip.name}:{'x'.join(str(len(set(dim))) for dim in dims)}*{slices}"
    try:
        machine = Machine.parse(text)
    except MeshError:
        return None
    return machine if machine.devices == prod(mesh.devices.shape) else None


def _text(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def _seconds(seconds: float) -> str:
    return units.seconds(seconds) if seconds else "unknown"
