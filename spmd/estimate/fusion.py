"""Which values of a per-device program are held in memory, and which live only inside of a fusion.

Compilers fuse elementwise operations into whoever reads them. A value that only such readers read
is never written; its readers read what it was made from instead. What is made of a product that
nobody else reads leaves the matrix units with it, and is written in its place.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from sharding.rule import Kind
from sharding.spec import Layout
from spmd.chips import Chip
from spmd.estimate.matrix import rate
from spmd.estimate.tiles import Sizes
from spmd.estimate.work import Line, contracts
from spmd.partition.plan import Compute, Key, Move, ProgramPlan, RegionPlan

Name = tuple[int, Layout, int]


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
      sums: value that the pass of a sum over it writes -> such sums. Who reads it before that
        computes it again.
      turned: line -> what it reads with its dims in another order, through what is fused into it.
      sizes: of all that is held.
    """

    writes: tuple[tuple[Key, ...], ...]
    reads: tuple[tuple[Key, ...], ...]
    same: Mapping[Name, Key]
    sums: Mapping[Name, frozenset[Name]] = {}
    turned: tuple[frozenset[Name], ...] = ()
    sizes: Sizes = Sizes(())

    def memory_of(self, key: Key) -> Name:
        """What has to be held for a value to be there."""
        return name(self.same.get(name(key), key))


def name(key: Key) -> Name:
    return key.value.id, key.layout, key.copy


def held(plan: ProgramPlan, lines: tuple[Line, ...], compiler: Compiler = ANY) -> Held:
    """Decides for every value whether it is held."""
    return _Fusion(plan, lines, compiler).run()


class _Fusion:
    """Walks the lines once forward."""

    def __init__(self, plan: ProgramPlan, lines: tuple[Line, ...], compiler: Compiler):
        self.lines, self.compiler = lines, compiler
        self.sizes = Sizes(lines, compiler.tiled)
        self.readers = _readers(lines)
        self.leaving = set(_leaving(plan.body))
        self.sums = _written_by_sums(lines)
        self.roots: dict[Name, tuple[Key, ...]] = {}
        self.same: dict[Name, Key] = {}
        self.turned: dict[Name, frozenset[Name]] = {}
        self.products: dict[Name, int] = {}  # what one line alone reads of a product -> its bytes

    def run(self) -> Held:
        writes: list[tuple[Key, ...]] = []
        reads: list[tuple[Key, ...]] = []
        turned: list[frozenset[Name]] = []
        for line in self.lines:
            sources = self.sources(line)
            turned.append(self.turn(line, sources))
            writes.append(tuple(key for key in line.writes if not self.fused(line, key, sources)))
            reads.append(sources)
            self.made(line)
        found = tuple(writes), tuple(reads), self.same, self.sums, tuple(turned)
        return Held(*found, self.sizes)

    def sources(self, line: Line) -> tuple[Key, ...]:
        """What is in memory of what a line reads."""
        found: dict[Name, Key] = {}
        for key in line.reads:
            for root in self.roots.get(name(key), (key,)):
                if root.value.const is None or root.value.rank:
                    found[name(root)] = root
        return tuple(found.values())

    def fused(self, line: Line, key: Key, sources: tuple[Key, ...]) -> bool:
        """Whether a result is not written; its readers read the sources then."""
        whole = _itself(line.reads[0], self.roots, self.same) if _identity(line) else None
        if whole is not None:
            self.same[name(key)] = whole
        elif self.nested(line, key):
            pass  # its readers read its operands
        elif name(key) in self.leaving or not self.absorbed(line, key, sources):
            return False
        self.roots[name(key)] = sources
        return True

    def absorbed(self, line: Line, key: Key, sources: tuple[Key, ...]) -> bool:
        if len(sources) > _MOST_ROOTS or not fusible(line) or name(key) in self.sums:
            return False
        readers = self.readers.get(name(key), ())
        if self.sizes.packed(key, line.mesh) or _dear(line, key, sources, self.readers):
            return False
        if self.leaves(line, key):
            return False
        return all(
            reader.parent == line.parent and _takes_in(reader, self.compiler.into_dots)
            for reader in readers
        )

    def leaves(self, line: Line, key: Key) -> bool:
        """Whether it is what leaves the matrix units of a product: the last in a row of elementwise
        operations of which each alone reads the one before. It is written in the product's place,
        and what else it is made of is not needed any more."""
        products = [self.products[name(k)] for k in line.reads if name(k) in self.products]
        size = self.sizes.of(key, line.mesh)
        if not products or size > max(products):
            return False
        following = self.readers.get(name(key), ())
        if len(following) == 1 and fusible(following[0]) and following[0].parent == line.parent:
            self.products[name(key)] = max(products)
            return False
        return True

    def nested(self, line: Line, key: Key) -> bool:
        """Whether a product is computed inside of the only one that reads what is made of it: where
        it takes longer to write and to read again than to multiply."""
        chip, found = self.compiler.chip, line.instruction
        if chip is None or not contracts(found) or line.wires or _convolves(line):
            return False
        moved = 2 * key.local_bytes(line.mesh) / chip.hbm_bandwidth
        work = line.flops.total / rate(found, chip)  # XLA goes by that, however full the units are
        if name(key) in self.leaving or work > moved:
            return False
        ends = self.ends(key)
        return len(ends) == 1 and all(
            end.contracts and not end.wires and end.parent == line.parent for end in ends
        )

    def ends(self, key: Key) -> list[Line]:
        """The first lines that read what is made of a value and are not elementwise, or whose
        result leaves its region."""
        found: dict[int, Line] = {}
        rest, seen = list(self.readers.get(name(key), ())), set[int]()
        while rest:
            line = rest.pop()
            if line.index in seen:
                continue
            seen.add(line.index)
            if not fusible(line) or any(name(k) in self.leaving for k in line.writes):
                found[line.index] = line
            else:
                rest += [r for k in line.writes for r in self.readers.get(name(k), ())]
        return list(found.values())

    def made(self, line: Line) -> None:
        """Notes a product that one line alone reads."""
        if not self.compiler.into_dots or not line.contracts:
            return
        for key in line.writes:
            readers = self.readers.get(name(key), ())
            alone = len(readers) == 1 and readers[0].parent == line.parent
            if alone and name(key) not in self.leaving and name(key) not in self.roots:
                self.products[name(key)] = self.sizes.of(key, line.mesh)

    def turn(self, line: Line, sources: tuple[Key, ...]) -> frozenset[Name]:
        """The sources whose dims come in another order in what a line reads."""
        before = frozenset().union(*(self.turned.get(name(key), ()) for key in line.reads))
        after = before ^ frozenset(map(name, sources)) if _transposes(line) else before
        if fusible(line):
            self.turned.update((name(key), after) for key in line.writes)
        return before


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


