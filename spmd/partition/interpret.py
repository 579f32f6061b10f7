"""Carries out a plan: the one loop that emits the per-device program, under `shard_map`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sharding import _jax
from sharding.mesh import MeshShape
from sharding.program import Op, Value
from spmd.partition.combined import groups, together
from spmd.partition.local import LocalView
from spmd.partition.parts import build_in_parts, in_parts, joined, moved
from spmd.partition.plan import Compute, Key, Move, ProgramPlan, RegionPlan
from spmd.partition.stacks import build_apart
from spmd.partition.verify import check_local_shape


def per_device(plan: ProgramPlan) -> Callable[..., tuple[Any, ...]]:
    """A traceable function of local arguments, with explicit collectives."""

    def run(*args: Any) -> tuple[Any, ...]:
        return tuple(map(joined, _region(plan.body, args)))

    return run


def _region(region: RegionPlan, args: Sequence[Any]) -> list[Any]:
    mesh = region.mesh
    env: dict[Key, Any] = {}

    def read(key: Key) -> Any:
        if key.value.const is not None and key not in env:
            assert not key.layout.partial, "every device would add the whole of it"
            return constant(key.value)
        return env[key]

    for value, layout, arg in zip(region.region.inputs, region.inputs, args, strict=True):
        env[Key(value, layout)] = arg
    for group in groups(region.code):
        one = len(group) == 1
        env.update(execute(group[0], mesh, read) if one else _together(group, mesh, read))
    return [read(key) for key in region.outputs]


def execute(
    instruction: Move | Compute, mesh: MeshShape, read: Callable[[Key], Any]
) -> list[tuple[Key, Any]]:
    """What one instruction makes of the local arrays that `read` gives."""
    if isinstance(instruction, Move):
        with _at_reason(instruction):
            x = _moving(instruction, read)
            if instruction.after:  # or the compiler makes one of this and what it repeats
                x, *_ = jax.lax.optimization_barrier((x, *map(read, instruction.after)))
            x = moved(instruction, x, mesh)
        return [(instruction.writes[0], x)]
    with _at(instruction.op):
        results = _compute(instruction, mesh, [read(key) for key in instruction.operands])
        if instruction.apart and instruction.op.control is None:
            results = jax.lax.optimization_barrier(tuple(results))
    for key, x in zip(instruction.results, results, strict=True):
        check_local_shape(key, x, instruction, mesh)
    return list(zip(instruction.results, results, strict=True))


def _together(
    moves: Sequence[Move], mesh: MeshShape, read: Callable[[Key], Any]
) -> list[tuple[Key, Any]]:
    """What moves of one group make: see `combined`."""
    with _at_reason(moves[0]):
        made = together(moves, [joined(_moving(move, read)) for move in moves], mesh)
    return [(move.writes[0], x) for move, x in zip(moves, made, strict=True)]


def _moving(move: Move, read: Callable[[Key], Any]) -> Any:
    """The local array that is moved."""
    x = read(Key(move.value, move.src))
    return x if hasattr(x, "shape") else jnp.asarray(x, move.value.dtype)  # a literal


def _at_reason(move: Move) -> Any:
    # At the boundary no operation asks for it: it belongs to the one that made the value.
    return _at(move.reason or move.value.op)


def _compute(instruction: Compute, mesh: MeshShape, operands: Sequence[Any]) -> Sequence[Any]:
    op = instruction.op
    with _jax.equation_context(op.eqn):
        build = build_apart if instruction.apart else _build
        if instruction.parts is not None and op.control is not None:
            (region,) = instruction.regions
            return build_in_parts(instruction, partial(_region, region), operands, build)
        if instruction.parts is not None:
            return in_parts(instruction, operands, mesh)
        operands = [*map(joined, operands)]
        if op.control is None:
            return LocalView(instruction, mesh).run(operands)
        bodies = [
            lambda *args, region=region: [*map(joined, _region(region, args))]
            for region in instruction.regions
        ]
        return build(op, bodies, operands)


def _build(
    op: Op, bodies: Sequence[Callable[..., Sequence[Any]]], operands: Sequence[Any]
) -> Sequence[Any]:
    assert op.control is not None
    return op.control.build(op.params, bodies, operands)


def constant(value: Value) -> Any:
    """A literal or constant of the program, whole."""
    x = value.const
    weak = getattr(value.aval, "weak_type", False)
    if not value.rank and not weak and not isinstance(x, jax.Array):
        return np.asarray(x, value.dtype)  # a literal, as it was
    if isinstance(x, np.ndarray):
        x = x.view()  # one of its own: JAX's literals remember the mesh that they were made under
    if value.rank or not hasattr(x, "dtype"):
        x = jnp.asarray(x, value.dtype)
    return jax.lax.convert_element_type(x, value.dtype) if not weak else x


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        return None


_NOTHING = _Nothing()


def _at(op: Any) -> Any:
    return _NOTHING if op is None else _jax.at_source(op.eqn, op.site)
