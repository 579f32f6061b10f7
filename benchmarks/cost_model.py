"""Checks the cost model against the TPU compiler: memory, time, and which alternative is best.

    python -m benchmarks.cost_model                      # what the results file has not yet
    python -m benchmarks.cost_model --only 'mlp.*'       # some programs
    python -m benchmarks.cost_model --table              # print the results file
    python -m benchmarks.cost_model --cpu                # order, against time on simulated devices

No TPU is needed: libtpu compiles for described ones. Memory is compared with the compiler's own
peak; time with the cycles that it estimates for the scheduled program, plus its exposed
communication by the ring model (`spmd.aot`). A pair of alternatives counts where the compiler's
times differ by more than 10 %. Each program runs in a process of its own, and its result is kept
when it is there, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path("cost_model_results.json")
APART = 0.10  # alternatives closer than this have no better one


def run(key: str, before: dict[str, Any] | None) -> dict[str, Any]:
    """Predicts and compiles one program; plain values.

    Args:
      before: an earlier result, of which what the compiler said is kept.
    """
    from spmd.ahead.libtpu import prepare

    prepare()
    import spmd
    from benchmarks.cost_programs import LATER, PROGRAMS, UNSEEN
    from spmd.ahead.compile import aot_partitioned
    from spmd.ahead.libtpu import described_mesh
    from spmd.hardware import Machine

    program = next(p for p in (*PROGRAMS, *LATER, *UNSEEN) if p.key == key)
    machine = Machine.parse(program.topology)
    mesh, layout = described_mesh(machine, program.mesh)
    fun, args, options = program.make()
    started = time.perf_counter()
    partitioned = spmd.jit(fun, mesh=mesh, **options).trace(*args).propagate().partition()
    planned = time.perf_counter()
    report = spmd.report(partitioned, machine=machine)
    predicted = time.perf_counter()
    if before is None:
        found = aot_partitioned(partitioned, layout)
        compiled = {
            "fits": found.fits, "peak": found.needed_bytes, "seconds": found.step_seconds,
            "exposed": found.schedule.exposed if found.schedule else None,
            "took": time.perf_counter() - predicted, "versions": found.versions,
        }  # fmt: skip
    else:
        compiled = before["compiled"]
    return {
        "family": program.family,
        "name": program.name,
        "topology": program.topology,
        "predicted": {"peak": report.memory.peak, "seconds": report.seconds,
                      "exposed": report.exposed, "wire_bytes": report.wire_bytes,
                      "took": predicted - planned},
        "compiled": compiled,
        "planning_took": planned - started,
    }  # fmt: skip


def run_on_cpu(only: str, repeats: int = 7) -> dict[str, Any]:
    """Predicts and times alternatives on 8 simulated devices; those of a family take turns."""
    from spmd.simulate import simulate

    simulate(8)
    import jax
    import jax.numpy as jnp

    import spmd
    from benchmarks.cost_programs import ON_CPU

    results: dict[str, Any] = {}
    programs = [p for p in ON_CPU if re.search(only, p.key)]
    for _, family in itertools.groupby(programs, key=lambda p: p.family):
        runs = {}
        for program in family:
            fun, args, options = program.make()
            mesh = jax.make_mesh(tuple(program.mesh.values()), tuple(program.mesh))
            options.pop("donate_argnums", None)  # every repeat takes the same arguments
            partitioned = spmd.jit(fun, mesh=mesh, **options).trace(*args).propagate().partition()
            report = spmd.report(partitioned, machine=program.topology)
            compiled = partitioned.lower().compile()
            inputs = jax.tree.map(
                lambda a, s: jax.device_put(jnp.full(a.shape, 0.01, a.dtype), s),
                tuple(args), partitioned.in_shardings,
            )  # fmt: skip
            jax.block_until_ready(compiled(*inputs))
            runs[program.key] = (compiled, inputs)
            results[program.key] = {
                "family": program.family,
                "predicted": {"seconds": report.seconds},
                "compiled": {"seconds": float("inf"), "fits": True},
            }
        for _ in range(repeats):
            for key, (compiled, inputs) in runs.items():
                started = time.perf_counter()
                jax.block_until_ready(compiled(*inputs))
                measured = results[key]["compiled"]
                measured["seconds"] = min(measured["seconds"], time.perf_counter() - started)
    return results


def error(result: dict[str, Any], what: str) -> float:
    return result["predicted"][what] / result["compiled"][what] - 1


def pairs(results: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """(faster by the compiler, slower, whether the cost model agrees), of alternatives that
    differ."""
    found = []
    fitting = [(key, r) for key, r in results.items() if r["compiled"]["fits"]]
    for (a, x), (b, y) in itertools.combinations(fitting, 2):
        if x["family"] != y["family"] or x["family"].startswith("suite"):
            continue  # those of the suite are no alternatives of each other
        if x["compiled"]["seconds"] > y["compiled"]["seconds"]:
            (a, x), (b, y) = (b, y), (a, x)
        if y["compiled"]["seconds"] > (1 + APART) * x["compiled"]["seconds"]:
            agrees = x["predicted"]["seconds"] < y["predicted"]["seconds"]
            found.append((a, b, agrees))
    return found


def table(results: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [
        ("program", "machine", "peak GB", "compiled", "error", "step ms", "compiled", "error")
    ]
    for key, r in results.items():
        ours, compilers = r["predicted"], r["compiled"]
        times = ["-"] * 3
        if compilers["fits"]:
            times = [f"{ours['seconds'] * 1e3:.1f}", f"{compilers['seconds'] * 1e3:.1f}",
                     f"{error(r, 'seconds'):+.0%}"]  # fmt: skip
        rows.append((
            key, r["topology"], f"{ours['peak'] / 1e9:.2f}", f"{compilers['peak'] / 1e9:.2f}",
            f"{error(r, 'peak'):+.1%}", *times,
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    return "\n".join([*lines, "", *summaries(results)])


def summaries(results: dict[str, Any]) -> list[str]:
    """Of the programs that the model was written with, and of others."""
    from benchmarks.cost_programs import LATER, PROGRAMS, UNSEEN

    lines: list[str] = []
    groups = {"": PROGRAMS, "measured later:": LATER, "measured last:": UNSEEN}
    for title, programs in groups.items():
        found = {p.key: results[p.key] for p in programs if p.key in results}
        lines += [*([title] if title else []), *summary(found)] if found else []
    return lines


def summary(results: dict[str, Any]) -> list[str]:
    peaks = [abs(error(r, "peak")) for r in results.values()]
    within = sum(e <= 0.15 for e in peaks)
    worst = f"worst {max(peaks, default=0):.1%}"
    first = f"peak memory: {within} of {len(peaks)} within 15 %, {worst}"
    return [first, *order(results)]


def order(results: dict[str, Any]) -> list[str]:
    """Of how many pairs the better one was predicted, and of which not."""
    compared = pairs(results)
    agreed = sum(agrees for *_, agrees in compared)
    share = f"{agreed / len(compared):.0%}" if compared else "-"
    lines = [f"order of alternatives: {agreed} of {len(compared)} pairs right ({share})"]
    lines += [f"  wrong: {a} is faster than {b}" for a, b, agrees in compared if not agrees]
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost_model", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--only", default="", metavar="REGEX", help="only programs that match")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file")
    parser.add_argument("--again", action="store_true", help="also what the results file has")
    parser.add_argument("--predict", action="store_true",
                        help="predict all again, and keep what the compiler said")  # fmt: skip
    parser.add_argument("--table", action="store_true", help="print the results file and end")
    parser.add_argument("--cpu", action="store_true", help="time on 8 simulated devices instead")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        before = json.loads(options.out.read_text()) if options.out.exists() else None
        options.out.write_text(json.dumps(run(options.one, before)))
        return 0
    if options.cpu:
        results = run_on_cpu(options.only)
        for key, r in results.items():
            times = [r[by]["seconds"] * 1e3 for by in ("predicted", "compiled")]
            print("{:30s} predicted {:8.1f} ms, measured {:8.1f} ms".format(key, *times))
        print("\n".join(order(results)))
        return 0
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    failed = [] if options.table else _run_missing(options, results)
    print(table(results))
    for key in failed:
        print(f"{key} failed")
    return 1 if failed else 0


def _run_missing(options: argparse.Namespace, results: dict[str, Any]) -> list[str]:
    from benchmarks.cost_programs import LATER, PROGRAMS, UNSEEN

    wanted = [p.key for p in (*PROGRAMS, *LATER, *UNSEEN) if re.search(options.only, p.key)]
    failed = []
    for number, key in enumerate(wanted, 1):
        if options.predict if key not in results else not (options.again or options.predict):
            continue
        print(f"{number}/{len(wanted)} {key}", file=sys.stderr, flush=True)
        part = options.out.with_suffix(".part")
        part.unlink(missing_ok=True)
        if options.predict:
            part.write_text(json.dumps(results[key]))
        command = [sys.executable, "-m", "benchmarks.cost_model", "--one", key, "--out", str(part)]
        if subprocess.run(command, check=False).returncode:
            failed.append(key)
            continue
        results[key] = json.loads(part.read_text())
        part.unlink()
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
