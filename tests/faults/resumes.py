"""Runs of train.py that are killed and started again, against one that was not."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from tests.faults import runs
from tests.faults.runs import Run

STEPS, EVERY = 40, 5
OPTIONS = f"--steps {STEPS} --checkpoint-every {EVERY}"


def straight(scratch: Path) -> Path:
    """The folder of the run that nothing was done to."""
    folder = scratch / "straight"
    if not (folder / str(STEPS) / "manifest.json").exists():
        runs.fresh(folder)
        Run(scratch, folder.name, OPTIONS).end()
    return folder


def resume(scratch: Path, seed: int) -> list[str]:
    """Kills a run at a random step, and starts it again; twice.

    Returns:
      How it differs from the straight one: losses or arrays that are not equal bit for bit.
    """
    expected, generator = straight(scratch), random.Random(seed)
    folder = runs.fresh(scratch / "resumed")
    kills = sorted(generator.sample(range(EVERY + 2, STEPS - 5), 2))
    for step in kills:
        Run(scratch, folder.name, OPTIONS).reached(step).kill()
    last = Run(scratch, folder.name, f"{OPTIONS} --resume must").end()
    wrong = [] if "; from step " in last.output else ["the last process did not resume"]
    if runs.losses(folder) != runs.losses(expected):
        wrong.append("losses differ")
    found, needed = (runs.arrays(each / str(STEPS)) for each in (folder, expected))
    wrong += [
        f"{name} differs"
        for name in needed
        if name not in found or found[name].tobytes() != needed[name].tobytes()
    ]
    return [f"killed at {kills}: {text}" for text in wrong]


def elsewhere(scratch: Path) -> list[str]:
    """A run that is killed on 8 devices, goes on on 4 and ends on 2.

    Returns:
      What is wrong: losses further than 1e-5 from those of the straight one, or no word of it.
    """
    expected, folder = straight(scratch), runs.fresh(scratch / "elastic")
    Run(scratch, folder.name, OPTIONS).reached(12).kill()
    four = Run(scratch, folder.name, f"{OPTIONS} --devices 4 --elastic").said("from step")
    four.reached(25).kill()
    two = Run(scratch, folder.name, f"{OPTIONS} --devices 2 --elastic").end()
    wrong = []
    for run, change in ((four, "(8 x cpu) -> fsdp=2,tensor=2 (4"), (two, "(4 x cpu) -> fsdp=1,")):
        if change not in run.output or "predicted time per step" not in run.output:
            wrong.append(f"{change!r} is not told")
    found, needed = runs.losses(folder, "last"), runs.losses(expected)
    if set(found) != set(needed):
        wrong.append("not all steps were run")
    far = [s for s in found if not np.isclose(found[s], needed[s], rtol=1e-5, atol=0)]
    return wrong + [f"step {s}: loss {found[s]}, not {needed[s]}" for s in far]

