"""Why a value is sharded as it is: the chain of rules from an annotation to it, and what lost.

Read from the events of propagation, which are indexed once. Everything here is plain data that
prints; `dataclasses.asdict` of it is JSON.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from sharding.errors import ArgumentError, Problem, did_you_mean
from sharding.mesh import overlap
from sharding.op import Op, Value, type_text
from sharding.program import describe
from sharding.propagation import Link, Propagated
from sharding.provenance import Rejection

_SHOWN = 4  # steps at each end of a long chain; lines of a long list
_LINE = re.compile(r".*\.\w+:\d+$")


@dataclass(frozen=True)
class Step:
    """One link of a chain.

    Attributes:
      value: as the program prints it.
      dim: its dim.
      by: the annotation, or the primitive (`scan: carry` at the boundary of a region).
      rule: the primitive's rule, in named dims; empty for annotations.
      factor: the named dim of the rule that carried the axes; empty for annotations.
      source: `file.py:line (function)`, empty where unknown.
    """

    value: str
    dim: int
    by: str
    rule: str = ""
    factor: str = ""
    source: str = ""

    def __str__(self) -> str:
        rule = f" ({self.rule}) along {self.factor}" if self.factor else ""
        at = f"  # {self.source}" if self.source else ""
        return f"{self.value} dim {self.dim}: {self.by}{rule}{at}"


@dataclass(frozen=True)
class Chain:
    """How axes came to one dim: `steps` begins at an annotation and ends at the value."""

    dim: int
    axes: tuple[str, ...]
    steps: tuple[Step, ...]

    @property
    def root(self) -> Step:
        return self.steps[0]

    def __str__(self) -> str:
        lines = [f"dim {self.dim} on {'+'.join(self.axes)}"]
        steps = list(map(str, self.steps))
        if len(steps) > 2 * _SHOWN + 1:
            left = f"... {len(steps) - 2 * _SHOWN} more steps"
            steps = [*steps[:_SHOWN], left, *steps[-_SHOWN:]]
        return "\n".join([*lines, *(f"  {step}" for step in steps)])


@dataclass(frozen=True)
class Lost:
    """Axes that were proposed and not taken.

    Attributes:
      dim: of the value.
      axes: proposed, major to minor.
      proposer: the value that they came from.
      by: the primitive between the two, or the boundary of a region.
      reason: why not.
      source: of the operation.
      bytes: wire bytes per device and call of bringing the proposer into agreement there; None
        where no plan was made.
    """

    dim: int
    axes: tuple[str, ...]
    proposer: str
    by: str
    reason: str
    source: str = ""
    bytes: float | None = None

    def __str__(self) -> str:
        at = f" at {self.source}" if self.source else ""
        paid = "" if self.bytes is None else f"; this costs {self.bytes:,.0f} B"
        what = f"dim {self.dim} on {'+'.join(self.axes)}, from {self.proposer} by {self.by}"
        return f"{what}{at}: {self.reason}{paid}"


@dataclass(frozen=True)
class ValueHistory:
    """Why one value is sharded as it is.

    Attributes:
      value: as its user knows it.
      name: as the program prints it.
      type: dtype and global shape.
      sharding: canonical text.
      source: of the operation that makes it.
      chains: one for each decision, by dim.
      unsharded: (dim, why) for dims without axes.
      lost: proposals that were not taken.
    """

    value: str
    name: str
    type: str
    sharding: str
    source: str
    chains: tuple[Chain, ...]
    unsharded: tuple[tuple[int, str], ...]
    lost: tuple[Lost, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        at = f"  # {self.source}" if self.source else ""
        yield f"{self.name}: {self.type} {self.sharding}{at}"
        for chain in self.chains:
            yield from (f"  {line}" for line in str(chain).splitlines())
        for dim, why in self.unsharded:
            yield f"  dim {dim} on no axis: {why}"
        if self.lost:
            yield "  not taken"
            yield from (f"    {lost}" for lost in self.lost[: 2 * _SHOWN])
            if len(self.lost) > 2 * _SHOWN:
                yield f"    ... {len(self.lost) - 2 * _SHOWN} more"


@dataclass(frozen=True, repr=False)
class History:
    """The events of a propagation, indexed by value: built once, then every question is cheap.

    Attributes:
      propagated: the program with its shardings and events.
      sites: by value id, where an annotation that is not in the program was made, such as
        "in_shardings of spmd.jit".
      aliases: further names, such as `result[0]` -> value.
    """

    propagated: Propagated
    sites: Mapping[int, str] = field(default_factory=dict)
    aliases: Mapping[str, Value] = field(default_factory=dict)

    @cached_property
    def ops(self) -> dict[int, Op]:
        return {op.index: op for op in self.propagated.program.ops()}

    @cached_property
    def events(self) -> dict[tuple[int, int], list[int]]:
        """(value id, dim) -> numbers of its events, in order."""
        found: dict[tuple[int, int], list[int]] = {}
        for i, event in enumerate(self.propagated.events):
            found.setdefault((event.value, event.dim), []).append(i)
        return found

    @cached_property
    def rejections(self) -> dict[int, list[Rejection]]:
        found: dict[int, list[Rejection]] = {}
        for rejection in self.propagated.rejections:
            found.setdefault(rejection.value, []).append(rejection)
        return found

    @cached_property
    def names(self) -> dict[str, list[Value]]:
        """Every name of a value: argument paths, results, and what the program prints."""
        found: dict[str, list[Value]] = {}
        for value in self.propagated.program.values:
            if value.const is None or value.name:
                found.setdefault(str(value), []).append(value)
        for name, value in self.aliases.items():
            if value not in found.setdefault(name, []):
                found[name].append(value)
        return found

    @cached_property
    def lines(self) -> dict[str, list[Value]]:
        """`file.py:line` -> what is made there."""
        found: dict[str, list[Value]] = {}
        for op in self.ops.values():
            if op.source:
                line = op.source.split(" ")[0].rsplit("/", 1)[-1]
                found.setdefault(line, []).extend(op.outputs)
        return found

    def find(self, asked: str | Value) -> list[Value]:
        """The values that a user means.

        Args:
          asked: an argument path (`params['w']`), a name of the printed program (`%12`, `result`),
            a source line (`model.py:12`, with any part of its directories), or a `Value`.

        Raises:
          ArgumentError: there is none.
        """
        if isinstance(asked, Value):
            return [asked]
        if asked in self.names:
            return self.names[asked]
        if _LINE.match(asked):
            found = [
                value for value in self.lines.get(asked.rsplit("/", 1)[-1], ())
                if value.op is not None and same_line(asked, value.op.source)
            ]
            if found:
                return found
        raise ArgumentError(_unknown(asked, [*self.names, *(self.lines if ":" in asked else ())]))

    def explain(self, value: Value) -> ValueHistory:
        """Why one value is sharded as it is."""
        sharding = self.propagated.of(value)
        chains = [c for d in range(value.rank) for c in self.chains(value, d)]
        rejected = self.rejections.get(value.id, [])
        unsharded = [
            (d, self.unsharded(value, d)) for d, dim in enumerate(sharding.dims) if not dim.axes
        ]
        return ValueHistory(
            describe(value), str(value), type_text(value), str(sharding) if value.rank else "",
            value.op.source if value.op else "", tuple(chains), tuple(unsharded),
            tuple(self.lost(r) for r in rejected),
        )  # fmt: skip

    def chains(self, value: Value, dim: int) -> list[Chain]:
        """How every axis of one dim came there."""
        found: list[Chain] = []
        for i in self.events.get((value.id, dim), ()):
            paths: dict[tuple[int, ...], list[str]] = {}
            for axis in self.propagated.events[i].axes:
                paths.setdefault(self.path(i, axis), []).append(axis)
            for path, axes in paths.items():
                found.append(Chain(dim, tuple(axes), tuple(map(self.known, path))))
        return found

    def path(self, at: int, axis: str) -> tuple[int, ...]:
        """Numbers of the events that brought an axis to event `at`, an annotation first."""
        found = [at]
        while self.propagated.events[at].link >= 0:
            at, axis = self.cause(at, axis)
            found.append(at)
        return tuple(reversed(found))

    def cause(self, at: int, axis: str) -> tuple[int, str]:
        """The event before `at` that it followed from, and the axis there."""
        found = self._causes.get((at, axis))
        if found is None:
            found = self._causes[at, axis] = self._cause(at, axis)
        return found

    def _cause(self, at: int, axis: str) -> tuple[int, str]:
        event = self.propagated.events[at]
        link = self.propagated.links[event.link]
        for t, d in link.rule.where[event.factor]:
            if link.values[t].id != event.source:
                continue
            for i in reversed(self.events.get((event.source, d), ())):
                same = [a for a in self.propagated.events[i].axes if overlap(a, axis)]
                if i < at and same:
                    return i, same[0]
        raise AssertionError(f"event {at} has no cause: {event}")

    def known(self, at: int) -> Step:
        """The step of an event: chains that share it share the object."""
        found = self._steps.get(at)
        if found is None:
            found = self._steps[at] = self.step(at)
        return found

    def step(self, at: int) -> Step:
        event = self.propagated.events[at]
        value = self.propagated.program.values[event.value]
        if event.link < 0:
            site, source = self.site(value)
            return Step(str(value), event.dim, site, source=source)
        link = self.propagated.links[event.link]
        by, source = self.link(event.link)
        return Step(str(value), event.dim, by, self.rule_text(link), event.factor, source)

    def site(self, value: Value) -> tuple[str, str]:
        """What annotates a value, and its source line where it is in the program."""
        op = value.op
        if op is not None and op.control is None and op.rule.annotation is not None:
            return f"annotation {op.rule.annotation}", op.source
        for near in (op, *(reader for reader, _ in self.propagated.program.readers[value.id])):
            if near is not None and near.control is not None and near.control.manual(near.params):
                return f"specs of {near.primitive.name}", near.source
        return self.sites.get(value.id, "annotation"), ""

    def link(self, index: int) -> tuple[str, str]:
        """What a link is, and its source line."""
        link = self.propagated.links[index]
        op = self.ops[link.op]
        name = op.primitive.name
        if op.control is not None:
            outer = link.values[1]
            ends = {"operand": op.inputs, "result": op.outputs}
            name += ": " + next((k for k, v in ends.items() if outer in v), "carry")
        return name, op.source

    def rule_text(self, link: Link) -> str:
        key = id(link.rule)  # rules live as long as their links
        if key not in self._texts:
            self._texts[key] = str(link.rule)
        return self._texts[key]

    @cached_property
    def _texts(self) -> dict[int, str]:
        return {}

    @cached_property
    def _steps(self) -> dict[int, Step]:
        return {}

    @cached_property
    def _causes(self) -> dict[tuple[int, str], tuple[int, str]]:
        return {}

    def lost(self, rejection: Rejection) -> Lost:
        by, source = self.link(rejection.link)
        proposer = str(self.propagated.program.values[rejection.source])
        return Lost(rejection.dim, rejection.axes, proposer, by, rejection.reason, source)

    def unsharded(self, value: Value, dim: int) -> str:
        """Why a dim has no axes."""
        if value.shape[dim] <= 1:
            return f"it has size {value.shape[dim]}"
        if not self.propagated.of(value).dims[dim].open:
            site, source = self.site(value)
            return f"closed by {site}" + (f" at {source}" if source else "")
        if any(r.dim == dim for r in self.rejections.get(value.id, ())):
            return "what was proposed was not taken"
        return "no rule brings one here"


def same_line(asked: str, source: str) -> bool:
    """Whether `dir/model.py:12` names the line of `dir/model.py:12 (function)`: the shorter of the
    two paths decides."""
    mine, theirs = asked.split("/")[::-1], source.split(" ")[0].split("/")[::-1]
    count = min(len(mine), len(theirs))
    return mine[:count] == theirs[:count]


def _unknown(asked: str, known: Sequence[str]) -> Problem:
    return Problem(
        f"{asked!r} names no value of the program",
        "a value is named by its argument path, by its name in the printed program, or by the "
        "source line that makes it" + did_you_mean(asked, known),
        "print the stage to see every name: params['w'], %12, result[0]; or model.py:12",
    )
