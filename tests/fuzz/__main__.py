"""Runs many cases of both kinds, with progress; exit code 1 where one crashes or hangs.

    python -m tests.fuzz                       # 10,000 configurations and 10,000 reports
    python -m tests.fuzz --configurations 500 --reports 0 --seed 7
    python -m tests.fuzz --only configurations:4711
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import track

from spmd.simulate import simulate

simulate(8)

from tests.fuzz import configurations, reports, watch  # noqa: E402

KINDS: dict[str, Callable[[int, Path], object]] = {
    "configurations": configurations.run, "reports": reports.run,
}  # fmt: skip


def main(argv: list[str]) -> int:
    given = _parser().parse_args(argv)
    console = Console()
    seeds = {"configurations": given.configurations, "reports": given.reports}
    cases = {kind: range(given.seed, given.seed + count) for kind, count in seeds.items()}
    if given.only:
        kind, _, seed = given.only.partition(":")
        cases = {kind: range(int(seed), int(seed) + 1)}
    bad = 0
    for kind, numbers in cases.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "run")
            configurations.prepare(folder)
            os.chdir(folder)
            bad += _run(console, kind, numbers, folder)
            os.chdir("/")
    return 1 if bad else 0


def _run(console: Console, kind: str, numbers: range, folder: Path) -> int:
    counts: collections.Counter[str] = collections.Counter()
    slowest, bad = (0.0, -1), 0
    for number in track(numbers, kind, console=console, disable=not console.is_terminal):
        result = watch.attempt(lambda number=number: KINDS[kind](number, folder))
        counts[result.kind] += 1
        slowest = max(slowest, (result.seconds, number))
        if result.bad:
            bad += 1
            console.print(f"{kind}:{number} {result.kind}\n{result.detail}", markup=False)
    told = ", ".join(f"{n:,} {name}" for name, n in counts.most_common())
    console.print(
        f"{kind}: {len(numbers):,} cases: {told}; slowest {slowest[0]:.2f} s ({kind}:{slowest[1]})",
        highlight=False,
    )
    return bad


def _parser() -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__,
                                     formatter_class=shape)  # fmt: skip
    parser.add_argument("--configurations", type=int, default=10_000)
    parser.add_argument("--reports", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", metavar="KIND:SEED", help="one case")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
