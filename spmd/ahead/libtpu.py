"""The TPU compiler, on a machine without a TPU: its environment, and the devices it describes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from sharding.errors import MeshError, Problem, SpmdError
from sharding.mesh import MeshShape
from spmd.hardware import Machine, MachineLayout
from spmd.simulate import accelerators

__all__ = ["CompilerMissing", "described_mesh", "required_version"]

_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # ask no metadata server what this machine is
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # compiling does not take the TPU of this machine
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


class CompilerMissing(SpmdError):
    """The TPU compiler is not installed, or is of another version than JAX needs."""


def prepare() -> None:
    """Sets the variables that libtpu reads when it is loaded; those already set win. On a machine
    without accelerators JAX itself is told to use the CPU, if it has not started yet."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not accelerators():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def required_version() -> str:
    """The libtpu that the installed JAX asks for, e.g. "0.0.42.*"; "" if it does not say."""
    for line in importlib.metadata.requires("jax") or ():
        if found := re.match(r"libtpu==([\d.*]+)\s*;", line):
            return found[1]
    return ""


def check_installed(what: str) -> None:
    """Raises CompilerMissing when libtpu is not there, or is too old or new for JAX."""
    wanted = required_version()
    if importlib.util.find_spec("libtpu") is None:
        raise CompilerMissing(
            Problem(
                what,
                "the TPU compiler, libtpu, is not installed",
                'install the extra: pip install "spmd-compiler[tpu]"',
            )
        )
    installed = importlib.metadata.version("libtpu")
    if wanted and not re.fullmatch(wanted.replace(".", r"\.").replace("*", ".*"), installed):
        raise CompilerMissing(
            Problem(
                what,
                f"libtpu {installed} is installed, and JAX {importlib.metadata.version('jax')}"
                f" works with libtpu {wanted}",
                'install the extra, which brings the right one: pip install "spmd-compiler[tpu]"',
            )
        )


def described_mesh(machine: Machine, mesh: Any) -> tuple[Mesh, MachineLayout]:
    """A mesh of devices that libtpu describes, and how its axes lie on the wires.

    Args:
      mesh: sizes by axis name.

    Raises:
      CompilerMissing: no libtpu.
      MeshError: libtpu has no such topology, or the mesh does not fit it.
    """
    what = f"topology {machine}"
    if machine.chip.family != "tpu":
        why = f"libtpu compiles for TPUs, and {machine.chip.name} is none"
        raise MeshError(Problem(what, why, "name a TPU topology, e.g. v5p:4x4x4 or v5e:16x16"))
    check_installed(what)
    prepare()
    shape = MeshShape.of(mesh)
    layout = machine.lay(shape)
    places = {_place(d, machine): d for d in _devices(machine, what)}
    flat = [tuple(int(n) for n in p) for p in layout.positions.reshape(machine.devices, -1)]
    try:
        ordered = [places[p] for p in flat]
    except KeyError as missing:
        why = f"libtpu describes {len(places)} devices, and none at {missing.args[0]}"
        raise MeshError(Problem(what, why, "use another size of slice")) from None
    devices = np.array(ordered).reshape([n for _, n in shape.axes])
    types = (AxisType.Auto,) * len(shape.axes)
    return Mesh(devices, shape.names, axis_types=types), layout


def _devices(machine: Machine, what: str) -> Any:
    sizes = "x".join(map(str, machine.shape))
    options: dict[str, Any] = {}
    if machine.slices > 1:
        options["num_slices"] = machine.slices
    if machine.chip.name == "v4":  # its two cores work as one, as they do by default on v5p
        options["chip_config_name"] = "megacore"
    try:
        with _quiet():
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{machine.chip.name}:{sizes}", **options
            )
    except Exception as error:
        why = f"libtpu refuses it: {str(error).splitlines()[0]}"
        fix = "use a size that the chip comes in, e.g. v5p:4x4x4, v5e:16x16 or v3:32x32"
        raise MeshError(Problem(what, why, fix)) from None
    return found.devices


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what libtpu writes to stderr while it is loaded: that this machine is no TPU host.
    Its errors come as exceptions."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _place(device: Any, machine: Machine) -> tuple[int, ...]:
    """Where a device lies, as a row of `MachineLayout.positions`."""
    part = device.slice_index if machine.slices > 1 else 0
    core = (device.core_on_chip,) if machine.chip.cores > 1 else ()
    return (part, *device.coords[: len(machine.shape)], *core)
