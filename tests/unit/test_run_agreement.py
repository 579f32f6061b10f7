"""What the processes of a run compare before a step, and what they leave free."""

import dataclasses

import pytest

from sharding.errors import Problem
from spmd.runtime import processes
from training import hosts
from training.config import MeshConfig, ProcessConfig, RunConfig
from training.errors import ConfigError


@pytest.fixture
def compared(monkeypatch):
    """The values that were to agree, by what for."""
    found = {}

    def agree(name, values, timeout_s):
        found.setdefault(name, {}).update(values)

    monkeypatch.setattr(processes, "agree", agree)
    return found


@pytest.fixture
def three(monkeypatch):
    """This process is one of three, and starts nothing."""
    asked = ProcessConfig(coordinator="127.0.0.1:1", num_processes=3, process_id=1)
    monkeypatch.setattr(hosts, "start", lambda cluster, limits: None)
    monkeypatch.setattr(hosts, "simulate", lambda devices, nodes: True)
    return dataclasses.replace(RunConfig(), processes=asked, mesh=MeshConfig(devices=6))


def test_options_packages_and_sources_are_compared(three, compared):
    assert hosts.join(three, []) == []
    values = compared["start"]
    assert values["--batch"] == "16" and values["--mesh"] == "''"
    assert values["the number of processes"] == "3"
    assert {"python", "jax", "jaxlib", "numpy", "orbax-checkpoint", "spmd-compiler"} <= set(values)
    assert len(values["the source of this program (its digest)"]) == 16
    # Each has its own number, and may have its own copy of the text.
    assert not {"--process-id", "--coordinator-bind", "--data"} & set(values)


def test_devices_that_processes_cannot_share_are_refused(three, compared):
    uneven = dataclasses.replace(three, mesh=MeshConfig(devices=8))
    with pytest.raises(ConfigError) as error:
        hosts.join(uneven, [])
    assert str(error.value) == (
        "--devices 8\n  why: 3 processes simulate the same number each, and 8 = 2 x 3 + 2\n"
        "  fix: use --devices 9, or another --num-processes"
    )


def test_what_is_wrong_is_told_before_anything_is_compared(three, compared):
    with pytest.raises(ConfigError, match="--batch x"):
        hosts.join(three, [Problem("--batch x", "why", "fix")])
    assert compared == {"start": {"the number of processes": "3"}}


def test_each_process_simulates_its_share_and_axes_between_nodes_are_simulated(monkeypatch):
    seen = []
    monkeypatch.setattr(hosts, "start", lambda cluster, limits: None)
    monkeypatch.setattr(hosts, "simulate", lambda devices, nodes: seen.append((devices, nodes)))
    monkeypatch.setattr(processes, "agree", lambda *_: None)
    asked = ProcessConfig(coordinator="127.0.0.1:1", num_processes=4, process_id=1)
    mesh = MeshConfig(devices=8, mesh="data=2@dcn,fsdp=-1")
    hosts.join(dataclasses.replace(RunConfig(), processes=asked, mesh=mesh), [])
    hosts.join(dataclasses.replace(RunConfig(), mesh=mesh), [])
    assert seen == [(2, 2), (8, 2)]


def test_problems_of_a_cluster_are_told_with_all_others(monkeypatch):
    monkeypatch.setattr(hosts, "simulate", lambda devices, nodes: True)
    asked = ProcessConfig(num_processes=2, process_id=5)
    [problem] = hosts.join(dataclasses.replace(RunConfig(), processes=asked), [])
    assert problem.what == "--process-id 5"


@pytest.mark.parametrize("text", ["x = add(y)  # model.py:12 (loss)", "x = add(y)"])
def test_source_lines_are_no_part_of_a_plan(text):
    assert hosts._without_sources(text) == "x = add(y)"
