"""Values that are made again in another layout, and not moved there.

An iota or a filled array is made anywhere; the transposition or the cast of something that is at
hand in the layout already costs next to nothing, as that of weights that were gathered before;
which stay there until then.
"""

from collections.abc import Callable, Sequence
from math import prod

from sharding.mesh import MeshShape
from sharding.program import Op, Value
from sharding.spec import Layout
from spmd.partition.placed import forced, makes, needs
from spmd.partition.plan import Assignment
from spmd.partition.tensor import Tensor

_DEEPEST = 8  # operations, one of the other, that are done again


def from_nothing(value: Value) -> bool:
    """Whether its operation makes it anywhere, for nothing."""
    return value.op is not None and value.op.from_nothing


def again(
    value: Value, need: Layout, at_hand: Callable[[Value], Sequence[Layout]], mesh: MeshShape,
    depth: int = _DEEPEST,
) -> Assignment | None:  # fmt: skip
    """How the operation of a value makes it anew in a layout, and moves no array for it; None
    where it does not. Its operand may have to be made anew as well.

    Args:
      at_hand: layouts in which there are values.
      depth: how many operations may be done again.
    """
    if not depth:
        return None
    op, known = value.op, {axis for axis, _ in mesh.axes}
    if op is None or need.partial or not need.used <= known:
        return None  # the plan is made again on a mesh with those parts of axes
    if not (op.from_nothing or _next_to_nothing(op)):
        return None
    assignment = forced(op.rule, need, mesh)
    if makes(op.rule, assignment, mesh)[0] != need or op.rule.alone.keys() & assignment.axes:
        return None  # there, or what crosses shards would be exchanged
    operands = [Tensor(v.shape, v.itemsize, tuple(at_hand(v))) for v in op.inputs]
    wanted = needs(op.rule, assignment, operands, mesh)
    there = all(
        layout in tensor.layouts or again(v, layout, at_hand, mesh, depth - 1) is not None
        for v, tensor, layout in zip(op.inputs, operands, wanted, strict=True) if v.rank
    )  # fmt: skip
    return assignment if there else None


def _next_to_nothing(op: Op) -> bool:
    """At most one array that does not come of nothing, with its elements in other places, or each
    changed by itself."""
    arrays = [v for v in op.inputs if v.rank]
    return plain(op) and bool(arrays) and sum(not of_nothing(v) for v in arrays) <= 1


def of_nothing(value: Value, depth: int = _DEEPEST) -> bool:
    """Whether a few operations make it, the first of them of nothing."""
    op = value.op
    if op is None or not depth:
        return False
    arrays = [v for v in op.inputs if v.rank]
    made = plain(op) and bool(arrays) and all(of_nothing(v, depth - 1) for v in arrays)
    return op.from_nothing or made


def plain(op: Op) -> bool:
    """Whether an operation gives elements other places, or changes each by itself: one result, no
    smaller than what is read; a mask, or linear, which is what tells a product with a scalar from a
    power."""
    rule = op.rule
    if op.control is not None or len(op.outputs) != 1 or rule.annotation is not None:
        return False
    size = prod(op.outputs[0].shape)
    cheap = bool(rule.linear) or op.outputs[0].dtype == bool
    return rule.early and cheap and all(prod(v.shape) <= size for v in op.inputs)
