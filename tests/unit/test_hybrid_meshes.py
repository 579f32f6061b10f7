"""Axes between slices or nodes: how they are laid, named, priced and reported."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spmd
from sharding import P
from sharding.errors import MeshError
from sharding.mesh import MeshShape, refine
from spmd import cost
from spmd.hardware import Machine
from spmd.mesh_text import mesh_text, read_across
from spmd.reporting.model import Report
from spmd.runtime.hybrid import count_nodes, make_mesh
from training.config import MeshConfig, RunConfig
from training.mesh_text import read_mesh
from training.validate import validate

HYBRID = MeshShape((("data", 2), ("fsdp", 4)), across=(("data", 2),))


@pytest.fixture
def two_nodes(monkeypatch):
    monkeypatch.setenv("SPMD_NODES", "2")


def ids(mesh):
    return np.vectorize(lambda d: d.id)(mesh.devices).tolist()


def matmul(mesh):
    """[2048, 64] x [64, 2100], the contraction on `data` on the left, on `fsdp` on the right."""
    function = spmd.jit(
        lambda x, w: x @ w,
        mesh=mesh,
        in_shardings=(P(None, "data"), P("fsdp")),
        out_shardings=P(),
        disable_passes=["moved_axes"],  # which would need no sum
    )
    x = jax.ShapeDtypeStruct((2048, 64), jnp.float32)
    w = jax.ShapeDtypeStruct((64, 2100), jnp.float32)
    return function.trace(x, w).propagate().partition()


def test_an_axis_between_nodes_has_a_device_of_each(two_nodes):
    mesh = make_mesh({"data": 2, "fsdp": 4}, {"data": 2})
    assert count_nodes() == 2
    assert ids(mesh) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert str(MeshShape.of(mesh).placed_text()) == "data=2@dcn, fsdp=4"
    last = make_mesh({"fsdp": 4, "data": 2}, {"data": 2})
    assert ids(last) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert MeshShape.of(last).across == (("data", 2),)


def test_without_a_word_nodes_go_to_the_first_axes(two_nodes):
    mesh = make_mesh({"data": 4, "fsdp": 2}, {})
    assert MeshShape.of(mesh).placed_text() == "data=4(2@dcn), fsdp=2"


def test_devices_of_one_node_cross_nothing():
    mesh = make_mesh({"data": 2, "fsdp": 4}, {})
    assert (count_nodes(), MeshShape.of(mesh).across) == (1, ())


def test_another_number_of_nodes_is_refused(two_nodes):
    with pytest.raises(MeshError) as error:
        make_mesh({"data": 4, "fsdp": 2}, {"data": 4})
    assert str(error.value) == (
        "mesh data=4@dcn (4 ways), fsdp=2\n"
        "  why: its axes cross the network between 4 slices or nodes, and the devices lie in 2\n"
        "  fix: put axes with the product 2 on the network, e.g. data=2@dcn"
    )


def test_slices_say_themselves_where_they_are():
    devices = [dataclasses.make_dataclass("D", ["platform", "slice_index"], frozen=True)("tpu", i)
               for i in (0, 1)]  # fmt: skip
    from sharding.nodes import node_of

    assert [node_of(d) for d in devices] == [0, 1]


def test_parts_of_an_axis_know_whether_they_cross():
    mesh = MeshShape((("data", 8),), across=(("data", 2),))
    assert [mesh.nodes_along(r) for r in ("data", "data:(1)2", "data:(2)4", "data:(1)4")] == [
        2, 2, 1, 2
    ]  # fmt: skip
    assert refine(mesh, {"data:(1)2"}).across == (("data:(1)2", 2),)


@pytest.mark.parametrize(
    ("kind", "axes", "wire", "far"),
    [
        ("all_gather", ("fsdp",), 75.0, 0.0),
        ("all_gather", ("data",), 50.0, 50.0),
        # 100 bytes: 7/8 of them in a flat ring; half of what a device has of a quarter between.
        ("all_gather", ("data", "fsdp"), 87.5, 12.5),
        ("all_reduce", ("data", "fsdp"), 175.0, 25.0),
        ("all_to_all", ("data", "fsdp"), 87.5, 50.0),
        ("permute", ("data",), 100.0, 100.0),
    ],
)
def test_what_goes_over_the_network_is_told_apart_and_dearer(kind, axes, wire, far):
    assert cost.network_bytes(kind, axes, wire, HYBRID) == pytest.approx(far)
    dearer = cost.LINK_BYTES_PER_S / cost.NETWORK_BYTES_PER_S
    assert cost.priced(kind, axes, wire, HYBRID) == pytest.approx(wire + far * (dearer - 1))
    assert cost.priced(kind, axes, wire, MeshShape(HYBRID.axes)) == wire


def test_a_plan_spares_the_network(two_nodes, monkeypatch):
    mesh = make_mesh({"data": 2, "fsdp": 4}, {"data": 2})
    spared = matmul(mesh)
    monkeypatch.setenv("SPMD_NODES", "1")
    free = matmul(mesh)
    assert {c.axes for c in free.collectives if c.kind == "all_reduce"} == {("data", "fsdp")}
    assert {c.axes for c in spared.collectives if c.kind == "all_reduce"} == {("fsdp",)}

    def far(partitioned):
        return sum(cost.network_bytes(c.kind, c.axes, c.bytes, HYBRID) for c in
                   partitioned.collectives)  # fmt: skip

    # Each device has an eighth of what is gathered: half of that is on the other node.
    assert far(spared) == 2048 * 64 * 4 / 8 < far(free) / 10
    text = str(spared)
    assert text.startswith("mesh data=2@dcn, fsdp=4\n")
    assert "  all_gather(data+fsdp) x1 458,752 B, 65,536 B of it over dcn" in text
    assert "dcn" not in str(free)


def test_a_mesh_without_devices_may_say_which_axes_cross(monkeypatch):
    inside, across = matmul(MeshShape(HYBRID.axes)), matmul(HYBRID)
    assert str(inside) == str(matmul(dict(HYBRID.axes))) != str(across)
    options = [stage.propagated.traced.options for stage in (inside, across)]
    assert options[0] != options[1] and options[0].mesh is options[1].mesh
    monkeypatch.setenv("SPMD_NODES", "2")
    assert str(across) == str(matmul(make_mesh({"data": 2, "fsdp": 4}, {"data": 2})))


def test_a_report_has_the_network_in_bytes_and_time(two_nodes):
    partitioned = matmul(make_mesh({"data": 2, "fsdp": 4}, {"data": 2}))
    report = spmd.report(partitioned, machine="h100:2x4")
    by_axes = {c.axes: c for c in report.communication}
    gathered = by_axes["data", "fsdp"]
    assert (gathered.bytes, gathered.network) == (458752, 65536)
    assert by_axes["fsdp",].network == 0
    assert gathered.seconds > 65536 / 5e10  # InfiniBand, not NVLink
    assert report.across == {"data": 2} and report.network_bytes == 65536
    text = str(report)
    assert "data=2@dcn fsdp=4 (8 devices)" in text
    assert "64.0 KiB of it over dcn" in text and "64.0 KiB over dcn" in text
    assert Report.from_json(report.to_json()) == report
    nominal = partitioned.why("all_gather(data+fsdp)").collectives[0].seconds
    assert nominal > 65536 / cost.NETWORK_BYTES_PER_S


def test_a_machine_with_another_number_of_nodes_is_refused():
    with pytest.raises(MeshError) as error:
        Machine.parse("v5e:2x4").lay(HYBRID)
    assert str(error.value) == (
        "mesh data=2@dcn, fsdp=4 on v5e:2x4\n"
        "  why: its axes cross the network between data=2 = 2 slices or nodes, and v5e:2x4 has 1\n"
        "  fix: name a machine of 2 slices or nodes, with 4 devices each, or let the axes with @dcn"
        " have the product 1"
    )


def test_the_network_goes_to_the_axis_that_says_so():
    last = MeshShape((("fsdp", 4), ("data", 2)), across=(("data", 2),))
    layout = Machine.parse("h100:2x4").lay(last)
    assert layout["data"].crosses_network and not layout["fsdp"].crosses_network
    unsaid = Machine.parse("h100:2x4").lay(MeshShape(last.axes))
    assert unsaid["fsdp"].crosses_network


def test_mesh_texts_are_read_and_written():
    mesh, problems = read_mesh("data=2@dcn,fsdp=-1", 8)
    assert (mesh, problems) == ({"data": 2, "fsdp": 4}, [])
    across = read_across("data=2@dcn,fsdp=-1", mesh)
    assert across == {"data": 2} and mesh_text(mesh, across) == "data=2@dcn,fsdp=4"


def problems_of(mesh, nodes=None, processes=1):
    run = dataclasses.replace(RunConfig(), mesh=MeshConfig(mesh=mesh, parallelism="fsdp"))
    return [str(p) for p in validate(run, 8, nodes, processes)]


@pytest.mark.parametrize(
    ("mesh", "nodes", "processes", "message"),
    [
        (
            "data=2@wan,fsdp=4", None, 1,
            "--mesh data=2@wan,fsdp=4\n"
            "  why: '@wan' is no network; @dcn is the one between slices or nodes\n"
            "  fix: write data=2@dcn, or data=2",
        ),
        (
            "data=4@dcn,fsdp=2", 2, 1,
            "--mesh data=4@dcn,fsdp=2\n"
            "  why: data=4@dcn needs devices in 4 slices or nodes, and they are in 2\n"
            "  fix: give @dcn axes the product 2",
        ),
        (
            "data=2@dcn,fsdp=4", 1, 2,
            "--mesh data=2@dcn,fsdp=4\n"
            "  why: data=2@dcn needs devices in 2 slices or nodes, and they are all in one slice"
            " or node\n"
            "  fix: leave @dcn out",
        ),
        (
            "data=4@dcn,fsdp=2", None, 2,
            "--mesh data=4@dcn,fsdp=2\n"
            "  why: data=4@dcn needs 4 nodes, and 2 processes do not make 4 alike\n"
            "  fix: start 4 processes, or give @dcn axes a product that divides 2",
        ),
    ],
)  # fmt: skip
def test_a_mesh_that_does_not_lie_like_that_is_refused(mesh, nodes, processes, message):
    assert message in problems_of(mesh, nodes, processes)


def test_processes_stand_for_nodes():
    assert problems_of("data=2@dcn,fsdp=4", None, 1) == []
    assert problems_of("data=2@dcn,fsdp=4", None, 4) == []
    assert problems_of("data=2@dcn,fsdp=4", 2, 1) == []
