"""A long run of train.py in this process, with what must not grow measured all along.

    python -m tests.soak                         # 10,000 steps, 200 saves
    python -m tests.soak --steps 1000 --saves 20 --json soak.json

Prints progress, then a JSON summary; exit code 1 when a limit is exceeded, 2 when the run failed.
The model is tiny: what counts is the loop, its bookkeeping and the checkpoints.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import train
from training.metrics import FILE, read_metrics

OPTIONS = (
    "--num-layers 2 --embed-dim 32 --mlp-dim 64 --head-dim 8 --sequence 32 --batch 8"
    " --eval-batches 1 --log-every 1 --sample-bytes 0 --devices 8 --resume never"
).split()
SETTLED = 500  # steps after which memory and descriptors may not grow
_SAMPLE_S = 0.25
_REPORT_S = 10.0


class Limit(NamedTuple):
    """A measured value and the largest that is accepted."""

    name: str
    value: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.value <= self.limit


class Sample(NamedTuple):
    """At one time: open file descriptors, threads."""

    time: float
    descriptors: int
    threads: int


class Sampler:
    """Samples this process in a thread of its own, notes compilations, and tells of progress."""

    def __init__(self, metrics: Path, steps: int):
        self.samples: list[Sample] = []
        self.compiled: list[float] = []
        self._metrics, self._steps = metrics, steps
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        jax.monitoring.register_event_duration_secs_listener(self._event)
        self._thread.start()
        try:
            yield
        finally:
            self._end.set()
            self._thread.join(timeout=10)
            jax.monitoring.clear_event_listeners()

    def _event(self, event: str, seconds: float, **kwargs: Any) -> None:
        if "backend_compile" in event:
            self.compiled.append(time.time())

    def _run(self) -> None:
        told = time.time()
        while not self._end.wait(_SAMPLE_S):
            # Listing the folder takes a descriptor itself.
            descriptors = len(os.listdir("/proc/self/fd")) - 1
            self.samples.append(Sample(time.time(), descriptors, threading.active_count()))
            if time.time() - told >= _REPORT_S:
                told = time.time()
                print(self._progress(descriptors), file=sys.stderr, flush=True)

    def _progress(self, descriptors: int) -> str:
        line = last_line(self._metrics)
        if not line:
            return "compiling"
        resident = line["memory"]["process"] / 2**20
        return (
            f"step {line['step']:,} of {self._steps:,}  {resident:,.1f} MiB  {descriptors}"
            f" descriptors  goodput {line['goodput']:.1%}"
        )


def last_line(path: Path) -> dict[str, Any]:
    """The last whole line of a file of metrics; empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 8192, 0))
            lines = file.read().split(b"\n")
        return json.loads(lines[-2])
    except (OSError, ValueError, IndexError):
        return {}


def judge(
    lines: Sequence[dict[str, Any]], sampler: Sampler, steps: int, every: int
) -> tuple[list[Limit], dict[str, Any]]:
    """What was measured against its limits, and more that explains it."""
    settled = min(SETTLED, steps // 4)
    at = {line["step"]: line["time"] for line in lines}
    resident = {line["step"]: line["memory"]["process"] for line in lines}
    early = max(resident[s] for s in resident if settled // 2 <= s <= settled)
    late = max(resident[s] for s in resident if s > settled)
    ends = [s for s in sampler.samples if at[settled] <= s.time <= at[steps]]
    tenth = max(len(ends) // 10, 1)
    seconds = lines[-1]["seconds"]
    # A save goes on in the background; where steps are beside it, is said apart.
    calm = [line["step_seconds"] for line in lines if (line["step"] - 1) % every >= every // 2]
    calm = calm[len(calm) // 20 :]
    everything = [line["step_seconds"] for line in lines[settled:]]
    p50, p99 = np.percentile(calm, [50, 99])
    limits = [
        Limit("growth of resident memory after step 500, %", 100 * (late / early - 1), 5),
        Limit("growth of open descriptors", growth(ends, tenth, "descriptors"), 0),
        Limit("growth of threads", growth(ends, tenth, "threads"), 2),
        Limit("programs compiled after step 2",
              sum(at[2] < t <= at[steps] for t in sampler.compiled), 0),
        Limit("time blocked by saves, %", 100 * seconds.get("save", 0) / spent_in_loop(seconds), 5),
        Limit("p99 of step time outside of saves, in medians", float(p99 / p50), 3),
        Limit("steps without a line, or with two", len(set(range(1, steps + 1)) ^ set(at)), 0),
    ]  # fmt: skip
    more = {
        "steps": steps,
        "resident_MiB": {"at_500": early / 2**20, "largest_after": late / 2**20},
        "step_ms": {"p50": 1e3 * p50, "p99": 1e3 * p99,
                    "p99_of_all": 1e3 * float(np.percentile(everything, 99))},
        "load_average": os.getloadavg()[1], "cores": len(os.sched_getaffinity(0)),
        "descriptors": ends[-1].descriptors, "threads": ends[-1].threads,
        "seconds": seconds, "goodput": lines[-1]["goodput"],
    }  # fmt: skip
    return limits, more


def growth(samples: Sequence[Sample], tenth: int, name: str) -> float:
    """Of the least in the last tenth of the samples over that of the first. A save that is being
    written has some of its own: what is left when there is none is what a leak adds to."""
    first = min(getattr(s, name) for s in samples[:tenth])
    return min(getattr(s, name) for s in samples[-tenth:]) - first


def spent_in_loop(seconds: dict[str, float]) -> float:
    return sum(n for kind, n in seconds.items() if kind not in ("start", "compile", "restore"))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--saves", type=int, default=200)
    parser.add_argument("--json", type=Path, help="the summary goes here too")
    chosen = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        found = soak(Path(folder), chosen.steps, chosen.saves)
    text = json.dumps(found, indent=2)
    print(text)
    if chosen.json:
        chosen.json.write_text(text + "\n")
    if found["exit_code"]:
        return 2
    return 0 if all(limit["ok"] for limit in found["limits"]) else 1


def soak(folder: Path, steps: int, saves: int) -> dict[str, Any]:
    """Runs train.py in `folder`, and measures."""
    every, run = max(steps // saves, 1), folder / "run"
    text = np.random.default_rng(0).choice(np.frombuffer(b"def f(x):\n", np.uint8), 100_000)
    (folder / "text.py").write_bytes(bytes(text))
    options = [*OPTIONS, "--steps", str(steps), "--checkpoint-every", str(every)]
    options += ["--eval-every", str(max(steps // 10, 1)), "--data", str(folder / "text.py")]
    options += ["--checkpoint-dir", str(run)]
    sampler = Sampler(run / FILE, steps)
    with (folder / "train.log").open("w") as log, contextlib.redirect_stdout(log):
        with sampler.running():
            exit_code = train.main(options)
    if exit_code:
        return {"exit_code": exit_code, "limits": []}
    limits, more = judge(read_metrics(run / FILE), sampler, steps, every)
    shown = [{**limit._asdict(), "ok": bool(limit.ok)} for limit in limits]
    return {"exit_code": 0, "limits": shown, **more}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
