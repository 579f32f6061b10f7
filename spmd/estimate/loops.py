"""What loops hold beside the values of their steps, and where their results lie."""

from collections.abc import Iterator, Mapping

from sharding.program import Value
from spmd.estimate.fusion import Name, fusible, name
from spmd.estimate.work import Line
from spmd.partition.plan import Compute, Key, Move


def carried(line: Line) -> Mapping[Name, Key] | None:
    """Results of a loop -> the initial values that they are carried on from. They take the place of
    those alone: the steps read all else to the end. None: the line is no loop."""
    op = line.instruction.op if isinstance(line.instruction, Compute) else None
    if op is None or op.control is None:
        return None
    inner = {(port.region, port.inner): line.reads[port.outer] for port in op.in_ports}
    outer = {(port.region, port.inner): line.writes[port.outer] for port in op.out_ports}
    carries = op.control.carries(op)
    if not carries and not any(port.stacked for port in (*op.in_ports, *op.out_ports)):
        return None
    return {
        name(outer[region, result]): inner[region, start]
        for region, result, start in carries if (region, result) in outer
    }  # fmt: skip


def hoisted(lines: tuple[Line, ...]) -> Mapping[int, list[tuple[Key, int]]]:
    """Per loop, operands that it runs over and that all its steps read in a narrower dtype alone,
    with the bytes of a converted copy of the whole."""
    readers: dict[tuple[int, int], list[Line]] = {}
    for line in lines:
        for key in line.reads:
            readers.setdefault((line.parent, key.value.id), []).append(line)
    found: dict[int, list[tuple[Key, int]]] = {}
    for line in lines:
        for outer, inner, stacked in _inner_values(line):
            width = _narrower(inner, line, readers) if stacked else 0
            if width:
                size = outer.local_bytes(line.mesh) * width // outer.value.itemsize
                found.setdefault(line.index, []).append((outer, size))
    return found


def _inner_values(line: Line) -> Iterator[tuple[Key, Value, bool]]:
    """The operands of a line with regions, what they are called inside, and whether it runs over
    them."""
    op = line.instruction.op if isinstance(line.instruction, Compute) else None
    if op is not None and op.control is not None:
        for port in op.in_ports:
            inner = op.regions[port.region].inputs[port.inner]
            yield line.reads[port.outer], inner, port.stacked


def _narrower(value: Value, inside: Line, readers: Mapping[tuple[int, int], list[Line]]) -> int:
    """The bytes per element to which all readers in a region convert a value; 0 where one does
    not."""
    width = 0
    for line in readers.get((inside.index, value.id), ()):
        inner = [v for key, v, _ in _inner_values(line) if key.value is value]
        if inner:
            found = min(_narrower(v, line, readers) for v in inner)
        elif isinstance(line.instruction, Move) or len(line.reads) != 1 or not fusible(line):
            found = 0
        else:
            made = line.writes[0].value
            alike = made.shape == value.shape and made.itemsize < value.itemsize
            found = made.itemsize if alike else 0
        if not found:
            return 0
        width = max(width, found)
    return width
