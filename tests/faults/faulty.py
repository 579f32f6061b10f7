"""train.py with something wrong in its process.

    python -m tests.faults.faulty FAULT ARGUMENTS...
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

BAD_STEP = 4


def nan_batch() -> None:
    """The batch of step BAD_STEP has one label that is none, for which the loss is NaN."""
    import jax.numpy as jnp
    import numpy as np

    import training.loop as loop
    import training.state as state

    batch_at, cross_entropy = loop.batch_at, state.cross_entropy

    def spoilt(text: Any, seed: int, step: int, *sizes: int) -> Any:
        batch = batch_at(text, seed, step, *sizes)
        if step == BAD_STEP - 1:
            batch = np.array(batch)
            batch[0, -1] = -1
        return batch

    def strict(logits_BSV: Any, targets_BS: Any) -> Any:
        bad = jnp.any(targets_BS < 0)
        return cross_entropy(logits_BSV, targets_BS) * jnp.where(bad, jnp.nan, 1.0)

    loop.batch_at, state.cross_entropy = spoilt, strict


FAULTS: dict[str, Callable[[], None]] = {fault.__name__: fault for fault in (nan_batch,)}

if __name__ == "__main__":
    program = str(Path(__file__).parents[2] / "train.py")
    FAULTS[sys.argv[1]]()
    sys.argv = [program, *sys.argv[2:]]
    runpy.run_path(program, run_name="__main__")
