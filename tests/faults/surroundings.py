"""Rows of the matrix about what is around a run of train.py: disk, clock, limits, one bad batch."""

from __future__ import annotations

import os
import resource
import signal
import struct
import time
from pathlib import Path

import numpy as np

from tests.faults import runs
from tests.faults.faulty import BAD_STEP
from tests.faults.runs import LONG, Run, broken, goes_on
from training.checkpoint.store import steps_in
from training.metrics import read_metrics

_DAY_S = 86_400
_SLOW_MS = 150  # for each file of a step, and there are a dozen
_FILE_BYTES = 256 * 1024  # metrics and log are smaller, the arrays of a step larger
_LARGER = "--embed-dim 128 --mlp-dim 256"


def _saving(folder: Path) -> list[str]:
    """Steps that are being written."""
    try:
        return os.listdir(folder / "saving")
    except FileNotFoundError:
        return []


def slow_disk(scratch: Path) -> list[str]:
    """17: a save takes longer than the steps between two: it is waited for and told, saves do not
    queue up, and none is left out."""
    folder = runs.fresh(scratch / "slow-disk")
    system = {"SLOW_FOLDER": str(folder), "SLOW_MS": str(_SLOW_MS)}
    run = Run(scratch, folder.name, "--steps 6 --checkpoint-every 1 --keep 9", system=system)
    queued = 0
    while run.process.poll() is None:
        queued = max(queued, len(_saving(folder)))
        time.sleep(0.02)
    run.end()
    wrong = [] if queued == 1 else [f"{queued} saves at once"]
    if steps_in(folder) != [1, 2, 3, 4, 5, 6]:
        wrong.append(f"steps {steps_in(folder)} are there")
    waits = [f"({n}. wait of this run)" for n in ("the 1", "the 2", "the 4")]
    wrong += [f"{text!r} is not told" for text in waits if text[1:-1] not in run.output]
    seconds = read_metrics(folder / "metrics.jsonl")[-1]["seconds"]
    if seconds.get("save", 0.0) < 4 * _SLOW_MS / 1000:
        wrong.append(f"saving is not counted: {seconds}")
    return wrong + broken(folder) + goes_on(scratch, folder.name)


def nan_batch(scratch: Path) -> list[str]:
    """18: a batch that is not finite: its step changes nothing, counts, is named, and the run goes
    on."""
    folder, options = runs.fresh(scratch / "nan"), "--checkpoint-every 1 --keep 9"
    run = Run(scratch, folder.name, f"--steps 8 {options}", fault="nan_batch").end()
    lines = {line["step"]: line for line in read_metrics(folder / "metrics.jsonl")}
    wrong = []
    found = {step: (line["skipped"], line["skipped_total"]) for step, line in lines.items()}
    if found != {s: (int(s == BAD_STEP), int(s >= BAD_STEP)) for s in range(1, 9)}:
        wrong.append(f"skipped, and in all: {found}")
    if any((lines[step]["loss"] is None) != (step == BAD_STEP) for step in lines):
        wrong.append("another loss is not finite")
    told = f"warning: step {BAD_STEP} was skipped: loss nan, gradient norm nan; its batch is the"
    if run.output.count("was skipped") != 1 or told not in run.output:
        wrong.append("the step and its batch are not named, or others are")
    if BAD_STEP in steps_in(folder) or steps_in(folder)[-1] != 8:
        wrong.append(f"steps {steps_in(folder)} were saved")
    # A run that ends with the bad step saves what it left.
    short = runs.fresh(scratch / "nan-short")
    Run(scratch, short.name, f"--steps {BAD_STEP} {options}", fault="nan_batch").end()
    before, after = (runs.arrays(short / str(step)) for step in (BAD_STEP - 1, BAD_STEP))
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    if changed != {"['skipped']", "['step']"} or after["['skipped']"] != 1:
        wrong.append(f"the step changed {sorted(changed)}")
    if not all(np.isfinite(np.asarray(x, np.float64)).all() for x in after.values()):
        wrong.append("a value that was saved is not finite")
    return wrong + broken(folder) + goes_on(scratch, folder.name)


def clock_jumps(scratch: Path) -> list[str]:
    """22: the wall clock jumps by days, back and forth: time stamps follow it, and no limit and no
    measurement. It jumps forward at any time, and back between saves: tensorstore aborts the
    process where the clock goes back in the milliseconds in which it commits."""
    folder, offset = runs.fresh(scratch / "clock"), scratch / "clock-offset"
    offset.write_bytes(struct.pack("q", 0))
    started, before = time.time(), time.monotonic()
    options = f"{LONG} --checkpoint-every 25 --save-failures 100000 --step-timeout 60"
    system = {"CLOCK_OFFSET": str(offset)}
    run = Run(scratch, folder.name, options, system=system).reached(1)
    with offset.open("r+b", buffering=0) as file:
        for day in [1, 0, -1, 0, 365, -365, 2, 1, 0] * 4:
            run.until(lambda: not _saving(folder), "no save")
            file.seek(0)
            file.write(struct.pack("q", day * _DAY_S * 10**9))
            step = max(runs.losses(folder))
            run.reached(step + 3)
            file.seek(0)
            file.write(struct.pack("q", (day + 1) * _DAY_S * 10**9))
            run.reached(step + 3 + len(runs.losses(folder)) % 7)
    newest = max(steps_in(folder), default=0)
    run.until(lambda: max(steps_in(folder), default=0) > newest, "a checkpoint after the jumps")
    run.signal(signal.SIGTERM).end(75)
    took = time.monotonic() - before
    lines = read_metrics(folder / "metrics.jsonl")
    away = [abs(line["time"] - started) for line in lines]
    wrong = [] if max(away) > 300 * _DAY_S else ["the clock did not jump: nothing was tested"]
    for line in lines:
        spent = sum(line["seconds"].values())
        if spent > took or line["step_seconds"] > took or line is lines[-1] and spent < took / 3:
            wrong.append(f"step {line['step']}: {spent:.0f} s of {took:.0f} s: {line['seconds']}")
            break
    return wrong + broken(folder) + goes_on(scratch, folder.name)


def small_files(scratch: Path) -> list[str]:
    """22: files may not grow beyond a limit (RLIMIT_FSIZE): saves fail by name, and work again
    without it; the signal SIGXFSZ ends nothing."""
    folder = runs.fresh(scratch / "small-files")
    options = f"{LONG} {_LARGER} --save-failures 100000 --log-every 50"
    run = Run(scratch, folder.name, options)
    run.until(lambda: len(steps_in(folder)) > 0, "a checkpoint")
    largest = max(p.stat().st_size for p in folder.rglob("*/d/*"))
    wrong = [] if largest > _FILE_BYTES else [f"files of {largest} bytes: nothing was tested"]
    _, hard = resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (_FILE_BYTES, hard))
    run.said("was not saved in")
    failed = steps_in(folder)[-1]
    run.until(lambda: run.output.count("was not saved in") > 2, "more saves that fail")
    if steps_in(folder)[-1] != failed:
        wrong.append("a save that hit the limit is listed")
    for text in ("why: File too large: ", "fix: raise the limit on files, ulimit -f;"):
        if text not in run.output or "Traceback" in run.output:
            wrong.append(f"the reason is not told: {run.output[-1000:]}")
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    run.until(lambda: steps_in(folder)[-1] > failed, "a checkpoint without the limit")
    run.kill()
    return wrong + broken(folder) + goes_on(scratch, folder.name, f"{LONG} {_LARGER}")
