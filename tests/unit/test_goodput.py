"""Where time goes, by a clock that tests set; and when devices are done."""

import pathlib
import queue
import random
import re
import time

import jax.numpy as jnp
import pytest

from training.goodput import Goodput, Watch, process_age


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def goodput():
    clock = Clock()
    return Goodput(0.0, clock), clock


def spend(counted, clock, kind, seconds):
    with counted.spent(kind):
        clock.now += seconds


def test_what_the_host_does_while_the_devices_work_costs_nothing():
    counted, clock = goodput()
    counted.step(dispatched=0.0, done=1.0)
    clock.now = 1.0
    for _ in range(5):
        dispatched = clock.now
        spend(counted, clock, "data", 0.4)
        counted.step(dispatched, dispatched + 1.0)
        clock.now = dispatched + 1.0
    assert counted.now() == {"step": pytest.approx(6.0)}


def test_data_that_comes_later_than_the_devices_are_done_is_counted_for_that_time_alone():
    counted, clock = goodput()
    counted.step(0.0, 0.1)
    clock.now = 0.0
    spend(counted, clock, "data", 1.0)  # beside the first step, and 0.9 s longer
    counted.step(dispatched=1.0, done=1.1)
    assert counted.now() == {"step": pytest.approx(0.2), "data": pytest.approx(0.9)}


def test_saves_and_validation_between_steps_are_told_apart_and_the_rest_is_other():
    counted, clock = goodput()
    counted.step(0.0, 1.0)
    clock.now = 1.0
    spend(counted, clock, "save", 2.0)
    clock.now += 0.5
    spend(counted, clock, "evaluation", 4.0)
    counted.step(dispatched=8.0, done=9.0)
    assert counted.now() == {
        "step": pytest.approx(2.0), "save": pytest.approx(2.0), "evaluation": pytest.approx(4.0),
        "other": pytest.approx(1.0),
    }  # fmt: skip


def test_what_came_before_the_first_segment_is_the_start():
    counted, clock = goodput()
    clock.now = 3.0
    spend(counted, clock, "compile", 7.0)
    counted.step(10.0, 11.0)
    assert counted.now() == {"step": 1.0, "start": 3.0, "compile": 7.0}


def test_a_step_far_beyond_the_median_is_a_stall_and_a_skipped_one_is_not_useful():
    counted, clock = goodput()
    for n in range(10):
        counted.step(n, n + 1)
    assert counted.step(10, 20) == 10.0
    assert counted.now() == {"step": pytest.approx(13.0), "stall": pytest.approx(7.0)}
    counted.step(20, 21, useful=False)
    assert counted.now()["skipped"] == 1.0


def test_all_time_is_attributed_and_nothing_is_kept_of_it():
    counted, clock = goodput()
    draw = random.Random(0)
    done = 0.0
    for _ in range(500):
        kind = draw.choice(("data", "save", "evaluation"))
        spend(counted, clock, kind, draw.random())
        clock.now += draw.random() * 0.1
        dispatched = clock.now
        done = max(done, dispatched) + draw.random()
        clock.now = max(clock.now, done - draw.random())
        counted.step(dispatched, done)
        assert sum(counted.now().values()) == pytest.approx(done)
        assert all(value >= 0 for value in counted.now().values())
    assert len(counted._segments) <= 2
    clock.now = done + 5
    assert sum(counted.upto_now().values()) == pytest.approx(done + 5)


def test_the_watch_tells_when_steps_were_done_not_when_somebody_asks():
    with Watch() as watch:
        watch.give(jnp.ones(8))
        time.sleep(0.5)
        asked = time.perf_counter()
        assert asked - watch.done(10) > 0.2
        with pytest.raises(queue.Empty):
            watch.done(0.01)


def test_the_watch_raises_what_a_step_raised():
    deleted = jnp.ones(8)
    deleted.delete()
    with Watch() as watch:
        watch.give(deleted)
        with pytest.raises(RuntimeError, match="deleted"):
            watch.done(10)


def test_the_age_of_the_process_grows():
    first = process_age()
    time.sleep(0.1)
    assert first <= process_age() <= first + 5
    assert Goodput().started <= time.perf_counter()


def test_the_wall_clock_is_read_for_time_stamps_alone():
    """It may jump; limits and measurements are by clocks that do not."""
    root = pathlib.Path(__file__).parents[2]
    files = [root / "train.py", *(root / "training").rglob("*.py"), *(root / "spmd").rglob("*.py")]
    pattern = r"\btime\.time(?:_ns)?\(\)|\bdatetime\.(?:now|utcnow|today)\(|\btime\.clock"
    found = {
        f"{path.relative_to(root).as_posix()}: {line.strip()}"
        for path in files
        for line in path.read_text().splitlines()
        if re.search(pattern, line)
    }
    assert found == {
        'training/metrics.py: self._line = {"step": step, "time": time.time(), **self._next}',
        'training/checkpoint/lock.py: me = {"pid": os.getpid(), "host": socket.gethostname(),'
        ' "started": time.time()}',
    }
