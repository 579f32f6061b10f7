"""`python -m tests.conformance`: every primitive, every sharded dim, against the unsharded program.

Exit code 1 when a result is wrong, a worker dies or hangs, or an error is not an explained refusal.
"""

import argparse
import contextlib
import os
import pathlib
import re
import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tests.conformance import harnesses, report, summary
from tests.conformance.cases import MESHES, mesh_text
from tests.conformance.pool import Done, Task, Worker, run_all
from tests.conformance.run import FAILURES

PLAIN_SECONDS = 15.0  # between lines of progress where there is no terminal


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.conformance", description=__doc__)
    add = parser.add_argument
    add("--jobs", type=int, default=os.cpu_count(), help="worker processes")
    add("--group", action="append", default=[], help="only harnesses of this group; repeatable")
    add("--filter", default="", metavar="REGEX", help="only harnesses whose name matches")
    add("--max-harnesses", type=int, metavar="N", help="a sample with every group in it")
    add("--meshes", default=",".join(map(mesh_text, MESHES)), help="default: %(default)s")
    add("--results", type=pathlib.Path, default=pathlib.Path("runs/conformance.jsonl"))
    add("--resume", action="store_true", help="leave out what the results file has")
    add("--timeout", type=float, default=120.0, metavar="SECONDS", help="per batch of cases")
    add("--default-compiler", action="store_true", help="XLA's own options; several times slower")
    add("--list-groups", action="store_true", help="print the groups and end")
    add("--failures", type=int, default=20, metavar="N", help="how many to print")
    add("--write-summary", action="store_true", help="rewrite summary.json, for the coverage table")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.group) - set(harnesses.groups()))
    if unknown:
        parser.error(f"no group {', '.join(unknown)}; --list-groups prints those that there are")
    chosen = options.group or options.filter or options.meshes != parser.get_default("meshes")
    if options.write_summary and chosen:
        parser.error("--write-summary is for runs over all groups and meshes")
    known = {mesh_text(sizes) for sizes in MESHES}
    if not set(options.meshes.split(",")) <= known:
        parser.error(f"--meshes {options.meshes}: choose from {', '.join(sorted(known))}")
    return options


def tasks(options: argparse.Namespace) -> list[Task]:
    """Everything that was asked for, in the order in which it runs."""
    chosen = [
        h for h in harnesses.every()
        if (not options.group or h.group in options.group) and re.search(options.filter, h.name)
    ]  # fmt: skip
    if options.max_harnesses is not None:
        chosen = harnesses.sample(chosen, options.max_harnesses)
    return [Task(h.name, h.group, mesh) for h in chosen for mesh in options.meshes.split(",")]


class Display:
    """Progress in a terminal, or a line now and then."""

    def __init__(self, console: Console, totals: report.Totals, count: int):
        self.console, self.totals, self.count = console, totals, count
        self.done, self.started, self.last = 0, time.perf_counter(), 0.0
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self.bar_task = self.bar.add_task("", total=count)
        self.live = Live(self.bar, console=console, refresh_per_second=4)

    def text(self) -> str:
        t = self.totals
        parts = [f"{t.cases:,} cases"]
        for status in (*FAILURES, "refused"):
            if t.count(status):
                parts.append(f"{t.count(status):,} {status}")
        return ", ".join(parts)

    def advance(self) -> None:
        self.done += 1
        now = time.perf_counter()
        if self.console.is_terminal:
            self.bar.update(self.bar_task, completed=self.done, description=self.text())
        elif now - self.last > PLAIN_SECONDS or self.done == self.count:
            self.last = now
            left = (now - self.started) / self.done * (self.count - self.done)
            done = f"{self.done}/{self.count} batches"
            self.console.print(f"{done}, {self.text()}, {left:.0f} s left", highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    if options.list_groups:
        console.print("\n".join(harnesses.groups()))
        return 0
    totals = report.Totals()
    wanted = tasks(options)
    todo = wanted
    if options.resume:
        finished = {d.task: d for d in report.read(options.results) if d.task in set(wanted)}
        for done in finished.values():
            totals.add(done)
        todo = [task for task in wanted if task not in finished]
    run(options, todo, totals, console)
    console.print(report.table(totals, harnesses.groups()))
    for line in report.lines(totals, options.failures):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if options.write_summary:
        summary.write(report.read(options.results))
    return 1 if totals.failed else 0


def run(
    options: argparse.Namespace, todo: Sequence[Task], totals: report.Totals, console: Console
) -> None:
    flags = ["--default-compiler"] if options.default_compiler else []
    options.results.parent.mkdir(parents=True, exist_ok=True)
    display = Display(console, totals, len(todo))
    with options.results.open("a" if options.resume else "w") as file:

        def keep(done: Done) -> None:
            report.write(file, done)
            totals.add(done)
            display.advance()

        start = time.perf_counter()
        with display.live if console.is_terminal else contextlib.nullcontext():
            run_all(todo, options.jobs, lambda: Worker(options.timeout, flags), keep)
        seconds = time.perf_counter() - start
    if totals.cases:
        per_case = 1000 * totals.seconds / totals.cases
        console.print(f"{seconds:.0f} s with {options.jobs} workers, {per_case:.1f} ms per case")


if __name__ == "__main__":
    sys.exit(main())
