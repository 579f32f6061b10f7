"""Predicted peak memory per device, from the plan: live local arrays at every instruction.

An upper bound in spirit: XLA fuses elementwise chains, so values that one pointwise op hands to
the next are counted here and may never exist there.
"""

from collections.abc import Sequence
from math import prod

from sharding.mesh import MeshShape
from spmd.partition.plan import Compute, Key, Move, ProgramPlan, RegionPlan


def peak_bytes(plan: ProgramPlan, donated: Sequence[bool] = ()) -> int:
    """Predicted peak bytes per device, arguments and results included.

    Args:
      donated: per flat argument, whether its buffer may be reused.
    """
    return _peak(plan.body, list(donated))


def local_key_bytes(key: Key, mesh: MeshShape) -> int:
    itemsize = getattr(key.value.dtype, "itemsize", 4)
    return prod(key.layout.local_shape(key.value.shape, mesh)) * itemsize


def _reads(instruction: Move | Compute) -> list[Key]:
    if isinstance(instruction, Move):
        return [Key(instruction.value, instruction.src)]
    return list(instruction.operands)


def _writes(instruction: Move | Compute) -> list[Key]:
    if isinstance(instruction, Move):
        return [Key(instruction.value, instruction.dst)]
    return list(instruction.results)


def _peak(region: RegionPlan, donated: Sequence[bool] = ()) -> int:
    mesh = region.mesh
    last: dict[tuple, int] = {}
    for i, instruction in enumerate(region.code):
        for key in (*_reads(instruction), *_writes(instruction)):
            last[key.value.id, key.layout] = i
    end = len(region.code)
    for key in region.outputs:
        last[key.value.id, key.layout] = end
    for i, (value, layout) in enumerate(zip(region.region.inputs, region.inputs, strict=True)):
        if not (i < len(donated) and donated[i]):
            last[value.id, layout] = end
        else:
            last.setdefault((value.id, layout), 0)
    dying: dict[int, list[tuple]] = {}
    for key, at in last.items():
        dying.setdefault(at, []).append(key)
    sizes = {
        (v.id, layout): local_key_bytes(Key(v, layout), mesh)
        for v, layout in zip(region.region.inputs, region.inputs, strict=True)
    }
    live = peak = sum(sizes.values())
    for i, instruction in enumerate(region.code):
        for key in _writes(instruction):
            if (key.value.id, key.layout) not in sizes:
                sizes[key.value.id, key.layout] = local_key_bytes(key, mesh)
                live += sizes[key.value.id, key.layout]
        peak = max(peak, live + _inner(instruction))
        live -= sum(sizes.get(key, 0) for key in dying.get(i, ()))
    return peak


def _inner(instruction: Move | Compute) -> int:
    """What a region needs beyond its operands, which its parent already counts."""
    if isinstance(instruction, Move) or not instruction.regions:
        return 0
    extra = 0
    for region in instruction.regions:
        held = map(Key, region.region.inputs, region.inputs)
        inputs = sum(local_key_bytes(key, region.mesh) for key in held)
        extra = max(extra, _peak(region) - inputs)
    return max(extra, 0)
