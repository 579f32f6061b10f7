"""Compares `spmd.jit` with `jax.jit` under Shardy and GSPMD, and with programs written by hand.

    python -m benchmarks.suite                          # what the results file has not yet
    python -m benchmarks.suite --target cpu --only moe  # some of it
    python -m benchmarks.suite --table                  # print the results file
    python -m benchmarks.suite --table --markdown

On 8 simulated devices (`cpu`) and on GPUs programs run: results are compared with the unsharded
program, and steps are timed. For described TPUs they are compiled, which takes no TPU but libtpu;
so they are for more simulated devices (`cpu:32`), and for several GPUs (`gpu:16`, by one).
A program runs for a target in a process of its own, and its result is kept when it is there, so
that a run that was stopped goes on where it was. When XLA takes the process down, the systems run
again one by one. The exit code is 1 when something failed; a missed bar is none.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.suite import table
from benchmarks.suite.child import Child, has, merged, run_apart
from benchmarks.suite.names import SYSTEMS
from benchmarks.suite.targets import Target, defaults

RESULTS = Path(__file__).parents[1] / "suite_results.json"
LIMIT = 3600.0  # seconds
SECONDS = 20.0
_WIDTH = 180  # columns of tables that go to a file

Results = dict[str, dict[str, Any]]  # target -> program -> entry


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    if options.one:
        from benchmarks.suite import one

        target, program = options.one
        one.run(
            Target(target), program, options.programs, options.system, options.json, options.seconds
        )
        return 0
    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    results: Results = json.loads(options.json.read_text()) if options.json.exists() else {}
    if not options.table:
        _run_missing(options, results, console)
    shown = _chosen(options, results)
    if not shown:
        console.print(f"{options.json} has no such results", markup=False)
    for target, entries in shown.items():
        if options.markdown:
            print(table.markdown(target, entries), end="\n\n")
        else:
            table.show(console, target, entries)
    return 1 if any(table.errors(entries) for entries in shown.values()) else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suite", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--target", action="append", default=[],
        help="cpu, gpu, cpu:N, gpu:N, or a topology of TPUs such as v5e:4x4; repeatable; "
        f"default: {', '.join(defaults())}")  # fmt: skip
    add("--only", default="", metavar="REGEX", help="only programs whose name matches")
    add("--programs", action="append", default=[], metavar="MODULE",
        help="compare the programs of this module, not those of the suite; repeatable")  # fmt: skip
    add("--system", action="append", default=[], choices=SYSTEMS,
        help="only this one, beside what the results file has of others; repeatable")  # fmt: skip
    add("--json", type=Path, default=RESULTS, metavar="FILE", help=f"results; default {RESULTS}")
    add("--again", action="store_true", help="also what the results file has")
    add("--limit", type=float, default=LIMIT, metavar="SECONDS",
        help=f"longest time of one program for one target; default {LIMIT:.0f}")  # fmt: skip
    add("--seconds", type=float, default=SECONDS, metavar="SECONDS",
        help="of compilations, and of steps, of a program by all systems, beyond the fewest of "
        f"each; default {SECONDS:.0f}")  # fmt: skip
    add("--table", action="store_true", help="print the results file and end")
    add("--markdown", action="store_true", help="print tables in Markdown")
    add("--one", nargs=2, metavar=("TARGET", "PROGRAM"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _names(options: argparse.Namespace) -> list[str]:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of this process, which computes nothing
    from benchmarks.suite import registry

    return [p.name for p in registry.matching(options.only, options.programs)]


def _chosen(options: argparse.Namespace, results: Results) -> Mapping[str, dict[str, Any]]:
    """What the results file has of the programs and targets that are asked for."""
    names = _names(options)
    targets = options.target or list(results)
    found = {t: {n: results.get(t, {})[n] for n in names if n in results.get(t, {})}
             for t in targets}  # fmt: skip
    return {target: entries for target, entries in found.items() if entries}


def _run_missing(options: argparse.Namespace, results: Results, console: Console) -> None:
    wanted = [(t, n) for t in options.target or defaults() for n in _names(options)]
    todo = [(t, n) for t, n in wanted
            if options.again or not has(results.get(t, {}).get(n), options.system)]  # fmt: skip
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(todo))
        for target, name in todo:

            def tell(now: str, what: str = f"{target} {name}") -> None:
                progress.update(task, description=f"{what} [dim]{now}")

            child = Child(
                target, name, tuple(options.programs), options.limit, tell, options.seconds
            )
            entry = run_apart(child.launch, Target(target).runs, options.system)
            known = results.setdefault(target, {})
            known[name] = merged(known.get(name), entry)
            _write(options.json, results)
            progress.advance(task)
            failed = table.errors({name: entry})
            for line in failed or [name]:
                console.print(f"{target} {line}", style="red" if failed else "", markup=False)


def _write(path: Path, results: Results) -> None:
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(beside, path)


if __name__ == "__main__":
    sys.exit(main())
