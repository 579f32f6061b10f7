"""Which values of a per-device program are held in memory, and which live only inside of a fusion.

Compilers fuse elementwise operations into whoever reads them. A value that only such readers read
is never written; its readers read what it was made from instead.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from sharding.rule import Kind
from sharding.spec import Layout
from spmd.chips import Chip
from spmd.estimate.tiles import Sizes
from spmd.estimate.work import Line
from spmd.partition.plan import Compute, Key, Move, ProgramPlan, RegionPlan

Name = tuple[int, Layout]


class Compiler(NamedTuple):
    """What a compiler makes of a program in memory.

    Attributes:
      into_dots: contractions and convolutions take elementwise operands in, as on TPUs; on CPUs
        and GPUs they are library calls, which read memory.
      hoists: what a loop runs over and converts to a narrower dtype is converted before it, whole.
      beside: kinds of collectives that run beside computation: their results are not put in the
        place of their operands.
      tiled: the two minor dims of arrays lie in tiles, see `tiles`.
      chip: by whose numbers it puts other work beside collectives; None: it does not.
    """

    into_dots: bool = True
    hoists: bool = True
    beside: frozenset[str] = frozenset()
    tiled: bool = False
    chip: Chip | None = None

    @staticmethod
    def of(chip: Chip) -> "Compiler":
        """XLA's for a chip."""
        tpu = chip.family == "tpu"
        return Compiler(tpu, tpu, chip.overlaps if tpu else frozenset(), tpu, chip if tpu else None)


ANY = Compiler()


class Held(NamedTuple):
    """What exists in memory, by line.

    Attributes:
      writes: line -> values that it writes to memory.
      reads: line -> values in memory that it reads, directly or through what is fused into it.
      same: value that an identity makes -> the value in memory that it is.
      sums: value that the pass of a sum over it writes -> such sums. Who reads it before computes it
        again.
      turned: line -> what it reads with its dims in another order, through what is fused into it.
    """

    writes: tuple[tuple[Key, ...], ...]
    reads: tuple[tuple[Key, ...], ...]
    same: Mapping[Name, Key]
    sums: Mapping[Name, frozenset[Name]] = {}
    turned: tuple[frozenset[Name], ...] = ()

    def memory_of(self, key: Key) -> Name:
        """What has to be held for a value to be there."""
        return name(self.same.get(name(key), key))


def name(key: Key) -> Name:
    return key.value.id, key.layout


def held(plan: ProgramPlan, lines: tuple[Line, ...], compiler: Compiler = ANY) -> Held:
    """Decides for every value whether it is held."""
    readers, sizes = _readers(lines), Sizes(lines, compiler.tiled)
    written = _written_by_sums(lines)
    turned: dict[Name, frozenset[Name]] = {}
    by_line: list[frozenset[Name]] = []
    leaving = set(_leaving(plan.body))
    roots: dict[Name, tuple[Key, ...]] = {}
    same: dict[Name, Key] = {}
    writes: list[tuple[Key, ...]] = []
    reads: list[tuple[Key, ...]] = []
    for line in lines:
        found: dict[Name, Key] = {}
        for key in line.reads:
            for root in roots.get(name(key), (key,)):
                if root.value.const is None or root.value.rank:
                    found[name(root)] = root
        sources = tuple(found.values())
        by_line.append(frozenset().union(*(turned.get(name(key), ()) for key in line.reads)))
        dims = frozenset(found) ^ by_line[-1] if _transposes(line) else by_line[-1]
        turned.update((name(key), dims) for key in line.writes if fusible(line))
        kept = []
        for key in line.writes:
            inside = name(key) not in leaving
            if _identity(line) and (whole := _itself(line.reads[0], roots, same)):
                roots[name(key)], same[name(key)] = sources, whole
            elif _identity(line) and inside:
                roots[name(key)] = sources
            elif (
                inside
                and len(sources) <= _MOST_ROOTS
                and fusible(line)
                and name(key) not in written
                and not sizes.packed(key, line.mesh)
                and _absorbed(line, readers.get(name(key), ()), compiler.into_dots)
                and not _dear(line, key, sources, readers)
            ):
                roots[name(key)] = sources
            else:
                kept.append(key)
        writes.append(tuple(kept))
        reads.append(sources)
    return Held(tuple(writes), tuple(reads), same, written, tuple(by_line))


def _itself(key: Key, roots: Mapping[Name, object], same: Mapping[Name, Key]) -> Key | None:
    """The value in memory that a value is, unless it is fused into its readers."""
    return same.get(name(key), None if name(key) in roots else key)


