"""One of several processes that share checkpoints: restores, checks, saves, and says what it saw.

    python -m tests.faults.several COORDINATOR PROCESSES NUMBER FOLDER FAULT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

COLUMNS = 200
DEVICES = 8


def main(coordinator: str, processes: int, number: int, folder: str, fault: str) -> dict:
    """Restores the newest step, and saves two more."""
    import jax

    from spmd.simulate import simulate

    simulate(DEVICES // processes)
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator, processes, number)
    from tests.faults import states
    from training.checkpoint import Checkpoints, manifest

    if fault and number == 0:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        manifest.write = full
    checkpoints = Checkpoints(Path(folder), keep=2)
    checkpoints.open()
    found = checkpoints.find(states.RECORD)
    step, right = found.step if found else 0, True
    if found:
        state = checkpoints.restore(step, states.abstract(COLUMNS, DEVICES))
        right = _same_here(state, states.at(step, COLUMNS, DEVICES))
    problems = []
    for later in (step + 1, step + 2):
        checkpoints.save(later, states.at(later, COLUMNS, DEVICES), states.RECORD)
        problems.append(str(checkpoints.finish()))
    checkpoints.close()
    return {"from": step, "right": right, "problems": problems}


def _same_here(one: object, other: object) -> bool:
    """Whether the parts that this process holds are equal."""
    import jax
    import numpy as np

    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(
        np.array_equal(np.asarray(x.data), np.asarray(y.data))
        for a, b in pairs
        for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True)
    )


if __name__ == "__main__":
    address, count, index, *rest = sys.argv[1:]
    print(json.dumps(main(address, int(count), int(index), *rest)))
