"""Whether a step fits into the memory of a device, told before anything is compiled."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console

from sharding.errors import Problem
from spmd import chips
from training.config import RunConfig
from training.errors import ConfigError, quoted
from training.program import Plan, plan
from training.report import human_bytes

__all__ = ["check_memory", "limit_of"]

_SHOWN = 5  # buffers


def limit_of(run: RunConfig, device: Any) -> tuple[int, str] | None:
    """Bytes that a program may take on `device`, and who says so; None where nobody does."""
    if given := run.mesh.memory_limit:
        return int(given * 2**30), f"--memory-limit {given:g}"
    stats = device.memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        return int(limit), f"what {device.device_kind} has"
    chip = chips.of_kind(device.device_kind)
    if chip is None or chip.family == "cpu":  # simulated devices share the machine's memory
        return None
    return int(chip.usable_bytes), f"what {device.device_kind} has"


def check_memory(console: Console, planned: Plan) -> None:
    """Compares the predicted peak of the step with the memory of a device.

    Raises:
      ConfigError: it is over it, and `--ignore-memory-limit` is not given.
    """
    run, peak = planned.run, planned.partitioned.peak_memory
    # Devices of other processes do not tell their memory.
    limit = limit_of(run, planned.mesh.local_devices[0])
    if limit is None or peak <= limit[0]:
        return
    memory = planned.partitioned.report().memory
    largest = ", ".join(
        f"{quoted(buffer.name)} {human_bytes(buffer.bytes)}"
        for buffer in memory.live(memory.at)[:_SHOWN]
    )
    problem = Problem(
        f"a step needs {human_bytes(peak)} per device, predicted, and {human_bytes(limit[0])} is"
        f" {limit[1]}",
        f"the largest buffers at the peak are {largest}",
        f"use {_remedies(planned)}; --ignore-memory-limit goes on all the same",
    )
    if not run.mesh.ignore_memory_limit:
        raise ConfigError(problem)
    console.print(f"warning: {problem}", style="yellow", markup=False, highlight=False)


def _remedies(planned: Plan) -> str:
    run, found = planned.run, []
    if run.model.remat != "full":
        model = dataclasses.replace(run.model, remat="full")
        other = plan(dataclasses.replace(run, model=model), planned.mesh)
        if other.partitioned.peak_memory < planned.partitioned.peak_memory:
            needed = human_bytes(other.partitioned.peak_memory)
            found.append(f"--remat full, which needs {needed}")
    if planned.mesh.shape.get("data", 1) > 1:
        found.append("a --mesh with fsdp in place of data")
    found.append(f"a --batch below {run.train.batch}, or a --mesh of more devices")
    return ", ".join(found)
