"""Saves that fail, that are slow, and what is kept."""

import asyncio
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from sharding.errors import Problem
from tests.faults import corruptions, states
from training.checkpoint import Checkpoints, arrays, durable, manifest
from training.checkpoint.save_options import hide_orphaned_writes
from training.checkpoint.store import steps_in
from training.errors import CheckpointError


def save(checkpoints, step, columns=corruptions.COLUMNS):
    checkpoints.save(step, states.at(step, columns), states.RECORD)


def polled(checkpoints, limit_s=60):
    """What `poll` says once the background save has ended."""
    limit = time.monotonic() + limit_s
    while checkpoints.pending is not None and time.monotonic() < limit:
        if problem := checkpoints.poll():
            return problem
        time.sleep(0.01)
    return checkpoints.poll()


@pytest.fixture
def checkpoints(run_folder):
    opened = Checkpoints(run_folder, keep=3)
    opened.open()
    yield opened
    opened.close()


def test_a_manifest_lists_every_file_and_what_the_step_belongs_to(checkpoints):
    checkpoints.about = {"mesh": {"fsdp": 4}, "devices": 4}
    save(checkpoints, 3)
    assert checkpoints.finish() is None
    folder = checkpoints.folder / "3"
    found = manifest.read(folder)
    on_disk = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(found.files) == on_disk - {"manifest.json"}
    assert found.size == sum((folder / name).stat().st_size for name in found.files)
    assert (found.step, found.run) == (3, states.RECORD)
    assert found.about == {"mesh": {"fsdp": 4}, "devices": 4}
    assert set(found.versions) == {"jax", "orbax-checkpoint", "flax", "optax"}
    assert json.loads((folder / "manifest.json").read_text())["format"] == 2


def test_the_newest_steps_are_kept_and_nothing_else_is_left(checkpoints):
    for step in (3, 4, 5):
        save(checkpoints, step)
    assert checkpoints.finish() is None
    assert steps_in(checkpoints.folder) == [3, 4, 5]
    left = [*(checkpoints.folder / "trash").iterdir(), *(checkpoints.folder / "saving").iterdir()]
    assert left == []
    checkpoints.close()
    assert {path.name for path in checkpoints.folder.iterdir()} == {"3", "4", "5", "lock"}


def test_the_folders_of_another_run_are_left_alone(checkpoints):
    (checkpoints.folder / "saving").mkdir()
    Checkpoints(checkpoints.folder, keep=3).close()
    assert (checkpoints.folder / "saving").is_dir()


