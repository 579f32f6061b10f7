"""The short form of the harness: damage, kills, and what the next run makes of them.

`python -m tests.faults` is the long one.
"""

import random

import pytest

from tests.faults import corruptions, damage, kills, saver, states
from training.checkpoint import Checkpoints
from training.checkpoint.store import steps_in


@pytest.mark.parametrize("kind", damage.KINDS)
def test_damage_of_the_newest_step_is_found_named_and_passed_over(kind, saved, tmp_path):
    seeds = range(5 if kind == "bit flip" else 1)
    wrong = [corruptions.trial(saved, tmp_path / "copy", kind, seed) for seed in seeds]
    assert wrong == [[]] * len(seeds)


def test_every_kind_of_damage_is_among_the_trials():
    assert {corruptions.kind_of(number) for number in range(33)} == set(damage.KINDS)


def test_a_step_that_is_whole_is_used_and_reading_it_leaves_it_whole(run_folder):
    for _ in range(2):
        checkpoints = Checkpoints(run_folder, keep=2)
        checkpoints.open()
        found = checkpoints.find(states.RECORD)
        assert found is not None and (found.step, found.notices) == (2, ())
        state = checkpoints.restore(2, states.abstract(corruptions.COLUMNS))
        assert states.same(state, states.at(2, corruptions.COLUMNS))
        checkpoints.close()


def test_states_that_differ_in_one_value_are_not_the_same():
    one = states.at(1, 4)
    other = one.replace(params={**one.params, "w": one.params["w"].at[0, 0].add(1)})
    assert states.same(one, states.at(1, 4)) and not states.same(one, other)


def test_kills_lose_no_committed_step_wherever_they_land(server, tmp_path):
    """Aimed at each point of a commit, and at random ones; each process checks the one before."""
    folder, generator, before = tmp_path / "run", random.Random(0), None
    for point in ("", *saver.POINTS, "", ""):
        now = kills.kill(server, folder, 2000, generator, point)
        assert kills.faults(before, now) == [], point
        before = now
    assert before.committed >= 3 * saver.KEEP


def test_a_start_clears_what_a_kill_left(run_folder):
    for name in ("saving/3/state", "trash/1-1/state"):
        (run_folder / name).mkdir(parents=True)
        (run_folder / name / "part").write_bytes(b"x")
    checkpoints = Checkpoints(run_folder, keep=2)
    checkpoints.open()
    checkpoints.close()
    assert steps_in(run_folder) == [1, 2]
    assert {path.name for path in run_folder.iterdir()} == {"1", "2", "lock"}


def test_a_lost_step_is_a_fault_of_the_harness():
    """What the long form counts: the judgement itself must not be blind."""
    before = kills.Kill(resumed=0, right=True, passed=(), committed=5)
    lost = kills.Kill(resumed=4, right=False, passed=("x",), committed=4)
    assert kills.faults(before, lost) == [
        "step 5 was committed and 4 was resumed",
        "the values of step 4 are wrong",
        "a listed step was broken: x",
    ]
