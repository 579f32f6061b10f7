"""The chip that a program is compiled for, and what its compiler needs to be told."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jax.sharding import AbstractMesh

from sharding.errors import ArgumentError, Problem
from spmd import chips
from spmd.chips import Chip
from spmd.estimate.fusion import ANY, Compiler
from spmd.options import Options
from spmd.partition.plan import ProgramPlan
from spmd.partition.products import keep_products
from spmd.partition.scatters import split_scatters
from spmd.partition.stacks import own_stacks
from spmd.partition.transposed import reduce_transposed


def chip_of(mesh: Any) -> Chip | None:
    """The chip of a mesh's devices; None for abstract meshes, and for chips that nobody described.

    Args:
      mesh: a `jax.sharding.Mesh`, whose devices may be described ones, or an `AbstractMesh`.
    """
    if isinstance(mesh, AbstractMesh) or not mesh.devices.size:
        return None
    return chips.of_kind(mesh.devices.flat[0].device_kind)


def compiler_of(mesh: Any) -> Compiler:
    """What the compiler for a mesh's devices does with memory; abstract meshes are taken for some
    TPU's."""
    chip = chip_of(mesh)
    if chip is None:
        elsewhere = not isinstance(mesh, AbstractMesh) and mesh.devices.flat[0].platform != "tpu"
        return Compiler(False, False) if elsewhere else ANY
    return Compiler.of(chip)


# Changes to plans for the compilers of one family of chips, by the name of the pass.
_SUITED = {
    "tpu": (
        ("transposed_sums", reduce_transposed),
        ("split_scatters", split_scatters),
        ("own_stacks", own_stacks),
    ),
    "cpu": (("keep_products", keep_products),),
}  # fmt: skip
# What the compiler or SparseCores do as it is needs no change.
_UNLESS_KEPT = frozenset(("split_scatters",))


def suited(plan: ProgramPlan, options: Options) -> ProgramPlan:
    """The plan as the compiler for the mesh's chip takes it best."""
    chip = chip_of(options.mesh)
    if chip is None:
        return plan
    for name, change in _SUITED.get(chip.family, ()):
        needless = name in _UNLESS_KEPT and (chip.scatters or _of_chip(options))
        plan = change(plan) if options.on(name) and not needless else plan
    return plan


def compiler_options(options: Options) -> dict[str, Any]:
    """What XLA is told: the options of the chip, and those that the user gave, which win."""
    return {**_of_chip(options), **dict(options.compiler_options)}


def _of_chip(options: Options) -> dict[str, str]:
    chip = chip_of(options.mesh)
    return dict(chip.options) if chip is not None and options.on("async_collectives") else {}


@contextmanager
def explained(options: Options) -> Iterator[None]:
    """Errors of a compiler that does not know what it is told say how to go on.

    Raises:
      ArgumentError: it does not.
    """
    try:
        yield
    except Exception as error:
        name = next((name for name in _of_chip(options) if name in str(error)), None)
        if name is None or name in dict(options.compiler_options):
            raise
        why = f"this compiler does not take the option {name}: {str(error).splitlines()[0]}"
        fix = 'spmd.jit(..., disable_passes=["async_collectives"]) compiles without it'
        what = "collectives beside computation, which TPUs with SparseCores are asked for"
        raise ArgumentError(Problem(what, why, fix)) from error
