"""The compact summary of a run, which is committed: the coverage table is made from it."""

import json
import pathlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import jax

from tests.conformance.pool import Done, Task
from tests.conformance.run import Record

PATH = pathlib.Path(__file__).parent / "summary.json"


@dataclass
class Factor:
    """Cases in which a dim with a factor of one kind was sharded."""

    cases: int = 0
    sharded: int = 0  # ... and the primitive ran with it sharded
    gathers: int = 0  # ... and a diagnostic says that it was gathered
    collectives: Counter[str] = field(default_factory=Counter)  # cases with a collective, by kind

    def add(self, record: Record) -> None:
        self.cases += 1
        self.sharded += record["sharded"]
        self.gathers += record["gathers"] > 0
        self.collectives.update(record["cost"].keys())


@dataclass
class Primitive:
    """What the run showed about one primitive, by the kind of factor; dims that divide, others."""

    even: dict[str, Factor] = field(default_factory=dict)
    uneven: dict[str, Factor] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)  # text -> harness

    def add(self, record: Record, harness: str) -> None:
        side = self.even if record["even"] else self.uneven
        side.setdefault(record["factor"], Factor()).add(record)
        self.rules.setdefault(record["rule"], harness)

    @property
    def example(self) -> str:
        """The harness whose rule shows the most kinds of factors and dims in few letters."""
        return self.rules[max(self.rules, key=_shows)]

    def factors(self) -> dict[str, Any]:
        """Of dims that divide, where the run had any; those of size 1 say nothing."""
        found = {**self.uneven, **self.even}
        kept = {k: f for k, f in sorted(found.items()) if "size 1" not in k and k != "elsewhere"}
        return {
            k: [f.cases, f.sharded, f.gathers, dict(sorted(f.collectives.items()))]
            for k, f in kept.items()
        }


def _shows(rule: str) -> tuple[Any, ...]:
    kinds = set(re.findall(r":(\w+)", rule))
    return len(kinds), len(rule) <= 80, len(rule) if len(rule) <= 80 else -len(rule), rule


def summarize(results: Iterable[Done]) -> dict[str, Any]:
    """Counts by group, and evidence by primitive from harnesses that have it alone."""
    groups: dict[str, Counter[str]] = {}
    primitives: dict[str, Primitive] = {}
    seen: set[Task] = set()
    for done in results:
        if done.task in seen:
            continue
        seen.add(done.task)
        counts = groups.setdefault(done.task.group, Counter())
        for record in done.records:
            counts[record["status"]] += 1
            if record["status"] == "right" and record.get("alone") and " x " not in (
                record["factor"]
            ):  # fmt: skip
                found = primitives.setdefault(record["primitive"], Primitive())
                found.add(record, done.task.harness)
    return {
        "jax": jax.__version__,
        "harnesses": len({task.harness for task in seen}),
        "groups": {name: dict(sorted(groups[name].items())) for name in sorted(groups)},
        "primitives": {
            name: {"example": p.example, "factors": p.factors()}
            for name, p in sorted(primitives.items())
        },
    }


def write(results: Iterable[Done]) -> None:
    """Rewrites the committed summary: one line per group and per primitive."""
    found = summarize(results)
    lines = [f'"{part}": {json.dumps(found[part])}' for part in ("jax", "harnesses")]
    for part in ("groups", "primitives"):
        rows = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in found[part].items()]
        lines.append(f'"{part}": {{\n' + ",\n".join(rows) + "\n}")
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def load() -> dict[str, Any]:
    return json.loads(PATH.read_text())
