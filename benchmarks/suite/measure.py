"""What one system made of one case, as numbers: read from the compiled module alone.

The same code reads the modules of all systems: bytes on the wire by the ring model, operations,
peak memory as XLA says, and for described TPUs the time that the schedule takes (`spmd.ahead`).
Times of phases and steps are added by `one.py`.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.suite.flops import flops
from benchmarks.suite.systems import Bound, build
from sharding.errors import MeshError
from spmd.ahead.buffers import read_assignment, shortage
from spmd.ahead.schedule import read_schedule
from spmd.hardware import MachineLayout
from spmd.reporting.hlo import HloCollective, collectives_in_hlo
from spmd.reporting.hlo_text import parse_module

__all__ = ["Result", "examine", "flops", "too_large"]

NO_WHOLE_AXES = "no whole axes"


@dataclasses.dataclass
class Result:
    """Numbers of one device and one step; None or empty where they are not known.

    Attributes:
      system: of `systems.SYSTEMS`.
      error: why there is nothing else; "" when all went well.
      fits: False when the program needs more memory than the device has; then only `peak_bytes`
        is known.
      wire_bytes: sent, by the ring model.
      wire_by_kind, wire_by_axes: the same by XLA's kind of collective, and by the mesh axes along
        which it moves, joined by "+".
      collectives: executions by kind.
      peak_bytes: memory.
      flops: of matmuls and convolutions.
      exact: False when a loop of unknown length was counted once.
      cycles: that the TPU compiler estimates.
      compute_s, exposed_s: of the TPU schedule: computation with memory traffic, and communication
        that nothing hides; `estimated_s` is their sum.
      started_s, hidden_s: of transfers that the TPU compiler starts ahead: their time, and what of
        it lies beside computation.
      step_s: median time of a step, where it ran.
      phases_s: seconds from the call to the executable, by phase.
      difference: from the unsharded program, the largest of all results (see `steps.py`).
    """

    system: str
    error: str = ""
    fits: bool = True
    wire_bytes: float | None = None
    wire_by_kind: dict[str, float] = dataclasses.field(default_factory=dict)
    wire_by_axes: dict[str, float] = dataclasses.field(default_factory=dict)
    collectives: dict[str, int] = dataclasses.field(default_factory=dict)
    peak_bytes: float | None = None
    flops: float | None = None
    exact: bool = True
    cycles: float | None = None
    compute_s: float | None = None
    exposed_s: float | None = None
    estimated_s: float | None = None
    started_s: float | None = None
    hidden_s: float | None = None
    step_s: float | None = None
    phases_s: dict[str, float] = dataclasses.field(default_factory=dict)
    difference: float | None = None


def examine(result: Result, compiled: Any, sizes: Mapping[str, int], layout: Any = None) -> None:
    """Fills in what the compiled module says.

    Args:
      compiled: of any system, with `as_text` and `memory_analysis`.
      sizes: of the mesh, by axis name.
      layout: `MachineLayout` of a described TPU; None for others.
    """
    text = compiled.as_text()
    moving = [each for each in collectives_in_hlo(text) if each.group_size > 1]
    result.wire_bytes = sum(each.wire_bytes for each in moving)
    for each in moving:
        _add(result.wire_by_kind, each.kind, each.wire_bytes)
        _add(result.wire_by_axes, _axes(each, sizes), each.wire_bytes)
        result.collectives[each.kind] = result.collectives.get(each.kind, 0) + each.count
    counted = flops(parse_module(text))
    result.flops = counted.count
    result.exact = counted.exact and all(each.exact for each in moving)
    result.peak_bytes = peak_bytes(compiled.memory_analysis(), layout is not None)
    if layout is not None:
        _schedule(result, text, layout)


def _schedule(result: Result, text: str, layout: MachineLayout) -> None:
    found = read_schedule(text, layout)
    started = [each for each in found.transfers if each.asynchronous]
    result.cycles, result.compute_s = found.cycles, found.compute
    result.exposed_s, result.estimated_s = found.exposed, found.seconds
    result.started_s = sum(each.seconds for each in started)
    result.hidden_s = sum(each.seconds - each.exposed for each in started)
    result.exact = result.exact and found.exact


def _axes(each: HloCollective, sizes: Mapping[str, int]) -> str:
    try:
        axes = each.mesh_axes(sizes)
    except (MeshError, ValueError):
        axes = None
    return NO_WHOLE_AXES if axes is None else "+".join(axes)


def _add(totals: dict[str, float], key: str, value: float) -> None:
    totals[key] = totals.get(key, 0.0) + value


def peak_bytes(stats: Any, described: bool) -> float:
    """Peak bytes per device: of a described TPU as its compiler says, else all parts together.

    What JAX calls the peak leaves temporaries out on CPU. All that is allocated there while the
    program runs are its arguments, results, and temporaries.
    """
    parts = (
        stats.argument_size_in_bytes, stats.output_size_in_bytes, stats.temp_size_in_bytes,
        -stats.alias_size_in_bytes,
    )  # fmt: skip
    said = stats.peak_memory_in_bytes if described else 0
    return float(said or sum(parts))


def too_large(result: Result, error: Exception, bound: Bound) -> bool:
    """Whether `error` says that the program does not fit into the memory of a described device; if
    so, `result` says how much it needs.

    XLA's error may count temporaries only. The program is compiled once more, with a dump of all
    buffers, to know the rest.
    """
    needed = shortage(str(error)) if "RESOURCE_EXHAUSTED" in str(error) else None
    if needed is None:
        return False
    with tempfile.TemporaryDirectory(prefix="suite_") as folder:
        try:
            build(result.system, bound, {"xla_dump_to": folder})
        except Exception as again:
            if "RESOURCE_EXHAUSTED" not in str(again):
                return False
        assignment = read_assignment(Path(folder))
    total = float(assignment.total) if assignment else 0.0
    result.fits, result.peak_bytes = False, max(needed.needed, total)
    return True
