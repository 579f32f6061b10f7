"""Two processes with four devices each: a training step, a run of train.py, and one that refuses to
start.

More is in `tests/multihost`.
"""

from pathlib import Path

import numpy as np

from tests.multihost.launch import run
from tests.multihost.program import CASES
from tests.multihost.training import PATIENCE_S, Run, steps_saved


def test_losses_are_those_of_one_process_and_processes_talk() -> None:
    """Sums of other processes come in another order."""
    losses, row, _ = CASES["training"]()
    found = run(["training", "talk"], 2, limit_s=240)
    first, second = (process["training"] for process in found)
    assert first == second and not first[2]
    np.testing.assert_allclose(first[0], losses, rtol=1e-6)
    np.testing.assert_allclose(first[1], row, rtol=1e-5)
    for number, process in enumerate(found):
        count, knows_itself, differ, told, late = process["talk"]
        assert (count, knows_itself, told) == (2, True, ["a", "b"])
        assert "0 in process 0; 1 in process 1" in differ
        assert ("process 1 did not come" in late) == (number == 0)


def test_a_run_trains_saves_validates_and_samples(tmp_path: Path) -> None:
    with Run(tmp_path / "run", 2, ("--steps", "1")) as started:
        started.finished()
        assert "step      1  validation loss" in started.out(0)
        assert (started.out(1), steps_saved(started.folder)) == ("", [1])


def test_processes_with_other_options_train_nothing_and_one_says_why(tmp_path: Path) -> None:
    with Run(tmp_path / "run", 2, ("--steps", "2"), process_1=("--seed", "16")) as started:
        assert started.codes(PATIENCE_S) == [2, 2], started.said()
        assert started.err(0).startswith(
            "processes 0, 1: error: --seed differs between processes (start)\n"
            "  why: 0 in process 0; 16 in process 1: they would run different programs, and wait"
            " for each other\n"
        )
        assert started.err(1) == "" and not started.folder.exists()