def _written_by_sums(lines: Sequence[Line]) -> dict[Name, frozenset[Name]]:
    """Values that contractions would read in fused form, and that are dear to compute, where sums
    go over the same: XLA lets a sum's pass write them. Not where they need that sum."""
    dear: dict[Name, frozenset[Name]] = {}  # what is dear in a value, since it was last in memory
    needs: dict[Name, frozenset[Name]] = {}  # the sums in it
    sums: dict[Name, set[Name]] = {}  # what is dear -> sums over it
    read: list[Key] = []
    whole: set[Name] = set()  # what some reader does not take in
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
        elif line.contracts and not line.wires:
            read += [key for key in line.reads if dear.get(name(key))]
        else:
            whole.update(map(name, line.reads))
    found = {
        name(key): frozenset().union(*(sums.get(d, ()) for d in dear[name(key)])) - needs[name(key)]
        for key in read if name(key) not in whole
    }
    return {value: passes for value, passes in found.items() if passes}


def _dear(
    line: Line, key: Key, sources: Sequence[Key], readers: Mapping[Name, Sequence[Line]]
) -> bool:
    """Whether its readers move more bytes when each of them reads what the value is made of, than
    when it is written once and they read that."""
    if len(readers.get(name(key), ())) < 2:
        return False
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


def _convolves(line: Line) -> bool:
    rule = line.instruction.rule if isinstance(line.instruction, Compute) else None
    return rule is not None and bool(rule.spatial)


def _reduces(line: Line) -> bool:
    found = line.instruction
    if isinstance(found, Move) or found.regions:
        return False
    return any(f.kind is Kind.REDUCE for f in found.op.rule.factors.values())
