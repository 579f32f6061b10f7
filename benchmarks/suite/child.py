"""Processes that measure: one for a program and a target, or, when it dies, one for each system.

launch of all systems --- it ended --> its results
          |
          died --> launch of each system alone --> whose process died, has that as its error
                            |
                            the others run: launch of those together, to time them in turn
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.suite.names import SYSTEMS
from benchmarks.suite.targets import Target

_ROOT = Path(__file__).parents[2]
_POLL = 0.2  # seconds
_LINES = 3  # of what a dead process said that are kept
_FATAL = re.compile(r"^F\d{4}|Check failed|^Fatal|terminate called|what\(\):|LLVM ERROR|^\*\*\*")


class Launched(NamedTuple):
    """What a process left.

    Attributes:
      values: as `one.Part` has them; complete when the process ended by itself.
      death: why it did not; "" if it did.
    """

    values: dict[str, Any]
    death: str


Launch = Callable[[Sequence[str]], Launched]


def run_apart(launch: Launch, runs: bool, wanted: Sequence[str] = ()) -> dict[str, Any]:
    """The results of a program for a target, whatever dies on the way; plain values.

    Args:
      launch: starts a process for these systems, () for all that can, and waits for it.
      runs: whether programs run there; else what a dead process had finished is kept.
      wanted: systems; () for all that can.
    """
    begin = time.perf_counter()
    values, death = launch(tuple(wanted))
    if death:
        values = _one_by_one(launch, runs, values, death)
    order = values.pop("applicable", [])
    rows = values["systems"]
    values["systems"] = {system: rows[system] for system in order if system in rows}
    values = {key: value for key, value in values.items() if key not in ("done", "now")}
    asked = list(wanted or SYSTEMS)
    return {**values, "asked": asked, "took_s": time.perf_counter() - begin}


def has(entry: Mapping[str, Any] | None, wanted: Sequence[str]) -> bool:
    """Whether an entry of the results file has what is wanted of it; all systems for ()."""
    return entry is not None and set(wanted or SYSTEMS) <= set(entry.get("asked", SYSTEMS))


def merged(old: Mapping[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """New results, and the old ones of systems that were not asked for."""
    if old is None:
        return new
    rows = {**old["systems"], **new["systems"]}
    asked = {*old.get("asked", SYSTEMS), *new["asked"]}
    return {**new, "systems": {s: rows[s] for s in SYSTEMS if s in rows},
            "asked": [s for s in SYSTEMS if s in asked]}  # fmt: skip


def _one_by_one(launch: Launch, runs: bool, values: dict[str, Any], death: str) -> dict[str, Any]:
    systems = values.get("applicable", [])
    if not systems:  # it did not come as far as that
        return {"systems": {}, "error": death}
    rows = {} if runs else dict(values["systems"])
    survivors: list[str] = list(rows)
    last, said = values, str(values.get("error", ""))
    for system in (s for s in systems if s not in rows):
        alone, death = launch((system,))
        found = alone["systems"].get(system)
        if death or found is None:
            rows[system] = blank(system, death or str(alone.get("error", "it left no result")))
        else:
            rows[system], last = found, alone
            said = said or str(alone.get("error", ""))
            survivors.append(system)
    if runs and len(survivors) > 1:
        together, death = launch(survivors)
        if not death:
            rows |= together["systems"]
            last, said = together, str(together.get("error", ""))
    merged = {**last, "applicable": systems, "systems": rows}
    return {**merged, "error": said} if said else merged


def blank(system: str, error: str) -> dict[str, Any]:
    """The row of a system whose process died: a `measure.Result` without numbers."""
    from benchmarks.suite.measure import Result

    return dataclasses.asdict(Result(system, error))


@dataclasses.dataclass(frozen=True)
class Child:
    """Starts processes for one program and target.

    Attributes:
      modules: that list programs, see `registry.programs`.
      limit: seconds that each process may take.
      tell: called with what the process is doing.
      seconds: of compilations, and of steps, beyond the fewest of each.
    """

    target: str
    program: str
    modules: tuple[str, ...]
    limit: float
    tell: Callable[[str], None]
    seconds: float

    def command(self, path: Path, systems: Sequence[str]) -> list[str]:
        found = [sys.executable, "-m", "benchmarks.suite", "--one", self.target, self.program,
                 "--json", str(path), "--seconds", str(self.seconds)]  # fmt: skip
        found += [part for module in self.modules for part in ("--programs", module)]
        return found + [part for system in systems for part in ("--system", system)]

    def launch(self, systems: Sequence[str]) -> Launched:
        """Runs one process to its end, or to the limit; it never outlives the call."""
        with tempfile.TemporaryDirectory(prefix="suite_") as folder:
            path, said = Path(folder, "part.json"), Path(folder, "said")
            with said.open("wb") as output:
                process = subprocess.Popen(
                    self.command(path, systems), cwd=_ROOT, stdout=output, stderr=output,
                    stdin=subprocess.DEVNULL, start_new_session=True,
                    env=Target(self.target).environment(),
                )  # fmt: skip
            try:
                code = self._wait(process, path)
            finally:
                _end(process)
            values = _read(path)
            if values.get("done"):  # what happens while it shuts down changes nothing
                return Launched(values, "")
            return Launched(values, self._death(code, values, said))

    def _wait(self, process: subprocess.Popen, path: Path) -> int | None:
        """The exit code; None when the time was over."""
        until = time.monotonic() + self.limit
        while time.monotonic() < until:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(_POLL)
            self.tell(str(_read(path)["now"]))
        return None

    def _death(self, code: int | None, values: dict[str, Any], said: Path) -> str:
        busy = f" ({values['now']})" if values["now"] else ""
        if code is None:
            return f"took more than {self.limit:g} s{busy}"
        text = said.read_text(errors="replace").splitlines()
        if code < 0:  # why comes before the stack
            why, lines = signal.Signals(-code).name, [t for t in text if _FATAL.search(t)][:_LINES]
        else:
            why, lines = f"exit code {code}", text[-_LINES:]
        parts = [f"the process died, {why}{busy}", *(line.strip()[:300] for line in lines)]
        return " / ".join(parts)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"now": "start", "systems": {}}


def _end(process: subprocess.Popen) -> None:
    """Ends the process and what it started, if it still runs."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
