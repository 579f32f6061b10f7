"""Where values lie that are only read to be flattened: as the flat ones do.

Propagation brings two sharded dims together on their major one, by an all-to-all of what is
flattened. What makes that may as well be made there: logits, many times as large as the features
they are made of, are not moved then, but those are. Which is less is for `choose` to decide, which
is told here what is wanted.
"""

from typing import Any

from sharding.op import Op, Value
from spmd.partition.linear import only_reader


def follow_flattened(planner: Any) -> None:
    """Changes the layouts that are wanted of values read once: by an operation that makes one dim
    of several, or elementwise on the way there; of those that it would have to move."""
    changed: set[int] = set()
    for op in reversed(list(planner.propagated.program.ops())):
        if op.control is not None or len(op.outputs) != 1 or not op.rule.early:
            continue
        if not _joins(op) and op.outputs[0].id not in changed:
            continue
        for i, value in enumerate(op.inputs):
            wanted = planner.layouts[value.id]
            if wanted.partial or not _free(planner, value):
                continue
            need = planner.need(op, i)
            if need != wanted and need.used == wanted.used:
                planner.layouts[value.id] = need
                changed.add(value.id)


def _joins(op: Op) -> bool:
    """Whether a dim of the result is several of the operand's."""
    return any(len({*names} - op.rule.alone.keys()) > 1 for names in op.rule.results[0])


def _free(planner: Any, value: Value) -> bool:
    """Whether one operation makes a value for one other, and no annotation says where."""
    made = value.op
    if made is None or made.control is not None or made.rule.annotation is not None:
        return False
    return only_reader(planner.propagated.program, value) is not None
