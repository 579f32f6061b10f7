"""Carries out a plan: the one loop that emits the per-device program, under `shard_map`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sharding import _jax
from sharding.mesh import MeshShape
from spmd.partition.apply import apply
from spmd.partition.local import LocalView
from spmd.partition.plan import Compute, Key, Move, ProgramPlan, RegionPlan
from spmd.partition.verify import check_local_shape


def per_device(plan: ProgramPlan) -> Callable[..., tuple[Any, ...]]:
    """A traceable function of local arguments, with explicit collectives."""

    def run(*args: Any) -> tuple[Any, ...]:
        return tuple(_region(plan.body, args))

    return run


def _region(region: RegionPlan, args: Sequence[Any]) -> list[Any]:
    mesh = region.mesh
    env: dict[tuple[int, Any], Any] = {}

    def read(key: Key) -> Any:
        if key.value.const is not None and (key.value.id, key.layout) not in env:
            return _constant(key)
        return env[key.value.id, key.layout]

    for value, layout, arg in zip(region.region.inputs, region.inputs, args, strict=True):
        env[value.id, layout] = arg
    for instruction in region.code:
        if isinstance(instruction, Move):
            x = read(Key(instruction.value, instruction.src))
            # At the boundary no operation asks for it: it belongs to the one that made the value.
            with _at(instruction.reason or instruction.value.op):
                x = apply(
                    instruction.plan.steps, x, instruction.src, instruction.value.shape, mesh
                )
            env[instruction.value.id, instruction.dst] = x
            continue
        with _at(instruction.op):
            results = _compute(instruction, mesh, [read(key) for key in instruction.operands])
        for key, x in zip(instruction.results, results, strict=True):
            check_local_shape(key, x, instruction, mesh)
            env[key.value.id, key.layout] = x
    return [read(key) for key in region.outputs]


def _compute(instruction: Compute, mesh: MeshShape, operands: Sequence[Any]) -> Sequence[Any]:
    op = instruction.op
    with _jax.equation_context(op.eqn):
        if op.control is None:
            return LocalView(instruction, mesh).run(operands)
        bodies = [
            lambda *args, region=region: _region(region, args)
            for region in instruction.regions
        ]
        return op.control.build(op.params, bodies, operands)


def _constant(key: Key) -> Any:
    value, x = key.value, key.value.const
    if isinstance(x, np.ndarray):
        x = x.view()  # one of its own: JAX's literals remember the mesh that they were made under
    if value.rank or not hasattr(x, "dtype"):
        x = jnp.asarray(x, value.dtype)
    weak = getattr(value.aval, "weak_type", False)
    return jax.lax.convert_element_type(x, value.dtype) if not weak else x


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        return None


_NOTHING = _Nothing()


def _at(op: Any) -> Any:
    return _NOTHING if op is None else _jax.at_source(op.eqn)
