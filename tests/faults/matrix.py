"""Faults of one run of train.py, one function each, by their rows of the fault matrix.

Each does something to real processes, and returns what is wrong with the outcome. Rows that are
about kills, damage and resumption have modules of their own.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults import damage, resumes, runs, surroundings
from tests.faults.runs import LONG, SHORT, Run, Skip, broken, goes_on
from training.checkpoint.store import steps_in

__all__ = ["CASES"]



def terminated(scratch: Path) -> list[str]:
    """10: SIGTERM while compiling, restoring, validating and saving."""
    folder, wrong = runs.fresh(scratch / "terminated"), []
    often = f"{LONG} --eval-every 1 --eval-batches 8 --checkpoint-every 1"
    moments: list[tuple[str, str, Callable[[Run], object]]] = [
        ("saves and validations", often, lambda run: run.reached(3)),
        ("restoring", LONG, lambda run: run.said("predicted memory")),
        ("compiling", f"{LONG} --mlp-dim 96", lambda run: run.said("predicted memory")),
    ]
    for when, options, wait in moments:
        name = folder.name if "mlp-dim" not in options else runs.fresh(scratch / "compiling").name
        run = Run(scratch, name, options)
        wait(run)
        run.signal(signal.SIGTERM).process.wait(runs.LIMIT_S)
        if run.process.returncode not in (75, -signal.SIGTERM):
            wrong.append(f"{when}: exit code {run.process.returncode}: {run.output[-500:]}")
        if when.startswith("saves") and run.process.returncode != 75:
            wrong.append(f"{when}: exit code {run.process.returncode}, not 75")
        wrong += [f"{when}: {text}" for text in broken(scratch / name)]
    return wrong + goes_on(scratch, folder.name)


def interrupted(scratch: Path) -> list[str]:
    """11: SIGINT once saves the step that was reached; twice ends at once."""
    folder = runs.fresh(scratch / "interrupted")
    once = Run(scratch, folder.name, LONG).reached(3).signal(signal.SIGINT).end(130)
    wrong = [] if "interrupted and saved" in once.output else ["it does not say that it saved"]
    wrong += [] if max(runs.losses(folder)) == steps_in(folder)[-1] else ["the last step is lost"]
    start = steps_in(folder)[-1]
    twice = Run(scratch, folder.name, LONG).reached(start + 2)
    twice.signal(signal.SIGINT)
    time.sleep(0.001)
    twice.signal(signal.SIGINT).process.wait(runs.LIMIT_S)
    if twice.process.returncode != 130:
        wrong.append(f"twice: exit code {twice.process.returncode}")
    return wrong + broken(folder) + goes_on(scratch, folder.name)


def disk_full(scratch: Path) -> list[str]:
    """12: a disk that fills up, has room again, and fills up for good."""
    disk = _mount(scratch, "full", "size=6m")
    try:
        (scratch / "on-disk").unlink(missing_ok=True)
        (scratch / "on-disk").symlink_to(disk)
        patient = f"{LONG} --save-failures 100000"
        run = Run(scratch, "on-disk/run", patient).said("step      1 ")
        run.until(lambda: len(steps_in(disk / "run")) > 0, "a checkpoint")
        ballast = disk / "ballast"
        _fill(ballast, disk, left=100_000)
        run.said("was not saved in")
        ballast.unlink()
        before = steps_in(disk / "run")[-1]
        run.until(lambda: steps_in(disk / "run")[-1] > before, "a checkpoint after the fault")
        run.kill()
        _fill(ballast, disk, left=100_000)
        run = Run(scratch, "on-disk/run", LONG).end(4)
        wrong = broken(disk / "run")
        if "3 saves in a row have failed" not in run.output:
            wrong.append(f"the end is not explained: {run.output[-500:]}")
        if any((disk / "run" / "saving").glob("*")):
            wrong.append("what a failed save wrote is still there")
        ballast.unlink()
        return wrong + goes_on(scratch, "on-disk/run")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def read_only(scratch: Path) -> list[str]:
    """13: the folder turns read-only while the run uses it: no step is lost, and it ends with a
    message that names the folder."""
    folder = runs.fresh(scratch / "read-only")
    run = Run(scratch, folder.name, LONG).until(lambda: len(steps_in(folder)) > 0, "a checkpoint")
    bind = ["mount", "--bind", str(folder), str(folder)]
    if subprocess.run(bind, capture_output=True).returncode:
        run.kill()
        raise Skip("mounting is not permitted")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        run.end(4)
    finally:
        run.kill()
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    wrong = broken(folder)
    if "Traceback" in run.output:
        wrong.append(run.output[-1500:])
    if str(folder) not in run.output.split("error:")[-1]:
        wrong.append("the folder is not named")
    return wrong + goes_on(scratch, folder.name)


def damaged(scratch: Path) -> list[str]:
    """14, 15: the newest step damaged; train.py goes on from the one before, and says so first."""
    source, wrong = runs.fresh(scratch / "whole"), []
    Run(scratch, source.name, SHORT).end()
    for seed, kind in enumerate(("bit flip", "truncated", "deleted", "empty folder")):
        folder = runs.fresh(scratch / "damaged")
        shutil.copytree(source, folder)
        damage.damage(folder / "8", kind, random.Random(seed))
        output = Run(scratch, folder.name, f"{SHORT} --resume must").end().output
        order = [output.find(part) for part in ("step 8 is damaged", "from step 6;", "step      7")]
        if -1 in order or order != sorted(order):
            wrong.append(f"{kind}: {output[-1000:]}")
        if runs.losses(folder) != runs.losses(source):
            wrong.append(f"{kind}: the losses are others")
        if not (folder / "quarantine" / "8-1").exists():
            wrong.append(f"{kind}: the damaged step is not kept")
    return wrong


def all_damaged(scratch: Path) -> list[str]:
    """16: every step damaged: exit code 4, and nothing is started from scratch."""
    folder = runs.fresh(scratch / "hopeless")
    Run(scratch, folder.name, SHORT).end()
    for step in steps_in(folder):
        damage.damage(folder / str(step), "truncated", random.Random(step))
    before = steps_in(folder)
    run = Run(scratch, folder.name, SHORT).end(4)
    wrong = [] if "3 problems" in run.output else [f"not all are named: {run.output[-500:]}"]
    return wrong if steps_in(folder) == before else [*wrong, "steps were moved or written"]


def diverging(scratch: Path) -> list[str]:
    """19: losses that are not finite, in a row: exit code 5, and the last step is good."""
    folder = runs.fresh(scratch / "diverging")
    options = f"{LONG} --checkpoint-every 1 --warmup 0 --clip-norm 1e30"
    Run(scratch, folder.name, f"{options} --steps 2").end()
    run = Run(scratch, folder.name, f"{options} --learning-rate 1e30").end(5)
    wrong = broken(folder)
    if "Traceback" in run.output:
        wrong.append(run.output[-1000:])
    values = runs.arrays(folder / str(steps_in(folder)[-1]))
    bad = [name for name, value in values.items() if not _finite(value)]
    return wrong + [f"the last checkpoint holds what is not finite: {name}" for name in bad]


def _finite(value: object) -> bool:
    import numpy as np

    return bool(np.isfinite(np.asarray(value, np.float64)).all())


def two_runs(scratch: Path) -> list[str]:
    """22: a second run in the same folder is refused, and the first goes on; its lock outlives it
    and holds nobody up."""
    folder = runs.fresh(scratch / "shared")
    first = Run(scratch, folder.name, LONG).reached(2)
    second = Run(scratch, folder.name, LONG).end(4)
    wrong = []
    if f"another run uses the folder: process {first.process.pid} on" not in second.output:
        wrong.append(f"it is not said who: {second.output[-500:]}")
    first.reached(max(runs.losses(folder)) + 3)
    first.until(lambda: len(steps_in(folder)) > 0, "a checkpoint").kill()
    if json.loads((folder / "lock").read_text())["pid"] != first.process.pid:
        wrong.append("the lock was not left behind")
    return wrong + broken(folder) + goes_on(scratch, folder.name)


def data_gone(scratch: Path) -> list[str]:
    """22: text that is removed or cut while the run uses it: what was read
    stays, and another text is refused."""
    folder, source = runs.fresh(scratch / "no-data"), runs.text(scratch)
    run = Run(scratch, folder.name, LONG).reached(2)
    moved = source.rename(scratch / "text-moved")
    try:
        run.reached(max(runs.losses(folder)) + 5)
        run.until(lambda: len(steps_in(folder)) > 0, "a checkpoint").kill()
    finally:
        moved.rename(source)
    changed = source / "0.py"
    data = changed.read_bytes()
    changed.write_bytes(data[:-100])
    try:
        output = Run(scratch, folder.name, f"{LONG} --resume must").end(4).output
    finally:
        changed.write_bytes(data)
    wrong = [] if ": text is " in output else [f"changed text is not named: {output[-500:]}"]
    return wrong + broken(folder) + goes_on(scratch, folder.name)


def out_of_memory(scratch: Path) -> list[str]:
    """22: no more address space in the middle of a run: no step is lost.

    It ends, or it hangs and is killed: Python waits for ever for a thread that had no memory to
    start in.
    """
    folder = runs.fresh(scratch / "small")
    run = Run(scratch, folder.name, LONG).reached(7)
    run.until(lambda: len(steps_in(folder)) > 0, "a checkpoint")
    pid = run.process.pid
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
    try:
        run.process.wait(60)
    except subprocess.TimeoutExpired:
        run.kill()
    hit = run.process.returncode != 0 and any(x in run.output for x in ("MemoryError", "alloc"))
    wrong = [] if hit else ["it had memory enough: nothing was tested"]
    return wrong + broken(folder) + goes_on(scratch, folder.name)


def _mount(scratch: Path, name: str, options: str) -> Path:
    folder = scratch / name
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Skip(f"mounting is not permitted: {done.stderr.strip()}")
    return folder


def _fill(ballast: Path, disk: Path, left: int) -> None:
    """Takes what room there is, again until a save that was under way has not made room."""
    with ballast.open("wb", buffering=0) as file:
        for _ in range(20):
            free = shutil.disk_usage(disk).free
            if free > left:
                file.write(bytes(free - left))
            time.sleep(0.02)


CASES: dict[str, Callable[[Path], list[str]]] = {
    "1, 20: killed and resumed on fewer devices": resumes.elsewhere,
    "10: SIGTERM at any time": terminated,
    "11: SIGINT once and twice": interrupted,
    "12: disk full": disk_full,
    "13: folder turns read-only": read_only,
    "14, 15: newest step damaged": damaged,
    "16: every step damaged": all_damaged,
    "17: slow disk": surroundings.slow_disk,
    "18: one batch that is not finite": surroundings.nan_batch,
    "19: not finite in a row": diverging,
    "22: two runs, one folder": two_runs,
    "22: text removed or changed": data_gone,
    "22: out of memory": out_of_memory,
    "22: clock jumps": surroundings.clock_jumps,
    "22: files may not grow": surroundings.small_files,
}
