"""Counts the collectives of a compiled XLA module: kinds, groups, executions, bytes on the wire.

What is counted is what one device does in one run of the program. A collective in a loop counts
once per iteration; of the branches of a conditional the one that moves most bytes counts.
A collective in several pieces (`-start`/`-done` pairs, the start, middle and done fusions of TPU
compilers) counts once. Bytes are those of the module as compiled, which may differ from the
program: XLA's CPU compiler does bf16 all-reduces in f32.

Bytes on the wire follow the ring algorithms, for a group of k devices (Chan et al., "Collective
communication: theory, practice, and experience", 2007, section 4):

    all-gather          (k-1)/k of the output        reduce-scatter   (k-1)/k of the input
    all-reduce         2(k-1)/k of the input         all-to-all       (k-1)/k of the input
    collective-permute  all of the input

A ragged all-to-all counts its whole operand, the most that it may send. `send` and `recv`
(transfers to the host and between slices) are not counted.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

from spmd.reporting.hlo_groups import (
    Groups,
    connected,
    mesh_axes_of,
    permute_axes_of,
    replica_groups,
    source_target_pairs,
)
from spmd.reporting.hlo_loops import trip_count
from spmd.reporting.hlo_text import (
    BRANCHES,
    CALLED,
    Computation,
    Instruction,
    Module,
    bytes_of,
    dtypes_of,
    parse_module,
)

__all__ = [
    "HloCollective",
    "KindTotal",
    "collectives_in_hlo",
    "mesh_axes_of",
    "summarize",
    "wire_bytes",
]

PERMUTE = "collective-permute"
_OPERAND_ZERO = ("ragged-all-to-all", "collective-broadcast")
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", PERMUTE, *_OPERAND_ZERO)
_CALLS = ("fusion", "call", "call-start", "async-start", "custom-call")
_CHAIN = re.compile(r'chain_id="(\w+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_REDUCE_SCATTER_FUSION = "all-reduce-scatter"


@dataclasses.dataclass(frozen=True)
class HloCollective:
    """A collective instruction as one device executes it.

    Attributes:
      kind: XLA's opcode, without `-start`.
      name: the instruction's name in the module.
      groups: device ids that communicate with each other; for a permute the sets its pairs link.
      pairs: (source, target) ids, for a permute only.
      payload_bytes: bytes per execution and device of the larger side: the output of an
        all-gather, the input of everything else.
      dtypes: element types of the operands, as executed.
      op_name: the path in the JAX program that it came from, or "".
      count: executions in one run of the program.
      exact: False when an enclosing loop has an unknown trip count and was counted once.
    """

    kind: str
    name: str
    groups: Groups
    pairs: Groups
    payload_bytes: int
    dtypes: tuple[str, ...]
    op_name: str
    count: int = 1
    exact: bool = True

    @property
    def group_size(self) -> int:
        """Devices in the largest group."""
        return max(map(len, self.groups), default=1)

    @property
    def wire_bytes(self) -> float:
        """Bytes one device sends, over all executions; 0 for groups of one device."""
        others = self.group_size - 1
        if others == 0:
            return 0.0
        share = {"all-reduce": 2 * others / self.group_size, PERMUTE: 1.0}
        return self.count * self.payload_bytes * share.get(self.kind, others / self.group_size)

    def mesh_axes(self, mesh_shape: Mapping[str, int]) -> tuple[str, ...] | None:
        """Names of the mesh axes along which it moves data; None when they are not whole axes."""
        if self.kind == PERMUTE:
            return permute_axes_of(self.pairs, mesh_shape)
        return mesh_axes_of(self.groups, mesh_shape)

    def repeated(self, times: int, exact: bool = True) -> HloCollective:
        """The same collective executed `times` as often."""
        return dataclasses.replace(self, count=self.count * times, exact=self.exact and exact)


@dataclasses.dataclass(frozen=True)
class KindTotal:
    """Executions of one kind of collective, and the bytes one device sends for them."""

    count: int
    wire_bytes: float


def collectives_in_hlo(text: str) -> tuple[HloCollective, ...]:
    """The collectives in the text of a compiled module (`compiled.as_text()`), in program order."""
    module = parse_module(text)
    return _Counter(module).of(module.computations[module.entry])


def summarize(collectives: Iterable[HloCollective]) -> dict[str, KindTotal]:
    """Executions and wire bytes by kind; collectives of one device are left out."""
    totals: dict[str, KindTotal] = {}
    for each in collectives:
        if each.group_size > 1:
            so_far = totals.get(each.kind, KindTotal(0, 0.0))
            totals[each.kind] = KindTotal(
                so_far.count + each.count, so_far.wire_bytes + each.wire_bytes
            )
    return dict(sorted(totals.items()))


def wire_bytes(text: str) -> float:
    """Bytes one device sends in one run of a compiled module."""
    return _total(collectives_in_hlo(text))


def _total(collectives: Iterable[HloCollective]) -> float:
    return sum(each.wire_bytes for each in collectives)


class _Counter:
    """Collects the collectives of computations, each computation once."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._done: dict[str, tuple[HloCollective, ...]] = {}
        self._continuations = _chain_continuations(module)

    def of(self, computation: Computation) -> tuple[HloCollective, ...]:
        """Collectives of one execution of a computation, with those of what it calls."""
        if computation.name not in self._done:
            self._done[computation.name] = tuple(
                each
                for instruction in computation.instructions.values()
                for each in self._of_instruction(computation, instruction)
            )
        return self._done[computation.name]

    def _of_instruction(
        self, computation: Computation, instruction: Instruction
    ) -> tuple[HloCollective, ...]:
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            if (computation.name, instruction.name) in self._continuations:
                return ()
            return (_collective(self._module, computation, instruction, kind),)
        if instruction.opcode == "while":
            return self._of_loop(computation, instruction)
        if instruction.opcode == "conditional":
            return self._of_conditional(instruction)
        if instruction.opcode in _CALLS:
            return self._of_call(instruction)
        return ()

    def _of_loop(self, computation: Computation, loop: Instruction) -> tuple[HloCollective, ...]:
        condition, body = self._called(loop, "condition"), self._called(loop, "body")
        if not condition and not body:
            return ()
        trips = trip_count(self._module, computation, loop)
        known = trips is not None
        times = 1 if trips is None else trips
        # the condition is evaluated once more, when it fails
        return tuple(
            [each.repeated(times + 1, known) for each in condition]
            + [each.repeated(times, known) for each in body]
        )

    def _of_conditional(self, conditional: Instruction) -> tuple[HloCollective, ...]:
        branches = [
            self.of(self._module.computations[name])
            for key in BRANCHES
            for name in conditional.attribute_list(key)
        ]
        return max(branches, key=lambda branch: (_total(branch), len(branch)), default=())

    def _of_call(self, call: Instruction) -> tuple[HloCollective, ...]:
        called = tuple(
            each
            for key in CALLED
            for each in self._called(call, key)
        )
        names = call.attribute("calls") or ""
        if call.opcode == "fusion" and _REDUCE_SCATTER_FUSION in names:
            # an all-reduce whose every device keeps only its slice of the result
            return tuple(
                dataclasses.replace(each, kind="reduce-scatter")
                if each.kind == "all-reduce"
                else each
                for each in called
            )
        return called

    def _called(self, instruction: Instruction, key: str) -> tuple[HloCollective, ...]:
        return tuple(
            each
            for name in instruction.attribute_list(key)
            if name in self._module.computations
            for each in self.of(self._module.computations[name])
        )


