"""Machines: what a description means, how mesh axes lie, and what collectives take."""

import numpy as np
import pytest

from sharding.errors import ArgumentError, MeshError
from spmd import chips
from spmd.hardware import CHIPS, Machine

GB = 1e9


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("v5p:4x4x4", 64),
        ("v3:32x32", 2048),  # 1,024 chips of two cores
        ("v4:4x4x4", 64),  # megacore: a chip is one device
        ("v5e:16x16*2", 512),
        ("h100:8", 8),
        ("h100:4x8", 32),
        ("cpu:8", 8),
    ],
)
def test_parse_counts_devices_and_prints_what_it_read(text, devices):
    machine = Machine.parse(text)
    assert machine.devices == devices
    assert str(machine) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "v5pp:4x4x4",
            "topology 'v5pp:4x4x4'\n"
            "  why: there is no chip 'v5pp' (did you mean 'v5p'?)\n"
            "  fix: the chips are v2, v3, v4, v5e, v5p, v6e, l4, a100, h100, h200, b200, cpu",
        ),
        (
            "v5litepod:4x4",
            "topology 'v5litepod:4x4'\n"
            "  why: there is no chip 'v5litepod' (did you mean 'v5e'?)\n"
            "  fix: the chips are v2, v3, v4, v5e, v5p, v6e, l4, a100, h100, h200, b200, cpu",
        ),
        (
            "v5p:4x4",
            "topology 'v5p:4x4'\n"
            "  why: v5p chips are wired in a 3-d torus, and 2 sizes are given\n"
            "  fix: give 3 sizes, e.g. v5p:4x4x4",
        ),
        (
            "h100:16",
            "topology 'h100:16'\n"
            "  why: a node of h100 holds at most 8 GPUs, and 16 are given\n"
            "  fix: write nodes x GPUs, e.g. h100:2x8",
        ),
        (
            "v5p",
            "topology 'v5p'\n"
            "  why: a topology is a chip, a colon, and sizes\n"
            "  fix: write it like v5p:4x4x4, v3:32x32, v5e:16x16*2, h100:8, h100:4x8 or cpu:8",
        ),
        (
            "v5e:0x4",
            "topology 'v5e:0x4'\n"
            "  why: a size is 0, and every dim has at least one chip\n"
            "  fix: write it like v5p:4x4x4, v3:32x32, v5e:16x16*2, h100:8, h100:4x8 or cpu:8",
        ),
        (
            "cpu:2x4",
            "topology 'cpu:2x4'\n  why: simulated devices have no wires\n  fix: write cpu:8",
        ),
    ],
)
def test_a_bad_description_is_explained(text, message):
    with pytest.raises(MeshError) as error:
        Machine.parse(text)
    assert str(error.value) == message


def test_sizes_that_do_not_multiply_up_are_explained():
    with pytest.raises(MeshError) as error:
        Machine.parse("v3:4x4").lay({"data": 4, "tensor": 4})
    assert str(error.value) == (
        "mesh data=4, tensor=4 on v3:4x4\n"
        "  why: data=4 x tensor=4 = 16 devices, and v3:4x4 has 32, 2 per chip\n"
        "  fix: use sizes whose product is 32, e.g. data=8"
    )


def test_an_unknown_axis_is_explained():
    with pytest.raises(MeshError) as error:
        Machine.parse("v5e:4x4*3").lay({"data": 16, "tensor": 3}).over("date")
    assert str(error.value) == (
        "axis 'date'\n"
        "  why: the mesh data=16, tensor=3 has no such axis (did you mean 'data'?)\n"
        "  fix: name axes of the mesh"
    )


def test_slices_go_to_the_first_axes_that_they_divide():
    layout = Machine.parse("v5e:3x4*10").lay({"data": 4, "tensor": 30})
    extents = [[(w.dim, w.extent) for w in layout[a].wires if w.dim == "network"] for a in
               ("data", "tensor")]  # fmt: skip
    assert extents == [[("network", 2)], [("network", 5)]]


def test_an_unknown_rate_is_explained():
    assert CHIPS["v5p"].peak("bfloat16") == 459e12
    with pytest.raises(ArgumentError) as error:
        CHIPS["v5p"].peak("float8")
    assert str(error.value) == (
        "peak of v5p in float8\n"
        "  why: rates are known for bfloat16, int8, float32\n"
        "  fix: count in bfloat16, or add the rate to CHIPS in spmd/chips.py"
    )


