"""Checkpoints of several processes, and their change from run to run; started with -m multihost."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from training.checkpoint.store import steps_in

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.multihost


def started(processes, folder, fault=""):
    """What each process says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environ = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    environ["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, "-m", "tests.faults.several", coordinator, str(processes)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    all_of_them = [
        subprocess.Popen([*command, str(i), str(folder), fault], cwd=ROOT, env=environ, **pipes)
        for i in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in all_of_them]
    finally:
        for process in all_of_them:
            process.kill()
    lines = [[x for x in out.splitlines() if x.startswith("{")] for out, _ in outputs]
    assert all(lines), outputs
    return [json.loads(each[-1]) for each in lines]


def test_each_number_of_processes_restores_what_another_has_saved(tmp_path):
    step = 0
    for processes in (2, 1, 4):
        said = started(processes, tmp_path / "run")
        assert said == [{"from": step, "right": True, "problems": ["None"] * 2}] * processes
        step += 2
        assert steps_in(tmp_path / "run") == [step - 1, step]


def test_a_failure_of_the_one_that_writes_manifests_is_everyones(tmp_path):
    said = started(2, tmp_path / "run", fault="manifest")
    assert said[0] == said[1]
    for step, problem in enumerate(said[0]["problems"], 1):
        assert f"step {step} was not saved in {tmp_path / 'run'}" in problem
    assert steps_in(tmp_path / "run") == []
