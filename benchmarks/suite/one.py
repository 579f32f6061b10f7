"""One program for one target, in this process: what a child of `python -m benchmarks.suite` does.

What is known so far is written to a file again and again, for the parent to read when XLA takes
this process down: which systems there are, which is busy, and the results that are complete.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.suite import measure, registry, steps, systems
from benchmarks.suite.measure import Result
from benchmarks.suite.systems import Bound, Built
from benchmarks.suite.targets import Placed, Target


class Part:
    """The file: plain values, replaced as a whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[str, Any] = {"now": "start", "systems": {}}

    def tell(self, now: str) -> None:
        """Says what is done next."""
        self.values["now"] = now
        beside = self._path.with_suffix(".new")
        beside.write_text(json.dumps(self.values))
        os.replace(beside, self._path)


def run(
    target: Target,
    name: str,
    modules: Sequence[str],
    wanted: Sequence[str],
    path: Path,
    seconds: float,
) -> None:
    """Compiles, and where the target runs programs, runs; writes to `path`.

    Args:
      modules: that list programs, see `registry.programs`.
      wanted: systems; () for all that can.
      seconds: of compilations, and of steps, beyond the fewest of each.
    """
    target.prepare()
    jax.config.update("jax_enable_compilation_cache", False)  # every compilation is timed
    part = Part(path)
    part.tell("start")
    try:
        program = next(p for p in registry.programs(modules) if p.name == name)
        placed = target.place(program)
        _run(placed, target.runs, wanted, part, seconds)
    except Exception as error:  # of the program, or of the target
        part.values["error"] = describe(error)
    part.values["done"] = True
    part.tell("")


def _run(
    placed: Placed, runs: bool, wanted: Sequence[str], part: Part, seconds: float
) -> None:
    case, mesh, layout = placed.case, placed.mesh, placed.layout
    chosen = [s for s in systems.applicable(case, placed.whole) if not wanted or s in wanted]
    part.values |= {
        "mesh": dict(mesh.shape),
        "size": f"{'small' if placed.size.small else 'large'} {np.dtype(placed.size.dtype).name}",
        "applicable": chosen,
        "versions": versions(),
    }
    bound = systems.bind(case, mesh)
    part.tell("warm-up")
    systems.warm_up(mesh, chosen)
    rows = part.values["systems"]

    def keep(system: str, outcome: Built | Exception) -> None:
        part.tell(f"{system}: examine")
        rows[system] = dataclasses.asdict(_examined(system, outcome, bound, layout))

    built = systems.build_in_rounds(
        bound, chosen, lambda s: part.tell(f"{s}: compile"), keep, seconds
    )
    for system, outcome in built.items():
        rows[system]["phases_s"] = outcome.phases
    if runs:
        running = {s: built[s].compiled for s in chosen if s in built and not rows[s]["error"]}
        for system, ran in steps.run(running, bound, part.tell, seconds).items():
            if isinstance(ran, Exception):
                rows[system]["error"] = describe(ran)
            else:
                rows[system]["step_s"], rows[system]["difference"] = ran


def _examined(system: str, outcome: Built | Exception, bound: Bound, layout: Any) -> Result:
    result = Result(system)
    try:
        if isinstance(outcome, Exception):
            raise outcome
        result.phases_s = outcome.phases
        measure.examine(result, outcome.compiled, bound.mesh.shape, layout)
    except Exception as error:
        if layout is None or not measure.too_large(result, error, bound):
            result.error = describe(error)
    return result


def describe(error: Exception) -> str:
    """The class and the message, cut where it is long."""
    text = f"{type(error).__name__}: {error}".strip()
    return text if len(text) <= 600 else f"{text[:600]} ..."


def versions() -> str:
    found = []
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
