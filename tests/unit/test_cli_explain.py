"""`python -m spmd explain`: the answers are those of the stages."""

import pytest

import spmd
from spmd.cli.main import main
from tests.e2e import aot_case

CASE = "tests.e2e.aot_case"
ASK = ["explain", f"{CASE}:step", "--args", f"{CASE}:shapes", "--mesh", "data=2,tensor=4"]


@pytest.fixture
def stage():
    jitted = spmd.jit(aot_case.step, mesh={"data": 2, "tensor": 4})
    return jitted.trace(*aot_case.shapes()).propagate().partition()


def test_without_a_question_the_program_is_printed(stage, capsys) -> None:
    assert main(ASK) == 0
    assert capsys.readouterr().out == f"{stage}\n"


def test_axes_between_slices_are_understood(capsys) -> None:
    assert main([*ASK[:-1], "data=2@dcn,tensor=4"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("mesh data=2@dcn, tensor=4\n") and "B of it over dcn" in out


def test_values_collectives_and_alternatives(stage, capsys) -> None:
    name = str(stage.plan.program.body.inputs[0])
    kind = stage.collectives[0].kind
    spec = "[" + ", ".join("-" * stage.plan.program.body.inputs[0].rank) + "]"
    assert main([*ASK, "--value", name, "--why", kind, "--why-not", name, spec]) == 0
    want = [stage.explain(name), stage.why(kind), stage.why_not(name, spec)]
    assert capsys.readouterr().out == "\n\n".join(map(str, want)) + "\n"


def test_times_are_those_of_the_machine(stage, capsys) -> None:
    kind = stage.collectives[0].kind
    assert main([*ASK, "--why", kind, "--machine", "v5e:2x4"]) == 0
    assert capsys.readouterr().out == f"{stage.why(kind, machine='v5e:2x4')}\n"


def test_an_unknown_value_is_explained_with_exit_code_2(capsys) -> None:
    assert main([*ASK, "--value", "nothing"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and "'nothing'" in err
    assert "Traceback" not in out + err
