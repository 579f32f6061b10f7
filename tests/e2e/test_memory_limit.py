"""A step that is predicted not to fit is refused before anything is compiled."""

import dataclasses
import io

import pytest
from rich.console import Console

import train
from spmd.runtime.hybrid import make_mesh
from training import hosts
from training.cli import parse
from training.errors import ConfigError
from training.memory import check_memory, limit_of
from training.program import Plan, plan

SMALL = (
    "--num-layers 8 --embed-dim 32 --mlp-dim 64 --head-dim 8 --sequence 32 --batch 8"
    " --dtype float32 --parallelism fsdp --mesh data=2,fsdp=4"
)


class Device:
    """What `limit_of` asks of a device."""

    def __init__(self, kind, stats):
        self.device_kind, self.memory_stats = kind, lambda: stats


@pytest.fixture(scope="module")
def planned():
    run, problems = parse([*SMALL.split(), "--memory-limit", "0.0001"])
    assert not problems
    return plan(run, make_mesh({"data": 2, "fsdp": 4}, {}))


def test_train_refuses_with_the_largest_buffers_and_a_remedy(
    planned, tmp_path, monkeypatch, capsys
):
    """Row 46 of the bad-input matrix."""
    (tmp_path / "a.py").write_text("def f(x):\n    return x\n" * 100)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hosts, "simulate", lambda devices, nodes: True)
    monkeypatch.setattr(train, "plan", lambda run, mesh: planned)
    for name in ("compile_step", "compile_evaluate", "init"):
        monkeypatch.delattr(Plan, name)  # whoever compiles fails
    options = [*SMALL.split(), "--data", "a.py", "--memory-limit", "0.0001", "--run-name", "big"]
    assert train.main(options) == 2
    err = capsys.readouterr().err
    what, why, fix = err.removeprefix("error: ").splitlines()
    assert what == (
        f"a step needs {planned.partitioned.peak_memory / 1024:.1f} KiB per device, predicted, and"
        " 104.9 KiB is --memory-limit 0.0001"
    )
    assert why.startswith("  why: the largest buffers at the peak are ")
    assert why.count("KiB") == 5
    assert "result of scan at models/transformer.py" in why
    assert fix.startswith("  fix: use --remat full, which needs ")
    assert fix.endswith(
        " KiB, a --mesh with fsdp in place of data, a --batch below 8, or a --mesh of more devices;"
        " --ignore-memory-limit goes on all the same"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.py"]


def test_it_goes_on_with_a_warning_where_that_is_asked_for(planned):
    model = dataclasses.replace(planned.run.model, remat="full")  # what is left is not planned
    mesh = dataclasses.replace(planned.run.mesh, ignore_memory_limit=True)
    written = io.StringIO()
    ignored = dataclasses.replace(planned.run, model=model, mesh=mesh)
    check_memory(Console(file=written, width=1000), dataclasses.replace(planned, run=ignored))
    assert written.getvalue().startswith("warning: a step needs ")
    obeyed = dataclasses.replace(planned.run, model=model)
    with pytest.raises(ConfigError, match="fix: use a --mesh with fsdp in place of data, "):
        check_memory(Console(file=written), dataclasses.replace(planned, run=obeyed))


def test_a_step_that_fits_passes(planned):
    mesh = dataclasses.replace(planned.run.mesh, memory_limit=1.0)
    check_memory(Console(file=io.StringIO()), dataclasses.replace(
        planned, run=dataclasses.replace(planned.run, mesh=mesh)
    ))  # fmt: skip


def test_the_limit_is_the_given_one_then_the_runtimes_then_the_chips():
    run, _ = parse([])
    given, _ = parse(["--memory-limit", "2"])
    v5e = 15.75 * 2**30
    assert limit_of(given, Device("TPU v5e", {"bytes_limit": 7})) == (2**31, "--memory-limit 2")
    assert limit_of(run, Device("TPU v5e", {"bytes_limit": 7})) == (7, "what TPU v5e has")
    assert limit_of(run, Device("TPU v5e", None)) == (v5e, "what TPU v5e has")
    assert limit_of(run, Device("cpu", None)) is None
