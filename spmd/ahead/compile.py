"""`spmd.aot`: compiles a partitioned program with the real TPU compiler, without a TPU.

Works in the process that calls it, also when that uses other devices: libtpu only describes TPUs
here. What libtpu reads from the environment is set before it is loaded, by `libtpu.prepare`.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sharding.errors import ArgumentError, Problem
from sharding.mesh import MeshShape
from spmd.ahead.buffers import Assignment, read_assignment, shortage
from spmd.ahead.libtpu import described_mesh
from spmd.ahead.result import Ahead
from spmd.ahead.schedule import read_schedule
from spmd.dispatch import Function, jit
from spmd.estimate.work import lines
from spmd.hardware import Machine, MachineLayout
from spmd.stages import Partitioned

__all__ = ["aot", "aot_partitioned"]

PHASES = ("trace", "propagate", "partition", "lower", "compile")
Progress = Callable[[str], None]


def aot(
    fun: Callable,
    *args: Any,
    mesh: Any,
    topology: str | Machine,
    kwargs: Mapping[str, Any] | None = None,
    model_flops: float | None = None,
    compiler_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Ahead:
    """Compiles `fun`, partitioned over `mesh`, for TPUs that need not be there.

    Args:
      fun: a function written as for one device, as for `spmd.jit`.
      *args: arguments; `jax.ShapeDtypeStruct`s will do.
      mesh: sizes by axis name, {"data": 16, "tensor": 4}.
      topology: "v5p:4x4x4", see `spmd.hardware.Machine.parse`.
      kwargs: keyword arguments of `fun`.
      model_flops: FLOPs of one call, on all devices together, for the utilisation; counted from
        the program where it is not given.
      compiler_options: of XLA, as in `jax.jit`.
      progress: called with the name of each phase that begins.
      **options: of `spmd.jit`: in_shardings, out_shardings, axis_rules, donate_argnums ...

    Returns:
      Whether it fits, its largest buffers, its collectives as scheduled, and a predicted time.

    Raises:
      CompilerMissing: libtpu is not installed.
      MeshError: the topology is none, or the mesh does not multiply up to it.
      SpmdError: whatever `spmd.jit` has to say about the program.
    """
    if isinstance(fun, Function):
        raise ArgumentError(
            Problem(
                f"spmd.aot of {getattr(fun, '__name__', 'a function')}, which is an spmd.jit",
                "the mesh of a described topology is made here, and that function has its own",
                "pass the function itself, and the options of spmd.jit to spmd.aot",
            )
        )
    machine = topology if isinstance(topology, Machine) else Machine.parse(topology)
    described, layout = described_mesh(machine, mesh)
    jitted = jit(fun, mesh=described, **options)
    clock = _Phases(progress)
    with clock("trace"):
        traced = jitted.trace(*args, **(kwargs or {}))
    with clock("propagate"):
        propagated = traced.propagate()
    with clock("partition"):
        partitioned = propagated.partition()
    return _compiled(partitioned, layout, model_flops, compiler_options, clock)


def aot_partitioned(
    partitioned: Partitioned,
    layout: MachineLayout,
    *,
    model_flops: float | None = None,
    compiler_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Ahead:
    """The same for a program that is partitioned already, over a mesh of `described_mesh`."""
    return _compiled(partitioned, layout, model_flops, compiler_options, _Phases(progress))


def _compiled(
    partitioned: Partitioned,
    layout: MachineLayout,
    model_flops: float | None,
    compiler_options: Mapping[str, Any] | None,
    clock: _Phases,
) -> Ahead:
    machine = layout.machine
    if model_flops is None:
        model_flops = useful_flops(partitioned)
    with clock("lower"):
        lowered = partitioned.lower()
    with tempfile.TemporaryDirectory(prefix="spmd_aot_") as folder:
        options = {**(compiler_options or {}), "xla_dump_to": folder}
        with clock("compile"):
            text, peak, needed = _compile(lowered, options)
        assignment = read_assignment(Path(folder)) or Assignment(0, ())
    if needed is not None:
        available = needed.available
        peak = max(needed.needed, float(assignment.total))
    else:
        available = machine.chip.usable_bytes
        # Where more temporaries lie in the core's own memory than in the device's, XLA's figure is
        # of those.
        peak = min(peak, float(assignment.total or peak))
    return Ahead(
        str(machine), str(MeshShape.of(layout.mesh)), machine.devices, needed is None, peak,
        available, assignment.buffers[:64], None if needed else read_schedule(text, layout),
        model_flops, machine.chip.peak("bfloat16"),
        tuple(clock.taken), _versions(),
    )  # fmt: skip


def useful_flops(partitioned: Partitioned) -> float:
    """FLOPs of one call of the unsharded program, what remat computes again not counted."""
    per_device = sum(line.trips * line.flops.useful for line in lines(partitioned.plan))
    return per_device * partitioned.plan.mesh.size


def _compile(lowered: Any, options: Mapping[str, Any]) -> tuple[str, float, Any]:
    """(scheduled HLO, peak bytes, None), or ("", 0, the shortage) of a program too large."""
    try:
        compiled = lowered.compile(dict(options))
    except Exception as error:
        needed = shortage(str(error)) if "RESOURCE_EXHAUSTED" in str(error) else None
        if needed is None:
            raise
        return "", 0.0, needed
    return compiled.as_text(), _peak(compiled.memory_analysis()), None


def _peak(stats: Any) -> float:
    """Peak bytes per device, as XLA says; where it does not, all its parts together."""
    parts = (
        stats.argument_size_in_bytes, stats.output_size_in_bytes, stats.temp_size_in_bytes,
        -stats.alias_size_in_bytes,
    )  # fmt: skip
    return float(getattr(stats, "peak_memory_in_bytes", 0) or sum(parts))


class _Phases:
    """Times phases, and tells when one begins."""

    def __init__(self, progress: Progress | None):
        self.progress, self.taken = progress, list[tuple[str, float]]()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self.progress is not None:
            self.progress(name)
        started = time.perf_counter()
        yield
        self.taken.append((name, time.perf_counter() - started))


def _versions() -> str:
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    return ", ".join(f"{name} {version}" for name, version in versions.items())
