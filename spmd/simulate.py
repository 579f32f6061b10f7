"""Simulated devices: run a program for n accelerators on a machine that has none.

This is the only place that changes the environment for simulation. It must run before
JAX starts its backend (importing jax is harmless), and leaves machines with real
accelerators alone. It imports neither jax nor anything else outside the standard library.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Mapping

__all__ = ["accelerators", "simulate"]

_DEVICE_FILES = {
    "gpu": ("/dev/nvidia[0-9]*", "/dev/kfd"),
    "tpu": ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*"),
}
_TPU_VARIABLES = ("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE")
_PLATFORM_KINDS = {"cuda": "gpu", "rocm": "gpu", "gpu": "gpu", "tpu": "tpu"}
_COUNT_FLAG = "--xla_force_host_platform_device_count"


def simulate(devices: int, nodes: int = 1) -> bool:
    """Makes JAX see `devices` CPU devices, unless the machine has real accelerators.

    Sets `XLA_FLAGS` (the number of host devices), `NPROC` (the size of XLA's thread pools),
    `OPENBLAS_NUM_THREADS=1` (LAPACK, for every device) and `JAX_PLATFORMS=cpu`. Values the user
    already set win, except an `NPROC` that is too small.
    `SPMD_NODES` says that the devices stand for several nodes with a slow network between them;
    mesh axes that cross it are told apart by plans and reports.

    Args:
      devices: how many devices to simulate, at least 1; of this process.
      nodes: how many nodes they stand for, those of all processes together.

    Returns:
      True when devices are simulated, False when real accelerators are used instead.

    Raises:
      ValueError: `devices` is less than 1.
      RuntimeError: JAX already started its backend, so the environment is read no more. LAPACK's
        part of it is not, either, after `import scipy.linalg`.
    """
    if devices < 1:
        raise ValueError(f"simulate({devices}): at least 1 device is needed; pass 1 or more")
    if accelerators():
        return False
    if _backend_started():
        raise RuntimeError(
            f"simulate({devices}) came too late: JAX has already started its backend, and reads"
            " the environment only then; call it before the first jax.devices() or array"
        )
    flags = os.environ.get("XLA_FLAGS", "")
    given = re.search(rf"{_COUNT_FLAG}=(\d+)", flags)
    if not given:
        os.environ["XLA_FLAGS"] = f"{flags} {_COUNT_FLAG}={devices}".strip()
    count = int(given.group(1)) if given else devices
    # A collective blocks one pool thread per device. With fewer than two per device, queued
    # programs can take every thread while each waits for a partner that has none: a deadlock.
    os.environ["NPROC"] = str(max(2 * count, 16, _integer(os.environ.get("NPROC"))))
    # LAPACK runs on all devices at once: threads of its own for each wait for one another.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if nodes > 1 or "SPMD_NODES" not in os.environ:
        os.environ["SPMD_NODES"] = str(nodes)
    return True


def accelerators(environ: Mapping[str, str] | None = None) -> str:
    """The kind of accelerator JAX would use here, "gpu" or "tpu"; "" for none.

    Looks at device files and variables only: asking JAX would start its backend.
    `JAX_PLATFORMS` decides first: with `cpu` there is no accelerator, whatever is plugged in.
    """
    environ = os.environ if environ is None else environ
    platforms = [p for p in environ.get("JAX_PLATFORMS", "").lower().split(",") if p]
    if platforms and platforms[0] == "cpu":
        return ""
    for platform in platforms:
        if platform in _PLATFORM_KINDS:
            return _PLATFORM_KINDS[platform]
    if any(_says_something(environ.get(name, "")) for name in _TPU_VARIABLES):
        return "tpu"
    for kind, patterns in _DEVICE_FILES.items():
        if any(glob.glob(pattern) for pattern in patterns):
            return kind
    return ""


def _says_something(text: str) -> bool:
    """Where libtpu finds no TPU it writes a warning into these variables, which child processes
    inherit."""
    return bool(text) and not text.startswith("WARNING")


def _backend_started() -> bool:
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bridge.backends_are_initialized()


def _integer(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0