def test_a_limit_on_the_size_of_files_is_named_and_ends_nothing(checkpoints):
    """The signal would end the process, if Python did not ignore it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        save(checkpoints, 3, columns=2000)  # 1 MB
        problem = polled(checkpoints)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert problem is not None and problem.what.startswith("step 3 was not saved in")
    assert problem.why.startswith(f"File too large: {checkpoints.folder}/saving/3/state.")
    assert problem.fix.startswith("raise the limit on files, ulimit -f; the next checkpoint is")
    save(checkpoints, 4)
    assert (checkpoints.finish(), steps_in(checkpoints.folder)) == (None, [1, 2, 4])


def test_writes_that_end_after_their_save_has_failed_print_no_trace(monkeypatch):
    told = []

    def before(found):
        told.append(str(found.exc_value))

    monkeypatch.setattr(sys, "unraisablehook", before)
    hide_orphaned_writes()
    hook = sys.unraisablehook
    hide_orphaned_writes()
    assert sys.unraisablehook is hook is not before
    loop = asyncio.new_event_loop()
    loop.close()
    with pytest.raises(RuntimeError) as error:
        loop.call_soon_threadsafe(print)
    ours = error.value.__traceback__
    assert ours is not None
    # Storage calls the loop itself: what is of this test is not in its trace.
    for trace in (ours.tb_next, ours):
        hook(SimpleNamespace(exc_value=error.value, exc_traceback=trace))
    assert told == ["Event loop is closed"]


def test_a_step_that_is_there_is_not_written_again(checkpoints):
    before = (checkpoints.folder / "2" / "manifest.json").stat().st_mtime_ns
    save(checkpoints, 2)
    assert checkpoints.pending is None and checkpoints.finish() is None
    assert (checkpoints.folder / "2" / "manifest.json").stat().st_mtime_ns == before


def test_a_save_that_fails_in_the_background_is_told_by_the_next_step(checkpoints, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write", full)
    save(checkpoints, 3)
    assert polled(checkpoints) == Problem(
        f"step 3 was not saved in {checkpoints.folder}",
        "[Errno 28] No space left on device",
        "make room on the disk; the next checkpoint is tried all the same",
    )
    assert checkpoints.poll() is None  # told once
    assert steps_in(checkpoints.folder) == [1, 2]
    assert not (checkpoints.folder / "saving").exists()
    monkeypatch.undo()
    save(checkpoints, 4)
    assert (checkpoints.finish(), steps_in(checkpoints.folder)) == (None, [1, 2, 4])


@pytest.mark.parametrize("allowed", [1, 3])
def test_failures_in_a_row_end_the_run_and_a_success_forgives_them(
    allowed, run_folder, monkeypatch
):
    checkpoints = Checkpoints(run_folder, keep=9, max_failures=allowed)
    checkpoints.open()
    monkeypatch.setattr(durable, "free_bytes", lambda _: 0)
    for step in range(3, 2 + allowed):
        save(checkpoints, step)
        assert "the disk has 0 left" in str(checkpoints.poll())
    if allowed > 1:
        monkeypatch.undo()
        save(checkpoints, 10)
        assert checkpoints.finish() is None
        monkeypatch.setattr(durable, "free_bytes", lambda _: 0)
        for step in range(11, 10 + allowed):
            save(checkpoints, step)
    with pytest.raises(CheckpointError) as error:
        save(checkpoints, 20)
    assert f"step 20 was not saved in {run_folder}\n  why: it takes up to" in str(error.value)
    assert f"fix: {allowed} saves in a row have failed, and the run ends" in str(error.value)
    checkpoints.close()


def test_the_last_save_says_that_it_failed(checkpoints, monkeypatch):
    monkeypatch.setattr(durable, "free_bytes", lambda _: 1000)
    save(checkpoints, 3)
    problem = checkpoints.finish()
    assert problem is not None and problem.why.endswith("bytes, and the disk has 1,000 left")
    assert checkpoints.poll() is None


def test_a_save_waits_for_the_one_before_it_and_says_what_that_cost(checkpoints, monkeypatch):
    original = durable.sync_tree

    def slow(folder):
        time.sleep(1.1)
        original(folder)

    monkeypatch.setattr(durable, "sync_tree", slow)
    save(checkpoints, 3)
    save(checkpoints, 4)
    problem = checkpoints.poll()
    assert problem is not None and problem.what.startswith("the save of step 4 waited")
    assert problem.what.endswith("s for that of step 3 (the 1. wait of this run)")
    assert checkpoints.finish() is None
    assert checkpoints.waits == 1 and 0.5 < checkpoints.waited_s < 30
    assert steps_in(checkpoints.folder) == [2, 3, 4]


def test_a_folder_that_was_removed_is_named_and_not_made_again(checkpoints):
    shutil.move(checkpoints.folder, checkpoints.folder.with_name("moved"))
    save(checkpoints, 3)
    problem = checkpoints.finish()
    assert problem is not None and str(problem) == (
        f"the lock {checkpoints.folder}/lock cannot be read: No such file or directory\n"
        "  why: the folder was moved or removed while the run used it\n"
        "  fix: put the folder back"
    )
    assert not checkpoints.folder.exists()
    shutil.move(checkpoints.folder.with_name("moved"), checkpoints.folder)
    save(checkpoints, 4)
    assert (checkpoints.finish(), steps_in(checkpoints.folder)) == (None, [1, 2, 4])


# A real disk of 2 MiB


@pytest.fixture
def on_small_disk(saved, small_disk):
    folder = shutil.copytree(saved, small_disk / "run")
    opened = Checkpoints(folder, keep=3)
    opened.open()
    yield opened
    opened.close()


# Other writes of Orbax end after the first has failed, and find nobody to tell.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_fills_up_costs_neither_steps_nor_room(on_small_disk, monkeypatch):
    disk = on_small_disk.folder.parent
    columns = 2000  # 1 MB
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(durable.free_bytes(disk) - 500_000))
    # As if the room had been taken after the look at it.
    monkeypatch.setattr(durable, "free_bytes", lambda _: 10**9)
    save(on_small_disk, 3, columns)
    problem = polled(on_small_disk)
    assert problem is not None and problem.what == f"step 3 was not saved in {disk / 'run'}"
    assert durable.sync_tree(disk) is None and shutil.disk_usage(disk).free > 400_000
    monkeypatch.undo()
    save(on_small_disk, 4, columns)
    assert "and the disk has" in str(on_small_disk.finish())
    found = on_small_disk.find(states.RECORD)
    assert found is not None and (found.step, found.notices) == (2, ())
    ballast.unlink()
    save(on_small_disk, 5, columns)
    assert (on_small_disk.finish(), steps_in(on_small_disk.folder)) == (None, [1, 2, 5])


def test_a_disk_that_turns_read_only_is_named(on_small_disk):
    folder = str(on_small_disk.folder)
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
    save(on_small_disk, 3)
    problem = on_small_disk.finish()
    subprocess.run(["umount", folder], check=True)
    assert problem is not None
    assert problem.what == f"step 3 was not saved in {folder}"
    assert problem.why == f"Read-only file system: {folder}/saving"
    save(on_small_disk, 4)
    assert (on_small_disk.finish(), steps_in(on_small_disk.folder)) == (None, [1, 2, 4])


def test_a_small_state_is_written_as_it_was_though_its_memory_is_given_away(
    checkpoints, monkeypatch
):
    """The copy is made before `save` returns: the next step may take the arrays over."""
    state = states.at(5, corruptions.COLUMNS)
    wanted = jax.tree.map(np.array, state)  # views would hold the memory
    begun = threading.Event()
    write = Checkpoints._write
    monkeypatch.setattr(Checkpoints, "_write", lambda *a: begun.wait(60) and write(*a))
    checkpoints.save(5, state, states.RECORD)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    jax.block_until_ready(step(state))
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    begun.set()
    assert checkpoints.finish() is None
    monkeypatch.undo()
    restored = checkpoints.restore(5, states.abstract(corruptions.COLUMNS))
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_large_state_is_not_copied_on_its_devices(monkeypatch):
    state = states.at(5, corruptions.COLUMNS)
    assert arrays.small_copy(state) is not None
    monkeypatch.setattr(arrays, "_SMALL_BYTES", 16)
    assert arrays.small_copy(state) is None


def test_a_copy_for_which_there_is_no_room_is_not_needed(checkpoints, monkeypatch):
    """The state is copied to the host before `save` returns, as a large one is."""

    def no_room(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    state = states.at(3, corruptions.COLUMNS)
    monkeypatch.setattr(jax, "device_put", no_room)
    checkpoints.save(3, state, states.RECORD)
    monkeypatch.undo()
    assert (checkpoints.finish(), steps_in(checkpoints.folder)) == (None, [1, 2, 3])


def test_whatever_fails_before_a_save_begins_is_told_and_waited_for_by_nobody(
    checkpoints, monkeypatch
):
    def fail(*args):
        raise RuntimeError("no thread can be started")

    monkeypatch.setattr(arrays, "small_copy", fail)
    save(checkpoints, 3)
    assert checkpoints.finish() == Problem(
        f"step 3 was not saved in {checkpoints.folder}",
        "no thread can be started",
        "make room on the disk; the next checkpoint is tried all the same",
    )


def test_the_last_word_of_a_run_has_the_remedy_of_its_failure(run_folder, monkeypatch):
    opened = Checkpoints(run_folder, keep=3, max_failures=1)
    opened.open()

    def fail(*args):
        raise ValueError(f"{os.strerror(errno.EFBIG)}: /x")

    monkeypatch.setattr(Checkpoints, "_write", fail)
    save(opened, 3)
    with pytest.raises(CheckpointError, match="raise the limit on files, ulimit -f, and start it"):
        opened.finish()
    opened.close()
