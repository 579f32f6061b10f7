"""Which loops over a sharded dim run in parts, every device its own steps of them.

The dim itself is not propagated through a loop: whoever is inside sees one step. So this is asked
of the propagated program, and what it says is put in place of the loop, see `program.build`.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from sharding.mesh import axes_size
from sharding.op import Op, Value
from sharding.program import value_bytes
from sharding.propagation import Propagated
from sharding.spec import Sharding

# What may be brought to all devices for it, of what the loop runs over and stacks: weights of a
# whole model are not gathered for a few examples.
MOST = 2


def own_steps(
    propagated: Propagated, annotations: Sequence[tuple[Value, Sharding]], mesh: Any
) -> list[tuple[Any, Callable]]:
    """The equations of such loops, each with what to put there.

    Args:
      annotations: the user's, of which some may be inside of loops.
      mesh: the `jax.sharding.Mesh` or `AbstractMesh`.
    """
    found: dict[int, tuple[Any, Callable]] = {}
    stated = {v.id: sharding.layout.used for v, sharding in annotations}
    for op in propagated.program.ops():
        axes = _axes(propagated, op) if op.control is not None else ()
        if not axes or op.control is None or _named(op, {*axes}, stated):
            continue
        in_parts = op.control.in_parts(op)
        if in_parts is not None:
            found[id(op.eqn)] = op.eqn, in_parts(mesh, axes)
    return list(found.values())


def _named(op: Op, axes: Set[str], stated: Mapping[int, Set[str]]) -> bool:
    """Whether anything inside of a loop says axes by name: an annotation, or a `jax.shard_map`."""
    for inner in (inner for region in op.regions for inner in region.walk()):
        manual = inner.scope.manual
        if manual is not None and axes & manual.axes:
            return True
        if any(axes & stated.get(v.id, frozenset()) for v in (*inner.inputs, *inner.outputs)):
            return True
    return False


def _axes(propagated: Propagated, op: Op) -> tuple[str, ...]:
    """The axes along which every device has steps of its own: those of the leading dim of most of
    what the loop runs over and stacks. None where much has to be brought elsewhere for that."""
    over = {port.outer for port in op.in_ports if port.stacked}
    stacked = [op.inputs[i] for i in sorted(over)]
    stacked += [op.outputs[port.outer] for port in op.out_ports if port.stacked]
    weights: dict[tuple[str, ...], int] = {}
    for value in stacked:
        axes = propagated.of(value).layout.dims[0]
        weights[axes] = weights.get(axes, 0) + value_bytes(value)
    best = max((a for a in weights if a), key=lambda a: weights[a], default=())
    if not best or op.scope.manual is not None or any(":" in a for a in best):
        return ()
    shards = axes_size(propagated.mesh, best)
    if shards == 1 or stacked[0].shape[0] % shards:
        return ()
    brought = 0
    for i, value in enumerate(op.inputs):
        dims = propagated.of(value).layout.dims[i in over :]
        if {*best} & {a for axes in dims for a in axes}:
            brought += value_bytes(value)
    return best if brought <= MOST * weights[best] else ()