def _collective(
    module: Module, computation: Computation, instruction: Instruction, kind: str
) -> HloCollective:
    # counted from the operands: they print alike for `-start`, for tuples and for plain results
    operands = computation.operand_types(instruction)
    operands = operands[:1] if kind in _OPERAND_ZERO else operands
    pairs = source_target_pairs(instruction.attributes) if kind == PERMUTE else ()
    attributes = instruction.attributes
    groups = connected(pairs) if pairs else replica_groups(attributes, module.num_devices)
    operand_bytes = sum(map(bytes_of, operands))
    op_name = _OP_NAME.search(attributes)
    size = max(map(len, groups), default=1)
    return HloCollective(
        kind=kind,
        name=instruction.name,
        groups=groups,
        pairs=pairs,
        payload_bytes=operand_bytes * (size if kind == "all-gather" else 1),
        dtypes=tuple(dtype for operand in operands for dtype in dtypes_of(operand)),
        op_name=op_name.group(1) if op_name else "",
    )


def _chain_continuations(module: Module) -> set[tuple[str, str]]:
    """Collectives, as (computation, name), that continue one already counted.

    TPU compilers spread an asynchronous collective over fusions that all name it, marked with the
    same `chain_id`; the fusion in which it feeds `AsyncCollectiveStart` is the one that counts.
    Without such a fusion the first one does.
    """
    chains: dict[tuple[str, str], list[tuple[bool, str, str]]] = {}
    for computation in module.computations.values():
        instructions = computation.instructions.values()
        started = {
            name
            for each in instructions
            if '"AsyncCollectiveStart"' in each.attributes
            for name in each.operands
        }
        for each in instructions:
            chain = _CHAIN.search(each.attributes) if each.opcode in KINDS else None
            if chain:
                member = (each.name in started, computation.name, each.name)
                chains.setdefault((each.opcode, chain.group(1)), []).append(member)
    continuations = set()
    for members in chains.values():
        has_start = any(is_start for is_start, _, _ in members)
        rest = [m for m in members if not m[0]] if has_start else members[1:]
        continuations.update((computation, name) for _, computation, name in rest)
    return continuations
