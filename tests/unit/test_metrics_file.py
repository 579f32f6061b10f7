"""Lines of metrics: one for each step, whatever ended the run before."""

import builtins
import errno
import importlib
import json
import math
import os

import pytest

from sharding.errors import Problem
from training.errors import ConfigError
from training.metrics import FILE, Metrics, memory, read_metrics


def lines(folder):
    """Every line of the file, each of which must be JSON as the standard has it."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (folder / FILE).read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def written(folder, steps, start=0, **options):
    metrics = Metrics(folder, start, **options)
    for step in steps:
        assert metrics.add(step, {"loss": float(step)}) is None
    metrics.close()
    return metrics


def test_values_of_one_step_share_a_line_that_is_there_at_once(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.add(10, {"loss": 2.0, "seconds": {"step": 1.5}})
    assert [line["loss"] for line in lines(tmp_path)] == [2.0]
    metrics.add(10, {"validation_loss": 3.0})
    metrics.add(20, {"loss": 1.0})
    first, second = lines(tmp_path)
    assert first.pop("time") <= second.pop("time")
    assert first == {"step": 10, "loss": 2.0, "seconds": {"step": 1.5}, "validation_loss": 3.0}
    assert second == {"step": 20, "loss": 1.0}
    metrics.close()


def test_a_line_that_becomes_shorter_leaves_nothing_behind(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.add(1, {"loss": 0.12345678901})
    metrics.add(1, {"loss": 1.0})
    assert [line["loss"] for line in lines(tmp_path)] == [1.0]
    metrics.close()


def test_what_is_not_finite_is_null(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.add(1, {"loss": math.nan, "memory": {"device": math.inf}})
    metrics.close()
    assert lines(tmp_path)[0]["loss"] is None
    assert lines(tmp_path)[0]["memory"] == {"device": None}


def test_a_resumed_run_repeats_no_step_and_marks_where_it_went_on(tmp_path):
    written(tmp_path, range(1, 8))
    again = written(tmp_path, range(5, 9), start=4)
    assert again.last["step"] == 4
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [*range(1, 9)]
    assert [line.get("resumed") for line in found] == [None] * 4 + [4] + [None] * 3


@pytest.mark.parametrize("torn", [b'{"step": 4, "lo', b'{"step": 4}', b"\0\0\0\n", b"5\n"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    written(tmp_path, range(1, 4))
    with (tmp_path / FILE).open("ab") as file:
        file.write(torn)
    written(tmp_path, [4, 5], start=3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_run_that_was_done_adds_to_its_last_line(tmp_path):
    written(tmp_path, [1, 2])
    metrics = Metrics(tmp_path, start=2)
    metrics.add(2, {"validation_loss": 4.0})
    metrics.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.0), (2, 2.0)]
    assert lines(tmp_path)[1]["validation_loss"] == 4.0


def test_a_new_run_starts_a_new_file(tmp_path):
    written(tmp_path, [1, 2])
    written(tmp_path, [1], start=0)
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_other_processes_write_nothing(tmp_path):
    written(tmp_path, [1, 2], primary=False)
    assert not list(tmp_path.iterdir())
    assert read_metrics(tmp_path / FILE) == []


def test_a_full_disk_is_told_once_and_training_goes_on(tmp_path, monkeypatch):
    metrics = Metrics(tmp_path)
    metrics.add(1, {"loss": 1.0})
    write = os.pwrite

    def full(file, data, at):
        write(file, data[:5], at)
        return 5

    monkeypatch.setattr(os, "pwrite", full)
    assert metrics.add(2, {"loss": 1.0}) == Problem(
        f"{tmp_path / FILE} cannot be written",
        f"{os.strerror(errno.ENOSPC)}; training goes on",
        "make room on the disk",
    )
    assert metrics.add(3, {"loss": 1.0}) is None
    monkeypatch.undo()
    assert metrics.add(4, {"loss": 1.0}) is None
    metrics.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 4]


def test_tensorboard_has_every_number(tmp_path):
    metrics = Metrics(tmp_path, tensorboard=True)
    metrics.add(3, {"loss": 2.0, "seconds": {"save": 1.0}, "name": "x"})
    metrics.close()
    [path] = (tmp_path / "tensorboard").iterdir()
    data = path.read_bytes()
    assert b"loss" in data and b"seconds/save" in data and b"name" not in data


def test_without_tensorboardx_the_error_says_what_to_install(tmp_path, monkeypatch):
    load = importlib.import_module

    def missing(name, *rest):
        if name == "tensorboardX":
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError) as error:
        Metrics(tmp_path, tensorboard=True)
    assert str(error.value) == (
        "--tensorboard\n"
        "  why: the package tensorboardX, which writes its files, is not installed\n"
        '  fix: pip install -e ".[tensorboard]", or leave it out;'
        " metrics.jsonl has the same numbers"
    )
    assert not list(tmp_path.iterdir())


def test_memory_of_the_process_is_known():
    found = memory()
    assert 1e7 < found["process"] <= found["process_peak"] * 1.5
    assert set(builtins.map(type, found.values())) == {float}