@pytest.mark.parametrize(
    ("text", "mesh", "lies"),
    [
        (
            "v5p:4x4x4",
            {"data": 16, "tensor": 4},
            "data=16 on y:4 ring, z:4 ring; 400 GB/s, 1.25 hops\n"
            "tensor=4 on x:4 ring; 200 GB/s, 1.00 hops",
        ),
        (  # a slice that is not made of whole cubes has no links between its ends
            "v5p:2x2x4",
            {"data": 4, "tensor": 4},
            "data=4 on z:4 line; 100 GB/s, 1.50 hops\n"
            "tensor=4 on x:2 line, y:2 line; 200 GB/s, 1.50 hops",
        ),
        (  # the GSPMD paper's mesh on a full pod; two cores share 82 GB/s links
            "v3:32x32",
            {"data": 32, "tensor": 64},
            "data=32 on y:32 ring; 82 GB/s, 1.00 hops\n"
            "tensor=64 on x:32 ring, core:2; 82 GB/s, 1.50 hops",
        ),
        (  # tensor splits x, data gets the other part with stride 4
            "v5e:16x16",
            {"data": 64, "tensor": 4},
            "data=64 on x:4 ring stride 4, y:16 ring; 125 GB/s, 1.25 hops\n"
            "tensor=4 on x:4 line; 50 GB/s, 1.50 hops",
        ),
        (
            "v5e:16x16*2",
            {"data": 32, "tensor": 16},
            "data=32 on network:2, y:16 ring; 3.12 GB/s, 1.06 hops\n"
            "tensor=16 on x:16 ring; 100 GB/s, 1.00 hops",
        ),
        (
            "h100:4x8",
            {"data": 2, "tensor": 16},
            "data=2 on network:2; 50 GB/s, 1.00 hops\n"
            "tensor=16 on network:2, switch:8; 50 GB/s, 1.12 hops",
        ),
    ],
)
def test_axes_lie_where_they_should(text, mesh, lies):
    assert str(Machine.parse(text).lay(mesh)) == lies


def test_badness_grows_with_hops_and_shared_links():
    lay = Machine.parse("v5e:16x16").lay({"data": 64, "tensor": 4})
    assert Machine.parse("v5e:16x16").lay({"data": 16, "tensor": 16})["data"].badness == 1.0
    assert lay["tensor"].badness == 6 / 4  # three links of 1 hop, and 3 back to the start
    assert lay["data"].badness == lay["data"].hops * 4 > 4
    assert not lay["data"].crosses_network
    assert Machine.parse("h100:4x8").lay({"data": 4, "tensor": 8})["data"].crosses_network


def test_every_device_is_placed_once():
    for text, mesh in [("v3:8x8", (8, 16)), ("v5e:4x4*2", (4, 8)), ("v5p:4x4x8", (4, 8, 4))]:
        machine = Machine.parse(text)
        layout = machine.lay(dict(zip("abc", mesh, strict=False)))
        flat = layout.positions.reshape(machine.devices, -1)
        assert len(np.unique(flat, axis=0)) == machine.devices


def test_sub_axes_and_several_axes():
    layout = Machine.parse("v5p:4x4x4").lay({"data": 16, "tensor": 4})
    assert layout.over("data:(1)4").wires[0].dim == "y"
    assert layout.over("data:(4)4").wires[0].dim == "z"
    both = layout.over("data", "tensor")
    assert both.size == 64
    assert [w.dim for w in both.wires] == ["x", "y", "z"]
    assert both.bandwidth == 600 * GB


@pytest.mark.parametrize(
    ("kind", "milliseconds"),
    [
        # tensor=16 is a whole ring of v5e: 1 GB, 15/16 of it sent at 2 x 50 GB/s
        ("all_gather", 9.375),
        ("reduce_scatter", 9.375),
        ("all_reduce", 18.75),
        # the scaling book: a quarter of the data of the whole ring, 16 GB / 4 at 100 GB/s
        ("all_to_all", 40.0),
        ("permute", 20.0),  # 1 GB at 50 GB/s
    ],
)
def test_times_on_a_ring(kind, milliseconds):
    layout = Machine.parse("v5e:16x16").lay({"data": 16, "tensor": 16})
    assert layout.time(kind, ("tensor",), 1 * GB) == pytest.approx(milliseconds / 1e3)


def test_times_on_levels():
    # 3/4 of 1 GB / 8 between nodes at 50 GB/s, then 7/8 of 1 GB at 450 GB/s
    layout = Machine.parse("h100:4x8").lay({"data": 4, "tensor": 8})
    expected = 0.75 / 8 / 50 + 7 / 8 / 450
    assert layout.time("all_gather", ("data", "tensor"), 1 * GB) == pytest.approx(expected)
    # A switch has no middle: 7/8 of 1 GB leaves each device at 450 GB/s.
    assert layout.time("all_to_all", ("tensor",), 1 * GB) == pytest.approx(7 / 8 / 450)
    # Both cores of a v3 chip receive half of the data over links of 82 GB/s each way, that they
    # share: 31/32 of 0.5 GB at 82 GB/s each. Handing the other half over takes less.
    pod = Machine.parse("v3:32x32").lay({"data": 32, "tensor": 64})
    assert pod.time("all_gather", ("tensor",), 1 * GB) == pytest.approx(31 / 64 / 82)


def test_small_transfers_take_their_latency():
    layout = Machine.parse("v5e:16x16").lay({"data": 16, "tensor": 16})
    assert layout.time("all_gather", ("tensor",), 1.0) == pytest.approx(8e-6)  # halfway around
    assert layout.time("all_gather", (), 1.0) == 0.0


def test_wire_bytes_and_payload_agree():
    layout = Machine.parse("v5e:16x16").lay({"data": 16, "tensor": 16})
    wire = 2 * GB * 15 / 16
    by_wire = layout.wire_time("all_reduce", ("tensor",), wire)
    assert by_wire == pytest.approx(layout.time("all_reduce", ("tensor",), 1 * GB))


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("cpu", "cpu"),
    ],
)
def test_a_chip_is_known_by_the_kind_of_its_devices(device_kind, name):
    found = chips.of_kind(device_kind)
    assert found is not None and found.name == name


def test_a_chip_that_nobody_described_is_not_known():
    assert chips.of_kind("NVIDIA GeForce RTX 4090") is None
