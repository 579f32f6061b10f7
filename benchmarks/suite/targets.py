"""Where programs are compiled for, and run: simulated devices, described TPUs, the GPUs here.

    cpu             8 simulated devices; compiled, run, compared
    cpu:32          as many; programs of the larger size, compiled only
    v5p:2x2x4 ...   TPUs as libtpu describes them, see `spmd.hardware.Machine.parse`; compiled only
    gpu             GPUs of this machine: all when there are 8 or 16, else one, on a mesh whose axes
                    all have size 1
    gpu:8, gpu:16   as many hosts, each with a GPU like the one here; compiled only

JAX reads its environment while it is imported and when it starts: a child is started with the
variables of `environment`, and calls `prepare` before it does anything else.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from spmd.simulate import accelerators, simulate

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from benchmarks.suite.case import Case, Program, Size
    from spmd.hardware import MachineLayout

SIMULATED = 8
TPUS = ("v5p:2x2x4", "v5e:4x4", "v3:2x4")  # 16 devices each: a v3 chip is two
_COPIES = 16  # of its arguments a program may need on one GPU: state, activations, temporaries


class Placed(NamedTuple):
    """A case on devices.

    Attributes:
      size: for which it was made.
      mesh: of devices of the target.
      layout: how the mesh lies on the wires of described TPUs; None for other devices.
      whole: False when the mesh is of one device, in place of the one that the case asks for.
    """

    case: Case
    size: Size
    mesh: Mesh
    layout: MachineLayout | None
    whole: bool


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for, by name."""

    name: str

    @property
    def runs(self) -> bool:
        """Whether programs run here, and are not only compiled."""
        return self.name in ("cpu", "gpu")

    @property
    def on_gpu(self) -> bool:
        """Whether a compiler for GPUs is needed, and with it a GPU."""
        return self.name.partition(":")[0] == "gpu"

    @property
    def described_gpus(self) -> int:
        """How many GPUs a `gpu:N` stands for; 0 for other targets."""
        return self._count("gpu")

    @property
    def described_cpus(self) -> int:
        """How many simulated devices a `cpu:N` stands for; 0 for other targets."""
        return self._count("cpu")

    def _count(self, of: str) -> int:
        kind, _, count = self.name.partition(":")
        return int(count or 0) if kind == of else 0

    def environment(self) -> dict[str, str]:
        """Variables of a process that compiles for these devices, from those of this one."""
        found = dict(os.environ)
        # XLA says for every program that GSPMD is on its way out
        found.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        if not self.on_gpu:
            found["JAX_PLATFORMS"] = "cpu"
        elif found.get("JAX_PLATFORMS") == "cpu":
            del found["JAX_PLATFORMS"]
        return found

    def prepare(self) -> None:
        """Sets what is left of the environment, before JAX starts its backend."""
        if self.name == "cpu" or self.described_cpus:
            simulate(self.described_cpus or SIMULATED)
        elif self.described_gpus:
            import jax

            jax.config.update("jax_mock_gpu_topology", f"1x{self.described_gpus}x1")
        elif not self.on_gpu:
            from spmd.ahead import libtpu

            libtpu.prepare()

    def place(self, program: Program) -> Placed:
        """Makes the case of a program at the size for this target, and its mesh.

        Raises:
          MeshError: libtpu has no such topology, or the mesh does not fit it.
          RuntimeError: there is no GPU, or too few simulated devices.
        """
        from benchmarks.suite.case import LARGE, RUNS

        if self.name == "gpu":
            return _on_gpus(program)
        described = self.described_gpus or self.described_cpus
        if described:
            size = LARGE._replace(devices=described)
            case = program.make(size)
            return Placed(case, size, simulated_mesh(case.mesh), None, True)
        if self.name == "cpu":
            case = program.make(RUNS)
            return Placed(case, RUNS, simulated_mesh(case.mesh), None, True)
        from spmd.ahead.libtpu import described_mesh
        from spmd.hardware import Machine

        machine = Machine.parse(self.name)
        size = LARGE._replace(devices=machine.devices)
        case = program.make(size)
        mesh, layout = described_mesh(machine, case.mesh)
        return Placed(case, size, mesh, layout, True)


def defaults() -> tuple[str, ...]:
    """Names of the targets of this machine."""
    without = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    return ("cpu", *TPUS, *(["gpu"] if accelerators(without) == "gpu" else []))


def simulated_mesh(sizes: Any) -> Mesh:
    """A mesh of the first devices of this process.

    Args:
      sizes: by axis name.

    Raises:
      RuntimeError: there are fewer devices.
    """
    import jax

    needed, devices = math.prod(sizes.values()), jax.devices()
    if len(devices) < needed:
        raise RuntimeError(f"the mesh needs {needed} devices, and there are {len(devices)}")
    return _mesh(devices[:needed], tuple(sizes), tuple(sizes.values()))


def on_one(mesh: Any) -> Mesh:
    """A mesh of one device, the first here, with the axis names of `mesh` (names or sizes)."""
    import jax

    names = tuple(mesh)
    return _mesh(jax.devices()[:1], names, (1,) * len(names))


def _mesh(devices: list[Any], names: tuple[str, ...], sizes: tuple[int, ...]) -> Mesh:
    import numpy as np
    from jax.sharding import AxisType, Mesh

    return Mesh(np.array(devices).reshape(sizes), names, axis_types=(AxisType.Auto,) * len(names))


def _on_gpus(program: Program) -> Placed:
    import jax
    import jax.numpy as jnp

    from benchmarks.suite.case import LARGE

    if jax.default_backend() != "gpu":
        raise RuntimeError("there is no GPU that JAX can use here")
    count = len(jax.devices())
    whole = count in (8, 16)
    size = LARGE._replace(devices=count if whole else 8, dtype=jnp.bfloat16)
    case = program.make(size)
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    held = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(case.args))
    if _COPIES * held > limit:  # one GPU computes what the results are compared with
        size = size._replace(small=True)
        case = program.make(size)
    mesh = simulated_mesh(case.mesh) if whole else on_one(case.mesh)
    return Placed(case, size, mesh, None, whole)
