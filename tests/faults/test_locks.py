"""Two runs and one folder."""

import json
import os
import re
import socket
import threading
import time

import pytest

from tests.faults import corruptions, states
from training.checkpoint import Checkpoints, lock
from training.checkpoint.store import steps_in
from training.errors import CheckpointError


def test_a_second_run_is_refused_by_name_and_the_first_goes_on(run_folder):
    first, second = Checkpoints(run_folder, keep=3), Checkpoints(run_folder, keep=3)
    first.open()
    with pytest.raises(CheckpointError) as error:
        second.open()
    assert re.fullmatch(
        rf"--checkpoint-dir {run_folder}\n  why: another run uses the folder:"
        rf" process {os.getpid()} on {socket.gethostname()} since [\d-]+ [\d:]+\n"
        r"  fix: wait until it ends, end it, or name another folder",
        str(error.value),
    )
    second.close()
    first.save(3, states.at(3, corruptions.COLUMNS), states.RECORD)
    assert first.finish() is None
    first.close()
    second.open()
    second.close()
    assert steps_in(run_folder) == [1, 2, 3]


def claim(folder, told, go):
    """One of several processes that take a lock at the same time."""
    go.wait(60)
    try:
        lock.Lock(folder).take()
        told.put("mine")
        go.wait(60)  # holds it until all have tried
    except CheckpointError:
        told.put("refused")
        go.wait(60)


def test_of_runs_that_start_together_one_takes_over_the_lock_of_a_dead_one(server, tmp_path):
    for number in range(5):
        folder = tmp_path / f"run-{number}"
        folder.mkdir()
        dead = {"pid": 2**22, "host": socket.gethostname(), "started": 0.0}
        lock.Lock(folder).path.write_text(json.dumps(dead))
        told, go = server.Queue(), server.Barrier(4)
        runs = [server.Process(target=claim, args=(folder, told, go)) for _ in range(4)]
        for run in runs:
            run.start()
        assert sorted(told.get(timeout=60) for _ in runs) == ["mine", *["refused"] * 3]
        for run in runs:
            run.join(60)


def test_the_lock_of_a_process_that_was_killed_is_taken_over(run_folder):
    content = {"pid": 2**22, "host": socket.gethostname(), "started": 0.0}
    (run_folder / "lock").write_text(json.dumps(content))
    checkpoints = Checkpoints(run_folder, keep=2)
    checkpoints.open()
    assert json.loads((run_folder / "lock").read_text())["pid"] == os.getpid()
    checkpoints.close()
    assert (run_folder / "lock").read_text() == ""


@pytest.mark.parametrize("alive", [True, False])
def test_a_run_on_another_machine_is_told_by_its_heartbeat(alive, run_folder, monkeypatch):
    """Where the file system does not carry the lock itself from machine to machine."""
    monkeypatch.setattr(lock, "_SILENCE_S", 1.0)
    path = run_folder / "lock"
    path.write_text(json.dumps({"pid": 7, "host": "elsewhere", "started": 0.0}))
    done = threading.Event()

    def beat():
        while not done.wait(0.1):
            os.utime(path)

    if alive:
        threading.Thread(target=beat, daemon=True).start()
    checkpoints = Checkpoints(run_folder, keep=2)
    try:
        if alive:
            with pytest.raises(CheckpointError, match="process 7 on elsewhere since"):
                checkpoints.open()
        else:
            checkpoints.open()
    finally:
        done.set()
        checkpoints.close()


def test_a_holder_renews_its_time_stamp(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT_S", 0.05)
    held = lock.Lock(tmp_path)
    held.take()
    before = held.path.stat().st_mtime_ns
    limit = time.monotonic() + 20
    while held.path.stat().st_mtime_ns == before and time.monotonic() < limit:
        time.sleep(0.02)
    assert held.path.stat().st_mtime_ns > before
    held.release()


def test_a_run_that_lost_its_lock_saves_nothing(run_folder):
    checkpoints = Checkpoints(run_folder, keep=3)
    checkpoints.open()
    (run_folder / "lock").write_text(json.dumps({"pid": 7, "host": "elsewhere", "started": 0.0}))
    checkpoints.save(3, states.at(3, corruptions.COLUMNS), states.RECORD)
    problem = checkpoints.finish()
    assert problem is not None and "another run uses the folder: process 7" in str(problem)
    assert steps_in(run_folder) == [1, 2]
    checkpoints.close()
