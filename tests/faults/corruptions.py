"""Damages copies of one folder of checkpoints, and goes through the real resumption of each."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from tests.faults import damage, states
from training.checkpoint import Checkpoints
from training.checkpoint.resume import find_step

STEPS = (1, 2)
COLUMNS = 40
WEIGHTS = {"bit flip": 20}  # of a kind; 1 for the others


def original(folder: Path) -> None:
    """Makes a folder with the steps that copies are made of."""
    checkpoints = Checkpoints(folder, keep=len(STEPS))
    checkpoints.open()
    for step in STEPS:
        checkpoints.save(step, states.at(step, COLUMNS), states.RECORD)
    assert checkpoints.finish() is None
    checkpoints.close()


def kind_of(number: int) -> str:
    """The kind of damage of one trial: all kinds in turn, flipped bits between them."""
    kinds = [kind for kind in damage.KINDS for _ in range(WEIGHTS.get(kind, 1))]
    random.Random(0).shuffle(kinds)
    return kinds[number % len(kinds)]


def trial(source: Path, scratch: Path, kind: str, seed: int) -> list[str]:
    """Damages the newest step of a copy of `source`, and resumes from it.

    Returns:
      What is wrong with the outcome: empty if the damage was found before anything was used, named
      with step and file, and the step before it restored bit for bit.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(source, scratch)
    newest, older = STEPS[-1], STEPS[-2]
    named = damage.damage(scratch / str(newest), kind, random.Random(seed))
    told: list[str] = []
    checkpoints = Checkpoints(scratch, keep=len(STEPS))
    try:
        found = find_step(
            checkpoints, "must", states.RECORD, lambda problem: told.append(str(problem))
        )
        if found is None or found.step != older:
            return [f"{kind} (seed {seed}): resumed {found}"]
        state = checkpoints.restore(found.step, states.abstract(COLUMNS))
    finally:
        checkpoints.close()
    text = "\n".join(told)
    wrong = []
    if f"step {newest} is damaged" not in text or named not in text:
        wrong.append(f"{kind} (seed {seed}): {named!r} of step {newest} is not named in {text!r}")
    if not states.same(state, states.at(older, COLUMNS)):
        wrong.append(f"{kind} (seed {seed}): step {older} has wrong values")
    if not (scratch / "quarantine" / f"{newest}-1").exists():
        wrong.append(f"{kind} (seed {seed}): the damaged step is not kept")
    return wrong
