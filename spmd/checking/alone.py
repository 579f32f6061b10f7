"""Instructions of a plan on simulated devices, each one on its own.

Every operand is what the unsharded program has, laid out as the plan says, so that no instruction
sees what an earlier one did wrong. All instructions of a region are one program.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from sharding.mesh import MeshShape
from spmd.checking.shards import from_words, split, to_words, words_layout
from spmd.checking.unsharded import Words, options
from spmd.partition.interpret import constant, execute, per_device
from spmd.partition.parts import joined
from spmd.partition.plan import Compute, Key, Move, ProgramPlan, RegionPlan

Instruction = Move | Compute


def reads(instruction: Instruction) -> tuple[Key, ...]:
    return instruction.reads


def writes(instruction: Instruction) -> tuple[Key, ...]:
    """What an instruction makes, without results that nothing reads: those may hold anything."""
    if isinstance(instruction, Move):
        return instruction.writes
    unread = instruction.unread or (False,) * len(instruction.results)
    return tuple(key for key, skip in zip(instruction.results, unread, strict=True) if not skip)


class Alone:
    """Runs the instructions of regions; each region is compiled once.

    Args:
      mesh: the jax mesh of the per-device program.
    """

    def __init__(self, mesh: Any):
        self.mesh = mesh
        self._made: dict[int, Any] = {}

    def results(
        self, region: RegionPlan, values: Words, chosen: Sequence[Instruction]
    ) -> list[dict[Key, np.ndarray]]:
        """Per instruction what every device has: [devices, *local shape] by key."""
        if not chosen:
            return []
        keys = list(dict.fromkeys(k for one in chosen for k in reads(one) if not _literal(k)))
        if id(region) not in self._made:
            self._made[id(region)] = jax.jit(
                self._stacked(lambda *xs: _each(region.mesh, chosen, keys, xs), len(keys)),
                compiler_options=options(),
            )
        made = self._made[id(region)](*(laid_out(k, values, region.mesh) for k in keys))
        return [
            {key: np.asarray(x) for key, x in zip(writes(one), xs, strict=True)}
            for one, xs in zip(chosen, made, strict=True)
        ]

    def _stacked(self, fun: Callable, count: int) -> Callable:
        """`fun` of local arrays, as a function of [devices, *local shape]."""
        spec = PartitionSpec(tuple(self.mesh.axis_names))

        def run(*stacks: Any) -> Any:
            return jax.tree.map(lambda x: x[None], fun(*(x[0] for x in stacks)))

        return jax.shard_map(
            run, mesh=self.mesh, in_specs=(spec,) * count, out_specs=spec, check_vma=False
        )

    def together(self, plan: ProgramPlan, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What every device has of each value that the top of the program makes, in its order,
        when the whole partitioned program runs: by the plan, with more results."""
        keys = tuple(key for one in plan.body.code for key in writes(one))
        variant = replace(plan, body=replace(plan.body, outputs=keys))
        values = {v.id: x for v, x in zip(plan.program.body.inputs, inputs, strict=True)}
        ins = [Key(v, n) for v, n in zip(plan.program.body.inputs, plan.body.inputs, strict=True)]

        def run(*words: Any) -> Any:
            args = [from_words(x, k.value.dtype) for x, k in zip(words, ins, strict=True)]
            return [to_words(x) for x in per_device(variant)(*args)]

        stacks = [laid_out(key, values, plan.mesh) for key in ins]
        return [np.asarray(x) for x in jax.jit(self._stacked(run, len(ins)))(*stacks)]


def laid_out(key: Key, values: Mapping[int, Any], mesh: MeshShape) -> np.ndarray:
    """What every device holds of a value in a layout."""
    return split(whole(key, values), words_layout(key.layout, key.value), mesh)


def whole(key: Key, values: Mapping[int, Any]) -> np.ndarray:
    """The value of the unsharded program, on the host."""
    found = values.get(key.value.id)
    if found is None:
        found = to_words(key.value.const) if hasattr(key.value.const, "dtype") else key.value.const
    return np.asarray(found) if hasattr(found, "dtype") else np.asarray(found, key.value.dtype)


def _literal(key: Key) -> bool:
    return key.value.const is not None and not key.layout.used


def _each(
    mesh: MeshShape, chosen: Sequence[Instruction], keys: Sequence[Key], words: Sequence[Any]
) -> list[list[Any]]:
    held = dict(zip(keys, words, strict=True))

    def read(key: Key) -> Any:
        if _literal(key):
            return constant(key.value)
        return from_words(held[key], key.value.dtype)

    found = []
    for instruction in chosen:
        made = dict(execute(instruction, mesh, read))
        found.append([to_words(joined(made[key])) for key in writes(instruction)])
    return found
