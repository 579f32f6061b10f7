"""What the programs of the suite send, from their plans alone: by hand, and without each pass.

    python -m benchmarks.suite.planned                # both sizes, no device and no compiler
    python -m benchmarks.suite.planned --only lstm

Wire bytes per device are counted in the per-device programs, by the ring model; those of the
hand-written versions in the same way. A pass counts by what its absence costs; `saved_gathers`,
which takes memory, by what it saves where there is enough.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh
from rich.console import Console
from rich.table import Table

import spmd
from benchmarks.suite.case import LARGE, RUNS, Case
from benchmarks.suite.registry import matching
from spmd import collectives

# Those that change plans on every target.
PASSES = (
    "moved_axes", "shared_sums", "shared_gathers", "direct_moves", "loop_sums",
    "loop_invariants", "late_broadcasts",
)
PLENTY = 1 << 50  # bytes of memory
SIZES = {"small": RUNS, "large": LARGE}


def planned(
    case: Case, without: Sequence[str] = (), memory_limit: int | None = None
) -> spmd.Partitioned:
    """The partitioned program."""
    mesh = AbstractMesh(tuple(case.mesh.values()), tuple(case.mesh))
    function = spmd.jit(
        case.fun, mesh=mesh, in_shardings=case.in_specs, out_shardings=case.out_specs,
        axis_rules=case.axis_rules, donate_argnums=case.donate, disable_passes=without,
        memory_limit=memory_limit,
    )  # fmt: skip
    return function.trace(*case.args).propagate().partition()


def sent(case: Case, without: Sequence[str] = ()) -> float:
    """Wire bytes per device and step of the partitioned program."""
    return planned(case, without).wire_bytes


def by_hand(case: Case) -> float | None:
    """The same of the hand-written version."""
    if case.by_hand is None:
        return None
    mesh = AbstractMesh(tuple(case.mesh.values()), tuple(case.mesh))
    mapped = jax.shard_map(
        case.by_hand, mesh=mesh, in_specs=case.in_specs, out_specs=case.out_specs,
        check_vma=False,
    )  # fmt: skip
    records = collectives.count(jax.make_jaxpr(mapped)(*case.args).jaxpr, dict(case.mesh))
    return sum(record.bytes for record in records)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.suite.planned", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", default="", metavar="REGEX", help="only programs that match")
    options = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    chosen = matching(options.only)
    for name, size in SIZES.items():
        shown = Table(title=f"wire MB per device and step, {name}", title_justify="left")
        less = [f"no {p}" for p in PASSES]
        for column in ("program", "ours", "by hand", "ratio", *less, "saved_gathers"):
            shown.add_column(column, justify="left" if column == "program" else "right")
        with console.status("") as status:
            for program in chosen:
                status.update(f"planning {program.name}")
                shown.add_row(program.name, *_row(program.make(size)))
        console.print(shown)
    return 0


def _row(case: Case) -> list[str]:
    plain, hand = planned(case), by_hand(case)
    ours = plain.wire_bytes
    cells = [f"{ours / 1e6:.3f}", "" if hand is None else f"{hand / 1e6:.3f}"]
    cells.append(f"{ours / hand:.2f}" if hand else "")
    for name in PASSES:
        without = sent(case, [name])
        cells.append(f"{without / 1e6:.3f}" if without != ours else "")
    saved = planned(case, memory_limit=PLENTY)
    ratio = saved.peak_memory / plain.peak_memory
    text = f"{saved.wire_bytes / 1e6:.3f}, peak x{ratio:.2f}"
    cells.append(text if saved.wire_bytes != ours else "")
    return cells


if __name__ == "__main__":
    sys.exit(main())
