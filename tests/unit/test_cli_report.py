"""`python -m spmd report` and `plan diff`: what they print and write, and what they say of bad
input."""

import subprocess
import sys
from pathlib import Path

import pytest

import spmd
from spmd.cli.main import main
from spmd.reporting.model import Report
from tests.e2e import aot_case

CASE = "tests.e2e.aot_case"


def report(*more: str, mesh: str = "data=2,tensor=4") -> list[str]:
    return ["report", f"{CASE}:step", "--args", f"{CASE}:shapes", "--mesh", mesh, *more]


def test_the_report_is_that_of_the_library(capsys) -> None:
    assert main(report("--machine", "v5e:2x4")) == 0
    jitted = spmd.jit(aot_case.step, mesh={"data": 2, "tensor": 4})
    want = spmd.report(jitted, *aot_case.shapes(), machine="v5e:2x4")
    assert capsys.readouterr().out == f"{want}\n"


def test_what_crosses_the_network_is_told_apart(tmp_path, capsys) -> None:
    names = [str(tmp_path / name) for name in ("inside.json", "across.json")]
    for name, mesh in zip(names, ("data=2,tensor=4", "data=2@dcn,tensor=4"), strict=True):
        assert main(report("--json", name, "--machine", "v5e:2x2*2", mesh=mesh)) == 0
    inside, across = (Report.from_json(Path(name).read_text()) for name in names)
    assert dict(across.across) == {"data": 2} and not inside.across
    assert across.network_bytes > 0 == inside.network_bytes
    data = [entry for entry in across.communication if entry.axes == ("data",)]
    assert data and across.network_bytes == sum(entry.network for entry in data)
    assert "data=2@dcn tensor=4 (8 devices)" in capsys.readouterr().out
    assert main(["plan", "diff", *names]) == 0
    assert "sent over dcn" in capsys.readouterr().out


def test_a_program_that_does_not_fit_has_exit_code_1(capsys, monkeypatch) -> None:
    monkeypatch.setattr("spmd.hardware.Machine.hbm_bytes", 1024.0)
    assert main(report("--machine", "v5e:2x4")) == 1
    assert "  does not fit: " in capsys.readouterr().out


def test_files_are_written_and_compared(tmp_path, capsys) -> None:
    names = ("a.json", "b.json", "a.html", "d.html")
    before, after, page, diff = (str(tmp_path / name) for name in names)
    assert main(report("--json", before, "--html", page)) == 0
    assert main(report("--json", after, mesh="data=8,tensor=1")) == 0
    a, b = (Report.from_json(Path(p).read_text()) for p in (before, after))
    assert Path(page).read_text() == a.to_html()
    capsys.readouterr()
    assert main(["plan", "diff", before, after, "--html", diff]) == 0
    assert capsys.readouterr().out == f"{a.diff(b)}\n"
    assert Path(diff).read_text() == a.diff(b).to_html()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (report("--html", "no/such/out.html"), "--html no/such/out.html\n  why: the folder "),
        (report("--json", "no/such/out.json"), "--json no/such/out.json\n  why: the folder "),
        (
            report("--machine", "v5e:4x4"),
            "mesh data=2, tensor=4 on v5e:4x4\n"
            "  why: data=2 x tensor=4 = 8 devices, and v5e:4x4 has 16\n",
        ),
        (
            report("--options", f"{CASE}:no_options"),
            f"--options {CASE}:no_options\n  why: it returns mesh, which is not given there\n"
            "  fix: return a dict of options of spmd.jit, such as in_shardings, without the mesh",
        ),
        (
            ["plan", "diff", "nothere.json", "nothere.json"],
            "nothere.json\n  why: it cannot be read: FileNotFoundError: ",
        ),
        (
            ["plan", "diff", __file__, __file__],
            f"{__file__}\n  why: it is no JSON: Extra data: line 1 column 3 (char 2)\n"
            "  fix: write it with python -m spmd report --json of this version",
        ),
    ],
)
def test_bad_input_is_explained_with_exit_code_2(argv, message, capsys) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: " + message)
    assert "Traceback" not in out + err


def test_it_runs_as_a_command_without_devices() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "spmd", *report(mesh="data=64,tensor=16")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "(1,024 devices)" in done.stdout
