"""Which step a run goes on from, and what it refuses."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from sharding.errors import Problem
from tests.faults import corruptions, states
from tests.faults.corruptions import COLUMNS
from training.checkpoint import Checkpoints, manifest
from training.checkpoint.resume import find_step
from training.checkpoint.store import newest_about, steps_in
from training.errors import CheckpointError


def found_in(folder, resume="auto", record=states.RECORD):
    """(step, what was told), as a run that starts finds it."""
    told, checkpoints = [], Checkpoints(folder, keep=3)
    try:
        found = find_step(checkpoints, resume, record, lambda problem: told.append(str(problem)))
    finally:
        checkpoints.close()
    return found and found.step, told


def refused(folder, resume="auto", record=states.RECORD):
    with pytest.raises(CheckpointError) as error:
        found_in(folder, resume, record)
    assert error.value.exit_code == 4
    return str(error.value)


def restored(folder, abstract, step=2):
    checkpoints = Checkpoints(folder, keep=3)
    try:
        return checkpoints.restore(step, abstract)
    finally:
        checkpoints.close()


def rewrite(step, **entries):
    """Writes a manifest as a program would that had these entries."""
    body = json.loads((step / "manifest.json").read_text()) | entries
    del body["digest"]
    (step / "manifest.json").write_bytes(manifest._render(body))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# Which step


def test_a_new_folder_starts_afresh_and_is_not_made(tmp_path):
    for resume in ("auto", "never"):
        assert found_in(tmp_path / "new", resume) == (None, [])
    assert not (tmp_path / "new").exists()


def test_a_damaged_step_is_told_with_its_file_and_kept(run_folder):
    flip(run_folder / "2" / "state" / "_METADATA")
    assert found_in(run_folder) == (
        1,
        [
            f"{run_folder}, step 2 is damaged and is not used\n"
            "  why: state/_METADATA: its bytes are not those that were written"
            " (SHA-256 differs)\n"
            f"  fix: it is kept as {run_folder}/quarantine/2-1; the run goes on from step 1"
        ],
    )
    assert steps_in(run_folder) == [1]
    assert (run_folder / "quarantine" / "2-1" / "manifest.json").exists()
    assert found_in(run_folder) == (1, [])


def test_with_no_good_step_nothing_is_started_or_moved(run_folder):
    (run_folder / "1" / "manifest.json").unlink()
    flip(run_folder / "2" / "state" / "manifest.ocdbt")
    fix = "put a good copy in its place, or name another --checkpoint-dir to start afresh"
    for resume in ("auto", "must"):
        assert refused(run_folder, resume) == (
            f"2 problems\n(1) {run_folder}, step 2 is damaged\n  why: state/manifest.ocdbt:"
            f" its bytes are not those that were written (SHA-256 differs)\n  fix: {fix}\n"
            f"(2) {run_folder}, step 1 is damaged\n"
            f"  why: manifest.json: No such file or directory\n  fix: {fix}"
        )
        assert steps_in(run_folder) == [1, 2]


def test_steps_in_quarantine_are_steps_too(run_folder):
    flip(run_folder / "2" / "manifest.json")
    assert found_in(run_folder)[0] == 1
    shutil.rmtree(run_folder / "1")
    assert "all its steps are in quarantine/ (2-1)" in refused(run_folder)
    assert found_in(run_folder, "never") == (None, [])


def test_a_fresh_start_beside_steps_is_refused(run_folder):
    assert refused(run_folder, "never") == (
        f"--resume never --checkpoint-dir {run_folder}\n"
        "  why: the folder holds step 2 of another run, and the two would be mixed up\n"
        "  fix: name a new folder, or use --resume auto"
    )


def test_a_folder_without_steps_names_those_that_have_some(run_folder):
    shown = "--resume must --checkpoint-dir"
    for folder, hint in (
        (run_folder.with_name("rum"), " (did you mean 'run'?)"),
        (run_folder.parent, f"; there are some in {run_folder} (step 2)"),
    ):
        folder.mkdir(exist_ok=True)
        assert refused(folder, "must") == (
            f"{shown} {folder}\n  why: the folder holds no checkpoint{hint}\n"
            "  fix: name the folder of the run to continue, or leave --resume out"
        )


def test_a_newer_format_is_refused_and_left_alone(run_folder):
    rewrite(run_folder / "2", format=3)
    assert refused(run_folder) == (
        f"{run_folder}, step 2\n"
        "  why: its format is newer than this program: found v3, supports <= 2\n"
        "  fix: use the version of this program that wrote it, or another --checkpoint-dir"
    )
    assert steps_in(run_folder) == [1, 2]


def test_a_manifest_cannot_name_files_outside_of_its_step(run_folder):
    (run_folder / "secret").write_bytes(b"x")
    rewrite(run_folder / "2", files={"../secret": [1, "0" * 64]})
    assert "it lists '../secret', which is not below the step" in found_in(run_folder)[1][0]


def test_the_state_of_another_run_is_refused_with_all_that_differs(run_folder):
    record = {"seed": 3, "text": "another", "batch": 8}
    why, fix = "so the state would not mean the same", "give this run the same value, or another"
    assert refused(run_folder, record=record) == (
        f"3 problems\n(1) {run_folder}, step 2: seed is 0\n  why: this run has 3, {why}\n"
        f"  fix: {fix} --checkpoint-dir\n(2) {run_folder}, step 2: text is 0123456789abcdef\n"
        f"  why: this run has another, {why}\n"
        "  fix: name the data that the run began with, or give --allow-data-change\n"
        f"(3) {run_folder}, step 2: batch is None\n  why: this run has 8, {why}\n"
        f"  fix: {fix} --checkpoint-dir"
    )
    assert steps_in(run_folder) == [1, 2]


def test_the_layout_of_the_newest_step_is_known_without_reading_arrays(run_folder, tmp_path):
    assert newest_about(tmp_path / "none") == {}
    rewrite(run_folder / "1", about={"devices": 4})
    rewrite(run_folder / "2", about={"devices": 8})
    assert newest_about(run_folder) == {"devices": 8}
    flip(run_folder / "2" / "manifest.json")
    assert newest_about(run_folder) == {"devices": 4}


# Arrays


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_values_do_not_depend_on_the_mesh(devices, run_folder):
    abstract = states.abstract(COLUMNS, devices)
    state = restored(run_folder, abstract)
    assert states.same(state, states.at(2, COLUMNS))
    assert state.params["w"].sharding == abstract.params["w"].sharding
    assert len(state.params["w"].sharding.device_set) == devices


def test_arrays_of_other_types_are_never_converted(run_folder, monkeypatch):
    monkeypatch.setattr("orbax.checkpoint.AsyncCheckpointer.restore", None)  # nothing is opened
    abstract = states.abstract(COLUMNS)
    w = abstract.params["w"]
    changed = abstract.replace(
        params={"w": jax.ShapeDtypeStruct(w.shape, jnp.bfloat16, sharding=w.sharding)},
        opt_state=({"mu": w, "nu": w},),
    )
    with pytest.raises(CheckpointError) as error:
        restored(run_folder, changed)
    fix = "give this run the options of the run that wrote it, or another --checkpoint-dir"
    assert error.value.problems == tuple(
        Problem(
            f"{run_folder}, step 2: {name} is {stored}",
            f"this run needs {needed}, and nothing is converted",
            fix,
        )
        for name, stored, needed in (
            ("params.w", "float32[64,40]", "bfloat16[64,40]"),
            ("opt_state.0.nu", "not there", "float32[64,40]"),
            ("params.b", "bfloat16[3]", "no such array"),
        )
    )


def test_of_many_differences_the_first_are_told_and_the_others_counted(run_folder):
    leaf = jax.ShapeDtypeStruct((9,), jnp.float32)
    changed = dataclasses.replace(
        states.abstract(COLUMNS), params={f"w{i}": leaf for i in range(7)}
    )
    with pytest.raises(CheckpointError) as error:
        restored(run_folder, changed)
    assert len(error.value.problems) == 5
    assert error.value.problems[-1].what.endswith(
        "params.w4 is not there (and 4 more arrays differ)"
    )


def test_the_step_of_a_state_must_be_that_of_its_folder(run_folder):
    shutil.rmtree(run_folder / "2" / "state")
    shutil.copytree(run_folder / "1" / "state", run_folder / "2" / "state")
    with pytest.raises(CheckpointError, match="its state is of step 1"):
        restored(run_folder, states.abstract(COLUMNS))


def test_a_checkpoint_that_cannot_be_described_is_refused(run_folder):
    (run_folder / "2" / "state" / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match="the description of its arrays cannot be read"):
        restored(run_folder, states.abstract(COLUMNS))


def test_the_trials_of_damage_start_from_two_good_steps(saved):
    assert steps_in(saved) == list(corruptions.STEPS)
