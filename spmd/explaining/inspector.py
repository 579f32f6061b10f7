"""`Inspector`: what the questions about a partitioned program read, indexed once.

Answers about values are here, those about collectives in `why`, those about other shardings in
`why_not`. Chains are made by `sharding.explain`, the data and its texts are in `explanation`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from sharding.explain import History, ValueHistory
from sharding.mesh import overlap
from sharding.op import Value
from sharding.spec import Layout
from spmd.arguments import output_names
from spmd.explaining.explanation import Alternative, Explanation, Placed, ValueExplanation
from spmd.partition.choose import weighed
from spmd.partition.placed import makes, needs
from spmd.partition.plan import Assignment, Compute, Key, Move
from spmd.partition.reshard import plan

# An unrolled loop makes thousands of values at one source line.
MOST = 64


class Inspector:
    """Answers questions about one program.

    Args:
      stage: `spmd.Propagated`.
      partitioned: what it became; None: it is partitioned when a question needs it.
    """

    def __init__(self, stage: Any, partitioned: Any = None):
        self.stage = stage
        if partitioned is not None:
            self.partitioned = partitioned

    @cached_property
    def partitioned(self) -> Any:
        options = replace(self.stage.traced.options, on_gather="plan", strict=False)
        lenient = replace(self.stage, traced=replace(self.stage.traced, options=options))
        return lenient.partition()

    @cached_property
    def history(self) -> History:
        return History(self.stage.result, _sites(self.stage.traced), _aliases(self.stage.traced))

    @property
    def mesh(self) -> Any:
        return self.partitioned.plan.mesh

    @cached_property
    def moves(self) -> list[tuple[Move, int]]:
        return list(self.partitioned.plan.moves())

    @cached_property
    def computes(self) -> dict[int, list[tuple[Compute, int]]]:
        """By op index: a value made from nothing is made once per layout."""
        found: dict[int, list[tuple[Compute, int]]] = {}
        for instruction, trips in self.partitioned.plan.body.walk():
            if isinstance(instruction, Compute):
                found.setdefault(instruction.op.index, []).append((instruction, trips))
        return found

    @cached_property
    def moves_for(self) -> dict[int, list[tuple[Move, int]]]:
        """By index of the op that needs them; -1: the boundary."""
        found: dict[int, list[tuple[Move, int]]] = {}
        for move, trips in self.moves:
            index = -1 if move.reason is None else move.reason.index
            found.setdefault(index, []).append((move, trips))
        return found

    @cached_property
    def moves_of(self) -> dict[int, list[tuple[Move, int]]]:
        found: dict[int, list[tuple[Move, int]]] = {}
        for move, trips in self.moves:
            found.setdefault(move.value.id, []).append((move, trips))
        return found

    def explain(self, asked: str | Value) -> Explanation:
        """Why values are sharded as they are."""
        values = self.history.find(asked)
        return Explanation(
            str(asked), tuple(map(self.value, values[:MOST])), max(0, len(values) - MOST)
        )

    def value(self, value: Value) -> ValueExplanation:
        history = self.paid(value, self.history.explain(value))
        return ValueExplanation(history, tuple(self.placed(value)), self.alternatives(value))

    def paid(self, value: Value, history: ValueHistory) -> ValueHistory:
        """With what the reshards at each operation cost whose proposal lost."""
        rejections = self.history.rejections.get(value.id, ())
        lost = []
        for r, found in zip(rejections, history.lost, strict=True):
            index = self.stage.result.links[r.link].op
            wire = sum(
                trips * move.plan.bytes for move, trips in self.moves_for.get(index, ())
                if move.value.id in (r.source, r.value)
            )
            lost.append(replace(found, bytes=wire))
        return replace(history, lost=tuple(lost))

    def placed(self, value: Value) -> Iterator[Placed]:
        """The layouts of a value in the per-device program."""
        if not value.rank:
            return
        if value.op is None:
            inputs = self.partitioned.plan.body
            for given, layout in zip(inputs.region.inputs, inputs.inputs, strict=True):
                if given is value:
                    yield self.place(value, layout, "as it comes", 0.0)
        else:
            for compute, _ in self.computes.get(value.op.index, ()):
                for key in compute.results:
                    if key.value is value:
                        axes = assignment_text(compute.assignment)
                        made = f"from {value.op.primitive.name}" + (f" with {axes}" if axes else "")
                        yield self.place(value, key.layout, made, 0.0)
        for move, trips in self.moves_of.get(value.id, ()):
            yield self.place(
                value, move.dst,
                f"by {steps_text(move)}, {trips * move.plan.bytes:,.0f} B, for {reader_text(move)}",
                trips * move.plan.bytes,
            )

    def place(self, value: Value, layout: Layout, made_by: str, wire: float) -> Placed:
        shape = layout.local_shape(value.shape, self.mesh)
        held = Key(value, layout).local_bytes(self.mesh)
        return Placed(str(layout), shape, held, made_by, wire)

    def alternatives(self, value: Value) -> tuple[Alternative, ...]:
        """What the planner weighed for the operation that makes a value, the cheapest first."""
        computes = self.computes.get(value.op.index, ()) if value.op is not None else ()
        for compute, _ in computes:
            if compute.asked:
                operands, results = compute.asked
                rule = compute.op.rule
                return tuple(
                    Alternative(
                        assignment_text(a) or "no axis", self.wire(rule, a, operands, results),
                        total, a == compute.assignment,
                    )
                    for a, total in weighed(rule, operands, results, self.mesh)
                )  # fmt: skip
        return ()

    def wire(self, rule: Any, a: Assignment, operands: Sequence[Any], results: Any) -> float:
        """Wire bytes of the reshards that an assignment needs."""
        total = 0.0
        for need, tensor in zip(needs(rule, a, operands, self.mesh), operands, strict=True):
            if need not in tensor.layouts:
                total += min(
                    plan(have, need, tensor.shape, tensor.itemsize, self.mesh).bytes
                    for have in tensor.layouts if set(need.partial) <= set(have.partial)
                )
        for made, tensor in zip(makes(rule, a, self.mesh), results, strict=True):
            if tensor.used:
                wanted = tensor.layouts[0]
                total += plan(made, wanted, tensor.shape, tensor.itemsize, self.mesh).bytes
        return total

    def origins(self, value: Value, layout: Layout) -> Iterator[str]:
        for d, axes in enumerate(layout.dims):
            for axis in axes:
                yield from self.origin(value, d, axis)

    def origin(self, value: Value, dim: int, axis: str) -> Iterator[str]:
        """The annotation that brought an axis to a dim, or that nothing did."""
        for chain in self.history.chains(value, dim):
            if any(overlap(axis, a) for a in chain.axes):
                root, count = chain.root, len(chain.steps) - 1
                at = f" at {root.source}" if root.source else ""
                rules = f", through {count} rule{'' if count == 1 else 's'}" if count else ""
                start = f"{root.value} dim {root.dim}, " if count else ""
                yield f"{value} dim {dim} on {axis}: {start}{root.by}{at}{rules}"
                return
        yield f"{value} dim {dim} on {axis}: chosen by cost"


def assignment_text(assignment: Assignment) -> str:
    """Which axes shard which named dims."""
    parts = [f"{name} on {'+'.join(axes)}" for name, axes in assignment.factors]
    if assignment.carried:
        parts.append(f"addends kept over {'+'.join(assignment.carried)}")
    return ", ".join(parts)


def steps_text(move: Move) -> str:
    return " then ".join(f"{s.kind}({'+'.join(s.axes)})" for s in move.plan.steps)


def reader_text(move: Move) -> str:
    """Who needs what a move makes."""
    return move.reason.primitive.name if move.reason is not None else "the boundary"


def _sites(traced: Any) -> dict[int, str]:
    """By value id, what outside of the program annotates it."""
    body, annotated, found = traced.program.body, traced.annotated, {}
    if traced.source is None:
        return found
    for value, entry in zip(body.outputs, annotated.out_entries, strict=True):
        if entry is not None:
            found[value.id] = "out_shardings of spmd.jit"
    own = (None,) * len(traced.captured) + traced.arguments.specs
    for value, entry, spec in zip(body.inputs, annotated.in_entries, own, strict=True):
        if entry is not None:
            found[value.id] = "in_shardings of spmd.jit"
        elif spec is not None:
            found[value.id] = "the sharding that the argument carries"
    for value in body.inputs[: len(traced.captured)]:
        found[value.id] = "the sharding of the array that the function closes over"
    return found


def _aliases(traced: Any) -> dict[str, Value]:
    """Results by their paths: one that is an argument too has the name of that."""
    if traced.out_tree is None:
        return {}
    return dict(zip(output_names(traced.out_tree), traced.program.body.outputs, strict=True))
