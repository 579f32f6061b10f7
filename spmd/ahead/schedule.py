"""How long a scheduled module takes: XLA's own cycles, and transfers on the links of a machine.

One device's instructions run in the order in which XLA scheduled them. An instruction takes the
cycles that XLA estimates for it; one without an estimate the time to read its operands from memory
and to write its result. Loops count as often as they run. Copies that XLA starts ahead (into its
scratchpad) are taken to be hidden, as they are scheduled to be.

A synchronous collective holds everything up for the time that the ring model gives it. A started
one runs beside what is scheduled until it is waited for; what is left then is exposed. Started
ones follow each other on the links.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sharding.errors import MeshError
from spmd.ahead.source import Sources, op_name
from spmd.hardware import MachineLayout
from spmd.reporting.hlo import KINDS, PERMUTE, HloCollective, collectives_in_hlo
from spmd.reporting.hlo_loops import trip_count
from spmd.reporting.hlo_text import (
    BRANCHES,
    CALLED,
    Computation,
    Instruction,
    Module,
    bytes_of,
    parse_module,
)

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHAIN = re.compile(r'chain_id="(\w+)"')
_TARGET = re.compile(r'custom_call_target="(\w+)"')
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all add-dependency opt-barrier "
    "optimization-barrier partition-id replica-id copy-start copy-done iota".split()
)
# Memory that nothing is written to; parts side by side, seen as one.
_FREE_TARGETS = frozenset(("AllocateBuffer", "ConcatBitcast"))
_OUR_KINDS = {
    "all-reduce": "all_reduce", "all-gather": "all_gather", "reduce-scatter": "reduce_scatter",
    "all-to-all": "all_to_all", "ragged-all-to-all": "all_to_all", PERMUTE: "permute",
    "collective-broadcast": "permute",
}  # fmt: skip


@dataclass(frozen=True)
class Transfer:
    """A collective as scheduled, all its runs in one call of the program together.

    Attributes:
      kind: all_reduce, all_gather, reduce_scatter, all_to_all, permute.
      axes: mesh axes; () when the groups are not made of whole axes.
      count: runs.
      bytes: payload of one run, the larger side, on one device.
      seconds: of all runs, by the ring model.
      exposed: of those, seconds in which nothing is computed.
      asynchronous: whether XLA starts it ahead.
      name: of the instruction.
      op_name: the path in the JAX program.
      source: `file.py:12 (function)`, or "".
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int
    seconds: float
    exposed: float
    asynchronous: bool
    name: str
    op_name: str
    source: str


@dataclass(frozen=True)
class Schedule:
    """Times of one call of a module on one device.

    Attributes:
      compute: seconds of computation and memory traffic.
      cycles: those that XLA estimated, of all runs.
      unestimated: seconds, part of `compute`, of instructions that XLA gives no cycles.
      transfers: dearest first by what is exposed.
      exact: False when a loop has an unknown number of iterations and was counted once.
    """

    compute: float
    cycles: float
    unestimated: float
    transfers: tuple[Transfer, ...]
    exact: bool

    @property
    def exposed(self) -> float:
        """Seconds of communication that no computation hides."""
        return sum(t.exposed for t in self.transfers)

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


def read_schedule(text: str, layout: MachineLayout) -> Schedule:
    """The times of the scheduled module `text` on the machine of `layout`.

    Raises:
      ArgumentError: the text is no module.
    """
    return _Clock(text, layout).run()