# A fusion of more operands than this is split by compilers.
_MOST_ROOTS = 24


def fusible(line: Line) -> bool:
    """Whether a line can be computed element by element where its result is read."""
    found = line.instruction
    if isinstance(found, Move):
        return not line.wires
    if found.regions or line.wires:
        return False
    rule = found.op.rule
    return rule.early or rule.expands or not found.operands


def _transposes(line: Line) -> bool:
    """Whether the dims of its only operand come in another order."""
    found = line.instruction
    if not isinstance(found, Compute) or found.regions or len(found.op.rule.operands) != 1:
        return False
    (before,), after = found.op.rule.operands, found.op.rule.results[0]
    kept = [names for names in before if names in after and names]
    return kept != [names for names in after if names in kept]


def _identity(line: Line) -> bool:
    found = line.instruction
    return isinstance(found, Compute) and not found.regions and found.op.rule.identity


def _readers(lines: tuple[Line, ...]) -> Mapping[Name, list[Line]]:
    """Who reads a value in a layout."""
    readers: dict[Name, list[Line]] = {}
    for line in lines:
        for key in line.reads:
            readers.setdefault(name(key), []).append(line)
    return readers


def _leaving(region: RegionPlan) -> Iterator[Name]:
    """Values at the end of any region."""
    yield from map(name, region.outputs)
    for instruction in region.code:
        for inner in instruction.regions if isinstance(instruction, Compute) else ():
            yield from _leaving(inner)


def _absorbed(line: Line, readers: Sequence[Line], into_dots: bool) -> bool:
    """Whether every reader takes the value in: elementwise operations, reductions, contractions."""
    return all(
        _takes_in(reader, into_dots) and reader.parent == line.parent for reader in readers
    )


def _written_by_sums(lines: tuple[Line, ...]) -> dict[Name, frozenset[Name]]:
    """Values that contractions would read in fused form, and that are dear to compute, where sums
    go over the same: XLA lets a sum's pass write them. Not where they need that sum."""
    dear: dict[Name, frozenset[Name]] = {}  # what is dear in a value, since it was last in memory
    needs: dict[Name, frozenset[Name]] = {}  # the sums in it
    sums: dict[Name, set[Name]] = {}  # what is dear -> sums over it
    read: list[Key] = []
    for line in lines:
        inside = frozenset().union(*(dear.get(name(key), ()) for key in line.reads))
        summed = frozenset().union(*(needs.get(name(key), ()) for key in line.reads))
        results = [name(key) for key in line.writes]
        if fusible(line) or _identity(line):
            once = isinstance(line.instruction, Compute) and line.instruction.op.rule.once
            for result in results:
                dear[result] = inside | ({result} if once else frozenset())
                needs[result] = summed
        elif _reduces(line) and not line.contracts:
            needs.update(dict.fromkeys(results, summed | set(results)))
            for found in inside:
                sums.setdefault(found, set()).update(results)
        elif line.contracts:
            read += [key for key in line.reads if dear.get(name(key))]
    found = {
        name(key): frozenset().union(*(sums.get(d, ()) for d in dear[name(key)])) - needs[name(key)]
        for key in read
    }
    return {value: passes for value, passes in found.items() if passes}


def _dear(
    line: Line, key: Key, sources: Sequence[Key], readers: Mapping[Name, Sequence[Line]]
) -> bool:
    """Whether its readers move more bytes when each of them reads what the value is made of, than
    when it is written once and they read that."""
    count = len({_end(reader, readers).index for reader in readers.get(name(key), ())})
    size = key.local_bytes(line.mesh)
    made_of = sum(source.local_bytes(line.mesh) for source in sources)
    return size + made_of + count * size < count * made_of


def _end(line: Line, readers: Mapping[Name, Sequence[Line]]) -> Line:
    """Of lines that read each other and nothing else does, the last: they are one fusion."""
    while fusible(line) and len(line.writes) == 1:
        following = readers.get(name(line.writes[0]), ())
        if len(following) != 1 or following[0].parent != line.parent:
            break
        line = following[0]
    return line


def _takes_in(reader: Line, into_dots: bool) -> bool:
    if fusible(reader):
        return True
    found = reader.instruction
    if isinstance(found, Move) or found.regions or reader.wires:
        return False
    if reader.contracts:  # what such a line does of its own without communicating is its operation
        return into_dots and _reduces(reader)
    return found.op.rule.local is None and _reduces(reader)


def _reduces(line: Line) -> bool:
    found = line.instruction
    if isinstance(found, Move) or found.regions:
        return False
    return any(f.kind is Kind.REDUCE for f in found.op.rule.factors.values())
