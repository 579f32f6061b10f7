"""Compilation for TPUs that are not there. Without libtpu these tests are skipped."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import jax
import pytest
from jax.experimental import mesh_utils, topologies

import spmd
import train
from sharding.errors import ArgumentError, MeshError
from spmd.ahead.libtpu import described_mesh
from spmd.hardware import Machine
from tests.e2e import aot_case

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='needs the TPU compiler: pip install "spmd-compiler[tpu]"',
)

MESH = {"data": 8, "tensor": 4}


@pytest.fixture(scope="module")
def small():
    return spmd.aot(aot_case.step, *aot_case.shapes(), mesh=MESH, topology="v3:4x4")


@pytest.mark.slow
def test_what_the_compiler_says_of_a_small_program(small):
    assert small.fits and small.devices == 32
    assert [name for name, _ in small.phases] == [
        "trace", "propagate", "partition", "lower", "compile",
    ]  # fmt: skip
    # x: 512 x 2048 bf16, each weight 4 x 256 x 1024 bf16; the gradients lie like the weights
    shapes = {(b.shape, b.kind, b.op_name) for b in small.buffers if b.kind == "argument"}
    assert shapes == {
        ("bf16[512,2048]", "argument", "x"),
        ("bf16[4,256,1024]", "argument", "up"),
        ("bf16[4,1024,256]", "argument", "down"),
    }
    assert small.needed_bytes > 2 * 2**20 * 5
    # what remat would compute again is not there: 3 matmuls forward and back, of each layer 2
    assert small.model_flops == pytest.approx(2 * 3 * 4 * 2 * 4096 * 2048 * 4096, rel=0.01)
    assert 0.1 < small.utilisation < 1.0


@pytest.mark.slow
def test_what_lies_in_the_cores_own_memory_is_no_part_of_the_peak():
    def f(x, w):  # the product, 32 MiB, is not in the device's memory; XLA's own figure is 100 MiB
        return jax.numpy.sin(x @ w) @ w.T

    bf16 = jax.numpy.bfloat16
    args = (jax.ShapeDtypeStruct((4096, 1024), bf16), jax.ShapeDtypeStruct((1024, 16384), bf16))
    specs = (jax.P("x"), jax.P())
    found = spmd.aot(f, *args, mesh={"x": 4}, topology="v5e:2x2", in_shardings=specs)
    assert found.needed_bytes / 2**20 == pytest.approx(2 + 32 + 2, abs=0.1)


@pytest.mark.slow
def test_the_schedule_has_every_collective_of_the_program(small):
    found = {(t.kind, t.axes): 0 for t in small.transfers}
    for t in small.transfers:
        found[t.kind, t.axes] += t.count
    # Per layer: both weights are gathered forward and backward, and their gradients scattered;
    # what tensor splits is summed once forward and once backward.
    assert found["all_gather", ("data",)] == 4 * 4
    assert found["reduce_scatter", ("data",)] == 2 * 4
    assert found["all_reduce", ("tensor",)] == 2 * 4
    assert all(t.source.startswith("aot_case.py:") for t in small.transfers if t.source)
    schedule = small.schedule
    assert schedule.exact and schedule.unestimated < 0.1 * schedule.compute
    # on v3 nothing is asynchronous
    assert schedule.exposed == pytest.approx(sum(t.seconds for t in small.transfers))
    # XLA's cycles are not below what the peak allows
    assert schedule.compute > small.model_flops / 32 / 61.5e12


@pytest.mark.slow
def test_the_result_is_frozen_prints_and_is_written(small, tmp_path):
    with pytest.raises(dataclasses.FrozenInstanceError):
        small.fits = False
    small.write(str(tmp_path / "out.json"))
    read = json.loads((tmp_path / "out.json").read_text())
    assert read["utilisation"] == small.utilisation
    assert read["schedule"]["transfers"][0]["kind"] == small.transfers[0].kind
    lines = str(small).splitlines()
    assert lines[0].startswith("data=8, tensor=4 on v3:4x4, 32 devices (jax ")
    assert lines[1].startswith("fits: ") and lines[1].endswith(" of 15.48 GiB per device")


def test_a_program_that_is_too_large_is_a_result():
    found = spmd.aot(aot_case.step, *aot_case.huge(), mesh=MESH, topology="v3:4x4")
    assert not found.fits
    assert found.schedule is None and found.utilisation is None
    assert found.needed_bytes > found.available_bytes > 15 * 2**30
    # the saved input of each layer: 64 x (1M / 8) x 4096 bf16
    largest = found.buffers[0]
    assert largest.shape == "bf16[64,131072,4096]" and largest.bytes == 64 * 131072 * 4096 * 2
    assert largest.source.startswith("aot_case.py:")
    assert "does not fit: " in str(found)
    json.dumps(found.to_json())


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("v5p:4x4x4", (16, 4)),
        ("v4:2x2x4", (4, 4)),
        ("v5e:4x4", (2, 8)),
        ("v6e:2x4", (2, 4)),
        ("v5e:4x4*2", (4, 8)),
    ],
)
def test_axes_lie_as_jax_lays_them_on_what_libtpu_describes(text, sizes):
    machine = Machine.parse(text)
    mesh, layout = described_mesh(machine, dict(zip(("data", "tensor"), sizes, strict=True)))
    options = {"chip_config_name": "megacore"} if text.startswith("v4") else {}
    if machine.slices > 1:
        options["num_slices"] = machine.slices
    topo = topologies.get_topology_desc(
        platform="tpu", topology_name=text.split("*")[0], **options
    )
    if machine.slices > 1:
        inner = (sizes[0] // machine.slices, sizes[1])
        expected = mesh_utils.create_hybrid_device_mesh(
            inner, (machine.slices, 1), topo.devices, allow_split_physical_axes=True
        )
    else:
        expected = mesh_utils.create_device_mesh(
            sizes, topo.devices, allow_split_physical_axes=True
        )
    places = [[(getattr(d, "slice_index", 0), *d.coords) for d in devices.flat]
              for devices in (mesh.devices, expected)]  # fmt: skip
    assert places[0] == places[1]
    assert layout.positions.shape[:2] == sizes


def test_both_cores_of_a_v3_chip_are_devices():
    mesh, layout = described_mesh(Machine.parse("v3:4x4"), MESH)
    for device, place in zip(mesh.devices.flat, layout.positions.reshape(32, -1), strict=True):
        assert (*device.coords[:2], device.core_on_chip) == tuple(place[1:])


def test_what_libtpu_refuses_is_explained():
    with pytest.raises(MeshError) as error:
        described_mesh(Machine.parse("v5p:3x3x3"), {"data": 27})
    first, why, fix = str(error.value).splitlines()
    assert first == "topology v5p:3x3x3"
    assert why.startswith("  why: libtpu refuses it: INVALID_ARGUMENT: Topology layout")
    assert fix.startswith("  fix: use a size that the chip comes in")


def test_a_function_with_a_mesh_of_its_own_is_refused():
    with pytest.raises(ArgumentError) as error:
        spmd.aot(spmd.jit(aot_case.step), mesh=MESH, topology="v3:4x4")
    assert str(error.value) == (
        "spmd.aot of step, which is an spmd.jit\n"
        "  why: the mesh of a described topology is made here, and that function has its own\n"
        "  fix: pass the function itself, and the options of spmd.jit to spmd.aot"
    )


def test_the_command_says_what_does_not_fit(tmp_path):
    out = tmp_path / "out.json"
    command = [
        sys.executable, "-m", "spmd", "aot", "tests.e2e.aot_case:step",
        "--args", "tests.e2e.aot_case:huge", "--mesh", "data=8,tensor=4",
        "--topology", "v3:4x4", "--json", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "does not fit: " in done.stdout
    assert "Traceback" not in done.stderr and "compile" in done.stderr
    assert json.loads(out.read_text())["fits"] is False


def test_devices_of_this_process_still_work_afterwards():
    described_mesh(Machine.parse("v5e:2x2"), {"data": 4})
    assert jax.devices()[0].platform == "cpu"
    assert float(jax.jit(lambda x: x + 1)(1.0)) == 2.0


@pytest.mark.slow
def test_train_compiles_its_step():
    command = [
        sys.executable, "train.py", "--aot", "v3:2x2", "--mesh", "fsdp=4,tensor=2",
        "--num-layers", "2",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "fits: " in done.stdout and "utilisation" in done.stdout


@pytest.mark.parametrize("code", [0, 1])
def test_train_ends_with_all_processes_after_compiling_too(monkeypatch, code):
    ended = []
    monkeypatch.setattr(train.hosts, "simulate", lambda *_: True)  # it is done
    monkeypatch.setattr(train.end, "finish", lambda: ended.append("together"))
    monkeypatch.setattr(train, "compile_ahead", lambda *_: code)
    assert train.main(["--aot", "v5e:2x4", "--num-kv-heads", "4"]) == code
    assert ended == ["together"]


@pytest.mark.slow
def test_train_compiles_for_axes_between_slices():
    command = [
        sys.executable, "train.py", "--aot", "v5e:2x2*2", "--mesh", "data=2@dcn,fsdp=4",
        "--parallelism", "data+fsdp", "--num-layers", "1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "mesh: data=2@dcn, fsdp=4" in done.stdout and "over dcn" in done.stdout


def test_train_refuses_axes_between_slices_of_a_topology_with_one(monkeypatch, capsys):
    monkeypatch.setattr(train.hosts, "simulate", lambda *_: True)  # it is done
    argv = ["--aot", "v5p:2x2x2", "--mesh", "data=2@dcn,fsdp=4", "--parallelism", "data+fsdp"]
    assert train.main(argv) == 2
    assert capsys.readouterr().err == (
        "error: --mesh data=2@dcn,fsdp=4\n"
        "  why: data=2@dcn needs devices in 2 slices or nodes, and they are all in one slice or"
        " node\n"
        "  fix: leave @dcn out\n"
    )


def test_train_explains_a_topology_that_is_none():
    command = [sys.executable, "train.py", "--aot", "v3p:2x2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "there is no chip 'v3p' (did you mean 'v3'?)" in done.stderr