class _Clock:
    """Runs a module once, adding up times."""

    def __init__(self, text: str, layout: MachineLayout):
        self.module: Module = parse_module(text)
        self.layout, self.chip = layout, layout.machine.chip
        self.sources = Sources(text)
        self.collectives = {c.name: c for c in collectives_in_hlo(text)}
        self.transfers: dict[str, Transfer] = {}
        self.cycles = self.unestimated = self.compute = 0.0
        self.exact = True
        self.now = self.links_free = 0.0
        self.started: dict[str, tuple[str, float]] = {}  # key -> (transfer, when it is done)

    def run(self) -> Schedule:
        self._walk(self.module.computations[self.module.entry], 1)
        transfers = sorted(self.transfers.values(), key=lambda t: (-t.exposed, -t.seconds))
        return Schedule(
            self.compute, self.cycles, self.unestimated, tuple(transfers), self.exact
        )  # fmt: skip

    def _walk(self, computation: Computation, times: int) -> None:
        """One run of `computation` stands for `times` of them."""
        for instruction in computation.instructions.values():
            self._step(computation, instruction, times)

    def _step(self, computation: Computation, each: Instruction, times: int) -> None:
        opcode = each.opcode
        if opcode == "while":
            trips = trip_count(self.module, computation, each)
            self.exact = self.exact and trips is not None
            body = self.module.computations[each.attribute("body") or ""]
            self._walk(body, times * (1 if trips is None else trips))
        elif opcode == "conditional":
            self._dearest(each, times)
        elif opcode == "call":
            for called in self._called(each, "to_apply"):
                self._walk(called, times)
        elif opcode.removesuffix("-start") in KINDS:
            if opcode.endswith("-start"):
                self._start(each.name, each.name, times)
            else:
                self._hold_up(each.name, times)
        elif opcode.endswith("-done"):
            self._wait(each.operands[0], times)
        elif opcode in ("async-start", "call-start"):  # the latter: on a SparseCore
            for inner in self._inner(each):
                self._start(each.name, inner.name, times)
        elif not _is_free(each):
            self._compute(computation, each, times)

    def _compute(self, computation: Computation, each: Instruction, times: int) -> None:
        begins, ends, plain = self._communicates(each)
        found = _CYCLES.search(each.attributes)
        if found:
            seconds = int(found[1]) / self.chip.clock
            self.cycles += times * int(found[1])
        elif begins or ends or plain:
            seconds = 0.0
        else:
            moved = bytes_of(each.type) + sum(map(bytes_of, computation.operand_types(each)))
            moved = 2 * bytes_of(each.type) if each.opcode == "fusion" else moved
            seconds = moved / self.chip.hbm_bandwidth
            self.unestimated += times * seconds
        for key, name in begins:
            self._start(key, name, times)
        for name in plain:
            self._hold_up(name, times)
        self.compute += times * seconds
        self.now += seconds
        for key in ends:
            self._wait(key, times)

    def _communicates(
        self, each: Instruction
    ) -> tuple[list[tuple[str, str]], list[str], list[str]]:
        """Of a fusion: (chain, collective) that it starts, chains it waits for, collectives it is.

        TPU compilers spread an asynchronous collective over fusions that name one chain: one
        contains `AsyncCollectiveStart`, one `AsyncCollectiveDone`, and those between carry on.
        """
        begins, ends, plain = [], [], []
        if each.opcode != "fusion":
            return begins, ends, plain
        inner = list(self._inner(each))
        targets = {t[1] for i in inner if (t := _TARGET.search(i.attributes))}
        for found in (i for i in inner if i.opcode in KINDS):
            chain = _CHAIN.search(found.attributes)
            key = f"chain {found.opcode} {chain[1]}" if chain else ""
            if key and "AsyncCollectiveDone" in targets:
                ends.append(key)
            elif key and "AsyncCollectiveStart" in targets:
                begins.append((key, found.name))
            elif found.name in self.collectives and key not in self.started:
                plain.append(found.name)
        return begins, ends, plain

    def _inner(self, each: Instruction) -> Iterator[Instruction]:
        for key in CALLED:
            for called in self._called(each, key):
                yield from called.instructions.values()

    def _called(self, each: Instruction, key: str) -> list[Computation]:
        names = each.attribute_list(key)
        return [self.module.computations[n] for n in names if n in self.module.computations]

    def _dearest(self, each: Instruction, times: int) -> None:
        """Of the branches of a conditional the one that takes longest counts."""
        branches = [c for key in BRANCHES for c in self._called(each, key)]
        best, before = None, self._state()
        for branch in branches:
            self._restore(before)
            self._walk(branch, times)
            after = self._state()
            if best is None or after[0] > best[0]:
                best = after
        if best is not None:
            self._restore(best)

    def _state(self) -> tuple:
        spent = self.compute + sum(t.exposed for t in self.transfers.values())
        return (spent, self.compute, self.cycles, self.unestimated, dict(self.transfers), self.now,
                self.links_free, dict(self.started))  # fmt: skip

    def _restore(self, state: tuple) -> None:
        (_, self.compute, self.cycles, self.unestimated, transfers, self.now, self.links_free,
         started) = state  # fmt: skip
        self.transfers, self.started = dict(transfers), dict(started)

    def _start(self, key: str, name: str, times: int) -> None:
        if name not in self.collectives:
            return
        seconds = self._seconds(name)
        begin = max(self.now, self.links_free)
        self.links_free = begin + seconds
        self.started[key] = (name, self.links_free)
        self._add(name, times, seconds, 0.0, asynchronous=True)

    def _wait(self, key: str, times: int) -> None:
        name, done = self.started.pop(key, ("", 0.0))
        if name and done > self.now:
            self._add(name, 0, 0.0, times * (done - self.now), asynchronous=True)
            self.now = done

    def _hold_up(self, name: str, times: int) -> None:
        if name in self.collectives:
            seconds = self._seconds(name)
            self.now = max(self.now, self.links_free) + seconds
            self.links_free = self.now
            self._add(name, times, seconds, times * seconds, asynchronous=False)

    def _seconds(self, name: str) -> float:
        found = self.collectives[name]
        if found.group_size <= 1:
            return 0.0
        lies = self.layout.among(found.groups[0])
        kind = _OUR_KINDS[found.kind]
        return self.layout.machine.time(kind, lies, found.payload_bytes)

    def _add(
        self, name: str, times: int, seconds: float, exposed: float, asynchronous: bool
    ) -> None:
        old = self.transfers.get(name) or self._transfer(self.collectives[name], asynchronous)
        self.transfers[name] = replace(
            old, count=old.count + times, seconds=old.seconds + times * seconds,
            exposed=old.exposed + exposed,
        )  # fmt: skip

    def _transfer(self, found: HloCollective, asynchronous: bool) -> Transfer:
        attributes = next(
            c.instructions[found.name].attributes
            for c in self.module.computations.values()
            if found.name in c.instructions
        )
        try:
            axes = found.mesh_axes(dict(self.layout.mesh.axes)) or ()
        except (MeshError, ValueError):
            axes = ()
        return Transfer(
            _OUR_KINDS[found.kind], axes, 0, found.payload_bytes, 0.0, 0.0, asynchronous,
            found.name, op_name(attributes), self.sources.of(attributes),
        )  # fmt: skip


def _is_free(each: Instruction) -> bool:
    """Whether an instruction takes no time of its own."""
    target = _TARGET.search(each.attributes) if each.opcode == "custom-call" else None
    if target:
        return target[1] in _FREE_TARGETS
    return each.opcode in _FREE or each.opcode.endswith(("-start", "-update"))
