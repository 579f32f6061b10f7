"""A process that does nothing but save: it resumes, checks what it resumed, and saves every step.

Kills of it land in saves, commits and deletions, where those of a training run mostly land in
steps; and it starts in a second, where a training run compiles first.
"""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from pathlib import Path

KEEP = 2

# Where an aimed kill lands: the function of the checkpoint package that the process stops in,
# and whether it stops before it or after.
POINTS = {
    "before the manifest": ("manifest", "write", "before"),
    "between manifest and commit": ("manifest", "write", "after"),
    "before old steps are deleted": ("durable", "remove", "before"),
    "in the middle of a deletion": ("durable", "remove", "half"),
}


def run(folder: str, columns: int, point: str, told: Connection) -> None:
    """Resumes from `folder` and saves steps until it is killed.

    Sends ("resumed", step, whether its values are right, steps that were passed over), then
    ("committed", step) for each, and with an aimed `point` ("there", step) when it is reached.
    """
    from spmd.simulate import simulate

    simulate(2)
    from tests.faults import states
    from training.checkpoint import Checkpoints

    checkpoints = Checkpoints(Path(folder), KEEP)
    checkpoints.open()
    found = checkpoints.find(states.RECORD)
    step, right, passed = 0, True, ()
    if found is not None:
        step, passed = found.step, tuple(str(notice) for notice in found.notices)
        state = checkpoints.restore(step, states.abstract(columns, devices=2))
        right = states.same(state, states.at(step, columns, devices=2))
    told.send(("resumed", step, right, passed))
    if point:
        _stop_at(point, step + KEEP + 1, told)
    while True:
        step += 1
        checkpoints.save(step, states.at(step, columns, devices=2), states.RECORD)
        if problem := checkpoints.finish():
            raise RuntimeError(str(problem))
        told.send(("committed", step))


def _stop_at(point: str, step: int, told: Connection) -> None:
    """Lets the process stop at a point of the save of `step`, to be killed there."""
    from training.checkpoint import durable, manifest

    module, name, when = POINTS[point]
    owner = {"manifest": manifest, "durable": durable}[module]
    original = getattr(owner, name)

    def stopping(folder: Path, *args: object) -> object:
        is_it = args[:1] == (step,) if module == "manifest" else folder.parent.name == "trash"
        if not is_it:
            return original(folder, *args)
        if when == "after":
            original(folder, *args)
        if when == "half":
            next(path for path in sorted(folder.rglob("*")) if path.is_file()).unlink()
        told.send(("there", step))
        time.sleep(600)

    setattr(owner, name, stopping)
