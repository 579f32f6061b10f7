"""`python -m spmd`: what it says about bad input, and the exit codes."""

import subprocess
import sys

import pytest

from sharding.mesh import MeshShape
from spmd.cli.load import UsageError, load, read_arguments, read_mesh
from spmd.cli.main import main

CASE = "tests.e2e.aot_case"


def aot(function=f"{CASE}:step", args=f"{CASE}:shapes", mesh="data=8,tensor=4", topology="v3:4x4"):
    return ["aot", function, "--args", args, "--mesh", mesh, "--topology", topology]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            aot(function=f"{CASE}x:step"),
            f"{CASE}x:step\n"
            f"  why: there is no module '{CASE}x' (did you mean '{CASE}'?)\n"
            "  fix: name one that `import` finds from here; files of the working directory are "
            "found",
        ),
        (
            aot(function=f"{CASE}:stp"),
            f"{CASE}:stp\n"
            f"  why: {CASE} has no 'stp' (did you mean 'step'?)\n"
            f"  fix: name something that {CASE} defines",
        ),
        (
            aot(function=f"{CASE}:NUMBER"),
            f"{CASE}:NUMBER\n  why: it is a int\n  fix: name a function",
        ),
        (
            aot(function="step"),
            "step\n"
            "  why: an object is named by its module, a colon, and its name in it\n"
            "  fix: write it like package.module:function",
        ),
        (
            aot(args=f"{CASE}:not_a_tuple"),
            f"--args {CASE}:not_a_tuple\n"
            "  why: it returns a list\n"
            "  fix: return a tuple of arguments, (x,) for one, or (args, kwargs)",
        ),
        (
            aot(args=f"{CASE}:step"),
            f"--args {CASE}:step\n"
            "  why: calling it fails: TypeError: step() missing 3 required positional arguments: "
            "'x', 'up', and 'down'\n"
            "  fix: name a function that can be called without arguments",
        ),
        (
            aot(mesh="data=8,tensor=8"),
            "mesh data=8, tensor=8 on v3:4x4\n"
            "  why: data=8 x tensor=8 = 64 devices, and v3:4x4 has 32, 2 per chip\n"
            "  fix: use sizes whose product is 32, e.g. data=4",
        ),
        (
            aot(topology="v3p:4x4"),
            "topology 'v3p:4x4'\n"
            "  why: there is no chip 'v3p' (did you mean 'v3'?)\n"
            "  fix: the chips are v2, v3, v4, v5e, v5p, v6e, l4, a100, h100, h200, b200, cpu",
        ),
        (
            aot(mesh="data=2,tensor=4", topology="h100:8"),
            "topology h100:8\n"
            "  why: libtpu compiles for TPUs, and h100 is none\n"
            "  fix: name a TPU topology, e.g. v5p:4x4x4 or v5e:16x16",
        ),
        (
            [*aot(), "--json", "no/such/folder/out.json"],
            "--json no/such/folder/out.json\n",
        ),
        (
            [*aot(), "--options", f"{CASE}:no_options"],
            f"--options {CASE}:no_options\n"
            "  why: it returns mesh, which is not given there\n"
            "  fix: return a dict of options of spmd.jit, such as in_shardings, without the mesh",
        ),
    ],
)
def test_bad_input_is_explained_with_exit_code_2(argv, message, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: " + message)
    assert "Traceback" not in out + err


def test_meshes_are_read_and_all_problems_told():
    assert read_mesh("data=16, tensor=4") == MeshShape((("data", 16), ("tensor", 4)))
    assert read_mesh("data=2@dcn,x=4").placed_text() == "data=2@dcn, x=4"
    with pytest.raises(UsageError) as error:
        read_mesh("data=-1,fsdp=2@dnc")
    assert [problem.why for problem in error.value.problems] == [
        "axis 'data' has size -1, and an axis holds at least one device",
        "'@dnc' is no network; @dcn is the one between slices or nodes",
    ]
    with pytest.raises(UsageError) as error:
        read_mesh("data:16,tensor=0,fsdp=2,fsdp=2")
    assert len(error.value.problems) == 3
    assert str(error.value.problems[2]) == (
        "--mesh data:16,tensor=0,fsdp=2,fsdp=2\n"
        "  why: axis 'fsdp' is given twice\n"
        "  fix: give it one size"
    )


@pytest.mark.parametrize(
    ("mesh", "machine", "product", "slices", "asked", "each"),
    [
        ("data=2@dcn,tensor=4", "v5e:2x4", "data=2 = 2", 1, 2, 4),
        ("data=2@dcn,tensor=2@dcn", "v5e:2x1*2", "data=2 x tensor=2 = 4", 2, 4, 1),
    ],
)
def test_axes_between_slices_need_a_machine_with_as_many(
    mesh, machine, product, slices, asked, each, capsys
):
    assert main(aot(mesh=mesh, topology=machine)) == 2
    assert capsys.readouterr().err == (
        f"error: mesh {mesh.replace(',', ', ')} on {machine}\n"
        f"  why: its axes cross the network between {product} slices or nodes, and {machine} has"
        f" {slices}\n"
        f"  fix: name a machine of {asked} slices or nodes, with {each} devices each, or let the"
        f" axes with @dcn have the product {slices}\n"
    )


def test_arguments_may_come_with_names():
    args, kwargs = read_arguments("--args", f"{CASE}:with_names")
    assert len(args) == 1
    assert set(kwargs) == {"up", "down"}
    args, kwargs = read_arguments("--args", f"{CASE}:shapes")
    assert len(args) == 3 and kwargs == {}


def test_a_module_that_fails_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken_case.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as error:
        load("--args", "broken_case:f")
    assert str(error.value) == (
        "--args broken_case:f\n"
        "  why: importing broken_case fails: ZeroDivisionError: division by zero\n"
        "  fix: `python -c 'import broken_case'` shows where"
    )


def test_help_lists_the_commands():
    done = subprocess.run(
        [sys.executable, "-m", "spmd", "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    assert "compile for a TPU topology" in done.stdout
