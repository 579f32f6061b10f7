"""The long form of the harness.

    python -m tests.faults --kills 300 --corruptions 500 --resumes 10

What was done is kept in a folder, so that the command goes on where it was interrupted. Exit code
1: something was lost, used though it was damaged, or did not come out as the matrix says.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

os.environ["JAX_PLATFORMS"] = "cpu"
from spmd.simulate import simulate  # noqa: E402

AIMED_EVERY = 10  # of so many kills one is aimed at a point of a commit
SEVERAL_SIZES = (100, 2000, 12000)  # columns of states: 50 KB, 1 MB, 6 MB


def main(argv: list[str]) -> int:
    """Runs what is not done yet, and writes the summary; the exit code."""
    options = _options(argv)
    if options.fresh:
        shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    simulate(8)
    results = Results(options.folder / "results.jsonl")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console()
    with Progress(*columns, TextColumn("{task.fields[found]}"), TimeElapsedColumn()) as progress:
        for name, count, trials in _parts(options, results):
            done = results.of(name)
            task = progress.add_task(name, total=count, completed=len(done), found="")
            for trial in trials(len(done)):
                results.add(name, trial)
                progress.update(task, advance=1, found=_found(results.of(name)))
    summary = summarised(results)
    console.print_json(json.dumps(summary))
    # Of what was left out the last result stays.
    kept = json.loads(options.summary.read_text()) if options.summary.exists() else {}
    options.summary.write_text(json.dumps(kept | summary, indent=1) + "\n")
    return int(any(part["faults"] for part in summary.values()))


class Results:
    """The outcome of every trial, one line each, on the disk as soon as it is known."""

    def __init__(self, path: Path):
        self._path = path
        self._all: dict[str, list[dict[str, Any]]] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            entry = json.loads(line)
            self._all.setdefault(entry["part"], []).append(entry)

    def of(self, part: str) -> list[dict[str, Any]]:
        return self._all.setdefault(part, [])

    def parts(self) -> dict[str, list[dict[str, Any]]]:
        """Those of which there is a trial."""
        return {name: entries for name, entries in self._all.items() if entries}

    def add(self, part: str, entry: dict[str, Any]) -> None:
        entry = {"part": part, "date": time.strftime("%Y-%m-%d"), **entry}
        self._all.setdefault(part, []).append(entry)
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    add = parser.add_argument
    add("--kills", type=int, default=300, help="processes that are killed while they save")
    add("--corruptions", type=int, default=500, help="damaged checkpoints")
    add("--resumes", type=int, default=10, help="runs of train.py, each killed twice")
    add("--cases", default="", help="only these rows of the matrix, e.g. 12,22; none: leave out")
    add("--folder", type=Path, default=Path("runs/faults"), help="what was done; resumed from")
    add("--summary", type=Path, default=Path("runs/faults/summary.json"), help="written, by part")
    add("--fresh", action="store_true", help="do not go on from what was done")
    return parser.parse_args(argv)


def _parts(options: argparse.Namespace, results: Results) -> Iterator[tuple[str, int, Callable]]:
    """(name, number of trials, those after the first n)."""
    folder = options.folder.absolute()
    yield "corruptions", options.corruptions, lambda n: _corruptions(folder, n, options.corruptions)
    yield "kills", options.kills, lambda n: _kills(folder, n, options.kills)
    yield "resumes", options.resumes, lambda n: _resumes(folder, n, options.resumes)
    if options.cases != "none":
        from tests.faults.matrix import CASES

        rows = [row for row in options.cases.split(",") if row]
        names = [
            name
            for name in CASES
            if not rows or set(rows) & set(name.split(":")[0].replace(" ", "").split(","))
        ]
        done = [entry["kind"].partition(" (skipped")[0] for entry in results.of("matrix")]
        left = [name for name in names if name not in done]
        yield "matrix", len(done) + len(left), lambda _: _cases(folder, left)


def _corruptions(folder: Path, start: int, count: int) -> Iterator[dict[str, Any]]:
    from tests.faults import corruptions

    source = folder / "source"
    shutil.rmtree(source, ignore_errors=True)
    corruptions.original(source)
    for number in range(start, count):
        kind = corruptions.kind_of(number)
        wrong = corruptions.trial(source, folder / "copy", kind, seed=number)
        yield {"kind": kind, "faults": wrong}


def _kills(folder: Path, start: int, count: int) -> Iterator[dict[str, Any]]:
    from tests.faults import kills, saver

    server, points = kills.server(), list(saver.POINTS)
    for run in range(len(SEVERAL_SIZES)):
        shutil.rmtree(folder / f"saves-{run}", ignore_errors=True)
    before: dict[int, kills.Kill] = {}
    for number in range(start, count):
        run = number % len(SEVERAL_SIZES)
        aimed = number % AIMED_EVERY == AIMED_EVERY - 1
        point = points[number // AIMED_EVERY % len(points)] if aimed else ""
        generator = random.Random(number)
        entry: dict[str, Any] = {"kind": point or "random", "committed": 0}
        try:
            now = kills.kill(server, folder / f"saves-{run}", SEVERAL_SIZES[run], generator, point)
        except AssertionError as error:
            yield {**entry, "faults": [str(error)]}
            continue
        found = kills.faults(before.get(run), now)
        before[run] = now
        yield {**entry, "committed": now.committed - now.resumed, "faults": found}


def _resumes(folder: Path, start: int, count: int) -> Iterator[dict[str, Any]]:
    from tests.faults import resumes

    for number in range(start, count):
        yield {"kind": "two kills", "faults": _judged(partial(resumes.resume, folder, number))}


def _cases(folder: Path, names: list[str]) -> Iterator[dict[str, Any]]:
    from tests.faults.matrix import CASES
    from tests.faults.runs import Skip

    for name in names:
        try:
            yield {"kind": name, "faults": _judged(partial(CASES[name], folder))}
        except Skip as reason:
            yield {"kind": f"{name} (skipped: {reason})", "faults": []}


def _judged(case: Callable[[], list[str]]) -> list[str]:
    try:
        return case()
    except AssertionError as error:
        return [str(error)]


def _found(done: list[dict[str, Any]]) -> str:
    wrong = sum(bool(entry["faults"]) for entry in done)
    return f"[red]{wrong} wrong" if wrong else "all as they should be"


def summarised(results: Results) -> dict[str, Any]:
    """By part: when its last trial was, with which versions, how many there were, and of what."""
    parts = {}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint")}
    for name, entries in results.parts().items():
        parts[name] = {
            "date": entries[-1]["date"],
            "versions": versions,
            "trials": len(entries),
            "faults": [text for entry in entries for text in entry["faults"]],
            "kinds": dict(Counter(entry["kind"] for entry in entries)),
        }
        if name == "kills":
            parts[name]["committed"] = sum(entry["committed"] for entry in entries)
    return parts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
