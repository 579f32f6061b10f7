"""The names of dims: `b m k, b k n -> b m n` as the rule of an equation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, NoReturn

from sharding.errors import Problem, RuleError
from sharding.rule import Dims, Factor, Kind, Local, Rule

MONOIDS = ("add", "mul", "max", "min", "and", "or")


@dataclass(frozen=True)
class Names:
    """The names of all dims, as a text says them.

    Attributes:
      text: as written.
      operands, results: per tensor and dim the names, major to minor.
      reduce: monoid of names that no result has.
      fixed: names that must not be sharded.
      combine: per result the monoid along names that other results have and it has not, as "add"
        in cotangents. Empty: such names are fixed.
    """

    text: str
    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    reduce: str = "add"
    fixed: frozenset[str] = frozenset()
    combine: tuple[str, ...] = ()

    @cached_property
    def reduced(self) -> frozenset[str]:
        """Names that no result has."""
        return names_in(self.operands) - names_in(self.results) - self.fixed

    @cached_property
    def partly(self) -> frozenset[str]:
        """Names that some results have and some have not."""
        kept = [names_in((dims,)) for dims in self.results]
        every = frozenset.intersection(*kept) if kept else frozenset()
        return frozenset.union(frozenset(), *kept) - every - self.fixed

    def kind(self, name: str) -> tuple[Kind, str]:
        if name in self.reduced:
            return Kind.REDUCE, self.reduce
        known = name in names_in(self.operands)
        if name in self.fixed or not known or (name in self.partly and not self.combine):
            return Kind.FIXED, ""
        return Kind.PASS, ""

    def rule(
        self, in_avals: Sequence[Any], out_avals: Sequence[Any],
        local: Callable[..., Sequence[Any]] = lambda ctx, op, *operands: ctx.bind(*operands),
    ) -> Rule:  # fmt: skip
        """The rule for these shapes.

        Args:
          local: the results of one shard.

        Raises:
          RuleError: the text does not fit the shapes.
        """
        self.check_count(len(in_avals), "operands", self.operands)
        self.check_count(len(out_avals), "results", self.results)
        shapes = [tuple(a.shape) for a in (*in_avals, *out_avals)]
        sizes = self.sizes(shapes)
        dims = [
            tuple(() if n == 1 else names for names, n in zip(dims, shape, strict=True))
            for dims, shape in zip((*self.operands, *self.results), shapes, strict=True)
        ]
        count = len(in_avals)
        # Dims of size 1 broadcast, and have no names from here on.
        names = replace(self, operands=tuple(dims[:count]), results=tuple(dims[count:]))
        if names.reduced - self.reduced and not self.combine:
            self.fail(
                f"has {', '.join(map(repr, sorted(names.reduced - self.reduced)))} for a result of "
                "size 1 and operands of more",
                "it is not known how the operands' elements become one",
                "write 1 for the result's dim, and name the operands' dim in fixed= if the result "
                "is not their sum",
            )
        used = names_in(dims)
        factors = {name: Factor(n, *names.kind(name)) for name, n in sizes.items() if name in used}
        partly = names.partly if self.combine else frozenset()

        def combined(ctx: Local, op: Any, *operands: Any) -> Sequence[Any]:
            found = []
            for r, x in enumerate(local(ctx, op, *operands)):
                lacks = sorted(partly - names_in((names.results[r],)))
                axes = tuple(a for name in lacks for a in ctx.axes(name))
                read = axes and ctx.is_read(r)
                found.append(ctx.all_reduce(x, axes, self.combine[r]) if read else x)
            return found

        return Rule(
            names.operands, names.results, factors,
            divided=(names.reduced | partly) & set(factors), local=combined,
        )  # fmt: skip

    def sizes(self, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
        """Size of every name; merged dims give the sizes of names that have no dim of their own."""
        found: dict[str, int] = {}
        merged: list[tuple[tuple[str, ...], int]] = []
        for dims, shape in zip((*self.operands, *self.results), shapes, strict=True):
            if len(dims) != len(shape):
                self.fail(
                    f"has {len(dims)} dims for an array of shape {shape}",
                    f"the array has {len(shape)} dims",
                    "name every dim of every operand and result",
                )
            for names, n in zip(dims, shape, strict=True):
                if len(names) > 1:
                    merged += [(names, n)] if n != 1 else []
                elif not names:
                    if n != 1:
                        self.fail(f"has 1 for a dim of size {n}", "1 stands for dims of size 1",
                                  "give the dim a name")  # fmt: skip
                elif 1 in (n, found.setdefault(names[0], n)):
                    found[names[0]] *= n if found[names[0]] == 1 else 1
                elif found[names[0]] != n:
                    self.fail(
                        f"calls dims of sizes {found[names[0]]} and {n} {names[0]!r}",
                        "one factor has one size",
                        "give the two dims different names",
                    )
        self.solve(merged, found)
        return found

    def solve(self, merged: Sequence[tuple[tuple[str, ...], int]], found: dict[str, int]) -> None:
        """Sizes of names that only merged dims have, from the other names in them."""
        for _ in merged:  # each pass finds at least one more, if any can be found
            for names, n in merged:
                unknown = [name for name in names if name not in found]
                known = prod(found.get(name, 1) for name in names)
                if len(unknown) == 1 and known and n % known == 0:
                    found[unknown[0]] = n // known
        for names, n in merged:
            if prod(found.get(name, -1) for name in names) != n:
                self.fail(
                    f"merges {' and '.join(map(repr, names))} into a dim of size {n}",
                    "their sizes, as far as they are known, do not multiply to it",
                    "give every merged name but one a dim of its own somewhere",
                )

    def check_count(self, count: int, what: str, dims: Sequence[Dims]) -> None:
        if count != len(dims):
            self.fail(f"names {len(dims)} {what}, of {count}", "every array has its own dims",
                      f"name {count} {what}, separated by commas")  # fmt: skip

    def fail(self, what: str, why: str, fix: str) -> NoReturn:
        raise RuleError(Problem(f"rule {self.text!r} {what}", why, fix))


def names_in(tensors: Sequence[Dims]) -> frozenset[str]:
    return frozenset(name for dims in tensors for names in dims for name in names)


def parse(text: str, reduce: str = "add", fixed: frozenset[str] = frozenset()) -> Names:
    """The names in a text.

    Raises:
      RuleError: it is malformed.
    """
    sides = text.split("->")
    if len(sides) != 2:
        raise RuleError(
            Problem(
                f"rule {text!r}",
                "operands and results are told apart by '->'",
                'write it like "b m k, b k n -> b m n"',
            )
        )
    operands, results = (tuple(_parse_dims(p, text) for p in s.split(",")) for s in sides)
    names = Names(text, operands, results, reduce, fixed)
    if reduce not in MONOIDS:
        names.fail(f"reduces by {reduce!r}", "there is no such reduction across devices",
                   f"use one of {', '.join(MONOIDS)}")  # fmt: skip
    unknown = fixed - names_in((*operands, *results))
    if unknown:
        names.fail(f"has no {', '.join(map(repr, sorted(unknown)))}", "they are named in fixed=",
                   "take them out, or name the dim")  # fmt: skip
    return names


def _parse_dims(part: str, text: str) -> Dims:
    dims: list[tuple[str, ...]] = []
    group: list[str] | None = None
    for token in [*part.replace("(", " ( ").replace(")", " ) ").split(), ""]:
        if token == "(" and group is None:
            group = []
        elif token == ")" and group:
            dims.append(tuple(group))
            group = None
        elif token.isidentifier():
            group.append(token) if group is not None else dims.append((token,))
        elif token == "1" and group is None:
            dims.append(())
        elif token or group is not None:
            raise RuleError(
                Problem(f"rule {text!r} has {part.strip()!r}", "a dim is a name, 1, or (names)",
                        'write it like "b (h d) k, 1 k n -> b n"')  # fmt: skip
            )
    return tuple(dims)
