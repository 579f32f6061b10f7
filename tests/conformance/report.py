"""Results of a run: the file they are kept in, and their summary."""

import json
import pathlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from tests.conformance.pool import Done, Task
from tests.conformance.run import FAILURES, STATUSES


@dataclass
class Totals:
    """Counts of a run, kept up as results come in."""

    groups: dict[str, Counter[str]] = field(default_factory=dict)
    missing: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[Task, dict[str, Any]]] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, done: Done) -> None:
        counts = self.groups.setdefault(done.task.group, Counter())
        self.seconds += done.seconds
        for record in done.records:
            counts[record["status"]] += 1
            if record["status"] in FAILURES:
                self.failures.append((done.task, record))
            elif record["status"] == "refused":
                for primitive in record.get("missing", ()):
                    self.missing[primitive] += 1
                if not record.get("missing"):
                    self.refusals[f"{done.task.group}: {record['detail']}"] += 1

    def count(self, *statuses: str) -> int:
        return sum(counts[s] for counts in self.groups.values() for s in statuses)

    @property
    def cases(self) -> int:
        return self.count(*STATUSES) - self.count("unsharded")

    @property
    def failed(self) -> int:
        return self.count(*FAILURES)


def write(file: Any, done: Done) -> None:
    row = {**done.task._asdict(), "seconds": round(done.seconds, 4), "records": done.records}
    file.write(json.dumps(row, separators=(",", ":")) + "\n")
    file.flush()


def read(path: pathlib.Path) -> Iterable[Done]:
    """Finished batches of a results file; a last line that was cut off is left out."""
    if not path.exists():
        return
    with path.open() as file:
        for line in file:
            if not line.endswith("\n"):
                return
            row = json.loads(line)
            task = Task(row["harness"], row["group"], row["mesh"])
            yield Done(task, row["seconds"], row["records"])


def table(totals: Totals, groups: Iterable[str]) -> Table:
    shown = Table(title=f"{totals.cases:,} cases", title_justify="left")
    shown.add_column("group", no_wrap=True)
    for status in STATUSES:
        shown.add_column(status, justify="right")
    for group in groups:
        counts = totals.groups.get(group)
        if counts:
            shown.add_row(group, *_cells(counts))
    shown.add_section()
    every = sum(totals.groups.values(), Counter())
    shown.add_row("all", *_cells(every))
    return shown


def _cells(counts: Counter[str]) -> list[str]:
    def cell(status: str) -> str:
        if not counts[status]:
            return ""
        text = f"{counts[status]:,}"
        return f"[red]{text}[/red]" if status in FAILURES else text

    return [cell(status) for status in STATUSES]


def lines(totals: Totals, limit: int) -> list[str]:
    """Refusals as text, and `limit` failures, each of which stands for those like it."""
    found = [f"no rule for {name}: {n:,} cases" for name, n in totals.missing.most_common()]
    found += [f"refused {n:,} cases of {text}" for text, n in totals.refusals.most_common()]
    alike: dict[tuple[str, ...], list[tuple[Task, dict[str, Any]]]] = {}
    for task, record in totals.failures:
        kind = re.sub(r"\d+", "#", record["detail"])[:60]
        alike.setdefault((task.group, record["status"], kind), []).append((task, record))
    for members in list(alike.values())[:limit]:
        task, record = members[0]
        where = f"{task.harness} mesh {task.mesh} {record['case']}"
        found.append(f"{record['status'].upper()} {where} ({len(members):,} like it)")
        found.append(f"  {record['detail']}")
    left = len(alike) - limit
    return found + ([f"and {left:,} more kinds of failure in the results file"] if left > 0 else [])
