"""What fills a device's memory: the buffers of a compiled program, by source line.

Read from XLA's own buffer assignment (`xla_dump_to`), which it writes for programs that do not fit
as well. One allocation holds the temporaries; values in it that are never alive together share
bytes. The buffers listed here take disjoint bytes: each stands for the largest value in its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from spmd.ahead.source import Sources, op_name

_ALLOCATION = re.compile(r"^allocation (\d+): size (\d+)(.*):$")
_VALUE = re.compile(r"^ value: <\d+ (\S+?)(?:\{([\d,]*)\})? (?:\(phi\) )?@\d+> "
                    r"\(size=(\d+),offset=(\d+)\): (\S+)")  # fmt: skip
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_LAYOUT = re.compile(r"\{[^{}]*\}$")
_HBM = re.compile(
    r"memory required for .*? \((?P<used>[\d.]+)(?P<unit>[KMGT]?)B?\)"
    r" exceeds available HBM \((?P<limit>[\d.]+)(?P<limit_unit>[KMGT]?)B?\)"
)
_USED = re.compile(
    r"Used (?P<used>[\d.]+)(?P<unit>[KMGT]?)B? of (?P<limit>[\d.]+)(?P<limit_unit>[KMGT]?)B? hbm"
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Buffer:
    """Bytes of a device's memory.

    Attributes:
      bytes: its size, padding included.
      shape: as XLA prints it, e.g. "bf16[8,1024,4096]".
      kind: "argument", "result" or "temporary".
      op_name: the path in the JAX program of what makes it; the argument's name for arguments.
      source: `file.py:12 (function)`, or "".
    """

    bytes: int
    shape: str
    kind: str
    op_name: str
    source: str

    def __str__(self) -> str:
        name = self.op_name if self.kind == "argument" else self.op_name.rpartition("/")[2]
        where = f" at {self.source}" if self.source else ""
        return f"{gigabytes(self.bytes)} {self.kind} {self.shape} {name}{where}"


class Shortage(NamedTuple):
    """What XLA's error says about a program that does not fit, in bytes per device."""

    needed: float
    available: float


def gigabytes(count: float) -> str:
    """Bytes as XLA counts them: "1.50 GiB", "12.0 MiB"."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"


def shortage(message: str) -> Shortage | None:
    """Parses the message of RESOURCE_EXHAUSTED; None when it is about something else."""
    found = _HBM.search(message) or _USED.search(message)
    if found is None:
        return None
    used = float(found["used"]) * _UNITS[found["unit"]]
    return Shortage(used, float(found["limit"]) * _UNITS[found["limit_unit"]])


class Assignment(NamedTuple):
    """The buffer assignment of a module.

    Attributes:
      total: bytes of all allocations in HBM.
      buffers: largest first.
    """

    total: int
    buffers: tuple[Buffer, ...]


def read_assignment(folder: Path) -> Assignment | None:
    """The buffers of the module whose dump is in `folder`; None when there is none.

    Several modules may be dumped on the way; the one with the largest assignment is the program.
    """
    paths = sorted(folder.glob("*after_optimizations-buffer-assignment.txt"))
    path = max(paths, key=lambda p: p.stat().st_size, default=None)
    if path is None:
        return None
    module = path.with_name(path.name.replace("-buffer-assignment", ""))
    if not module.exists():
        module = path.with_name(
            path.name.replace("-buffer-assignment", "_before_buffer_assignment")
        )
    text = module.read_text() if module.exists() else ""
    return parse_assignment(path.read_text(), text)


def parse_assignment(assignment: str, module: str) -> Assignment:
    """The buffers of a buffer assignment, with lines from the text of its module."""
    sources, lines = Sources(module), _instructions(module)
    total, buffers = 0, []
    for size, attributes, values in _allocations(assignment):
        if "color" in attributes and "color 0" not in attributes:
            continue  # VMEM, SMEM and flags are no part of HBM
        if "thread-local" in attributes:
            continue
        total += size
        kind = "temporary" if "preallocated-temp" in attributes else "result"
        kind = "argument" if "parameter" in attributes else kind
        values = _parameters(values, lines) if kind == "argument" else values
        buffers += [_buffer(v, kind, sources, lines) for v in _places(values)]
    return Assignment(total, tuple(sorted(buffers, key=lambda b: -b.bytes)))


class _Value(NamedTuple):
    name: str
    size: int
    offset: int
    shape: str


def _allocations(text: str) -> Iterator[tuple[int, str, list[_Value]]]:
    size, attributes, values = 0, "", list[_Value]()
    for line in text.splitlines():
        if found := _ALLOCATION.match(line):
            if attributes:
                yield size, attributes, values
            size, attributes, values = int(found[2]), found[3] or ",", []
        elif attributes and (found := _VALUE.match(line)):
            values.append(_Value(found[1], int(found[3]), int(found[4]), found[5]))
    if attributes:
        yield size, attributes, values


def _places(values: Iterable[_Value]) -> list[_Value]:
    """Values on disjoint bytes, largest first; of several in one place the one that a line of the
    program makes, rather than a loop that passes it on."""
    chosen: list[_Value] = []
    for value in sorted(values, key=lambda v: (-v.size, _passes_on(v.name))):
        end = value.offset + value.size
        if all(end <= c.offset or c.offset + c.size <= value.offset for c in chosen):
            chosen.append(value)
    return chosen


def _passes_on(name: str) -> bool:
    return name.startswith(("while", "wide.", "param", "arg", "copy", "tuple", "broadcast"))


def _parameters(values: list[_Value], lines: dict[str, str]) -> list[_Value]:
    """The argument itself, not what is written in its place after its last use."""
    found = [v for v in values if " parameter(" in lines.get(v.name, "")]
    return found or values


def _buffer(value: _Value, kind: str, sources: Sources, lines: dict[str, str]) -> Buffer:
    line = lines.get(value.name, "")
    name = op_name(line) or value.name
    source = sources.of(line)
    return Buffer(value.size, _LAYOUT.sub("", value.shape), kind, name, source)


def _instructions(module: str) -> dict[str, str]:
    """Instruction name -> its line."""
    pairs = ((_NAME.match(line), line) for line in module.splitlines())
    return {found[1]: line for found, line in pairs if found}
