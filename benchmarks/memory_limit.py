"""Programs of the suite with `memory_limit=`, as the TPU compiler schedules them.

    python -m benchmarks.memory_limit --target v5p:2x2x4 --only graph --limit 1

Peak memory and estimated step without a limit and with each: XLA's scheduler takes what memory
there is in order to start transfers early, and with a limit no more than that; what is predicted
not to fit gathers twice what it held between. Needs the extra `tpu`, and no TPU.
"""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.suite.case import Program
from benchmarks.suite.measure import Result, examine
from benchmarks.suite.registry import programs
from benchmarks.suite.systems import bind
from benchmarks.suite.targets import Target
from spmd import jit

GiB = 2**30


def measured(target: Target, program: Program, limit: float | None) -> Result:
    """A program as it is compiled with a limit in GiB."""
    placed = target.place(program)
    bound = bind(placed.case, placed.mesh)
    case = bound.case
    compiled = jit(
        case.fun, mesh=bound.mesh, axis_rules=case.axis_rules, in_shardings=bound.in_shardings,
        out_shardings=bound.out_shardings, donate_argnums=case.donate,
        memory_limit=None if limit is None else int(limit * GiB),
    ).lower(*case.args).compile()  # fmt: skip
    result = Result(program.name)
    examine(result, compiled, dict(bound.mesh.shape), placed.layout)
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="v5p:2x2x4")
    parser.add_argument("--programs", action="append", help="of this module, not of the suite")
    parser.add_argument("--only", action="append", help="repeatable; default: graph")
    parser.add_argument("--limit", type=float, action="append", help="GiB; repeatable")
    args = parser.parse_args(argv)
    target = Target(args.target)
    target.prepare()
    table = Table("program", "memory_limit, GiB", "peak, GB", "estimated step, ms", "wire, MB")
    known = {each.name: each for each in programs(args.programs or ())}
    names = args.only or ["graph"]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no programs {', '.join(unknown)}; there are {', '.join(known)}")
    cases = [(name, x) for name in names for x in (None, *(args.limit or [1.0]))]
    for name, limit in track(cases, "compiling", console=Console(stderr=True)):
        found = measured(target, known[name], limit)
        peak, step, wire = found.peak_bytes, found.estimated_s, found.wire_bytes
        assert peak is not None and step is not None and wire is not None
        told = "-" if limit is None else f"{limit:g}"
        table.add_row(name, told, f"{peak / 1e9:.2f}", f"{step * 1e3:.1f}", f"{wire / 1e6:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
