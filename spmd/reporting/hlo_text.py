"""Reads the text of a compiled XLA module into computations and instructions.

The grammar is XLA's `HloModule::ToString`, in the forms compilers for CPU, GPU and TPU print:
operands with or without their types, names with or without `%`, layouts with tiles and memory
spaces, `/*index=5*/` comments. Only what a reader of collectives needs is kept: names, types,
opcodes, operands, and the attributes as text.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

from sharding.errors import ArgumentError, Problem

_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*(?:\(.*->.*)?\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT\s+)?%?([\w.\-]+)\s*=\s*(\S.*)$")
_COMMENT = re.compile(r"/\*.*?\*/")
_ARRAY_TYPE = re.compile(r"([a-z]\w*)\[([^\]]*)\]")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_SIZELESS = ("token", "opaque", "opq")
_OPEN, _CLOSE = "([{", ")]}"

# Attributes that name computations: those that always run, and those of which one does.
CALLED = ("calls", "to_apply", "called_computations")
BRANCHES = ("branch_computations", "true_computation", "false_computation")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    arguments: str  # the text between the parentheses
    attributes: str  # everything after them
    is_root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands, without `%` and types."""
        return tuple(part.split()[-1].lstrip("%") for part in split_top_level(self.arguments))

    def attribute(self, key: str) -> str | None:
        """A computation name or number given as `key=value`, or None."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else None

    def attribute_list(self, key: str) -> tuple[str, ...]:
        """Names given as `key={%a, %b}`; a single name without braces counts as one."""
        found = re.search(rf"\b{key}=\{{([^}}]*)\}}", self.attributes)
        if found:
            return tuple(name.strip().lstrip("%") for name in found.group(1).split(","))
        single = self.attribute(key)
        return (single,) if single else ()


@dataclasses.dataclass(frozen=True)
class Computation:
    """A named sequence of instructions; `instructions` keeps their order."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """The parameter instructions by number."""
        found = (i for i in self.instructions.values() if i.opcode == "parameter")
        return {int(i.arguments): i for i in found}

    def operand_types(self, instruction: Instruction) -> tuple[str, ...]:
        """Types of an instruction's operands, printed inline or looked up by name."""
        parts = split_top_level(instruction.arguments)
        inline = (part.strip().rpartition(" ")[0] for part in parts)
        return tuple(
            text or self.instructions[name].type
            for text, name in zip(inline, instruction.operands, strict=True)
        )


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled module: its computations, the entry's name, and how many devices run it."""

    computations: dict[str, Computation]
    entry: str
    num_devices: int


def parse_module(text: str) -> Module:
    """Parses HLO text. Raises ArgumentError when it has no entry computation."""
    computations: dict[str, Computation] = {}
    entry, current, lines = "", "", list[Instruction]()
    for line in text.splitlines():
        if line.startswith("}") and current:
            computations[current] = _computation(current, lines)
            current, lines = "", []
        elif not current and (header := _HEADER.match(line)):
            current = header.group(2)
            entry = current if header.group(1) else entry
        elif current and (instruction := _parse_instruction(line)):
            lines.append(instruction)
    if not entry:
        raise ArgumentError(
            Problem(
                f"a text with {len(computations)} HLO computations, none of them marked ENTRY",
                "what one run of the program executes is counted from its entry computation",
                "pass the whole of `compiled.as_text()`",
            )
        )
    return Module(computations, entry, _num_devices(text))


def _computation(name: str, lines: list[Instruction]) -> Computation:
    root = next((i for i in lines if i.is_root), lines[-1])
    return Computation(name, {i.name: i for i in lines}, root)


def _parse_instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    rest = _COMMENT.sub("", match.group(3))
    end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ")
    opcode = _OPCODE.match(rest, end) if end > 0 else None
    if opcode is None:
        return None  # continuation of a constant that spans several lines
    close = _closing(rest, opcode.end() - 1)
    return Instruction(
        name=match.group(2),
        type=rest[:end],
        opcode=opcode.group(1),
        arguments=rest[opcode.end() : close - 1],
        attributes=rest[close:],
        is_root=match.group(1) is not None,
    )


def _closing(text: str, start: int) -> int:
    """The index just past the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)


def split_top_level(text: str) -> tuple[str, ...]:
    """Splits at the commas that no parenthesis, bracket or brace encloses."""
    parts, depth, start = [], 0, 0
    for found in re.finditer(r"[()\[\]{},]", text):
        char = found.group()
        depth += (char in _OPEN) - (char in _CLOSE)
        if char == "," and depth == 0:
            parts.append(text[start : found.start()])
            start = found.end()
    parts.append(text[start:])
    return tuple(part.strip() for part in parts if part.strip())


def _num_devices(text: str) -> int:
    """Devices the module runs on: replicas times partitions, from the module's first line."""
    header = text[: text.find("\n")] if "HloModule" in text[:200] else ""
    sizes = re.findall(r"\b(?:replica_count|num_partitions)=(\d+)", header)
    return math.prod(int(size) for size in sizes)


def dtypes_of(hlo_type: str) -> tuple[str, ...]:
    """The element types in a type, in order: `(f32[2], bf16[4])` gives `("f32", "bf16")`."""
    return tuple(dtype for dtype, _ in _ARRAY_TYPE.findall(hlo_type) if dtype not in _SIZELESS)


def bytes_of(hlo_type: str) -> int:
    """Bytes of a type; a tuple is the sum of its elements, tokens are free, int4 is packed."""
    return sum(_array_bytes(dtype, dims) for dtype, dims in _ARRAY_TYPE.findall(hlo_type))


def _array_bytes(dtype: str, dims: str) -> int:
    if dtype in _SIZELESS:
        return 0
    width = re.match(r"(?:bf|f|s|u|c)(\d+)", dtype)
    if width is None and dtype != "pred":
        raise ArgumentError(
            Problem(
                f"an array of element type `{dtype}`",
                "its width is not known, so its bytes cannot be counted",
                "add the width to `_array_bytes` of spmd/reporting/hlo_text.py",
            )
        )
    bits = int(width.group(1)) if width else 8
    # a dynamic dim prints its bound as `<=8`; the buffer has the bound's size
    sizes = [int(size.strip().removeprefix("<=")) for size in dims.split(",") if size.strip()]
    return math.ceil(math.prod(sizes) * bits / 8)
