"""More or fewer devices than wrote the checkpoint: which mesh, and what is said about it."""

import io

import pytest
from rich.console import Console

from training import elastic
from training.checkpoint import manifest
from training.cli import parse
from training.validate import validate

LEFT = {"mesh": {"fsdp": 4, "tensor": 2}, "devices": 8}


@pytest.fixture
def left(tmp_path):
    """A folder whose newest step was written on 8 devices."""
    step = tmp_path / "run" / "7"
    step.mkdir(parents=True)
    manifest.write(step, 7, {}, LEFT)
    return step.parent


def refit(folder, devices, options=""):
    run, problems = parse([*options.split(), "--checkpoint-dir", str(folder)])
    assert not problems
    return elastic.refit(run, devices)


@pytest.mark.parametrize(
    ("devices", "mesh", "used"),
    [
        (4, "fsdp=2,tensor=2", 4),
        (2, "fsdp=1,tensor=2", 2),
        (1, "fsdp=1,tensor=1", 1),
        (16, "fsdp=8,tensor=2", 16),
        (6, "fsdp=2,tensor=2", 4),  # neither 6 nor 3 divide a batch of 16
        (7, "fsdp=2,tensor=2", 4),
    ],
)
def test_the_mesh_keeps_its_axes_and_uses_as_many_devices_as_divide(left, devices, mesh, used):
    run, count, problems = refit(left, devices, "--elastic")
    assert (run.mesh.mesh, count, problems) == (mesh, used, [])
    assert validate(run, used) == []


def test_a_mesh_that_was_named_and_no_longer_fits_is_replaced(left):
    run, _, problems = refit(left, 4, "--elastic --mesh fsdp=4,tensor=2")
    assert (run.mesh.mesh, problems) == ("fsdp=2,tensor=2", [])


def test_axes_between_nodes_stay_there_and_keep_their_size(left):
    run, used, problems = refit(left, 4, "--elastic --mesh fsdp=4@dcn,tensor=2")
    assert (run.mesh.mesh, used, problems) == ("fsdp=4@dcn,tensor=1", 4, [])


def test_axes_that_do_not_carry_the_batch_keep_their_size_if_they_can(left):
    run, _, _ = refit(left, 4, "--elastic --batch 1")
    assert run.mesh.mesh == "fsdp=1,tensor=2"  # and two of the four are idle


def test_without_the_flag_it_says_what_can_be_done(left):
    run, devices, problems = refit(left, 4)
    assert (run.mesh.mesh, devices) == ("", 4)
    assert [str(problem) for problem in problems] == [
        f"{left} is from 8 devices, and there are 4\n"
        "  why: the state was laid out on fsdp=4,tensor=2, and another mesh changes memory and"
        " time per step\n"
        "  fix: use --elastic to go on on a mesh that fits, or name one with --mesh"
    ]


@pytest.mark.parametrize(
    ("devices", "options"),
    [
        (8, ""),
        (4, "--mesh fsdp=4,tensor=1"),  # named for the devices that are there
        (4, "--elastic --mesh fsdp=4,tensor=1"),
        (4, "--resume never"),
    ],
)
def test_what_was_asked_for_is_left_alone(left, devices, options):
    run, used, problems = refit(left, devices, options)
    assert (used, problems) == (devices, [])
    assert run.mesh.mesh == ("fsdp=4,tensor=1" if "--mesh" in options else "")


def test_what_is_wrong_on_every_mesh_is_not_blamed_on_the_mesh(left):
    run, _, problems = refit(left, 4, "--elastic --learning-rate -1")
    assert (run.mesh.mesh, problems) == ("fsdp=2,tensor=2", [])
    assert [problem.what for problem in validate(run, 4)] == ["--learning-rate -1"]


def test_a_folder_without_checkpoints_asks_for_nothing(tmp_path):
    assert refit(tmp_path / "new", 4)[1:] == (4, [])


def test_the_change_is_told_with_batch_memory_and_time():
    before = LEFT | {"device": "TPU v5p", "processes": 2, "batch": 16, "examples": 4}
    before |= {"memory": 3 * 2**30, "seconds": 0.02}
    now = before | {"mesh": {"fsdp": 2, "tensor": 2}, "devices": 4, "processes": 1}
    now |= {"examples": 8, "memory": 5 * 2**30, "seconds": 0.0}
    console = Console(file=io.StringIO(), width=200)
    elastic.print_change(console, before, now)
    assert console.file.getvalue() == (
        "the checkpoint was written on another mesh:\n"
        "  mesh: fsdp=4,tensor=2 (8 x TPU v5p, 2 processes) -> fsdp=2,tensor=2 (4 x TPU v5p)\n"
        "  batch: 16: 4 per device -> 16: 8 per device\n"
        "  predicted memory per device: 3.00 GiB -> 5.00 GiB\n"
        "  predicted time per step: 20.0 ms -> unknown\n"
        "  4 devices left idle: no mesh uses all\n"
    )
    same = Console(file=io.StringIO(), width=200)
    elastic.print_change(same, before, before)
    elastic.print_change(same, {}, now)
    assert same.file.getvalue() == ""
